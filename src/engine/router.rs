//! Which of several equal engines a request goes to.
//!
//! ```text
//! round r of a chain: [ text 0, pairs 0, … text r ]     all begin with the first tokens of text 0,
//!                       └── head ──┘                    so all go where these are in the cache
//! ```
//!
//! The head of a prompt names its chain: each round's prompt starts with the prompt of the round before,
//! and the head is no longer than what an engine shares. Nothing else needs to be known of chains. Where
//! the oldest texts were left out of a prompt, the head is another one, and nothing is in any cache anyway.
//! A request leaves its engine only if that is full while another has nothing to do.

use crate::kernels::cached::BLOCK;
use crossbeam_channel::Sender;
use xxhash_rust::xxh3::Xxh3;

/// A queue in front of an engine.
pub trait Line {
    /// Whether it takes no more.
    fn is_full(&self) -> bool;
    /// Whether nothing waits in it.
    fn is_empty(&self) -> bool;
}

impl<T> Line for Sender<T> {
    fn is_full(&self) -> bool {
        Sender::is_full(self)
    }

    fn is_empty(&self) -> bool {
        Sender::is_empty(self)
    }
}

/// The engine of a prompt among those behind some lines: that of its chain, or one that has nothing to do.
///
/// # Panics
/// If there are no lines.
pub fn route(prompt: &[u32], lines: &[impl Line]) -> usize {
    let home = home(prompt, lines.len());
    if !lines[home].is_full() {
        return home;
    }
    lines.iter().position(Line::is_empty).unwrap_or(home)
}

/// The engine that the chain of a prompt belongs to.
fn home(prompt: &[u32], engines: usize) -> usize {
    assert!(engines > 0, "somebody must answer");
    if engines == 1 {
        return 0;
    }
    let mut hash = Xxh3::new();
    for token in &prompt[..prompt.len().min(BLOCK)] {
        hash.update(&token.to_le_bytes());
    }
    (hash.digest() % engines as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// How many wait, of how many that can.
    struct Waiting(usize, usize);

    impl Line for Waiting {
        fn is_full(&self) -> bool {
            self.0 == self.1
        }

        fn is_empty(&self) -> bool {
            self.0 == 0
        }
    }

    fn check(waiting: [usize; 2], expected: impl Fn(usize) -> usize) {
        for token in 0..20 {
            let prompt = [token];
            let lines = waiting.map(|waiting| Waiting(waiting, 3));
            assert_eq!(route(&prompt, &lines), expected(home(&prompt, 2)), "{token}");
        }
    }

    #[test]
    fn a_prompt_waits_at_home_while_others_are_busy() {
        check([3, 3], |home| home);
        check([3, 1], |home| home);
        check([2, 0], |home| home);
    }

    #[test]
    fn a_prompt_goes_to_who_has_nothing_to_do_if_home_is_full() {
        check([3, 0], |_| 1);
        check([0, 3], |_| 0);
    }

    #[test]
    fn chains_are_spread_over_all() {
        let mut counts = [0; 4];
        for token in 0..4000 {
            counts[home(&[1, token], 4)] += 1;
        }
        assert!(counts.iter().all(|&count| (850..1150).contains(&count)), "{counts:?}");
    }

    proptest! {
        #[test]
        fn all_rounds_of_a_chain_have_one_home(
            first in prop::collection::vec(0u32..9, BLOCK..200),
            more in prop::collection::vec(0u32..9, 0..200),
            engines in 1usize..9,
        ) {
            let home_of_first = home(&first, engines);
            let next = [first, more].concat();
            prop_assert_eq!(home(&next, engines), home_of_first);
            prop_assert!(home_of_first < engines);
        }
    }
}
