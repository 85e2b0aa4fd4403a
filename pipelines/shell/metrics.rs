//! What a step took, and what `metrics.jsonl` says of it.
//!
//! ```text
//! what the step did (the same in every run) ─┬─▶ a line ─┬─▶ metrics.jsonl
//! what it took here (Measured)              ─┘           └─▶ tensorboard/
//! ```

use super::summary::{device_memory, peak_memory};
use anyhow::{Context, Result};
use candle_core::{DType, Device};
use headwater::kernels::packed::WeightType;
use headwater::kernels::peak;
use headwater::model::config::ModelConfig;
use headwater::model::device::gpu_name;
use headwater::record::Sequence;
use headwater::train::{StepReport, Trainer, host_products};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The file in a run folder.
const NAME: &str = "metrics.jsonl";

/// How long a CPU is believed to do no more than it was measured to, before it is tried once again.
const BELIEVED: Duration = Duration::from_secs(60);

/// What a step took on this machine: the fields of a line that differ between equal runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Measured {
    /// When the step ended, in seconds since 1970.
    pub unix_time: f64,
    /// Milliseconds of the step, without those waited for its sequences.
    pub step_ms: f64,
    /// Tokens of the step by its time.
    pub tokens_per_s: f64,
    /// Model FLOPs utilisation: operations of the step by its time, as a share of the peak
    /// (Chowdhery et al., 2022, appendix B; [`ModelConfig::training_flops_per_token`] for each item). None where
    /// the peak is not known.
    pub mfu: Option<f64>,
    /// What the device does at best, in operations a second: measured in registers on a CPU, of the maker's
    /// data sheet for a GPU. None for a GPU that is not known.
    pub peak_operations_per_s: Option<f64>,
    /// The part of waiting for sequences in the time of waiting and the step.
    pub data_wait_share: f64,
    /// Milliseconds between the step before and waiting for the sequences of this one: losses of what is held out, the copy
    /// for a checkpoint, and waiting for the checkpoint before it.
    pub overhead_ms: f64,
    /// The most resident memory the process had so far.
    pub memory_bytes: u64,
    /// The most bytes that were in use on each of the GPUs that train at a time, added up; none on a CPU, and where a GPU does
    /// not count them.
    pub device_memory_bytes: Option<u64>,
}

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    /// What the step did.
    #[serde(flatten)]
    pub report: StepReport,
    /// The loss of each source, by name, where several are mixed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sources: BTreeMap<String, OfPart>,
    /// The loss of each round of synthesis, by its number, where tokens have one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rounds: BTreeMap<String, OfPart>,
    /// What that took.
    #[serde(flatten)]
    pub measured: Measured,
}

/// What a step did for a part of its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OfPart {
    /// Mean loss of its learned tokens, in nats; none if it is not finite.
    pub loss: Option<f64>,
    /// Its learned tokens.
    pub learned: u64,
}

/// Measures steps.
pub(super) struct Gauge {
    config: ModelConfig,
    devices: Vec<Device>,
    compute: DType,
    /// When the last step ended.
    ended: Instant,
    /// When the trainer last had nothing to do but wait for sequences.
    idle: Instant,
}

impl Gauge {
    /// For a trainer that waits for its first sequences.
    ///
    /// # Errors
    /// If the trainer cannot be looked at.
    pub(super) fn new(trainer: &Trainer) -> Result<Self> {
        let now = Instant::now();
        Ok(Gauge {
            config: trainer.config().clone(),
            devices: trainer.devices().to_vec(),
            compute: trainer.compute(),
            ended: now,
            idle: now,
        })
    }

    /// From now on, the trainer waits for sequences.
    pub(super) fn wait(&mut self) {
        self.idle = Instant::now();
    }

    /// What a step on `batch` took that began at `start` and has just ended.
    pub(super) fn measure(&mut self, batch: &[Sequence], start: Instant) -> Measured {
        let (spent, waited) = (start.elapsed(), start.duration_since(self.idle));
        let overhead = self.idle.duration_since(self.ended);
        self.ended = start + spent;
        let tokens: usize = batch.iter().map(|sequence| sequence.tokens.len()).sum();
        let rate = operations(&self.config, batch) / spent.as_secs_f64();
        let peak = peak(&self.devices[0], self.compute, &self.config)
            .map(|peak| peak * self.devices.len() as f64);
        Measured {
            unix_time: rounded(now(), 3),
            step_ms: rounded(1e3 * spent.as_secs_f64(), 1),
            tokens_per_s: rounded(tokens as f64 / spent.as_secs_f64(), 1),
            mfu: peak.map(|peak| rounded(rate / peak, 4)),
            peak_operations_per_s: peak.map(f64::round),
            data_wait_share: rounded(share(waited, spent), 4),
            overhead_ms: rounded(1e3 * overhead.as_secs_f64(), 1),
            memory_bytes: peak_memory(),
            device_memory_bytes: device_memory(&self.devices),
        }
    }
}

impl Measured {
    /// Adds its fields to the line of a step.
    ///
    /// # Panics
    /// If the line is no object.
    pub(super) fn add_to(&self, line: &mut Value) {
        let Value::Object(fields) = json!(self) else { unreachable!("it has fields") };
        line.as_object_mut().expect("a report has fields").extend(fields);
    }
}

/// The lines of a run, in order; none if it did not train.
///
/// # Errors
/// If the file cannot be read or a line is none.
pub fn lines(run: &Path) -> Result<Vec<Line>> {
    let path = run.join(NAME);
    let line = |value| serde_json::from_value(value).with_context(|| format!("in {path:?}"));
    values(&path)?.into_iter().map(line).collect()
}

/// The objects in a file of JSON Lines; none if there is no such file.
///
/// # Errors
/// If the file cannot be read or a line is no JSON.
pub(super) fn values(path: &Path) -> Result<Vec<Value>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("could not read {path:?}"))?;
    let value = |(number, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("line {} of {path:?}", number + 1))
    };
    text.lines().enumerate().map(value).collect()
}

/// What a device does at best with such a model in such a type, in operations a second. A CPU is measured when this is
/// first asked, which takes some tenths of a second; it should have nothing else to do meanwhile. It is tried again for some
/// hundredths of a second a minute later, and so on: on a machine that is shared the first time may be a bad moment.
pub fn peak(device: &Device, compute: DType, config: &ModelConfig) -> Option<f64> {
    static CPU: [Mutex<Option<Best>>; 3] = [const { Mutex::new(None) }; 3];
    if !device.is_cpu() {
        let name = gpu_name(device).filter(|_| compute == DType::BF16);
        return name.and_then(|name| peak::of_gpu(&name));
    }
    let kind = host_products(config, compute).ok()?;
    let place = match kind {
        WeightType::F32 => 0,
        WeightType::Bf16x3 => 1,
        WeightType::Bf16 | WeightType::BlockFloat | WeightType::Int8 => 2,
    };
    let mut best = CPU[place].lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    let known = Best::at(*best, now, |turns| peak::operations_per_second(kind, turns));
    *best = Some(known);
    Some(known.operations_per_s)
}

/// The best that a CPU has done so far.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Best {
    operations_per_s: f64,
    tried: Instant,
}

impl Best {
    /// What is known `now`: `before`, unless it is to be tried again. `measure` has so many turns.
    fn at(before: Option<Self>, now: Instant, measure: impl FnOnce(usize) -> f64) -> Self {
        let operations_per_s = match before {
            Some(before) if now.duration_since(before.tried) < BELIEVED => return before,
            Some(before) => before.operations_per_s.max(measure(1)),
            None => measure(peak::TURNS),
        };
        Best { operations_per_s, tried: now }
    }
}

/// Floating-point operations to train on some sequences: each item attends to itself only.
fn operations(config: &ModelConfig, batch: &[Sequence]) -> f64 {
    let lengths = batch.iter().flat_map(|sequence| &sequence.segments).map(|item| item.length);
    let item = |length: u32| f64::from(length) * config.training_flops_per_token(length as usize);
    lengths.map(item).sum()
}

fn share(waited: Duration, spent: Duration) -> f64 {
    waited.as_secs_f64() / (waited + spent).as_secs_f64().max(f64::MIN_POSITIVE)
}

fn rounded(number: f64, decimals: i32) -> f64 {
    let scale = 10f64.powi(decimals);
    (number * scale).round() / scale
}

/// Seconds since 1970.
pub(super) fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |passed| passed.as_secs_f64())
}

/// What the steps of a run took together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Totals {
    /// Tokens by the time of all steps.
    pub tokens_per_s: f64,
    /// The utilisation of each step, weighted by its time; none where it is not known of any.
    pub mfu: Option<f64>,
    /// The peak that the last step was measured against.
    pub peak_operations_per_s: Option<f64>,
    /// The part of waiting for sequences in the time of waiting and of steps.
    pub data_wait_share: f64,
    /// The part of evaluating and of checkpoints in all time up to the last step.
    pub overhead_share: f64,
    /// The most resident memory of a process that trained.
    pub memory_bytes: u64,
    /// The most that the GPUs had in use; none on a CPU.
    pub device_memory_bytes: Option<u64>,
}

impl Totals {
    /// Sums up the lines of a run; none if there are none.
    pub fn of(lines: &[Line]) -> Option<Self> {
        let last = lines.last()?;
        let sum = |of: &dyn Fn(&Line) -> f64| lines.iter().map(of).sum::<f64>();
        let ms = sum(&|line| line.measured.step_ms).max(f64::MIN_POSITIVE);
        let waited = sum(&|line| {
            let Measured { step_ms, data_wait_share: share, .. } = line.measured;
            step_ms * share / (1.0 - share).max(f64::MIN_POSITIVE)
        });
        let overhead = sum(&|line| line.measured.overhead_ms);
        let known: Vec<(f64, f64)> = lines
            .iter()
            .filter_map(|line| Some((line.measured.mfu?, line.measured.step_ms)))
            .collect();
        let weight: f64 = known.iter().map(|(_, ms)| ms).sum();
        let used: f64 = known.iter().map(|(mfu, ms)| mfu * ms).sum();
        Some(Totals {
            tokens_per_s: 1e3 * sum(&|line| line.report.tokens as f64) / ms,
            mfu: (weight > 0.0).then(|| used / weight),
            peak_operations_per_s: last.measured.peak_operations_per_s,
            data_wait_share: waited / (waited + ms),
            overhead_share: overhead / (overhead + waited + ms),
            memory_bytes: lines.iter().map(|line| line.measured.memory_bytes).max()?,
            device_memory_bytes: lines.iter().filter_map(|l| l.measured.device_memory_bytes).max(),
        })
    }

    /// The figures for people.
    pub fn describe(&self) -> String {
        let mfu = match (self.mfu, self.peak_operations_per_s) {
            (Some(mfu), Some(peak)) => {
                format!("MFU {:.1} % of {:.1} Gop/s", 100.0 * mfu, peak / 1e9)
            }
            _ => "MFU not known".into(),
        };
        format!(
            "{:.0} tokens/s, {mfu}, {:.1} % of the time waiting for sequences, {:.1} % beside steps for evaluation and \
             checkpoints",
            self.tokens_per_s,
            100.0 * self.data_wait_share,
            100.0 * self.overhead_share
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use headwater::model::shape::Shape;
    use headwater::record::Segment;

    fn line(step_ms: f64, mfu: Option<f64>, data_wait_share: f64) -> Line {
        let report = json!({
            "step": 1, "loss": 2.0, "grad_norm": 1.0, "lr": 0.1, "tokens": 100, "learned": 90,
            "tokens_total": 100, "next_sequence": 1, "skipped_total": 0,
        });
        let measured = Measured { step_ms, mfu, data_wait_share, ..Measured::default() };
        let report = serde_json::from_value(report).unwrap();
        Line { report, sources: BTreeMap::new(), rounds: BTreeMap::new(), measured }
    }

    #[test]
    fn totals_weigh_steps_by_their_time() {
        assert_eq!(Totals::of(&[]), None);
        let totals =
            Totals::of(&[line(300.0, Some(0.2), 0.0), line(100.0, Some(0.6), 0.8)]).unwrap();
        assert!((totals.mfu.unwrap() - 0.3).abs() < 1e-12);
        assert!((totals.data_wait_share - 0.5).abs() < 1e-12);
        assert!((totals.tokens_per_s - 500.0).abs() < 1e-9);
        let mut behind_a_checkpoint = line(300.0, None, 0.0);
        behind_a_checkpoint.measured.overhead_ms = 100.0;
        let totals = Totals::of(&[line(600.0, None, 0.0), behind_a_checkpoint]).unwrap();
        assert!((totals.overhead_share - 0.1).abs() < 1e-12);
        assert_eq!(Totals::of(&[line(1.0, None, 0.0)]).unwrap().mfu, None);
    }

    #[test]
    fn the_memory_of_gpus_is_the_most_that_a_step_says() {
        let on_gpu = |bytes| {
            let mut line = line(1.0, None, 0.0);
            line.measured.device_memory_bytes = bytes;
            line
        };
        let most = |lines: &[Line]| Totals::of(lines).unwrap().device_memory_bytes;
        assert_eq!(most(&[on_gpu(Some(7)), on_gpu(Some(9)), on_gpu(Some(8))]), Some(9));
        assert_eq!(most(&[on_gpu(None)]), None);
    }

    #[test]
    fn a_line_without_what_is_measured_can_be_read() {
        let mut value = json!(line(5.0, Some(0.5), 0.25));
        let again: Line = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(again.measured, line(5.0, Some(0.5), 0.25).measured);
        for name in ["mfu", "data_wait_share", "unix_time", "memory_bytes"] {
            value.as_object_mut().unwrap().remove(name);
        }
        let old: Line = serde_json::from_value(value).unwrap();
        assert_eq!((old.measured.step_ms, old.measured.mfu), (5.0, None));
    }

    #[test]
    fn short_items_take_fewer_operations_than_one_long_one() {
        let config = Shape::named("2m").unwrap().config();
        let sequence = |lengths: &[u32]| Sequence {
            segments: lengths
                .iter()
                .map(|&length| Segment { item: String::new(), source: 0, offset: 0, length })
                .collect(),
            ..Sequence::default()
        };
        let long = operations(&config, &[sequence(&[64])]);
        assert_eq!(long, 64.0 * config.training_flops_per_token(64));
        assert!(operations(&config, &[sequence(&[32, 32])]) < long);
    }

    #[test]
    fn the_peak_of_a_cpu_is_measured() {
        let config = Shape::named("2m").expect("a shape").config();
        let peak = peak(&Device::Cpu, DType::F32, &config);
        assert!(peak.is_some_and(|peak| peak > 0.0));
    }

    #[test]
    fn a_peak_of_a_bad_moment_rises_a_minute_later_and_none_falls() {
        let start = Instant::now();
        let first = Best::at(None, start, |turns| turns as f64);
        assert_eq!(first.operations_per_s, peak::TURNS as f64);
        let soon = start + BELIEVED / 2;
        assert_eq!(Best::at(Some(first), soon, |_| panic!("it is believed")), first);
        let later = start + BELIEVED;
        let at = |seen: f64| Best::at(Some(first), later, |turns| seen * turns as f64);
        assert_eq!(at(100.0), Best { operations_per_s: 100.0, tried: later });
        assert_eq!(at(1.0), Best { tried: later, ..first });
    }
}
