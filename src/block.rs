//! Cuts the input into blocks: the epochs of a run.
//!
//! ```text
//! records ─▶ admitted: blank rejected, long split, a share left raw ─▶ blocks of a fixed number of texts
//! ```
//!
//! A block also ends behind [`RECORDS_MAX`] records, so that a corpus in which hardly anything can be used
//! does not pile up what was rejected.
//!
//! A block is a function of the input alone. Chains live inside one block, and a block is what is
//! committed together.

use crate::format::documents::{Documents, Found, InputPosition};
use crate::gate::DocumentGates;
use crate::ledger::Ledger;
use crate::prompt::{PromptWriter, holds_marker};
use crate::record::{Document, Rejected, Stage, Treatment, excerpt};
use crate::split::{split, window};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use xxhash_rust::xxh3::xxh3_64;

/// Records of a block at most, usable or not.
pub const RECORDS_MAX: u64 = 16_384;

/// Consecutive texts of the input, with all that was found between them.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Block {
    /// Number of the block in the run.
    pub epoch: u64,
    /// The texts.
    pub documents: Vec<Document>,
    /// What could not be used.
    pub rejected: Vec<Rejected>,
    /// What was counted.
    pub ledger: Ledger,
    /// How far the input has been read.
    pub end: InputPosition,
}

/// What a text must be like to be admitted.
#[derive(Clone, Debug)]
pub struct Admission {
    /// Writes the prompts that texts must fit into.
    pub writer: PromptWriter,
    /// Tokens of the longest prompt.
    pub prompt_tokens_max: usize,
    /// What else is asked of a document.
    pub gates: DocumentGates,
    /// What becomes of texts that are too long for a prompt.
    pub long_texts: LongTexts,
    /// How many of the documents are converted.
    pub converted: Converted,
}

/// What becomes of texts that are too long for a prompt: part of a run's configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LongTexts {
    /// They are cut into texts of their own; each gets pairs.
    #[default]
    Split,
    /// The synthesizer sees their beginning; the text is kept whole.
    Window,
}

/// The share of documents that the synthesizer writes pairs for: part of a run's configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Converted {
    /// So many of …
    pub part: u64,
    /// … so many documents.
    pub of: u64,
}

impl Converted {
    /// All documents.
    pub const ALL: Converted = Converted { part: 1, of: 1 };

    /// Whether a document is converted: a matter of its text alone, whatever its place, its id and the
    /// seed, so that a text that comes again is treated as before.
    pub fn takes(&self, document: &Document) -> bool {
        xxh3_64(document.text.as_bytes()) % self.of < self.part
    }
}

impl Admission {
    /// Why a document is not to be used, and what exactly is wrong; none if it is.
    fn refuse(&mut self, document: &Document) -> Option<(&'static str, String)> {
        match document.text.trim().is_empty() {
            true => Some(("empty_text", String::new())),
            false => self.gates.judge(document),
        }
    }

    /// What becomes of a document, as it is counted, and its texts.
    fn treat(&self, document: Document) -> (&'static str, Vec<Document>) {
        if !self.converted.takes(&document) {
            return ("raw", vec![Document { treatment: Treatment::Raw, ..document }]);
        }
        let (writer, tokens_max) = (&self.writer, self.prompt_tokens_max);
        match self.long_texts {
            LongTexts::Split => {
                let pieces = split(document, writer, tokens_max);
                (if pieces.len() == 1 { "whole" } else { "split" }, pieces)
            }
            LongTexts::Window => {
                let document = window(document, writer, tokens_max);
                let whole = document.treatment == Treatment::Converted;
                (if whole { "whole" } else { "windowed" }, vec![document])
            }
        }
    }
}

/// Iterates over the blocks of an input.
pub struct Blocks {
    documents: Documents,
    admission: Admission,
    size: usize,
    records_max: u64,
    epoch: u64,
    left: u64,
    /// Pieces of the last record that are still to be given out.
    pending: VecDeque<Document>,
    pieces_given: u64,
}

impl Blocks {
    /// Blocks of `size` texts from `documents`, at most `limit` records in all.
    ///
    /// # Panics
    /// If the size is zero.
    pub fn new(
        documents: Documents,
        admission: Admission,
        size: usize,
        limit: Option<u64>,
    ) -> Self {
        assert!(size > 0, "a block holds texts");
        Blocks {
            documents,
            admission,
            size,
            records_max: RECORDS_MAX,
            epoch: 0,
            left: limit.unwrap_or(u64::MAX),
            pending: VecDeque::new(),
            pieces_given: 0,
        }
    }

    /// Goes on behind a block that ended at `end`; `documents` has been resumed there, and `read` records
    /// lie behind it. `before` reads the input from its beginning, if there are gates that remember it.
    #[must_use]
    pub fn resume(
        mut self,
        epoch: u64,
        end: InputPosition,
        read: u64,
        before: impl FnOnce() -> Documents,
    ) -> Self {
        if self.admission.gates.remembers() {
            // The record that is being given out is read again below.
            for found in before().take((read - u64::from(end.pieces > 0)) as usize) {
                if let Found::Document(document) = found {
                    let _ = self.admission.refuse(&document);
                }
            }
        }
        (self.epoch, self.left) = (epoch, self.left.saturating_sub(read));
        if end.pieces > 0 {
            let mut block = Block::default(); // what is counted here was counted before
            self.left += 1;
            self.read_record(&mut block);
            self.pending.drain(..(end.pieces as usize).min(self.pending.len()));
            self.pieces_given = end.pieces;
        }
        self
    }

    /// Reads one record; false if there is none.
    fn read_record(&mut self, block: &mut Block) -> bool {
        if self.left == 0 {
            return false;
        }
        let Some(found) = self.documents.next() else {
            return false;
        };
        self.left -= 1;
        self.pieces_given = 0;
        block.ledger.add("read/records", 1);
        match found {
            Found::Document(document) => self.admit(*document, block),
            Found::Rejected(rejected) => {
                block.ledger.add(format!("read/rejected/{}", rejected.reason), 1);
                block.rejected.push(*rejected);
            }
            Found::Withdrawn { id, place } => {
                block.ledger.add("read/withdrawn", 1);
                let mut rejected = Rejected::unread("withdrawn", "", place, "");
                rejected.ids.push(id);
                block.rejected.push(rejected);
            }
        }
        true
    }

    fn admit(&mut self, document: Document, block: &mut Block) {
        block.ledger.add("read/documents", 1);
        if let Some((reason, detail)) = self.admission.refuse(&document) {
            block.ledger.add(format!("admit/rejected/{reason}"), 1);
            block.rejected.push(Rejected {
                stage: Stage::Admit,
                reason: reason.into(),
                detail,
                ids: vec![document.id],
                place: document.place,
                excerpt: excerpt(&document.text),
            });
            return;
        }
        if holds_marker(&document.text) {
            block.ledger.add("admit/marker_in_text", 1);
        }
        let (outcome, texts) = self.admission.treat(document);
        block.ledger.add(format!("admit/{outcome}"), 1);
        self.pending.extend(texts);
    }
}

impl Iterator for Blocks {
    type Item = Block;

    fn next(&mut self) -> Option<Block> {
        let mut block = Block { epoch: self.epoch, ..Block::default() };
        let mut more = true;
        let mut records = 0;
        while block.documents.len() < self.size && more {
            match self.pending.pop_front() {
                Some(piece) => {
                    self.pieces_given += 1;
                    block.ledger.add("admit/texts", 1);
                    block.documents.push(piece);
                }
                None if records == self.records_max => break,
                None => {
                    more = self.read_record(&mut block);
                    records += 1;
                }
            }
        }
        if block.ledger == Ledger::default() {
            return None;
        }
        self.epoch += 1;
        block.end = self.documents.position();
        if !self.pending.is_empty() {
            // The record that is being given out is not behind us yet.
            block.end.records -= 1;
            block.end.pieces = self.pieces_given;
        }
        Some(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::jsonl::Fields;
    use crate::gate::DocumentRules;
    use crate::tokenizer::tests::small;
    use std::path::PathBuf;

    fn file(folder: &tempfile::TempDir, texts: &[&str]) -> Vec<PathBuf> {
        let line =
            |(id, text): (usize, &&str)| serde_json::json!({"id": id, "text": text}).to_string();
        let lines: Vec<String> = texts.iter().enumerate().map(line).collect();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, lines.join("\n")).unwrap();
        vec![path]
    }

    fn admission() -> Admission {
        Admission {
            writer: PromptWriter::new(small()).unwrap(),
            prompt_tokens_max: 60,
            gates: DocumentGates::default(),
            long_texts: LongTexts::Split,
            converted: Converted::ALL,
        }
    }

    fn blocks(files: &[PathBuf], size: usize, limit: Option<u64>) -> Blocks {
        let documents = Documents::new(files.to_vec(), "s", Fields::detected());
        Blocks::new(documents, admission(), size, limit)
    }

    fn ids(blocks: &[Block]) -> Vec<Vec<&str>> {
        blocks.iter().map(|b| b.documents.iter().map(|d| d.id.as_str()).collect()).collect()
    }

    #[test]
    fn blocks_have_a_fixed_number_of_texts() {
        let folder = tempfile::tempdir().unwrap();
        let files = file(&folder, &["a", "b", " ", "c", "d", "e"]);
        let found: Vec<Block> = blocks(&files, 2, None).collect();
        assert_eq!(ids(&found), [vec!["0", "1"], vec!["3", "4"], vec!["5"]]);
        assert_eq!(found[1].rejected[0].reason, "empty_text");
        let limited: Vec<Block> = blocks(&files, 2, Some(4)).collect();
        assert_eq!(ids(&limited), [vec!["0", "1"], vec!["3"]]);
    }

    #[test]
    fn a_share_of_the_documents_is_converted_by_their_content() {
        let fifth = Converted { part: 1, of: 5 };
        let document = |id: usize, text: usize| Document {
            id: id.to_string(),
            text: format!("Text {text}."),
            ..Document::default()
        };
        let taken: Vec<bool> = (0..10_000).map(|i| fifth.takes(&document(i, i))).collect();
        let count = taken.iter().filter(|&&taken| taken).count() as f64;
        let deviation = (10_000.0f64 * 0.2 * 0.8).sqrt();
        assert!((count - 2000.0).abs() < 4.0 * deviation, "{count}");
        assert!((0..10_000).all(|i| fifth.takes(&document(7, i)) == taken[i]), "ids say nothing");
        assert!((0..100).all(|i| Converted::ALL.takes(&document(i, i))));
    }

    #[test]
    fn a_text_that_changes_touches_its_own_block_only() {
        let folder = tempfile::tempdir().unwrap();
        let texts = ["a", "b", "c", "d", "e", "f", "g"];
        let find = |texts: &[&str]| -> Vec<Vec<String>> {
            let found = blocks(&file(&folder, texts), 2, None);
            let texts = |b: Block| b.documents.into_iter().map(|document| document.text).collect();
            found.map(texts).collect()
        };
        let before = find(&texts);
        for changed in 0..texts.len() {
            let mut texts = texts;
            texts[changed] = "another";
            let after = find(&texts);
            let differ = (0..before.len()).filter(|&block| before[block] != after[block]);
            assert_eq!(differ.collect::<Vec<_>>(), [changed / 2]);
        }
    }

    #[test]
    fn nothing_but_rejections_is_a_block_too() {
        let folder = tempfile::tempdir().unwrap();
        let found: Vec<Block> = blocks(&file(&folder, &[" ", ""]), 2, None).collect();
        assert_eq!((found.len(), found[0].rejected.len()), (1, 2));
        assert_eq!(blocks(&file(&folder, &[]), 2, None).count(), 0);
    }

    #[test]
    fn records_that_cannot_be_used_do_not_pile_up() {
        let folder = tempfile::tempdir().unwrap();
        let files = file(&folder, &["a", " ", "", " ", "b", "", "", "c"]);
        let short = || Blocks { records_max: 3, ..blocks(&files, 2, None) };
        let all: Vec<Block> = short().collect();
        assert_eq!(ids(&all), [vec!["0"], vec!["4"], vec!["7"]]);
        let documents = Documents::resume(files.clone(), "s", Fields::detected(), all[0].end);
        let rest = Blocks { documents, ..short() }
            .resume(1, all[0].end, 3, || unreachable!("nothing is remembered"));
        assert_eq!(rest.collect::<Vec<_>>(), all[1..]);
    }

    #[test]
    fn reading_goes_on_behind_every_block_even_inside_a_long_document() {
        let folder = tempfile::tempdir().unwrap();
        let long = "The rates rose by 25 points. ".repeat(30);
        let other = long.replace("25", "30");
        let files = file(&folder, &["a", &long, "b", " ", &other, "b", "c"]);
        let gates = || {
            DocumentGates::new(DocumentRules { unique: true, ..DocumentRules::default() }).unwrap()
        };
        let documents = Documents::new(files.clone(), "s", Fields::detected());
        let admitting = Admission { gates: gates(), ..admission() };
        let all: Vec<Block> = Blocks::new(documents, admitting, 4, Some(7)).collect();
        assert!(all.len() > 3 && all.iter().any(|block| block.end.pieces > 0));
        let mut read = 0;
        for (index, block) in all.iter().enumerate() {
            read += block.ledger.get("read/records");
            let documents = Documents::resume(files.clone(), "s", Fields::detected(), block.end);
            let admission = Admission { gates: gates(), ..admission() };
            let before = || Documents::new(files.clone(), "s", Fields::detected());
            let rest = Blocks::new(documents, admission, 4, Some(7)).resume(
                index as u64 + 1,
                block.end,
                read,
                before,
            );
            assert_eq!(rest.collect::<Vec<_>>(), all[index + 1..], "behind block {index}");
        }
        let mut ledger = Ledger::default();
        all.iter().for_each(|block| ledger.merge(&block.ledger));
        assert_eq!(ledger.get("read/records"), 7);
        assert_eq!(ledger.get("admit/rejected/duplicate"), 1);
        assert_eq!(ledger.get("admit/split"), 2);
        let texts: u64 = all.iter().map(|block| block.documents.len() as u64).sum();
        assert_eq!(ledger.get("admit/texts"), texts);
    }
}
