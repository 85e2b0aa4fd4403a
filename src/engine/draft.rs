//! Guesses how a sequence goes on from what it holds already: a plain data structure.
//!
//! ```text
//! … the dose was 5 mg … <ANS> the dose was ▌      the last words stood here before:
//!     └─────────┘ └──┘         └──────────┘       what followed them then is the guess
//! ```
//!
//! Answers copy from their text, and each pair repeats the markers of the one before. A guess is checked by
//! the model in the same step that computes it, so a wrong one costs a row and changes nothing.

use std::collections::HashMap;

/// Tokens that must be equal before a guess is made.
pub const MATCH_MIN: usize = 3;
/// Equal tokens beyond which no more are looked at.
pub const MATCH_MAX: usize = 32;
/// Tokens of a guess at most.
pub const DRAFT_MAX: usize = 16;
/// Earlier places that are compared, the latest first.
const PLACES_MAX: usize = 8;

/// No earlier place.
const NONE: u32 = u32::MAX;

/// A place where the last tokens of a sequence stood before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    /// Number of equal tokens, at most [`MATCH_MAX`].
    pub length: usize,
    /// The place behind them.
    pub next: usize,
}

/// Where each run of [`MATCH_MIN`] tokens of a sequence stands.
#[derive(Clone, Debug, Default)]
pub struct Lookup {
    /// The place of a run's last token, where it stood last.
    last: HashMap<[u32; MATCH_MIN], u32>,
    /// For each place, where the run that ends there ended before.
    before: Vec<u32>,
}

impl Lookup {
    /// Takes in the tokens that came since the last call. Tokens are only ever appended.
    pub fn extend(&mut self, tokens: &[u32]) {
        for place in self.before.len()..tokens.len() {
            let before = match tokens[..=place].last_chunk::<MATCH_MIN>() {
                Some(run) => self.last.insert(*run, place as u32).unwrap_or(NONE),
                None => NONE,
            };
            self.before.push(before);
        }
    }

    /// The place where most of the last tokens stood before, the latest of several.
    ///
    /// # Panics
    /// If the tokens are not those that were taken in.
    pub fn find(&self, tokens: &[u32]) -> Option<Match> {
        assert_eq!(tokens.len(), self.before.len(), "all tokens were taken in");
        let end = tokens.len().checked_sub(1)?;
        let mut best: Option<Match> = None;
        let mut place = self.before[end];
        for _ in 0..PLACES_MAX {
            if place == NONE {
                break;
            }
            let earlier = &tokens[..=place as usize];
            let pairs = earlier.iter().rev().zip(tokens.iter().rev()).take(MATCH_MAX);
            let length = pairs.take_while(|(earlier, now)| earlier == now).count();
            if best.is_none_or(|best| length > best.length) {
                best = Some(Match { length, next: earlier.len() });
            }
            if length == MATCH_MAX {
                break;
            }
            place = self.before[place as usize];
        }
        best
    }
}

impl Match {
    /// The `count` tokens that follow if the sequence goes on as it did there. A guess that reaches the end
    /// of the sequence goes on in itself: what repeats is guessed to repeat again.
    pub fn guess(&self, tokens: &[u32], count: usize) -> Vec<u32> {
        let mut guess: Vec<u32> = Vec::with_capacity(count);
        for place in self.next..self.next + count {
            guess.push(match tokens.get(place) {
                Some(&token) => token,
                None => guess[place - tokens.len()],
            });
        }
        guess
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn guess(tokens: &[u32], count: usize) -> Option<(usize, Vec<u32>)> {
        let mut lookup = Lookup::default();
        lookup.extend(tokens);
        lookup.find(tokens).map(|found| (found.length, found.guess(tokens, count)))
    }

    fn check(text: &str, count: usize, expected: Option<(usize, &str)>) {
        let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
        let found = guess(&tokens, count).map(|(length, guess)| {
            (length, guess.into_iter().map(|token| token as u8 as char).collect::<String>())
        });
        let expected = expected.map(|(length, guess)| (length, guess.to_owned()));
        assert_eq!(found, expected, "{text:?}");
    }

    #[test]
    fn what_followed_before_is_guessed_to_follow_again() {
        check("the dose was 5 mg; the dose was ", 4, Some((13, "5 mg")));
    }

    #[test]
    fn a_longer_match_goes_before_a_later_one() {
        check("xabcd1 abcd2 xabcd", 1, Some((5, "1")));
        check("abcd1.abcd2 abcd", 1, Some((4, "2")));
    }

    #[test]
    fn too_little_that_is_equal_is_no_match() {
        check("ab1 ab", 1, None);
        check("ab", 1, None);
        check("", 1, None);
    }

    #[test]
    fn what_repeats_is_guessed_to_repeat_again() {
        check("abcabcabc", 7, Some((6, "abcabca")));
        check("aaaa", 5, Some((3, "aaaaa")));
    }

    proptest! {
        #[test]
        fn the_place_found_is_that_of_looking_everywhere(
            tokens in prop::collection::vec(0u32..3, 0..80),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut lookup = Lookup::default();
            lookup.extend(&tokens[..cut.index(tokens.len() + 1)]);
            lookup.extend(&tokens);
            let length = |next: usize| {
                let pairs = tokens[..next].iter().rev().zip(tokens.iter().rev()).take(MATCH_MAX);
                pairs.take_while(|(earlier, now)| earlier == now).count()
            };
            let places = (1..tokens.len()).rev().filter(|&next| length(next) >= MATCH_MIN);
            let best = places.take(PLACES_MAX).max_by_key(|&next| (length(next), next));
            let best = best.map(|next| Match { length: length(next), next });
            prop_assert_eq!(lookup.find(&tokens), best);
        }
    }
}
