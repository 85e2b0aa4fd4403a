//! General instructions: the other half of a domain-adaptive mix.
//!
//! One JSON object a line, in one of the usual spellings: `instruction` (+ `input`) with `response` or
//! `output`, `question` with `answer` or `response`, `prompt` with `completion`. Each becomes a text:
//! question, one space, response (recipe (h)).

use super::lines::Lines;
use crate::error::Result;
use crate::record::{Place, Rejected, Stage};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// An instruction with its response, as a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Given, or file and line.
    pub id: String,
    /// Question, one space, response.
    pub text: String,
}

/// An instruction, or why a line holds none.
pub type Read = std::result::Result<Instruction, Box<Rejected>>;

const QUESTIONS: [&str; 3] = ["instruction", "question", "prompt"];
const RESPONSES: [&str; 4] = ["response", "output", "answer", "completion"];

/// The instructions of a file.
///
/// # Errors
/// If the file cannot be opened.
pub fn read(path: &Path) -> Result<impl Iterator<Item = Read> + Send + use<>> {
    Ok(Lines::open(path)?.map(|line| {
        let (line, place) = line.map_err(of_mix)?;
        parse(&line, &place).map_err(|(reason, detail)| {
            of_mix(Box::new(Rejected::unread(reason, detail, place, &line)))
        })
    }))
}

fn of_mix(mut rejected: Box<Rejected>) -> Box<Rejected> {
    rejected.stage = Stage::Mix;
    rejected
}

fn parse(line: &str, place: &Place) -> std::result::Result<Instruction, (&'static str, String)> {
    let object: Map<String, Value> =
        serde_json::from_str(line).map_err(|error| ("malformed_json", error.to_string()))?;
    let field = |name: &str| object.get(name).and_then(Value::as_str).map(str::trim);
    let one_of = |names: &[&'static str]| {
        let found = names.iter().find_map(|name| field(name).filter(|text| !text.is_empty()));
        found.ok_or_else(|| ("no_instruction", format!("none of {} is a text", names.join(", "))))
    };
    let (question, response) = (one_of(&QUESTIONS)?, one_of(&RESPONSES)?);
    let question = match field("input").filter(|input| !input.is_empty()) {
        Some(input) => format!("{question}\n{input}"),
        None => question.to_owned(),
    };
    let id = match object.get("id") {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => format!("{}:{}", place.file, place.record),
    };
    Ok(Instruction { id, text: format!("{question} {response}") })
}

/// The instructions of all files in their order, from the beginning again after the last, for ever.
///
/// Each comes with the number of its pass, from 0. What cannot be used is said in the first pass only, so
/// that it is counted once. Ends only when a whole pass finds no instruction.
pub struct Endless {
    files: Vec<PathBuf>,
    next_file: usize,
    open: Option<Box<dyn Iterator<Item = Read> + Send>>,
    pass: u64,
    found_in_pass: bool,
}

impl Endless {
    /// Reads `files` over and over.
    pub fn new(files: Vec<PathBuf>) -> Self {
        Endless { files, next_file: 0, open: None, pass: 0, found_in_pass: false }
    }
}

impl Iterator for Endless {
    type Item = (u64, Read);

    fn next(&mut self) -> Option<(u64, Read)> {
        loop {
            if let Some(read) = self.open.as_mut().and_then(Iterator::next) {
                if read.is_err() && self.pass > 0 {
                    continue;
                }
                self.found_in_pass |= read.is_ok();
                return Some((self.pass, read));
            }
            if self.next_file == self.files.len() {
                if !self.found_in_pass {
                    return None;
                }
                (self.next_file, self.found_in_pass) = (0, false);
                self.pass += 1;
            }
            let path = self.files[self.next_file].clone();
            self.next_file += 1;
            match read(&path) {
                Ok(instructions) => self.open = Some(Box::new(instructions)),
                Err(_) if self.pass > 0 => self.open = None,
                Err(error) => {
                    self.open = None;
                    let place = Place { file: path.display().to_string(), record: 0, byte: 0 };
                    let rejected = Rejected::unread("unreadable_input", error, place, "");
                    return Some((self.pass, Err(of_mix(Box::new(rejected)))));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expected: std::result::Result<&str, &str>) {
        let place = Place { file: "f".into(), record: 1, byte: 0 };
        let found = parse(line, &place).map(|instruction| instruction.text);
        let found = found.as_deref().map_err(|(reason, _)| *reason);
        assert_eq!(found, expected, "{line}");
    }

    #[test]
    fn the_usual_spellings_are_read() {
        check(r#"{"instruction":"Add.","input":"1 2","response":"3"}"#, Ok("Add.\n1 2 3"));
        check(r#"{"instruction":"Say hi.","input":"","output":"Hi."}"#, Ok("Say hi. Hi."));
        check(r#"{"question":"Why?","answer":"So."}"#, Ok("Why? So."));
        check(r#"{"prompt":"Why?","completion":"So."}"#, Ok("Why? So."));
    }

    #[test]
    fn what_is_no_instruction_is_rejected() {
        check(r#"{"instruction":"Add.","response":3}"#, Err("no_instruction"));
        check(r#"{"instruction":" ","response":"3"}"#, Err("no_instruction"));
        check("[1]", Err("malformed_json"));
    }

    #[test]
    fn files_are_read_over_and_over() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, lines: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, lines).unwrap();
            path
        };
        let line = |id: &str| format!("{{\"id\":\"{id}\",\"question\":\"q\",\"answer\":\"a\"}}\n");
        let (a, b) = (write("a", &line("1")), write("b", &(line("2") + "{}\n")));
        let found: Vec<String> = Endless::new(vec![a, b])
            .take(7)
            .map(|(pass, read)| read.map_or("!".into(), |read| format!("{pass}:{}", read.id)))
            .collect();
        assert_eq!(found, ["0:1", "0:2", "!", "1:1", "1:2", "2:1", "2:2"]);
        assert_eq!(Endless::new(vec![write("c", "{}\n")]).count(), 1);
    }
}
