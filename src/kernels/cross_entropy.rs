//! The output head with its cross-entropy, never holding the logits of all rows.
//!
//! ```text
//! logits = hidden x weight^T      loss(row) = ln(sum(exp(logits))) - logits[target]
//! ```
//!
//! The loss is a root: its gradient is known as soon as the logits are, so both passes are one call and
//! the logits of a chunk of rows are used for everything before the next chunk is made.

use super::{
    cuda::training,
    dispatch,
    linear::{self, Branch, Weight, sized},
    matmul::{Into, View, multiply_parallel},
    real::{Real, max, simd, sum},
    storage::{clear, elements, product, tensor},
};
use candle_core::{D, DType, Result, Tensor};
use rayon::prelude::*;

/// Rows whose logits exist at a time.
pub(crate) const CHUNK: usize = 256;

/// The same in tensors. What is added up for the head is as large as the head, however few rows a product has: on a GPU that
/// takes longer than products of some hundred rows.
pub(crate) const TENSOR_CHUNK: usize = 2048;

/// Losses, and the gradients if they were asked for.
#[derive(Debug)]
pub struct HeadLoss {
    /// One loss for each row, in nats.
    pub losses: Vec<f64>,
    /// Gradients of hidden rows and head weight, each loss weighing `scale`.
    pub gradients: Option<(Tensor, Tensor)>,
}

/// Whether the gradients of a loss are wanted, and the weight of each row in them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gradients {
    /// Losses only.
    Skip,
    /// The gradient of an objective that is made of the losses.
    Of(Objective),
}

/// What is to become small: `scale` times the sum of `loss + z_loss * ln(sum(exp(logits)))^2` over the rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// The weight of each row.
    pub scale: f64,
    /// The weight of what keeps the sum of exponentiated logits near 1 (Chowdhery et al., 2022, section 5; arXiv
    /// 2204.02311, with 1e-4). The losses that are reported do not have it in them.
    pub z_loss: f64,
}

impl Objective {
    /// The plain loss, each row weighing so much.
    pub fn scaled(scale: f64) -> Self {
        Objective { scale, z_loss: 0.0 }
    }

    /// The factor on the gradient of a row's logits, but for the target, given the logarithm of their sum.
    #[inline(always)]
    fn pull(&self, log_sum: f64) -> f64 {
        self.scale * (1.0 + 2.0 * self.z_loss * log_sum)
    }
}

/// The cross-entropy of `targets` under `hidden (rows, width) x weight^T (vocabulary, width)`.
///
/// # Panics
/// If there is not one target a row, or a target lies outside the vocabulary.
pub fn cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    gradients: Gradients,
) -> Result<HeadLoss> {
    assert_eq!(hidden.dim(0)?, targets.len(), "one target a row");
    let vocabulary = weight.dim(0)?;
    assert!(targets.iter().all(|&t| (t as usize) < vocabulary), "target outside the vocabulary");
    dispatch!(
        hidden,
        T => kernel::<T>(hidden, weight, targets, gradients),
        machine => in_chunks(hidden, weight, targets, gradients, |logits, targets| {
            training::cross_entropy(&*machine, logits, targets, gradients)
        }),
        composed(hidden, weight, targets, gradients)
    )
}

fn kernel<T: Real>(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    gradients: Gradients,
) -> Result<HeadLoss> {
    let (x, w) = (elements::<T>(hidden)?, elements::<T>(weight)?);
    let (vocabulary, width) = weight.dims2()?;
    let w = View::rows(&w, vocabulary, width, width);
    let mut losses = Vec::with_capacity(targets.len());
    let mut logits = vec![T::ZERO; CHUNK.min(targets.len()) * vocabulary];
    let (mut of_x, mut of_w) = match gradients {
        Gradients::Skip => (Vec::new(), Vec::new()),
        Gradients::Of(_) => (vec![T::ZERO; x.len()], vec![T::ZERO; vocabulary * width]),
    };
    for (chunk, targets) in targets.chunks(CHUNK).enumerate() {
        let at = chunk * CHUNK * width;
        let x = View::rows(&x[at..], targets.len(), width, width);
        let logits = &mut logits[..targets.len() * vocabulary];
        multiply_parallel(logits, vocabulary, x, w.transposed(), Into::Set);
        let chunk_losses: Vec<f64> = logits
            .par_chunks_mut(vocabulary)
            .zip(targets)
            .map(|(row, &target)| {
                simd(
                    #[inline(always)]
                    || loss_of_row(row, target as usize, gradients),
                )
            })
            .collect();
        losses.extend(chunk_losses);
        if gradients != Gradients::Skip {
            let of_logits = View::rows(logits, targets.len(), vocabulary, vocabulary);
            multiply_parallel(&mut of_x[at..], width, of_logits, w, Into::Set);
            multiply_parallel(&mut of_w, width, of_logits.transposed(), x, Into::Add);
        }
    }
    let gradients = match gradients {
        Gradients::Skip => None,
        Gradients::Of(_) => Some((tensor(of_x, hidden.shape())?, tensor(of_w, weight.shape())?)),
    };
    Ok(HeadLoss { losses, gradients })
}

/// Losses of `hidden (rows, width)` under a head in training, added to `losses`. With `gradients`, the
/// objective, the gradient of the hidden rows, and where that of the head goes, with what becomes of what is there.
///
/// # Errors
/// If the head is not a matrix of the CPU.
pub(crate) fn learn_rows(
    head: &Weight,
    hidden: &[f32],
    targets: &[u32],
    mut gradients: Option<(Objective, &mut [f32], (&Tensor, Into))>,
    (memory, scratch): (&mut HeadMemory, &mut linear::Scratch),
) -> Result<()> {
    let (vocabulary, width) = (head.outputs(), head.inputs());
    let HeadMemory { logits, losses } = memory;
    for (chunk, targets) in targets.chunks(CHUNK).enumerate() {
        let rows = chunk * CHUNK * width..(chunk * CHUNK + targets.len()) * width;
        let hidden = &hidden[rows.clone()];
        let logits = sized(logits, targets.len() * vocabulary);
        linear::forward([(head, &mut *logits)], hidden, scratch)?;
        let wanted = gradients.as_ref().map_or(Gradients::Skip, |own| Gradients::Of(own.0));
        losses.par_extend(logits.par_chunks_mut(vocabulary).zip(targets).map(|(row, &target)| {
            simd(
                #[inline(always)]
                || loss_of_row(row, target as usize, wanted),
            )
        }));
        if let Some((_, of_hidden, (of_weight, into))) = &mut gradients {
            let branch = Branch { weight: head, of_output: logits, of_weight, into: *into };
            linear::backward(&[branch], hidden, &mut of_hidden[rows], scratch)?;
            *into = Into::Add;
        }
    }
    match gradients {
        Some((_, _, (of_head, Into::Set))) => clear(of_head), // no row has a target
        _ => Ok(()),
    }
}

/// Memory of a head in training.
#[derive(Debug, Default)]
pub(crate) struct HeadMemory {
    logits: Vec<f32>,
    /// One loss for each row so far, in nats.
    pub(crate) losses: Vec<f64>,
}

/// The loss of one row; its logits become their own gradient.
#[inline(always)]
fn loss_of_row<T: Real>(logits: &mut [T], target: usize, gradients: Gradients) -> f64 {
    let top = max(logits);
    let wanted = logits[target];
    for logit in logits.iter_mut() {
        *logit = (*logit - top).exp();
    }
    let total = sum(logits);
    let log_total = total.to_f64().ln();
    if let Gradients::Of(objective) = gradients {
        let factor = T::real(objective.pull(log_total + top.to_f64())) / total;
        for logit in logits.iter_mut() {
            *logit *= factor;
        }
        logits[target] += -T::real(objective.scale);
    }
    log_total + (top - wanted).to_f64()
}

/// Losses of a chunk of targets under its logits, and, in learning, the gradient of the logits in their type.
type Turned = (Tensor, Option<Tensor>);

/// The products around what `turn` makes of the logits of each chunk.
fn in_chunks(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    gradients: Gradients,
    turn: impl Fn(Tensor, &[u32]) -> Result<Turned>,
) -> Result<HeadLoss> {
    let wide = if hidden.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (mut losses, mut of_x, mut of_w) = (Vec::new(), Vec::new(), None);
    for (chunk, targets) in targets.chunks(TENSOR_CHUNK).enumerate() {
        let x = hidden.narrow(0, chunk * TENSOR_CHUNK, targets.len())?;
        let (own, of_logits) = turn(product(&x, &weight.t()?)?, targets)?;
        losses.push(own);
        if let Some(of_logits) = of_logits {
            of_x.push(product(&of_logits, weight)?);
            let own = product(&of_logits.t()?, &x)?.to_dtype(wide)?;
            of_w = Some(match of_w {
                None => own,
                Some(sum) => (sum + own)?,
            });
        }
    }
    let of_x = match &of_x[..] {
        [] => hidden.zeros_like()?,
        [only] => only.clone(),
        several => Tensor::cat(several, 0)?,
    };
    let of_w = match (gradients, of_w) {
        (Gradients::Of(_), None) => Some(weight.zeros_like()?.to_dtype(wide)?), // no row has a target
        (_, of_w) => of_w,
    };
    // Losses are fetched once: a GPU goes on computing until then.
    let losses = match losses.is_empty() {
        true => Vec::new(),
        false => Tensor::cat(&losses, 0)?.to_dtype(DType::F64)?.to_vec1()?,
    };
    Ok(HeadLoss { losses, gradients: of_w.map(|of_w| (of_x, of_w)) })
}

fn composed(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    gradients: Gradients,
) -> Result<HeadLoss> {
    let (device, dtype) = (hidden.device(), hidden.dtype());
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    in_chunks(hidden, weight, targets, gradients, |logits, targets| {
        let rows = targets.len();
        let logits = logits.to_dtype(wide)?;
        let tops = logits.max_keepdim(D::Minus1)?;
        let shifted = logits.broadcast_sub(&tops)?;
        let index = Tensor::from_slice(targets, (rows, 1), device)?;
        let exponentials = shifted.exp()?;
        let totals = exponentials.sum_keepdim(D::Minus1)?;
        let log_totals = totals.log()?;
        let losses = (&log_totals - shifted.gather(&index, 1)?)?.flatten_all()?;
        let Gradients::Of(Objective { scale, z_loss }) = gradients else {
            return Ok((losses, None));
        };
        let minus_one = Tensor::full(-1.0f32, (rows, 1), device)?.to_dtype(wide)?;
        let pull = ((log_totals + tops)? * (2.0 * z_loss))? + 1.0;
        let of_logits = exponentials.broadcast_mul(&(pull? / &totals)?)?;
        let of_logits = (of_logits.scatter_add(&index, &minus_one, 1)? * scale)?;
        Ok((losses, Some(of_logits.to_dtype(dtype)?)))
    })
}

#[cfg(test)]
mod tests {
    use super::super::twin::{close, random};
    use super::*;

    fn check(rows: usize, vocabulary: usize, dtype: DType) {
        let (hidden, weight) = (random(&[rows, 24], dtype), random(&[vocabulary, 24], dtype));
        let targets: Vec<u32> = (0..rows).map(|row| (row * 7 % vocabulary) as u32).collect();
        let scaled = Gradients::Of(Objective { scale: 0.25, z_loss: 0.01 });
        let ours = cross_entropy(&hidden, &weight, &targets, scaled).unwrap();
        let twin = composed(&hidden, &weight, &targets, scaled).unwrap();
        let (of_ours, of_twin) = (ours.gradients.unwrap(), twin.gradients.unwrap());
        close(&of_ours.0, &of_twin.0, "gradient of the rows");
        close(&of_ours.1, &of_twin.1, "gradient of the head");
        let alone = cross_entropy(&hidden, &weight, &targets, Gradients::Skip).unwrap();
        assert_eq!(alone.losses, ours.losses);
        for (ours, twin) in ours.losses.iter().zip(&twin.losses) {
            assert!((ours - twin).abs() < 1e-5 * twin.abs().max(1.0), "{ours} and {twin}");
        }
    }

    #[test]
    fn the_kernel_equals_its_composed_twin() {
        for dtype in [DType::F32, DType::F64] {
            for (rows, vocabulary) in [(1, 2), (5, 100), (300, 129), (0, 8), (TENSOR_CHUNK + 9, 3)]
            {
                check(rows, vocabulary, dtype);
            }
        }
    }

    /// The objective of `hidden` and `weight`, as it is written.
    fn written(of: [&Tensor; 2], targets: &[u32], objective: Objective) -> f64 {
        let [hidden, weight] = of.map(|tensor| tensor.to_vec2::<f64>().unwrap());
        let row = |(hidden, &target): (&Vec<f64>, &u32)| {
            let logit = |weight: &Vec<f64>| -> f64 {
                weight.iter().zip(hidden).map(|(weight, hidden)| weight * hidden).sum()
            };
            let logits: Vec<f64> = weight.iter().map(logit).collect();
            let log_sum = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
            log_sum - logits[target as usize] + objective.z_loss * log_sum * log_sum
        };
        objective.scale * hidden.iter().zip(targets).map(row).sum::<f64>()
    }

    #[test]
    fn gradients_with_z_loss_equal_finite_differences() {
        let of = [random(&[7, 5], DType::F64), random(&[11, 5], DType::F64)];
        let targets = [0, 10, 3, 3, 7, 1, 9];
        let objective = Objective { scale: 0.25, z_loss: 0.3 };
        let loss = cross_entropy(&of[0], &of[1], &targets, Gradients::Of(objective)).unwrap();
        let (of_hidden, of_weight) = loss.gradients.unwrap();
        for (which, found) in [of_hidden, of_weight].into_iter().enumerate() {
            let found: Vec<f64> = found.flatten_all().unwrap().to_vec1().unwrap();
            let start: Vec<f64> = of[which].flatten_all().unwrap().to_vec1().unwrap();
            for (at, found) in found.into_iter().enumerate() {
                let value = |by: f64| {
                    let mut values = start.clone();
                    values[at] += by;
                    let moved = tensor(values, of[which].shape()).unwrap();
                    let of = if which == 0 { [&moved, &of[1]] } else { [&of[0], &moved] };
                    written(of, &targets, objective)
                };
                let slope = (value(1e-5) - value(-1e-5)) / 2e-5;
                assert!((slope - found).abs() < 1e-8, "{which}[{at}]: {found} and {slope}");
            }
        }
    }

    #[test]
    fn an_even_guess_costs_the_logarithm_of_the_vocabulary() {
        let hidden = Tensor::zeros((3, 4), DType::F32, &candle_core::Device::Cpu).unwrap();
        let weight = random(&[50, 4], DType::F32);
        let loss = cross_entropy(&hidden, &weight, &[0, 7, 49], Gradients::Skip).unwrap();
        assert!(loss.losses.iter().all(|loss| (loss - 50f64.ln()).abs() < 1e-6));
    }
}
