//! The gated activation of the family's feed-forward block (Shazeer, 2020; arXiv 2002.05202).
//!
//! `y = silu(gate) * up`, element by element, with `silu(x) = x / (1 + exp(-x))`.

use super::{
    cuda::training,
    dispatch,
    real::{Real, simd},
    storage::{elements, tensor},
};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

const ELEMENTS_PER_TASK: usize = 1 << 14;

/// Applies the gate to `up`. Both have the same shape.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    dispatch!(
        gate,
        T => forward::<T>(gate, up),
        machine => training::swiglu(&*machine, gate, up),
        gate.silu()? * up
    )
}

/// The gradients of `gate` and `up` given that of the output.
pub fn swiglu_backward(gate: &Tensor, up: &Tensor, gradient: &Tensor) -> Result<(Tensor, Tensor)> {
    dispatch!(
        gate,
        T => backward::<T>(gate, up, gradient),
        machine => training::swiglu_backward(&*machine, gate, up, gradient),
        composed_backward(gate, up, gradient)
    )
}

fn forward<T: Real>(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (gates, ups) = (elements::<T>(gate)?, elements::<T>(up)?);
    let mut out = vec![T::ZERO; gates.len()];
    gated(&gates, &ups, &mut out);
    tensor(out, gate.shape())
}

/// [`swiglu`] in memory that is there already.
pub(crate) fn gated<T: Real>(gate: &[T], up: &[T], out: &mut [T]) {
    out.par_chunks_mut(ELEMENTS_PER_TASK)
        .zip(gate.par_chunks(ELEMENTS_PER_TASK).zip(up.par_chunks(ELEMENTS_PER_TASK)))
        .for_each(|(out, (gate, up))| {
            simd(
                #[inline(always)]
                || {
                    for i in 0..out.len() {
                        out[i] = gate[i] * sigmoid(gate[i]) * up[i];
                    }
                },
            );
        });
}

fn backward<T: Real>(gate: &Tensor, up: &Tensor, gradient: &Tensor) -> Result<(Tensor, Tensor)> {
    let (gates, ups) = (elements::<T>(gate)?, elements::<T>(up)?);
    let mut of_gate = vec![T::ZERO; gates.len()];
    let mut of_up = elements::<T>(gradient)?.to_vec();
    gated_backward(&gates, &ups, &mut of_gate, &mut of_up);
    Ok((tensor(of_gate, gate.shape())?, tensor(of_up, up.shape())?))
}

/// Writes the gradient of the gate, and that of `up` over that of the output, which `of_up` holds.
pub(crate) fn gated_backward<T: Real>(gate: &[T], up: &[T], of_gate: &mut [T], of_up: &mut [T]) {
    of_gate
        .par_chunks_mut(ELEMENTS_PER_TASK)
        .zip(of_up.par_chunks_mut(ELEMENTS_PER_TASK))
        .zip(gate.par_chunks(ELEMENTS_PER_TASK).zip(up.par_chunks(ELEMENTS_PER_TASK)))
        .for_each(|((of_gate, of_up), (gate, up))| {
            simd(
                #[inline(always)]
                || {
                    for i in 0..gate.len() {
                        let (open, dy) = (sigmoid(gate[i]), of_up[i]);
                        let silu = gate[i] * open;
                        of_gate[i] = dy * up[i] * (open + silu * (T::ONE - open));
                        of_up[i] = dy * silu;
                    }
                },
            );
        });
}

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp())
}

fn composed_backward(gate: &Tensor, up: &Tensor, gradient: &Tensor) -> Result<(Tensor, Tensor)> {
    let open = (gate.neg()?.exp()? + 1.0)?.recip()?;
    let silu = (gate * &open)?;
    let slope = (&open + (&silu * (1.0 - &open)?)?)?;
    Ok((((gradient * up)? * slope)?, (gradient * silu)?))
}

#[cfg(test)]
mod tests {
    use super::super::twin::{close, random};
    use super::*;
    use candle_core::DType;

    #[test]
    fn the_kernel_equals_its_composed_twin() {
        for dtype in [DType::F32, DType::F64] {
            for shape in [[1, 1], [3, 100], [70, 300]] {
                let (gate, up) = (random(&shape, dtype), random(&shape, dtype));
                let gradient = random(&shape, dtype);
                let twin = (gate.silu().unwrap() * &up).unwrap();
                close(&swiglu(&gate, &up).unwrap(), &twin, "output");
                let ours = swiglu_backward(&gate, &up, &gradient).unwrap();
                let twin = composed_backward(&gate, &up, &gradient).unwrap();
                close(&ours.0, &twin.0, "gradient of the gate");
                close(&ours.1, &twin.1, "gradient of the input");
            }
        }
    }
}
