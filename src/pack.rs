//! Packs items into sequences of a fixed length, in one of three ways ([`PackMode`]). Best fit, the default:
//!
//! ```text
//! items ─▶ [ open sequences, at most `open_max` ] ─▶ full sequences
//!            an item goes where it leaves the least room (best fit)
//! ```
//!
//! Nothing is truncated: an item longer than a sequence is split, and what is left of it is placed like any
//! other. When no open sequence has room and no more may be opened, the fullest one is topped up with the
//! start of the item and closed. At the end, the emptiest open sequences are split up to fill the others,
//! so that less than one sequence of room is left over. Best-fit packing without
//! truncation follows Ding et al., 2024 (arXiv 2404.10830).

use crate::record::{Item, Segment, Sequence};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Sequences that may be open at a time, unless told otherwise.
pub const OPEN_MAX: usize = 64;

/// The shortest run of tokens that is split off an item to fill a gap. Smaller gaps are padded.
const PIECE_MIN: usize = 16;

/// How sequences are filled: part of a run's configuration. Nothing is ever truncated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PackMode {
    /// An item goes into that of at most so many open sequences where it leaves the least room.
    BestFit(usize),
    /// One item after another, cut wherever a sequence is full (Brown et al., 2020; arXiv 2005.14165).
    Concatenate,
    /// Every item starts a sequence of its own; what is longer goes on in further ones.
    OneItem,
}

impl Default for PackMode {
    fn default() -> Self {
        PackMode::BestFit(OPEN_MAX)
    }
}

impl std::fmt::Display for PackMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PackMode::BestFit(open) => write!(f, "best fit among {open} sequences"),
            PackMode::Concatenate => write!(f, "one after another"),
            PackMode::OneItem => write!(f, "one item a sequence"),
        }
    }
}

/// Packs one stream of items.
#[derive(Clone, Debug)]
pub struct Packer {
    length: usize,
    mode: PackMode,
    opened: u64,
    /// Open sequences by free room, then by age.
    open: BTreeMap<(usize, u64), Sequence>,
    tally: PackTally,
}

/// What a packer did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackTally {
    /// Tokens placed.
    pub tokens: u64,
    /// Tokens of room left in closed sequences.
    pub padding: u64,
    /// Closed sequences.
    pub sequences: u64,
    /// Cuts through items.
    pub cuts: u64,
}

impl Packer {
    /// A packer for sequences of `length` tokens.
    ///
    /// # Panics
    /// If sequences have no tokens, or none may be open.
    pub fn new(length: usize, mode: PackMode) -> Self {
        assert!(
            length > 0 && mode != PackMode::BestFit(0),
            "sequences have tokens, and one is open"
        );
        let (open, tally) = (BTreeMap::new(), PackTally::default());
        Packer { length, mode, opened: 0, open, tally }
    }

    /// Places an item; returns the sequences that are full now.
    ///
    /// # Panics
    /// If the item says for some of its tokens, but not all, whether they are learned.
    pub fn push(&mut self, item: &Item) -> Vec<Sequence> {
        let tokens = item.tokens.len();
        assert!(item.learned.is_empty() || item.learned.len() == tokens, "one flag a token");
        let mut full = Vec::new();
        let mut at = 0;
        while at < tokens {
            at += match self.mode {
                PackMode::BestFit(open_max) => self.place(item, at, open_max, &mut full),
                PackMode::Concatenate => self.go_on(item, at, &mut full),
                PackMode::OneItem => self.start_anew(item, at, &mut full),
            };
        }
        self.tally.tokens += tokens as u64;
        self.tally.sequences += full.len() as u64;
        full
    }

    /// Closes what is open; returns the last sequences.
    pub fn finish(&mut self) -> Vec<Sequence> {
        let mut open: Vec<Sequence> = std::mem::take(&mut self.open).into_values().collect();
        let room = |sequences: &[Sequence]| -> usize {
            sequences.iter().map(|sequence| self.length - sequence.tokens.len()).sum()
        };
        // The emptiest is last. While the others have room for it, it is split up among them.
        let mut cuts = 0;
        while let Some(emptiest) = open.pop() {
            if emptiest.tokens.len() > room(&open) {
                open.push(emptiest);
                break;
            }
            cuts += pour(&emptiest, &mut open, self.length);
        }
        self.tally.cuts += cuts;
        self.tally.padding += room(&open) as u64;
        self.tally.sequences += open.len() as u64;
        open
    }

    /// What was done so far.
    pub fn tally(&self) -> PackTally {
        self.tally
    }

    /// Writes on in the only open sequence.
    fn go_on(&mut self, item: &Item, at: usize, full: &mut Vec<Sequence>) -> usize {
        let (_, mut sequence) = self.open.pop_first().unwrap_or_default();
        let left = item.tokens.len() - at;
        let taken = left.min(self.length - sequence.tokens.len());
        append(&mut sequence, item, at, taken);
        self.tally.cuts += u64::from(taken < left);
        match self.length - sequence.tokens.len() {
            0 => full.push(sequence),
            free => drop(self.open.insert((free, 0), sequence)),
        }
        taken
    }

    /// Writes into a sequence that nothing else goes into.
    fn start_anew(&mut self, item: &Item, at: usize, full: &mut Vec<Sequence>) -> usize {
        let left = item.tokens.len() - at;
        let taken = left.min(self.length);
        let mut sequence = Sequence::default();
        append(&mut sequence, item, at, taken);
        self.tally.cuts += u64::from(taken < left);
        self.tally.padding += (self.length - taken) as u64;
        full.push(sequence);
        taken
    }

    /// Places the tokens of `item` from `at` on, or as many of them as one sequence takes.
    fn place(
        &mut self,
        item: &Item,
        at: usize,
        open_max: usize,
        full: &mut Vec<Sequence>,
    ) -> usize {
        let left = item.tokens.len() - at;
        let best = self.open.range((left, 0)..).next().map(|(&key, _)| key);
        let (key, taken) = match (best, self.open.first_key_value()) {
            (Some(key), _) => (Some(key), left),
            (None, Some((&fullest, _))) if self.open.len() == open_max => {
                // No gap smaller than a piece is filled, and none is left behind by the rest.
                let (gap, _) = fullest;
                let fits = gap.min(left.saturating_sub(PIECE_MIN));
                (Some(fullest), if fits < PIECE_MIN { 0 } else { fits })
            }
            _ => (None, left.min(self.length)),
        };
        let (age, mut sequence, crowded) = match key {
            Some(key) => {
                let sequence = self.open.remove(&key).expect("just found");
                (key.1, sequence, taken < left)
            }
            None => {
                self.opened += 1;
                (self.opened, empty(self.length), false)
            }
        };
        append(&mut sequence, item, at, taken);
        if taken > 0 && taken < left {
            self.tally.cuts += 1;
        }
        let free = self.length - sequence.tokens.len();
        if free == 0 || crowded {
            self.tally.padding += free as u64;
            full.push(sequence);
        } else {
            self.open.insert((free, age), sequence);
        }
        taken
    }
}

/// A sequence with room for so many tokens.
fn empty(length: usize) -> Sequence {
    Sequence {
        tokens: Vec::with_capacity(length),
        learned: Vec::with_capacity(length),
        ..Sequence::default()
    }
}

fn append(sequence: &mut Sequence, item: &Item, at: usize, count: usize) {
    if count == 0 {
        return;
    }
    let (start, run) = (sequence.tokens.len() as u32, at as u32..(at + count) as u32);
    sequence.shots.extend(item.shots.iter().filter_map(|shot| shot.within(&run, start)));
    sequence.tokens.extend_from_slice(&item.tokens[at..at + count]);
    match item.learned.get(at..at + count) {
        Some(learned) if !item.learned.is_empty() => sequence.learned.extend_from_slice(learned),
        _ => sequence.learned.extend(std::iter::repeat_n(true, count)),
    }
    sequence.segments.push(Segment {
        item: item.id.clone(),
        source: item.source,
        offset: at as u32,
        length: count as u32,
    });
}

/// Splits the segments of `from` up among the room in `into`; returns the number of cuts.
fn pour(from: &Sequence, into: &mut [Sequence], length: usize) -> u64 {
    let (mut cuts, mut start, mut target) = (0, 0, 0);
    for segment in &from.segments {
        let (mut done, count) = (0, segment.length as usize);
        while done < count {
            let free = length - into[target].tokens.len();
            if free == 0 {
                target += 1;
                continue;
            }
            let taken = free.min(count - done);
            let run = start + done..start + done + taken;
            let (place, cut) = (into[target].tokens.len() as u32, run.start as u32..run.end as u32);
            let shots = from.shots.iter().filter_map(|shot| shot.within(&cut, place));
            into[target].shots.extend(shots);
            into[target].tokens.extend_from_slice(&from.tokens[run.clone()]);
            into[target].learned.extend_from_slice(&from.learned[run]);
            into[target].segments.push(Segment {
                offset: segment.offset + done as u32,
                length: taken as u32,
                ..segment.clone()
            });
            done += taken;
            cuts += u64::from(done < count);
        }
        start += count;
    }
    cuts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Shot;
    use crate::seed;
    use proptest::prelude::*;

    fn items(lengths: &[usize]) -> Vec<Item> {
        let mut next = 0u32;
        let item = |(index, &length): (usize, &usize)| {
            let tokens: Vec<u32> = (next..next + length as u32).collect();
            next += length as u32;
            let learned = tokens.iter().map(|token| token % 3 > 0).collect();
            // Two shots with a token between them that belongs to none.
            let (offset, half) = (length as u32 / 2, length as u32 / 3);
            let shots = [(0, 0, half), (1, offset, length as u32 - offset)]
                .map(|(round, offset, length)| Shot { round, offset, length })
                .to_vec();
            Item { id: format!("item-{index}"), source: index as u32 % 2, tokens, learned, shots }
        };
        lengths.iter().enumerate().map(item).collect()
    }

    /// The round of each token.
    fn rounds_of(tokens: &[u32], shots: &[Shot]) -> Vec<(u32, Option<u32>)> {
        assert!(shots.windows(2).all(|two| two[0].offset + two[0].length <= two[1].offset));
        let holds =
            |shot: &&Shot, place: u32| (shot.offset..shot.offset + shot.length).contains(&place);
        let round =
            |place: u32| shots.iter().find(|shot| holds(shot, place)).map(|shot| shot.round);
        tokens.iter().zip(0..).map(|(&token, place)| (token, round(place))).collect()
    }

    fn pack(items: &[Item], length: usize, mode: PackMode) -> (Vec<Sequence>, PackTally) {
        let mut packer = Packer::new(length, mode);
        let mut sequences: Vec<Sequence> =
            items.iter().flat_map(|item| packer.push(item)).collect();
        sequences.extend(packer.finish());
        (sequences, packer.tally())
    }

    /// Lengths of the segments of each sequence.
    fn check(lengths: &[usize], length: usize, mode: PackMode, expected: &[&[u32]]) {
        let (sequences, _) = pack(&items(lengths), length, mode);
        let found: Vec<Vec<u32>> = sequences
            .iter()
            .map(|sequence| sequence.segments.iter().map(|segment| segment.length).collect())
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn an_item_goes_where_it_leaves_the_least_room() {
        check(&[60, 80, 20, 40], 100, PackMode::BestFit(8), &[&[80, 20], &[60, 40]]);
    }

    #[test]
    fn an_item_may_span_sequences() {
        check(&[250], 100, PackMode::BestFit(8), &[&[100], &[100], &[50]]);
    }

    #[test]
    fn a_full_house_closes_its_fullest_sequence() {
        check(&[70, 60, 80], 100, PackMode::BestFit(2), &[&[70, 30], &[60], &[50]]);
    }

    #[test]
    fn a_small_gap_is_padded_rather_than_filled() {
        check(&[90, 90, 50], 100, PackMode::BestFit(2), &[&[90], &[90], &[50]]);
    }

    #[test]
    fn at_the_end_the_emptiest_fills_the_others() {
        check(&[80, 90, 25], 100, PackMode::BestFit(8), &[&[90, 10], &[80, 15]]);
    }

    #[test]
    fn concatenated_items_are_cut_where_a_sequence_is_full() {
        check(&[60, 80, 70], 100, PackMode::Concatenate, &[&[60, 40], &[40, 60], &[10]]);
        check(&[100, 100], 100, PackMode::Concatenate, &[&[100], &[100]]);
    }

    #[test]
    fn an_item_may_have_its_sequences_for_itself() {
        check(&[60, 250], 100, PackMode::OneItem, &[&[60], &[100], &[100], &[50]]);
    }

    #[test]
    fn nothing_gives_nothing() {
        check(&[], 100, PackMode::BestFit(8), &[]);
        check(&[0, 0], 100, PackMode::BestFit(8), &[]);
    }

    proptest! {
        /// Whatever the items are, they can be read back from the sequences.
        #[test]
        fn packing_conserves_tokens(
            lengths in prop::collection::vec(0usize..400, 0..60),
            length in 1usize..150,
            mode in prop_oneof![
                (1usize..12).prop_map(PackMode::BestFit),
                Just(PackMode::Concatenate),
                Just(PackMode::OneItem),
            ],
        ) {
            let items = items(&lengths);
            let (sequences, tally) = pack(&items, length, mode);
            let mut runs: BTreeMap<(String, u32), (Vec<u32>, Vec<bool>)> = BTreeMap::new();
            let mut rounds: BTreeMap<u32, Option<u32>> = BTreeMap::new();
            for sequence in &sequences {
                prop_assert!(!sequence.tokens.is_empty() && sequence.tokens.len() <= length);
                prop_assert_eq!(sequence.positions().count(), sequence.tokens.len());
                rounds.extend(rounds_of(&sequence.tokens, &sequence.shots));
                let mut start = 0;
                for segment in &sequence.segments {
                    let run = start..start + segment.length as usize;
                    let old = runs.insert(
                        (segment.item.clone(), segment.offset),
                        (sequence.tokens[run.clone()].to_vec(), sequence.learned[run.clone()].to_vec()),
                    );
                    prop_assert!(old.is_none(), "a run was placed twice");
                    start = run.end;
                }
            }
            for item in &items {
                for (token, round) in rounds_of(&item.tokens, &item.shots) {
                    prop_assert_eq!(rounds[&token], round, "token {}", token);
                }
                let of_item = || runs.iter().filter(|((id, _), _)| *id == item.id);
                let tokens: Vec<u32> = of_item().flat_map(|(_, run)| run.0.clone()).collect();
                let learned: Vec<bool> = of_item().flat_map(|(_, run)| run.1.clone()).collect();
                prop_assert_eq!(&tokens, &item.tokens);
                prop_assert_eq!(&learned, &item.learned);
            }
            let placed: usize = sequences.iter().map(|sequence| sequence.tokens.len()).sum();
            prop_assert_eq!(tally.tokens, placed as u64);
            prop_assert_eq!(tally.padding, (sequences.len() * length - placed) as u64);
            prop_assert_eq!(tally.sequences, sequences.len() as u64);
        }
    }

    #[test]
    fn little_room_is_wasted() {
        let mut stream = seed::stream(1, "lengths", "test");
        let lengths: Vec<usize> = (0..3000).map(|_| 20 + stream.index(1200)).collect();
        let (sequences, tally) = pack(&items(&lengths), 2048, PackMode::BestFit(OPEN_MAX));
        let used = tally.tokens as f64 / (sequences.len() * 2048) as f64;
        assert!(used > 0.997, "{used}");
        assert!(tally.cuts < 450, "{tally:?}");
    }
}
