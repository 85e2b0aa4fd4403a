//! Texts of evaluation sets that must not be trained on.
//!
//! A text is contaminated if it shares a run of so many words with an evaluation set (13 in Brown et al.,
//! 2020; arXiv 2005.14165, appendix C). Runs are compared by 64-bit digests of their words.

use super::words;
use crate::error::Result;
use crate::format::lines::Lines;
use serde_json::Value;
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_64;

/// The runs of words of evaluation sets.
#[derive(Clone, Debug)]
pub struct Contamination {
    words: usize,
    runs: Arc<HashSet<u64>>,
}

impl Contamination {
    /// Reads evaluation sets: lines of text, or JSON objects whose strings, at any depth, are texts.
    ///
    /// # Errors
    /// If a file cannot be opened.
    ///
    /// # Panics
    /// If runs have no words.
    pub fn read(files: &[PathBuf], words: usize) -> Result<Self> {
        assert!(words > 0, "a run has words");
        let mut contamination = Contamination { words, runs: Arc::default() };
        let mut runs = HashSet::new();
        for file in files {
            for (line, _) in Lines::open(file)?.flatten() {
                match serde_json::from_str::<Value>(&line) {
                    Ok(value) => texts(&value, &mut |text| runs.extend(contamination.runs(text))),
                    Err(_) => runs.extend(contamination.runs(&line)),
                }
            }
        }
        contamination.runs = Arc::new(runs);
        Ok(contamination)
    }

    /// Whether a text shares a run of words with an evaluation set.
    pub fn holds(&self, text: &str) -> bool {
        !self.runs.is_empty() && self.runs(text).any(|run| self.runs.contains(&run))
    }

    /// Number of different runs.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether nothing is kept out.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    fn runs(&self, text: &str) -> impl Iterator<Item = u64> + use<> {
        let words: Vec<String> = words(text).collect();
        let runs: Vec<u64> =
            words.windows(self.words).map(|run| xxh3_64(run.join(" ").as_bytes())).collect();
        runs.into_iter()
    }
}

/// Calls `with` on every string in a value.
fn texts(value: &Value, with: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => with(text),
        Value::Array(values) => values.iter().for_each(|value| texts(value, with)),
        Value::Object(fields) => fields.values().for_each(|value| texts(value, with)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, held: bool) {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let files = [
            write(
                "a.jsonl",
                r#"{"q": {"stem": "Which of the five rates rose most?"}, "a": ["No"]}"#,
            ),
            write("b.txt", "a line of plain words here\n"),
        ];
        let contamination = Contamination::read(&files, 5).unwrap();
        assert_eq!(contamination.len(), 3 + 2);
        assert_eq!(contamination.holds(text), held, "{text}");
    }

    #[test]
    fn a_shared_run_of_words_is_found_however_it_is_written() {
        check("He asked: WHICH of the five -- rates?", true);
        check("It is a LINE of plain words.", true);
        check("a line of plain cloth and other words here", false);
        check("", false);
    }

    #[test]
    fn without_files_nothing_is_kept_out() {
        let contamination = Contamination::read(&[], 5).unwrap();
        assert!(contamination.is_empty() && !contamination.holds("a b c d e f"));
    }
}
