//! The scalars of a run as TensorBoard shows them: `tensorboard --logdir RUN`.
//!
//! There is one file of events. When a run goes on it is made anew from `metrics.jsonl` and `eval.jsonl`,
//! under a name behind the old one's, so that steps which were lost in a crash are shown once.

use super::metrics::values;
use anyhow::{Context, Result};
use headwater::format::{durable, events};
use headwater::train::held_out::Evaluation;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What readers look for in the names of files.
const PREFIX: &str = "events.out.tfevents.";

/// What is shown, and which field of a line it is.
const SCALARS: [(&str, &str); 9] = [
    ("train/loss", "loss"),
    ("train/grad_norm", "grad_norm"),
    ("train/lr", "lr"),
    ("train/tokens_per_s", "tokens_per_s"),
    ("train/mfu", "mfu"),
    ("train/data_wait_share", "data_wait_share"),
    ("train/overhead_ms", "overhead_ms"),
    ("train/memory_bytes", "memory_bytes"),
    ("train/device_memory_bytes", "device_memory_bytes"),
];

/// The file of events.
pub(super) struct Board {
    file: File,
    path: PathBuf,
}

impl Board {
    /// Writes a file that shows the lines in the folder of a run and nothing else, at `now` seconds since 1970.
    ///
    /// # Errors
    /// If the folder cannot be read or written.
    pub(super) fn open(run: &Path, now: f64) -> Result<Self> {
        let folder = run.join("tensorboard");
        std::fs::create_dir_all(&folder).with_context(|| format!("could not create {folder:?}"))?;
        let old = old(&folder)?;
        let newest = old.iter().filter_map(|(_, number)| *number).max();
        let number = (now as u64).max(newest.map_or(0, |number| number + 1));
        let path = folder.join(format!("{PREFIX}{number:010}.headwater"));
        let mut bytes = events::start(now);
        bytes.extend(history(run, now)?);
        durable::write(&path, &bytes)?;
        for (name, _) in old {
            let old = folder.join(name);
            std::fs::remove_file(&old).with_context(|| format!("could not remove {old:?}"))?;
        }
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.with_context(|| format!("could not open {path:?}"))?;
        Ok(Board { file, path })
    }

    /// Shows the line of a step.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(super) fn step(&mut self, line: &Value) -> Result<()> {
        self.write(&record(line))
    }

    /// Shows what was measured of held-out sources, at `now` seconds since 1970.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(super) fn evaluations(&mut self, now: f64, evaluations: &[Evaluation]) -> Result<()> {
        let records: Vec<u8> = evaluations.iter().flat_map(|one| evaluation(now, one)).collect();
        self.write(&records)
    }

    fn write(&mut self, records: &[u8]) -> Result<()> {
        self.file.write_all(records).with_context(|| format!("could not write {:?}", self.path))
    }
}

/// The records of all lines in the folder of a run. Evaluations have the time of their step.
fn history(run: &Path, now: f64) -> Result<Vec<u8>> {
    let (mut bytes, mut times) = (Vec::new(), BTreeMap::new());
    for line in values(&run.join("metrics.jsonl"))? {
        times.insert(line["step"].as_u64().unwrap_or(0), line["unix_time"].as_f64().unwrap_or(now));
        bytes.extend(record(&line));
    }
    for line in values(&run.join("eval.jsonl"))? {
        let one: Evaluation = serde_json::from_value(line).context("in eval.jsonl")?;
        let time = times.range(one.step..).next().map_or(now, |(_, time)| *time);
        bytes.extend(evaluation(time, &one));
    }
    Ok(bytes)
}

/// The files of events in a folder, with their numbers.
fn old(folder: &Path) -> Result<Vec<(String, Option<u64>)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if let Some(rest) = name.strip_prefix(PREFIX) {
            let number = rest.split('.').next().and_then(|digits| digits.parse().ok());
            found.push((name, number));
        }
    }
    Ok(found)
}

/// The record of a step. What is null in its line is left out.
fn record(line: &Value) -> Vec<u8> {
    let of_run = SCALARS.map(|(tag, field)| (tag.to_owned(), &line[field]));
    let parts = |field: &str, tag: &'static str| {
        let parts = line[field].as_object().into_iter().flatten();
        parts.map(move |(name, part)| (format!("{tag}/{name}"), &part["loss"]))
    };
    let values: Vec<(String, f32)> = of_run
        .into_iter()
        .chain(parts("sources", "train/loss"))
        .chain(parts("rounds", "train/loss_by_round"))
        .filter_map(|(tag, value)| Some((tag, value.as_f64()? as f32)))
        .collect();
    events::scalars(
        line["unix_time"].as_f64().unwrap_or(0.0),
        line["step"].as_u64().unwrap_or(0),
        values.iter().map(|(tag, value)| (tag.as_str(), *value)),
    )
}

/// The record of an evaluation; nothing if its loss is not finite.
fn evaluation(time: f64, one: &Evaluation) -> Vec<u8> {
    let tag = format!("held_out/{}", one.source);
    let record = |loss| events::scalars(time, one.step, [(tag.as_str(), loss as f32)]);
    one.loss.map(record).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn line(step: u64) -> Value {
        let sources = json!({ "web": { "loss": 2.5, "learned": 4 } });
        let rounds =
            json!({ "0": { "loss": 1.5, "learned": 3 }, "1": { "loss": null, "learned": 1 } });
        json!({
            "step": step, "loss": 3.5, "mfu": null, "lr": 0.1, "unix_time": 7.0, "sources": sources,
            "rounds": rounds,
        })
    }

    fn held_out(step: u64, loss: Option<f64>) -> Evaluation {
        Evaluation { step, source: "books".into(), loss, perplexity: None, tokens: 9 }
    }

    fn write(run: &Path, name: &str, lines: &[Value]) {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(run.join(name), text).unwrap();
    }

    /// The only file of a folder.
    fn bytes(run: &Path) -> Vec<u8> {
        let files: Vec<_> = std::fs::read_dir(run.join("tensorboard")).unwrap().collect();
        assert_eq!(files.len(), 1);
        std::fs::read(files[0].as_ref().unwrap().path()).unwrap()
    }

    #[test]
    fn a_run_that_goes_on_shows_no_step_twice() {
        let place = tempfile::tempdir().unwrap();
        let mut board = Board::open(place.path(), 5.0).unwrap();
        (1..4).for_each(|step| board.step(&line(step)).unwrap());
        write(place.path(), "metrics.jsonl", &[line(1), line(2)]);
        write(place.path(), "eval.jsonl", &[json!(held_out(0, Some(4.0)))]);
        let mut board = Board::open(place.path(), 5.0).unwrap();
        board.step(&line(3)).unwrap();
        board.evaluations(8.0, &[held_out(3, Some(1.0)), held_out(3, None)]).unwrap();
        let (before, after) = (held_out(0, Some(4.0)), held_out(3, Some(1.0)));
        let expected = [
            events::start(5.0),
            record(&line(1)),
            record(&line(2)),
            evaluation(7.0, &before),
            record(&line(3)),
            evaluation(8.0, &after),
        ];
        assert_eq!(bytes(place.path()), expected.concat());
    }

    #[test]
    fn what_is_not_known_is_not_shown() {
        let values = [
            ("train/loss", 3.5),
            ("train/lr", 0.1),
            ("train/loss/web", 2.5),
            ("train/loss_by_round/0", 1.5),
        ];
        assert_eq!(record(&line(1)), events::scalars(7.0, 1, values));
    }
}
