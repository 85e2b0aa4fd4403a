//! The request store never changes what a run leaves: with it, without it, filled, killed or damaged.

use crate::program::{command, corpus};
use headwater::record::Finish;
use headwater::request_store::key::Identity;
use headwater::request_store::{BYTES_MIN, RequestStore, front};
use headwater::synthesizer::{Queue, scripted};
use headwater_pipelines::instruct;
use headwater_pipelines::shell::parts::Parts;
use headwater_pipelines::shell::plan::Plan;
use headwater_pipelines::shell::running::execute;
use headwater_pipelines::shell::settings::Settings;
use headwater_tests::folders::assert_same;
use headwater_tests::settings::{Small, small};
use headwater_tests::{reference, script};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The files of a store.
fn logs(store: &Path) -> Vec<PathBuf> {
    let Ok(folder) = std::fs::read_dir(store) else { return Vec::new() };
    let files = folder.map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|name| name == "hwlog")).collect()
}

/// Changes a bit of every so many bytes.
fn damage(store: &Path, every: usize) {
    for path in logs(store) {
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.iter_mut().skip(every / 2).step_by(every).for_each(|byte| *byte ^= 4);
        std::fs::write(path, bytes).unwrap();
    }
}

/// A place with documents, for whole runs of the program.
struct Runs {
    place: tempfile::TempDir,
    documents: PathBuf,
    general: PathBuf,
}

impl Runs {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let (documents, general) = corpus(place.path());
        Runs { place, documents, general }
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn arguments(&self, out: &str, more: &str) -> Vec<String> {
        let Runs { place, documents, general } = self;
        let (documents, general) = (documents.display(), general.display());
        let all = format!(
            "pubmed --input {documents} --general {general} --out PLACE/{out} --length 256 --new-tokens 160 \
             --epoch-documents 18 --no-train --progress none --json {more}"
        );
        let all = all.replace("PLACE", place.path().to_str().unwrap());
        all.split_whitespace().map(str::to_owned).collect()
    }

    fn output(&self, out: &str, more: &str) -> Output {
        let arguments = self.arguments(out, more);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        command(&arguments).output().unwrap()
    }

    /// Runs, and returns the summary.
    fn run(&self, out: &str, more: &str) -> Value {
        let output = self.output(out, more);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn assert_same(&self, left: &str, right: &str) {
        let of_this_run =
            |path: &Path| path.starts_with("requests") || path.ends_with("engine.jsonl");
        assert_same(&self.folder(left), &self.folder(right), of_this_run);
    }

    /// That the steps that were written down are those of the summary.
    fn assert_steps_are_told(&self, out: &str, summary: &Value) {
        let text = std::fs::read_to_string(self.folder(out).join("engine.jsonl")).unwrap();
        let lines: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for name in
            ["steps", "prompt_tokens", "decode_tokens", "generated_tokens", "admitted_tokens"]
        {
            let sum: u64 = lines.iter().map(|line| line[name].as_u64().unwrap()).sum();
            assert_eq!(sum, number(summary, "engine", name), "{name}");
        }
        for line in lines {
            let share = line["cache_use"].as_f64().unwrap();
            assert!(
                (0.0..=1.0).contains(&share) && line["batch_mean"].as_f64() > Some(0.0),
                "{line}"
            );
        }
    }
}

fn number(summary: &Value, section: &str, name: &str) -> u64 {
    summary[section][name].as_u64().unwrap()
}

#[test]
fn a_run_that_is_repeated_with_its_store_generates_nothing_and_leaves_the_same_bytes() {
    let runs = Runs::new();
    let without = runs.run("without", "--request-store off --agreement 20");
    assert_eq!(without["requests"], Value::Null);
    assert!(!runs.folder("without/requests").exists());
    assert!(number(&without, "engine", "generated_tokens") > 0);
    runs.assert_steps_are_told("without", &without);

    let shared = "--request-store PLACE/shared --agreement 20";
    let cold = runs.run("cold", shared);
    let asked = number(&cold, "requests", "misses");
    assert!(asked > 20, "texts and questions are asked: {cold}");
    assert_eq!(number(&cold, "requests", "written"), asked);
    runs.assert_same("cold", "without");

    let warm = runs.run("warm", shared);
    assert_eq!(number(&warm, "engine", "generated_tokens"), 0);
    assert_eq!(number(&warm, "requests", "misses"), 0);
    assert!(number(&warm, "requests", "hits") >= asked);
    runs.assert_same("warm", "without");

    // The judge by its own name is the same model: it is known too.
    let judged = runs.run("judged", &format!("{shared} --judge bundled"));
    assert_eq!(number(&judged, "requests", "misses"), 0);

    damage(&runs.folder("shared"), 900);
    let damaged = runs.run("damaged", shared);
    let again = number(&damaged, "requests", "misses");
    assert!(again > 0 && again < asked, "{damaged}");
    assert!((1..=again).contains(&number(&damaged, "requests", "corrupt")), "{damaged}");
    runs.assert_same("damaged", "without");

    let mended = runs.run("mended", shared);
    assert_eq!(["misses", "corrupt"].map(|name| number(&mended, "requests", name)), [0, 0]);
}

#[test]
fn a_killed_run_finds_what_was_answered_before_it_was_committed() {
    let runs = Runs::new();
    runs.run("expected", "--request-store off");
    let arguments = runs.arguments("killed", "");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut child =
        command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let store = runs.folder("killed/requests");
    let size = || -> u64 { logs(&store).iter().map(|log| log.metadata().unwrap().len()).sum() };
    let start = Instant::now();
    while size() < 300 && child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(300), "nothing was answered");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // Whatever it had committed by then is taken away: only its answers are left.
    let _ = std::fs::remove_file(runs.folder("killed/manifest.jsonl"));
    let summary = runs.run("killed", "");
    let hits = number(&summary, "requests", "hits");
    assert!(hits > 0 && hits + number(&summary, "requests", "misses") == 20, "{summary}");
    assert_eq!(number(&summary, "requests", "corrupt"), 0);
    runs.assert_same("killed", "expected");
}

#[test]
fn a_store_that_is_in_use_or_no_folder_is_named() {
    let runs = Runs::new();
    let shared = runs.folder("shared");
    let store = RequestStore::open(&shared, BYTES_MIN).unwrap();
    let check = |more: &str, said: &str| {
        let output = runs.output("run", more);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(said), "{text}");
    };
    check("--request-store PLACE/shared", "shared\" is in use");
    check("--request-store PLACE/documents.jsonl", "documents.jsonl\" is no folder");
    check("--request-store-mib 0", "--request-store-mib");
    drop(store);
    runs.run("run", "--request-store PLACE/shared --request-store-mib 1");
}

/// Settings of a run whose synthesizer follows a script, and whose pairs are judged.
fn scripted_run(place: &Path, out: &str, workers: usize) -> Settings {
    let input = place.join("documents.jsonl");
    let document = |i: usize| {
        let text = format!("Text {} says that {} is so.", i % 31, i % 31 * 7);
        format!("{}\n", json!({ "id": i.to_string(), "text": text }))
    };
    std::fs::write(&input, (0..70).map(document).collect::<String>()).unwrap();
    small(Small {
        input: vec![input],
        general: Vec::new(),
        out: &place.join(out),
        workers,
        lanes: 1,
        rounds: 2,
        epoch_documents: 8,
        seed: 3,
        flags: &["--agreement".into(), "30".into()],
    })
}

/// Runs a scripted synthesizer behind a store; what the store did.
fn run_scripted(settings: &Settings, store: &Path, disorder: u64) -> BTreeMap<&'static str, u64> {
    let store = RequestStore::open(store, BYTES_MIN).unwrap();
    let counters = store.counters();
    let (engines, jobs) = Queue::new(5);
    let tokenizer = settings.synthesizer.tokenizer.clone();
    scripted(jobs, disorder, move |request| script::answer(request, &tokenizer));
    let store = Arc::new(Mutex::new(store));
    let failed = |error| panic!("{error}");
    let (queue, thread) = front::start(&engines, Identity::new("script"), store, failed).unwrap();
    let plan = Plan::new(settings).unwrap();
    let parts = Arc::new(Parts::around(settings, &plan, queue, None).unwrap());
    execute(settings.engine.workers, parts, instruct::dataflow).unwrap();
    thread.join().unwrap();
    counters.figures().into()
}

#[test]
fn the_dataflow_behind_a_store_equals_the_plain_loop() {
    let place = tempfile::tempdir().unwrap();
    let store = place.path().join("store");
    let expected = scripted_run(place.path(), "expected", 1);
    let tokenizer = expected.synthesizer.tokenizer.clone();
    let failures = std::cell::Cell::new(0);
    reference::run(&expected, |request| {
        let answer = script::answer(request, &tokenizer);
        failures.set(failures.get() + u64::from(matches!(answer.1, Finish::Failed(_))));
        answer
    });
    assert!(failures.get() > 0, "the script fails now and then");
    let run = |out: &str, workers: usize| {
        let settings = scripted_run(place.path(), out, workers);
        let figures = run_scripted(&settings, &store, workers as u64);
        assert_same(&settings.out, &expected.out, |_| false);
        figures
    };
    let cold = run("cold", 2);
    assert!(cold["hits"] + cold["joined"] > 0, "texts come again: {cold:?}");
    assert!(cold["written"] > 0);
    let warm = run("warm", 4);
    assert_eq!(warm["written"], 0);
    assert!(warm["misses"] > 0 && warm["misses"] <= failures.get(), "{warm:?}");
    damage(&store, 500);
    let damaged = run("damaged", 1);
    assert!(damaged["corrupt"] > 0 && damaged["written"] > 0, "{damaged:?}");
    assert_eq!(run("mended", 2)["written"], 0);
}
