//! Task rows: a text with all its question-answer pairs, to tune a synthesizer with.
//!
//! One JSON object a line. The text is `context` or `text`; the pairs are one of
//! `pairs: [{question, answer}]`, `pairs: [{instruction, response}]`, or the published collection's
//! `QA_list: [{Q, A}]`; the dataset is `dataset` or `rc_name`. Other fields are ignored.

use super::lines::Lines;
use crate::error::Result;
use crate::prompt::Pair;
use crate::record::{Place, Rejected, Stage, excerpt};
use serde::Deserialize;
use std::path::Path;

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// Given, or file and line.
    pub id: String,
    /// Rows of the same dataset are shown together.
    pub dataset: String,
    /// The text.
    pub text: String,
    /// Its pairs.
    pub pairs: Vec<Pair>,
    /// Where the row stands.
    pub place: Place,
}

/// The rows of a file, and the lines that are none.
///
/// # Errors
/// If the file cannot be opened.
pub fn read(
    path: &Path,
) -> Result<impl Iterator<Item = std::result::Result<Task, Box<Rejected>>> + Send + use<>> {
    Ok(Lines::open(path)?.map(|line| line.and_then(|(text, place)| parse(&text, place))))
}

fn parse(line: &str, place: Place) -> std::result::Result<Task, Box<Rejected>> {
    let reject = |reason: &str, detail: String, place: Place| {
        Err(Box::new(Rejected {
            stage: Stage::Tune,
            ..Rejected::unread(reason, detail, place, line)
        }))
    };
    let row: Row = match serde_json::from_str(line) {
        Ok(row) => row,
        Err(error) => return reject("malformed_row", error.to_string(), place),
    };
    let text = row.text.trim();
    if text.is_empty() {
        return reject("empty_text", String::new(), place);
    }
    let pairs = row.pairs.into_iter().map(|RowPair { question, answer }| Pair {
        question: question.trim().to_owned(),
        answer: answer.trim().to_owned(),
    });
    let pairs: Vec<Pair> =
        pairs.filter(|pair| !pair.question.is_empty() && !pair.answer.is_empty()).collect();
    Ok(Task {
        id: row.id.unwrap_or_else(|| format!("{}:{}", place.file, place.record)),
        dataset: row.dataset.unwrap_or_else(|| place.file.clone()),
        text: text.to_owned(),
        pairs,
        place,
    })
}

impl Task {
    /// A rejection of this row.
    pub fn reject(&self, reason: &str, detail: impl ToString) -> Rejected {
        Rejected {
            stage: Stage::Tune,
            reason: reason.into(),
            detail: detail.to_string(),
            ids: vec![self.id.clone()],
            place: self.place.clone(),
            excerpt: excerpt(&self.text),
        }
    }
}

#[derive(Deserialize)]
struct Row {
    id: Option<String>,
    #[serde(alias = "rc_name")]
    dataset: Option<String>,
    #[serde(alias = "context")]
    text: String,
    #[serde(default, alias = "QA_list")]
    pairs: Vec<RowPair>,
}

#[derive(Deserialize)]
struct RowPair {
    #[serde(alias = "instruction", alias = "Q")]
    question: String,
    #[serde(alias = "response", alias = "A")]
    answer: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expected: std::result::Result<(&str, &str, usize), &str>) {
        let found = parse(line, Place { file: "f".into(), record: 3, byte: 9 });
        let found = found.as_ref().map(|t| (t.dataset.as_str(), t.text.as_str(), t.pairs.len()));
        assert_eq!(found.map_err(|rejected| rejected.reason.as_str()), expected);
    }

    #[test]
    fn rows_of_all_spellings_are_read() {
        check(
            r#"{"dataset":"a","context":" t ","pairs":[{"instruction":"q","response":"a","x":1}]}"#,
            Ok(("a", "t", 1)),
        );
        check(r#"{"rc_name":"b","context":"t","QA_list":[{"Q":"q","A":"a"}]}"#, Ok(("b", "t", 1)));
        check(r#"{"text":"t","pairs":[{"question":"q","answer":" "}]}"#, Ok(("f", "t", 0)));
        check(r#"{"text":"t"}"#, Ok(("f", "t", 0)));
    }

    #[test]
    fn what_is_no_row_is_rejected() {
        check(r#"{"text": 5}"#, Err("malformed_row"));
        check(r#"{"text":"t""#, Err("malformed_row"));
        check(r#"{"text":" "}"#, Err("empty_text"));
    }
}
