//! The lines a training run writes, and which of them count when it goes on.

use anyhow::{Context, Result, ensure};
use headwater::format::durable;
use headwater::train::StepReport;
use headwater::train::held_out::Evaluation;
use serde::de::DeserializeOwned;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// `metrics.jsonl`: a line a step.
pub(super) struct Metrics {
    file: File,
    path: PathBuf,
}

/// `eval.jsonl`: at every evaluation a line for each source.
pub(super) struct Evaluations {
    path: PathBuf,
    last: Vec<Evaluation>,
}

impl Metrics {
    /// Opens the file for a run that stands behind `step`; returns the reports of the first and the last
    /// step, too.
    ///
    /// # Errors
    /// If it does not hold a line of each of these steps: they were on the disk before the checkpoint was.
    pub(super) fn open(run: &Path, step: u64) -> Result<(Self, Option<(StepReport, StepReport)>)> {
        let path = run.join("metrics.jsonl");
        let text = read(&path)?;
        let kept = steps_behind(&text, step).with_context(|| damaged(&path, step))?;
        keep(&path, kept.iter().map(|(line, _)| *line))?;
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.with_context(|| format!("could not open {path:?}"))?;
        let span = kept.first().zip(kept.last());
        let span = span.map(|((_, first), (_, last))| (first.clone(), last.clone()));
        Ok((Metrics { file, path }, span))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn write(&mut self, line: &serde_json::Value) -> Result<()> {
        writeln!(self.file, "{line}").with_context(|| format!("could not write {:?}", self.path))
    }
}

impl Evaluations {
    /// Opens the file for a run that stands behind `step` and measures so many sources. A run that has not
    /// begun has measured nothing.
    pub(super) fn open(run: &Path, step: u64, sources: usize) -> Result<Self> {
        let path = run.join("eval.jsonl");
        let text = read(&path)?;
        let kept = evaluations_behind(&text, step, sources);
        let kept = kept.with_context(|| damaged(&path, step))?;
        let last = kept.len().saturating_sub(sources);
        let last = kept[last..].iter().map(|(_, evaluation)| evaluation.clone()).collect();
        if path.exists() || sources > 0 {
            keep(&path, kept.iter().map(|(line, _)| *line))?;
        }
        Ok(Evaluations { path, last })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What was measured last.
    pub(super) fn last(&self) -> &[Evaluation] {
        &self.last
    }

    pub(super) fn write(&mut self, evaluations: Vec<Evaluation>) -> Result<()> {
        let mut text = String::new();
        for evaluation in &evaluations {
            text += &serde_json::to_string(evaluation)?;
            text.push('\n');
        }
        let file = OpenOptions::new().append(true).open(&self.path);
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .with_context(|| format!("could not write {:?}", self.path))?;
        self.last = evaluations;
        Ok(())
    }
}

/// What is said of a file that a run cannot go on with.
fn damaged(path: &Path, step: u64) -> String {
    format!("{path:?} is damaged: a run that stands behind step {step} needs all lines up to there")
}

fn steps_behind(text: &str, step: u64) -> Result<Vec<(&str, StepReport)>> {
    let kept = records(text, |report: &StepReport| report.step, step)?;
    for (expected, (number, (_, report))) in (1..).zip(kept.iter().enumerate()) {
        let line = number + 1;
        ensure!(report.step == expected, "line {line} is of step {}, not {expected}", report.step);
    }
    let lines = kept.len() as u64;
    ensure!(lines == step, "it holds the lines of {lines} steps");
    Ok(kept)
}

fn evaluations_behind(text: &str, step: u64, sources: usize) -> Result<Vec<(&str, Evaluation)>> {
    if step == 0 {
        return Ok(Vec::new());
    }
    let mut kept = records(text, |found: &Evaluation| found.step, step)?;
    // Of the last evaluation perhaps only some lines were written.
    kept.truncate(kept.len() / sources.max(1) * sources);
    Ok(kept)
}

/// The lines of a text that count behind `step`, with their records: what follows them is of steps that were lost, and may
/// have been written in part.
fn records<T: DeserializeOwned>(
    text: &str,
    step_of: impl Fn(&T) -> u64,
    step: u64,
) -> Result<Vec<(&str, T)>> {
    let mut kept = Vec::new();
    let mut unreadable = None;
    for (number, line) in text.lines().enumerate() {
        match serde_json::from_str(line) {
            Ok(record) if step_of(&record) > step => break,
            Ok(record) => kept.push((number, line, record)),
            Err(error) => {
                unreadable.get_or_insert((number, error));
            }
        }
    }
    match unreadable {
        Some((at, error)) if kept.last().is_some_and(|(last, ..)| *last > at) => {
            Err(error).with_context(|| format!("line {}", at + 1))
        }
        _ => Ok(kept.into_iter().map(|(_, line, record)| (line, record)).collect()),
    }
}

/// What a file holds, as far as it is text; nothing if it is not there.
fn read(path: &Path) -> Result<String> {
    if !path.exists() {
        return Ok(String::new());
    }
    let bytes = std::fs::read(path).with_context(|| format!("could not read {path:?}"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn keep<'a>(path: &Path, lines: impl Iterator<Item = &'a str>) -> Result<()> {
    let text: String = lines.flat_map(|line| [line, "\n"]).collect();
    Ok(durable::write(path, text.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, step: u64, sources: usize, expected: &str) {
        let kept = evaluations_behind(text, step, sources).unwrap();
        let kept: String = kept.into_iter().flat_map(|(line, _)| [line, "\n"]).collect();
        assert_eq!(kept, expected);
    }

    fn evaluation(step: u64, source: &str) -> String {
        let rest = r#""loss":1.5,"perplexity":4.48,"tokens":9"#;
        format!("{{\"step\":{step},\"source\":\"{source}\",{rest}}}\n")
    }

    #[test]
    fn whole_evaluations_up_to_the_checkpoint_count() {
        let at = |step| evaluation(step, "a") + &evaluation(step, "b");
        let whole = at(0) + &at(4) + &at(8);
        check(&whole, 8, 2, &whole);
        check(&whole, 7, 2, &(at(0) + &at(4)));
        check(&whole, 0, 2, ""); // it will be measured again before the first step
        check(&(at(0) + &evaluation(4, "a")), 4, 2, &at(0));
        check(&(at(0) + "{\"step\":4,\"sou"), 4, 2, &at(0));
        check("", 4, 2, "");
    }

    #[test]
    fn steps_up_to_the_checkpoint_count() {
        let step = |step: u64| {
            format!(
                "{{\"step\":{step},\"loss\":null,\"grad_norm\":1.0,\"lr\":0.1,\"tokens\":1,\"learned\":1,\
                 \"tokens_total\":1,\"next_sequence\":{step},\"skipped\":\"nonfinite\",\
                 \"skipped_total\":1,\"step_ms\":3.1}}\n"
            )
        };
        let text = step(1) + &step(2) + &step(3) + "{\"st";
        let steps = |text: &str, until| -> std::result::Result<Vec<u64>, String> {
            let kept = steps_behind(text, until).map_err(|error| format!("{error:#}"))?;
            Ok(kept.into_iter().map(|(_, report)| report.step).collect())
        };
        assert_eq!(steps(&text, 2), Ok(vec![1, 2]));
        assert_eq!(steps(&text, 3), Ok(vec![1, 2, 3]));
        assert_eq!(steps("", 0), Ok(vec![]));
        let refused = |text: &str, said: &str| {
            let error = steps(text, 3).expect_err("a line is missing");
            assert!(error.contains(said), "{error}");
        };
        refused(&(step(1) + "garbage\n" + &step(3)), "line 2: expected value");
        refused(&(step(1) + &step(3)), "line 2 is of step 3, not 2");
        refused(&(step(1) + &step(2) + "{\"st"), "the lines of 2 steps");
        refused("", "the lines of 0 steps");
    }

    #[test]
    fn an_evaluation_that_cannot_be_read_before_one_that_counts_is_damage() {
        let text = evaluation(0, "a") + "garbage\n" + &evaluation(8, "a");
        let error = evaluations_behind(&text, 8, 1).map(drop).expect_err("damaged");
        assert!(format!("{error:#}").contains("line 2"), "{error:#}");
        assert_eq!(evaluations_behind(&text, 7, 1).map(|kept| kept.len()).ok(), Some(1));
    }
}
