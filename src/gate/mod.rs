//! Quality gates: what documents and pairs must be like to be used.
//!
//! ```text
//! documents, in the order of the input ─▶ DocumentGates ─▶ blocks
//! pairs of a text, as they are parsed   ─▶ PairGates ─▶ Agreement (a second answer) ─▶ chain
//! ```
//!
//! All of them are off unless asked for. What a gate refuses leaves as a rejected record, counted by its
//! reason; the later work on the method finds that checking pairs is its clearest gain (recipe (l)).

pub mod agreement;
pub mod contamination;
pub mod documents;
pub mod minhash;
pub mod pairs;

pub use agreement::Agreement;
pub use documents::{DocumentGates, DocumentRules};
pub use pairs::{PairGates, PairRules, Refusal};

/// The words of a text for comparisons: runs of letters and digits, in lower case.
pub fn words(text: &str) -> impl Iterator<Item = String> {
    let runs = text.split(|character: char| !character.is_alphanumeric());
    runs.filter(|run| !run.is_empty()).map(str::to_lowercase)
}
