//! Runs that are killed or stopped go on and end with the same bytes, also with their threads split.

use crate::program::{command, corpus, small_run};
use headwater_tests::folders::assert_same;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

fn run(arguments: &[String]) {
    run_on(None, arguments);
}

/// Runs the program, with so many threads.
fn run_on(threads: Option<usize>, arguments: &[String]) {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let threads = threads.map(|threads| ("RAYON_NUM_THREADS", threads.to_string()));
    let output = command(&arguments).envs(threads).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Starts the run and ends it after a while; whether it was still running.
fn interrupt(arguments: &[String], after: Duration, signal: &str) -> bool {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut child =
        command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(after);
    let was_running = child.try_wait().unwrap().is_none();
    let id = child.id().to_string();
    let kill = std::process::Command::new("kill").args([signal, &id]).status();
    assert!(kill.unwrap().success() || !was_running);
    child.wait().unwrap();
    was_running
}

/// Everything but clocks and what was answered in which order: data, account, the last checkpoint, and the losses.
fn assert_same_run(left: &Path, right: &Path) {
    let is_checkpoint = |name: &Path| name.starts_with("checkpoints");
    let is_store = |name: &Path| name.starts_with("requests");
    assert_same(left, right, |name| is_measured(name) || is_checkpoint(name) || is_store(name));
    let [last, twin] = [left, right].map(last_checkpoint);
    assert_eq!(last.file_name(), twin.file_name());
    assert_same(&last, &twin, |_| false);
    assert_same_steps(left, right);
}

fn last_checkpoint(run: &Path) -> PathBuf {
    let folder = std::fs::read_dir(run.join("checkpoints")).unwrap();
    folder.map(|entry| entry.unwrap().path()).max().unwrap()
}

/// Whether a file of a training holds clocks.
pub(crate) fn is_measured(name: &Path) -> bool {
    let names = ["metrics.jsonl", "engine.jsonl", "report.html"].map(Path::new);
    names.contains(&name) || name.starts_with("tensorboard")
}

/// What `metrics.jsonl` says of a step, but for clocks.
const OF_A_STEP: [&str; 12] = [
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "learned",
    "tokens_total",
    "next_sequence",
    "skipped",
    "skipped_total",
    "sources",
    "rounds",
];

/// The same steps with the same figures, but for clocks.
pub(crate) fn assert_same_steps(left: &Path, right: &Path) {
    let steps = |run: &Path| -> Vec<Vec<Value>> {
        let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|line| OF_A_STEP.map(|name| line[name].clone()).to_vec()).collect()
    };
    let (left, right) = (steps(left), steps(right));
    assert!(!left.is_empty());
    assert_eq!(left, right);
}

fn check(signal: &str) {
    let place = tempfile::tempdir().unwrap();
    let (documents, general) = corpus(place.path());
    let expected = place.path().join("expected");
    let start = Instant::now();
    run(&small_run(&documents, &general, &expected));
    let whole = start.elapsed();
    let found = place.path().join("found");
    let arguments = small_run(&documents, &general, &found);
    let mut interrupted = 0;
    for part in 1..=8 {
        interrupted += u32::from(interrupt(&arguments, whole * part / 8, signal));
    }
    assert!(interrupted > 0, "no run was caught while it ran");
    run(&arguments);
    assert_same_run(&found, &expected);
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    check("-KILL");
}

#[test]
fn a_stopped_run_goes_on_to_the_same_bytes() {
    check("-INT");
}

#[test]
fn training_from_the_shards_ends_with_the_bytes_of_training_beside_synthesis() {
    let place = tempfile::tempdir().unwrap();
    let (documents, general) = corpus(place.path());
    let [beside, behind] = ["beside", "behind"].map(|name| place.path().join(name));
    // A pipeline only estimates how many steps there will be.
    let schedule = ["--steps", "9", "--warmup", "2"].map(str::to_owned);
    let mut arguments = small_run(&documents, &general, &beside);
    arguments.extend(schedule.clone());
    run(&arguments);
    let [shards, out] = [&beside, &behind].map(|path| path.to_str().unwrap());
    let train = format!(
        "train --shards {shards} --out {out} --model 2m --batch 2 --checkpoint-every 3 --progress none"
    );
    let mut arguments: Vec<String> = train.split(' ').map(str::to_owned).collect();
    arguments.extend(schedule);
    run(&arguments);
    let [left, right] = [&beside, &behind].map(|run| last_checkpoint(run));
    assert_eq!(left.file_name(), right.file_name());
    assert_same(&left, &right, |_| false);
    assert_same_steps(&beside, &behind);
}

#[test]
fn a_run_with_split_threads_ends_with_the_same_bytes() {
    let place = tempfile::tempdir().unwrap();
    let (documents, general) = corpus(place.path());
    let [shared, split] = ["shared", "split"].map(|name| place.path().join(name));
    run(&small_run(&documents, &general, &shared));
    let mut arguments = small_run(&documents, &general, &split);
    arguments.extend(["--train-threads", "2"].map(str::to_owned));
    run_on(Some(5), &arguments);
    assert_same_run(&split, &shared);
}
