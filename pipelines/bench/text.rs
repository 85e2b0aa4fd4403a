//! The text path, timed.
//!
//! ```text
//! read ─▶ pairs, made of the text ─▶ templify + tokenise ─▶ mix ─▶ pack ─▶ commit
//! ```
//!
//! It runs in one thread, through the same functions as a pipeline, without a model. What a synthesizer
//! would have written is made of each text itself: questions and answers in its wire format.

use crate::shell::args::RunArgs;
use crate::shell::parts::admission;
use crate::shell::plan::Plan;
use crate::shell::settings::{Preset, Settings};
use crate::shell::terminal::{show, tell};
use crate::shell::wrong_use;
use anyhow::{Result, ensure};
use clap::Args;
use headwater::augment::{Augmenter, ChainOutput};
use headwater::block::{Block, Blocks, Converted};
use headwater::chain::{Chain, Generation, Prompt, chains};
use headwater::format::documents::Documents;
use headwater::format::input::{Counter, open_counted};
use headwater::gate::PairGates;
use headwater::lane::{Lane, Mixed, Need};
use headwater::manifest::{EpochOutput, LaneState, Manifest};
use headwater::prompt::PromptWriter;
use headwater::record::{Finish, Item};
use headwater::run::RunFolder;
use headwater::side::SideRecord;
use headwater_operators::mix::MixedLane;
use headwater_operators::pack::{Packing, pack_lane};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

const PRESET: Preset = Preset {
    command: "bench text",
    corpus: "bench",
    rounds: 2,
    converted: Converted { part: 1, of: 5 },
    task_passes: None,
    epoch_documents: 1200,
    words_min: 1,
    unique: false,
    published: &[],
};

/// Parse, templify, tokenise, mix, pack and write in one thread, without a model
#[derive(Args, Clone, Debug)]
#[command(
    arg_required_else_help = true,
    after_help = "Example:\n  headwater bench text --input web.jsonl.zst --out bench-run"
)]
pub(super) struct Text {
    /// Pairs made of each text
    #[arg(long, default_value_t = 2, value_name = "N")]
    pairs: usize,
    #[command(flatten)]
    run: RunArgs,
}

/// Measures.
///
/// # Errors
/// If the flags cannot work or the disk refuses.
pub(super) fn run(args: Text) -> Result<ExitCode> {
    let quiet = args.run.machine.progress == "none";
    let settings = Settings::new(PRESET, args.run).map_err(wrong_use)?;
    if settings.machine.dry_run {
        tell!("{}", Plan::new(&settings)?.describe(&settings).trim_end());
        return Ok(ExitCode::SUCCESS);
    }
    let is_new = !settings.out.join("manifest.jsonl").exists();
    ensure!(is_new, "--out {:?} holds a run: measuring wants a new folder", settings.out);
    let decompressing = decompress(&settings.inputs)?;
    let folder = RunFolder::open(&settings.out, &settings.configuration(None)?)?;
    let mut path = TextPath::new(&settings, folder, args.pairs)?;
    let start = Instant::now();
    let manifest = path.run(&settings)?;
    let spent = start.elapsed().as_secs_f64();
    if !quiet {
        tell!("{}", path.table(spent).trim_end());
    }
    show!("{}", path.figures(&manifest, spent, decompressing))?;
    Ok(ExitCode::SUCCESS)
}

/// Seconds it takes to read the files and do nothing with them: no pipeline can be faster.
fn decompress(files: &[PathBuf]) -> Result<f64> {
    let start = Instant::now();
    for file in files {
        std::io::copy(&mut open_counted(file, Counter::default())?, &mut std::io::sink())?;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Seconds of each stage.
#[derive(Default)]
struct Clock([f64; 6]);

/// The stages, in order.
#[derive(Clone, Copy)]
enum Stage {
    Read,
    Parse,
    Templify,
    Mix,
    Pack,
    Commit,
}

impl Clock {
    fn time<T>(&mut self, stage: Stage, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let done = work();
        self.0[stage as usize] += start.elapsed().as_secs_f64();
        done
    }

    fn shares(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let names =
            ["read and admit", "parse pairs", "templify and tokenise", "mix", "pack", "commit"];
        names.into_iter().zip(self.0)
    }
}

/// The stages of the text path.
struct TextPath {
    folder: RunFolder,
    gates: PairGates,
    augmenter: Augmenter,
    lane: Lane,
    sides: Vec<Box<dyn Iterator<Item = SideRecord>>>,
    packing: Packing,
    pairs: usize,
    text_bytes: u64,
    clock: Clock,
}

impl TextPath {
    fn new(settings: &Settings, folder: RunFolder, pairs: usize) -> Result<Self> {
        let (tokenizer, seed) = (&settings.model.tokenizer, settings.machine.seed);
        let sides = settings.sources.open(tokenizer, &settings.templates, seed).into_iter();
        let records =
            sides.map(|side| Box::new(side.records(0, 1, 0)) as Box<dyn Iterator<Item = _>>);
        Ok(TextPath {
            folder,
            gates: PairGates::new(settings.pair_rules.clone())?,
            augmenter: Augmenter {
                templates: settings.templates.clone(),
                tokenizer: tokenizer.clone(),
                synthesizer: "none".into(),
                seed,
            },
            lane: Lane::new(settings.sources.rules.clone(), LaneState::default()),
            sides: records.collect(),
            packing: Packing { length: settings.length, mode: settings.packing },
            pairs,
            text_bytes: 0,
            clock: Clock::default(),
        })
    }

    /// The share and the rate of each stage, for people.
    fn table(&self, spent: f64) -> String {
        let row = |name: &str, seconds: f64| {
            let rate = self.text_bytes as f64 / 1e6 / seconds;
            format!("{name:<22} {:5.1} %  {rate:7.1} MB of text/s\n", 100.0 * seconds / spent)
        };
        let stages = self.clock.shares().map(|(name, seconds)| row(name, seconds));
        stages.chain([row("all, in one thread", spent)]).collect()
    }

    /// What was measured, as one line of JSON.
    fn figures(&self, manifest: &Manifest, spent: f64, decompressing: f64) -> Value {
        let ledger = manifest.account(0, 0);
        let (bytes, tokens) = (self.text_bytes as f64, ledger.get("pack/tokens"));
        let stages: BTreeMap<_, _> = self.clock.shares().collect();
        json!({
            "bench": "text",
            "device": "cpu",
            "threads": 1,
            "documents": ledger.get("read/documents"),
            "documents_per_s": ledger.get("read/documents") as f64 / spent,
            "text_bytes": self.text_bytes,
            "bytes_per_s": bytes / spent,
            "tokens_per_s": tokens as f64 / spent,
            "seconds": spent,
            "stage_seconds": stages,
            "utilisation": tokens as f64 / ledger.get("pack/room").max(1) as f64,
            "unknown": ledger.unknown(),
            "ceiling": {
                "what": "reading and decompressing the input alone",
                "bytes_per_s": bytes / decompressing,
                "share": decompressing / spent,
            },
        })
    }

    fn run(&mut self, settings: &Settings) -> Result<Manifest> {
        let (inputs, fields) = (settings.inputs.clone(), settings.fields.clone());
        let documents = Documents::new(inputs, settings.preset.corpus, fields);
        let writer = PromptWriter::new(settings.synthesizer.tokenizer.clone())?;
        let admission = admission(settings, &writer)?;
        let size = settings.preset.epoch_documents;
        let mut blocks = Blocks::new(documents, admission, size, settings.limit);
        let mut manifest = Manifest::default();
        while let Some(block) = self.clock.time(Stage::Read, || blocks.next()) {
            let output = self.epoch(block, settings.preset.rounds);
            let (folder, before) = (&self.folder, manifest.sequences());
            let record = self.clock.time(Stage::Commit, || folder.commit(&output, before))?;
            manifest.epochs.push(record);
        }
        Ok(manifest)
    }

    fn epoch(&mut self, block: Block, rounds: usize) -> EpochOutput {
        let Block { epoch, documents, rejected, ledger, end } = block;
        let mut output =
            EpochOutput { epoch, rejected, ledger, input: end, ..EpochOutput::default() };
        self.text_bytes += documents.iter().map(|document| document.text.len() as u64).sum::<u64>();
        let mut chains = chains(documents, rounds);
        let (gates, pairs) = (&self.gates, self.pairs);
        self.clock.time(Stage::Parse, || {
            chains.iter_mut().for_each(|chain| answer(chain, pairs, gates));
        });
        let augmenter = &self.augmenter;
        let rendered: Vec<ChainOutput> = self.clock.time(Stage::Templify, || {
            chains.into_iter().map(|chain| augmenter.augment(chain)).collect()
        });
        let mut items: Vec<Item> = Vec::new();
        for chain in rendered {
            output.ledger.merge(&chain.ledger);
            output.rejected.extend(chain.rejected);
            let (documents, own): (Vec<_>, Vec<_>) = chain.documents.into_iter().unzip();
            output.augmented.extend(documents);
            items.extend(own);
        }
        let (lane, sides) = (&mut self.lane, &mut self.sides);
        let (mixed, state) = self.clock.time(Stage::Mix, || mix(lane, sides, epoch, items));
        let Mixed { items, rejected, ledger } = mixed;
        let mixed = MixedLane { items, rejected, ledger, state, ..MixedLane::default() };
        let packing = self.packing;
        let packed = self.clock.time(Stage::Pack, || pack_lane(mixed, packing));
        output.ledger.merge(&packed.ledger);
        output.rejected.extend(packed.rejected);
        output.lanes.push((packed.state, packed.sequences));
        output
    }
}

fn mix(
    lane: &mut Lane,
    sides: &mut [Box<dyn Iterator<Item = SideRecord>>],
    epoch: u64,
    items: Vec<Item>,
) -> (Mixed, LaneState) {
    lane.start(epoch, items);
    while let Need::Record(side) = lane.advance() {
        match sides[side - 1].next() {
            Some(record) => lane.give(side, record),
            None => lane.end(side),
        }
    }
    lane.finish()
}

/// Answers for a synthesizer: each pair asks for the words behind some of the text.
fn answer(chain: &mut Chain, pairs: usize, gates: &PairGates) {
    while let Some(document) = chain.waiting.front() {
        let mut words = document.seen().split_ascii_whitespace().take(16 * pairs);
        let mut text = String::with_capacity(256 * pairs);
        for _ in 0..pairs {
            text.push_str("<QUE> What follows");
            for word in words.by_ref().take(6) {
                text.push(' ');
                text.push_str(word);
            }
            text.push_str("? <ANS>");
            for word in words.by_ref().take(10) {
                text.push(' ');
                text.push_str(word);
            }
            text.push_str(" </END>\n\n");
        }
        chain.accept(&Prompt::default(), &Generation { text, finish: Finish::Stop, tokens: 0 });
        chain.refuse(|text, earlier, pair| gates.judge(text, earlier, pair));
    }
}
