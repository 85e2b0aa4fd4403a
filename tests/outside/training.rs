//! Training from outside: killed at any moment, measured on texts that are held out, told how to go on.

use crate::crash::{assert_same_steps, is_measured};
use crate::program::{check, command, corpus, small_run};
use headwater_tests::folders::{assert_same, tree};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// Arguments that hold no spaces.
fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// Texts that are held out: two sources, one of them with two records that cannot be used.
fn held_out(folder: &Path) -> [PathBuf; 2] {
    let text = "The drug lowered the mean pressure within five weeks, in women more than in men.";
    let web = folder.join("web.jsonl");
    let line = serde_json::json!({ "text": text });
    std::fs::write(&web, format!("{line}\nno json\n{{}}\n{line}\n")).unwrap();
    let books = folder.join("books.txt");
    std::fs::write(&books, "It was the best of times, it was the worst of times.").unwrap();
    [web, books]
}

/// The shards of a small run, to be trained on.
fn shards(folder: &Path) -> PathBuf {
    let (documents, general) = corpus(folder);
    let run = folder.join("shards");
    let arguments = small_run(&documents, &general, &run).join(" ");
    let arguments =
        arguments.replace("--batch 2", "--no-train").replace("--checkpoint-every 3", "");
    check(&words(&arguments), 0, "what became of everything");
    run
}

fn training(shards: &Path, out: &Path, [web, books]: &[PathBuf; 2]) -> String {
    format!(
        "train --shards {} --out {} --model 2m --batch 2 --epochs 3 --schedule wsd --decay-share 50 \
         --hidden-dropout 0.1 --on-spike skip --on-nonfinite skip --checkpoint-every 1 --keep-checkpoints 2 --keep-every 4 \
         --eval {} {} --eval-every 3 --progress none",
        shards.display(),
        out.display(),
        web.display(),
        books.display(),
    )
}

/// The steps of which there are checkpoints in a run, and of those that are being written or removed.
fn checkpoints(run: &Path) -> (Vec<u64>, Vec<u64>) {
    let (mut written, mut writing) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(run.join("checkpoints")).into_iter().flatten() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        match name.strip_prefix(".step-").and_then(|name| name.strip_suffix(".tmp")) {
            Some(step) => writing.push(step.parse().unwrap()),
            None => written.push(name.strip_prefix("step-").unwrap().parse().unwrap()),
        }
    }
    written.sort_unstable();
    (written, writing)
}

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// When a run is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// A step was made.
    Stepped,
    /// Held-out texts were measured.
    Measured,
    /// A checkpoint is being written or removed.
    Writing,
    /// A checkpoint is there.
    Written,
}

impl Moment {
    /// Starts the program and kills it once the moment has come; whether it came before the end.
    fn kill(self, arguments: &str, run: &Path) -> bool {
        let metrics = run.join("metrics.jsonl");
        let evaluations = run.join("eval.jsonl");
        let newest = || checkpoints(run).0.last().copied();
        let before = (lines(&metrics), lines(&evaluations), newest());
        let mut swept = false; // of what an earlier kill left
        let mut has_come = || match self {
            Moment::Stepped => lines(&metrics) > before.0 + 1,
            Moment::Measured => lines(&evaluations) > before.1,
            Moment::Writing => {
                let nothing = checkpoints(run).1.is_empty();
                swept |= nothing;
                swept && !nothing
            }
            Moment::Written => newest() > before.2,
        };
        let mut command = command(&words(arguments));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while child.try_wait().unwrap().is_none() {
            if has_come() {
                child.kill().unwrap();
                child.wait().unwrap();
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

#[test]
fn training_that_is_killed_at_any_moment_ends_with_the_same_bytes() {
    let place = tempfile::tempdir().unwrap();
    let (shards, held_out) = (shards(place.path()), held_out(place.path()));
    let expected = place.path().join("expected");
    check(&words(&training(&shards, &expected, &held_out)), 0, "perplexity");
    let found = place.path().join("found");
    let again = training(&shards, &found, &held_out);

    use Moment::{Measured, Stepped, Writing, Written};
    let mut torn = 0;
    for moment in [Measured, Writing, Written, Writing, Stepped, Writing, Measured, Writing] {
        assert!(moment.kill(&again, &found), "the run ended before {moment:?}");
        torn += checkpoints(&found).1.len();
    }
    assert!(torn > 0, "no checkpoint was caught while it was written");
    check(&words(&again), 0, "perplexity");

    assert_same_steps(&found, &expected);
    assert_same(&found, &expected, is_measured);
    let (written, writing) = checkpoints(&found);
    let last = *written.last().unwrap();
    let kept = (1..=last).filter(|step| step % 4 == 0 || *step > last - 2);
    assert_eq!((written, writing), (kept.collect(), Vec::new()));
    let measured = (0..=last).filter(|step| step % 3 == 0 || *step == last).count();
    assert_eq!(lines(&found.join("eval.jsonl")), 2 * measured);

    // Done is done: the same command changes nothing, but for events, which are made anew.
    let files = || {
        let mut files = tree(&found);
        files.retain(|name, _| !name.starts_with("tensorboard"));
        files
    };
    let before = files();
    check(&words(&again), 0, "perplexity");
    assert!(files() == before);
    let other = again.replace("--hidden-dropout 0.1", "--hidden-dropout 0.2");
    check(&words(&other), 2, "training.dropout.probability: 0.1 in the folder, 0.2 now");
}

#[test]
fn a_stop_does_not_wait_for_what_is_measured_and_loses_none_of_it() {
    let place = tempfile::tempdir().unwrap();
    let (shards, held_out) = (shards(place.path()), held_out(place.path()));
    let text = "The fever fell on the second day, and the cough on the fourth. ".repeat(6000);
    std::fs::write(&held_out[1], text).unwrap();
    let line =
        |out: &Path| training(&shards, out, &held_out).replace("--eval-every 3", "--eval-every 50");
    let [expected, found] = ["expected", "found"].map(|name| place.path().join(name));
    check(&words(&line(&expected)), 0, "perplexity");

    let mut program = command(&words(&line(&found)));
    let mut child = program.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !found.join("eval.jsonl").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it measured anything");
        std::thread::sleep(Duration::from_millis(1));
    }
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(kill.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!((lines(&found.join("eval.jsonl")), checkpoints(&found).0), (0, Vec::new()));
    check(&["inspect", found.to_str().unwrap()], 0, "it has not ended");

    check(&words(&line(&found)), 0, "perplexity");
    assert_same_steps(&found, &expected);
    assert_same(&found, &expected, is_measured);
}

#[test]
fn held_out_texts_are_measured_while_a_run_trains_and_bad_ones_are_counted() {
    let place = tempfile::tempdir().unwrap();
    let (documents, general) = corpus(place.path());
    let [web, books] = held_out(place.path());
    let out = place.path().join("run");
    let mut arguments = small_run(&documents, &general, &out).join(" ");
    arguments += &format!(" --eval {} {} --eval-every 4", web.display(), books.display());
    arguments += " --steps 77 --warmup 5";
    check(&words(&format!("{arguments} --dry-run")), 0, "web: 2 documents");
    let printed = check(&words(&arguments), 0, "unknown      0");
    assert!(printed.contains("2 records rejected (malformed_json 1, no_text 1)"), "{printed}");

    let text = std::fs::read_to_string(out.join("eval.jsonl")).unwrap();
    let found: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let at = |index: usize| (found[index]["step"].clone(), found[index]["source"].clone());
    assert_eq!((at(0), at(1)), ((0.into(), "web".into()), (0.into(), "books".into())));
    assert_eq!((at(2), at(3)), ((4.into(), "web".into()), (4.into(), "books".into())));
    let loss = |index: usize| found[index]["loss"].as_f64().unwrap();
    assert!(loss(found.len() - 2) < loss(0), "{text}");
    assert!((found[0]["perplexity"].as_f64().unwrap() / loss(0).exp() - 1.0).abs() < 1e-9);

    let json = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(out.join(name)).unwrap()).unwrap()
    };
    let counts = &json("ledger.json")["counts"];
    assert_eq!(counts["held_out/documents/web"], 2);
    assert_eq!(counts["held_out/rejected/no_text"], 1);
    assert!(out.join("rejected/held_out.jsonl.zst").exists());
    assert_eq!(json("run.json")["held_out"]["every"], 4);
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    assert!(metrics.contains("\"general\":{\"learned\":"), "{metrics}");
    for behind_an_evaluation in [0, 4] {
        let line = metrics.lines().nth(behind_an_evaluation).unwrap();
        let line: Value = serde_json::from_str(line).unwrap();
        assert!(line["overhead_ms"].as_f64() > Some(0.0), "{line}");
    }
    refuses_what_is_damaged(&arguments, &out, place.path());

    check(&words(&format!("{arguments} --strict")), 3, "held out");
    let other = arguments.replace("--eval-every 4", "--eval-every 5");
    check(&words(&other), 2, "held_out.every: 4 in the folder, 5 now");

    let again = format!("train --shards {} --out x --dry-run", out.display());
    let planned = |flags: &str| {
        let plan = command(&words(&format!("{again} {flags}"))).output().unwrap();
        let plan = String::from_utf8([plan.stdout, plan.stderr].concat()).unwrap();
        assert!(plan.contains(" steps of "), "{plan}");
        ["77 steps", "warm-up 5"].map(|said| plan.contains(said))
    };
    assert_eq!(planned("--model 2m --batch 2"), [true; 2]);
    assert_eq!(planned("--model 2m --batch 2 --warmup 6"), [true, false]);
    for other in [
        "--model 7m --batch 2",
        "--model 2m",
        "--model 2m --batch 2 --epochs 2",
        "--model 2m --batch 2 --steps 9",
    ] {
        assert_eq!(planned(other), [false; 2], "{other}");
    }
}

/// A line of metrics, and the weights of a model.
fn refuses_what_is_damaged(arguments: &str, out: &Path, place: &Path) {
    let log = out.join("metrics.jsonl");
    let whole = std::fs::read_to_string(&log).unwrap();
    let damaged = whole.replacen("\"step\":3,", "\"step\":x,", 1);
    std::fs::write(&log, &damaged).unwrap();
    check(&words(arguments), 1, "metrics.jsonl\" is damaged");
    assert_eq!(std::fs::read_to_string(&log).unwrap(), damaged, "all other lines are still there");
    std::fs::write(&log, whole).unwrap();

    let last = checkpoints(out).0.pop().unwrap();
    let (from, model) = (out.join(format!("checkpoints/step-{last:08}")), place.join("broken"));
    std::fs::create_dir(&model).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(name), model.join(name)).unwrap();
    }
    std::fs::write(model.join("model.safetensors"), "none").unwrap();
    let new = place.join("new");
    let [shards, model, trained] = [out, &model, &new].map(|path| path.display());
    let train = format!("train --shards {shards} --model {model} --batch 2 --out {trained}");
    check(&words(&train), 1, "broken");
    assert!(!new.exists(), "a model that cannot be loaded leaves no folder behind");
}

#[test]
fn flags_of_training_that_cannot_work_are_explained() {
    let place = tempfile::tempdir().unwrap();
    let (documents, general) = corpus(place.path());
    let base = small_run(&documents, &general, &place.path().join("run")).join(" ");
    let empty = place.path().join("empty.jsonl");
    std::fs::write(&empty, "no json\n").unwrap();
    let empty = empty.display();
    for (flags, said) in [
        ("--schedule linear", "linear"),
        ("--decay-share 20", "--schedule wsd"),
        ("--on-spike ignore", "ignore"),
        ("--keep-every 4", "--checkpoint-every 3"),
        ("--eval-every 4", "--eval <FILE>"),
        ("--hidden-dropout 1", "below 1"),
        ("--eval /no/such/file.txt", "/no/such/file.txt"),
        ("--eval x.pdf", "x.pdf"),
        (&format!("--eval {empty}"), "malformed_json"),
        ("--no-train", "cannot be used with"),
    ] {
        check(&words(&format!("{base} {flags}")), 2, said);
    }
    assert!(!place.path().join("run").exists(), "wrong use leaves no folder behind");
}

/// What a dry run tells of memory, in bytes.
fn told(plan: &str) -> f64 {
    let line = plan.lines().find(|line| line.trim_start().starts_with("memory")).expect(plan);
    let words = words(line);
    let unit = ["kB", "MB", "GB"].iter().position(|unit| words.contains(unit)).expect(line);
    let number = words.iter().find_map(|word| word.parse::<f64>().ok()).expect(line);
    number * 1e3f64.powi(unit as i32 + 1)
}

/// Shards of sequences that are full: texts as they are, without pairs.
fn full_shards(folder: &Path) -> PathBuf {
    let texts: String = (0..20)
        .map(|i| {
            let text: Vec<String> = (0..200).map(|word| format!("word{}", word * i % 97)).collect();
            format!("{}\n", serde_json::json!({ "text": text.join(" ") }))
        })
        .collect();
    let (input, run) = (folder.join("texts.jsonl"), folder.join("run"));
    std::fs::write(&input, texts).unwrap();
    let [input, out] = [&input, &run].map(|path| path.display());
    let arguments = format!(
        "scratch --input {input} --convert 0/1 --no-train --packing concatenate --length 512 --progress none --out {out}"
    );
    check(&words(&arguments), 0, "what became of everything");
    run
}

#[test]
fn a_training_takes_the_memory_that_its_dry_run_tells() {
    let place = tempfile::tempdir().unwrap();
    let shards = full_shards(place.path());
    let ways = [
        "--checkpoint-every 3 --model 10m --batch-tokens 2500",
        "--checkpoint-every 3 --model 10m --batch 1 --recompute",
        "--checkpoint-every 3 --model 10m --batch 2 --train-dtype bf16",
        "--checkpoint-every 3 --model 2m --batch 2 --train-dtype bf16",
        "--checkpoint-every 3 --model 2m --batch 4 --micro-batch-tokens 2048",
        "--checkpoint-every 1 --model 2m --batch 4",
    ];
    let few = format!("train --shards {} --out x --batch-tokens 511", shards.display());
    check(&words(&few), 2, "--batch-tokens 511 holds no sequence of 512 tokens");
    for (which, how) in ways.iter().enumerate() {
        let out = place.path().join(which.to_string());
        let arguments = format!(
            "train --shards {} --out {} --progress none {how}",
            shards.display(),
            out.display()
        );
        let run = |arguments: &str| {
            // Each thread has buffers of its own.
            command(&words(arguments)).env("RAYON_NUM_THREADS", "2").output().unwrap()
        };
        let plan = run(&format!("{arguments} --dry-run"));
        let plan = String::from_utf8([plan.stdout, plan.stderr].concat()).unwrap();
        let told = told(&plan);
        assert!(which > 0 || plan.contains("steps of 4 sequences"), "{plan}");
        assert!(run(&arguments).status.success());
        let lines = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
        let off = last["memory_bytes"].as_f64().unwrap() / told - 1.0;
        assert!(off.abs() < 0.1, "{how}: {off} off the {told} bytes that were told");
    }
}
