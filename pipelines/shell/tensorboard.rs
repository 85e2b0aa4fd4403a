//! The scalars of a run as TensorBoard shows them: `tensorboard --logdir RUN`.
//!
//! There is one file of events. When a run goes on it is made anew from `metrics.jsonl`, under a name behind
//! the old one's, so that steps which were lost in a crash are shown once.

use anyhow::{Context, Result};
use headwater::format::{durable, events};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

/// What readers look for in the names of files.
const PREFIX: &str = "events.out.tfevents.";

/// What is shown, and which field of a line it is.
const SCALARS: [(&str, &str); 7] = [
    ("train/loss", "loss"),
    ("train/grad_norm", "grad_norm"),
    ("train/lr", "lr"),
    ("train/tokens_per_s", "tokens_per_s"),
    ("train/mfu", "mfu"),
    ("train/data_wait_share", "data_wait_share"),
    ("train/memory_bytes", "memory_bytes"),
];

/// The file of events.
pub(super) struct Board {
    file: File,
}

impl Board {
    /// Writes a file that shows `lines` and nothing else, at `now` seconds since 1970.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(super) fn open(run: &Path, lines: &[Value], now: f64) -> Result<Self> {
        let folder = run.join("tensorboard");
        std::fs::create_dir_all(&folder).with_context(|| format!("could not create {folder:?}"))?;
        let old = old(&folder)?;
        let newest = old.iter().filter_map(|(_, number)| *number).max();
        let number = (now as u64).max(newest.map_or(0, |number| number + 1));
        let path = folder.join(format!("{PREFIX}{number:010}.headwater"));
        let mut bytes = events::start(now);
        lines.iter().for_each(|line| bytes.extend(record(line)));
        durable::write(&path, &bytes)?;
        for (name, _) in old {
            std::fs::remove_file(folder.join(name))?;
        }
        Ok(Board { file: OpenOptions::new().append(true).open(&path)? })
    }

    /// Shows one more line.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(super) fn note(&mut self, line: &Value) -> Result<()> {
        Ok(self.file.write_all(&record(line))?)
    }
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

/// The record of a line. What is null in it is left out.
fn record(line: &Value) -> Vec<u8> {
    let value = |(tag, field): (&'static str, &str)| Some((tag, line[field].as_f64()? as f32));
    let step = line["step"].as_u64().unwrap_or(0);
    events::scalars(
        line["unix_time"].as_f64().unwrap_or(0.0),
        step,
        SCALARS.into_iter().filter_map(value),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn line(step: u64) -> Value {
        json!({ "step": step, "loss": 3.5, "mfu": null, "lr": 0.1, "unix_time": 7.0 })
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
        let mut board = Board::open(place.path(), &[], 5.0).unwrap();
        (1..4).for_each(|step| board.note(&line(step)).unwrap());
        let mut board = Board::open(place.path(), &[line(1), line(2)], 5.0).unwrap();
        board.note(&line(3)).unwrap();
        let records: Vec<u8> = (1..4).flat_map(|step| record(&line(step))).collect();
        assert_eq!(bytes(place.path()), [events::start(5.0), records].concat());
    }

    #[test]
    fn what_is_not_known_is_not_shown() {
        let expected = events::scalars(7.0, 1, [("train/loss", 3.5), ("train/lr", 0.1)]);
        assert_eq!(record(&line(1)), expected);
    }
}
