//! The trainer, timed.
//!
//! ```text
//! ceilings ─▶ parameters ─▶ one step that does not count ─▶ steps: forward, backward, AdamW ─▶ ceilings
//! ```
//!
//! MFU (Chowdhery et al., 2022, appendix B; arXiv 2204.02311) is what the model's products and attention cost by
//! the book, whatever was computed again, over what the device can do. Two ceilings are named: the peak, and the
//! rate of a large product through the library that trains.

use super::ceiling;
use crate::shell::metrics;
use crate::shell::models::{BUNDLED, Model};
use crate::shell::plan::{OPTIMIZER, bytes, count};
use crate::shell::summary::{device_memory, peak_memory};
use crate::shell::terminal::{show, tell};
use crate::shell::train_args::{Compute, check_sums, micro_batch_tokens, probability};
use crate::shell::wrong_use;
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use clap::Args;
use headwater::kernels::cuda::forget_peak;
use headwater::kernels::peak;
use headwater::model::device;
use headwater::model::shape::Shape;
use headwater::record::{Segment, Sequence};
use headwater::seed;
use headwater::train::schedule::{Decay, Schedule};
use headwater::train::{HiddenDropout, TrainSettings, Trainer, check_dealing, host_products};
use serde_json::{Value, json};
use std::process::ExitCode;
use std::time::Instant;

/// Tokens of a step at most: their ids are in memory.
const TOKENS_MAX: usize = 1 << 30;

/// Train on random tokens, as fast as this machine can
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:\n  headwater bench train --model 10m --length 512\n  \
                        headwater bench train --model 110m --length 1024 --item-tokens 128")]
pub(super) struct Train {
    /// The model: a Hugging Face directory, "bundled", or a shape for random weights
    #[arg(long, default_value = "10m", value_name = "DIR|SHAPE")]
    model: String,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 512, value_name = "N")]
    length: usize,
    /// Tokens of an item; a sequence is packed with as many as it takes [default: one item a sequence]
    #[arg(long, value_name = "N")]
    item_tokens: Option<usize>,
    /// Sequences of a step
    #[arg(long, default_value_t = 8, value_name = "N")]
    batch: usize,
    /// Steps that count
    #[arg(long, default_value_t = 5, value_name = "N")]
    steps: usize,
    /// Tokens whose activations are held at a time [default: 1024, on a GPU 4096]
    #[arg(long, value_name = "N")]
    micro_batch_tokens: Option<usize>,
    /// Run blocks again in the backward pass instead of keeping their activations
    #[arg(long)]
    recompute: bool,
    /// Probability that an element is dropped where the stream begins, and of all that is added to it
    #[arg(long, default_value_t = 0.0, value_parser = probability, value_name = "P")]
    hidden_dropout: f64,
    /// Where the model computes: cpu, cuda:0, or cuda:0,cuda:1,… for a part of each step on every one
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: String,
    /// What it computes in; parameters and moments are f32 always. auto is f32 on a CPU, bf16 on a GPU
    #[arg(long, value_enum, default_value_t = Compute::Auto, value_name = "TYPE")]
    dtype: Compute,
}

/// Measures.
///
/// # Errors
/// If the flags cannot work or the device fails.
pub(super) fn run(args: &Train) -> Result<ExitCode> {
    let setup = Setup::new(args).map_err(wrong_use)?;
    let parameters = count(setup.model.config.parameter_count());
    let compute = setup.compute.as_str();
    tell!("{} on {} in {compute}: {parameters} parameters", args.model, args.device);
    let before = setup.ceilings()?;
    forget_peak(&setup.devices)?; // that of the ceilings
    let measured = setup.measure(args)?;
    let ceilings = before.or_better(setup.ceilings()?);
    tell!(
        "ceilings {:.1} Gop/s in large products{}",
        ceilings.products / 1e9,
        ceilings.peak.map_or(String::new(), |peak| format!(", {:.1} at most", peak / 1e9)),
    );
    tell!(
        "{:.0} tokens/s, {:.0} ms a step, {:.1} Gop/s = {:.1} % of large products, {} at most",
        measured.tokens_per_s(),
        measured.median_ms(),
        measured.operations_per_s / 1e9,
        100.0 * measured.operations_per_s / ceilings.products,
        bytes(measured.device_memory_bytes.unwrap_or(measured.memory_bytes)),
    );
    show!("{}", setup.figures(args, &measured, &ceilings))?;
    Ok(ExitCode::SUCCESS)
}

/// What the devices can do together, in operations a second.
struct Ceilings {
    /// Large products through the library that trains.
    products: f64,
    /// Registers only on a CPU, what its maker says of a GPU; none for a GPU that is not known.
    peak: Option<f64>,
}

impl Ceilings {
    /// The better of each: either measurement may fall into a bad moment of a shared machine.
    fn or_better(self, other: Self) -> Self {
        Ceilings {
            products: self.products.max(other.products),
            peak: self.peak.zip(other.peak).map(|(one, other)| one.max(other)),
        }
    }
}

/// Everything that decides what is measured.
struct Setup {
    model: Model,
    devices: Vec<Device>,
    compute: DType,
    sequences: Vec<Sequence>,
    item_tokens: usize,
}

/// What was measured.
struct Measured {
    tokens: usize,
    /// Milliseconds of each step.
    steps: Vec<f64>,
    operations_per_s: f64,
    losses: [f64; 2],
    /// The most that this process had.
    memory_bytes: u64,
    /// The most that was in use; none on a CPU.
    device_memory_bytes: Option<u64>,
}

impl Setup {
    fn new(args: &Train) -> Result<Self> {
        let devices = device::group(&args.device).context("--device")?;
        let compute = args.dtype.dtype(&devices[0]);
        ensure!(args.batch > 0, "--batch must be 1 at least");
        let tokens = args.batch.checked_mul(args.length);
        ensure!(
            tokens.is_some_and(|tokens| tokens <= TOKENS_MAX),
            "--batch {} of --length {} is more than {TOKENS_MAX} tokens a step",
            args.batch,
            args.length
        );
        ensure!(args.steps > 0, "--steps must be 1 at least");
        ensure!(args.micro_batch_tokens != Some(0), "--micro-batch-tokens must be 1 at least");
        ensure!(args.length > 1, "--length must be 2 at least: the first token is not learned");
        let item_tokens = args.item_tokens.unwrap_or(args.length);
        ensure!(
            (2..=args.length).contains(&item_tokens),
            "--item-tokens must be between 2 and --length {}",
            args.length
        );
        let model = match Shape::named(&args.model) {
            Some(shape) => Model::random(shape, &Model::trained(BUNDLED)?.tokenizer),
            None => Model::trained(&args.model).context("--model")?,
        };
        model.check_trainable()?;
        let context = model.config.max_position_embeddings;
        ensure!(
            item_tokens <= context,
            "items of {item_tokens} tokens do not fit the context of {:?}, {context} tokens",
            model.name
        );
        let vocabulary = model.config.vocab_size;
        let sequence = |index| random(index, args.length, item_tokens, vocabulary);
        let sequences = (0..args.batch).map(sequence).collect();
        let setup = Setup { model, devices, compute, sequences, item_tokens };
        let micro_batch = setup.micro_batch_tokens(args);
        check_dealing(args.batch, args.length, micro_batch, setup.devices.len())?;
        check_sums(setup.devices.len())?;
        Ok(setup)
    }

    fn micro_batch_tokens(&self, args: &Train) -> usize {
        args.micro_batch_tokens.unwrap_or_else(|| micro_batch_tokens(&self.devices[0]))
    }

    fn ceilings(&self) -> Result<Ceilings> {
        let device = &self.devices[0];
        if device.is_cpu() {
            let kind = host_products(&self.model.config, self.compute)?;
            let peak = Some(peak::operations_per_second(kind, peak::TURNS));
            return Ok(Ceilings { products: ceiling::cpu_products(kind)?, peak });
        }
        let peak = metrics::peak(device, self.compute, &self.model.config);
        let count = self.devices.len() as f64;
        let products = count * ceiling::products(device, self.compute)?;
        Ok(Ceilings { products, peak: peak.map(|peak| count * peak) })
    }

    fn measure(&self, args: &Train) -> Result<Measured> {
        let settings = TrainSettings {
            batch_sequences: args.batch,
            micro_batch_tokens: self.micro_batch_tokens(args),
            schedule: Schedule {
                peak: 1e-4,
                warmup_steps: 0,
                total_steps: u64::MAX,
                floor_share: 0.1,
                decay: Decay::Cosine,
            },
            optimizer: OPTIMIZER,
            recompute: args.recompute,
            z_loss: 0.0,
            dropout: HiddenDropout::of(args.hidden_dropout, 9),
        };
        let config = &self.model.config;
        let values = self.model.parameters(9, &self.devices[0])?;
        let mut trainer = Trainer::new(config, values, settings, self.compute, &self.devices)?;
        let first = trainer.step(&self.sequences)?.loss;
        self.wait()?;
        let (mut steps, mut last) = (Vec::new(), first);
        for _ in 0..args.steps {
            let start = Instant::now();
            last = trainer.step(&self.sequences)?.loss;
            self.wait()?;
            steps.push(1e3 * start.elapsed().as_secs_f64());
        }
        let tokens = args.batch * args.length;
        let per_item = |tokens: usize| tokens as f64 * config.training_flops_per_token(tokens);
        let (whole, rest) = (args.length / self.item_tokens, args.length % self.item_tokens);
        let sequence = whole as f64 * per_item(self.item_tokens) + per_item(rest);
        let seconds = steps.iter().sum::<f64>() / 1e3;
        let operations_per_s = sequence * (args.batch * args.steps) as f64 / seconds;
        Ok(Measured {
            tokens,
            steps,
            operations_per_s,
            losses: [first, last],
            memory_bytes: peak_memory(),
            device_memory_bytes: device_memory(&self.devices),
        })
    }

    /// Until the devices have done all that they were given.
    fn wait(&self) -> Result<()> {
        self.devices.iter().try_for_each(|device| Ok(device.synchronize()?))
    }

    fn figures(&self, args: &Train, measured: &Measured, ceilings: &Ceilings) -> Value {
        json!({
            "bench": "train",
            "model": args.model,
            "parameters": self.model.config.parameter_count(),
            "device": args.device,
            "dtype": self.compute.as_str(),
            "arithmetic": args.dtype.arithmetic(&self.devices[0], &self.model.config),
            "threads": peak::threads(),
            "length": args.length,
            "item_tokens": self.item_tokens,
            "batch": args.batch,
            "steps": args.steps,
            "micro_batch_tokens": self.micro_batch_tokens(args),
            "recompute": args.recompute,
            "hidden_dropout": args.hidden_dropout,
            "tokens_per_s": measured.tokens_per_s(),
            "step_ms": measured.median_ms(),
            "operations_per_s": measured.operations_per_s,
            "mfu": ceilings.peak.map(|peak| measured.operations_per_s / peak),
            "share_of_ceiling": measured.operations_per_s / ceilings.products,
            "memory_bytes": measured.memory_bytes,
            "device_memory_bytes": measured.device_memory_bytes,
            "first_loss": measured.losses[0],
            "last_loss": measured.losses[1],
            "ceiling": {
                "peak_operations_per_s": ceilings.peak,
                "product_operations_per_s": ceilings.products,
            },
        })
    }
}

impl Measured {
    fn tokens_per_s(&self) -> f64 {
        1e3 * (self.tokens * self.steps.len()) as f64 / self.steps.iter().sum::<f64>()
    }

    fn median_ms(&self) -> f64 {
        let mut sorted = self.steps.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }
}

/// A sequence of items of random tokens, all of which are learned.
fn random(index: usize, length: usize, item_tokens: usize, vocabulary: usize) -> Sequence {
    let mut stream = seed::stream(9, &index.to_string(), "bench sequence");
    let tokens = (0..length).map(|_| stream.index(vocabulary) as u32).collect();
    let segment = |start: usize| Segment {
        item: format!("{index}.{start}"),
        source: 0,
        offset: 0,
        length: item_tokens.min(length - start) as u32,
    };
    let segments = (0..length).step_by(item_tokens).map(segment).collect();
    Sequence { tokens, learned: vec![true; length], segments, ..Sequence::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_is_cut_into_items_that_cover_it() {
        for (length, item_tokens, lengths) in
            [(10, 10, vec![10]), (10, 4, vec![4, 4, 2]), (8, 4, vec![4, 4])]
        {
            let sequence = random(0, length, item_tokens, 50);
            let found: Vec<u32> = sequence.segments.iter().map(|segment| segment.length).collect();
            assert_eq!(found, lengths);
            assert_eq!((sequence.tokens.len(), sequence.learned.len()), (length, length));
            assert_ne!(sequence.tokens, random(1, length, item_tokens, 50).tokens);
        }
    }
}
