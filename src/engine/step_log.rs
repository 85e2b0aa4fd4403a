//! What the steps of engines did, in a file: a line for so many steps.

use super::metrics::StepMetrics;
use crate::error::{Error, Result};
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Steps of a line at most.
pub const STEPS: u64 = 256;

/// A file that lines are added to.
#[derive(Debug)]
pub struct StepLog {
    path: PathBuf,
    file: File,
    now: fn() -> f64,
    line: Line,
}

/// What some steps did, one after another.
#[derive(Debug, Default, Serialize)]
struct Line {
    /// When the last of them ended.
    unix_time: f64,
    steps: u64,
    steps_ahead: u64,
    seconds: f64,
    /// Sequences of a step, in the mean.
    batch_mean: f64,
    prompt_tokens: u64,
    decode_tokens: u64,
    generated_tokens: u64,
    drafted_tokens: u64,
    accepted_tokens: u64,
    /// Blocks that sequences held, as a share of the cache, in the mean.
    cache_use: f64,
    admitted_tokens: u64,
    cached_tokens: u64,
    /// Of the tokens of prompts that were admitted, those that were in the cache; null if there were none.
    prefix_hit_rate: Option<f64>,
    preemptions: u64,
    evictions: u64,
}

impl StepLog {
    /// Goes on behind what the file holds. A line that was cut off is ended. `now` is the time, in seconds since 1970.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn open(path: &Path, now: fn() -> f64) -> Result<Self> {
        let options = || OpenOptions::new().create(true).read(true).append(true).open(path);
        let mut file = options().map_err(Error::file("open", path))?;
        let mut end = || -> std::io::Result<()> {
            if file.seek(SeekFrom::End(0))? > 0 {
                file.seek(SeekFrom::End(-1))?;
                let mut last = [0];
                file.read_exact(&mut last)?;
                if last != *b"\n" {
                    file.write_all(b"\n")?;
                }
            }
            Ok(())
        };
        end().map_err(Error::file("read", path))?;
        Ok(StepLog { path: path.into(), file, now, line: Line::default() })
    }

    /// Adds a step that took so long.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn note(&mut self, step: &StepMetrics, seconds: f64) -> Result<()> {
        let line = &mut self.line;
        line.steps += 1;
        line.seconds += seconds;
        line.batch_mean += step.sequences as f64;
        line.cache_use += step.blocks_held as f64 / step.blocks.max(1) as f64;
        for (total, amount) in [
            (&mut line.steps_ahead, u64::from(step.is_ahead)),
            (&mut line.prompt_tokens, step.prompt_tokens),
            (&mut line.decode_tokens, step.decode_tokens),
            (&mut line.generated_tokens, step.generated_tokens),
            (&mut line.drafted_tokens, step.drafted_tokens),
            (&mut line.accepted_tokens, step.accepted_tokens),
            (&mut line.admitted_tokens, step.admitted_tokens),
            (&mut line.cached_tokens, step.cached_tokens),
            (&mut line.preemptions, step.preemptions),
            (&mut line.evictions, step.evictions),
        ] {
            *total += amount;
        }
        if line.steps == STEPS { self.end_line() } else { Ok(()) }
    }

    /// Writes the line that has been begun, if there is one.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn end_line(&mut self) -> Result<()> {
        let mut line = std::mem::take(&mut self.line);
        if line.steps == 0 {
            return Ok(());
        }
        line.unix_time = (self.now)();
        line.batch_mean /= line.steps as f64;
        line.cache_use /= line.steps as f64;
        line.prefix_hit_rate = (line.admitted_tokens > 0)
            .then(|| line.cached_tokens as f64 / line.admitted_tokens as f64);
        let text = serde_json::to_string(&line).expect("numbers are JSON");
        let written = self.file.write_all(format!("{text}\n").as_bytes());
        written.map_err(Error::file("write", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn step(sequences: u64) -> StepMetrics {
        StepMetrics { sequences, blocks_held: sequences, blocks: 8, ..StepMetrics::default() }
    }

    fn lines(path: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_default()).collect()
    }

    #[test]
    fn a_line_tells_of_many_steps_and_goes_behind_one_that_was_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("engine.jsonl");
        std::fs::write(&path, "{\"steps\":7}\n{\"ste").unwrap();
        let mut log = StepLog::open(&path, || 5.5).unwrap();
        log.end_line().unwrap();
        log.note(&StepMetrics { admitted_tokens: 100, cached_tokens: 64, ..step(2) }, 0.5).unwrap();
        for _ in 0..STEPS {
            log.note(&step(4), 0.25).unwrap();
        }
        log.end_line().unwrap();
        log.end_line().unwrap();
        let lines = lines(&path);
        assert_eq!(lines.len(), 4, "{lines:?}");
        assert_eq!((&lines[0]["steps"], &lines[1]), (&7.into(), &Value::Null));
        assert_eq!(
            (&lines[2]["steps"], &lines[2]["prefix_hit_rate"]),
            (&STEPS.into(), &0.64.into())
        );
        let mean = (2 + 4 * (STEPS - 1)) as f64 / STEPS as f64;
        assert_eq!(
            (&lines[2]["batch_mean"], &lines[2]["cache_use"]),
            (&mean.into(), &(mean / 8.0).into())
        );
        assert_eq!((&lines[3]["steps"], &lines[3]["prefix_hit_rate"]), (&1.into(), &Value::Null));
        assert_eq!((&lines[3]["seconds"], &lines[3]["unix_time"]), (&0.25.into(), &5.5.into()));
    }
}
