//! Mixes any number of sources by tokens.
//!
//! ```text
//! due(s)  = tokens given out so far, times the share of s            "fluid" service
//! lead(s) = tokens taken from s − due(s)
//! next    = of the sources with lead ≤ 0, the one whose next item would be done first at its share
//! ```
//!
//! This is worst-case fair weighted fair queueing (WF²Q: Bennett and Zhang, 1996): at every prefix of the
//! output, each source is within one item of its share, for any number of sources and any lengths. (The
//! plain rule "furthest below its share" promises that for two sources only.) All arithmetic is in whole
//! tokens.

use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// How far a mix has come: part of a run's manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MixState {
    /// Tokens taken from each source.
    pub tokens: Vec<u64>,
    /// Items taken from each source.
    pub items: Vec<u64>,
    /// The shares in force; 0 for a source that has ended.
    pub weights: Vec<u64>,
    /// Tokens of each source when these shares came into force.
    pub since: Vec<u64>,
    /// Tokens by which each source was ahead of its share then; their sum is 0.
    pub ahead: Vec<i64>,
    /// Sources that have nothing more to give.
    pub ended: Vec<bool>,
}

/// Decides which source is next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mixer {
    state: MixState,
}

impl Mixer {
    /// A mixer of sources with the given shares.
    ///
    /// # Panics
    /// If there are no sources or all shares are zero.
    pub fn new(weights: &[u64]) -> Self {
        let none = vec![0; weights.len()];
        let state = MixState {
            tokens: none.clone(),
            items: none.clone(),
            weights: none.clone(),
            since: none,
            ahead: vec![0; weights.len()],
            ended: vec![false; weights.len()],
        };
        let mut mixer = Mixer { state };
        mixer.set_weights(weights);
        mixer
    }

    /// Goes on from an earlier state.
    pub fn resume(state: MixState) -> Self {
        Mixer { state }
    }

    /// How far it has come.
    pub fn state(&self) -> &MixState {
        &self.state
    }

    /// Puts other shares into force. What each source is ahead or behind by is carried over, to the token.
    /// A source that has ended keeps a share of 0.
    ///
    /// # Panics
    /// If no source is left with a share.
    pub fn set_weights(&mut self, weights: &[u64]) {
        assert_eq!(weights.len(), self.state.tokens.len(), "one share for each source");
        let ended = &self.state.ended;
        let live = |(source, &weight): (usize, &u64)| if ended[source] { 0 } else { weight };
        let weights: Vec<u64> = weights.iter().enumerate().map(live).collect();
        if weights == self.state.weights {
            return;
        }
        assert!(weights.iter().sum::<u64>() > 0, "at least one source has a share");
        self.state.ahead = carry(&self.leads(), self.parts(), &weights);
        self.state.since.clone_from(&self.state.tokens);
        self.state.weights = weights;
    }

    /// Takes note that a source has nothing more to give: the others share what was its part.
    pub fn end(&mut self, source: usize) {
        self.state.ended[source] = true;
        let weights = self.state.weights.clone();
        self.set_weights(&weights);
    }

    /// Sources that may be next: those at or below their share. The length of the next item of each of
    /// them must be known to [`Mixer::next`].
    pub fn eligible(&self) -> impl Iterator<Item = usize> + '_ {
        let leads = self.leads();
        (0..leads.len()).filter(move |&s| self.state.weights[s] > 0 && leads[s] <= 0)
    }

    /// The source to take the next item from, where `length` says how many tokens that would have.
    pub fn next(&self, length: impl Fn(usize) -> u64) -> usize {
        // Served since the shares came into force, with the next item: done first is smallest by share.
        let done = |source: usize| {
            let MixState { tokens, since, ahead, .. } = &self.state;
            i128::from(tokens[source] - since[source] + length(source)) + i128::from(ahead[source])
        };
        let share = |source: usize| i128::from(self.state.weights[source]);
        let sooner = |&a: &usize, &b: &usize| -> Ordering {
            (done(a) * share(b)).cmp(&(done(b) * share(a))).then(a.cmp(&b))
        };
        self.eligible().min_by(sooner).expect("not all sources can be ahead of their shares")
    }

    /// Notes an item that was taken from `source`.
    pub fn add(&mut self, source: usize, tokens: u64) {
        self.state.tokens[source] += tokens;
        self.state.items[source] += 1;
    }

    /// The largest distance of a source from its share, in tokens.
    pub fn error_tokens(&self) -> u64 {
        let worst = self.leads().into_iter().map(i128::abs).max().unwrap_or(0);
        (worst / i128::from(self.parts().max(1))) as u64
    }

    fn parts(&self) -> u64 {
        self.state.weights.iter().sum()
    }

    /// What each source is ahead of its share by, in units of one part of a token.
    fn leads(&self) -> Vec<i128> {
        let MixState { tokens, weights, since, ahead, .. } = &self.state;
        let parts = i128::from(self.parts());
        let served = |source: usize| i128::from(tokens[source] - since[source]);
        let all: i128 = (0..tokens.len()).map(served).sum();
        let lead = |source: usize| {
            parts * (served(source) + i128::from(ahead[source])) - i128::from(weights[source]) * all
        };
        (0..tokens.len()).map(lead).collect()
    }
}

/// Leads in whole tokens that add up to 0. What a source without a share was ahead or behind by is taken
/// over by the others, by their shares.
fn carry(leads: &[i128], parts: u64, weights: &[u64]) -> Vec<i64> {
    let parts = i128::from(parts.max(1));
    let mut ahead: Vec<i64> = leads.iter().map(|lead| lead.div_euclid(parts) as i64).collect();
    for (ahead, _) in ahead.iter_mut().zip(weights).filter(|(_, weight)| **weight == 0) {
        *ahead = 0;
    }
    let all: u64 = weights.iter().sum();
    let mut left = -ahead.iter().sum::<i64>();
    let live: Vec<usize> = (0..weights.len()).filter(|&source| weights[source] > 0).collect();
    let spread = left;
    for &source in &live {
        let part = (i128::from(spread) * i128::from(weights[source])).div_euclid(i128::from(all));
        ahead[source] += part as i64;
        left -= part as i64;
    }
    for &source in live.iter().cycle().take(left as usize) {
        ahead[source] += 1;
    }
    ahead
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(weights: &[u64], lengths: &[u64], expected: &[usize]) {
        let mut mixer = Mixer::new(weights);
        let order: Vec<usize> = (0..expected.len())
            .map(|_| {
                let source = mixer.next(|source| lengths[source]);
                mixer.add(source, lengths[source]);
                source
            })
            .collect();
        assert_eq!(order, expected);
    }

    #[test]
    fn long_items_of_one_source_are_balanced_by_many_of_another() {
        check(&[1, 1], &[100, 30], &[1, 0, 1, 1, 1, 0, 1, 1, 1, 0]);
    }

    #[test]
    fn shares_follow_the_weights() {
        check(&[1, 4], &[10, 10], &[1, 0, 1, 1, 1, 1, 0, 1, 1, 1]);
        check(&[2, 1, 1], &[10, 10, 10], &[0, 1, 0, 2, 0, 1, 0, 2]);
    }

    #[test]
    fn a_source_without_a_share_is_never_asked() {
        check(&[0, 1], &[10, 10], &[1, 1, 1]);
    }

    #[test]
    fn a_resumed_mix_goes_on_as_if_never_stopped() {
        let mut mixer = Mixer::new(&[2, 3]);
        for tokens in 1..50 {
            assert_eq!(Mixer::resume(mixer.state().clone()), mixer);
            mixer.add(mixer.next(|_| tokens), tokens);
        }
    }

    #[test]
    fn when_a_source_ends_the_others_take_its_part() {
        let mut mixer = Mixer::new(&[1, 1, 2]);
        mixer.add(2, 100);
        mixer.end(2);
        for _ in 0..100 {
            let source = mixer.next(|_| 10);
            assert_ne!(source, 2);
            mixer.add(source, 10);
        }
        assert_eq!(mixer.state().tokens, [500, 500, 100]);
        assert_eq!(mixer.state().weights, [1, 1, 0]);
    }

    /// A source of items whose lengths are known one ahead.
    fn run(mixer: &mut Mixer, lengths: &mut [Vec<u64>], after: impl Fn(&Mixer, u64)) {
        let mut longest = 0;
        while lengths.iter().all(|lengths| !lengths.is_empty()) {
            let source = mixer.next(|source| lengths[source][lengths[source].len() - 1]);
            let length = lengths[source].pop().unwrap();
            mixer.add(source, length);
            longest = longest.max(length);
            after(mixer, longest);
        }
    }

    fn sources(count: usize, items: usize) -> impl Strategy<Value = (Vec<u64>, Vec<Vec<u64>>)> {
        let length = prop_oneof![4 => 1u64..50, 1 => 1u64..2000];
        let lengths = prop::collection::vec(length, 1..items);
        (1..=count).prop_flat_map(move |count| {
            let weights = prop::collection::vec(1u64..100, count);
            (weights, prop::collection::vec(lengths.clone(), count))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn the_error_at_every_prefix_is_at_most_one_item((weights, mut lengths) in sources(8, 120)) {
            let all: Vec<u64> = lengths.iter().flatten().copied().collect();
            let longest = all.into_iter().max().unwrap_or(0);
            let mut mixer = Mixer::new(&weights);
            run(&mut mixer, &mut lengths, |mixer, _| {
                assert!(mixer.error_tokens() <= longest, "{} > {longest}", mixer.error_tokens());
            });
        }

        #[test]
        fn shares_may_change_and_nothing_is_forgotten(
            (weights, mut lengths) in sources(5, 200),
            changes in prop::collection::vec(1u64..100, 5),
        ) {
            let mut mixer = Mixer::new(&weights);
            let longest = lengths.iter().flatten().copied().max().unwrap_or(0);
            for change in 1..4 {
                let halves = |lengths: &mut Vec<u64>| lengths.split_off(lengths.len() / 2);
                let mut first: Vec<Vec<u64>> = lengths.iter_mut().map(halves).collect();
                run(&mut mixer, &mut first, |mixer, _| {
                    // What is carried over may add to what the new shares do.
                    assert!(mixer.error_tokens() <= 2 * longest, "{}", mixer.error_tokens());
                });
                for (rest, first) in lengths.iter_mut().zip(first) {
                    rest.extend(first);
                }
                let before: Vec<i128> = mixer.leads();
                let parts = i128::from(mixer.parts());
                let changed: Vec<u64> =
                    weights.iter().zip(&changes).map(|(w, c)| w + c * change).collect();
                mixer.set_weights(&changed);
                prop_assert_eq!(mixer.state.ahead.iter().sum::<i64>(), 0);
                for (before, ahead) in before.iter().zip(&mixer.state.ahead) {
                    let off = (i128::from(*ahead) * parts - before).abs();
                    prop_assert!(off <= parts * weights.len() as i128, "{off}");
                }
            }
        }
    }
}
