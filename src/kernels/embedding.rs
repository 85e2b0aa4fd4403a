//! Rows of the embedding table, and the gradient that flows back into them.

use super::{
    cuda::training,
    dispatch,
    real::{Real, simd},
    storage::{elements, tensor},
};
use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

/// Tasks that share the gradient of the table by token id.
const STRIPES: usize = 64;

/// The rows of `table (vocabulary, width)` for `ids`: `(ids, width)`.
pub fn embed(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    table.index_select(&Tensor::new(ids, table.device())?, 0)
}

/// Sums the rows of `gradient (ids, width)` by token id into `(vocabulary, width)`.
///
/// Rows of one id are added in the order in which they stand, at f32 precision or better.
pub fn embed_backward(gradient: &Tensor, ids: &[u32], vocabulary: usize) -> Result<Tensor> {
    dispatch!(
        gradient,
        T => kernel::<T>(gradient, ids, vocabulary),
        machine => training::embed_backward(&*machine, gradient, ids, vocabulary),
        composed(gradient, ids, vocabulary)
    )
}

fn kernel<T: Real>(gradient: &Tensor, ids: &[u32], vocabulary: usize) -> Result<Tensor> {
    let width = gradient.dim(1)?;
    let mut out = vec![T::ZERO; vocabulary * width];
    add_rows(&elements::<T>(gradient)?, ids, &mut out);
    tensor(out, (vocabulary, width))
}

/// Writes the rows of `table` for `ids`.
pub(crate) fn copy_rows(table: &[f32], ids: &[u32], out: &mut [f32]) {
    let width = out.len() / ids.len().max(1);
    out.par_chunks_exact_mut(width.max(1)).zip(ids).for_each(|(out, &id)| {
        out.copy_from_slice(&table[id as usize * width..][..width]);
    });
}

/// Adds the rows of `gradient` to those of `out` by token id, in their order.
pub(crate) fn add_rows<T: Real>(gradient: &[T], ids: &[u32], out: &mut [T]) {
    if ids.is_empty() {
        return;
    }
    let width = gradient.len() / ids.len();
    let per_stripe = (out.len() / width).div_ceil(STRIPES).max(1);
    out.par_chunks_mut(per_stripe * width).enumerate().for_each(|(stripe, out)| {
        let first = stripe * per_stripe;
        let mine = first..first + out.len() / width;
        simd(
            #[inline(always)]
            || {
                for (id, row) in ids.iter().zip(gradient.chunks_exact(width)) {
                    if mine.contains(&(*id as usize)) {
                        let sum = &mut out[(*id as usize - first) * width..][..width];
                        for i in 0..width {
                            sum[i] += row[i];
                        }
                    }
                }
            },
        );
    });
}

fn composed(gradient: &Tensor, ids: &[u32], vocabulary: usize) -> Result<Tensor> {
    let wide = if gradient.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let zeros = Tensor::zeros((vocabulary, gradient.dim(1)?), wide, gradient.device())?;
    zeros.index_add(&Tensor::new(ids, gradient.device())?, &gradient.to_dtype(wide)?, 0)
}

#[cfg(test)]
mod tests {
    use super::super::twin::{close, random};
    use super::*;

    #[test]
    fn the_kernel_equals_its_composed_twin() {
        for dtype in [DType::F32, DType::F64] {
            for vocabulary in [1, 70, 500] {
                let ids: Vec<u32> = (0..200).map(|i| (i * i * 13 % vocabulary) as u32).collect();
                let gradient = random(&[200, 33], dtype);
                let ours = embed_backward(&gradient, &ids, vocabulary).unwrap();
                close(&ours, &composed(&gradient, &ids, vocabulary).unwrap(), "gradient");
            }
        }
    }
}
