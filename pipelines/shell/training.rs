//! Drives a trainer: steps, measures, checkpoints, stops.

use super::metrics::{Measured, Metrics};
use super::stop;
use anyhow::{Context, Result};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use headwater::manifest::EpochRecord;
use headwater::record::Sequence;
use headwater::run::RunFolder;
use headwater::tokenizer::Tokenizer;
use headwater::train::{StepReport, Trainer, checkpoint};
use std::collections::VecDeque;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often an idle trainer looks whether it is to stop.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Checkpoints that are kept.
const CHECKPOINTS_KEPT: usize = 2;

/// Where a training run writes, and how often.
#[derive(Clone, Debug)]
pub struct TrainingFolder {
    /// `checkpoints/` and `metrics.jsonl` are in here.
    pub run: PathBuf,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
}

/// How a drive ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All sequences were learned.
    Done,
    /// The user asked to stop; a checkpoint was written.
    Stopped,
}

/// A trainer with its folder.
pub struct Drive<'a> {
    /// The model in training.
    pub trainer: Trainer,
    /// Written beside every checkpoint.
    pub tokenizer: &'a Tokenizer,
    /// Where to write.
    pub folder: TrainingFolder,
    metrics: Metrics,
    first: Option<StepReport>,
    last: Option<StepReport>,
}

impl TrainingFolder {
    /// The folder of all checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.run.join("checkpoints")
    }

    /// The latest checkpoint, if there is one.
    ///
    /// # Errors
    /// If the folder cannot be listed.
    pub fn latest(&self) -> Result<Option<PathBuf>> {
        Ok(checkpoint::list(&self.checkpoints())?.pop())
    }
}

impl<'a> Drive<'a> {
    /// Opens the folder for a trainer that is new or was resumed: metrics of steps that were lost in a
    /// crash are taken back.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn new(trainer: Trainer, tokenizer: &'a Tokenizer, folder: TrainingFolder) -> Result<Self> {
        let checkpoints = folder.checkpoints();
        std::fs::create_dir_all(&checkpoints).context("could not create the checkpoints folder")?;
        let path = folder.run.join("metrics.jsonl");
        let reports = keep_metrics(&path, trainer.progress().step)?;
        let metrics = Metrics::open(&folder.run, &trainer)?;
        let (first, last) = (reports.first().copied(), reports.last().copied());
        Ok(Drive { trainer, tokenizer, folder, metrics, first, last })
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
        let start = Instant::now();
        let report = self.trainer.step(batch)?;
        let measured = self.metrics.measure(batch, start);
        self.metrics.note(serde_json::to_value(report)?, &measured)?;
        self.first.get_or_insert(report);
        self.last = Some(report);
        watch(&report, &measured);
        let stop = stop::asked();
        if stop || report.step.is_multiple_of(self.folder.checkpoint_every) {
            self.checkpoint()?;
        }
        self.metrics.wait();
        Ok(if stop { Ended::Stopped } else { Ended::Done })
    }

    /// Writes a checkpoint of the current step.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn checkpoint(&mut self) -> Result<PathBuf> {
        self.metrics.sync()?;
        let folder = self.folder.checkpoints();
        let path = self.trainer.save(&folder, self.tokenizer)?;
        checkpoint::prune(&folder, CHECKPOINTS_KEPT)?;
        Ok(path)
    }

    /// Reports of the first and the last step, those before a resume included.
    pub fn span(&self) -> Option<(StepReport, StepReport)> {
        self.first.zip(self.last)
    }
}

/// Trains on the sequences of a run: those of `epochs` that are on disk already, then those that come
/// through `feed`, until it ends. The last step takes what is left.
///
/// # Errors
/// If training diverges or the disk refuses.
pub fn train_on(
    drive: &mut Drive<'_>,
    folder: &RunFolder,
    epochs: &[EpochRecord],
    feed: &Receiver<Vec<Sequence>>,
    mut watch: impl FnMut(&StepReport, &Measured),
) -> Result<Ended> {
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
        match feed.recv_timeout(LOOK_EVERY) {
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
    drive.checkpoint()?;
    Ok(Ended::Done)
}

/// Learns from whole batches while there are any.
fn learn(
    drive: &mut Drive<'_>,
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

/// Keeps the lines of steps up to `step`, and returns them.
fn keep_metrics(path: &Path, step: u64) -> Result<Vec<StepReport>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let file = std::io::BufReader::new(std::fs::File::open(path)?);
    let (mut kept, mut reports) = (String::new(), Vec::new());
    for line in file.lines() {
        let line = line?;
        let Ok(report) = serde_json::from_str::<StepReport>(&line) else {
            break;
        };
        if report.step > step {
            break;
        }
        reports.push(report);
        kept += &line;
        kept.push('\n');
    }
    headwater::format::durable::write(path, kept.as_bytes())?;
    Ok(reports)
}
