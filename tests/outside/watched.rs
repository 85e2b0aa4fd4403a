//! What people watch of a training: metrics, TensorBoard's events, the report.

use crate::program::{check, corpus, small_run};
use headwater_pipelines::shell::metrics::{self, Line};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

const TAGS: [&str; 13] = [
    "train/data_wait_share",
    "train/grad_norm",
    "train/loss",
    "train/loss/augmented",
    "train/loss/general",
    "train/loss_by_round/0",
    "train/loss_by_round/1",
    "train/loss_by_round/2",
    "train/lr",
    "train/memory_bytes",
    "train/mfu",
    "train/overhead_ms",
    "train/tokens_per_s",
];

/// Six for each parameter that multiplies, and attention over items of up to 128 tokens (2m).
const FLOPS_OF_A_TOKEN: Range<f64> = 6e6..15e6;

/// A point of a curve: its step, its time in seconds since 1970, its value.
type Point = (u64, f64, f32);

/// A small run that trained; its folder lives as long as the first part.
fn trained() -> (tempfile::TempDir, PathBuf, String) {
    let place = tempfile::tempdir().unwrap();
    let (documents, general) = corpus(place.path());
    let out = place.path().join("run");
    let mut arguments = small_run(&documents, &general, &out);
    arguments.push("--json".into());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let printed = check(&arguments, 0, "");
    (place, out, printed)
}

/// What the lines of `metrics.jsonl` say of a tag.
fn expected(lines: &[Line], tag: &str) -> Vec<Point> {
    let field = tag.strip_prefix("train/").unwrap();
    let point = |line: &Line| {
        let value = serde_json::to_value(line).unwrap();
        let number = match field.split_once('/') {
            Some(("loss", source)) => &value["sources"][source]["loss"],
            Some((_, round)) => &value["rounds"][round]["loss"],
            None => &value[field],
        };
        Some((line.report.step, line.measured.unix_time, number.as_f64()? as f32))
    };
    lines.iter().filter_map(point).collect()
}

#[test]
fn a_training_leaves_metrics_events_and_a_report() {
    let (_place, out, printed) = trained();
    let lines = metrics::lines(&out).unwrap();
    assert!(lines.len() > 3);
    for (line, step) in lines.iter().zip(1..) {
        assert_eq!(line.report.step, step);
        let measured = &line.measured;
        let peak = measured.peak_operations_per_s.unwrap();
        let of_a_token = measured.mfu.unwrap() * peak / measured.tokens_per_s;
        assert!(FLOPS_OF_A_TOKEN.contains(&of_a_token), "{of_a_token}: {measured:?}");
        assert!((0.0..1.0).contains(&measured.data_wait_share), "{measured:?}");
        assert!(measured.memory_bytes > 1 << 20 && measured.peak_operations_per_s > Some(1e9));
    }
    let summary: serde_json::Value = serde_json::from_str(&printed).unwrap();
    let totals = &summary["training"]["totals"];
    assert!(totals["mfu"].as_f64() > Some(0.0) && totals["tokens_per_s"].as_f64() > Some(0.0));

    let curves = curves(&std::fs::read(events(&out)).unwrap());
    assert_eq!(curves.keys().map(String::as_str).collect::<Vec<_>>(), TAGS);
    for (tag, points) in &curves {
        assert_eq!(*points, expected(&lines, tag), "{tag}");
    }

    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    let last = &lines[lines.len() - 1].report;
    assert!(page.contains(&format!("{:.4} at step {}", last.loss, last.step)), "{page}");
    for title in ["Loss by source", "Loss by round"] {
        assert!(page.contains(&format!("<figcaption>{title} <span")), "{title}");
    }
    for title in ["Loss", "Learning rate", "Gradient norm", "Speed", "Waiting for sequences"] {
        assert!(page.contains(&format!("<figcaption>{title}</figcaption>\n<svg")), "{title}");
    }
    assert!(page.contains("unknown") && !page.contains("://"));
}

/// The only file of events of a run.
fn events(run: &Path) -> PathBuf {
    let files = std::fs::read_dir(run.join("tensorboard")).unwrap();
    let files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

/// The curves in a file of events, read without looking at how it was written.
fn curves(mut bytes: &[u8]) -> BTreeMap<String, Vec<Point>> {
    let mut curves: BTreeMap<String, Vec<Point>> = BTreeMap::new();
    while !bytes.is_empty() {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        check_sum(&bytes[..12]);
        check_sum(&bytes[12..][..length + 4]);
        let event = fields(&bytes[12..][..length]);
        bytes = &bytes[length + 16..];
        let time = event.iter().find(|(number, _)| *number == 1).expect("a time").1;
        let time = f64::from_le_bytes(time.try_into().unwrap());
        let step =
            event.iter().find(|(number, _)| *number == 2).map_or(0, |(_, step)| varint(step).0);
        for (_, summary) in event.iter().filter(|(number, _)| *number == 5) {
            for (_, value) in fields(summary) {
                let [(1, tag), (2, number)] = fields(value)[..] else {
                    panic!("a tag and a number")
                };
                let tag = String::from_utf8(tag.to_vec()).unwrap();
                let number = f32::from_le_bytes(number.try_into().unwrap());
                curves.entry(tag).or_default().push((step, time, number));
            }
        }
    }
    curves
}

/// The last four bytes are a rotated checksum of those before and a constant (CRC-32C, bit by bit).
fn check_sum(bytes: &[u8]) {
    let (data, sum) = bytes.split_at(bytes.len() - 4);
    let mut remainder = u32::MAX;
    for byte in data {
        remainder ^= u32::from(*byte);
        for _ in 0..8 {
            remainder = (remainder >> 1) ^ if remainder & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    let expected = (!remainder).rotate_right(15).wrapping_add(0xa282_ead8);
    assert_eq!(u32::from_le_bytes(sum.try_into().unwrap()), expected);
}

/// The numbers of the fields of a message, with their bytes.
fn fields(mut message: &[u8]) -> Vec<(u64, &[u8])> {
    let mut found = Vec::new();
    while !message.is_empty() {
        let (key, size) = varint(message);
        message = &message[size..];
        let (before, length) = match key & 7 {
            0 => (0, varint(message).1),
            1 => (0, 8),
            5 => (0, 4),
            2 => (varint(message).1, varint(message).0 as usize),
            other => panic!("fields of type {other} are not used"),
        };
        found.push((key >> 3, &message[before..before + length]));
        message = &message[before + length..];
    }
    found
}

/// A number of seven bits a byte, and how many bytes it takes.
fn varint(bytes: &[u8]) -> (u64, usize) {
    let size = 1 + bytes.iter().take_while(|byte| **byte >= 0x80).count();
    let number = bytes[..size].iter().rev().fold(0, |sum, byte| sum << 7 | u64::from(byte & 0x7f));
    (number, size)
}

/// Reads all curves and prints them, a point a line.
const READ: &str = "
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
read = EventAccumulator(sys.argv[1], size_guidance={'scalars': 0})
read.Reload()
for tag in read.Tags()['scalars']:
    for point in read.Scalars(tag):
        print(tag, point.step, point.wall_time, point.value)
";

/// Where TensorBoard is: `HEADWATER_PYTHON`, or `python3`.
fn python() -> String {
    std::env::var("HEADWATER_PYTHON").unwrap_or_else(|_| "python3".into())
}

#[test]
fn tensorboard_shows_every_step() {
    let has = Command::new(python()).args(["-c", "import tensorboard"]).output();
    if !has.is_ok_and(|output| output.status.success()) {
        eprintln!(
            "skipped: no TensorBoard; pip install tensorboard, or name a HEADWATER_PYTHON that has it"
        );
        return;
    }
    let (_place, out, _) = trained();
    let lines = metrics::lines(&out).unwrap();
    let folder = out.join("tensorboard");
    let output = Command::new(python()).args(["-c", READ]).arg(&folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut curves: BTreeMap<String, Vec<Point>> = BTreeMap::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let point =
            (words[1].parse().unwrap(), words[2].parse().unwrap(), words[3].parse().unwrap());
        curves.entry(words[0].into()).or_default().push(point);
    }
    assert_eq!(curves.keys().map(String::as_str).collect::<Vec<_>>(), TAGS);
    for (tag, points) in &curves {
        assert_eq!(*points, expected(&lines, tag), "{tag}");
    }
}
