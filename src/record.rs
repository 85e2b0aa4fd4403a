//! What flows: documents, entries, items, sequences, and what is rejected on the way.
//!
//! Records are ordered values without floating-point numbers, so that every operator can sort what it
//! collected and every choice can be made from content.

use crate::gate::Refusal;
use crate::prompt::{Pair, Reason};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use xxhash_rust::xxh3::Xxh3;

/// One raw input.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Document {
    /// Given by the input, or derived from file and position.
    pub id: String,
    /// Name of the corpus it belongs to.
    pub source: String,
    /// The text as it was read.
    pub text: String,
    /// What else the input says of it, by name.
    pub metadata: BTreeMap<String, String>,
    /// Where it was read.
    pub place: Place,
    /// The piece of a longer document that this is, if it was split.
    pub part: Option<Part>,
    /// What is to become of it.
    pub treatment: Treatment,
}

/// What becomes of a document on its way to a rendered one.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Treatment {
    /// The synthesizer writes pairs for the whole of it.
    #[default]
    Converted,
    /// The synthesizer sees its first bytes only; all of it is kept.
    Window(u32),
    /// It goes out as it is: part of the raw share of a corpus.
    Raw,
}

/// Where a record stands in the input.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Place {
    /// The file, as it was named on the command line.
    pub file: String,
    /// Number of the record in the file, from 1: a line, an article.
    pub record: u64,
    /// Byte at which the record starts, after decompression.
    pub byte: u64,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: record {} at byte {}", self.file, self.record, self.byte)
    }
}

/// A piece of a document that was too long for the synthesizer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Part {
    /// The id of the whole document.
    pub of: String,
    /// Number of this piece, from 0.
    pub index: u32,
    /// How many pieces there are; together they are the document, byte by byte.
    pub count: u32,
}

impl Document {
    /// A digest of everything that decides what becomes of the document.
    pub fn version(&self) -> u128 {
        let mut hash = Xxh3::new();
        for field in [&self.id, &self.source, &self.text] {
            hash.update(&(field.len() as u64).to_le_bytes());
            hash.update(field.as_bytes());
        }
        hash.digest128()
    }

    /// What the synthesizer sees of it.
    pub fn seen(&self) -> &str {
        match self.treatment {
            Treatment::Window(bytes) => &self.text[..bytes as usize],
            Treatment::Converted | Treatment::Raw => &self.text,
        }
    }
}

/// A document with its pairs.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Entry {
    /// The document.
    pub document: Document,
    /// Its pairs; none if nothing usable was generated.
    pub pairs: Vec<Pair>,
    /// What was generated and is no pair.
    pub dropped: Vec<(Reason, String)>,
    /// Pairs that a gate has refused, and why.
    pub refused: Vec<(Refusal, Pair)>,
    /// Pairs that a judge was to hear and could not.
    pub not_judged: u64,
    /// How its generation ended.
    pub finish: Finish,
    /// Whether it was shown in the next prompt of its chain; unset at the end of the chain.
    pub followed: Option<bool>,
    /// Whether it saw its predecessor and has a pair: it then belongs to the same rendered document.
    pub inherits: bool,
    /// Tokens of its prompt.
    pub prompt_tokens: u64,
    /// Tokens that were generated.
    pub generated_tokens: u64,
}

/// How a generation ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The synthesizer closed it.
    #[default]
    Stop,
    /// It reached the limit of new tokens.
    Length,
    /// The request failed; the text goes out without pairs.
    Failed(String),
    /// Nothing was asked: the text belongs to the raw share.
    NotAsked,
}

impl Finish {
    /// The name in ledgers.
    pub fn name(&self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Failed(_) => "failed",
            Finish::NotAsked => "not_asked",
        }
    }
}

/// What a mixer weighs and a packer places: a text as token ids of the trained model.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Item {
    /// Unique in the run.
    pub id: String,
    /// Index of the source it is counted for.
    pub source: u32,
    /// Token ids, opening and closing ids included.
    pub tokens: Vec<u32>,
    /// Which tokens are to be learned; empty means all.
    pub learned: Vec<bool>,
    /// Where the synthesizer wrote pairs, in order; empty for what it had no part in.
    pub shots: Vec<Shot>,
}

/// A run of tokens that hold a text with the pairs that were written for it in one round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Shot {
    /// The round, from 0.
    pub round: u32,
    /// First token of the run in the item or sequence.
    pub offset: u32,
    /// Number of tokens.
    pub length: u32,
}

impl Shot {
    /// What of it lies within a run of tokens that is written to `start`.
    pub fn within(&self, run: &Range<u32>, start: u32) -> Option<Shot> {
        let (from, to) = (self.offset.max(run.start), (self.offset + self.length).min(run.end));
        (from < to).then(|| Shot { offset: start + from - run.start, length: to - from, ..*self })
    }
}

/// A run of tokens of one item inside a sequence.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Segment {
    /// The item.
    pub item: String,
    /// Index of the source the item is counted for.
    pub source: u32,
    /// First token of the run in the item.
    pub offset: u32,
    /// Number of tokens.
    pub length: u32,
}

/// A packed row: segments one after another, with nothing between and padding, if any, behind.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Sequence {
    /// Token ids of all segments.
    pub tokens: Vec<u32>,
    /// Whether each token is to be learned, from the tokens of its segment before it.
    pub learned: Vec<bool>,
    /// The segments, covering all tokens.
    pub segments: Vec<Segment>,
    /// The shots of all segments, in order; empty as well where they were not written down.
    pub shots: Vec<Shot>,
}

impl Sequence {
    /// Position of each token in its segment.
    pub fn positions(&self) -> impl Iterator<Item = u32> {
        self.segments.iter().flat_map(|segment| 0..segment.length)
    }
}

/// The stage of a run that a record was rejected at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Reading the input.
    Read,
    /// Admitting documents to synthesis.
    Admit,
    /// Generating pairs.
    Synthesize,
    /// Reading pairs out of generations.
    Parse,
    /// Judging pairs.
    Gate,
    /// Rendering entries into text.
    Templify,
    /// Other sources of the mix.
    Mix,
    /// Making lessons for a synthesizer.
    Tune,
}

/// A record that left the run, and why.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Rejected {
    /// Where it left.
    pub stage: Stage,
    /// Why, as one of the counted reasons: `invalid_utf8`, `empty_answer`, …
    pub reason: String,
    /// What exactly was wrong; empty where the reason says it all.
    pub detail: String,
    /// The ids of the records concerned.
    pub ids: Vec<String>,
    /// Where the record stands in the input.
    pub place: Place,
    /// The start of its text.
    pub excerpt: String,
}

impl std::fmt::Display for Rejected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Rejected { place, reason, detail, .. } = self;
        match detail.as_str() {
            "" => write!(f, "{place}: {reason}"),
            detail => write!(f, "{place}: {reason}: {detail}"),
        }
    }
}

/// Characters of a record that are shown where it is rejected.
const EXCERPT_CHARACTERS: usize = 200;

impl Rejected {
    /// A rejection of a record that has no id yet.
    pub fn unread(reason: &str, detail: impl ToString, place: Place, text: &str) -> Self {
        Rejected {
            stage: Stage::Read,
            reason: reason.into(),
            detail: detail.to_string(),
            ids: Vec::new(),
            place,
            excerpt: excerpt(text),
        }
    }
}

/// The start of a text.
pub fn excerpt(text: &str) -> String {
    text.chars().take(EXCERPT_CHARACTERS).collect()
}
