//! Trains on the sequences of an existing run.
//!
//! ```text
//! RUN/packed/*.parquet, in the order of the manifest ─▶ trainer ─▶ checkpoints/, metrics.jsonl,
//!                                                                  tensorboard/, report.html
//! ```

use crate::shell::args::{MachineArgs, check_progress};
use crate::shell::held_out;
use crate::shell::memory::Need;
use crate::shell::metrics::{self, Totals};
use crate::shell::models::Model;
use crate::shell::plan::{self, count, seconds};
use crate::shell::progress::{Expected, Progress, TrainMeter};
use crate::shell::published::MODELS;
use crate::shell::report;
use crate::shell::running::begin;
use crate::shell::sources::FLOW;
use crate::shell::stop::STOPPED;
use crate::shell::summary::describe_skipped;
use crate::shell::terminal::{show, tell};
use crate::shell::train_args::TrainArgs;
use crate::shell::training::{Drive, Ended, Told, Trained, latest, train_on};
use crate::shell::{has_rejected, wrong_use};
use anyhow::{Context, Result, ensure};
use candle_core::Device;
use clap::Args;
use headwater::format::durable;
use headwater::format::jsonl::Fields;
use headwater::ledger::Ledger;
use headwater::manifest::{EpochRecord, Manifest};
use headwater::meter::Meters;
use headwater::model::device;
use headwater::run::RunFolder;
use headwater::train::feed::Feed;
use headwater::train::held_out::HeldOut;
use headwater::train::{TrainSettings, Trainer};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use xxhash_rust::xxh3::xxh3_128;

/// Passes over the sequences at most: each is a list of its epochs.
const EPOCHS_MAX: u64 = 10_000;

/// Train a model on the shards of an existing run
#[derive(Args, Clone, Debug)]
#[command(
    arg_required_else_help = true,
    after_help = "Example:\n  headwater train --shards runs/pubmed --model 110m --out \
                        runs/pubmed-110m"
)]
pub struct Train {
    /// A run folder with packed sequences
    #[arg(long, value_name = "DIR")]
    shards: PathBuf,
    /// The run folder of the training; an existing one is continued
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Passes over the sequences
    #[arg(long, default_value_t = 1, value_name = "N")]
    epochs: u64,
    #[command(flatten)]
    train: TrainArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

/// Runs the training.
///
/// # Errors
/// If the shards and the model do not fit each other, training diverges, or the disk refuses.
pub fn run(args: &Train) -> Result<ExitCode> {
    let mut args = args.clone();
    let published = args.train.resolve(&MODELS).map_err(wrong_use)?;
    let args = &args;
    let source = Source::open(args).map_err(wrong_use)?;
    let args = &source.planned(args);
    let sequences = source.sequences;
    let (device, seed) = (&source.devices[0], args.machine.seed);
    let settings =
        plan::training(&args.train, &source.model.name, (sequences, source.length), device, seed);
    tell!("{}", source.describe(args, &settings).trim_end());
    if let Some(published) = published {
        tell!("  published     {}", published.describe());
    }
    if args.machine.dry_run {
        return Ok(ExitCode::SUCCESS);
    }
    begin()?;
    let devices = &source.devices;
    let compute = args.train.train_dtype.dtype(&devices[0]);
    let new = || -> Result<Trainer> {
        let values = source.model.parameters(args.machine.seed, &devices[0])?;
        Ok(Trainer::new(&source.model.config, values, settings, compute, devices)?)
    };
    // A new folder is made for a model that can be trained.
    let begun = (!args.out.exists()).then(new).transpose()?;
    let _lock = RunFolder::claim(&args.out, &source.configuration(args, &settings)?)?.lock()?;
    let trainer = match (latest(&args.out)?, begun) {
        (Some(checkpoint), _) => Trainer::resume(&checkpoint, settings, compute, devices)?,
        (None, Some(trainer)) => trainer,
        (None, None) => new()?,
    };
    let start = Instant::now();
    let (meters, meter) = (Arc::new(Meters::default()), Arc::new(TrainMeter::default()));
    let mut seen = trainer.progress().next_sequence;
    let expected = Expected {
        texts: 0,
        sequences: sequences.saturating_sub(seen),
        synthesized: None,
        trained: true,
    };
    let how = &args.machine.progress;
    let progress = Progress::start(how, meters.clone(), meter.clone(), expected);
    let trainer = trainer.with_guards(args.train.guards());
    let folder = args.train.folder(&args.out);
    let mut drive = Drive::new(trainer, &source.model.tokenizer, folder, source.told(args))?;
    let (_, nothing_more) = Feed::new();
    let passes = passes(&source.manifest, args.epochs);
    let ended =
        train_on(&mut drive, &source.shards, &passes, &nothing_more, |report, measured| {
            meter.note(report, measured);
            meters.learned.add(report.next_sequence - seen);
            seen = report.next_sequence;
        })?;
    drop(progress);
    if ended == Ended::Stopped {
        tell!("stopped; run the same command again to go on");
        return Ok(ExitCode::from(STOPPED));
    }
    let trained = drive.trained().context("there was nothing to learn")?;
    close(args, sequences, &trained, start.elapsed().as_secs_f64())?;
    let rejected = trained.ledger.sum("held_out/rejected/");
    Ok(has_rejected(rejected > 0, args.machine.strict))
}

/// What is trained on, and what is trained.
struct Source {
    shards: RunFolder,
    manifest: Manifest,
    /// Those of all passes.
    sequences: u64,
    length: usize,
    model: Model,
    devices: Vec<Device>,
    /// Names of the sources of the sequences.
    mixed: Vec<String>,
    /// How the run that made them trained a model that is called as this one, if it did.
    in_place: Option<TrainSettings>,
    held_out: HeldOut,
}

impl Source {
    fn open(args: &Train) -> Result<Self> {
        ensure!(args.epochs > 0, "--epochs must be 1 at least");
        check_progress(&args.machine.progress)?;
        let devices = device::group(&args.machine.device).context("--device")?;
        let shards = RunFolder::existing(&args.shards).context("--shards")?;
        let manifest = shards.manifest()?;
        ensure!(manifest.sequences() > 0, "{:?} holds no sequences yet", args.shards);
        ensure!(args.epochs <= EPOCHS_MAX, "--epochs {} is more than {EPOCHS_MAX}", args.epochs);
        let sequences = manifest.sequences() * args.epochs;
        let origin = shards.configuration()?;
        let length = origin["length"].as_u64().context("run.json says no length")? as usize;
        let model = args.train.model(length)?;
        args.train.check(&model, length, &devices)?;
        ensure!(
            origin["model"]["tokenizer"] == digest(&model),
            "the sequences in {:?} were made with another tokenizer than that of {:?}: their ids \
             would mean something else; for a shape, name the right one with --tokenizer",
            args.shards,
            model.name
        );
        let held_out = args.train.held_out(&Fields::detected(), &model, length)?;
        let mixed = mixed(&origin);
        let is_same = origin["model"]["name"] == model.name.as_str();
        let in_place = serde_json::from_value(origin["training"].clone()).ok();
        Ok(Source {
            shards,
            manifest,
            sequences,
            length,
            model,
            devices,
            mixed,
            in_place: in_place.filter(|_| is_same),
            held_out,
        })
    }

    /// The flags, with steps and warm-up of the training in place where this one repeats it: its steps were those that
    /// the input was estimated to give.
    fn planned(&self, args: &Train) -> Train {
        let mut args = args.clone();
        let Some(in_place) = &self.in_place else { return args };
        let repeats = args.train.batch(self.length) == in_place.batch_sequences && args.epochs == 1;
        if repeats && args.train.steps.is_none() {
            args.train.steps = Some(in_place.schedule.total_steps);
            args.train.warmup.get_or_insert(in_place.schedule.warmup_steps);
        }
        args
    }

    fn describe(&self, args: &Train, settings: &TrainSettings) -> String {
        let need = Need::of_training(&args.train, &self.model.config, self.length, &self.devices);
        format!(
            "  sequences     {} of {} tokens at most, {} passes\n  training      {}: {} parameters, {} \
             steps of {} sequences, peak rate {:.1e}, {}, warm-up {}, {}\n  held out      {}\n  memory        \
             about {}\n  output        {}\n",
            self.manifest.sequences(),
            self.length,
            args.epochs,
            self.model.name,
            count(self.model.config.parameter_count()),
            settings.schedule.total_steps,
            settings.batch_sequences,
            settings.schedule.peak,
            settings.schedule.decay,
            settings.schedule.warmup_steps,
            args.train.train_dtype.arithmetic(&self.devices[0], &self.model.config),
            held_out::describe(&self.held_out, args.train.eval_every),
            need.describe(),
            args.out.display(),
        )
    }

    fn told(&self, args: &Train) -> Told {
        Told {
            sources: self.mixed.clone(),
            held_out: self.held_out.clone(),
            eval_every: args.train.eval_every,
        }
    }

    fn configuration(&self, args: &Train, settings: &TrainSettings) -> Result<Value> {
        let files = self.manifest.epochs.iter().flat_map(|epoch| &epoch.files);
        let packed = files.filter(|file| file.name.starts_with("packed/"));
        let digests: String = packed.map(|file| file.digest.as_str()).collect();
        Ok(json!({
            "headwater": env!("CARGO_PKG_VERSION"),
            "command": "train",
            "seed": args.machine.seed,
            "shards": {
                "sequences": self.manifest.sequences(),
                "xxh3": format!("{:032x}", xxh3_128(digests.as_bytes())),
            },
            "passes": args.epochs,
            "model": {
                "name": self.model.name,
                "weights": self.model.digest()?,
                "tokenizer": digest(&self.model),
            },
            "training": plan::training_configuration(settings, self.devices.len()),
            "training_arithmetic": args.train.train_dtype.arithmetic(&self.devices[0], &self.model.config),
            "held_out": args.train.held_out_configuration()?,
        }))
    }
}

/// Names of the sources of a run's sequences, by their index, as its `run.json` has them.
fn mixed(origin: &Value) -> Vec<String> {
    let sides = origin["mix"]["sources"].as_array().map_or(&[][..], Vec::as_slice);
    let names = sides.iter().filter_map(|side| side["name"].as_str()).map(str::to_owned);
    std::iter::once(FLOW.to_owned()).chain(names).collect()
}

fn digest(model: &Model) -> Value {
    json!(format!("{:032x}", model.tokenizer.digest()))
}

/// The epochs of all passes, numbered through.
fn passes(manifest: &Manifest, passes: u64) -> Vec<EpochRecord> {
    let shifted = |pass: u64| {
        manifest.epochs.iter().cloned().map(move |mut epoch| {
            epoch.first_sequence += pass * manifest.sequences();
            epoch
        })
    };
    (0..passes).flat_map(shifted).collect()
}

/// Writes `ledger.json` and says what came of it.
fn close(args: &Train, sequences: u64, trained: &Trained, spent: f64) -> Result<()> {
    let Trained { first, last, evaluations, ledger: also } = trained;
    let mut counts = Ledger::default();
    counts.add("train/given", sequences);
    counts.add("train/sequences", last.next_sequence);
    counts.add("train/tokens", last.tokens_total);
    counts.merge(also);
    let unknown = sequences.abs_diff(last.next_sequence);
    let ledger = json!({ "unknown": unknown, "counts": counts });
    durable::write(&args.out.join("ledger.json"), format!("{ledger:#}\n").as_bytes())?;
    let totals = Totals::of(&metrics::lines(&args.out)?).context("there was nothing to learn")?;
    let figures = [("given", format!("{sequences} sequences"))];
    report::write(&args.out, &figures)?;
    if args.machine.json {
        let summary = json!({
            "ledger": ledger,
            "seconds": spent,
            "first": first,
            "last": last,
            "held_out": evaluations,
            "totals": totals,
        });
        show!("{summary:#}")?;
        return Ok(());
    }
    show!(
        "trained on {} sequences, {} tokens, in {} steps and {}; loss {:.3} at the start, {:.3} at the end{}\n{}",
        last.next_sequence,
        count(last.tokens_total),
        last.step,
        seconds(spent),
        first.loss,
        last.loss,
        describe_skipped(last.skipped_total),
        totals.describe(),
    )?;
    if !evaluations.is_empty() {
        let rejected = held_out::describe_rejected(also);
        show!("held out: {}{rejected}", held_out::describe_evaluations(evaluations))?;
    }
    let out = args.out.display();
    show!(
        "the model is in {out}/checkpoints/step-{:08}/, the curves in {out}/report.html",
        last.step
    )?;
    Ok(())
}
