//! Packs the mixed items of each epoch into sequences of one length.
//!
//! ```text
//! mixed lanes at t ─▶ [ one packer for each ] ─▶ packed lanes at t
//! ```
//!
//! Nothing is held between epochs, so that an epoch can be made again alone: its last sequence is the only
//! one with more than a few tokens of room.

use crate::mix::MixedLane;
use headwater::augment::Augmented;
use headwater::ledger::Ledger;
use headwater::manifest::LaneState;
use headwater::pack::{PackMode, Packer};
use headwater::record::{Rejected, Sequence};
use serde::{Deserialize, Serialize};
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::Operator;
use timely::progress::Timestamp;

/// How sequences are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    /// Tokens of a sequence.
    pub length: usize,
    /// How they are filled.
    pub mode: PackMode,
}

/// An epoch of one lane, packed.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PackedLane {
    /// Number of the lane.
    pub lane: u64,
    /// The sequences, in order.
    pub sequences: Vec<Sequence>,
    /// The rendered documents in them.
    pub documents: Vec<Augmented>,
    /// What was dropped on the way.
    pub rejected: Vec<Rejected>,
    /// What was counted.
    pub ledger: Ledger,
    /// How far the lane has come.
    pub state: LaneState,
}

/// Provides `pack`.
pub trait Pack<'scope, T: Timestamp> {
    /// Packs each lane of each time.
    fn pack(self, packing: Packing) -> StreamVec<'scope, T, PackedLane>;
}

impl<'scope, T: Timestamp> Pack<'scope, T> for StreamVec<'scope, T, MixedLane> {
    fn pack(self, packing: Packing) -> StreamVec<'scope, T, PackedLane> {
        self.unary(Pipeline, "Pack", move |_capability, _info| {
            move |input, output| {
                input.for_each(|capability, lanes| {
                    let packed = lanes.drain(..).map(|lane| pack_lane(lane, packing));
                    output.session(&capability).give_iterator(packed);
                });
            }
        })
    }
}

/// Packs an epoch of a lane.
pub fn pack_lane(mixed: MixedLane, packing: Packing) -> PackedLane {
    let MixedLane { lane, items, documents, rejected, mut ledger, state } = mixed;
    let mut packer = Packer::new(packing.length, packing.mode);
    let mut sequences: Vec<Sequence> = items.iter().flat_map(|item| packer.push(item)).collect();
    sequences.extend(packer.finish());
    let tally = packer.tally();
    ledger.add("pack/tokens", tally.tokens);
    ledger.add("pack/padding", tally.padding);
    ledger.add("pack/sequences", tally.sequences);
    ledger.add("pack/room", tally.sequences * packing.length as u64);
    ledger.add("pack/cuts", tally.cuts);
    PackedLane { lane, sequences, documents, rejected, ledger, state }
}
