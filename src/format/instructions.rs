//! General instructions: the other half of a domain-adaptive mix.
//!
//! One JSON object a line, in one of the usual spellings ([`Spelling`]), told apart record by record. Each
//! becomes a text: question, one space, response (recipe (h)); the exchanges of a longer conversation follow
//! each other with a blank line between. System prompts are left out.

use super::lines::Lines;
use crate::error::Result;
use crate::record::{Place, Rejected, Stage};
use serde_json::{Map, Value};
use std::path::Path;

/// An instruction with its response, as a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Given, or file and line.
    pub id: String,
    /// Question, one space, response.
    pub text: String,
    /// How it was written.
    pub spelling: Spelling,
}

/// How instructions are usually written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Spelling {
    /// `instruction`, perhaps `input`, and `response` or `output`.
    Alpaca,
    /// `question` and `answer` or `response`.
    Question,
    /// `prompt` and `completion` or `response`.
    Prompt,
    /// `messages: [{role, content}]`.
    Messages,
    /// `conversations: [{from, value}]`.
    ShareGpt,
}

impl Spelling {
    /// The name in plans.
    pub fn name(self) -> &'static str {
        match self {
            Spelling::Alpaca => "alpaca",
            Spelling::Question => "question and answer",
            Spelling::Prompt => "prompt and completion",
            Spelling::Messages => "messages",
            Spelling::ShareGpt => "ShareGPT",
        }
    }
}

/// An instruction, or why a line holds none.
pub type Read = std::result::Result<Instruction, Box<Rejected>>;

const QUESTIONS: [(&str, Spelling); 3] = [
    ("instruction", Spelling::Alpaca),
    ("question", Spelling::Question),
    ("prompt", Spelling::Prompt),
];
const RESPONSES: [&str; 4] = ["response", "output", "answer", "completion"];

/// Where a conversation stands, and what speaker and text are called in it.
const CONVERSATIONS: [(&str, &str, &str, Spelling); 2] = [
    ("messages", "role", "content", Spelling::Messages),
    ("conversations", "from", "value", Spelling::ShareGpt),
];

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

/// Why a record holds no instruction, and what exactly is wrong.
type Fault = (&'static str, String);

fn parse(line: &str, place: &Place) -> std::result::Result<Instruction, Fault> {
    let object: Map<String, Value> =
        serde_json::from_str(line).map_err(|error| ("malformed_json", error.to_string()))?;
    let conversation = CONVERSATIONS.iter().find_map(|&(name, speaker, text, spelling)| {
        let turns = object.get(name)?.as_array()?;
        Some((exchanges(turns, speaker, text), spelling))
    });
    let (text, spelling) = match conversation {
        Some((text, spelling)) => (text?, spelling),
        None => exchange(&object)?,
    };
    let id = match object.get("id") {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => format!("{}:{}", place.file, place.record),
    };
    Ok(Instruction { id, text, spelling })
}

/// A question with its response, by the names of their fields.
fn exchange(object: &Map<String, Value>) -> std::result::Result<(String, Spelling), Fault> {
    let field = |name: &str| {
        let text = object.get(name).and_then(Value::as_str).map(str::trim);
        text.filter(|text| !text.is_empty())
    };
    let missing = |names: &str| ("no_instruction", format!("none of {names} is a text"));
    let found = QUESTIONS.iter().find_map(|&(name, spelling)| Some((field(name)?, spelling)));
    let (question, spelling) =
        found.ok_or_else(|| missing(&QUESTIONS.map(|(name, _)| name).join(", ")))?;
    let response = RESPONSES.iter().find_map(|name| field(name));
    let response = response.ok_or_else(|| missing(&RESPONSES.join(", ")))?;
    let text = match field("input") {
        Some(input) => format!("{question}\n{input} {response}"),
        None => format!("{question} {response}"),
    };
    Ok((text, spelling))
}

/// The exchanges of a conversation: each question with the response behind it.
fn exchanges(turns: &[Value], speaker: &str, text: &str) -> std::result::Result<String, Fault> {
    let (mut exchanges, mut question) = (Vec::new(), None);
    for turn in turns {
        let said = turn[text].as_str().map(str::trim).filter(|said| !said.is_empty());
        match (turn[speaker].as_str().unwrap_or_default(), said) {
            ("user" | "human", said) => question = said,
            ("assistant" | "gpt", Some(said)) => {
                if let Some(question) = question.take() {
                    exchanges.push(format!("{question} {said}"));
                }
            }
            _ => {}
        }
    }
    match exchanges.is_empty() {
        true => Err(("no_instruction", "no user turn has an answer behind it".into())),
        false => Ok(exchanges.join("\n\n")),
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
    fn conversations_are_exchanges() {
        let turns = r#"{"messages":[{"role":"system","content":"Be kind."},{"role":"user","content":"Why?"},
            {"role":"assistant","content":"So. "},{"role":"user","content":"And?"},
            {"role":"assistant","content":"That."}]}"#;
        check(turns, Ok("Why? So.\n\nAnd? That."));
        let turns = r#"{"conversations":[{"from":"human","value":"Why?"},{"from":"gpt","value":"So."},
            {"from":"human","value":"And?"}]}"#;
        check(turns, Ok("Why? So."));
        check(r#"{"messages":[{"role":"user","content":"Why?"}]}"#, Err("no_instruction"));
        check(r#"{"messages":[{"role":"assistant","content":5},7]}"#, Err("no_instruction"));
    }

    #[test]
    fn the_spelling_is_told_from_the_record() {
        let spelling = |line: &str| parse(line, &Place::default()).unwrap().spelling.name();
        assert_eq!(spelling(r#"{"instruction":"a","output":"b"}"#), "alpaca");
        assert_eq!(spelling(r#"{"prompt":"a","completion":"b"}"#), "prompt and completion");
        assert_eq!(spelling(r#"{"question":"a","response":"b"}"#), "question and answer");
        let turns = r#"[{"from":"human","value":"a"},{"from":"gpt","value":"b"}]"#;
        assert_eq!(spelling(&format!("{{\"conversations\":{turns}}}")), "ShareGPT");
    }

    #[test]
    fn what_is_no_instruction_is_rejected() {
        check(r#"{"instruction":"Add.","response":3}"#, Err("no_instruction"));
        check(r#"{"instruction":" ","response":"3"}"#, Err("no_instruction"));
        check("[1]", Err("malformed_json"));
    }
}
