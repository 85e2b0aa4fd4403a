//! The program as its users meet it: flags, exit codes, what it prints, what it leaves.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The program with these arguments.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headwater-under-test"));
    command.args(arguments);
    command
}

fn run(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

pub(crate) fn check(arguments: &[&str], status: i32, said: &str) -> String {
    let output = run(arguments);
    let text = [&output.stdout[..], &output.stderr].concat();
    let text = String::from_utf8(text).unwrap();
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {text}");
    assert!(text.contains(said), "{arguments:?} does not say {said:?}: {text}");
    String::from_utf8(output.stdout).unwrap()
}

/// Writes a few documents and general instructions.
pub(crate) fn corpus(folder: &Path) -> (PathBuf, PathBuf) {
    let documents = folder.join("documents.jsonl");
    let text: String = (0..20)
        .map(|i| {
            let text = format!(
                "In {} patients the drug lowered the mean pressure by {i} mm Hg within {} weeks. \
                 The effect was greater in women than in men.",
                100 + i * 7,
                i + 2
            );
            format!("{}\n", serde_json::json!({ "id": format!("doc-{i}"), "text": text }))
        })
        .collect();
    std::fs::write(&documents, text).unwrap();
    let general = folder.join("general.jsonl");
    let text: String = (0..30)
        .map(|i| {
            let (instruction, response) = (format!("What is {i} + {i}?"), format!("{}.", 2 * i));
            format!("{}\n", serde_json::json!({ "instruction": instruction, "response": response }))
        })
        .collect();
    std::fs::write(&general, text).unwrap();
    (documents, general)
}

/// The arguments of a small, whole run, with answers that are long enough to hold pairs.
pub(crate) fn small_run(documents: &Path, general: &Path, out: &Path) -> Vec<String> {
    let [documents, general, out] = [documents, general, out].map(|path| path.to_str().unwrap());
    format!(
        "pubmed --input {documents} --general {general} --out {out} --model 2m --length 128 --batch 2 \
         --new-tokens 80 --epoch-documents 6 --checkpoint-every 3 --progress none"
    )
    .split(' ')
    .map(str::to_owned)
    .collect()
}

#[test]
fn wrong_use_is_explained_before_anything_is_spent() {
    let place = tempfile::tempdir().unwrap();
    let (documents, _) = corpus(place.path());
    let documents = documents.to_str().unwrap();
    let out = place.path().join("run");
    let out = out.to_str().unwrap();
    check(&[], 2, "Usage");
    for name in ["pubmed", "tune", "train", "inspect"] {
        check(&[name], 2, "Example");
    }
    let small = ["pubmed", "--input", documents, "--out", out, "--cache-mib", "1"];
    check(&[&small[..], &["--dry-run"]].concat(), 2, "less than the 2048 of one sequence");
    let nowhere = ["pubmed", "--input", documents, "--out", out, "--request-store", ""];
    check(&nowhere, 2, "--request-store takes a directory");
    check(&["pubmed", "--out", "x"], 2, "--input");
    check(&["pubmed", "--input", "/no/such/file", "--out", out], 2, "/no/such/file");
    let base = ["pubmed", "--input", documents, "--out", out];
    let with = |more: &[&'static str]| -> Vec<&str> { [&base[..], more].concat() };
    check(&with(&["--rounds", "0"]), 2, "--rounds");
    check(&with(&["--epoch-documents", "100"]), 2, "multiple");
    check(&with(&["--ratio", "1:1"]), 2, "--general");
    check(&with(&["--ratio", "x"]), 2, "--ratio");
    check(&with(&["--model", "enormous"]), 2, "enormous");
    check(&with(&["--synthesizer", "/no/model"]), 2, "/no/model");
    check(&with(&["--device", "cuda:0"]), 2, "cuda");
    check(&with(&["--progress", "loud"]), 2, "loud");
    check(&["inspect", out], 2, "run.json");
    check(&["train", "--shards", out, "--out", out], 2, "run.json");
    assert!(!Path::new(out).exists(), "wrong use leaves no folder behind");
    check(&["--help"], 0, "demo");
    check(&["pubmed", "--help"], 0, "Example");
}

#[test]
fn a_dry_run_shows_the_plan_and_does_nothing() {
    let place = tempfile::tempdir().unwrap();
    let (documents, general) = corpus(place.path());
    let out = place.path().join("run");
    let mut arguments = small_run(&documents, &general, &out);
    arguments.push("--dry-run".into());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    check(&arguments, 0, "20 documents");
    check(&arguments, 0, "in matrix products alone");
    assert!(!out.exists());
    let [documents, out] = [&documents, &out].map(|path| path.to_str().unwrap());
    let text = ["bench", "text", "--input", documents, "--out", out, "--dry-run"];
    check(&text, 0, "20 documents");
    assert!(!Path::new(out).exists());
}

#[test]
fn tasks_of_scratch_last_as_long_as_the_texts_that_are_read() {
    let place = tempfile::tempdir().unwrap();
    let (documents, _) = corpus(place.path());
    let rows = place.path().join("rows.jsonl");
    let row = serde_json::json!({
        "dataset": "sums",
        "text": "Ann has 3 apples and Ben has 4 pears, which they share with nobody at all.",
        "pairs": [{ "question": "How many apples?", "answer": "3" }],
    });
    std::fs::write(&rows, format!("{row}\n")).unwrap();
    let [documents, rows] = [&documents, &rows].map(|path| path.to_str().unwrap());
    let out = place.path().join("run");
    let mix = |limit: &str| {
        let plan = ["scratch", "--input", documents, "--tasks", rows, "--limit", limit];
        let more = ["--model", "2m", "--out", out.to_str().unwrap(), "--dry-run"];
        let output = run(&[&plan[..], &more].concat());
        let said = String::from_utf8(output.stderr).unwrap();
        let share = said.split("augmented : tasks = ").nth(1).unwrap_or_else(|| panic!("{said}"));
        share.split(':').next().unwrap().to_owned()
    };
    assert_eq!(mix("20"), mix("1000"));
    assert_ne!(mix("2"), mix("20"));
}

#[test]
fn a_run_can_be_inspected_and_trained_on() {
    let place = tempfile::tempdir().unwrap();
    let (documents, general) = corpus(place.path());
    let out = place.path().join("run");
    let arguments = small_run(&documents, &general, &out);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let printed = check(&arguments, 0, "what became of everything");
    assert!(printed.contains("unknown      0"), "{printed}");
    let ledger: Value =
        serde_json::from_slice(&std::fs::read(out.join("ledger.json")).unwrap()).unwrap();
    assert_eq!(ledger["unknown"], 0);
    assert_eq!(ledger["counts"]["read/documents"], 20);
    assert_eq!(ledger["counts"]["train/waiting"], Value::Null);

    // Again: nothing is done twice. With other settings: refused, with the difference.
    check(&arguments, 0, "what became of everything");
    let other = [&arguments[..], &["--seed", "7"]].concat();
    check(&other, 2, "seed: 1 in the folder, 7 now");

    let run = out.to_str().unwrap();
    check(&["inspect", run], 0, "unknown 0");
    check(&["inspect", run, "--sequence", "0"], 0, "tokens 0 to");
    check(&["inspect", run, "--sequence", "0"], 0, "round 0: tokens 0 to");
    check(&["inspect", run, "--sequence", "99999"], 1, "no sequence 99999");
    let printed = check(&["inspect", run, "--document", "doc-3", "--json"], 0, "doc-3");
    let shown: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(shown["rendered"].as_array().unwrap().len(), 1);
    assert!(!shown["packed"].as_array().unwrap().is_empty());
    check(&["inspect", run, "--document", "doc-3"], 0, "packed in sequence");
    check(&["inspect", run, "--document", "nobody"], 1, "nobody");

    let again = place.path().join("again");
    let again = again.to_str().unwrap();
    let train = ["train", "--shards", run, "--model", "2m", "--out", again, "--batch", "2"];
    let train = [&train[..], &["--epochs", "2", "--progress", "none", "--json"]].concat();
    let printed = check(&train, 0, "loss");
    let summary: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(summary["ledger"]["unknown"], 0);
    let (first, last) = (&summary["first"]["loss"], &summary["last"]["loss"]);
    assert!(last.as_f64() < first.as_f64(), "{summary}");
    check(&["inspect", again], 0, "unknown 0");
    check(&["inspect", again, "--sequence", "0"], 1, "none of its own");

    let plan = |more: &[&str], status, said| {
        let other = place.path().join("other");
        let train = ["train", "--shards", run, "--out", other.to_str().unwrap(), "--dry-run"];
        check(&[&train[..], more].concat(), status, said);
    };
    plan(&["--published", "500m"], 0, "200000 steps of 256 sequences");
    plan(&["--published", "nobody"], 2, "not \"nobody\"");
    plan(&["--model", "2m", "--epochs", "384307168202282326"], 2, "--epochs");
}

#[test]
fn the_engine_is_measured_on_random_prompts_and_on_chains_of_texts() {
    let documents = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/samples/biomedicine.xml");
    let random =
        "bench synth --model 2m --dtype bf16 --requests 6 --prompt-tokens 40 --output-tokens 5";
    let chains = format!(
        "bench synth --prompts {} --rounds 2 --requests 8 --output-tokens 80 --sequences 3",
        documents.display()
    );
    for (arguments, requests, shared) in [(random, 6, false), (&chains, 8, true)] {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let output = check(&arguments, 0, "ceilings");
        let figures: Value = serde_json::from_str(&output).unwrap();
        assert_eq!(figures["requests"], requests);
        assert_eq!(figures["engine"]["requests"], requests);
        assert_eq!(figures["prefix_hit_rate"].as_f64().unwrap() > 0.0, shared, "{figures}");
        let positive = ["requests_per_s", "tokens_per_s", "prefill_tokens_per_s"];
        let also = ["decode_tokens_per_s", "batch_mean", "memory_bytes"];
        for name in positive.iter().chain(&also) {
            assert!(figures[name].as_f64().unwrap() > 0.0, "{name} in {figures}");
        }
        for share in ["prefill_share", "decode_share"] {
            let share = figures["ceiling"][share].as_f64().unwrap();
            assert!(share > 0.0, "{share} in {figures}");
        }
        if !shared {
            assert_eq!(
                (&figures["prompt_tokens"], &figures["output_tokens"]),
                (&240.into(), &30.into())
            );
        }
    }
    let digest = |arguments: &str| {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let figures: Value = serde_json::from_str(&check(&arguments, 0, "ceilings")).unwrap();
        figures["output_digest"].as_str().unwrap().to_owned()
    };
    let expected = digest(&chains);
    assert_eq!(digest(&format!("{chains} --prefix-reuse off --speculation off")), expected);
    assert_ne!(digest(random), digest(&random.replace("--output-tokens 5", "--output-tokens 6")));
    assert_ne!(digest(&chains.replace("--requests 8", "--requests 7")), expected);
    check(&["bench", "synth", "--rounds", "2"], 2, "--prompts");
    check(&["bench", "synth", "--requests", "0"], 2, "--requests must be 1");
    let both = ["bench", "synth", "--prompts", "x", "--prompt-tokens", "9"];
    check(&both, 2, "cannot be used with");
    check(&["bench", "synth", "--speculation", "always"], 2, "wants --prompts");
    check(&["bench", "synth", "--sequences", "1000000000000"], 2, "--sequences takes 1 to");
    check(&["bench", "synth", "--model", "7q"], 2, "7q");
    check(&["bench", "synth", "--prompt-tokens", "2000"], 2, "--output-tokens 128 do not fit");
}

#[test]
fn the_trainer_is_measured_on_random_tokens() {
    for (arguments, items) in [
        ("", 60),
        (" --item-tokens 25 --recompute --micro-batch-tokens 70", 25),
        (" --dtype bf16", 60),
    ] {
        let line = format!("bench train --model 2m --length 60 --batch 2 --steps 2{arguments}");
        let arguments: Vec<&str> = line.split(' ').collect();
        let figures: Value = serde_json::from_str(&check(&arguments, 0, "ceilings")).unwrap();
        assert_eq!(figures["item_tokens"], items);
        let positive = ["tokens_per_s", "step_ms", "mfu", "share_of_ceiling", "memory_bytes"];
        for name in positive {
            assert!(figures[name].as_f64().unwrap() > 0.0, "{name} in {figures}");
        }
        let figure = |name: &str| figures[name].as_f64().unwrap();
        assert!(figure("last_loss") < figure("first_loss"), "{figures}");
        let peak = figures["ceiling"]["peak_operations_per_s"].as_f64().unwrap();
        let of_peak = figure("mfu") * peak / figure("operations_per_s");
        assert!((of_peak - 1.0).abs() < 1e-6, "{of_peak} in {figures}");
        // Six for each parameter, all of which multiply (the head is tied), and a little for attention.
        let of_a_token = figure("operations_per_s") / figure("tokens_per_s");
        let of_parameters = of_a_token / (6.0 * figure("parameters"));
        assert!((1.0..1.1).contains(&of_parameters), "{of_parameters} in {figures}");
    }
    check(&["bench", "train", "--item-tokens", "513"], 2, "--item-tokens");
    check(&["bench", "train", "--model", "7q"], 2, "7q");
    check(&["bench", "train", "--batch", "99999999999999999"], 2, "tokens a step");
}

#[test]
fn strict_runs_tell_that_something_was_rejected() {
    let place = tempfile::tempdir().unwrap();
    let documents = place.path().join("documents.jsonl");
    std::fs::write(&documents, "{\"id\":\"1\",\"text\":\"A text.\"}\nnot json\n").unwrap();
    let out = place.path().join("run");
    let arguments =
        ["pubmed", "--input", documents.to_str().unwrap(), "--out", out.to_str().unwrap()];
    let more = ["--no-train", "--new-tokens", "8", "--progress", "none", "--strict"];
    check(&[&arguments[..], &more].concat(), 3, "malformed");
}

#[test]
fn a_synthesizer_is_tuned_examined_and_accounted_for() {
    let place = tempfile::tempdir().unwrap();
    let rows = place.path().join("rows.jsonl");
    let row = |i: usize| {
        serde_json::json!({
            "dataset": "sums",
            "text": format!("Ann has {i} apples and Ben has {} pears.", i + 1),
            "pairs": [{ "question": "How many apples?", "answer": i.to_string() }],
        })
    };
    let text: String = (0..60).map(|i| format!("{}\n", row(i))).collect();
    std::fs::write(&rows, text + "not a row\n").unwrap();
    let (rows, out) = (rows.to_str().unwrap(), place.path().join("tuned"));
    let arguments = format!(
        "tune --input {rows} --held-out {rows} --base 2m --vocabulary 400 --length 256 --epochs 4 --batch \
         2 --rate 3e-3 --warmup 2 --exam-rows 3 --progress none --out {}",
        out.to_str().unwrap()
    );
    let arguments: Vec<&str> = arguments.split(' ').collect();
    check(&arguments, 0, "0 unknown");
    check(&arguments, 0, "answer F1");
    let read = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(out.join(name)).unwrap()).unwrap()
    };
    assert_eq!(read("ledger.json")["counts"]["tune/rows"], 61);
    assert_eq!(read("ledger.json")["counts"]["tune/used"], 60);
    assert_eq!(read("ledger.json")["counts"]["held_out/used"], 60);
    assert_eq!(read("ledger.json")["counts"]["held_out/rejected/malformed_row"], 1);
    assert!(out.join("rejected/held_out.jsonl.zst").exists());
    check(&["inspect", out.to_str().unwrap()], 0, "unknown 0");
    check(&[&arguments[..], &["--strict"]].concat(), 3, "held_out/rejected/malformed_row");
    let evaluation = read("evaluation.json");
    assert_eq!(evaluation["scores"]["texts"], 3);
    assert!(evaluation["loss_last"].as_f64() < evaluation["loss_first"].as_f64());
    let other = [&arguments[..], &["--epochs", "9"]].concat();
    check(&other, 2, "epochs");
}
