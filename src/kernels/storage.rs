//! Tensors seen as slices.

use super::real::Real;
use candle_core::{
    CpuStorage, Device, InplaceOp1, Layout, Result, Storage, StorageRef, Tensor, bail,
};
use rayon::prelude::*;
use std::{cell::Cell, marker::PhantomData, ops::Deref};

/// The elements of a contiguous CPU tensor, borrowed for as long as this lives.
pub(crate) struct Elements<'a, T> {
    storage: StorageRef<'a>,
    start: usize,
    end: usize,
    element: PhantomData<T>,
}

/// Borrows the elements of `tensor`, which must be contiguous, on the CPU, and of type `T`.
pub(crate) fn elements<T: Real>(tensor: &Tensor) -> Result<Elements<'_, T>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a kernel wants contiguous tensors, not {layout:?}")
    };
    match &*storage {
        Storage::Cpu(cpu) => T::cpu_storage_as_slice(cpu)?,
        _ => bail!("a CPU kernel was called with a tensor on {:?}", tensor.device()),
    };
    Ok(Elements { storage, start, end, element: PhantomData })
}

impl<T: Real> Deref for Elements<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &*self.storage {
            Storage::Cpu(cpu) => {
                let all = T::cpu_storage_as_slice(cpu).expect("checked when it was borrowed");
                &all[self.start..self.end]
            }
            _ => unreachable!("checked when it was borrowed"),
        }
    }
}

/// The product of two matrices in tensors.
pub(crate) fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(test)]
    let product = super::cuda::footprint::only_result(|| a.matmul(b));
    #[cfg(not(test))]
    let product = a.matmul(b);
    product
}

/// Has `change` work on the elements of a contiguous f32 CPU tensor, in place.
pub(crate) fn change(tensor: &Tensor, change: impl FnOnce(&mut [f32])) -> Result<()> {
    tensor.inplace_op1(&Change(Cell::new(Some(change))))
}

/// Sets the elements of a contiguous f32 CPU tensor to zero, in their memory.
pub(crate) fn clear(tensor: &Tensor) -> Result<()> {
    change(tensor, |values| {
        values.par_chunks_mut(1 << 16).for_each(|values| values.fill(0.0));
    })
}

struct Change<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32])> InplaceOp1 for Change<F> {
    fn name(&self) -> &'static str {
        "change"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match (storage, layout.contiguous_offsets(), self.0.take()) {
            (CpuStorage::F32(all), Some((start, end)), Some(change)) => {
                change(&mut all[start..end]);
                Ok(())
            }
            _ => bail!("what is changed in place is contiguous and f32"),
        }
    }
}

/// A CPU tensor that owns `values`.
pub(crate) fn tensor<T: Real>(
    values: Vec<T>,
    shape: impl Into<candle_core::Shape>,
) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}
