//! Flags of training.

use super::models::{BUNDLED, Model};
use super::published::Published;
use super::settings::digests;
use super::training::TrainingFolder;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use clap::{Args, ValueEnum};
use headwater::format::documents::files;
use headwater::format::jsonl::Fields;
use headwater::kernels::bf16_unit;
use headwater::kernels::packed::WeightType;
use headwater::model::config::ModelConfig;
use headwater::model::shape::Shape;
use headwater::train::checkpoint::Retention;
use headwater::train::guard::{Guards, OnFault};
use headwater::train::held_out::HeldOut;
use headwater::train::schedule::Decay;
use headwater::train::{check_dealing, host_products};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The last steps of `--schedule wsd`, in percent: as many sufficed for MiniCPM (arXiv 2404.06395).
const DECAY_PERCENT: u64 = 10;

/// What is trained on it.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Training")]
pub struct TrainArgs {
    /// A published set-up: its model, sequences, steps and rates are taken where no flag says otherwise
    #[arg(long, value_name = "NAME")]
    pub published: Option<String>,
    /// The model to train: a Hugging Face directory, "bundled", or a shape for random weights [default: 10m]
    #[arg(long, value_name = "DIR|SHAPE")]
    pub model: Option<String>,
    /// The directory of the tokenizer for a shape [default: the bundled one]
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<String>,
    /// Sequences of one step [default: 8]
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Tokens of one step, instead of --batch: as many sequences as fit if all are full
    #[arg(long, value_name = "N", conflicts_with = "batch")]
    pub batch_tokens: Option<usize>,
    /// Peak learning rate [default: 1e-3 for random weights, 1e-5 for a loaded model]
    #[arg(long, value_name = "X")]
    pub rate: Option<f64>,
    /// Steps of warm-up [default: a tenth of the steps, at most 1000]
    #[arg(long, value_name = "N")]
    pub warmup: Option<u64>,
    /// Steps over which the rate falls: the run ends with its input, not with them [default: as many as the
    /// input is estimated to give]
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// How the rate falls: along a cosine, or held and falling in the last steps
    #[arg(long, value_enum, default_value_t = Form::Cosine, value_name = "HOW")]
    pub schedule: Form,
    /// The last steps, in which a held rate falls, of all [default: 10]
    #[arg(long, value_name = "PERCENT")]
    pub decay_share: Option<u64>,
    /// What the model is computed in; parameters and moments are f32 always. auto is f32 on a CPU, bf16 on a GPU
    #[arg(long, value_enum, default_value_t = Compute::Auto, value_name = "TYPE")]
    pub train_dtype: Compute,
    /// Tokens whose activations are held at a time [default: 1024, on a GPU 4096]
    #[arg(long, value_name = "N")]
    pub micro_batch_tokens: Option<usize>,
    /// Run blocks again in the backward pass instead of keeping their activations
    #[arg(long)]
    pub recompute: bool,
    /// Weight of a loss that keeps logits from drifting; PaLM had 1e-4
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    pub z_loss: f64,
    /// Probability that an element is dropped where the stream begins, and of all that is added to it
    #[arg(long, default_value_t = 0.0, value_parser = probability, value_name = "P")]
    pub hidden_dropout: f64,
    /// What to do about a step whose loss or gradient is not finite: stop the run, or skip its update
    #[arg(long, value_enum, default_value_t = OnNonfinite::Stop, value_name = "HOW")]
    pub on_nonfinite: OnNonfinite,
    /// What to do about a step whose loss or gradient norm is far above those before: nothing, stop, or skip
    #[arg(long, value_enum, default_value_t = OnSpike::Off, value_name = "HOW")]
    pub on_spike: OnSpike,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub checkpoint_every: u64,
    /// Checkpoints that are kept, the latest
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub keep_checkpoints: usize,
    /// Keep those of every so many-th step for ever, too: a multiple of --checkpoint-every
    #[arg(long, value_name = "STEPS")]
    pub keep_every: Option<u64>,
    /// Texts to measure the loss on, never learned from; each file name is a source of its own
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub eval: Vec<PathBuf>,
    /// Steps between measuring them; also before the first step and behind the last one
    #[arg(long, default_value_t = 100, requires = "eval", value_name = "N")]
    pub eval_every: u64,
}

/// What a model in training is computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compute {
    /// What is usual on the device
    Auto,
    /// Everything in f32
    F32,
    /// Products in bf16, on a GPU everything but sums
    Bf16,
}

impl Compute {
    /// The type on a device.
    pub fn dtype(self, device: &Device) -> DType {
        match (self, device.is_cpu()) {
            (Compute::Auto, false) | (Compute::Bf16, _) => DType::BF16,
            (Compute::Auto, true) | (Compute::F32, _) => DType::F32,
        }
    }

    /// How a device computes a model in it, as far as that decides the output.
    pub fn arithmetic(self, device: &Device, config: &ModelConfig) -> String {
        let dtype = self.dtype(device);
        let products = device.is_cpu().then(|| host_products(config, dtype));
        match products {
            None => format!("cuda {}", dtype.as_str()),
            Some(Ok(WeightType::Bf16x3)) => "cpu f32 (three bf16 matrices)".into(),
            Some(Ok(WeightType::Bf16)) => format!("cpu bf16 ({})", bf16_unit()),
            Some(_) => format!("cpu {}", dtype.as_str()),
        }
    }
}

/// Tokens of a micro-batch where nothing else is said: so many that weights are read seldom, and on a CPU so few that
/// activations stay near.
pub fn micro_batch_tokens(device: &Device) -> usize {
    if device.is_cpu() { 1024 } else { 4096 }
}

/// How a learning rate falls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// Half a cosine from the warm-up to the last step
    Cosine,
    /// Warm-up, the peak, and a decay over the last steps
    Wsd,
}

/// What to do about a step that is not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnNonfinite {
    /// Stop with an error
    Stop,
    /// Skip the update, and count it
    Skip,
}

/// What to do about a spike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnSpike {
    /// Do not look
    Off,
    /// Stop with an error
    Stop,
    /// Skip the update, and count it
    Skip,
}

impl TrainArgs {
    /// Takes what a published set-up says where no flag does.
    ///
    /// # Errors
    /// If there is no such set-up among `known`.
    pub fn resolve(&mut self, known: &'static [Published]) -> Result<Option<&'static Published>> {
        let Some(name) = &self.published else { return Ok(None) };
        let published = known.iter().find(|published| published.name == name);
        let Some(published) = published else {
            let names: Vec<&str> = known.iter().map(|published| published.name).collect();
            bail!("--published takes {} here, not {name:?}", names.join(" or "));
        };
        self.model.get_or_insert_with(|| published.shape.into());
        if self.batch_tokens.is_none() {
            self.batch.get_or_insert(published.batch_sequences());
        }
        self.rate.get_or_insert(published.rate);
        self.warmup.get_or_insert(published.warmup);
        self.steps.get_or_insert(published.steps);
        Ok(Some(published))
    }

    /// What the model is called.
    pub fn model_name(&self) -> &str {
        self.model.as_deref().unwrap_or("10m")
    }

    /// Sequences of `length` tokens of one step.
    pub fn batch(&self, length: usize) -> usize {
        match self.batch_tokens {
            Some(tokens) => tokens / length.max(1),
            None => self.batch.unwrap_or(8),
        }
    }

    /// Tokens whose activations are held at a time.
    pub fn micro_batch_tokens(&self, device: &Device) -> usize {
        self.micro_batch_tokens.unwrap_or_else(|| micro_batch_tokens(device))
    }

    /// The model to train, with its tokenizer.
    ///
    /// # Errors
    /// If it cannot be found, or has a tokenizer of its own and another one is named.
    pub fn model(&self, length: usize) -> Result<Model> {
        let name = self.model_name();
        ensure!(
            self.tokenizer.is_none() || Shape::named(name).is_some(),
            "--tokenizer is for a shape: the model {name:?} has a tokenizer of its own"
        );
        let tokenizer = self.tokenizer.as_deref().unwrap_or(BUNDLED);
        let tokenizer = Model::trained(tokenizer).context("--tokenizer")?.tokenizer;
        Model::named(name, &tokenizer, length)
    }

    /// How the rate falls.
    pub fn decay(&self) -> Decay {
        match self.schedule {
            Form::Cosine => Decay::Cosine,
            Form::Wsd => Decay::Wsd { decay_percent: self.decay_share.unwrap_or(DECAY_PERCENT) },
        }
    }

    /// What is looked at before a step's update.
    pub fn guards(&self) -> Guards {
        let nonfinite = match self.on_nonfinite {
            OnNonfinite::Stop => OnFault::Stop,
            OnNonfinite::Skip => OnFault::Skip,
        };
        let spike = match self.on_spike {
            OnSpike::Off => None,
            OnSpike::Stop => Some(OnFault::Stop),
            OnSpike::Skip => Some(OnFault::Skip),
        };
        Guards { nonfinite, spike }
    }

    /// Where a run in `run` writes, and how often.
    pub fn folder(&self, run: &Path) -> TrainingFolder {
        TrainingFolder {
            run: run.to_owned(),
            checkpoint_every: self.checkpoint_every,
            retention: Retention { last: self.keep_checkpoints, every: self.keep_every },
        }
    }

    /// The texts to measure the loss on, for sequences of `length` tokens.
    ///
    /// # Errors
    /// If a file is of no known kind, or nothing of a source can be used.
    pub fn held_out(&self, fields: &Fields, model: &Model, length: usize) -> Result<HeldOut> {
        let files = self.eval_files()?;
        HeldOut::read(&files, fields, &model.tokenizer, length).context("--eval")
    }

    /// The part of `run.json`; null if nothing is held out.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn held_out_configuration(&self) -> Result<Value> {
        match self.eval.as_slice() {
            [] => Ok(Value::Null),
            _ => Ok(json!({ "files": digests(&self.eval_files()?)?, "every": self.eval_every })),
        }
    }

    fn eval_files(&self) -> Result<Vec<PathBuf>> {
        let (files, passed_over) = files(&self.eval).context("--eval")?;
        match passed_over.first() {
            None => Ok(files),
            Some(file) => bail!("--eval: {file:?} is of no known kind; name the files to be read"),
        }
    }

    /// Checks the flags against each other and the model, for sequences of `length` tokens.
    ///
    /// # Errors
    /// Says which flag cannot work, and why.
    pub fn check(&self, model: &Model, length: usize, devices: &[Device]) -> Result<()> {
        ensure!(self.batch != Some(0), "--batch must be 1 at least");
        if let Some(tokens) = self.batch_tokens {
            ensure!(
                tokens >= length,
                "--batch-tokens {tokens} holds no sequence of {length} tokens"
            );
        }
        ensure!(self.steps != Some(0), "--steps must be 1 at least");
        if let (Some(warmup), Some(steps)) = (self.warmup, self.steps) {
            ensure!(
                warmup <= steps,
                "--warmup {warmup} is more than --steps {steps}: the rate would never reach its peak"
            );
        }
        ensure!(self.micro_batch_tokens != Some(0), "--micro-batch-tokens must be 1 at least");
        let z_loss = self.z_loss;
        ensure!(z_loss.is_finite() && z_loss >= 0.0, "--z-loss must be 0 or more, not {z_loss}");
        ensure!(self.eval_every > 0, "--eval-every must be 1 at least");
        self.check_decay()?;
        self.check_checkpoints()?;
        if let Some(rate) = self.rate {
            check_rate(rate)?;
        }
        let context = model.config.max_position_embeddings;
        ensure!(
            length <= context,
            "sequences of {length} tokens do not fit the context of {:?}, {context} tokens",
            model.name
        );
        let micro_batch = self.micro_batch_tokens(&devices[0]);
        check_dealing(self.batch(length), length, micro_batch, devices.len())?;
        check_sums(devices.len())?;
        model.check_trainable()
    }

    fn check_decay(&self) -> Result<()> {
        let Some(percent) = self.decay_share else { return Ok(()) };
        ensure!((1..=100).contains(&percent), "--decay-share must be 1 to 100 percent");
        ensure!(
            self.schedule == Form::Wsd,
            "--decay-share belongs to --schedule wsd: a cosine falls all the way"
        );
        Ok(())
    }

    fn check_checkpoints(&self) -> Result<()> {
        let every = self.checkpoint_every;
        ensure!(every > 0, "--checkpoint-every must be 1 at least");
        ensure!(self.keep_checkpoints > 0, "--keep-checkpoints must be 1 at least");
        if let Some(keep) = self.keep_every {
            ensure!(
                keep > 0 && keep.is_multiple_of(every),
                "--keep-every {keep} is no multiple of --checkpoint-every {every}: there would be no \
                 checkpoint to keep"
            );
        }
        Ok(())
    }
}

/// The value of `--hidden-dropout`.
///
/// # Errors
/// If not even a part would be kept.
pub fn probability(value: &str) -> std::result::Result<f64, String> {
    match value.parse() {
        Ok(number) if (0.0..1.0).contains(&number) => Ok(number),
        _ => Err("a probability is 0 or more and below 1".into()),
    }
}

/// Checks that NCCL, as the environment sets it up, adds up over so many devices in one order.
///
/// # Errors
/// If it may choose another order for each sum.
pub fn check_sums(devices: usize) -> Result<()> {
    check_algorithm(devices, std::env::var("NCCL_ALGO").ok().as_deref())
}

fn check_algorithm(devices: usize, algorithm: Option<&str>) -> Result<()> {
    let is_ring = algorithm.is_some_and(|name| name.eq_ignore_ascii_case("ring"));
    ensure!(
        devices <= 2 || is_ring, // two numbers have one sum
        "{devices} devices add up in an order of their own each time unless NCCL_ALGO=Ring is set in the \
         environment; it is {}",
        algorithm.map_or("not set".into(), |name| format!("{name:?}"))
    );
    Ok(())
}

/// Checks a learning rate.
///
/// # Errors
/// If nothing can be learned at it.
pub fn check_rate(rate: f64) -> Result<()> {
    ensure!(rate.is_finite() && rate > 0.0, "--rate must be a number above 0, not {rate}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::args::RunArgs;
    use super::super::published::SCRATCH;
    use super::*;

    fn check(flags: &str, expected: std::result::Result<Decay, &str>) {
        check_on(1, flags, expected);
    }

    fn check_on(devices: usize, flags: &str, expected: std::result::Result<Decay, &str>) {
        let needed = ["--input", "x.jsonl", "--out", "x", "--model", "2m"];
        let args = RunArgs::of(needed.into_iter().chain(flags.split_whitespace()));
        let args = args.expect("flags that exist").train;
        let model = args.model(64).expect("a shape");
        match (args.check(&model, 64, &vec![Device::Cpu; devices]), expected) {
            (Ok(()), expected) => assert_eq!(Ok(args.decay()), expected, "{flags}"),
            (Err(error), Err(said)) => {
                assert!(error.to_string().contains(said), "{flags}: {error}");
            }
            (Err(error), Ok(_)) => panic!("{flags}: {error}"),
        }
    }

    #[test]
    fn a_step_has_the_sequences_that_its_tokens_hold() {
        let batch = |flags: &str| {
            let needed = ["--input", "x.jsonl", "--out", "x"];
            let mut args =
                RunArgs::of(needed.into_iter().chain(flags.split_whitespace())).expect(flags).train;
            args.resolve(&SCRATCH).expect("a published set-up");
            args.batch(2048)
        };
        assert_eq!(batch(""), 8);
        assert_eq!(batch("--batch-tokens 9000"), 4);
        assert_eq!(batch("--published 500m"), 256);
        assert_eq!(batch("--published 500m --batch-tokens 9000"), 4);
        assert_eq!(batch("--published 500m --batch 3"), 3);
        check("--batch-tokens 63", Err("holds no sequence of 64"));
    }

    #[test]
    fn flags_of_training_are_checked_against_each_other() {
        check("", Ok(Decay::Cosine));
        check("--schedule wsd", Ok(Decay::Wsd { decay_percent: 10 }));
        check("--warmup 9 --steps 9", Ok(Decay::Cosine));
        check("--warmup 10 --steps 9", Err("would never reach its peak"));
        check("--schedule wsd --decay-share 25", Ok(Decay::Wsd { decay_percent: 25 }));
        check("--decay-share 25", Err("--schedule wsd"));
        check("--schedule wsd --decay-share 101", Err("--decay-share"));
        check("--keep-checkpoints 0", Err("--keep-checkpoints"));
        check("--checkpoint-every 20 --keep-every 60", Ok(Decay::Cosine));
        check("--checkpoint-every 20 --keep-every 50", Err("no multiple of --checkpoint-every 20"));
        check("--eval x.jsonl --eval-every 0", Err("--eval-every"));
        check("--z-loss 1e-4 --micro-batch-tokens 1", Ok(Decay::Cosine));
        check("--z-loss NaN", Err("--z-loss"));
        check("--micro-batch-tokens 0", Err("--micro-batch-tokens"));
        check_on(2, "--batch 4 --micro-batch-tokens 128", Ok(Decay::Cosine));
        check_on(
            2,
            "--batch 4 --micro-batch-tokens 256",
            Err("too few for 2 devices: raise --batch"),
        );
    }

    #[test]
    fn more_than_two_devices_add_up_in_a_ring() {
        let check = |devices, algorithm, said: Option<&str>| {
            let found = check_algorithm(devices, algorithm).map_err(|error| error.to_string());
            match said {
                None => assert_eq!(found, Ok(()), "{devices} {algorithm:?}"),
                Some(said) => assert!(found.is_err_and(|why| why.contains(said)), "{said}"),
            }
        };
        check(1, None, None);
        check(2, Some("Tree"), None);
        check(3, Some("Ring"), None);
        check(8, Some("ring"), None);
        check(3, None, Some("unless NCCL_ALGO=Ring is set in the environment; it is not set"));
        check(4, Some("^Ring"), Some("it is \"^Ring\""));
    }

    #[test]
    fn a_tokenizer_is_named_for_a_shape_only() {
        let model = |flags: &[&str]| {
            let needed = ["--input", "x.jsonl", "--out", "x", "--tokenizer", BUNDLED];
            let args = RunArgs::of(needed.iter().chain(flags)).expect("flags that exist").train;
            args.model(64).map(|model| model.name).map_err(|error| error.to_string())
        };
        assert_eq!(model(&["--model", "2m"]), Ok("2m".into()));
        assert!(model(&["--model", BUNDLED]).is_err_and(|why| why.contains("--tokenizer")));
        assert!(model(&["--model", "/no/such"]).is_err_and(|why| why.contains("--tokenizer")));
    }

    #[test]
    fn a_probability_leaves_a_part() {
        assert_eq!(["0", "0.1", "0.99"].map(probability), [Ok(0.0), Ok(0.1), Ok(0.99)]);
        assert!(["1", "-0.1", "NaN", "x"].map(probability).iter().all(std::result::Result::is_err));
    }

    #[test]
    fn guards_are_as_the_flags_say() {
        let guards = |flags: &[&str]| {
            let needed = ["--input", "x.jsonl", "--out", "x"];
            RunArgs::of(needed.iter().chain(flags)).expect("flags that exist").train.guards()
        };
        assert_eq!(guards(&[]), Guards::USUAL);
        let skip = guards(&["--on-spike", "skip", "--on-nonfinite", "skip"]);
        assert_eq!(skip, Guards { nonfinite: OnFault::Skip, spike: Some(OnFault::Skip) });
    }
}
