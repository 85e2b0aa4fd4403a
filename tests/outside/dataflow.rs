//! The dataflow is the plain loop, byte for byte.

use crossbeam_channel::Receiver;
use headwater::synthesizer::{Job, Queue, scripted};
use headwater_pipelines::adapt;
use headwater_pipelines::shell::parts::Parts;
use headwater_pipelines::shell::plan::Plan;
use headwater_pipelines::shell::running::execute;
use headwater_pipelines::shell::settings::Settings;
use headwater_tests::folders::assert_same;
use headwater_tests::settings::{Small, small};
use headwater_tests::{reference, script};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn start(jobs: Receiver<Job>, disorder: u64, settings: &Settings) {
    let tokenizer = settings.synthesizer.tokenizer.clone();
    scripted(jobs, disorder, move |request| script::answer(request, &tokenizer));
}

fn run_dataflow(settings: &Settings, disorder: u64) {
    let plan = Plan::new(settings).unwrap();
    let (queue, jobs) = Queue::new(5);
    start(jobs, disorder, settings);
    let parts = Arc::new(Parts::around(settings, &plan, queue, None).unwrap());
    execute(settings.engine.workers, parts, adapt::dataflow).unwrap();
}

fn run_reference(settings: &Settings) {
    let tokenizer = settings.synthesizer.tokenizer.clone();
    reference::run(settings, |request| script::answer(request, &tokenizer));
}

/// Documents of all lengths, some of them unusable, and general instructions, some of them unusable.
fn corpus(folder: &Path, documents: usize) -> (PathBuf, PathBuf) {
    let mut lines = String::new();
    for i in 0..documents {
        let _ = match i % 11 {
            7 => writeln!(lines, "{{\"id\": \"bad {i}\""),
            5 => writeln!(lines, "{{\"id\": \"empty {i}\", \"text\": \"  \"}}"),
            3 => {
                let long = format!("A sentence about number {i}. ").repeat(400);
                writeln!(
                    lines,
                    "{}",
                    serde_json::json!({ "id": format!("long {i}"), "text": long })
                )
            }
            _ => {
                let text = format!("Text {i} says <CON> that {} is so. ", i * i).repeat(1 + i % 5);
                writeln!(lines, "{}", serde_json::json!({ "id": i.to_string(), "text": text }))
            }
        };
    }
    let input = folder.join("documents.jsonl");
    std::fs::write(&input, lines).unwrap();
    let mut lines = String::new();
    for i in 0..23 {
        let _ = match i % 9 {
            4 => writeln!(lines, "not json"),
            _ => writeln!(
                lines,
                "{}",
                serde_json::json!({
                    "id": i.to_string(),
                    "instruction": format!("Say {i} a few times."),
                    "response": format!("{i} ").repeat(10 + 3 * i),
                })
            ),
        };
    }
    let general = folder.join("general.jsonl");
    std::fs::write(&general, lines).unwrap();
    (input, general)
}

#[derive(Clone, Copy)]
struct Case {
    documents: usize,
    rounds: usize,
    epoch_documents: usize,
    lanes: usize,
    mixed: bool,
    seed: u64,
}

fn check(case: Case) {
    let Case { documents, rounds, epoch_documents, lanes, mixed, seed } = case;
    let place = tempfile::tempdir().unwrap();
    let (input, general) = corpus(place.path(), documents);
    let settings = |name: &str, workers: usize| {
        small(Small {
            input: vec![input.clone()],
            general: if mixed { vec![general.clone()] } else { Vec::new() },
            out: &place.path().join(name),
            workers,
            lanes,
            rounds,
            epoch_documents,
            seed,
        })
    };
    let expected = settings("expected", 1);
    run_reference(&expected);
    for workers in [1, 2, 4] {
        let found = settings(&format!("{workers} workers"), workers);
        run_dataflow(&found, seed + workers as u64);
        assert_same(&found.out, &expected.out, |_| false);
    }
}

#[test]
fn it_equals_the_plain_loop_for_any_number_of_workers() {
    let case =
        Case { documents: 130, rounds: 3, epoch_documents: 30, lanes: 1, mixed: true, seed: 1 };
    check(case);
    check(Case { rounds: 2, lanes: 3, seed: 2, ..case });
    check(Case { rounds: 5, lanes: 2, mixed: false, seed: 3, ..case });
    check(Case { rounds: 1, epoch_documents: 7, lanes: 4, seed: 4, ..case });
}

#[test]
fn it_equals_the_plain_loop_on_tiny_inputs() {
    for documents in [0, 1, 2, 3, 5, 8] {
        check(Case { documents, rounds: 3, epoch_documents: 3, lanes: 2, mixed: true, seed: 9 });
    }
}

#[test]
fn a_run_that_was_cut_off_goes_on_to_the_same_bytes() {
    let place = tempfile::tempdir().unwrap();
    let (input, general) = corpus(place.path(), 100);
    let settings = |name: &str| {
        small(Small {
            input: vec![input.clone()],
            general: vec![general.clone()],
            out: &place.path().join(name),
            workers: 2,
            lanes: 2,
            rounds: 3,
            epoch_documents: 12,
            seed: 5,
        })
    };
    let expected = settings("expected");
    run_dataflow(&expected, 0);
    let whole = std::fs::read_to_string(expected.out.join("manifest.jsonl")).unwrap();
    let epochs = whole.lines().count();
    assert!(epochs > 5, "{epochs}");
    for kept in 0..epochs {
        // A crash leaves the manifest at some line, whole or torn, and files of later epochs.
        let found = settings(&format!("cut at {kept}"));
        run_dataflow(&found, 1);
        let lines: String = whole.lines().take(kept).map(|line| format!("{line}\n")).collect();
        let torn = lines + &whole.lines().nth(kept).unwrap()[..20];
        std::fs::write(found.out.join("manifest.jsonl"), torn).unwrap();
        run_dataflow(&found, 2);
        assert_same(&found.out, &expected.out, |_| false);
    }
}
