//! Runs a dataflow with its trainer beside it, from the plan to the summary.

use super::metrics;
use super::parts::{Parts, fail};
use super::plan::{Plan, seconds};
use super::progress::{Expected, Progress, TrainMeter};
use super::report;
use super::settings::Settings;
use super::split;
use super::stop;
use super::summary::Summary;
use super::terminal::tell;
use super::training::{Drive, Ended, Told, Trained, latest, train_on};
use anyhow::{Context, Result, anyhow};
use crossbeam_channel::Receiver;
use headwater::block::Converted;
use headwater::record::Sequence;
use headwater::threads::Share;
use headwater::train::feed::Feed;
use headwater::train::{StepReport, TrainSettings, Trainer};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use timely::worker::Worker;

/// How often workers look whether they are to stop.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How a run ended.
pub enum Outcome {
    /// It was only planned.
    Planned,
    /// It went through.
    Done(Box<Summary>),
}

/// Plans, runs and sums up. `dataflow` wires the parts on each worker.
///
/// # Errors
/// If the run cannot start; later failures end the process, with everything committed safe.
pub fn run(
    settings: &Settings,
    dataflow: impl Fn(&mut Worker, &Parts) + Send + Sync + 'static,
) -> Result<Outcome> {
    let plan = Plan::new(settings)?;
    tell!("{}", plan.describe(settings).trim_end());
    if settings.machine.dry_run {
        let products = seconds(plan.seconds_of_products(settings)?);
        tell!("  time          about {products} in matrix products alone, at this machine's rate");
        return Ok(Outcome::Planned);
    }
    let start = Instant::now();
    begin()?;
    let (feed, sequences) = Feed::new();
    let feed = plan.training.is_some().then_some(feed);
    let [synthesis, training] = split::shares(settings.engine.train_threads)?;
    if let Some(share) = synthesis {
        share.enter(); // and with this thread the engines that it starts
    }
    let parts = Arc::new(Parts::open(settings, &plan, feed)?);
    if parts.manifest.next_epoch() > 0 {
        let epochs = parts.manifest.next_epoch();
        tell!("going on in {} behind {epochs} epochs", settings.out.display());
    }
    let train_meter = Arc::new(TrainMeter::default());
    let progress = Progress::start(
        &settings.machine.progress,
        parts.meters.clone(),
        train_meter.clone(),
        expected(settings, &plan, &parts),
    );
    let trainer = match plan.training {
        Some(how) => {
            let told = (sequences, train_meter);
            Some(spawn_trainer(settings, how, &parts, told, training)?)
        }
        None => {
            stop_without_trainer();
            None
        }
    };
    execute(settings.engine.workers, parts.clone(), dataflow)?;
    let trained = match trainer {
        Some(trainer) => trainer.join().map_err(|_| anyhow!("the trainer's thread failed"))?,
        None => None,
    };
    drop(progress);
    let manifest = parts.folder.manifest()?;
    parts.engine.rest()?;
    let summary = Summary::new(settings, &parts, manifest, trained, start.elapsed().as_secs_f64())?;
    summary.write_ledger(&parts.folder)?;
    report::write(&settings.out, &summary.figures())?;
    Ok(Outcome::Done(Box::new(summary)))
}

/// What progress is measured against: what is expected, less what was done before.
fn expected(settings: &Settings, plan: &Plan, parts: &Parts) -> Expected {
    let before = parts.manifest.ledger();
    let texts = plan.census.documents.saturating_sub(before.get("admit/texts")).max(1);
    let Converted { part, of } = settings.preset.converted;
    Expected {
        texts,
        sequences: plan.sequences.saturating_sub(parts.manifest.sequences()).max(1),
        synthesized: Some((texts * part / of).max(1)),
        trained: settings.train.is_some(),
    }
}

/// From now on there is something to keep: the run stops where it is safe.
///
/// # Errors
/// If the system does not let it listen for signals.
pub fn begin() -> Result<()> {
    abort_on_panic();
    stop::listen()
}

/// A panic in one worker would leave the others waiting for ever: it ends the process instead.
fn abort_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        tell!("what is committed is safe; run the same command again to go on");
        std::process::abort();
    }));
}

/// Runs a dataflow on its workers until it is through.
///
/// # Errors
/// If a worker cannot be started or fails.
pub fn execute(
    workers: usize,
    parts: Arc<Parts>,
    dataflow: impl Fn(&mut Worker, &Parts) + Send + Sync + 'static,
) -> Result<()> {
    let config = match workers {
        1 => timely::Config::thread(),
        workers => timely::Config::process(workers),
    };
    let guards = timely::execute(config, move |worker| {
        dataflow(worker, &parts);
        while worker.has_dataflows() {
            if stop::asked() {
                loop {
                    std::thread::park(); // whoever watches for the stop ends the process
                }
            }
            worker.step_or_park(Some(LOOK_EVERY));
        }
    });
    for worker in guards.map_err(|error| anyhow!(error))?.join() {
        worker.map_err(|error| anyhow!(error))?;
    }
    Ok(())
}

fn spawn_trainer(
    settings: &Settings,
    training: TrainSettings,
    parts: &Arc<Parts>,
    (sequences, meter): (Receiver<Vec<Sequence>>, Arc<TrainMeter>),
    share: Option<Share>,
) -> Result<JoinHandle<Option<Trained>>> {
    let args = settings.train.as_ref().context("planned with training")?;
    let folder = args.folder(&settings.out);
    let told = Told {
        sources: settings.sources.rules.names.clone(),
        held_out: settings.held_out.clone(),
        eval_every: args.eval_every,
    };
    let devices = &settings.devices;
    let compute = args.train_dtype.dtype(&devices[0]);
    let trainer = match latest(&settings.out)? {
        Some(checkpoint) => Trainer::resume(&checkpoint, training, compute, devices)?,
        None => {
            let values = settings.model.parameters(settings.machine.seed, &devices[0])?;
            Trainer::new(&settings.model.config, values, training, compute, devices)?
        }
    };
    metrics::peak(&devices[0], compute, trainer.config()); // while the machine has nothing else to do
    let trainer = trainer.with_guards(args.guards());
    let (parts, tokenizer) = (parts.clone(), settings.model.tokenizer.clone());
    let train = move || -> Result<(Ended, Option<Trained>)> {
        if let Some(share) = share {
            share.enter();
        }
        let mut drive = Drive::new(trainer, &tokenizer, folder, told)?;
        let epochs = parts.manifest.epochs.clone();
        let ended =
            train_on(&mut drive, &parts.folder, &epochs, &sequences, |report, measured| {
                meter.note(report, measured);
                parts.meters.learned.add(drive_sequences(report, &training));
            })?;
        if ended == Ended::Stopped {
            std::mem::forget(sequences); // nobody is to mistake the stop for a failure
        }
        Ok((ended, drive.trained()))
    };
    let thread =
        std::thread::Builder::new().name("trainer".into()).spawn(move || match train() {
            Ok((Ended::Done, trained)) => trained,
            Ok((Ended::Stopped, _)) => stopped(),
            Err(error) => fail(&format!("training failed: {error:#}")),
        })?;
    Ok(thread)
}

/// Sequences of a step: a whole batch, but for the last one.
fn drive_sequences(report: &StepReport, training: &TrainSettings) -> u64 {
    let batch = training.batch_sequences as u64;
    report.next_sequence - (report.step - 1) * batch
}

/// Without a trainer nothing needs to be brought to an end: a stop is one at once.
fn stop_without_trainer() {
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(LOOK_EVERY);
            if stop::asked() {
                stopped();
            }
        }
    });
}

fn stopped() -> ! {
    tell!("stopped; run the same command again to go on");
    std::process::exit(stop::STOPPED.into())
}
