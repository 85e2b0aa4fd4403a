//! What a document must be like to be worth synthesizing from.
//!
//! Gates judge documents in the order of the input, so that the first of several equal ones stays. They
//! stand before blocks are cut: a block is so many texts that are used.

use super::contamination::Contamination;
use super::minhash::NearDuplicates;
use crate::error::{Error, Result};
use crate::record::Document;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::PathBuf;
use whatlang::{Lang, detect};
use xxhash_rust::xxh3::Xxh3;

/// Characters that the language of a text is told from.
const LANGUAGE_CHARACTERS: usize = 2000;

/// What is asked of documents: part of a run's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentRules {
    /// Words of a text at least.
    pub words_min: usize,
    /// Words of a text at most.
    pub words_max: Option<usize>,
    /// Whether only the first of several documents with equal texts is used. Costs up to 20 bytes of
    /// memory a document.
    pub unique: bool,
    /// Similarity in percent from which on only the first of several documents is used. Costs about a
    /// kilobyte of memory a document.
    pub similar_percent: Option<u32>,
    /// Languages that are used, as ISO 639-3 codes; all if there are none.
    pub languages: Vec<String>,
    /// Texts that must not be trained on.
    pub contamination: Option<ContaminationRules>,
}

/// Evaluation sets, and how much of one is too much.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContaminationRules {
    /// Files of the evaluation sets.
    pub files: Vec<PathBuf>,
    /// Words of a run that a text must not share with them.
    pub words: usize,
}

impl ContaminationRules {
    /// Reads the evaluation sets.
    ///
    /// # Errors
    /// If a file cannot be opened.
    pub fn read(&self) -> Result<Contamination> {
        Contamination::read(&self.files, self.words)
    }
}

/// Judges documents.
#[derive(Clone, Debug, Default)]
pub struct DocumentGates {
    rules: DocumentRules,
    languages: Vec<Lang>,
    contamination: Option<Contamination>,
    similar: Option<NearDuplicates>,
    /// Digests of the texts that were let through.
    seen: HashSet<u64>,
}

impl DocumentGates {
    /// Gates that have seen nothing.
    ///
    /// # Errors
    /// If a language is unknown, a share is none, or an evaluation set cannot be read.
    pub fn new(rules: DocumentRules) -> Result<Self> {
        let unknown = |code: &str| Error::Setting(format!("{code:?} is no language we can tell"));
        let language = |code: &String| Lang::from_code(code).ok_or_else(|| unknown(code));
        if rules.similar_percent.is_some_and(|percent| !(1..=100).contains(&percent)) {
            return Err(Error::Setting("a similarity is 1 to 100 percent".into()));
        }
        Ok(DocumentGates {
            languages: rules.languages.iter().map(language).collect::<Result<_>>()?,
            contamination: rules
                .contamination
                .as_ref()
                .map(ContaminationRules::read)
                .transpose()?,
            similar: rules.similar_percent.map(NearDuplicates::new),
            seen: HashSet::new(),
            rules,
        })
    }

    /// Whether what it says of a document depends on the documents before.
    pub fn remembers(&self) -> bool {
        self.rules.unique || self.similar.is_some()
    }

    /// Why a document is not to be used, and what exactly is wrong; none if it is.
    pub fn judge(&mut self, document: &Document) -> Option<(&'static str, String)> {
        let text = document.text.as_str();
        if let Some((reason, words)) = self.misfit(text) {
            return Some((reason, format!("{words} words")));
        }
        if !self.languages.is_empty() {
            let start = text.char_indices().nth(LANGUAGE_CHARACTERS).map_or(text.len(), |at| at.0);
            let found = detect(&text[..start]).map(|info| info.lang());
            if !found.is_some_and(|found| self.languages.contains(&found)) {
                return Some(("language", found.map_or("none", |found| found.code()).into()));
            }
        }
        if self.contamination.as_ref().is_some_and(|contamination| contamination.holds(text)) {
            return Some(("contaminated", String::new()));
        }
        if self.rules.unique && !self.seen.insert(digest(text)) {
            return Some(("duplicate", String::new()));
        }
        if self.similar.as_mut().is_some_and(|similar| similar.is_repeated(text)) {
            return Some(("near_duplicate", String::new()));
        }
        None
    }

    /// Why a text is too short or too long, with its number of words.
    fn misfit(&self, text: &str) -> Option<(&'static str, usize)> {
        let words = |most: usize| text.split_whitespace().take(most).count();
        if words(self.rules.words_min) < self.rules.words_min {
            return Some(("too_short", words(usize::MAX)));
        }
        let most = self.rules.words_max.filter(|&most| words(most.saturating_add(1)) > most);
        most.map(|_| ("too_long", words(usize::MAX)))
    }
}

/// A digest of the words of a text, however they are spaced.
fn digest(text: &str) -> u64 {
    let mut hash = Xxh3::new();
    for word in text.split_whitespace() {
        hash.update(word.as_bytes());
        hash.update(b" ");
    }
    hash.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(rules: DocumentRules, texts: &[&str], expected: &[&str]) {
        let mut gates = DocumentGates::new(rules).unwrap();
        let judged: Vec<&str> = texts
            .iter()
            .map(|text| {
                let document = Document { text: (*text).into(), ..Document::default() };
                gates.judge(&document).map_or("", |(reason, _)| reason)
            })
            .collect();
        assert_eq!(judged, expected);
    }

    #[test]
    fn without_rules_everything_goes_through() {
        check(DocumentRules::default(), &["a", "a", ""], &["", "", ""]);
    }

    #[test]
    fn a_text_needs_its_words() {
        let rules = DocumentRules { words_min: 3, words_max: Some(4), ..DocumentRules::default() };
        let texts = ["one two", "one  two three", "", "one two three four five"];
        check(rules, &texts, &["too_short", "", "too_short", "too_long"]);
    }

    #[test]
    fn the_first_of_equal_texts_stays() {
        let rules = DocumentRules { unique: true, ..DocumentRules::default() };
        check(rules, &["a b", "a  b\n", "b a", "ab"], &["", "duplicate", "", ""]);
    }

    #[test]
    fn languages_that_were_not_asked_for_are_left_out() {
        let rules = DocumentRules { languages: vec!["eng".into()], ..DocumentRules::default() };
        let texts = [
            "The central bank raised its interest rate by a quarter of a point on Thursday.",
            "Die Zentralbank erhöhte ihren Leitzins am Donnerstag um einen Viertelpunkt.",
            "12345 67890",
        ];
        check(rules.clone(), &texts, &["", "language", "language"]);
        let unknown = DocumentRules { languages: vec!["klingon".into()], ..rules };
        assert!(DocumentGates::new(unknown).is_err());
    }

    #[test]
    fn of_texts_that_are_nearly_the_same_the_first_stays() {
        let rules = DocumentRules { similar_percent: Some(70), ..DocumentRules::default() };
        let text = |last: &str| {
            let words: Vec<String> = (0..60).map(|word| format!("word{word}")).collect();
            format!("{} {last}", words.join(" "))
        };
        let texts = [text("one"), text("two"), text("words").replace("word1", "other")];
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        check(rules, &texts, &["", "near_duplicate", ""]);
    }

    #[test]
    fn texts_of_evaluation_sets_are_kept_out() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("eval.txt");
        std::fs::write(&file, "one two three four five\n").unwrap();
        let contamination = Some(ContaminationRules { files: vec![file], words: 4 });
        let rules = DocumentRules { contamination, ..DocumentRules::default() };
        check(rules, &["so one, two, three, four", "one two three"], &["contaminated", ""]);
    }
}
