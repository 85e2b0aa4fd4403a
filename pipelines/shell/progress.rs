//! How a run shows that it is alive: bars on a terminal, lines elsewhere.

use super::metrics::Measured;
use super::plan::{bytes, count, seconds};
use super::terminal::tell;
use headwater::meter::Meters;
use headwater::train::StepReport;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Seconds between lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What the trainer says of itself.
#[derive(Debug, Default)]
pub struct TrainMeter {
    said: Mutex<String>,
}

impl TrainMeter {
    /// Notes a step and what it took.
    pub fn note(&self, report: &StepReport, measured: &Measured) {
        let mfu = measured.mfu.map_or(String::new(), |mfu| format!(", MFU {:.1} %", 100.0 * mfu));
        *self.said.lock().expect("nobody panics with it") = format!(
            "step {}, loss {:.3}, {:.0} tokens/s{mfu}, {:.0} % waiting, {}",
            report.step,
            report.loss,
            measured.tokens_per_s,
            100.0 * measured.data_wait_share,
            bytes(measured.device_memory_bytes.unwrap_or(measured.memory_bytes)),
        );
    }

    fn say(&self) -> String {
        self.said.lock().expect("nobody panics with it").clone()
    }
}

/// What is expected, so that there can be an end to look forward to.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// Texts.
    pub texts: u64,
    /// Sequences.
    pub sequences: u64,
    /// Texts that are synthesized; none where nothing is read.
    pub synthesized: Option<u64>,
    /// Whether sequences are trained on.
    pub trained: bool,
}

/// Shows progress until it is dropped.
pub struct Progress {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Starts showing: `how` is auto, plain or none.
    pub fn start(
        how: &str,
        meters: Arc<Meters>,
        trainer: Arc<TrainMeter>,
        expected: Expected,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let watch = Watch { meters, trainer, expected, start: Instant::now(), stop: stop.clone() };
        let bars = how == "auto" && std::io::stderr().is_terminal();
        let thread = (how != "none")
            .then(|| std::thread::spawn(move || if bars { watch.bars() } else { watch.lines() }));
        Progress { stop, thread }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How far a stage is.
struct Stage {
    name: &'static str,
    done: u64,
    expected: u64,
    /// What else there is to say.
    said: String,
}

impl Stage {
    /// Rate, time left, and what else there is to say, after so many seconds.
    fn pace(&self, passed: f64) -> String {
        let rate = self.done as f64 / passed;
        let left = self.expected.saturating_sub(self.done) as f64 / rate;
        let mut pace = format!("{rate:.1}/s");
        if left.is_finite() && left > 0.0 {
            pace += &format!(", {} left", seconds(left));
        }
        if !self.said.is_empty() {
            pace += &format!(", {}", self.said);
        }
        pace
    }
}

struct Watch {
    meters: Arc<Meters>,
    trainer: Arc<TrainMeter>,
    expected: Expected,
    start: Instant,
    stop: Arc<AtomicBool>,
}

impl Watch {
    fn stages(&self) -> Vec<Stage> {
        let Expected { texts, sequences, synthesized, trained } = self.expected;
        let meters = &self.meters;
        let stage = |name, done, expected, said| Stage { name, done, expected, said };
        let pairs = format!("{} pairs", count(meters.pairs.get()));
        let tokens = format!("{} tokens mixed", count(meters.mixed_tokens.get()));
        let mut stages = Vec::new();
        if let Some(asked) = synthesized {
            stages.push(stage("read", meters.texts.get(), texts, String::new()));
            stages.push(stage("synthesize", meters.generations.get(), asked, pairs));
            stages.push(stage("pack", meters.sequences.get(), sequences, tokens));
        }
        if trained {
            stages.push(stage("train", meters.learned.get(), sequences, self.trainer.say()));
        }
        stages
    }

    fn bars(&self) {
        let style = "{prefix:<11} {bar:28} {pos:>7}/{len:<7} {msg}";
        let style =
            ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
        let all = MultiProgress::new();
        let bars: Vec<ProgressBar> = self
            .stages()
            .iter()
            .map(|stage| {
                let bar = all.add(ProgressBar::new(stage.expected));
                bar.set_style(style.clone());
                bar.set_prefix(stage.name);
                bar
            })
            .collect();
        while !self.stop.load(Relaxed) {
            let passed = self.start.elapsed().as_secs_f64();
            for (bar, stage) in bars.iter().zip(self.stages()) {
                bar.set_length(bar.length().unwrap_or(0).max(stage.done));
                bar.set_position(stage.done);
                bar.set_message(stage.pace(passed));
            }
            std::thread::park_timeout(LOOK_EVERY);
        }
        let _ = all.clear();
    }

    fn lines(&self) {
        let mut next = LINE_EVERY;
        while !self.stop.load(Relaxed) {
            std::thread::park_timeout(LOOK_EVERY);
            let passed = self.start.elapsed();
            if passed >= next {
                next = passed + LINE_EVERY;
                tell!("{}", self.line(passed.as_secs_f64()));
            }
        }
    }

    fn line(&self, passed: f64) -> String {
        let stage = |stage: Stage| {
            format!("{} {}/{} ({})", stage.name, stage.done, stage.expected, stage.pace(passed))
        };
        let stages: Vec<String> = self.stages().into_iter().map(stage).collect();
        format!("[{}] {}", seconds(passed), stages.join(" · "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(done: u64, said: &str, expected: &str) {
        let stage = Stage { name: "read", done, expected: 90, said: said.into() };
        assert_eq!(stage.pace(7.0), expected);
    }

    #[test]
    fn the_pace_of_a_stage_reads_well() {
        check(0, "", "0.0/s");
        check(30, "75 pairs", "4.3/s, 14 s left, 75 pairs");
        check(90, "", "12.9/s");
    }
}
