//! What a document must be like to be worth synthesizing from.
//!
//! Gates judge documents in the order of the input, so that the first of several equal ones stays.

use crate::record::Document;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use xxhash_rust::xxh3::Xxh3;

/// What is asked of documents: part of a run's configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentRules {
    /// Words of a text at least.
    pub words_min: usize,
    /// Whether only the first of several documents with equal texts is used. Costs up to 20 bytes of
    /// memory a document.
    pub unique: bool,
}

/// Judges documents.
#[derive(Clone, Debug, Default)]
pub struct DocumentGates {
    rules: DocumentRules,
    /// Digests of the texts that were let through.
    seen: HashSet<u64>,
}

impl DocumentGates {
    /// Gates that have seen nothing.
    pub fn new(rules: DocumentRules) -> Self {
        DocumentGates { rules, seen: HashSet::new() }
    }

    /// Whether what it says of a document depends on the documents before.
    pub fn remembers(&self) -> bool {
        self.rules.unique
    }

    /// Why a document is not to be used, and what exactly is wrong; none if it is.
    pub fn judge(&mut self, document: &Document) -> Option<(&'static str, String)> {
        let mut words = document.text.split_whitespace();
        if words.by_ref().take(self.rules.words_min).count() < self.rules.words_min {
            let count = document.text.split_whitespace().count();
            return Some(("too_short", format!("{count} words")));
        }
        if self.rules.unique && !self.seen.insert(digest(&document.text)) {
            return Some(("duplicate", String::new()));
        }
        None
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
        let mut gates = DocumentGates::new(rules);
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
        let rules = DocumentRules { words_min: 3, unique: false };
        check(rules, &["one two", "one  two three", ""], &["too_short", "", "too_short"]);
    }

    #[test]
    fn the_first_of_equal_texts_stays() {
        let rules = DocumentRules { words_min: 0, unique: true };
        check(rules, &["a b", "a  b\n", "b a", "ab"], &["", "duplicate", "", ""]);
    }
}
