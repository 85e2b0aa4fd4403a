//! Feeds committed sequences to the trainer.
//!
//! ```text
//! committed epochs at t ─▶ [ until the trainer has room ] ─▶ epoch at t
//! ```
//!
//! The capability of an epoch is held until its sequences are in the feed: a slow trainer keeps credit
//! from the source.

use headwater::commit::Committed;
use headwater::record::Sequence;
use headwater::train::feed::Feed;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::{Capability, Operator};

/// How long sequences stay here before the trainer is tried again.
const RETRY: Duration = Duration::from_millis(10);

/// An epoch that the trainer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Learned {
    /// Its number.
    pub epoch: u64,
    /// Whether the run ends with it.
    pub stopped: bool,
}

/// Provides `train`.
pub trait Train<'scope> {
    /// Feeds each epoch to the trainer, in order. Without a feed, epochs are done as they are committed.
    fn train(self, feed: Option<Feed>) -> StreamVec<'scope, u64, Learned>;
}

impl<'scope> Train<'scope> for StreamVec<'scope, u64, Committed> {
    fn train(self, feed: Option<Feed>) -> StreamVec<'scope, u64, Learned> {
        let scope = self.scope();
        self.unary(Pipeline, "Train", move |_capability, info| {
            let again = scope.activator_for(info.address);
            // Epochs that wait for room, with their capabilities.
            let mut waiting: BTreeMap<Learned, (Capability<u64>, Vec<Sequence>)> = BTreeMap::new();

            move |input, output| {
                let port = output.output_index();
                input.for_each_stamp(|capability, batches| {
                    let held = capability.retain_least(port).expect("committed at a time");
                    for committed in batches.flat_map(|batch| batch.drain(..)) {
                        let Committed { record, sequences } = committed;
                        let learned = Learned { epoch: record.epoch, stopped: record.is_stopped() };
                        waiting.insert(learned, (held.clone(), sequences));
                    }
                });
                while let Some((learned, (capability, sequences))) = waiting.pop_first() {
                    let refused = match &feed {
                        Some(feed) => feed.offer(sequences).err(),
                        None => None,
                    };
                    if let Some(sequences) = refused {
                        waiting.insert(learned, (capability, sequences));
                        again.activate_after(RETRY);
                        break;
                    }
                    output.session(&capability).give(learned);
                }
            }
        })
    }
}
