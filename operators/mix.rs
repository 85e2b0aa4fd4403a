//! Mixes the items of each epoch with side sources, by tokens.
//!
//! ```text
//! rendered chains at t ─▶ dealt out by lane ─▶ [ until t closes ] ─▶ in order of chains ─▶ mixed lane at t
//!                                              side sources ──────────────▲
//! ```
//!
//! A lane works through its epochs in order and carries its debt from one to the next. When a side source
//! has nothing ready the lane waits, holding the capability of its epoch, until it is woken.

use crate::waker;
use headwater::augment::{Augmented, ChainOutput};
use headwater::lane::{Lane, MixRules, Mixed, Need};
use headwater::ledger::Ledger;
use headwater::manifest::LaneState;
use headwater::meter::Meters;
use headwater::record::{Item, Rejected};
use headwater::side::{Offer, SideFeed, SideSource};
use headwater::synthesizer::Waker;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Exchange;
use timely::dataflow::operators::{Capability, Operator};

/// What is mixed with what.
#[derive(Clone, Debug)]
pub struct Mixing {
    /// Names, shares, and what happens at the end of a source.
    pub rules: MixRules,
    /// The side sources, in the order of their shares.
    pub sides: Vec<SideSource>,
    /// How far each lane has come; as many as there are lanes.
    pub lanes: Vec<LaneState>,
    /// Where progress is noted.
    pub meters: Arc<Meters>,
}

/// An epoch of one lane, mixed.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MixedLane {
    /// Number of the lane.
    pub lane: u64,
    /// Items in the order of the mix.
    pub items: Vec<Item>,
    /// The rendered documents among them.
    pub documents: Vec<Augmented>,
    /// What was dropped on the way.
    pub rejected: Vec<Rejected>,
    /// What was counted.
    pub ledger: Ledger,
    /// How far the lane has come.
    pub state: LaneState,
}

/// Provides `mix`.
pub trait Mix<'scope> {
    /// Mixes each epoch, one lane at a time.
    fn mix(self, mixing: Mixing) -> StreamVec<'scope, u64, MixedLane>;
}

impl<'scope> Mix<'scope> for StreamVec<'scope, u64, ChainOutput> {
    fn mix(self, mixing: Mixing) -> StreamVec<'scope, u64, MixedLane> {
        let scope = self.scope();
        let lanes = mixing.lanes.len() as u64;
        let by_lane = Exchange::new(move |output: &ChainOutput| output.index % lanes);
        self.unary_frontier(by_lane, "Mix", move |_capability, info| {
            let wake = waker(scope.worker().sync_activator_for(info.address.to_vec()));
            let (index, peers) = (scope.index() as u64, scope.peers() as u64);
            let mut own: BTreeMap<u64, LaneMix> = (0..lanes)
                .filter(|lane| lane % peers == index)
                .map(|lane| (lane, LaneMix::new(&mixing, lane, &wake)))
                .collect();
            let mut open: BTreeMap<Key, Held> = BTreeMap::new();

            move |(input, frontier), output| {
                let port = output.output_index();
                input.for_each_stamp(|capability, batches| {
                    let held = capability.retain_least(port).expect("rendered at a time");
                    for rendered in batches.flat_map(|batch| batch.drain(..)) {
                        let key = (*held.time(), rendered.index % lanes);
                        let (_, all) =
                            open.entry(key).or_insert_with(|| (held.clone(), Vec::new()));
                        all.push(rendered);
                    }
                });
                // A time the frontier has passed gets no more chains: mix it, oldest first.
                for (lane, mix) in &mut own {
                    while let Some((key, closed)) = oldest(&mut open, *lane)
                        && !frontier.less_equal(&key.0)
                    {
                        mix.start(key.0, std::mem::take(&mut closed.1));
                        let Some(mixed) = mix.advance() else { break };
                        mixing.meters.mixed_tokens.add(mixed.ledger.get("mix/tokens"));
                        output.session(&closed.0).give(mixed);
                        open.remove(&key);
                    }
                }
            }
        })
    }
}

/// Epoch and lane.
type Key = (u64, u64);

/// What was rendered for an epoch of a lane, with the capability to send it on.
type Held = (Capability<u64>, Vec<ChainOutput>);

/// The oldest open epoch of a lane.
fn oldest(open: &mut BTreeMap<Key, Held>, lane: u64) -> Option<(Key, &mut Held)> {
    open.iter_mut().find(|((_, own), _)| *own == lane).map(|(key, value)| (*key, value))
}

/// A lane with its side sources and the epoch it is mixing.
struct LaneMix {
    number: u64,
    lane: Lane,
    /// The side sources; none for one that has ended.
    sides: Vec<Option<SideFeed>>,
    sources: Vec<SideSource>,
    /// What was rendered for the epoch, without its items.
    rendered: MixedLane,
}

impl LaneMix {
    fn new(mixing: &Mixing, number: u64, wake: &Waker) -> Self {
        let lanes = mixing.lanes.len() as u64;
        let state = &mixing.lanes[number as usize];
        let lane = Lane::new(mixing.rules.clone(), state.clone());
        let open = |(side, source): (usize, &SideSource)| {
            let behind = state.side_records.get(side).copied().unwrap_or(0);
            let open = || source.open(number, lanes, behind, wake.clone());
            (!lane.has_ended(side + 1)).then(open)
        };
        LaneMix {
            number,
            sides: mixing.sides.iter().enumerate().map(open).collect(),
            sources: mixing.sides.clone(),
            lane,
            rendered: MixedLane::default(),
        }
    }

    /// Takes in what was rendered for an epoch; nothing if it was taken in before.
    fn start(&mut self, epoch: u64, mut rendered: Vec<ChainOutput>) {
        rendered.sort_by_key(|output| output.index); // arrival says nothing
        for output in rendered {
            self.rendered.rejected.extend(output.rejected);
            self.rendered.ledger.merge(&output.ledger);
            let (documents, items): (Vec<_>, Vec<_>) = output.documents.into_iter().unzip();
            self.rendered.documents.extend(documents);
            self.lane.start(epoch, items);
        }
    }

    /// Mixes on; the epoch when it is done, none while a side source has nothing ready.
    fn advance(&mut self) -> Option<MixedLane> {
        while let Need::Record(side) = self.lane.advance() {
            let feed = self.sides[side - 1].as_ref().expect("a source that has ended is not asked");
            match feed.poll() {
                Offer::Record(record) => self.lane.give(side, record),
                Offer::NotYet => return None,
                Offer::Exhausted => {
                    let SideSource { name, passes, .. } = &self.sources[side - 1];
                    assert!(passes.is_some(), "the files of {name:?} hold nothing usable any more");
                    self.sides[side - 1] = None;
                    self.lane.end(side);
                }
            }
        }
        let (Mixed { items, rejected, ledger }, state) = self.lane.finish();
        let mut mixed = std::mem::take(&mut self.rendered);
        (mixed.lane, mixed.items, mixed.state) = (self.number, items, state);
        mixed.rejected.extend(rejected);
        mixed.ledger.merge(&ledger);
        Some(mixed)
    }
}
