//! Training: from packed sequences to a checkpoint that Hugging Face transformers loads.
//!
//! ```text
//! sequences ─▶ micro-batches ─▶ loss, gradients (summed) ─▶ guards ─▶ clip ─▶ AdamW ─▶ next step
//! ```
//!
//! A step's result depends on its sequences and the state before it, not on how they are cut into
//! micro-batches and dealt out to devices beyond the rounding of one sum, nor on threads.

mod buckets;
pub mod checkpoint;
pub mod feed;
pub mod guard;
pub mod held_out;
mod learner;
pub mod optimizer;
mod replicas;
mod report;
pub mod schedule;
#[cfg(test)]
mod tests;
pub mod tuning;
pub mod writer;

pub use learner::{gradients, host_products, step_bytes};
pub use replicas::{check_dealing, micro_batch_count};
pub use report::{RoundLoss, SourceLoss, StepReport};

use crate::error::{Error, Result};
use crate::kernels::cross_entropy::Objective;
use crate::kernels::dropout::Dropout;
use crate::model::backward::{Batch, Keep, Learning};
use crate::model::config::ModelConfig;
use crate::model::weights::Weights;
use crate::record::Sequence;
use crate::seed;
use candle_core::{DType, Device, Tensor};
use guard::{Fault, Guards, OnFault, Recent};
use optimizer::AdamW;
use rayon::prelude::*;
use replicas::{Group, Replicas};
use report::Suspect;
use schedule::Schedule;
use serde::{Deserialize, Serialize};

/// Deviation of initial weights (Radford et al., 2019, as in `initializer_range` of the family).
const INITIAL_DEVIATION: f64 = 0.02;

/// Segments that the error of a stopped step names.
const SUSPECTS_MAX: usize = 8;

/// How to train.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainSettings {
    /// Sequences of one step.
    pub batch_sequences: usize,
    /// Tokens whose activations are held at a time.
    pub micro_batch_tokens: usize,
    /// The learning rate of each step.
    pub schedule: Schedule,
    /// The optimizer.
    pub optimizer: AdamW,
    /// Whether blocks are run again in the backward pass, to save memory.
    pub recompute: bool,
    /// The weight of the z-loss, 0 for none ([`Objective::z_loss`]).
    #[serde(default)]
    pub z_loss: f64,
    /// What is dropped while learning, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropout: Option<HiddenDropout>,
}

/// Dropout on the embedding, and on what attention and feed-forward parts add to the stream.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HiddenDropout {
    /// The probability that an element is dropped, above 0 and below 1.
    pub probability: f64,
    /// The seed of the run.
    pub seed: u64,
}

impl HiddenDropout {
    /// None where nothing is dropped.
    pub fn of(probability: f64, seed: u64) -> Option<Self> {
        (probability > 0.0).then_some(HiddenDropout { probability, seed })
    }
}

/// A model in training.
#[derive(Debug)]
pub struct Trainer {
    config: ModelConfig,
    compute: DType,
    replicas: Replicas,
    settings: TrainSettings,
    guards: Guards,
    progress: Progress,
    recent: Recent,
}

/// How far a training run has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// The next sequence to learn from.
    pub next_sequence: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Steps whose update was skipped.
    pub skipped: u64,
}

impl Trainer {
    /// Starts from given parameters, on one device, or on several GPUs that share the micro-batches of each step.
    ///
    /// # Errors
    /// If `values` lacks a parameter of `config`, or a device fails.
    pub fn new(
        config: &ModelConfig,
        values: Vec<(String, Tensor)>,
        settings: TrainSettings,
        compute: DType,
        devices: &[Device],
    ) -> Result<Self> {
        Self::of(config, values, settings, compute, Group::new(devices)?)
    }

    fn of(
        config: &ModelConfig,
        values: Vec<(String, Tensor)>,
        settings: TrainSettings,
        compute: DType,
        group: Group,
    ) -> Result<Self> {
        Ok(Trainer {
            config: config.clone(),
            compute,
            replicas: Replicas::new(config, values, compute, group)?,
            settings,
            guards: Guards::USUAL,
            progress: Progress::default(),
            recent: Recent::default(),
        })
    }

    /// Has steps looked at in other ways than the usual ones.
    #[must_use]
    pub fn with_guards(self, guards: Guards) -> Self {
        Trainer { guards, ..self }
    }

    /// How far training has come.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Where it trains.
    pub fn devices(&self) -> &[Device] {
        self.replicas.devices()
    }

    /// The shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What the model is computed in; parameters and moments are in f32 always.
    pub fn compute(&self) -> DType {
        self.compute
    }

    /// How to train.
    pub fn settings(&self) -> &TrainSettings {
        &self.settings
    }

    /// Learns from the sequences of one step, or skips its update as the guards say: then neither parameters
    /// nor moments change, and the moments do not count it as an update.
    ///
    /// # Errors
    /// If a guard stops the run: the error names the step and the sequences, and everything is as it was
    /// before.
    pub fn step(&mut self, sequences: &[Sequence]) -> Result<StepReport> {
        let targets: usize = sequences.iter().flat_map(report::learned).map(|(_, n)| n).sum();
        let tokens: usize = sequences.iter().map(|sequence| sequence.tokens.len()).sum();
        let keep = if self.settings.recompute { Keep::Inputs } else { Keep::Everything };
        let scale = 1.0 / targets.max(1) as f64;
        let objective = Objective { scale, z_loss: self.settings.z_loss };
        let batches = micro_batches(sequences, self.settings.micro_batch_tokens);
        let dropout = self.settings.dropout.map(|HiddenDropout { probability, seed }| {
            Dropout::new(probability, seed, self.progress.step + 1)
        });
        let learning = Learning { objective, keep, dropout };
        let losses = self.replicas.learn(&batches, learning)?;
        let total = losses.iter().fold(0.0, |total, losses| total + losses.iter().sum::<f64>());
        let loss = total / targets.max(1) as f64;
        let grad_norm = if loss.is_finite() { self.replicas.norm()? } else { f64::NAN };
        let losses = losses.concat();
        let skipped = self.skipped([loss, grad_norm], sequences, &losses)?;
        let rate = self.settings.schedule.rate(self.progress.step + 1);
        if skipped.is_none() {
            self.update(grad_norm, rate)?;
        }
        self.recent.note(loss, grad_norm, skipped.is_some());
        self.progress.step += 1;
        self.progress.skipped += u64::from(skipped.is_some());
        self.progress.next_sequence += sequences.len() as u64;
        self.progress.tokens += tokens as u64;
        Ok(StepReport {
            step: self.progress.step,
            loss,
            grad_norm,
            lr: rate,
            tokens: tokens as u64,
            learned: targets as u64,
            tokens_total: self.progress.tokens,
            next_sequence: self.progress.next_sequence,
            skipped,
            skipped_total: self.progress.skipped,
            sources: report::by_source(sequences, &losses),
            rounds: report::by_round(sequences, &losses),
        })
    }

    /// Why the step is to be skipped, if it is.
    fn skipped(
        &self,
        [loss, grad_norm]: [f64; 2],
        sequences: &[Sequence],
        losses: &[f64],
    ) -> Result<Option<Fault>> {
        let Some(fault) = self.recent.fault(loss, grad_norm) else { return Ok(None) };
        match self.guards.against(fault) {
            None => Ok(None),
            Some(OnFault::Skip) if self.recent.may_skip() => Ok(Some(fault)),
            Some(how) => {
                let what = format!("loss {loss}, gradient norm {grad_norm}");
                Err(self.bad_step(fault, how, &what, (sequences, losses)))
            }
        }
    }

    /// Moves the parameters, and what is computed with.
    fn update(&mut self, grad_norm: f64, rate: f64) -> Result<()> {
        let updates = self.progress.step - self.progress.skipped + 1;
        self.replicas.update(grad_norm, &self.settings.optimizer, rate, updates)
    }

    /// Mean loss of the learned tokens of `sequences`, without learning from them.
    ///
    /// # Errors
    /// If the device fails.
    pub fn evaluate(&mut self, sequences: &[Sequence]) -> Result<f64> {
        let loss = self.evaluate_while(sequences, &|| true)?;
        Ok(loss.expect("nothing stops it"))
    }

    /// The same; none if `goes_on`, which is asked between micro-batches, says no.
    ///
    /// # Errors
    /// If the device fails.
    pub fn evaluate_while(
        &mut self,
        sequences: &[Sequence],
        goes_on: &dyn Fn() -> bool,
    ) -> Result<Option<f64>> {
        let batches = micro_batches(sequences, self.settings.micro_batch_tokens);
        let (mut total, mut count) = (0.0, 0);
        for batches in batches.chunks(self.devices().len()) {
            if !goes_on() {
                return Ok(None);
            }
            for losses in self.replicas.losses(batches)? {
                total += losses.iter().sum::<f64>();
                count += losses.len();
            }
        }
        Ok(Some(total / count.max(1) as f64))
    }

    fn bad_step(
        &self,
        fault: Fault,
        how: OnFault,
        measured: &str,
        (sequences, losses): (&[Sequence], &[f64]),
    ) -> Error {
        let first = self.progress.next_sequence;
        let (what, flag) = match fault {
            Fault::Nonfinite => ("diverged".to_owned(), "--on-nonfinite"),
            Fault::Spike => (format!("had a spike ({})", self.recent), "--on-spike"),
        };
        let why = match how {
            OnFault::Stop => format!("{flag} skip goes on without such steps"),
            OnFault::Skip => {
                format!("{} steps before it were skipped", guard::SKIPPED_IN_A_ROW_MAX)
            }
        };
        let name = |Suspect { sequence, item, loss }: Suspect<'_>| {
            format!("sequence {}, item {item}, loss {loss}", first + sequence as u64)
        };
        let suspects = report::suspects(sequences, losses, SUSPECTS_MAX);
        let suspects: Vec<String> = suspects.into_iter().map(name).collect();
        Error::Stopped(format!(
            "training {what} at step {}: {measured}; {why}; of sequences {first} to {} the worst: {}",
            self.progress.step + 1,
            first + sequences.len() as u64 - 1,
            suspects.join("; "),
        ))
    }
}

/// The rows of some sequences, without their padding.
pub fn batch<'a>(sequences: impl IntoIterator<Item = &'a Sequence>) -> Batch {
    let mut batch = Batch::default();
    for sequence in sequences {
        let mut start = 0;
        batch.positions.extend(sequence.positions());
        for segment in &sequence.segments {
            let (row, count) = (batch.ids.len(), segment.length as usize);
            let tokens = &sequence.tokens[start..start + count];
            for (i, &token) in tokens.iter().enumerate().skip(1) {
                if sequence.learned[start + i] {
                    batch.rows.push((row + i - 1) as u32);
                    batch.targets.push(token);
                }
            }
            batch.ids.extend_from_slice(tokens);
            batch.spans.push(row..row + count);
            start += count;
        }
    }
    batch
}

/// Runs of sequences of about `tokens_max` tokens, each with one at least.
fn micro_batches(sequences: &[Sequence], tokens_max: usize) -> Vec<Batch> {
    let (mut batches, mut start, mut tokens) = (Vec::new(), 0, 0);
    for (index, sequence) in sequences.iter().enumerate() {
        if tokens > 0 && tokens + sequence.tokens.len() > tokens_max {
            batches.push(batch(&sequences[start..index]));
            (start, tokens) = (index, 0);
        }
        tokens += sequence.tokens.len();
    }
    if start < sequences.len() {
        batches.push(batch(&sequences[start..]));
    }
    let mut rows = 0;
    for batch in &mut batches {
        batch.first_row = rows;
        rows += batch.ids.len() as u64;
    }
    batches
}

/// The parameters of a checkpoint, in f32.
///
/// # Errors
/// If one is missing, has another shape or is not finite, or there is one that the model does not have.
pub fn loaded(
    config: &ModelConfig,
    weights: &Weights,
    device: &Device,
) -> Result<Vec<(String, Tensor)>> {
    weights.check_all_used(config)?;
    let load = |(name, shape): (String, Vec<usize>)| {
        let value = weights.finite(&name, &shape, device)?;
        Ok((name, value))
    };
    config.parameters().into_iter().map(load).collect()
}

/// Random parameters: normal with deviation 0.02, the projections back into the stream scaled down by the
/// root of their number (Radford et al., 2019), normalisations one.
///
/// # Errors
/// If the device fails.
pub fn initial(config: &ModelConfig, run: u64, device: &Device) -> Result<Vec<(String, Tensor)>> {
    const CHUNK: usize = 1 << 16;
    let into_stream = 1.0 / (2.0 * config.num_hidden_layers as f64).sqrt();
    let value = |(name, shape): (String, Vec<usize>)| {
        if shape.len() == 1 {
            return Ok((name, Tensor::ones(shape, DType::F32, device)?));
        }
        let back = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
        let deviation = INITIAL_DEVIATION * if back { into_stream } else { 1.0 };
        let mut values = vec![0.0f32; shape.iter().product()];
        values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
            let mut stream = seed::stream(run, &name, &format!("initial value {chunk}"));
            values.fill_with(|| (deviation * stream.normal()) as f32);
        });
        Ok((name, Tensor::from_vec(values, shape, device)?))
    };
    config.parameters().into_iter().map(value).collect()
}
