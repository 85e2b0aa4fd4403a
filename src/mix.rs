//! Mixes sources by tokens.
//!
//! The next item comes from the source that is furthest below its share of the tokens given out so far
//! (largest deficit). Of two sources, each is within one item of its share at every prefix of the output.
//! All arithmetic is in whole tokens.

use crate::record::Item;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// How far a mix has come: part of a run's manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MixState {
    /// Tokens taken from each source.
    pub tokens: Vec<u64>,
    /// Items taken from each source.
    pub items: Vec<u64>,
}

/// Decides which source is next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mixer {
    weights: Vec<u64>,
    state: MixState,
}

impl Mixer {
    /// A mixer of sources with the given shares.
    ///
    /// # Panics
    /// If there are no sources or all weights are zero.
    pub fn new(weights: &[u64]) -> Self {
        assert!(weights.iter().sum::<u64>() > 0, "at least one source has a share");
        let none = vec![0; weights.len()];
        let state = MixState { tokens: none.clone(), items: none };
        Mixer { weights: weights.to_vec(), state }
    }

    /// Goes on from an earlier state.
    ///
    /// # Panics
    /// If the state has another number of sources.
    pub fn resume(weights: &[u64], state: MixState) -> Self {
        assert_eq!(weights.len(), state.tokens.len(), "one count for each source");
        Mixer { state, ..Mixer::new(weights) }
    }

    /// The source that is furthest below its share; the first of several.
    pub fn next(&self) -> usize {
        let deficits = (0..self.weights.len()).filter(|&s| self.weights[s] > 0);
        let next = deficits.max_by_key(|&source| (self.deficit(source), std::cmp::Reverse(source)));
        next.expect("at least one source has a share")
    }

    /// Notes an item that was taken from `source`.
    pub fn add(&mut self, source: usize, tokens: u64) {
        self.state.tokens[source] += tokens;
        self.state.items[source] += 1;
    }

    /// The share of each source.
    pub fn weights(&self) -> &[u64] {
        &self.weights
    }

    /// How far it has come.
    pub fn state(&self) -> &MixState {
        &self.state
    }

    /// Tokens that the source lacks to its share, in units of one part of all weights.
    fn deficit(&self, source: usize) -> i128 {
        let all: u64 = self.state.tokens.iter().sum();
        let parts: u64 = self.weights.iter().sum();
        i128::from(self.weights[source]) * i128::from(all)
            - i128::from(parts) * i128::from(self.state.tokens[source])
    }

    /// The largest distance of a source from its share, in tokens.
    pub fn error_tokens(&self) -> u64 {
        let parts: i128 = self.weights.iter().map(|&weight| i128::from(weight)).sum();
        let worst = (0..self.weights.len()).map(|source| self.deficit(source).abs()).max();
        (worst.unwrap_or(0) / parts) as u64
    }
}

/// One stream of items on its way through the mix: the items of an epoch and what is drawn to them.
#[derive(Clone, Debug)]
pub struct Lane {
    mixer: Mixer,
    /// Items of the first source that wait for their turn.
    waiting: VecDeque<Item>,
    mixed: Vec<Item>,
}

/// What a lane needs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// An item of this side source, from 1.
    Item(usize),
    /// The first source has no more items in this epoch.
    Nothing,
}

impl Lane {
    /// A lane in which the first source is what flows, and the others are drawn to it.
    pub fn new(mixer: Mixer) -> Self {
        Lane { mixer, waiting: VecDeque::new(), mixed: Vec::new() }
    }

    /// Takes in the items of an epoch, in order.
    pub fn start(&mut self, items: impl IntoIterator<Item = Item>) {
        self.waiting.extend(items);
    }

    /// Mixes on until an item of another source is needed, or the epoch has none left.
    pub fn advance(&mut self) -> Need {
        loop {
            match self.mixer.next() {
                0 => match self.waiting.pop_front() {
                    Some(item) => self.take(item),
                    None => return Need::Nothing,
                },
                side => return Need::Item(side),
            }
        }
    }

    /// Gives the item that was needed.
    pub fn give(&mut self, item: Item) {
        self.take(item);
    }

    /// The mixed items of the epoch.
    pub fn finish(&mut self) -> Vec<Item> {
        std::mem::take(&mut self.mixed)
    }

    /// How far the mix has come.
    pub fn state(&self) -> &MixState {
        self.mixer.state()
    }

    fn take(&mut self, item: Item) {
        self.mixer.add(item.source as usize, item.tokens.len() as u64);
        self.mixed.push(item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(weights: &[u64], lengths: &[u64], expected: &[usize]) {
        let mut mixer = Mixer::new(weights);
        let order: Vec<usize> = (0..expected.len())
            .map(|_| {
                let source = mixer.next();
                mixer.add(source, lengths[source]);
                source
            })
            .collect();
        assert_eq!(order, expected);
    }

    #[test]
    fn long_items_of_one_source_are_balanced_by_many_of_another() {
        check(&[1, 1], &[100, 30], &[0, 1, 1, 1, 1, 0, 1, 1, 1, 0]);
    }

    #[test]
    fn shares_follow_the_weights() {
        check(&[1, 4], &[10, 10], &[0, 1, 1, 1, 1, 0, 1, 1, 1, 1]);
    }

    #[test]
    fn a_source_without_a_share_is_never_asked() {
        check(&[0, 1], &[10, 10], &[1, 1, 1]);
    }

    #[test]
    fn a_resumed_mix_goes_on_as_if_never_stopped() {
        let mut mixer = Mixer::new(&[2, 3]);
        for tokens in 1..50 {
            let resumed = Mixer::resume(&[2, 3], mixer.state().clone());
            assert_eq!(resumed.next(), mixer.next());
            mixer.add(mixer.next(), tokens * 7 % 13);
        }
    }

    #[test]
    fn a_lane_draws_what_it_needs_and_carries_debt_to_the_next_epoch() {
        let item =
            |source, length: usize| Item { source, tokens: vec![0; length], ..Item::default() };
        let mut lane = Lane::new(Mixer::new(&[1, 1]));
        let mut sources = Vec::new();
        for items in [vec![item(0, 30), item(0, 10)], vec![], vec![item(0, 10)]] {
            lane.start(items);
            while let Need::Item(side) = lane.advance() {
                lane.give(item(side as u32, 20));
            }
            sources.push(lane.finish().iter().map(|item| item.source).collect::<Vec<_>>());
        }
        assert_eq!(sources, [vec![0, 1, 1, 0], vec![], vec![0, 1]]);
    }

    proptest! {
        #[test]
        fn the_error_of_two_sources_at_every_prefix_is_at_most_one_item(
            weights in prop::collection::vec(1u64..10, 1..3),
            lengths in prop::collection::vec(1u64..1000, 1..300),
        ) {
            let mut mixer = Mixer::new(&weights);
            let mut longest = 0;
            for length in lengths {
                mixer.add(mixer.next(), length);
                longest = longest.max(length);
                prop_assert!(mixer.error_tokens() <= longest, "{}", mixer.error_tokens());
            }
        }
    }
}
