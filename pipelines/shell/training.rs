//! Drives a trainer: steps, measures, evaluates, checkpoints, stops.

use super::logs::{Evaluations, Metrics};
use super::metrics::{Gauge, Measured, now};
use super::stop;
use super::tensorboard::Board;
use anyhow::{Context, Result};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use headwater::format::{compressed, durable};
use headwater::ledger::Ledger;
use headwater::manifest::EpochRecord;
use headwater::record::Sequence;
use headwater::run::RunFolder;
use headwater::threads;
use headwater::tokenizer::Tokenizer;
use headwater::train::checkpoint::{Retention, list};
use headwater::train::held_out::{Evaluation, HeldOut};
use headwater::train::writer::{Target, Writer};
use headwater::train::{RoundLoss, SourceLoss, StepReport, Trainer};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often an idle trainer looks whether it is to stop.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Where a training run writes, and how often.
#[derive(Clone, Debug)]
pub struct TrainingFolder {
    /// `checkpoints/`, `metrics.jsonl` and `eval.jsonl` are in here.
    pub run: PathBuf,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Which of them stay.
    pub retention: Retention,
}

/// What is told of a training run, beside its steps.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Names of the sources of its sequences, by their index.
    pub sources: Vec<String>,
    /// What the loss is measured on.
    pub held_out: HeldOut,
    /// Steps between measuring it.
    pub eval_every: u64,
}

/// What a training run came to.
#[derive(Clone, Debug)]
pub struct Trained {
    /// The first step.
    pub first: StepReport,
    /// The last one.
    pub last: StepReport,
    /// The last loss of each held-out source.
    pub evaluations: Vec<Evaluation>,
    /// Updates skipped, and what was read to be held out.
    pub ledger: Ledger,
}

/// How a drive ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All sequences were learned.
    Done,
    /// The user asked to stop; a checkpoint was written.
    Stopped,
}

/// The checkpoints of a run folder.
fn checkpoints(run: &Path) -> PathBuf {
    run.join("checkpoints")
}

/// The latest checkpoint in a run folder, if there is one.
///
/// # Errors
/// If the folder cannot be listed.
pub fn latest(run: &Path) -> Result<Option<PathBuf>> {
    Ok(list(&checkpoints(run))?.pop())
}

/// A trainer with its folder.
pub struct Drive {
    /// The model in training.
    pub trainer: Trainer,
    folder: TrainingFolder,
    told: Told,
    writer: Writer,
    metrics: Metrics,
    evaluations: Evaluations,
    gauge: Gauge,
    board: Board,
    span: Option<(StepReport, StepReport)>,
}

impl Drive {
    /// Opens the folder for a trainer that is new or was resumed: lines of steps that were lost in a crash
    /// are taken back.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn new(
        trainer: Trainer,
        tokenizer: &Tokenizer,
        folder: TrainingFolder,
        told: Told,
    ) -> Result<Self> {
        let step = trainer.progress().step;
        let (metrics, span) = Metrics::open(&folder.run, step)?;
        let evaluations = Evaluations::open(&folder.run, step, told.held_out.sources())?;
        let mut logs = vec![metrics.path().to_owned()];
        if !told.held_out.is_empty() {
            logs.push(evaluations.path().to_owned());
        }
        let writer = Writer::new(Target {
            folder: checkpoints(&folder.run),
            tokenizer: tokenizer.clone(),
            retention: folder.retention,
            logs,
        })?;
        write_rejected(&folder.run, &told.held_out)?;
        let (gauge, board) = (Gauge::new(&trainer)?, Board::open(&folder.run, now())?);
        Ok(Drive { trainer, folder, told, writer, metrics, evaluations, gauge, board, span })
    }

    /// Measures a run that has not begun; from now on, the trainer waits for sequences.
    ///
    /// # Errors
    /// If the device fails or the disk refuses.
    pub fn begin(&mut self) -> Result<Ended> {
        // Of a step that a run goes on behind, what is held out was measured, unless the run was stopped meanwhile.
        let ended = match self.is_to_be_evaluated() {
            true => self.evaluate()?,
            false => Ended::Done,
        };
        self.gauge.wait();
        Ok(ended)
    }

    /// Whether what is held out is to be measured behind the steps so far, if these are not all.
    fn is_to_be_evaluated(&self) -> bool {
        self.trainer.progress().step.is_multiple_of(self.told.eval_every.max(1))
    }

    /// Learns from one batch; `watch` sees the report and what the step took.
    ///
    /// # Errors
    /// If training diverges or the disk refuses.
    pub fn step(
        &mut self,
        batch: &[Sequence],
        watch: &mut impl FnMut(&StepReport, &Measured),
    ) -> Result<Ended> {
        self.writer.check()?;
        let start = Instant::now();
        let report = self.trainer.step(batch)?;
        let measured = self.gauge.measure(batch, start);
        let mut line = serde_json::to_value(&report)?;
        if let Some(sources) = self.by_source(&report.sources) {
            line["sources"] = sources;
        }
        if !report.rounds.is_empty() {
            line["rounds"] = report.rounds.iter().map(of_round).collect();
        }
        measured.add_to(&mut line);
        self.metrics.write(&line)?;
        self.board.step(&line)?;
        watch(&report, &measured);
        let step = report.step;
        let first = self.span.take().map_or_else(|| report.clone(), |(first, _)| first);
        self.span = Some((first, report));
        if self.is_to_be_evaluated() {
            self.evaluate()?; // a stop is seen below
        }
        let stop = stop::asked();
        if stop || step.is_multiple_of(self.folder.checkpoint_every) {
            self.writer.write(&self.trainer)?;
        }
        if stop {
            self.writer.wait()?;
        }
        self.gauge.wait();
        Ok(if stop { Ended::Stopped } else { Ended::Done })
    }

    /// Writes a checkpoint of the current step, and waits until it is there for good.
    ///
    /// # Errors
    /// If the device fails or the disk refuses.
    pub fn checkpoint(&mut self) -> Result<()> {
        self.writer.write(&self.trainer)?;
        Ok(self.writer.wait()?)
    }

    /// Measures the last step, if that was not done, and writes the last checkpoint.
    ///
    /// # Errors
    /// If the device fails or the disk refuses.
    pub fn finish(&mut self) -> Result<Ended> {
        let ended = self.evaluate()?;
        self.checkpoint()?;
        Ok(ended)
    }

    /// What it came to, steps before a resume included; nothing if there was nothing to learn.
    pub fn trained(&self) -> Option<Trained> {
        let (first, last) = self.span.clone()?;
        let mut ledger = self.told.held_out.ledger();
        ledger.add("train/skipped_updates", last.skipped_total);
        Some(Trained { first, last, evaluations: self.evaluations.last().to_vec(), ledger })
    }

    /// The loss of each held-out source at this step, unless it is known. A stop leaves it for the next time.
    fn evaluate(&mut self) -> Result<Ended> {
        let step = self.trainer.progress().step;
        let is_known = self.evaluations.last().first().is_some_and(|known| known.step == step);
        if self.told.held_out.is_empty() || is_known {
            return Ok(Ended::Done);
        }
        let goes_on = || !stop::asked();
        let Some(losses) = self.trainer.evaluate_held_out(&self.told.held_out, &goes_on)? else {
            return Ok(Ended::Stopped);
        };
        self.evaluations.write(losses)?;
        self.board.evaluations(now(), self.evaluations.last())?;
        Ok(Ended::Done)
    }

    /// Losses by the names of their sources, where there are several.
    fn by_source(&self, losses: &[SourceLoss]) -> Option<Value> {
        let names = &self.told.sources;
        let named = |loss: &SourceLoss| {
            let name = names.get(loss.source as usize).cloned();
            let value = json!({ "loss": loss.loss, "learned": loss.learned });
            (name.unwrap_or_else(|| loss.source.to_string()), value)
        };
        (names.len() > 1).then(|| losses.iter().map(named).collect())
    }
}

/// The loss of a round, by its number.
fn of_round(one: &RoundLoss) -> (String, Value) {
    (one.round.to_string(), json!({ "loss": one.loss, "learned": one.learned }))
}

/// Records that were to be held out and cannot be used.
fn write_rejected(run: &Path, held_out: &HeldOut) -> Result<()> {
    if held_out.rejected().is_empty() {
        return Ok(());
    }
    let folder = run.join("rejected");
    std::fs::create_dir_all(&folder).with_context(|| format!("could not create {folder:?}"))?;
    let bytes = compressed::write(held_out.rejected());
    Ok(durable::write(&folder.join("held_out.jsonl.zst"), &bytes)?)
}

/// Trains on the sequences of a run: those of `epochs` that are on disk already, then those that come
/// through `feed`, until it ends. The last step takes what is left.
///
/// # Errors
/// If training diverges or the disk refuses.
pub fn train_on(
    drive: &mut Drive,
    folder: &RunFolder,
    epochs: &[EpochRecord],
    feed: &Receiver<Vec<Sequence>>,
    mut watch: impl FnMut(&StepReport, &Measured),
) -> Result<Ended> {
    threads::set_at_work(true);
    if drive.begin()? == Ended::Stopped {
        return Ok(Ended::Stopped);
    }
    let mut waiting: VecDeque<Sequence> = VecDeque::new();
    let behind = drive.trainer.progress().next_sequence;
    for epoch in epochs.iter().filter(|epoch| epoch.first_sequence + epoch.sequences > behind) {
        let skip = behind.saturating_sub(epoch.first_sequence) as usize;
        waiting.extend(folder.sequences(epoch)?.into_iter().skip(skip));
        if learn(drive, &mut waiting, &mut watch)? == Ended::Stopped {
            return Ok(Ended::Stopped);
        }
    }
    loop {
        threads::set_at_work(false);
        let received = feed.recv_timeout(LOOK_EVERY);
        threads::set_at_work(true);
        match received {
            Ok(sequences) => waiting.extend(sequences),
            Err(RecvTimeoutError::Timeout) if !stop::asked() => continue,
            Err(RecvTimeoutError::Timeout) => {
                drive.checkpoint()?;
                return Ok(Ended::Stopped);
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if learn(drive, &mut waiting, &mut watch)? == Ended::Stopped {
            return Ok(Ended::Stopped);
        }
    }
    if !waiting.is_empty() && drive.step(waiting.make_contiguous(), &mut watch)? == Ended::Stopped {
        return Ok(Ended::Stopped);
    }
    drive.finish()
}

/// Learns from whole batches while there are any.
fn learn(
    drive: &mut Drive,
    waiting: &mut VecDeque<Sequence>,
    watch: &mut impl FnMut(&StepReport, &Measured),
) -> Result<Ended> {
    let size = drive.trainer.settings().batch_sequences;
    while waiting.len() >= size {
        let batch: Vec<Sequence> = waiting.drain(..size).collect();
        if drive.step(&batch, watch)? == Ended::Stopped {
            return Ok(Ended::Stopped);
        }
    }
    Ok(Ended::Done)
}
