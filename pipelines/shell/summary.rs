//! What a run came to: the account, the figures, and where everything lies.

use super::held_out::{describe_evaluations, describe_rejected};
use super::metrics::{self, Totals};
use super::parts::Parts;
use super::plan::{bytes, count, seconds};
use super::settings::Settings;
use super::training::Trained;
use anyhow::Result;
use candle_core::Device;
use headwater::augment::Augmented;
use headwater::format::durable;
use headwater::kernels::cuda::peak_bytes;
use headwater::ledger::Ledger;
use headwater::manifest::Manifest;
use headwater::mix::Mixer;
use headwater::run::RunFolder;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

/// The closing account of a run.
pub struct Summary {
    ledger: Ledger,
    manifest: Manifest,
    training: Option<Trained>,
    totals: Option<Totals>,
    seconds: f64,
    generated: u64,
    engine: BTreeMap<&'static str, u64>,
    requests: Option<BTreeMap<&'static str, u64>>,
    out: PathBuf,
    strict: bool,
}

impl Summary {
    /// Sums up what was committed.
    ///
    /// # Errors
    /// If the metrics of the training cannot be read.
    pub fn new(
        settings: &Settings,
        parts: &Parts,
        manifest: Manifest,
        training: Option<Trained>,
        seconds: f64,
    ) -> Result<Self> {
        let (sequences, tokens) = training
            .as_ref()
            .map_or((0, 0), |trained| (trained.last.next_sequence, trained.last.tokens_total));
        let mut ledger = manifest.account(sequences, tokens);
        if let Some(trained) = &training {
            ledger.merge(&trained.ledger);
        }
        Ok(Summary {
            ledger,
            manifest,
            training,
            totals: Totals::of(&metrics::lines(&settings.out)?),
            seconds,
            generated: parts.meters.generations.get(),
            engine: parts.engine.figures().into(),
            requests: parts.requests.as_ref().map(|requests| requests.figures().into()),
            out: settings.out.clone(),
            strict: settings.machine.strict,
        })
    }

    /// Writes `ledger.json`.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn write_ledger(&self, folder: &RunFolder) -> Result<()> {
        let text = format!("{:#}\n", self.ledger_json());
        durable::write(&folder.path().join("ledger.json"), text.as_bytes())?;
        Ok(())
    }

    /// The run folder.
    pub fn run(&self) -> &std::path::Path {
        &self.out
    }

    /// Whether nothing was to be rejected.
    pub fn is_strict(&self) -> bool {
        self.strict
    }

    /// Everything as JSON.
    pub fn json(&self) -> Value {
        json!({
            "ledger": self.ledger_json(),
            "seconds": self.seconds,
            "documents_per_s": self.generated as f64 / self.seconds,
            "engine": self.engine,
            "requests": self.requests,
            "utilisation": self.utilisation(),
            "mix_error_tokens": self.mix_errors(),
            "peak_memory_bytes": peak_memory(),
            "training": self.training.as_ref().map(|trained| {
                let Trained { first, last, evaluations, ledger: _ } = trained;
                json!({ "first": first, "last": last, "held_out": evaluations, "totals": self.totals })
            }),
            "run": self.out,
        })
    }

    /// The account and the figures as text.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for (name, value) in self.figures() {
            let _ = writeln!(text, "  {name:<12} {value}");
        }
        text
    }

    /// The account and the figures, by name.
    pub fn figures(&self) -> Vec<(&'static str, String)> {
        let mut lines = self.describe_texts();
        lines.extend(self.describe_tokens());
        lines.push(("train", self.describe_training()));
        if let Some(trained) = self.training.as_ref().filter(|it| !it.evaluations.is_empty()) {
            let rejected = describe_rejected(&self.ledger);
            lines.push(("held out", describe_evaluations(&trained.evaluations) + &rejected));
        }
        lines.push(("unknown", self.ledger.unknown().to_string()));
        let run = format!(
            "{}, {:.1} documents/s synthesized, {} peak memory",
            seconds(self.seconds),
            self.generated as f64 / self.seconds,
            bytes(peak_memory()),
        );
        lines.push(("requests", self.describe_requests()));
        lines.push(("engine", self.describe_engine()));
        lines.push(("run", run));
        lines
    }

    /// What became of records and texts.
    fn describe_texts(&self) -> Vec<(&'static str, String)> {
        let ledger = &self.ledger;
        let get = |name: &str| ledger.get(name);
        let texts = (get("admit/texts") - get("synthesize/not_asked")).max(1) as f64;
        let read = format!(
            "{} records = {} documents + {} rejected{} + {} withdrawn",
            get("read/records"),
            get("read/documents"),
            ledger.sum("read/rejected/"),
            reasons(ledger, "read/rejected/"),
            get("read/withdrawn"),
        );
        let admit = format!(
            "{} texts from {} whole, {} split, {} windowed and {} raw documents; {} rejected{}; {} hold markers",
            get("admit/texts"),
            get("admit/whole"),
            get("admit/split"),
            get("admit/windowed"),
            get("admit/raw"),
            ledger.sum("admit/rejected/"),
            reasons(ledger, "admit/rejected/"),
            get("admit/marker_in_text"),
        );
        let synthesize = format!(
            "{} prompt and {} generated tokens; ended by{}",
            count(get("synthesize/prompt_tokens")),
            count(get("synthesize/generated_tokens")),
            reasons(ledger, "synthesize/finished/"),
        );
        let parse = format!(
            "{} pieces = {} pairs + {} rejected{}; {:.1} % of texts asked have a pair, {:.2} on average",
            get("parse/pieces"),
            get("parse/pairs"),
            ledger.sum("parse/rejected/"),
            reasons(ledger, "parse/rejected/"),
            100.0 * get("parse/texts_with_pairs") as f64 / texts,
            get("parse/pairs") as f64 / texts,
        );
        let gate = format!(
            "{} pairs = {} kept + {} rejected{}; {} not judged",
            get("parse/pairs"),
            get("gate/pairs"),
            ledger.sum("gate/rejected/"),
            reasons(ledger, "gate/rejected/"),
            get("gate/not_judged"),
        );
        let templify = format!(
            "{} documents: {} texts augmented, {} raw; pairs{}; rejected {}{}",
            get("templify/documents"),
            get("templify/texts/augmented"),
            get("templify/texts/raw"),
            reasons(ledger, "templify/pairs/"),
            ledger.sum("templify/rejected/"),
            reasons(ledger, "templify/rejected/"),
        );
        vec![
            ("read", read),
            ("admit", admit),
            ("synthesize", synthesize),
            ("parse", parse),
            ("gate", gate),
            ("templify", templify),
        ]
    }

    /// What became of tokens.
    fn describe_tokens(&self) -> Vec<(&'static str, String)> {
        let ledger = &self.ledger;
        let get = |name: &str| ledger.get(name);
        let mix = format!(
            "{} tokens{}; error {} tokens; ended{}; left out{}; {} rejected{}",
            get("mix/tokens"),
            reasons(ledger, "mix/tokens_of/"),
            self.mix_errors().iter().max().copied().unwrap_or(0),
            some(&reasons(ledger, "mix/ended/")),
            some(&reasons(ledger, "mix/left_out/")),
            ledger.sum("mix/rejected/"),
            reasons(ledger, "mix/rejected/"),
        );
        let pack = format!(
            "{} sequences, {:.2} % full ({} padding, {} items cut)",
            get("pack/sequences"),
            100.0 * self.utilisation(),
            get("pack/padding"),
            get("pack/cuts"),
        );
        vec![("mix", mix), ("pack", pack)]
    }

    /// Where answers came from.
    fn describe_requests(&self) -> String {
        let Some(requests) = &self.requests else { return "answers are not kept".into() };
        let get = |name: &str| requests[name];
        format!(
            "{} answered from the store, {} by the engines, {} with an equal one; {} damaged entries dropped; \
             {} written, {} held",
            count(get("hits")),
            count(get("misses")),
            count(get("joined")),
            get("corrupt"),
            bytes(get("written_bytes")),
            bytes(get("held_bytes")),
        )
    }

    /// What the synthesis engines did in this run, as far as it went here.
    fn describe_engine(&self) -> String {
        let get = |name: &str| self.engine[name];
        format!(
            "{} steps of {:.1} sequences; {:.1} % of prompts were in the cache; {} of {} guessed tokens held; \
             {} sequences computed again",
            count(get("steps")),
            get("sequences") as f64 / get("steps").max(1) as f64,
            100.0 * get("cached_tokens") as f64 / get("admitted_tokens").max(1) as f64,
            count(get("accepted_tokens")),
            count(get("drafted_tokens")),
            get("preemptions"),
        )
    }

    /// Where everything lies.
    pub fn places(&self) -> String {
        let out = self.out.display();
        let model = match &self.training {
            Some(Trained { last, .. }) => {
                format!(
                    "\n  the model      {out}/checkpoints/step-{:08}/\n  curves         \
                     {out}/report.html, {out}/tensorboard/",
                    last.step
                )
            }
            None => String::new(),
        };
        format!(
            "  documents      {out}/augmented/   (zstd, one JSON object a line)\n  sequences      \
             {out}/packed/      (Parquet)\n  rejected       {out}/rejected/\n  account        \
             {out}/ledger.json\n  configuration  {out}/run.json{model}\n"
        )
    }

    /// A document to look at: the first with texts of several rounds and pairs, if there is one.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn example(&self, folder: &RunFolder) -> Result<Option<Augmented>> {
        let mut best: Option<Augmented> = None;
        for epoch in &self.manifest.epochs {
            for document in folder.augmented(epoch)? {
                let rank = |document: &Augmented| {
                    (document.choices.is_some(), document.entries.len().min(2))
                };
                if best.as_ref().is_none_or(|best| rank(&document) > rank(best)) {
                    best = Some(document);
                }
            }
            if best.as_ref().is_some_and(|best| best.entries.len() > 1) {
                break;
            }
        }
        Ok(best)
    }

    fn describe_training(&self) -> String {
        match &self.training {
            None => format!("nothing; {} sequences wait", self.ledger.get("train/waiting")),
            Some(Trained { first, last, .. }) => format!(
                "{} steps, {} sequences, {} tokens; loss {:.3} at the start, {:.3} at the end{}{}",
                last.step,
                last.next_sequence,
                count(last.tokens_total),
                first.loss,
                last.loss,
                describe_skipped(last.skipped_total),
                self.totals.map_or(String::new(), |totals| format!("; {}", totals.describe())),
            ),
        }
    }

    fn ledger_json(&self) -> Value {
        json!({
            "unknown": self.ledger.unknown(),
            "counts": self.ledger,
            "balances": self.ledger.balances(),
        })
    }

    /// Pieces and records that were rejected at any stage.
    pub fn rejected(&self) -> u64 {
        self.ledger.iter().filter(|(name, _)| name.contains("/rejected/")).map(|(_, n)| n).sum()
    }

    fn utilisation(&self) -> f64 {
        self.ledger.get("pack/tokens") as f64 / self.ledger.get("pack/room").max(1) as f64
    }

    /// Distance of each lane from the asked ratio, in tokens.
    fn mix_errors(&self) -> Vec<u64> {
        let lanes = self.manifest.epochs.last().map_or(&[][..], |last| &last.lanes);
        let started = lanes.iter().filter(|lane| !lane.mix.tokens.is_empty());
        started.map(|lane| Mixer::resume(lane.mix.clone()).error_tokens()).collect()
    }
}

/// ` (a 1, b 2)` for the counts under a name; nothing if there are none.
fn reasons(ledger: &Ledger, prefix: &str) -> String {
    let counts: Vec<String> =
        ledger.under(prefix).map(|(name, amount)| format!("{name} {amount}")).collect();
    match counts.is_empty() {
        true => String::new(),
        false => format!(" ({})", counts.join(", ")),
    }
}

/// How many updates were skipped; nothing if none was.
pub(crate) fn describe_skipped(updates: u64) -> String {
    if updates == 0 { String::new() } else { format!("; {updates} updates skipped") }
}

/// Reasons that say so if there are none.
fn some(reasons: &str) -> &str {
    if reasons.is_empty() { " none" } else { reasons }
}

/// The most bytes in use on GPUs at a time; none on a CPU, and where a GPU does not say. A figure that nobody gets does not end
/// a run.
pub fn device_memory(devices: &[Device]) -> Option<u64> {
    peak_bytes(devices).unwrap_or(None)
}

/// The most memory this process ever held; zero where the system does not say.
pub fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}
