//! What computes losses and gradients: on a CPU in memory of its own, on other devices in tensors.

use super::optimizer::Parameters;
use crate::error::{Error, Result};
use crate::kernels::bf16x3;
use crate::kernels::cuda::training::is_emulated;
use crate::kernels::matmul::Into;
use crate::kernels::packed::WeightType;
use crate::model::backward::{Batch, Gradients, Learning};
use crate::model::config::ModelConfig;
use crate::model::host::HostModel;
use crate::model::size::Step;
use crate::model::{Form, Llama};
use crate::threads;
use candle_core::{DType, Device, Tensor};

/// Width of layers from which f32 is split where that pays: beside whole products, with 256 it cost a tenth of a step, with
/// 512 products alone did not gain, and with 768 a step was a sixth faster (docs/training.md).
const PARTS_PAY_FROM: usize = 768;

/// A model in training.
#[derive(Debug)]
pub(super) enum Learner {
    /// On a CPU.
    Host(Box<HostModel>),
    /// On any device: its weights are the parameters, or copies that follow them.
    Tensors(Box<Llama>),
}

impl Learner {
    /// A model that follows `parameters` and computes in `compute`.
    ///
    /// # Errors
    /// If a parameter of `config` is missing, or the device does not compute in that type.
    pub(super) fn new(
        config: &ModelConfig,
        parameters: &mut Parameters,
        compute: DType,
        device: &Device,
    ) -> Result<Self> {
        let missing = |name: &str| Error::Setting(format!("the model has no parameter {name:?}"));
        if device.is_cpu() && !is_emulated() {
            let kind = host_products(config, compute)?;
            let value = |name: &str| -> Result<Tensor> {
                Ok(parameters.get(name).ok_or_else(|| missing(name))?.value()?)
            };
            return Ok(Learner::Host(Box::new(HostModel::new(config, kind, value)?)));
        }
        let model = Llama::build(config, Form::Plain, device, |name, _| {
            let parameter = parameters.get_mut(name).ok_or_else(|| missing(name))?;
            Ok(parameter.computed_in(compute)?)
        })?;
        Ok(Learner::Tensors(Box::new(model)))
    }

    /// Gradients that [`Learner::learn`] can write and add to.
    pub(super) fn gradients(&self, config: &ModelConfig) -> candle_core::Result<Gradients> {
        match self {
            Learner::Host(_) => Gradients::zeros(&config.parameters()),
            Learner::Tensors(_) => Ok(Gradients::default()),
        }
    }

    /// Makes gradients those of nothing.
    pub(super) fn clear(&self, gradients: &mut Gradients) -> candle_core::Result<()> {
        match self {
            Learner::Host(_) => self.run(|| gradients.clear()),
            Learner::Tensors(_) => {
                *gradients = Gradients::default();
                Ok(())
            }
        }
    }

    /// The loss of each target, with the gradient of the objective in `gradients`: by itself, or added to what is there.
    pub(super) fn learn(
        &mut self,
        batch: &Batch,
        learning: Learning,
        (gradients, sums): (&mut Gradients, Into),
    ) -> candle_core::Result<Vec<f64>> {
        match self {
            Learner::Host(model) => model.learn(batch, learning, (gradients, sums)),
            Learner::Tensors(model) => {
                if sums == Into::Set {
                    *gradients = Gradients::default();
                }
                model.learn(batch, learning, gradients)
            }
        }
    }

    /// The loss of each target.
    pub(super) fn losses(&mut self, batch: &Batch) -> candle_core::Result<Vec<f64>> {
        match self {
            Learner::Host(model) => model.losses(batch),
            Learner::Tensors(model) => model.losses(batch),
        }
    }

    /// Does work on what it computes with: where that is a CPU, on its threads.
    pub(super) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match self {
            Learner::Host(_) => threads::run(work),
            Learner::Tensors(_) => work(),
        }
    }

    /// Follows the parameters, which have moved.
    pub(super) fn follow(&mut self) -> candle_core::Result<()> {
        match self {
            Learner::Host(model) => threads::run(|| model.follow()),
            Learner::Tensors(_) => Ok(()),
        }
    }
}

/// The loss of each target of `batch` in nats, and the gradient of the objective, as a step on `device` computes them.
///
/// # Errors
/// If `values` lacks a parameter of `config`, or the device fails or does not compute in that type.
pub fn gradients(
    config: &ModelConfig,
    values: Vec<(String, Tensor)>,
    (compute, device): (DType, &Device),
    batch: &Batch,
    learning: Learning,
) -> Result<(Vec<f64>, Gradients)> {
    let mut learner = Learner::new(config, &mut Parameters::new(values)?, compute, device)?;
    let mut gradients = learner.gradients(config)?;
    let losses = learner.learn(batch, learning, (&mut gradients, Into::Set))?;
    Ok((losses, gradients))
}

/// Bytes that such a step takes, at the moment when it takes most: parameters with their moments and gradients, and what the
/// pass needs, on a CPU or on each GPU.
///
/// # Errors
/// If a CPU does not train in that type.
pub fn step_bytes(step: &Step<'_>, is_cpu: bool) -> Result<u64> {
    if !is_cpu {
        return Ok(step.tensor_bytes());
    }
    let Step { config, compute, keep, has_dropout, rows, micro_batches: _ } = *step;
    let pass = HostModel::bytes(config, host_products(config, compute)?, keep, has_dropout, rows);
    Ok(config.parameter_count() * 4 * 4 + pass)
}

/// What a CPU computes the products of a model in.
///
/// f32 is the sum of three parts of bf16 where the CPU has a matrix unit and layers are so wide that products outweigh what
/// the parts cost. What is computed is as exact either way, and differs in its roundings.
///
/// # Errors
/// If a CPU does not train in that type.
pub fn host_products(config: &ModelConfig, compute: DType) -> Result<WeightType> {
    match compute {
        DType::F32 if config.hidden_size >= PARTS_PAY_FROM && bf16x3::pays() => {
            Ok(WeightType::Bf16x3)
        }
        DType::F32 => Ok(WeightType::F32),
        DType::BF16 => Ok(WeightType::Bf16),
        other => {
            let what = format!("a CPU trains in f32 or bf16, not in {}", other.as_str());
            Err(Error::Setting(what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shape::Shape;

    #[test]
    fn f32_is_split_for_wide_models_where_that_pays_and_other_types_are_refused() {
        let of = |shape: &str, compute| {
            let config = Shape::named(shape).expect("a shape").config();
            host_products(&config, compute).map_err(|error| error.to_string())
        };
        let split = if bf16x3::pays() { WeightType::Bf16x3 } else { WeightType::F32 };
        assert_eq!(of("10m", DType::F32), Ok(WeightType::F32));
        assert_eq!(of("110m", DType::F32), Ok(split));
        assert_eq!(of("110m", DType::BF16), Ok(WeightType::Bf16));
        let refused = "a CPU trains in f32 or bf16, not in f16";
        assert_eq!(of("10m", DType::F16), Err(refused.into()));
    }
}
