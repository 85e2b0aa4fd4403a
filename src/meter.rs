//! What a run has done so far, for whoever watches it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A count that workers raise and the terminal reads.
#[derive(Debug, Default)]
pub struct Meter(AtomicU64);

impl Meter {
    /// Counts `amount` more.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// The stages of a run.
#[derive(Debug, Default)]
pub struct Meters {
    /// Records read from the input.
    pub records: Meter,
    /// Texts admitted to synthesis.
    pub texts: Meter,
    /// Texts whose generation is back.
    pub generations: Meter,
    /// Pairs read out of them.
    pub pairs: Meter,
    /// Tokens that left the mixer.
    pub mixed_tokens: Meter,
    /// Sequences committed.
    pub sequences: Meter,
    /// Epochs committed.
    pub epochs: Meter,
    /// Sequences the trainer has learned from.
    pub learned: Meter,
}
