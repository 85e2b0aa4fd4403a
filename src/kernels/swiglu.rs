//! The gated activation of the family's feed-forward block (Shazeer, 2020; arXiv 2002.05202).
//!
//! `y = silu(gate) * up`, element by element, with `silu(x) = x / (1 + exp(-x))`.

use super::{
    dispatch,
    real::{Real, simd},
    storage::{elements, tensor},
};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

const ELEMENTS_PER_TASK: usize = 1 << 14;

/// Applies the gate to `up`. Both have the same shape.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    dispatch!(gate, T => forward::<T>(gate, up), gate.silu()? * up)
}

/// The gradients of `gate` and `up` given that of the output.
pub fn swiglu_backward(gate: &Tensor, up: &Tensor, gradient: &Tensor) -> Result<(Tensor, Tensor)> {
    dispatch!(
        gate,
        T => backward::<T>(gate, up, gradient),
        composed_backward(gate, up, gradient)
    )
}

fn forward<T: Real>(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (gates, ups) = (elements::<T>(gate)?, elements::<T>(up)?);
    let mut out = vec![T::ZERO; gates.len()];
    out.par_chunks_mut(ELEMENTS_PER_TASK)
        .zip(gates.par_chunks(ELEMENTS_PER_TASK).zip(ups.par_chunks(ELEMENTS_PER_TASK)))
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
    tensor(out, gate.shape())
}

fn backward<T: Real>(gate: &Tensor, up: &Tensor, gradient: &Tensor) -> Result<(Tensor, Tensor)> {
    let (gates, ups, gradients) =
        (elements::<T>(gate)?, elements::<T>(up)?, elements::<T>(gradient)?);
    let mut gate_gradient = vec![T::ZERO; gates.len()];
    let mut up_gradient = vec![T::ZERO; gates.len()];
    gate_gradient
        .par_chunks_mut(ELEMENTS_PER_TASK)
        .zip(up_gradient.par_chunks_mut(ELEMENTS_PER_TASK))
        .zip(gates.par_chunks(ELEMENTS_PER_TASK).zip(ups.par_chunks(ELEMENTS_PER_TASK)))
        .zip(gradients.par_chunks(ELEMENTS_PER_TASK))
        .for_each(|(((gate_out, up_out), (gate, up)), dy)| {
            simd(
                #[inline(always)]
                || {
                    for i in 0..dy.len() {
                        let open = sigmoid(gate[i]);
                        let silu = gate[i] * open;
                        gate_out[i] = dy[i] * up[i] * (open + silu * (T::ONE - open));
                        up_out[i] = dy[i] * silu;
                    }
                },
            );
        });
    Ok((tensor(gate_gradient, gate.shape())?, tensor(up_gradient, up.shape())?))
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
