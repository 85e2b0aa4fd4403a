//! Tunes an instruction synthesizer.
//!
//! ```text
//! task rows ─▶ lessons (few-shot, one dataset an item) ─▶ packed sequences ─▶ trainer ─▶ model/
//! ```

use crate::shell::training::{Drive, Ended, TrainingFolder};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use clap::Args;
use headwater::format::{input, tasks};
use headwater::model::config::ModelConfig;
use headwater::model::shape::Shape;
use headwater::model::weights::Weights;
use headwater::model::device;
use headwater::prompt::PromptWriter;
use headwater::record::{Rejected, Sequence};
use headwater::tokenizer::Tokenizer;
use headwater::train::optimizer::AdamW;
use headwater::train::schedule::Schedule;
use headwater::train::tuning::{LessonSettings, Lessons, LossOn};
use headwater::train::{TrainSettings, Trainer, initial, loaded};
use std::path::PathBuf;

/// Tune an instruction synthesizer on task rows.
#[derive(Args, Clone, Debug)]
pub struct Tune {
    /// Files of task rows: one JSON object a line with a text and its question-answer pairs
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    pub input: Vec<PathBuf>,
    /// Rows to measure the loss on, never learned from
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub held_out: Vec<PathBuf>,
    /// The model to start from: a Hugging Face directory, or a shape for random weights
    #[arg(long, value_name = "DIR|SHAPE")]
    pub base: String,
    /// The run folder; the tuned model is in its model/
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 2048)]
    pub length: usize,
    /// Rows that may follow each other in one prompt
    #[arg(long, default_value_t = 3)]
    pub shots: usize,
    /// Passes over the rows
    #[arg(long, default_value_t = 5)]
    pub epochs: u64,
    /// Sequences of one step
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
    /// Peak learning rate
    #[arg(long, default_value_t = 5e-6)]
    pub rate: f64,
    /// Steps of warm-up
    #[arg(long, default_value_t = 1000)]
    pub warmup: u64,
    /// What to learn of each row: its pairs, or everything (to make a base model)
    #[arg(long, default_value = "pairs")]
    pub loss_on: String,
    /// Tokens of the tokenizer that is trained when the base is a shape
    #[arg(long, default_value_t = 6144)]
    pub vocabulary: usize,
    /// Rows used of each dataset
    #[arg(long, default_value_t = 10_000)]
    pub rows_per_dataset: usize,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 100)]
    pub checkpoint_every: u64,
    /// Type of the tuned model's parameters on disk
    #[arg(long, default_value = "f32")]
    pub dtype: String,
    /// Seed of all random choices
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Where to compute: cpu or cuda:0
    #[arg(long, default_value = "cpu")]
    pub device: String,
}

/// Runs the pipeline.
///
/// # Errors
/// If the settings cannot work, training diverges, or the disk refuses.
pub fn run(args: &Tune) -> Result<()> {
    let device = device::device(&args.device)?;
    let (rows, mut rejected) = read(&args.input)?;
    let base = Base::open(args, &rows)?;
    let writer = PromptWriter::new(base.tokenizer.clone())?;
    let lesson_settings = LessonSettings {
        length: args.length,
        shots_max: args.shots,
        rows_per_dataset_max: args.rows_per_dataset,
        loss_on: match args.loss_on.as_str() {
            "pairs" => LossOn::Pairs,
            "everything" => LossOn::Everything,
            other => bail!("--loss-on takes pairs or everything, not {other:?}"),
        },
        seed: args.seed,
    };
    let (lessons, unused) = Lessons::new(rows, &writer, lesson_settings.clone());
    rejected.extend(unused);
    let held_out = held_out(args, &writer, &lesson_settings)?;
    let (tokens, learned) = lessons.tokens();
    let total_steps = (tokens * args.epochs).div_ceil((args.length * args.batch) as u64);
    eprintln!(
        "{} rows of {tokens} tokens, {learned} of them learned; {} rejected; {total_steps} steps; \
         {} parameters",
        lessons.rows(),
        rejected.len(),
        base.config.parameter_count(),
    );
    let settings = settings(args, total_steps);
    let folder =
        TrainingFolder { run: args.out.clone(), checkpoint_every: args.checkpoint_every };
    let trainer = match folder.latest()? {
        Some(checkpoint) => Trainer::resume(&checkpoint, settings, DType::F32, &device)?,
        None => base.start(args, settings, &device)?,
    };
    let mut drive = Drive::new(trainer, &base.tokenizer, folder)?;
    if train(&mut drive, &lessons, args, &held_out)? == Ended::Stopped {
        eprintln!("stopped; the same command goes on from the last checkpoint");
        return Ok(());
    }
    drive.checkpoint()?;
    let dtype = device::dtype(&args.dtype, &device)?;
    let model = args.out.join("model");
    drive.trainer.export(&model, &base.tokenizer, dtype)?;
    eprintln!("the tuned model is in {}", model.display());
    Ok(())
}

fn train(
    drive: &mut Drive<'_>,
    lessons: &Lessons,
    args: &Tune,
    held_out: &[Sequence],
) -> Result<Ended> {
    let done = drive.trainer.progress().next_sequence as usize;
    let mut seen = 0;
    for epoch in 0..args.epochs {
        let sequences = lessons.epoch(epoch);
        for batch in sequences.chunks(args.batch) {
            seen += batch.len();
            if seen <= done {
                continue;
            }
            let ended = drive.step(batch, &mut |report, seconds| {
                if report.step.is_multiple_of(10) {
                    eprintln!(
                        "step {} epoch {epoch} loss {:.4} norm {:.2} rate {:.2e} {:.0} tokens/s",
                        report.step,
                        report.loss,
                        report.grad_norm,
                        report.lr,
                        report.tokens as f64 / seconds
                    );
                }
            })?;
            let step = drive.trainer.progress().step;
            if !held_out.is_empty() && step.is_multiple_of(args.checkpoint_every) {
                eprintln!("step {step} held-out loss {:.4}", drive.trainer.evaluate(held_out)?);
            }
            if ended == Ended::Stopped {
                return Ok(ended);
            }
        }
    }
    Ok(Ended::Done)
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

fn held_out(
    args: &Tune,
    writer: &PromptWriter,
    settings: &LessonSettings,
) -> Result<Vec<Sequence>> {
    let (rows, _) = read(&args.held_out)?;
    Ok(Lessons::new(rows, writer, settings.clone()).0.epoch(0))
}

fn settings(args: &Tune, total_steps: u64) -> TrainSettings {
    TrainSettings {
        batch_sequences: args.batch,
        micro_batch_tokens: 4096,
        schedule: Schedule {
            peak: args.rate,
            warmup_steps: args.warmup,
            total_steps,
            floor_share: 0.1,
        },
        optimizer: AdamW {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
        },
        recompute: false,
    }
}

/// What tuning starts from.
struct Base {
    config: ModelConfig,
    tokenizer: Tokenizer,
    directory: Option<PathBuf>,
}

impl Base {
    fn open(args: &Tune, rows: &[tasks::Task]) -> Result<Self> {
        if let Some(shape) = Shape::named(&args.base) {
            let folder = TrainingFolder { run: args.out.clone(), checkpoint_every: 1 };
            let tokenizer = match folder
                .latest()?
            {
                Some(checkpoint) => Tokenizer::read(&checkpoint)?,
                None => {
                    let texts: Vec<String> = rows.iter().map(written).collect();
                    Tokenizer::train(texts.into_iter(), args.vocabulary)?
                }
            };
            let config = ModelConfig {
                vocab_size: tokenizer.vocabulary(),
                max_position_embeddings: args.length,
                bos_token_id: tokenizer.bos(),
                eos_token_ids: tokenizer.eos().into_iter().collect(),
                ..shape.config()
            };
            return Ok(Base { config, tokenizer, directory: None });
        }
        let directory = PathBuf::from(&args.base);
        if !directory.is_dir() {
            bail!("--base {:?} is neither a directory nor one of {}", args.base, Shape::names());
        }
        let config = ModelConfig::read(&directory)?;
        let tokenizer = Tokenizer::read(&directory)?;
        Ok(Base { config, tokenizer, directory: Some(directory) })
    }

    fn start(&self, args: &Tune, settings: TrainSettings, device: &Device) -> Result<Trainer> {
        let values = match &self.directory {
            Some(directory) => loaded(&self.config, &Weights::open(directory)?, device)?,
            None => initial(&self.config, args.seed, device)?,
        };
        let compute = if device.is_cpu() { DType::F32 } else { DType::BF16 };
        Trainer::new(&self.config, values, settings, compute, device).context("could not start")
    }
}

/// A row as the synthesizer sees it, to train a tokenizer on.
fn written(task: &tasks::Task) -> String {
    let pairs = task.pairs.iter();
    let pairs: Vec<String> = pairs
        .map(|pair| format!("<QUE> {} <ANS> {} </END>", pair.question, pair.answer))
        .collect();
    format!(" <CON> {} </CON>\n\n{}", task.text, pairs.join("\n\n"))
}
