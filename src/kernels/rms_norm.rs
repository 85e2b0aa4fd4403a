//! Root mean square normalisation (Zhang and Sennrich, 2019; arXiv 1910.07467).
//!
//! `y = x / sqrt(mean(x^2) + epsilon) * weight`, over the last dimension.

use super::{
    ROWS_PER_TASK,
    cuda::training,
    dispatch,
    packed::WeightType,
    real::{Real, dot, simd},
    rows::Rows,
    storage::{elements, tensor},
};
use candle_core::{D, DType, Result, Tensor};
use rayon::prelude::*;

/// Normalises the rows of `x (rows, width)` and scales them by `weight (width)`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    dispatch!(
        x,
        T => forward::<T>(x, weight, epsilon),
        machine => training::rms_norm(&*machine, x, weight, epsilon),
        composed(x, weight, epsilon)
    )
}

/// The gradients of `x` and `weight` given that of the output.
pub fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f64,
    gradient: &Tensor,
) -> Result<(Tensor, Tensor)> {
    dispatch!(
        x,
        T => backward::<T>(x, weight, epsilon, gradient),
        machine => training::rms_norm_backward(&*machine, x, weight, epsilon, gradient),
        composed_backward(x, weight, epsilon, gradient)
    )
}

fn forward<T: Real>(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    let (input, weight) = (elements::<T>(x)?, elements::<T>(weight)?);
    let mut out = vec![T::ZERO; input.len()];
    normalise(&input, &weight, epsilon, &mut out);
    tensor(out, x.shape())
}

/// [`rms_norm`] in memory that is there already.
pub(crate) fn normalise<T: Real>(x: &[T], weight: &[T], epsilon: f64, out: &mut [T]) {
    let width = weight.len();
    let task = ROWS_PER_TASK * width;
    out.par_chunks_mut(task).zip(x.par_chunks(task)).for_each(|(out, x)| {
        simd(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    let scale = inverse_rms(x, epsilon);
                    for i in 0..width {
                        out[i] = x[i] * scale * weight[i];
                    }
                }
            },
        );
    });
}

/// Normalises the rows of `x` as [`rms_norm`] does, for a product with a weight of type `kind`.
pub(crate) fn normalise_rows(
    x: &[f32],
    weight: &[f32],
    epsilon: f64,
    kind: WeightType,
    out: &mut Rows,
) {
    let width = weight.len();
    out.fill(
        kind,
        x.len() / width,
        width,
        #[inline(always)]
        |row, out| {
            let x = &x[row * width..][..width];
            let scale = inverse_rms(x, epsilon);
            out.set_with(
                #[inline(always)]
                |out| {
                    for i in 0..width {
                        out[i] = x[i] * scale * weight[i];
                    }
                },
            );
        },
    );
}

fn backward<T: Real>(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f64,
    gradient: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (input, scale, gradient) =
        (elements::<T>(x)?, elements::<T>(weight)?, elements::<T>(gradient)?);
    let mut of_input = vec![T::ZERO; input.len()];
    let mut of_weight = vec![T::ZERO; scale.len()];
    normalise_backward(&input, &scale, epsilon, &gradient, [&mut of_input, &mut of_weight]);
    Ok((tensor(of_input, x.shape())?, tensor(of_weight, weight.shape())?))
}

/// Adds the gradients of `x` and `weight` to what is there already.
pub(crate) fn normalise_backward<T: Real>(
    x: &[T],
    weight: &[T],
    epsilon: f64,
    gradient: &[T],
    [of_x, of_weight]: [&mut [T]; 2],
) {
    let width = weight.len();
    let task = ROWS_PER_TASK * width;
    let partial: Vec<Vec<T>> = of_x
        .par_chunks_mut(task)
        .zip(x.par_chunks(task).zip(gradient.par_chunks(task)))
        .map(|(of_x, (x, dy))| {
            let mut of_weight = vec![T::ZERO; width];
            simd(
                #[inline(always)]
                || backward_rows([x, dy, weight], epsilon, of_x, &mut of_weight),
            );
            of_weight
        })
        .collect();
    for part in &partial {
        of_weight.iter_mut().zip(part).for_each(|(sum, &x)| *sum += x);
    }
}

#[inline(always)]
fn backward_rows<T: Real>(
    [x, gradient, weight]: [&[T]; 3],
    epsilon: f64,
    of_x: &mut [T],
    of_weight: &mut [T],
) {
    let width = weight.len();
    let mut scaled = vec![T::ZERO; width];
    let rows = x.chunks_exact(width).zip(gradient.chunks_exact(width));
    for (of_x, (x, dy)) in of_x.chunks_exact_mut(width).zip(rows) {
        let scale = inverse_rms(x, epsilon);
        for i in 0..width {
            scaled[i] = dy[i] * weight[i];
            of_weight[i] += dy[i] * x[i] * scale;
        }
        let along = dot(&scaled, x) * scale * scale * scale / T::real(width as f64);
        for i in 0..width {
            of_x[i] += scaled[i] * scale - x[i] * along;
        }
    }
}

#[inline(always)]
fn inverse_rms<T: Real>(x: &[T], epsilon: f64) -> T {
    T::ONE / (dot(x, x) / T::real(x.len() as f64) + T::real(epsilon)).sqrt()
}

/// The statistics are taken in f32 at least, as every implementation of the family does.
fn wide(tensor: &Tensor) -> Result<Tensor> {
    match tensor.dtype() {
        DType::F64 | DType::F32 => Ok(tensor.clone()),
        _ => tensor.to_dtype(DType::F32),
    }
}

fn normalised(x: &Tensor, epsilon: f64) -> Result<(Tensor, Tensor)> {
    let x = wide(x)?;
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + epsilon)?.sqrt()?.recip()?;
    Ok((x.broadcast_mul(&scale)?, scale))
}

fn composed(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    normalised(x, epsilon)?.0.to_dtype(x.dtype())?.broadcast_mul(weight)
}

fn composed_backward(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f64,
    gradient: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (normalised, scale) = normalised(x, epsilon)?;
    let gradient = wide(gradient)?;
    let weight_gradient = (&gradient * &normalised)?.sum(0)?.to_dtype(weight.dtype())?;
    let scaled = gradient.broadcast_mul(&wide(weight)?)?;
    let along = (&scaled * &normalised)?.mean_keepdim(D::Minus1)?;
    let input_gradient = (scaled - normalised.broadcast_mul(&along)?)?.broadcast_mul(&scale)?;
    Ok((input_gradient.to_dtype(x.dtype())?, weight_gradient))
}

#[cfg(test)]
mod tests {
    use super::super::twin::{close, random};
    use super::*;

    fn check(rows: usize, width: usize, dtype: DType) {
        let x = random(&[rows, width], dtype);
        let (weight, gradient) = (random(&[width], dtype), random(&[rows, width], dtype));
        close(
            &rms_norm(&x, &weight, 1e-5).unwrap(),
            &composed(&x, &weight, 1e-5).unwrap(),
            "output",
        );
        let ours = rms_norm_backward(&x, &weight, 1e-5, &gradient).unwrap();
        let twin = composed_backward(&x, &weight, 1e-5, &gradient).unwrap();
        close(&ours.0, &twin.0, "gradient of the input");
        close(&ours.1, &twin.1, "gradient of the weight");
    }

    #[test]
    fn the_kernel_equals_its_composed_twin() {
        for dtype in [DType::F32, DType::F64] {
            for (rows, width) in [(1, 1), (3, 7), (65, 64), (200, 100), (129, 256)] {
                check(rows, width, dtype);
            }
        }
    }
}
