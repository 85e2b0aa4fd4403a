//! How much memory a run takes, told before it is taken.

use super::models::Model;
use super::plan::bytes;
use super::settings::Settings;
use super::train_args::TrainArgs;
use candle_core::Device;
use headwater::engine::blocks_wanted;
use headwater::kernels::cuda::free_bytes;
use headwater::kernels::packed::WeightType;
use headwater::model::backward::Keep;
use headwater::model::cache::Cache;
use headwater::model::config::ModelConfig;
use headwater::model::size::Step;
use headwater::train::{host_products, micro_batch_count, step_bytes};

/// About what the program takes besides its models: 25 MB for itself, tokenizers, buffers of threads and files; the rest are
/// parts of huge pages that nobody uses, and what was given back less than a second ago, which the allocator keeps.
const PROGRAM_BYTES: u64 = 75_000_000;

/// About what it keeps of the buffers that each product in f32 takes and gives back; other products have buffers that stay.
const EXACT_PRODUCTS_BYTES: u64 = 20_000_000;

/// The allocator takes about one part more than a training asks it for: sizes are rounded up, and a checkpoint finds the
/// place of the one before only in part. Seen from 2M to 110M parameters.
const PARTS_ASKED: u64 = 16;

/// Bytes by where they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// In the memory of the host.
    pub host: u64,
    /// On all GPUs together.
    pub gpus: u64,
}

impl Need {
    /// What the program itself takes.
    fn of_program() -> Self {
        Need { host: PROGRAM_BYTES, gpus: 0 }
    }

    fn add(&mut self, bytes: u64, devices: &[Device]) {
        let all = bytes * devices.len() as u64;
        let is_host = devices.first().is_none_or(Device::is_cpu);
        *(if is_host { &mut self.host } else { &mut self.gpus }) += all;
    }

    /// Adds what a model in training takes, `bytes` on each device, with a checkpoint that is being written.
    fn add_training(
        &mut self,
        args: &TrainArgs,
        config: &ModelConfig,
        bytes: u64,
        devices: &[Device],
    ) {
        let mut asked = Need { host: snapshot_bytes(config), gpus: 0 };
        asked.add(bytes, devices);
        self.host += asked.host + asked.host / PARTS_ASKED;
        self.gpus += asked.gpus;
        let compute = args.train_dtype.dtype(&devices[0]);
        if devices[0].is_cpu() && matches!(host_products(config, compute), Ok(WeightType::F32)) {
            self.host += EXACT_PRODUCTS_BYTES;
        }
    }

    /// What a model in training takes, with a checkpoint that is being written.
    pub fn of_training(
        args: &TrainArgs,
        config: &ModelConfig,
        length: usize,
        devices: &[Device],
    ) -> Self {
        let mut need = Need::of_program();
        need.add_training(args, config, training_bytes(args, config, length, devices), devices);
        need
    }

    /// For people.
    pub fn describe(&self) -> String {
        match self.gpus {
            0 => bytes(self.host),
            gpus => format!("{} on GPUs and {} of the host", bytes(gpus), bytes(self.host)),
        }
    }
}

/// What a pipeline takes, and how many bytes of it are for the keys and values of its engines, if sequences fill their
/// contexts.
pub(super) fn of_pipeline(settings: &Settings) -> (Need, u64) {
    let mut need = Need::of_program();
    let training = settings.train.as_ref().map_or(0, |args| {
        training_bytes(args, &settings.model.config, settings.length, &settings.devices)
    });
    if let Some(args) = &settings.train {
        need.add_training(args, &settings.model.config, training, &settings.devices);
    }
    let model = &settings.synthesizer;
    let parameters = model.config.parameter_count();
    let weights = model.precision.bytes(parameters, settings.synthesizes_on_cpu());
    let devices = &settings.synthesizer_devices;
    // A GPU that does not say what is free fails when it is used; this is an estimate.
    let free = free_bytes(&devices[0]).unwrap_or(None);
    let shared = if settings.trains_on(&devices[0]) { training } else { 0 };
    let room = settings.engine.steps.cache_bytes(free, weights + shared, 1);
    let context = model.config.max_position_embeddings;
    let blocks = blocks_wanted(&settings.engine_settings(room), context);
    let cache = (blocks * block_bytes(model, devices[0].is_cpu())).min(room) as u64;
    need.add(weights + cache, devices);
    (need, devices.len() as u64 * cache)
}

/// Bytes of the keys and values of a block of positions in all layers, where a model generates.
pub(super) fn block_bytes(model: &Model, on_cpu: bool) -> usize {
    let kept = match model.precision.tensors() {
        Ok(dtype) if !on_cpu => dtype,
        _ => model.precision.packed().cache_type(),
    };
    Cache::block_bytes(&model.config, kept)
}

/// Parameters with their state, gradients, and what micro-batches of sequences of `length` tokens take, on each of `devices`.
///
/// # Panics
/// If there is no device.
pub fn training_bytes(
    args: &TrainArgs,
    config: &ModelConfig,
    length: usize,
    devices: &[Device],
) -> u64 {
    let tokens_max = args.micro_batch_tokens(&devices[0]);
    let batch = args.batch(length);
    let step = Step {
        config,
        compute: args.train_dtype.dtype(&devices[0]),
        keep: if args.recompute { Keep::Inputs } else { Keep::Everything },
        has_dropout: args.hidden_dropout > 0.0,
        rows: rows(batch, length, tokens_max),
        micro_batches: micro_batch_count(batch, length, tokens_max).div_ceil(devices.len()),
    };
    step_bytes(&step, devices[0].is_cpu()).expect("a CPU trains in the types that can be asked for")
}

/// Tokens of a micro-batch at most: sequences may be shorter than `length`.
fn rows(batch: usize, length: usize, tokens_max: usize) -> usize {
    tokens_max.max(length).min(batch.saturating_mul(length))
}

/// What a checkpoint under way holds: a copy of parameters and moments, in the memory of the host, and the largest of them
/// twice more while it is written.
fn snapshot_bytes(config: &ModelConfig) -> u64 {
    let size = |(_, shape): &(String, Vec<usize>)| shape.iter().product::<usize>();
    let largest = config.parameters().iter().map(size).max().unwrap_or(0) as u64;
    config.parameter_count() * 3 * 4 + largest * 2 * 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_micro_batch_has_no_more_tokens_than_its_step() {
        assert_eq!(rows(8, 512, 1024), 1024);
        assert_eq!(rows(1, 256, 1024), 256);
        assert_eq!(rows(4, 512, 8192), 2048);
        assert_eq!(rows(8, 3000, 1024), 3000);
        assert_eq!(rows(8, 3000, 4096), 4096); // two of 2,000, if they are not full
    }

    #[test]
    fn what_is_on_gpus_is_told_apart() {
        let mut need = Need::of_program();
        need.add(10_000_000, &[Device::Cpu]);
        assert_eq!(need.describe(), "85.0 MB");
        need.gpus += 3_000_000_000;
        assert_eq!(need.describe(), "3000.0 MB on GPUs and 85.0 MB of the host");
    }
}
