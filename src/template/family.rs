//! Families of interchangeable texts, and the loader that checks their files.

use super::names::Style;
use super::pattern::{Pattern, Slot};
use crate::seed::Stream;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use toml::Spanned;

/// Entries of which one is chosen, in proportion to their weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family<T> {
    entries: Vec<T>,
    weights: Vec<u64>,
}

impl<T> Family<T> {
    /// Draws the index of an entry.
    pub fn draw(&self, stream: &mut Stream) -> usize {
        stream.weighted(self.weights.iter().copied())
    }

    /// The entry with the given index.
    ///
    /// # Panics
    /// If there is none.
    pub fn get(&self, index: usize) -> &T {
        &self.entries[index]
    }

    /// All entries.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.entries.iter()
    }

    /// The weights of all entries.
    #[cfg(test)]
    pub(super) fn weights(&self) -> &[u64] {
        &self.weights
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Never: the loader refuses an empty family.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// How a pair is written: input prefix, input, delimiter, target prefix, target.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PairPattern {
    input_prefix: String,
    /// What is given.
    pub input: Pattern,
    delimiter: String,
    target_prefix: String,
    /// What is asked for.
    pub target: Pattern,
    /// What stands between pairs.
    pub separator: String,
}

impl PairPattern {
    /// The pair as text.
    pub fn fill(&self, values: &[(Slot, &str)]) -> String {
        [
            self.input_prefix.as_str(),
            &self.input.fill(values),
            &self.delimiter,
            &self.target_prefix,
            &self.target.fill(values),
        ]
        .concat()
    }

    /// Whether the slot is in input or target.
    pub fn has(&self, slot: Slot) -> bool {
        self.input.has(slot) || self.target.has(slot)
    }

    /// Whether the question is given and the answer asked for, so that the two can be turns.
    pub fn is_forward(&self) -> bool {
        let answers = [Slot::Answer, Slot::OptionAnswer];
        self.input.has(Slot::Question) && answers.iter().any(|&slot| self.target.has(slot))
    }
}

/// How few-shot examples and a test are written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct InlinePattern {
    /// Introduces text and examples.
    pub header: Pattern,
    /// One example.
    pub example: Pattern,
    /// The test.
    pub test: Pattern,
    /// What stands between them.
    pub separator: String,
}

/// How the items of a list are named.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Names {
    style: Style,
    before: String,
    after: String,
}

impl Names {
    /// What stands before the item with the given index.
    pub fn name(&self, index: usize) -> String {
        format!("{}{}{}", self.before, self.style.name(index), self.after)
    }

    /// Whether items are told apart by their names.
    pub fn is_enumeration(&self) -> bool {
        self.style != Style::Bullet
    }
}

/// What stands before the turns of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Speakers {
    /// Before questions.
    pub first: String,
    /// Before answers.
    pub second: String,
}

/// A data file with what its entries may hold.
pub(super) struct Source<'a> {
    pub(super) name: &'a str,
    pub(super) text: &'a str,
}

impl Source<'_> {
    /// `[[pattern]]` entries whose input and target together have all of `needed` and none but `allowed`.
    pub(super) fn pairs(
        &self,
        needed: &[Slot],
        allowed: &[Slot],
    ) -> Result<Family<PairPattern>, String> {
        self.load("pattern", |raw: RawPair| {
            let pattern = PairPattern {
                input: Pattern::parse(&raw.input)?,
                target: Pattern::parse(&raw.target)?,
                input_prefix: plain(raw.input_prefix)?,
                delimiter: plain(raw.delimiter)?,
                target_prefix: plain(raw.target_prefix)?,
                separator: plain(raw.separator)?,
            };
            let slots: Vec<Slot> = pattern.input.slots().chain(pattern.target.slots()).collect();
            check_slots(&slots, needed, allowed)?;
            Ok((pattern, raw.weight))
        })
    }

    /// `[[inline]]` entries, explained or not.
    pub(super) fn inlines(&self, explained: bool) -> Result<Family<InlinePattern>, String> {
        self.load("inline", |raw: RawInline| {
            let pattern = InlinePattern {
                header: Pattern::parse(&raw.header)?,
                example: Pattern::parse(&raw.example)?,
                test: Pattern::parse(&raw.test)?,
                separator: plain(raw.separator)?,
            };
            let exactly = |pattern: &Pattern, slots: &[Slot]| {
                check_slots(&pattern.slots().collect::<Vec<_>>(), slots, slots)
            };
            exactly(&pattern.header, &[Slot::Context])?;
            exactly(&pattern.test, &[Slot::Input, Slot::Output])?;
            let example = [Slot::Input, Slot::Output, Slot::Explanation];
            exactly(&pattern.example, if explained { &example } else { &example[..2] })?;
            Ok((pattern, raw.weight))
        })
    }

    /// `[[phrase]]` entries with exactly the given slots.
    pub(super) fn phrases(&self, slots: &[Slot]) -> Result<Family<Pattern>, String> {
        self.load("phrase", |raw: RawPhrase| {
            let pattern = Pattern::parse(&raw.text)?;
            check_slots(&pattern.slots().collect::<Vec<_>>(), slots, slots)?;
            Ok((pattern, raw.weight))
        })
    }

    /// `[[names]]` entries; bullets only where they are allowed.
    pub(super) fn names(&self, bullets: bool) -> Result<Family<Names>, String> {
        self.load("names", |raw: RawNames| {
            let RawNames { style, before, after, weight } = raw;
            let names = Names { style, before: plain(before)?, after: plain(after)? };
            match names.is_enumeration() || bullets {
                true => Ok((names, weight)),
                false => Err("bullets cannot tell the items of this list apart".into()),
            }
        })
    }

    /// `[[speakers]]` entries.
    pub(super) fn speakers(&self) -> Result<Family<Speakers>, String> {
        self.load("speakers", |raw: RawSpeakers| {
            let speakers = Speakers { first: plain(raw.first)?, second: plain(raw.second)? };
            Ok((speakers, raw.weight))
        })
    }

    /// Reads the `[[key]]` entries of the file. Errors name file and line.
    fn load<R: DeserializeOwned, T: Ord + Clone>(
        &self,
        key: &str,
        convert: impl Fn(R) -> Result<(T, u64), String>,
    ) -> Result<Family<T>, String> {
        let failed = |error: toml::de::Error| format!("{}: {error}", self.name);
        let mut file: BTreeMap<String, Vec<Spanned<R>>> =
            toml::from_str(self.text).map_err(failed)?;
        let entries = file.remove(key).unwrap_or_default();
        if let Some(other) = file.keys().next() {
            return Err(format!("{}: [[{other}]] is not [[{key}]]", self.name));
        }
        let mut family = Family { entries: Vec::new(), weights: Vec::new() };
        let mut seen = BTreeSet::new();
        for entry in entries {
            let line = 1 + self.text[..entry.span().start].matches('\n').count();
            let at = |reason: &str| format!("{}, line {line}: {reason}", self.name);
            let (entry, weight) = convert(entry.into_inner()).map_err(|reason| at(&reason))?;
            if weight == 0 {
                return Err(at("an entry of weight 0 never occurs"));
            }
            if !seen.insert(entry.clone()) {
                return Err(at("the same entry stands above"));
            }
            family.entries.push(entry);
            family.weights.push(weight);
        }
        match family.is_empty() {
            true => Err(format!("{}: has no [[{key}]] entries", self.name)),
            false => Ok(family),
        }
    }
}

fn check_slots(slots: &[Slot], needed: &[Slot], allowed: &[Slot]) -> Result<(), String> {
    if let Some(slot) = slots.iter().find(|slot| !allowed.contains(slot)) {
        return Err(format!("slot {slot} has no meaning here"));
    }
    if let Some(slot) = needed.iter().find(|slot| !slots.contains(slot)) {
        return Err(format!("slot {slot} is missing"));
    }
    match (1..slots.len()).find(|&i| slots[..i].contains(&slots[i])) {
        Some(twice) => Err(format!("slot {} stands twice", slots[twice])),
        None => Ok(()),
    }
}

/// A text without slots.
fn plain(text: String) -> Result<String, String> {
    match Pattern::parse(&text)?.slots().next() {
        Some(slot) => Err(format!("slot {slot} has no meaning in {text:?}")),
        None => Ok(text),
    }
}

fn one() -> u64 {
    1
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPair {
    #[serde(default)]
    input_prefix: String,
    input: String,
    #[serde(default = "blank_line")]
    delimiter: String,
    #[serde(default)]
    target_prefix: String,
    target: String,
    #[serde(default = "two_blank_lines")]
    separator: String,
    #[serde(default = "one")]
    weight: u64,
}

fn blank_line() -> String {
    "\n\n".into()
}

fn two_blank_lines() -> String {
    "\n\n\n".into()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawInline {
    header: String,
    example: String,
    test: String,
    #[serde(default = "blank_line")]
    separator: String,
    #[serde(default = "one")]
    weight: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPhrase {
    text: String,
    #[serde(default = "one")]
    weight: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNames {
    style: Style,
    before: String,
    after: String,
    #[serde(default = "one")]
    weight: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSpeakers {
    first: String,
    second: String,
    #[serde(default = "one")]
    weight: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    const QA: [Slot; 2] = [Slot::Question, Slot::Answer];

    fn check(text: &str, expected: Result<usize, &str>) {
        let source = Source { name: "qa.toml", text };
        let found = source.pairs(&[Slot::Question], &QA).map(|family| family.len());
        match (found, expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected),
            (Err(found), Err(expected)) => assert!(found.contains(expected), "{found}"),
            (found, expected) => panic!("{found:?} and not {expected:?}"),
        }
    }

    #[test]
    fn entries_are_read_with_their_defaults() {
        let text = "[[pattern]]\ninput = '{question}'\ntarget = '{answer}'\n";
        check(text, Ok(1));
        let family = Source { name: "qa.toml", text }.pairs(&QA, &QA).unwrap();
        let filled = family.get(0).fill(&[(Slot::Question, "q"), (Slot::Answer, "a")]);
        assert_eq!(filled, "q\n\na");
        assert!(family.get(0).is_forward());
    }

    #[test]
    fn mistakes_are_named_with_file_and_line() {
        let entry = |fields: &str| format!("# qa\n[[pattern]]\n{fields}");
        let line_2 = |reason: &str| format!("qa.toml, line 2: {reason}");
        for (fields, reason) in [
            ("input = '{question}'\ntarget = '{reply}'", "there is no slot {reply}"),
            ("input = '{question}'\ntarget = '{context}'", "slot {context} has no meaning here"),
            ("input = '{answer}'\ntarget = ''", "slot {question} is missing"),
            ("input = '{question}'\ntarget = '{question}'", "slot {question} stands twice"),
            ("input = '{question}'\ntarget = ''\nweight = 0", "an entry of weight 0 never occurs"),
            (
                "input = '{question}'\ntarget = ''\ninput_prefix = '{answer}'",
                "slot {answer} has no meaning in \"{answer}\"",
            ),
        ] {
            check(&entry(fields), Err(&line_2(reason)));
        }
        check(&entry("input = '{question}'\ntarget = ''\ninputs = ''"), Err("unknown field"));
        check(
            "[[phrase]]\ninput = '{question}'\ntarget = ''",
            Err("[[phrase]] is not [[pattern]]"),
        );
        check("", Err("qa.toml: has no [[pattern]] entries"));
        let twice = "[[pattern]]\ninput = '{question}'\ntarget = ''\n".repeat(2);
        check(&twice, Err("qa.toml, line 4: the same entry stands above"));
    }

    #[test]
    fn entries_are_drawn_by_weight() {
        let text = "[[phrase]]\ntext = 'a'\nweight = 9\n[[phrase]]\ntext = 'b'\n";
        let family = Source { name: "x", text }.phrases(&[]).unwrap();
        let mut stream = crate::seed::stream(1, "x", "y");
        let firsts = (0..1000).filter(|_| family.draw(&mut stream) == 0).count();
        assert!((860..940).contains(&firsts), "{firsts}");
    }
}
