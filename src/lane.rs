//! One stream of items on its way through the mix: the items of an epoch, and what is drawn to them.
//!
//! ```text
//! items of epoch t ─▶ waiting ─┐
//! side source 1 ─▶ next item ──┼─▶ Mixer ─▶ mixed items of t
//! side source n ─▶ next item ──┘
//! ```
//!
//! A side source is read one item ahead, since the mixer wants to know how long it is. An item that was
//! read and not taken is read again by a run that goes on.

use crate::ledger::Ledger;
use crate::manifest::LaneState;
use crate::mix::Mixer;
use crate::record::{Item, Rejected};
use crate::side::SideRecord;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// What is mixed with what: part of a run's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MixRules {
    /// Names of the sources: of what flows, then of each side source.
    pub names: Vec<String>,
    /// Shares by tokens, from the epoch they come into force with; the first from epoch 0.
    pub shares: Vec<(u64, Vec<u64>)>,
    /// What happens when a side source has been read so often as it may be.
    pub at_end: AtEnd,
}

/// What happens when a side source has nothing more to give.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AtEnd {
    /// The other sources share its part.
    #[default]
    Renormalise,
    /// The run ends with that epoch; what then still waits in it is left out.
    Stop,
}

impl MixRules {
    /// The shares that are in force in an epoch.
    ///
    /// # Panics
    /// If none are given for the first epoch.
    pub fn shares_at(&self, epoch: u64) -> &[u64] {
        let in_force = self.shares.iter().rev().find(|(from, _)| *from <= epoch);
        &in_force.expect("there are shares from epoch 0 on").1
    }
}

/// What a lane needs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A record of this side source, from 1.
    Record(usize),
    /// What flows has no more items in this epoch.
    Nothing,
}

/// The mixed items of an epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mixed {
    /// The items, in order.
    pub items: Vec<Item>,
    /// What was dropped on the way.
    pub rejected: Vec<Rejected>,
    /// What was counted.
    pub ledger: Ledger,
}

/// A lane of the mix.
#[derive(Clone, Debug)]
pub struct Lane {
    rules: MixRules,
    mixer: Mixer,
    state: LaneState,
    /// Items of this epoch that wait for their turn.
    waiting: VecDeque<Item>,
    /// The next item of each side source, if it has been read, with all that was read before it.
    heads: Vec<Head>,
    mixed: Mixed,
}

#[derive(Clone, Debug, Default)]
struct Head {
    item: Option<Item>,
    rejected: Vec<Rejected>,
    records: u64,
}

impl Lane {
    /// A lane that goes on from `state`.
    pub fn new(rules: MixRules, mut state: LaneState) -> Self {
        let sides = rules.names.len() - 1;
        let mixer = match state.mix.tokens.is_empty() {
            true => Mixer::new(rules.shares_at(0)),
            false => Mixer::resume(state.mix.clone()),
        };
        state.side_records.resize(sides, 0);
        let heads = vec![Head::default(); sides];
        let waiting = VecDeque::new();
        Lane { rules, mixer, state, waiting, heads, mixed: Mixed::default() }
    }

    /// Takes in items of an epoch, in order.
    pub fn start(&mut self, epoch: u64, items: impl IntoIterator<Item = Item>) {
        self.mixer.set_weights(self.rules.shares_at(epoch));
        self.waiting.extend(items);
    }

    /// Mixes on until a record of a side source is needed, or the epoch has no items left.
    pub fn advance(&mut self) -> Need {
        while !self.state.stopped {
            if self.waiting.is_empty() && self.mixer.eligible().any(|source| source == 0) {
                break;
            }
            let unread = |&source: &usize| source > 0 && self.heads[source - 1].item.is_none();
            if let Some(side) = self.mixer.eligible().find(unread) {
                return Need::Record(side);
            }
            let length = |source: usize| match source {
                0 => self.waiting.front().map_or(0, |item| item.tokens.len() as u64),
                side => {
                    self.heads[side - 1].item.as_ref().map_or(0, |item| item.tokens.len() as u64)
                }
            };
            self.take(self.mixer.next(length));
        }
        Need::Nothing
    }

    /// Gives the record that was needed.
    pub fn give(&mut self, side: usize, record: SideRecord) {
        let head = &mut self.heads[side - 1];
        head.records = record.records;
        match record.item {
            Ok(item) => head.item = Some(item),
            Err(rejected) => head.rejected.push(*rejected),
        }
    }

    /// Says that there is no record to give, now and ever.
    pub fn end(&mut self, side: usize) {
        self.settle(side);
        self.mixer.end(side);
        self.mixed.ledger.add(format!("mix/ended/{}", self.rules.names[side]), 1);
        self.state.stopped = self.rules.at_end == AtEnd::Stop;
    }

    /// Whether a side source has ended.
    pub fn has_ended(&self, side: usize) -> bool {
        self.mixer.state().ended[side]
    }

    /// The mixed items of the epoch, and how far the lane has come.
    pub fn finish(&mut self) -> (Mixed, LaneState) {
        let flow = &self.rules.names[0];
        for item in self.waiting.drain(..) {
            let tokens = item.tokens.len() as u64;
            self.mixed.ledger.add(format!("mix/left_out/{flow}"), 1);
            self.mixed.ledger.add(format!("mix/left_out_tokens/{flow}"), tokens);
        }
        self.state.mix = self.mixer.state().clone();
        (std::mem::take(&mut self.mixed), self.state.clone())
    }

    fn take(&mut self, source: usize) {
        let item = match source {
            0 => self.waiting.pop_front(),
            side => {
                self.settle(side);
                self.heads[side - 1].item.take()
            }
        };
        let item = item.expect("eligible sources have an item");
        let (name, tokens) = (&self.rules.names[source], item.tokens.len() as u64);
        self.mixed.ledger.add(format!("mix/items/{name}"), 1);
        self.mixed.ledger.add(format!("mix/tokens_of/{name}"), tokens);
        self.mixed.ledger.add("mix/tokens", tokens);
        self.mixer.add(source, tokens);
        self.mixed.items.push(item);
    }

    /// Accounts for what was read of a side source before its next item.
    fn settle(&mut self, side: usize) {
        let head = &mut self.heads[side - 1];
        self.state.side_records[side - 1] = self.state.side_records[side - 1].max(head.records);
        for rejected in head.rejected.drain(..) {
            self.mixed.ledger.add(format!("mix/rejected/{}", rejected.reason), 1);
            self.mixed.rejected.push(rejected);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Place;

    fn item(source: u32, length: usize) -> Item {
        Item { source, tokens: vec![0; length], ..Item::default() }
    }

    fn rules(shares: &[(u64, &[u64])], at_end: AtEnd) -> MixRules {
        let names = (0..shares[0].1.len()).map(|source| format!("source {source}")).collect();
        let shares = shares.iter().map(|(from, shares)| (*from, shares.to_vec())).collect();
        MixRules { names, shares, at_end }
    }

    /// Sources of the items of each epoch, where the side sources have so many items of 20 tokens.
    fn check(rules: MixRules, items: &[&[usize]], sides: &[u64], expected: &[&[u32]]) -> Vec<Lane> {
        let mut lanes = vec![Lane::new(rules.clone(), LaneState::default())];
        for (epoch, lengths) in items.iter().enumerate() {
            let (_, state) = lanes.last_mut().unwrap().finish();
            let mut lane = Lane::new(rules.clone(), state); // as if the run had been stopped
            lane.start(epoch as u64, lengths.iter().map(|&length| item(0, length)));
            while let Need::Record(side) = lane.advance() {
                let records =
                    lane.state.side_records[side - 1].max(lane.heads[side - 1].records) + 1;
                if records > sides[side - 1] {
                    lane.end(side);
                    continue;
                }
                let rejected = Rejected::unread("no_text", "", Place::default(), "");
                let bad = records.is_multiple_of(3);
                let item = if bad { Err(Box::new(rejected)) } else { Ok(item(side as u32, 20)) };
                lane.give(side, SideRecord { item, records });
            }
            let found: Vec<u32> = lane.mixed.items.iter().map(|item| item.source).collect();
            assert_eq!(found, expected[epoch], "epoch {epoch}");
            lanes.push(lane);
        }
        lanes
    }

    #[test]
    fn a_lane_draws_what_it_needs_and_carries_debt_to_the_next_epoch() {
        let rules = rules(&[(0, &[1, 1])], AtEnd::Renormalise);
        let epochs: [&[u32]; 3] = [&[1, 0, 1], &[], &[0, 1]];
        let lanes = check(rules, &[&[30], &[], &[20]], &[9], &epochs);
        let states: Vec<u64> = lanes.iter().map(|lane| lane.state.side_records[0]).collect();
        assert_eq!(states, [0, 2, 2, 4]);
        assert_eq!(lanes[3].mixed.ledger.get("mix/rejected/no_text"), 1);
    }

    #[test]
    fn shares_may_change_from_an_epoch_on() {
        let rules = rules(&[(0, &[1, 1]), (2, &[1, 3])], AtEnd::Renormalise);
        let epochs: [&[u32]; 3] = [&[0, 1], &[0, 1], &[1, 0, 1, 1]];
        check(rules, &[&[20], &[20], &[20]], &[99], &epochs);
    }

    #[test]
    fn when_a_side_source_ends_the_others_go_on() {
        let rules = rules(&[(0, &[1, 1, 1])], AtEnd::Renormalise);
        let lanes =
            check(rules, &[&[20, 20, 20], &[20]], &[2, 99], &[&[0, 1, 2, 0, 1, 2, 0, 2], &[0, 2]]);
        assert!(lanes[1].has_ended(1) && !lanes[1].has_ended(2));
    }

    #[test]
    fn or_the_run_stops_and_what_waits_is_left_out() {
        let rules = rules(&[(0, &[1, 1])], AtEnd::Stop);
        let mut lanes = check(rules, &[&[20, 20, 20, 20]], &[2], &[&[0, 1, 0, 1]]);
        let (mixed, state) = lanes[1].finish();
        assert!(state.stopped);
        assert_eq!(mixed.ledger.get("mix/left_out/source 0"), 2);
        assert_eq!(mixed.ledger.get("mix/ended/source 1"), 1);
    }
}
