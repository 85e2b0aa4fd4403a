//! Tunes an instruction synthesizer (recipe (f)).
//!
//! ```text
//! task rows ─▶ lessons (few-shot, one dataset an item) ─▶ packed sequences ─▶ trainer ─▶ model/ ─▶ exam
//! ```

mod report;

use crate::shell::args::{MachineArgs, check_progress};
use crate::shell::evaluation::{CONTEXT_MAX, evaluate};
use crate::shell::models::Model;
use crate::shell::plan::{OPTIMIZER, count};
use crate::shell::progress::{Expected, Progress, TrainMeter};
use crate::shell::published::{Published, SYNTHESIZER};
use crate::shell::running::begin;
use crate::shell::settings::digests;
use crate::shell::stop::STOPPED;
use crate::shell::terminal::tell;
use crate::shell::train_args::{Compute, check_rate, micro_batch_tokens, probability};
use crate::shell::training::{Drive, Ended, Told, Trained, TrainingFolder, latest};
use crate::shell::{has_rejected, wrong_use};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use clap::Args;
use headwater::eval::{Exam, ExamBounds};
use headwater::format::{compressed, durable, input, tasks};
use headwater::ledger::Ledger;
use headwater::meter::Meters;
use headwater::model::device;
use headwater::model::precision::Precision;
use headwater::model::shape::Shape;
use headwater::prompt::PromptWriter;
use headwater::record::{Rejected, Sequence};
use headwater::run::RunFolder;
use headwater::tokenizer::Tokenizer;
use headwater::train::checkpoint::Retention;
use headwater::train::schedule::{Decay, Schedule};
use headwater::train::tuning::{LessonSettings, Lessons, LossOn};
use headwater::train::{HiddenDropout, TrainSettings, Trainer};
use report::Report;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

/// Tune an instruction synthesizer on task rows
#[derive(Args, Clone, Debug)]
#[command(
    arg_required_else_help = true,
    after_help = "Example:\n  headwater tune --input tasks.jsonl --held-out held-out.jsonl --base \
                        models/mistral-7b --out runs/synthesizer"
)]
pub struct Tune {
    /// A published set-up, taken where no flag says otherwise: mistral-7b
    #[arg(long, value_name = "NAME")]
    published: Option<String>,
    /// Files of task rows: one JSON object a line with a text and its question-answer pairs
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    input: Vec<PathBuf>,
    /// Rows to measure the loss and the answers on, never learned from
    #[arg(long, num_args = 1.., value_name = "FILE")]
    held_out: Vec<PathBuf>,
    /// The model to start from: a Hugging Face directory, "bundled", or a shape for random weights
    #[arg(long, value_name = "DIR|SHAPE")]
    base: String,
    /// The run folder; the tuned model is in its model/
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Tokens of a sequence [default: 2048]
    #[arg(long, value_name = "N")]
    length: Option<usize>,
    /// Rows that may follow each other in one prompt
    #[arg(long, default_value_t = 3)]
    shots: usize,
    /// Passes over the rows [default: 5]
    #[arg(long, value_name = "N")]
    epochs: Option<u64>,
    /// Sequences of one step [default: 8]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Peak learning rate [default: 5e-6]
    #[arg(long, value_name = "X")]
    rate: Option<f64>,
    /// Steps of warm-up [default: 1000]
    #[arg(long, value_name = "N")]
    warmup: Option<u64>,
    /// Probability that an element is dropped where the stream begins, and of all that is added to it
    #[arg(long, default_value_t = 0.0, value_parser = probability, value_name = "P")]
    hidden_dropout: f64,
    /// What to learn of each row: its pairs, or everything (to make a base model)
    #[arg(long, default_value = "pairs")]
    loss_on: String,
    /// Tokens of the tokenizer that is trained when the base is a shape
    #[arg(long, default_value_t = 6144)]
    vocabulary: usize,
    /// Rows used of each dataset
    #[arg(long, default_value_t = 10_000)]
    rows_per_dataset: usize,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 100)]
    checkpoint_every: u64,
    /// What the model is computed in; parameters and moments are f32 always. auto is f32 on a CPU, bf16 on a GPU
    #[arg(long, value_enum, default_value_t = Compute::Auto, value_name = "TYPE")]
    train_dtype: Compute,
    /// Type of the tuned model's parameters on disk
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Rows of the held-out files that the tuned model is asked about; 0 for none
    #[arg(long, default_value_t = 200, value_name = "N")]
    exam_rows: usize,
    #[command(flatten)]
    machine: MachineArgs,
}

impl Tune {
    fn set_up(&self) -> Option<&'static Published> {
        self.published.as_ref().map(|_| &SYNTHESIZER)
    }

    fn length(&self) -> usize {
        self.length.or(self.set_up().map(|it| it.length)).unwrap_or(2048)
    }

    fn epochs(&self) -> u64 {
        self.epochs.unwrap_or(5)
    }

    fn batch(&self) -> usize {
        self.batch.or(self.set_up().map(Published::batch_sequences)).unwrap_or(8)
    }

    fn rate(&self) -> f64 {
        self.rate.or(self.set_up().map(|it| it.rate)).unwrap_or(5e-6)
    }

    fn warmup(&self) -> u64 {
        self.warmup.or(self.set_up().map(|it| it.warmup)).unwrap_or(1000)
    }
}

/// Runs the pipeline.
///
/// # Errors
/// If the settings cannot work, training diverges, or the disk refuses.
pub fn run(args: &Tune) -> Result<ExitCode> {
    let class = Class::open(args).map_err(wrong_use)?;
    tell!("{}", class.describe(args).trim_end());
    if args.machine.dry_run {
        return Ok(ExitCode::SUCCESS);
    }
    begin()?;
    let _lock = RunFolder::claim(&args.out, &class.configuration(args)?)?.lock()?;
    class.write_rejected(args)?;
    let start = Instant::now();
    let folder = class.folder(args);
    let compute = args.train_dtype.dtype(&class.device);
    let devices = std::slice::from_ref(&class.device);
    let trainer = match latest(&args.out)? {
        Some(checkpoint) => Trainer::resume(&checkpoint, class.training, compute, devices)?,
        None => {
            let values = class.model.parameters(args.machine.seed, &class.device)?;
            let (config, training) = (&class.model.config, class.training);
            Trainer::new(config, values, training, compute, devices)?
        }
    };
    let mut drive = Drive::new(trainer, &class.model.tokenizer, folder, Told::default())?;
    let model = args.out.join("model");
    let scores = match class.teach(&mut drive, args)? {
        Ended::Stopped => None,
        Ended::Done => {
            drive.finish()?; // it has nothing held out that a stop could leave for later
            let dtype = tensors(&args.dtype, &class.device)?;
            drive.trainer.export(&model, &class.model.tokenizer, dtype)?;
            evaluate(&class.exam(args)?, &model, &class.device)?
        }
    };
    let Some(scores) = scores else {
        tell!("stopped; run the same command again to go on");
        return Ok(ExitCode::from(STOPPED));
    };
    let held_out = Some(&class.held_out).filter(|held_out| !held_out.is_empty());
    let held_out_loss = held_out.map(|held_out| drive.trainer.evaluate(held_out)).transpose()?;
    let Trained { first, last, .. } = drive.trained().context("there was nothing to learn")?;
    let report =
        Report { first, last, held_out_loss, scores, spent: start.elapsed().as_secs_f64() };
    report.close(args, &class)?;
    let has_any = !class.rejected.is_empty() || !class.held_out_rejected.is_empty();
    Ok(has_rejected(has_any, args.machine.strict))
}

/// What is learned, and who learns it.
struct Class {
    model: Model,
    device: Device,
    writer: PromptWriter,
    lesson_settings: LessonSettings,
    lessons: Lessons,
    rows_read: u64,
    held_out_rows: Vec<tasks::Task>,
    held_out: Vec<Sequence>,
    held_out_used: u64,
    rejected: Vec<Rejected>,
    held_out_rejected: Vec<Rejected>,
    training: TrainSettings,
}

impl Class {
    fn open(args: &Tune) -> Result<Self> {
        check_progress(&args.machine.progress)?;
        for (flag, value) in [
            ("epochs", args.epochs()),
            ("batch", args.batch() as u64),
            ("shots", args.shots as u64),
            ("checkpoint-every", args.checkpoint_every),
        ] {
            ensure!(value > 0, "--{flag} must be 1 at least");
        }
        check_rate(args.rate())?;
        if let Some(name) = &args.published {
            let known = SYNTHESIZER.name;
            ensure!(name == known, "--published takes {known} here, not {name:?}");
        }
        let device = device::device(&args.machine.device)?;
        tensors(&args.dtype, &device)?;
        let (rows, mut rejected) = read(&args.input)?;
        let rows_read = (rows.len() + rejected.len()) as u64;
        let model =
            Model::named(&args.base, &tokenizer(args, &rows)?, args.length()).context("--base")?;
        model.check_trainable().context("--base")?;
        let context = model.config.max_position_embeddings;
        ensure!(args.length() <= context, "--length: {:?} takes {context} tokens", model.name);
        let writer = PromptWriter::new(model.tokenizer.clone())?;
        let lesson_settings = LessonSettings {
            length: args.length(),
            shots_max: args.shots,
            rows_per_dataset_max: args.rows_per_dataset,
            loss_on: match args.loss_on.as_str() {
                "pairs" => LossOn::Pairs,
                "everything" => LossOn::Everything,
                other => bail!("--loss-on takes pairs or everything, not {other:?}"),
            },
            seed: args.machine.seed,
        };
        let (lessons, unused) = Lessons::new(rows, &writer, lesson_settings.clone());
        rejected.extend(unused);
        ensure!(
            lessons.rows() > 0,
            "no row of the input can be used{}",
            rejected.first().map(|first| format!("; the first: {first}")).unwrap_or_default()
        );
        let (held_out_rows, mut held_out_rejected) = read(&args.held_out)?;
        let (held_out, unused) =
            Lessons::new(held_out_rows.clone(), &writer, lesson_settings.clone());
        held_out_rejected.extend(unused);
        ensure!(
            args.held_out.is_empty() || held_out.rows() > 0,
            "--held-out: no row of its files can be used{}",
            held_out_rejected
                .first()
                .map(|first| format!("; the first: {first}"))
                .unwrap_or_default()
        );
        let (held_out_used, held_out) = (held_out.rows() as u64, held_out.epoch(0));
        let training = training(args, lessons.tokens().0, &device);
        Ok(Class {
            model,
            device,
            writer,
            lesson_settings,
            lessons,
            rows_read,
            held_out_rows,
            held_out,
            held_out_used,
            rejected,
            held_out_rejected,
            training,
        })
    }

    fn describe(&self, args: &Tune) -> String {
        let (tokens, learned) = self.lessons.tokens();
        let published = args.set_up().map(|it| format!("  published     {}\n", it.describe()));
        let published = published.unwrap_or_default();
        format!(
            "  rows          {} of {} read; {} tokens, {} of them learned\n  held out      {} of {} rows read\n  \
             base          {}: {} parameters\n  training      {} passes, {} steps of {} sequences of {} \
             tokens, peak rate {:.1e}, warm-up {}\n{published}  output        {}\n",
            self.lessons.rows(),
            self.rows_read,
            count(tokens),
            count(learned),
            self.held_out_used,
            self.held_out_used + self.held_out_rejected.len() as u64,
            self.model.name,
            count(self.model.config.parameter_count()),
            args.epochs(),
            self.training.schedule.total_steps,
            args.batch(),
            args.length(),
            args.rate(),
            args.warmup(),
            args.out.display(),
        )
    }

    fn configuration(&self, args: &Tune) -> Result<Value> {
        Ok(json!({
            "headwater": env!("CARGO_PKG_VERSION"),
            "command": "tune",
            "seed": args.machine.seed,
            "input": digests(&input::expand(&args.input)?)?,
            "base": {
                "name": self.model.name,
                "weights": self.model.digest()?,
                "tokenizer": format!("{:032x}", self.model.tokenizer.digest()),
            },
            "lessons": self.lesson_settings,
            "passes": args.epochs(),
            "training": self.training,
            "training_arithmetic": args.train_dtype.arithmetic(&self.device, &self.model.config),
        }))
    }

    fn folder(&self, args: &Tune) -> TrainingFolder {
        TrainingFolder {
            run: args.out.clone(),
            checkpoint_every: args.checkpoint_every,
            retention: Retention { last: CHECKPOINTS_KEPT, every: None },
        }
    }

    fn write_rejected(&self, args: &Tune) -> Result<()> {
        let folder = args.out.join("rejected");
        std::fs::create_dir_all(&folder).with_context(|| format!("could not create {folder:?}"))?;
        for (name, rejected) in [("rows", &self.rejected), ("held_out", &self.held_out_rejected)] {
            let path = folder.join(format!("{name}.jsonl.zst"));
            durable::write(&path, &compressed::write(rejected))?;
        }
        Ok(())
    }

    fn exam(&self, args: &Tune) -> Result<Exam> {
        let bounds = ExamBounds {
            rows_max: args.exam_rows,
            new_tokens_max: EXAM_NEW_TOKENS,
            context: self.model.config.max_position_embeddings.min(CONTEXT_MAX),
        };
        let rows = if args.exam_rows > 0 { &self.held_out_rows[..] } else { &[] };
        Ok(Exam::new(rows, &self.writer, bounds))
    }

    /// Goes through the lessons from where the trainer stands.
    fn teach(&self, drive: &mut Drive, args: &Tune) -> Result<Ended> {
        let done = drive.trainer.progress().next_sequence as usize;
        let (meters, meter) = (Arc::new(Meters::default()), Arc::new(TrainMeter::default()));
        let sequences = self.training.schedule.total_steps * args.batch() as u64;
        let sequences = sequences.saturating_sub(done as u64);
        let expected = Expected { texts: 0, sequences, synthesized: None, trained: true };
        let how = &args.machine.progress;
        let _progress = Progress::start(how, meters.clone(), meter.clone(), expected);
        let mut seen = 0;
        for epoch in 0..args.epochs() {
            for batch in self.lessons.epoch(epoch).chunks(args.batch()) {
                seen += batch.len();
                if seen <= done {
                    continue;
                }
                let ended = drive.step(batch, &mut |report, measured| {
                    meter.note(report, measured);
                    meters.learned.add(batch.len() as u64);
                })?;
                if ended == Ended::Stopped {
                    return Ok(ended);
                }
            }
        }
        Ok(Ended::Done)
    }

    fn ledger(&self) -> Ledger {
        let mut ledger = Ledger::default();
        ledger.add("tune/rows", self.rows_read);
        ledger.add("tune/used", self.lessons.rows() as u64);
        for rejected in &self.rejected {
            ledger.add(format!("tune/rejected/{}", rejected.reason), 1);
        }
        if !self.held_out.is_empty() {
            ledger.add("held_out/used", self.held_out_used);
        }
        for rejected in &self.held_out_rejected {
            ledger.add(format!("held_out/rejected/{}", rejected.reason), 1);
        }
        ledger
    }
}

/// Checkpoints that are kept, the latest.
const CHECKPOINTS_KEPT: usize = 2;

/// Tokens that an exam lets the synthesizer write for a text.
const EXAM_NEW_TOKENS: usize = 400;

/// The type of parameters on disk.
fn tensors(name: &str, device: &Device) -> Result<DType> {
    let precision = Precision::choose(name, Precision::F32, device.is_cpu());
    precision.and_then(Precision::tensors).context("--dtype")
}

fn read(paths: &[PathBuf]) -> Result<(Vec<tasks::Task>, Vec<Rejected>)> {
    let (mut rows, mut rejected) = (Vec::new(), Vec::new());
    for path in input::expand(paths)? {
        for row in tasks::read(&path)? {
            match row {
                Ok(row) => rows.push(row),
                Err(bad) => rejected.push(*bad),
            }
        }
    }
    Ok((rows, rejected))
}

/// The tokenizer for a base that is only a shape: that of the checkpoint, or one made from the rows.
/// Models in directories bring their own.
fn tokenizer(args: &Tune, rows: &[tasks::Task]) -> Result<Tokenizer> {
    if Shape::named(&args.base).is_none() {
        return Ok(Model::trained(&args.base).context("--base")?.tokenizer);
    }
    Ok(match latest(&args.out)? {
        Some(checkpoint) => Tokenizer::read(&checkpoint)?,
        None => Tokenizer::train(
            rows.iter().map(written).collect::<Vec<_>>().into_iter(),
            args.vocabulary,
        )?,
    })
}

fn training(args: &Tune, tokens: u64, device: &Device) -> TrainSettings {
    TrainSettings {
        batch_sequences: args.batch(),
        micro_batch_tokens: micro_batch_tokens(device),
        schedule: Schedule {
            peak: args.rate(),
            warmup_steps: args.warmup(),
            total_steps: (tokens * args.epochs()).div_ceil((args.length() * args.batch()) as u64),
            floor_share: 0.1,
            decay: Decay::Cosine,
        },
        optimizer: OPTIMIZER,
        recompute: false,
        z_loss: 0.0,
        dropout: HiddenDropout::of(args.hidden_dropout, args.machine.seed),
    }
}

/// A row as the synthesizer sees it, to train a tokenizer on.
fn written(task: &tasks::Task) -> String {
    let pairs = task.pairs.iter();
    let pairs: Vec<String> =
        pairs.map(|pair| format!("<QUE> {} <ANS> {} </END>", pair.question, pair.answer)).collect();
    format!(" <CON> {} </CON>\n\n{}", task.text, pairs.join("\n\n"))
}
