//! Texts with slots, parsed once. What goes into a slot is never looked at again.

use std::fmt;

/// A place in a text that is filled per pair or per document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Slot {
    /// The document's text.
    Context,
    /// A question.
    Question,
    /// The list of options.
    Options,
    /// The right option as it is shown: its name, or its text.
    OptionAnswer,
    /// An answer in full.
    Answer,
    /// The reasoning before an answer.
    Reasoning,
    /// Numbered questions.
    Questions,
    /// Numbered answers.
    Answers,
    /// All turns of a conversation but the last.
    Dialog,
    /// The last turn.
    LastTurn,
    /// All pairs of a text.
    Pairs,
    /// The input of an example or test.
    Input,
    /// The output of an example or test.
    Output,
    /// Why the output of an example is right.
    Explanation,
}

const NAMES: [(Slot, &str); 14] = [
    (Slot::Context, "context"),
    (Slot::Question, "question"),
    (Slot::Options, "options"),
    (Slot::OptionAnswer, "option_answer"),
    (Slot::Answer, "answer"),
    (Slot::Reasoning, "reasoning"),
    (Slot::Questions, "questions"),
    (Slot::Answers, "answers"),
    (Slot::Dialog, "dialog"),
    (Slot::LastTurn, "last_turn"),
    (Slot::Pairs, "pairs"),
    (Slot::Input, "input"),
    (Slot::Output, "output"),
    (Slot::Explanation, "explanation"),
];

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(slot, _)| slot == self).map(|(_, name)| *name);
        write!(f, "{{{}}}", name.expect("every slot has a name"))
    }
}

/// A text with slots.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pattern {
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Text(String),
    Slot(Slot),
}

impl Pattern {
    /// Parses a text in which `{name}` is a slot.
    ///
    /// # Errors
    /// If a slot is unknown, stands twice, or a brace stands alone.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (mut parts, mut rest) = (Vec::new(), text);
        while let Some(at) = rest.find(['{', '}']) {
            let (before, from) = rest.split_at(at);
            let inside = from.strip_prefix('{').and_then(|from| from.split_once('}'));
            let (name, after) =
                inside.ok_or_else(|| format!("a brace stands alone in {text:?}"))?;
            let slot = NAMES.iter().find(|(_, known)| *known == name).map(|(slot, _)| *slot);
            let slot = slot.ok_or_else(|| format!("there is no slot {{{name}}}"))?;
            if parts.contains(&Part::Slot(slot)) {
                return Err(format!("slot {slot} stands twice"));
            }
            if !before.is_empty() {
                parts.push(Part::Text(before.to_owned()));
            }
            parts.push(Part::Slot(slot));
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Ok(Pattern { parts })
    }

    /// The slots, in order.
    pub fn slots(&self) -> impl Iterator<Item = Slot> {
        self.parts.iter().filter_map(|part| match part {
            Part::Slot(slot) => Some(*slot),
            Part::Text(_) => None,
        })
    }

    /// Whether the text has this slot.
    pub fn has(&self, slot: Slot) -> bool {
        self.slots().any(|own| own == slot)
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The text with every slot filled.
    ///
    /// # Panics
    /// If `values` lacks a slot: the loader has checked what each family may use.
    pub fn fill(&self, values: &[(Slot, &str)]) -> String {
        let mut text = String::new();
        for part in &self.parts {
            text += match part {
                Part::Text(text) => text,
                Part::Slot(slot) => {
                    let value = values.iter().find(|(own, _)| own == slot).map(|(_, value)| *value);
                    value.unwrap_or_else(|| panic!("nothing to put into {slot}"))
                }
            };
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Result<&str, &str>) {
        let values = [(Slot::Question, "What {answer}?"), (Slot::Answer, "{}")];
        let filled = Pattern::parse(text).map(|pattern| pattern.fill(&values));
        assert_eq!(filled, expected.map(str::to_owned).map_err(str::to_owned));
    }

    #[test]
    fn slots_are_filled_and_content_is_not_scanned() {
        check("Q: {question}\nA: {answer}.", Ok("Q: What {answer}?\nA: {}."));
        check("{answer}{question}", Ok("{}What {answer}?"));
        check("", Ok(""));
    }

    #[test]
    fn mistakes_are_named() {
        check("{Question}", Err("there is no slot {Question}"));
        check("{question} or {question}", Err("slot {question} stands twice"));
        check("{question", Err("a brace stands alone in \"{question\""));
        check("a } b", Err("a brace stands alone in \"a } b\""));
    }
}
