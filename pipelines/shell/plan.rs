//! What a run would do: counted and estimated before anything is spent.

use super::held_out;
use super::memory;
use super::settings::Settings;
use super::split;
use super::train_args::TrainArgs;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use headwater::block::Converted;
use headwater::engine::schedule::PrefixReuse;
use headwater::format::census::{Census, census};
use headwater::kernels::packed::{PackedWeight, WeightType};
use headwater::train::optimizer::AdamW;
use headwater::train::schedule::Schedule;
use headwater::train::{HiddenDropout, TrainSettings, host_products};
use serde_json::{Value, json};
use std::fmt::Write;
use std::time::Instant;

/// Pairs a text yields, and their tokens, as published for the method (recipe (j)): 5 of 52. Small
/// synthesizers write less; this only sizes the plan.
const PAIR_TOKENS_PER_TEXT: u64 = 260;

/// Counts and estimates of a run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What the input holds.
    pub census: Census,
    /// Tokens of its texts, for the model that is trained.
    pub text_tokens: u64,
    /// Tokens of a mean text, for the synthesizer.
    pub prompt_tokens: u64,
    /// Tokens of the mix.
    pub mix_tokens: u64,
    /// Packed sequences.
    pub sequences: u64,
    /// How to train; none if nothing is trained.
    pub training: Option<TrainSettings>,
}

impl Plan {
    /// Looks at the start of the input.
    ///
    /// # Errors
    /// If a file cannot be opened.
    pub fn new(settings: &Settings) -> Result<Self> {
        let census = census(&settings.inputs, &settings.fields, settings.limit)?;
        let sampled: usize = census.sample.iter().map(String::len).sum::<usize>().max(1);
        let per_byte = |tokens: usize| tokens as f64 / sampled as f64;
        let count = |model: &super::models::Model| -> usize {
            census.sample.iter().map(|text| model.tokenizer.encode(text).len()).sum()
        };
        let trained = per_byte(count(&settings.model));
        let prompted = per_byte(count(&settings.synthesizer));
        let text_tokens = (census.text_bytes as f64 * trained) as u64;
        let prompt_tokens = (census.text_bytes as f64 * prompted) as u64 / census.documents.max(1);
        let pairs = PAIR_TOKENS_PER_TEXT.min(settings.augment.new_tokens as u64);
        let converted = settings.preset.converted;
        let texts = census.documents * converted.part / converted.of;
        let augmented = text_tokens + texts * pairs;
        let shares = settings.sources.rules.shares_at(0);
        let mix_tokens =
            (augmented as f64 * shares.iter().sum::<u64>() as f64 / shares[0] as f64) as u64;
        let sequences = mix_tokens.div_ceil(settings.length as u64);
        let training = settings.train.as_ref();
        let training = training.map(|args| {
            let (device, seed) = (&settings.devices[0], settings.machine.seed);
            let sequences = (sequences, settings.length);
            self::training(args, &settings.model.name, sequences, device, seed)
        });
        Ok(Plan { census, text_tokens, prompt_tokens, mix_tokens, sequences, training })
    }

    /// The plan as text.
    pub fn describe(&self, settings: &Settings) -> String {
        let mut text = String::new();
        let about = if self.census.exact { "" } else { "about " };
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<13} {value}");
        };
        line(
            "input",
            format!(
                "{} files, {} ({}); {about}{} documents, {about}{} of text, about {} tokens",
                self.census.files,
                bytes(self.census.bytes),
                settings.kinds().join(", "),
                count(self.census.documents),
                bytes(self.census.text_bytes),
                count(self.text_tokens),
            ),
        );
        if let [first, ..] = settings.passed_over.as_slice() {
            let count = settings.passed_over.len();
            line("passed over", format!("{count} of no known kind, the first {}", first.display()));
        }
        line("synthesizer", describe_synthesizer(settings));
        line(
            "rounds",
            format!(
                "{}; epochs of {} texts, {} under way",
                settings.preset.rounds,
                settings.preset.epoch_documents,
                settings.augment.epochs_in_flight
            ),
        );
        let Converted { part, of } = settings.preset.converted;
        let share = if part == of { "all".into() } else { format!("{part} of {of}, by content") };
        line("converted", format!("{share}; long texts: {}", settings.augment.long_texts));
        let gates = settings.gates();
        line("gates", if gates.is_empty() { "none".into() } else { gates.join("; ") });
        line(
            "mix",
            format!("{}; about {} tokens", settings.sources.describe(), count(self.mix_tokens)),
        );
        line(
            "packing",
            format!("about {} sequences of {} tokens", count(self.sequences), settings.length),
        );
        line("training", self.describe_training(settings));
        if let Some(train) = settings.train.as_ref().filter(|_| !settings.held_out.is_empty()) {
            line("held out", held_out::describe(&settings.held_out, train.eval_every));
        }
        if let Some(published) = settings.published {
            line("published", published.describe());
        }
        if settings.train.is_some() && settings.synthesizes_on_cpu() && settings.devices[0].is_cpu()
        {
            line("threads", split::describe(settings.engine.train_threads));
        }
        let (need, cache) = memory::of_pipeline(settings);
        let grows = "of it for keys and values, which grow with the texts";
        line("memory", format!("at most about {}, {} {grows}", need.describe(), bytes(cache)));
        line("requests", describe_request_store(settings));
        line("output", format!("{}", settings.out.display()));
        text
    }

    /// Seconds the models would compute if this machine did nothing but matrix products, as measured now.
    ///
    /// # Errors
    /// If the device fails.
    pub fn seconds_of_products(&self, settings: &Settings) -> Result<f64> {
        let synthesizer = &settings.synthesizer;
        let rounds = settings.preset.rounds as u64;
        let pairs = PAIR_TOKENS_PER_TEXT.min(settings.augment.new_tokens as u64);
        let shown = self.prompt_tokens * rounds.div_ceil(2) + pairs;
        let Converted { part, of } = settings.preset.converted;
        // What the cache holds of the round before is not computed again.
        let computed = match settings.engine_settings(0).means.prefix_reuse {
            PrefixReuse::On => self.prompt_tokens + pairs,
            PrefixReuse::Off => shown,
        };
        let tokens = self.census.documents as f64 * part as f64 / of as f64 * computed as f64;
        let flops = tokens * synthesizer.config.training_flops_per_token(shown as usize) / 3.0;
        let rate = |kind, dtype| match settings.devices[0].is_cpu() {
            true => cpu_matrix_rate(kind, 1024),
            false => matrix_rate(&settings.devices[0], dtype, 1024),
        };
        let synthesis = match synthesizer.precision.packed() {
            WeightType::F32 | WeightType::Bf16x3 => flops / rate(WeightType::F32, DType::F32)?,
            WeightType::Bf16 | WeightType::BlockFloat | WeightType::Int8 => {
                flops / rate(WeightType::for_bf16(), DType::BF16)?
            }
        };
        let training = match &settings.train {
            None => 0.0,
            Some(args) => {
                let flops = settings.model.config.training_flops_per_token(settings.length);
                let compute = args.train_dtype.dtype(&settings.devices[0]);
                let kind = host_products(&settings.model.config, compute)?;
                self.mix_tokens as f64 * flops / rate(kind, compute)?
            }
        };
        Ok(synthesis + training)
    }

    fn describe_training(&self, settings: &Settings) -> String {
        let Some(training) = &self.training else {
            return "none (--no-train)".into();
        };
        let config = &settings.model.config;
        let flops = config.training_flops_per_token(settings.length);
        format!(
            "{}: {} parameters, {} steps of {} sequences, peak rate {:.1e}, {}, warm-up {}, {}; {:.2e} FLOPs",
            settings.model.name,
            count(config.parameter_count()),
            training.schedule.total_steps,
            training.batch_sequences,
            training.schedule.peak,
            training.schedule.decay,
            training.schedule.warmup_steps,
            settings.train.as_ref().map_or(String::new(), |args| {
                args.train_dtype.arithmetic(&settings.devices[0], config)
            }),
            flops * self.mix_tokens as f64,
        )
    }
}

/// How to train a model on so many sequences of some tokens each, in a run with such a seed.
pub fn training(
    args: &TrainArgs,
    model: &str,
    (sequences, length): (u64, usize),
    device: &Device,
    seed: u64,
) -> TrainSettings {
    let batch = args.batch(length);
    let total_steps = args.steps.unwrap_or_else(|| sequences.div_ceil(batch as u64)).max(1);
    let random = headwater::model::shape::Shape::named(model).is_some();
    TrainSettings {
        batch_sequences: batch,
        micro_batch_tokens: args.micro_batch_tokens(device),
        schedule: Schedule {
            peak: args.rate.unwrap_or(if random { 1e-3 } else { 1e-5 }),
            warmup_steps: args.warmup.unwrap_or_else(|| (total_steps / 10).min(1000)),
            total_steps,
            floor_share: 0.1,
            decay: args.decay(),
        },
        optimizer: OPTIMIZER,
        recompute: args.recompute,
        z_loss: args.z_loss,
        dropout: HiddenDropout::of(args.hidden_dropout, seed),
    }
}

/// What decides how a model is trained, for `run.json`: over several devices sums have another order.
pub fn training_configuration(training: &TrainSettings, devices: usize) -> Value {
    let mut configuration = json!(training);
    if devices > 1 {
        configuration["devices"] = json!(devices);
    }
    configuration
}

/// The constants of the paper's runs (recipe (g), (h)).
pub const OPTIMIZER: AdamW =
    AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1, clip_norm: 1.0 };

fn describe_synthesizer(settings: &Settings) -> String {
    let synthesizer = &settings.synthesizer;
    let parameters = synthesizer.config.parameter_count();
    let precision = synthesizer.precision;
    format!(
        "{}: {} parameters ({} in {}), context {}, {} new tokens a text at most, {}",
        synthesizer.name,
        count(parameters),
        bytes(precision.bytes(parameters, settings.synthesizes_on_cpu())),
        precision.name(),
        synthesizer.config.max_position_embeddings,
        settings.augment.new_tokens,
        settings.machine.device,
    )
}

fn describe_request_store(settings: &Settings) -> String {
    match settings.request_store() {
        None => "answers are not kept".into(),
        Some(folder) => {
            let most = bytes(settings.request_store_bytes());
            format!("answers are kept in {}, {most} at most", folder.display())
        }
    }
}

/// Turns that a rate of products is measured in.
const TURNS: usize = 8;

/// Operations a second in products of square matrices of random numbers (GPUs are faster with equal ones): the best of some
/// turns, behind one that does not count.
///
/// # Errors
/// If the device fails.
pub fn matrix_rate(device: &Device, dtype: DType, side: usize) -> Result<f64> {
    let matrix = Tensor::randn(0f32, 1.0, (side, side), device)?.to_dtype(dtype)?;
    let seconds = best_seconds(TURNS, device, || matrix.matmul(&matrix))?;
    Ok(2.0 * (side as f64).powi(3) / seconds)
}

/// The same for a CPU that computes products in `kind`, with a weight that is laid out where there is a layout.
///
/// # Errors
/// If there is not enough memory.
pub fn cpu_matrix_rate(kind: WeightType, side: usize) -> Result<f64> {
    let device = Device::Cpu;
    if kind == WeightType::F32 {
        return matrix_rate(&device, DType::F32, side);
    }
    let matrix = Tensor::randn(0f32, 1.0, (side, side), &device)?;
    let weight = PackedWeight::of_type(&matrix, kind)?;
    let seconds = best_seconds(TURNS, &device, || weight.multiply(&matrix))?;
    Ok(2.0 * (side as f64).powi(3) / seconds)
}

/// Seconds of the best of some turns, behind one that does not count.
///
/// # Errors
/// If the device fails.
pub fn best_seconds(
    turns: usize,
    device: &Device,
    work: impl Fn() -> candle_core::Result<Tensor>,
) -> Result<f64> {
    let mut best = f64::INFINITY;
    for turn in 0..=turns {
        device.synchronize()?;
        let start = Instant::now();
        work()?;
        device.synchronize()?;
        if turn > 0 {
            best = best.min(start.elapsed().as_secs_f64());
        }
    }
    Ok(best)
}

/// A count for people: 1,234 or 5.6M.
pub fn count(number: u64) -> String {
    match number {
        0..10_000 => {
            let digits = number.to_string();
            let cut = digits.len().saturating_sub(3);
            if cut == 0 { digits } else { format!("{},{}", &digits[..cut], &digits[cut..]) }
        }
        10_000..1_000_000 => format!("{:.1}K", number as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}M", number as f64 / 1e6),
        _ => format!("{:.2}B", number as f64 / 1e9),
    }
}

/// A size for people.
pub fn bytes(number: u64) -> String {
    match number {
        0..10_000 => format!("{number} B"),
        10_000..10_000_000 => format!("{:.1} kB", number as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", number as f64 / 1e6),
        _ => format!("{:.1} GB", number as f64 / 1e9),
    }
}

/// A duration for people.
pub fn seconds(number: f64) -> String {
    let whole = number.round() as u64;
    match whole {
        0..100 => format!("{number:.0} s"),
        100..6000 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let counts = [7, 1234, 45_678, 7_241_732_096].map(count);
        assert_eq!(counts, ["7", "1,234", "45.7K", "7.24B"]);
        assert_eq!([900, 12_345, 3_000_000_000].map(bytes), ["900 B", "12.3 kB", "3000.0 MB"]);
        assert_eq!([3.4, 125.0, 7200.0].map(seconds), ["3 s", "2 min 05 s", "2 h 00 min"]);
    }
}
