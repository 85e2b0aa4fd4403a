//! The synthesis engine, timed.
//!
//! ```text
//! load ─▶ prompts alone ─▶ steps of a whole batch alone ─▶ all requests through the engine
//! ```
//!
//! Ceilings are measured before and behind it.

use super::ceiling::{self, Ceiling, Cost};
use super::workload::{Answered, Workload};
use crate::shell::args::StepArgs;
use crate::shell::models::{BUNDLED, Model};
use crate::shell::plan::count;
use crate::shell::summary::{device_memory, peak_memory};
use crate::shell::terminal::{show, tell};
use crate::shell::wrong_use;
use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{DType, Device, Tensor};
use clap::Args;
use headwater::engine::metrics::EngineCounters;
use headwater::engine::phases::{Phase, Phases};
use headwater::engine::schedule::{Means, PrefixReuse, Speculation};
use headwater::engine::{self, EngineSettings};
use headwater::kernels::cached::BLOCK;
use headwater::kernels::cuda::forget_peak;
use headwater::kernels::peak::threads;
use headwater::model::cache::Cache;
use headwater::model::config::ModelConfig;
use headwater::model::device;
use headwater::model::precision::Precision;
use headwater::model::shape::Shape;
use headwater::model::{Form, Llama};
use headwater::prompt::PromptWriter;
use headwater::seed;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

/// Generate with a synthesizer, as fast as this machine can
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:\n  headwater bench synth --model 110m --dtype bf16\n  \
                        headwater bench synth --model models/synthesizer --prompts pubmed.xml.gz \
                        --rounds 3 --requests 300")]
pub(super) struct Synth {
    /// The synthesizer: a directory, a GGUF file, "bundled", or a shape for random weights
    #[arg(long, default_value = BUNDLED, value_name = "DIR|FILE|SHAPE")]
    model: String,
    /// Texts to ask about, of the kinds that pipelines read [default: random tokens]
    #[arg(long, num_args = 1.., value_name = "FILE")]
    prompts: Vec<PathBuf>,
    /// Texts that may see each other, one a round, as in a pipeline
    #[arg(long, default_value_t = 1, value_name = "M", requires = "prompts")]
    rounds: usize,
    /// Requests [default: 64; with --prompts all texts]
    #[arg(long, value_name = "N")]
    requests: Option<usize>,
    /// Tokens of a random prompt
    #[arg(long, default_value_t = 512, value_name = "N", conflicts_with = "prompts")]
    prompt_tokens: usize,
    /// Tokens to generate: of random prompts always so many, of texts at most [default: 128; with --prompts 400]
    #[arg(long, value_name = "N")]
    output_tokens: Option<usize>,
    /// Where the model computes: cpu or cuda:0
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: String,
    #[command(flatten)]
    steps: StepArgs,
}

/// Measures.
///
/// # Errors
/// If the flags cannot work or the device fails.
pub(super) fn run(args: &Synth) -> Result<ExitCode> {
    let setup = Setup::new(args).map_err(wrong_use)?;
    let (device, precision) = (&setup.device, setup.model.precision);
    let parameters = count(setup.config().parameter_count());
    tell!("{} on {} in {}: {parameters} parameters", args.model, args.device, precision.name());
    let before = ceiling::operations_per_second(device, precision)?;
    let model = setup.load()?;
    let cost = setup.cost(&model);
    let prompts = setup.batch(&model, &args.steps)?;
    let mut phases = Phases::new(&model, &prompts, setup.new_tokens, setup.engine.step_tokens_max)?;
    phases.warm_up()?;
    let prefill = phases.prompts()?;
    let decode = phases.steps(setup.new_tokens)?;
    drop(phases);
    forget_peak(std::slice::from_ref(device))?; // that of the phases
    let whole = setup.whole(model, &args.steps)?;
    let ceiling = Ceiling::measure(device, precision, before)?;
    let measured = Measured { prompts: &prompts, prefill, decode, ceiling, cost };
    tell!("{}", measured.table(&whole, setup.new_tokens).trim_end());
    show!("{}", figures(args, &setup, &measured, &whole))?;
    Ok(ExitCode::SUCCESS)
}

/// Everything that decides what is measured.
struct Setup {
    model: Model,
    device: Device,
    engine: EngineSettings,
    workload: Workload,
    new_tokens: usize,
}

impl Setup {
    fn new(args: &Synth) -> Result<Self> {
        let device = device::device(&args.device)?;
        let mut engine = args.steps.settings(device.is_cpu(), 0)?;
        let tokenizer = Model::trained(BUNDLED)?.tokenizer;
        let new_tokens =
            args.output_tokens.unwrap_or(if args.prompts.is_empty() { 128 } else { 400 });
        ensure!(new_tokens > 0, "--output-tokens must be 1 at least");
        ensure!(args.rounds > 0, "--rounds must be 1 at least");
        ensure!(args.requests != Some(0), "--requests must be 1 at least");
        let random = args.prompts.is_empty();
        let mut model = match Shape::named(&args.model) {
            Some(shape) => Model::random(shape, &tokenizer),
            None => Model::trained(&args.model).context("--model")?,
        };
        model.precision = Precision::choose(&args.steps.dtype, model.precision, device.is_cpu())?;
        let context = model.config.max_position_embeddings;
        let room = context.checked_sub(new_tokens).filter(|&room| room > 0);
        let room = room.with_context(|| {
            format!(
                "--output-tokens {new_tokens} leaves no room for a prompt in a context of {context}"
            )
        })?;
        let workload = if random {
            ensure!(args.prompt_tokens > 0, "--prompt-tokens must be 1 at least");
            ensure!(
                args.prompt_tokens <= room,
                "--prompt-tokens {} and --output-tokens {new_tokens} do not fit a context of {context}",
                args.prompt_tokens
            );
            // Nothing is shared and nothing copied; what random weights repeat must not count as speed.
            ensure!(args.steps.speculation != "always", "--speculation always wants --prompts");
            engine.means = Means { prefix_reuse: PrefixReuse::Off, speculation: Speculation::Off };
            tell!("random prompts: prefix reuse and speculation are off, whatever is asked for");
            Workload::random(
                args.requests.unwrap_or(64),
                args.prompt_tokens,
                model.config.vocab_size,
            )
        } else {
            let writer = PromptWriter::new(model.tokenizer.clone())?;
            Workload::corpus(&args.prompts, args.requests, args.rounds, writer, room)?
        };
        Ok(Setup { model, device, engine, workload, new_tokens })
    }

    fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    fn load(&self) -> Result<Llama> {
        match Shape::named(&self.model.name) {
            Some(_) => Ok(random(self.config(), self.model.precision, &self.device)?),
            None => self.model.load(&self.device),
        }
    }

    fn cost(&self, model: &Llama) -> Cost {
        let cache = model.dtype().size_in_bytes() as f64;
        let million = self.model.precision.bytes(1_000_000, self.device.is_cpu());
        let weight_bytes = million as f64 / 1e6;
        Cost::new(self.config(), weight_bytes, cache)
    }

    /// The prompts of one full batch, or as many as there is room for in a cache.
    fn batch(&self, model: &Llama, steps: &StepArgs) -> Result<Vec<Vec<u32>>> {
        let mut prompts = self.workload.first();
        let room =
            self.cache_bytes(model, steps)? / Cache::block_bytes(&model.config, model.dtype());
        let mut blocks = 0;
        let fits = prompts.iter().take_while(|prompt| {
            blocks += (prompt.len() + self.new_tokens).div_ceil(BLOCK);
            blocks <= room
        });
        let fits = fits.count().max(1);
        prompts.truncate(fits.min(self.engine.sequences_max));
        Ok(prompts)
    }

    /// Bytes for keys and values, as the engine has them.
    fn cache_bytes(&self, model: &Llama, steps: &StepArgs) -> Result<usize> {
        let reserved = model.step_bytes(self.engine.step_tokens_max) as u64;
        Ok(steps.cache_bytes(model.free_bytes()?, reserved, 1))
    }

    /// Has all requests answered by an engine.
    fn whole(&self, model: Llama, steps: &StepArgs) -> Result<Whole> {
        let settings =
            EngineSettings { cache_bytes: self.cache_bytes(&model, steps)?, ..self.engine };
        let counters = Arc::new(EngineCounters::default());
        let ends = match &self.workload {
            Workload::Random(_) => Vec::new(),
            Workload::Corpus(_) => self.config().eos_token_ids.clone(),
        };
        let failed = |error| tell!("error: the engine failed: {error}");
        let (queue, thread) = engine::start(model, ends, settings, counters.clone(), failed)?;
        self.device.synchronize()?; // its cache is being cleared
        let start = Instant::now();
        let answered = self.workload.clone().run(&queue, self.new_tokens)?;
        let seconds = start.elapsed().as_secs_f64();
        drop(queue);
        thread.join().map_err(|_| anyhow!("the engine's thread failed"))?;
        Ok(Whole {
            answered,
            seconds,
            counters,
            memory_bytes: peak_memory(),
            device_memory_bytes: device_memory(std::slice::from_ref(&self.device)),
        })
    }
}

/// A model of random weights: a thousand normal numbers, again and again, as good as any for speed.
fn random(config: &ModelConfig, precision: Precision, device: &Device) -> headwater::Result<Llama> {
    const PERIOD: usize = 1009; // a prime: rows begin at different places of it
    let mut stream = seed::stream(5, "weights", "bench");
    let normal: Vec<f32> = (0..PERIOD).map(|_| stream.normal() as f32).collect();
    let (form, dtype) = match device.is_cpu() {
        true => (Form::PackedAs(precision.packed()), DType::F32),
        false => (Form::Gpu, precision.tensors()?),
    };
    Llama::build(config, form, device, |name, shape| {
        let (offset, scale) = if name.contains("norm") { (1.0, 0.0) } else { (0.0, 0.03) };
        let values = normal.iter().cycle().map(|value| offset + scale * value);
        let values: Vec<f32> = values.take(shape.iter().product()).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?)
    })
}

/// What each phase did alone, beside what the machine can do.
struct Measured<'a> {
    prompts: &'a [Vec<u32>],
    prefill: Phase,
    decode: Phase,
    ceiling: Ceiling,
    cost: Cost,
}

impl Measured<'_> {
    /// Seconds that the prompts take at best.
    fn prefill_at_best(&self) -> f64 {
        let operations = self.prompts.iter().map(|prompt| self.cost.prompt(prompt.len()));
        operations.sum::<f64>() / self.ceiling.operations_per_s
    }

    /// Seconds that steps of a whole batch take at best, for `tokens` tokens behind each prompt.
    fn decode_at_best(&self, tokens: usize) -> f64 {
        let batch = self.prompts.len() as f64;
        let prompts = self.prompts.iter().map(Vec::len).sum::<usize>() as f64 / batch;
        let length = |step: usize| prompts + step as f64 + 1.0;
        (0..tokens).map(|step| self.cost.step(batch, length(step), &self.ceiling)).sum()
    }
}

impl Measured<'_> {
    /// Rates and shares, for people.
    fn table(&self, whole: &Whole, new_tokens: usize) -> String {
        let row = |name: &str, rate: f64, share: f64| {
            format!("{name:<30} {rate:>9.0} tokens/s  {:5.1} % of the ceiling\n", 100.0 * share)
        };
        let prefill = self.prefill_at_best() / self.prefill.seconds;
        let decode = self.decode_at_best(new_tokens) / self.decode.seconds;
        let steps = format!("steps of {} alone", self.prompts.len());
        let tokens = whole.answered.output_tokens as f64 / whole.seconds;
        let Ceiling { operations_per_s, bytes_per_s } = self.ceiling;
        let (operations, bytes) = (operations_per_s / 1e9, bytes_per_s / 1e9);
        format!("ceilings {operations:.1} Gop/s, {bytes:.1} GB/s\n")
            + &row("prompts alone", self.prefill.rate(), prefill)
            + &row(&steps, self.decode.rate(), decode)
            + &format!("{:<30} {tokens:>9.0} new tokens/s\n", "all requests")
    }
}

/// What an engine made of all requests.
struct Whole {
    answered: Answered,
    seconds: f64,
    counters: Arc<EngineCounters>,
    /// The most that this process had so far.
    memory_bytes: u64,
    /// The most that was in use meanwhile; none on a CPU.
    device_memory_bytes: Option<u64>,
}

/// What was measured, as one line of JSON.
fn figures(args: &Synth, setup: &Setup, measured: &Measured<'_>, whole: &Whole) -> Value {
    let Measured { prefill, decode, ceiling, .. } = measured;
    let Whole { answered, seconds, counters, .. } = whole;
    let engine: BTreeMap<_, _> = counters.figures().into();
    let per = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
    let prefill_share = measured.prefill_at_best() / prefill.seconds;
    let decode_share = measured.decode_at_best(setup.new_tokens) / decode.seconds;
    json!({
        "bench": "synth",
        "model": args.model,
        "parameters": setup.config().parameter_count(),
        "device": args.device,
        "dtype": setup.model.precision.name(),
        "threads": threads(),
        "sequences": setup.engine.sequences_max,
        "rounds": args.rounds,
        "requests": answered.requests,
        "prompt_tokens": answered.prompt_tokens,
        "output_tokens": answered.output_tokens,
        "output_digest": format!("{:032x}", answered.digest),
        "seconds": seconds,
        "requests_per_s": answered.requests as f64 / seconds,
        "tokens_per_s": answered.output_tokens as f64 / seconds,
        "prefill_tokens_per_s": prefill.rate(),
        "decode_tokens_per_s": decode.rate(),
        "prefix_hit_rate": per(engine["cached_tokens"], engine["admitted_tokens"]),
        "draft_hit_rate": per(engine["accepted_tokens"], engine["drafted_tokens"]),
        "batch_mean": per(engine["sequences"], engine["steps"]),
        "memory_bytes": whole.memory_bytes,
        "device_memory_bytes": whole.device_memory_bytes,
        "engine": engine,
        "ceiling": {
            "operations_per_s": ceiling.operations_per_s,
            "bytes_per_s": ceiling.bytes_per_s,
            "prefill_share": prefill_share,
            "decode_share": decode_share,
        },
    })
}
