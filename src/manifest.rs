//! What is committed: one line of `manifest.jsonl` an epoch. The manifest is the state of a run.

use crate::augment::Augmented;
use crate::format::documents::InputPosition;
use crate::ledger::Ledger;
use crate::mix::MixState;
use crate::record::{Rejected, Sequence};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A committed epoch: one line of `manifest.jsonl`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Number of the epoch.
    pub epoch: u64,
    /// Its files.
    pub files: Vec<FileRecord>,
    /// Number of its first sequence in the run.
    pub first_sequence: u64,
    /// Its sequences.
    pub sequences: u64,
    /// What each source gave to this epoch, in millionths of its tokens.
    pub mix_ppm: BTreeMap<String, u64>,
    /// How far each lane has come.
    pub lanes: Vec<LaneState>,
    /// How far the input has been read.
    pub input: InputPosition,
    /// What was counted in this epoch.
    pub ledger: Ledger,
}

impl EpochRecord {
    /// Whether the run ends with this epoch, whatever is left of its input.
    pub fn is_stopped(&self) -> bool {
        self.lanes.iter().any(|lane| lane.stopped)
    }
}

/// A file of a committed epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Path in the run folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// xxh3-128 of its bytes.
    pub digest: String,
}

/// How far a lane has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LaneState {
    /// Tokens and items taken from each source.
    pub mix: MixState,
    /// Records of each side source that are behind it, usable or not.
    pub side_records: Vec<u64>,
    /// Whether a side source has ended that the run is to end with.
    pub stopped: bool,
}

/// Everything that one epoch produced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EpochOutput {
    /// Number of the epoch.
    pub epoch: u64,
    /// Rendered documents, in order.
    pub augmented: Vec<Augmented>,
    /// Packed sequences of each lane.
    pub lanes: Vec<(LaneState, Vec<Sequence>)>,
    /// What was rejected, in whatever order.
    pub rejected: Vec<Rejected>,
    /// How far the input has been read.
    pub input: InputPosition,
    /// What was counted.
    pub ledger: Ledger,
}

/// The committed part of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// The committed epochs, in order.
    pub epochs: Vec<EpochRecord>,
}

impl Manifest {
    /// Number of the next epoch.
    pub fn next_epoch(&self) -> u64 {
        self.epochs.len() as u64
    }

    /// Sequences committed so far.
    pub fn sequences(&self) -> u64 {
        self.epochs.last().map_or(0, |last| last.first_sequence + last.sequences)
    }

    /// Whether the run has ended with one of its side sources.
    pub fn is_stopped(&self) -> bool {
        self.epochs.last().is_some_and(EpochRecord::is_stopped)
    }

    /// How far the input has been read.
    pub fn input(&self) -> InputPosition {
        self.epochs.last().map_or_else(InputPosition::default, |last| last.input)
    }

    /// What was counted so far.
    pub fn ledger(&self) -> Ledger {
        let mut ledger = Ledger::default();
        self.epochs.iter().for_each(|epoch| ledger.merge(&epoch.ledger));
        ledger
    }

    /// The account of a run whose trainer has learned from so many sequences and tokens.
    pub fn account(&self, trained_sequences: u64, trained_tokens: u64) -> Ledger {
        let mut ledger = self.ledger();
        ledger.add("train/sequences", trained_sequences);
        ledger.add("train/waiting", self.sequences().saturating_sub(trained_sequences));
        ledger.add("train/tokens", trained_tokens);
        ledger
    }
}
