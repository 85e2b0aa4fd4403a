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
use headwater::augment::{AUGMENTED, Augmented, ChainOutput};
use headwater::ledger::Ledger;
use headwater::manifest::LaneState;
use headwater::meter::Meters;
use headwater::mix::{Lane, Mixer, Need};
use headwater::record::{Item, Rejected};
use headwater::side::{Offer, SideFeed, SideRecord, SideSource};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Exchange;
use timely::dataflow::operators::{Capability, Operator};

/// What is mixed with what.
#[derive(Clone, Debug)]
pub struct Mixing {
    /// Shares by tokens: of the augmented documents, then of each side source.
    pub weights: Vec<u64>,
    /// The side sources, in the order of their weights.
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
                        mix.start(std::mem::take(&mut closed.1));
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
    lane: Lane,
    sides: Vec<(SideFeed, String)>,
    mixed: MixedLane,
}

impl LaneMix {
    fn new(mixing: &Mixing, lane: u64, wake: &headwater::synthesizer::Waker) -> Self {
        let lanes = mixing.lanes.len() as u64;
        let state = &mixing.lanes[lane as usize];
        let open = |(side, source): (usize, &SideSource)| {
            let behind = state.side_records.get(side).copied().unwrap_or(0);
            (source.open(lane, lanes, behind, wake.clone()), source.name.clone())
        };
        let mixer = match state.mix.tokens.is_empty() {
            true => Mixer::new(&mixing.weights),
            false => Mixer::resume(&mixing.weights, state.mix.clone()),
        };
        let mut side_records = state.side_records.clone();
        side_records.resize(mixing.sides.len(), 0);
        let state = LaneState { mix: mixer.state().clone(), side_records };
        LaneMix {
            lane: Lane::new(mixer),
            sides: mixing.sides.iter().enumerate().map(open).collect(),
            mixed: MixedLane { lane, state, ..MixedLane::default() },
        }
    }

    /// Takes in what was rendered for an epoch; nothing if it was taken in before.
    fn start(&mut self, mut rendered: Vec<ChainOutput>) {
        rendered.sort_by_key(|output| output.index); // arrival says nothing
        for output in rendered {
            self.mixed.rejected.extend(output.rejected);
            self.mixed.ledger.merge(&output.ledger);
            let (documents, items): (Vec<_>, Vec<_>) = output.documents.into_iter().unzip();
            self.mixed.documents.extend(documents);
            self.lane.start(items);
        }
    }

    /// Mixes on; the epoch when it is done, none while a side source has nothing ready.
    fn advance(&mut self) -> Option<MixedLane> {
        while let Need::Item(side) = self.lane.advance() {
            let (feed, name) = &self.sides[side - 1];
            match feed.poll() {
                Offer::Record(record) => self.give(side, record),
                Offer::NotYet => return None,
                Offer::Exhausted => panic!("the files of {name:?} no longer hold anything usable"),
            }
        }
        let mixed = &mut self.mixed;
        mixed.items = self.lane.finish();
        mixed.state.mix = self.lane.state().clone();
        for item in &mixed.items {
            let source = match item.source {
                AUGMENTED => "augmented",
                side => self.sides[side as usize - 1].1.as_str(),
            };
            let tokens = item.tokens.len() as u64;
            mixed.ledger.add(format!("mix/items/{source}"), 1);
            mixed.ledger.add(format!("mix/tokens_of/{source}"), tokens);
            mixed.ledger.add("mix/tokens", tokens);
        }
        let next =
            MixedLane { lane: mixed.lane, state: mixed.state.clone(), ..MixedLane::default() };
        Some(std::mem::replace(mixed, next))
    }

    fn give(&mut self, side: usize, record: SideRecord) {
        self.mixed.state.side_records[side - 1] = record.records;
        match record.item {
            Ok(item) => self.lane.give(item),
            Err(rejected) => {
                self.mixed.ledger.add(format!("mix/rejected/{}", rejected.reason), 1);
                self.mixed.rejected.push(*rejected);
            }
        }
    }
}
