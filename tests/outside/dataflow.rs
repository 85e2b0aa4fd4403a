//! The dataflow is the plain loop, byte for byte.

use crossbeam_channel::Receiver;
use headwater::ledger::Ledger;
use headwater::manifest::EpochRecord;
use headwater::run::RunFolder;
use headwater::synthesizer::{Job, Queue, scripted};
use headwater_pipelines::instruct;
use headwater_pipelines::shell::parts::Parts;
use headwater_pipelines::shell::plan::Plan;
use headwater_pipelines::shell::running::execute;
use headwater_pipelines::shell::settings::Settings;
use headwater_tests::folders::assert_same;
use headwater_tests::settings::{Small, small};
use headwater_tests::{reference, script};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

fn start(jobs: Receiver<Job>, disorder: u64, settings: &Settings) {
    let tokenizer = settings.synthesizer.tokenizer.clone();
    scripted(jobs, disorder, move |request| script::answer(request, &tokenizer));
}

fn run_dataflow(settings: &Settings, disorder: u64) {
    let plan = Plan::new(settings).unwrap();
    let (queue, jobs) = Queue::new(5);
    start(jobs, disorder, settings);
    let parts = Arc::new(Parts::around(settings, &plan, queue, None).unwrap());
    execute(settings.engine.workers, parts, instruct::dataflow).unwrap();
}

fn run_reference(settings: &Settings) {
    let tokenizer = settings.synthesizer.tokenizer.clone();
    reference::run(settings, |request| script::answer(request, &tokenizer));
}

/// Files of every kind of source, each with some records that cannot be used.
struct Corpus {
    place: TempDir,
    input: PathBuf,
    general: PathBuf,
}

fn write(path: &Path, records: impl Iterator<Item = Option<Value>>) {
    let line = |record: Option<Value>| record.map_or("not json\n".into(), |it| format!("{it}\n"));
    std::fs::write(path, records.map(line).collect::<String>()).unwrap();
}

impl Corpus {
    fn new(documents: usize) -> Self {
        let place = tempfile::tempdir().unwrap();
        let file = |name: &str| place.path().join(name);
        let corpus =
            Corpus { input: file("documents.jsonl"), general: file("general.jsonl"), place };
        let document = |i: usize| {
            let text = match i % 11 {
                7 => return None,
                5 => "  ".into(),
                3 => format!("A sentence about number {i}. ").repeat(400),
                _ => format!("Text {i} says <CON> that {} is so. ", i * i).repeat(1 + i % 5),
            };
            Some(json!({ "id": i.to_string(), "text": text }))
        };
        write(&corpus.input, (0..documents).map(document));
        let instruction = |i: usize| {
            let response = format!("{i} ").repeat(10 + 3 * i);
            let question = format!("Say {i} a few times.");
            (i % 9 != 4).then(|| json!({ "instruction": question, "response": response }))
        };
        write(&corpus.general, (0..23).map(instruction));
        let task = |i: usize| {
            let text = format!("Row {i} of a task has {} words. ", 8 + i);
            let pairs: Vec<Value> = (0..1 + i % 3)
                .map(|n| json!({ "question": format!("What is {n}?"), "answer": format!("Row {i}.") }))
                .collect();
            (i % 5 != 2).then(|| json!({ "id": i.to_string(), "text": text, "pairs": pairs }))
        };
        write(&corpus.file("tasks.jsonl"), (0..17).map(task));
        let raw =
            |i: usize| Some(json!({ "id": i.to_string(), "text": "Raw words. ".repeat(i + 1) }));
        write(&corpus.file("raw.jsonl"), (0..40).map(raw));
        corpus
    }

    fn file(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn settings(&self, name: &str, workers: usize, case: &Case) -> Settings {
        let Case { rounds, epoch_documents, lanes, mixed, seed, flags } = case;
        let place = self.place.path().display().to_string();
        let flags: Vec<String> =
            flags.split_whitespace().map(|flag| flag.replace("PLACE", &place)).collect();
        small(Small {
            input: vec![self.input.clone()],
            general: if *mixed { vec![self.general.clone()] } else { Vec::new() },
            out: &self.file(name),
            workers,
            lanes: *lanes,
            rounds: *rounds,
            epoch_documents: *epoch_documents,
            seed: *seed,
            flags: &flags,
        })
    }
}

#[derive(Clone, Copy)]
struct Case {
    rounds: usize,
    epoch_documents: usize,
    lanes: usize,
    mixed: bool,
    seed: u64,
    flags: &'static str,
}

const USUAL: Case =
    Case { rounds: 3, epoch_documents: 30, lanes: 1, mixed: true, seed: 1, flags: "" };

/// Everything that can be asked for, at once.
const ALL: Case = Case {
    rounds: 2,
    epoch_documents: 12,
    lanes: 2,
    mixed: true,
    seed: 6,
    flags: "--tasks PLACE/tasks.jsonl --also raw=PLACE/raw.jsonl --ratio 4:2:1:1,3=2:1:2:1 --passes \
            tasks=2 --passes raw=1 --convert 2/3 --long-texts window --duplicates drop \
            --near-duplicates 95 --max-words 2500 --similar-questions 100 --answer-words 2:40 --agreement \
            30 --packing concatenate",
};

fn check(documents: usize, case: Case) -> Vec<EpochRecord> {
    let corpus = Corpus::new(documents);
    let expected = corpus.settings("expected", 1, &case);
    run_reference(&expected);
    for workers in [1, 2, 4] {
        let found = corpus.settings(&format!("{workers} workers"), workers, &case);
        run_dataflow(&found, case.seed + workers as u64);
        assert_same(&found.out, &expected.out, |_| false);
    }
    let manifest = RunFolder::existing(&expected.out).unwrap().manifest().unwrap();
    assert_eq!(manifest.account(0, 0).unknown(), 0, "{:?}", manifest.ledger());
    manifest.epochs
}

#[test]
fn it_equals_the_plain_loop_for_any_number_of_workers() {
    check(130, USUAL);
    check(130, Case { rounds: 2, lanes: 3, seed: 2, ..USUAL });
    check(130, Case { rounds: 5, lanes: 2, mixed: false, seed: 3, ..USUAL });
    check(130, Case { rounds: 1, epoch_documents: 7, lanes: 4, seed: 4, ..USUAL });
}

#[test]
fn it_equals_the_plain_loop_on_tiny_inputs() {
    for documents in [0, 1, 2, 3, 5, 8] {
        check(documents, Case { epoch_documents: 3, lanes: 2, seed: 9, ..USUAL });
    }
}

#[test]
fn it_equals_the_plain_loop_with_everything_that_can_be_asked_for() {
    let epochs = check(120, ALL);
    let mut ledger = Ledger::default();
    epochs.iter().for_each(|epoch| ledger.merge(&epoch.ledger));
    for happened in [
        "admit/raw",
        "admit/windowed",
        "gate/rejected/disagreement",
        "mix/ended/tasks",
        "mix/ended/raw",
        "mix/tokens_of/general",
        "synthesize/not_asked",
    ] {
        assert!(ledger.get(happened) > 0, "{happened}: {ledger:?}");
    }
    // The asked ratios of epoch 0, and what is left of those of epoch 3 when sources have ended.
    let shares = |epoch: usize| epochs[epoch].mix_ppm.values().sum::<u64>();
    assert!((0..epochs.len()).all(|epoch| (999_990..=1_000_000).contains(&shares(epoch))));
}

#[test]
fn a_run_may_end_with_a_source() {
    let flags = "--passes general=1 --at-end stop --packing one-item";
    let epochs = check(130, Case { epoch_documents: 6, seed: 7, flags, ..USUAL });
    let (last, before) = epochs.split_last().unwrap();
    assert!(last.is_stopped() && before.iter().all(|epoch| !epoch.is_stopped()));
    assert!(epochs.len() < 15, "{}", epochs.len());
}

/// A crash leaves the manifest at some line, whole or torn, and files of later epochs.
fn check_crashes(case: Case) {
    let corpus = Corpus::new(100);
    let expected = corpus.settings("expected", 2, &case);
    run_dataflow(&expected, 0);
    let whole = std::fs::read_to_string(expected.out.join("manifest.jsonl")).unwrap();
    let epochs = whole.lines().count();
    assert!(epochs > 2, "{epochs}");
    for kept in 0..epochs {
        let found = corpus.settings(&format!("cut at {kept}"), 2, &case);
        run_dataflow(&found, 1);
        let lines: String = whole.lines().take(kept).map(|line| format!("{line}\n")).collect();
        let torn = lines + &whole.lines().nth(kept).unwrap()[..20];
        std::fs::write(found.out.join("manifest.jsonl"), torn).unwrap();
        run_dataflow(&found, 2);
        assert_same(&found.out, &expected.out, |_| false);
    }
}

#[test]
fn a_run_that_was_cut_off_goes_on_to_the_same_bytes() {
    check_crashes(Case { epoch_documents: 12, lanes: 2, seed: 5, ..USUAL });
}

#[test]
fn and_so_does_one_with_everything_that_can_be_asked_for() {
    check_crashes(ALL);
    let flags = "--passes general=2 --at-end stop";
    check_crashes(Case { epoch_documents: 6, seed: 8, flags, ..USUAL });
}
