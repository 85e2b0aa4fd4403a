//! The operations of training as kernels for GPUs, on tensors.
//!
//! Each function computes what its twin in [`crate::kernels`] does, in f32 between its inputs and its outputs, which are
//! f32 or bf16. Other types are composed of tensor operations.

// Reason: kernels take addresses. Shapes and types are checked here, so that callers cannot get them wrong.
#![expect(unsafe_code, reason = "launches of kernels")]

mod adamw;
mod attention;
mod cross_entropy;
mod embedding;
#[cfg(test)]
mod parity;
mod rms_norm;
mod rope;
mod swiglu;

pub(crate) use adamw::adamw;
pub(crate) use attention::{attention, attention_backward, has_width};
pub(crate) use cross_entropy::cross_entropy;
pub(crate) use embedding::embed_backward;
pub(crate) use rms_norm::{rms_norm, rms_norm_backward};
pub(crate) use rope::rope;
pub(crate) use swiglu::{swiglu, swiglu_backward};

use super::machine::{Launch, Machine, Operand};
use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// Threads of a block that has a row, or elements of any kind.
const THREADS: u32 = 256;

/// Neighbours that a thread loads at once where rows allow it.
const NEIGHBOURS: usize = 4;

/// The machine whose kernels take `tensor`; none where there is no GPU, or there are no kernels for its type.
///
/// # Errors
/// If the device fails.
pub(crate) fn machine(tensor: &Tensor) -> Result<Option<Arc<dyn Machine>>> {
    if !matches!(tensor.dtype(), DType::F32 | DType::BF16) {
        return Ok(None);
    }
    match tensor.device() {
        #[cfg(test)]
        Device::Cpu => Ok(super::testing::stand_in()),
        #[cfg(feature = "cuda")]
        device @ Device::Cuda(_) => super::machine::machine(device).map(Some),
        _ => Ok(None),
    }
}

/// Whether tensors of the CPU stand for those of a GPU, which happens in tests only.
pub(crate) fn is_emulated() -> bool {
    #[cfg(test)]
    let is_emulated = super::testing::stand_in().is_some();
    #[cfg(not(test))]
    let is_emulated = false;
    is_emulated
}

/// A kernel, and how many threads run it.
struct Kernel<'a> {
    file: &'a str,
    name: &'a str,
    /// Blocks of threads, across, down and in depth.
    grid: [usize; 3],
    threads: u32,
    /// Bytes of shared memory that the kernel does not name itself.
    shared: usize,
}

impl<'a> Kernel<'a> {
    /// A kernel of blocks of 256 threads that names its own shared memory.
    fn new(file: &'a str, name: &'a str, [across, down]: [usize; 2]) -> Self {
        Kernel { file, name, grid: [across, down, 1], threads: THREADS, shared: 0 }
    }

    /// Runs it.
    ///
    /// # Safety
    /// As [`Machine::launch`]; tensors that are set or changed share no memory with others.
    unsafe fn launch(&self, machine: &dyn Machine, operands: &[Operand<'_>]) -> Result<()> {
        let Kernel { file, name, grid, threads, .. } = *self;
        let shared = u32::try_from(self.shared).map_err(candle_core::Error::wrap)?;
        let function = machine.function(file, name, shared)?;
        machine.with_operands(operands, &mut |arguments| {
            let launch = Launch { function: &function, grid, threads, shared, arguments };
            // SAFETY: as the caller has promised.
            unsafe { machine.launch(&launch) }
        })
    }
}

/// The name of a kernel for the type of `tensor`.
fn typed(kernel: &str, tensor: &Tensor) -> String {
    format!("{kernel}_{}", tensor.dtype().as_str())
}

/// Neighbours that a thread takes at once of rows of `columns`.
fn neighbours(columns: usize) -> usize {
    if columns.is_multiple_of(NEIGHBOURS) { NEIGHBOURS } else { 1 }
}

/// Blocks of 256 threads for `count` elements, so many a thread.
fn blocks(count: usize, each: usize) -> usize {
    count.div_ceil(each * THREADS as usize)
}

/// A tensor without gaps that starts where neighbours can be loaded at once: itself, or a copy.
fn laid_out(tensor: &Tensor) -> Result<Tensor> {
    let is_aligned = tensor.layout().start_offset().is_multiple_of(2 * NEIGHBOURS);
    match tensor.is_contiguous() && is_aligned {
        true => Ok(tensor.clone()),
        false => tensor.force_contiguous(),
    }
}

/// That tensors are of the type and on the device of the first.
fn expect_alike(tensors: &[&Tensor]) -> Result<()> {
    for tensor in &tensors[1..] {
        if tensor.dtype() != tensors[0].dtype() {
            bail!("a kernel wants one type, not {:?} and {:?}", tensors[0].dtype(), tensor.dtype())
        }
        if !tensor.device().same_device(tensors[0].device()) {
            bail!("a kernel was called with tensors of several devices")
        }
    }
    Ok(())
}

/// A tensor of the type and on the device of another, all of which the kernel that is launched next sets.
fn unset(shape: impl Into<Shape>, like: &Tensor) -> Result<Tensor> {
    unset_of(like.dtype(), shape, like.device())
}

/// A tensor all of which the kernel that is launched next sets.
fn unset_of(dtype: DType, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    // SAFETY: as said, its elements are not read before they are set.
    unsafe { Tensor::empty(shape.into(), dtype, device) }
}
