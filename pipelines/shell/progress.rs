//! How a run shows that it is alive: bars on a terminal, lines elsewhere.

use super::plan::{count, seconds};
use headwater::meter::Meters;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Seconds between lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What the trainer says of itself.
#[derive(Debug, Default)]
pub struct TrainMeter {
    step: AtomicU64,
    loss: AtomicU64,
}

impl TrainMeter {
    /// Notes the loss of a step.
    pub fn note(&self, step: u64, loss: f64) {
        self.step.store(step, Relaxed);
        self.loss.store(loss.to_bits(), Relaxed);
    }

    fn say(&self) -> Option<String> {
        let step = self.step.load(Relaxed);
        (step > 0)
            .then(|| format!("step {step}, loss {:.3}", f64::from_bits(self.loss.load(Relaxed))))
    }
}

/// What is expected, so that there can be an end to look forward to.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// Texts.
    pub texts: u64,
    /// Sequences.
    pub sequences: u64,
    /// Whether texts are synthesized and packed.
    pub synthesized: bool,
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

struct Watch {
    meters: Arc<Meters>,
    trainer: Arc<TrainMeter>,
    expected: Expected,
    start: Instant,
    stop: Arc<AtomicBool>,
}

impl Watch {
    /// Name, what is done, what is expected, and what else there is to say, for each stage.
    fn stages(&self) -> Vec<(&'static str, u64, u64, String)> {
        let Expected { texts, sequences, synthesized, trained } = self.expected;
        let meters = &self.meters;
        let pairs = format!("{} pairs", count(meters.pairs.get()));
        let tokens = format!("{} tokens mixed", count(meters.mixed_tokens.get()));
        let mut stages = Vec::new();
        if synthesized {
            stages.push(("read", meters.texts.get(), texts, String::new()));
            stages.push(("synthesize", meters.generations.get(), texts, pairs));
            stages.push(("pack", meters.sequences.get(), sequences, tokens));
        }
        if trained {
            let said = self.trainer.say().unwrap_or_default();
            stages.push(("train", meters.learned.get(), sequences, said));
        }
        stages
    }

    fn bars(&self) {
        let style = "{prefix:<11} {bar:28} {pos:>7}/{len:<7} {per_sec:>12} {eta:>6}  {msg}";
        let style =
            ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
        let all = MultiProgress::new();
        let bars: Vec<ProgressBar> = self
            .stages()
            .iter()
            .map(|(name, _, expected, _)| {
                let bar = all.add(ProgressBar::new(*expected));
                bar.set_style(style.clone());
                bar.set_prefix(*name);
                bar
            })
            .collect();
        while !self.stop.load(Relaxed) {
            for (bar, (_, done, _, said)) in bars.iter().zip(self.stages()) {
                bar.set_length(bar.length().unwrap_or(0).max(done));
                bar.set_position(done);
                bar.set_message(said);
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
                eprintln!("{}", self.line(passed.as_secs_f64()));
            }
        }
    }

    fn line(&self, passed: f64) -> String {
        let stages: Vec<String> = self
            .stages()
            .into_iter()
            .map(|(name, done, expected, said)| {
                let rate = done as f64 / passed;
                let left = expected.saturating_sub(done) as f64 / rate;
                let eta = match left.is_finite() && left > 0.0 {
                    true => format!(", {} left", seconds(left)),
                    false => String::new(),
                };
                let said = if said.is_empty() { said } else { format!(", {said}") };
                format!("{name} {done}/{expected} ({rate:.1}/s{eta}{said})")
            })
            .collect();
        format!("[{}] {}", seconds(passed), stages.join(" · "))
    }
}
