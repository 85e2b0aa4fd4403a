//! How many guessed tokens are worth computing: an online estimate without tensors.
//!
//! ```text
//! seconds of a step   =   step + prompt rows * prompt + sequences * sequence + guessed rows * guess
//! a row is computed if    P(its guess holds) * (sequence + step / sequences)  >  guess
//! ```
//!
//! A guess that holds saves a sequence one of its turns, with the reading of its keys and values, and a share of what
//! a step costs whatever is in it; a guess that fails costs its row. The four costs are fitted to measured steps, and how
//! often guesses hold is counted by how much of what precedes them was equal. Estimates decide how fast tokens come,
//! never which.

use super::draft::{DRAFT_MAX, MATCH_MIN};

/// Matches are counted together by length: 3, 4, 5 to 6, 7 to 10, 11 to 18, 19 and more.
const CLASSES: usize = 6;
/// What earlier counts weigh when one more is made.
const KEPT_COUNT: f64 = 0.998;
/// What earlier steps weigh when one more is measured.
const KEPT_STEP: f64 = 0.995;
/// Matches of a class that is not worth it, between two that are tried nevertheless.
const TRY_EVERY: u64 = 64;
/// Steps before costs are trusted.
const STEPS_MIN: f64 = 16.0;
/// The share of a guess in what a turn costs while nothing is measured.
const SHARE_UNKNOWN: f64 = 0.5;
/// Rows that cost about as much as a step without any. A step counts by what share of its time was unforeseen, for long
/// steps are off by more seconds than short ones take.
const ROWS_OF_STEP: f64 = 8.0;
/// How much more than others rows of prompts count there: what they cost depends on how much stands before them.
const PROMPT_DOUBT: f64 = 3.0;
/// How much more than foreseen a step may seem to take: the machine may have had something else to do.
const SLOW_MAX: f64 = 2.0;
/// What a guessed row is thought to cost before any was measured, in rows of prompts: these go without the last block
/// and the head.
const GUESS_UNKNOWN: f64 = 1.5;
/// Steps of nothing but guesses that this thought counts as.
const UNKNOWN_WEIGHT: f64 = 1.0;

#[derive(Clone, Copy, Debug, Default)]
struct Class {
    /// Guesses that were compared with what the model says.
    compared: f64,
    held: f64,
    passed_over: u64,
}

/// What a step computed, and how long it took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Rows of prompts.
    pub prompt_rows: u64,
    /// Sequences that went on by their last token.
    pub sequences: u64,
    /// Rows of guesses behind these.
    pub guessed_rows: u64,
    /// Seconds.
    pub seconds: f64,
}

/// What is fitted: costs of a step, a row of a prompt, a sequence and a guessed row.
const COSTS: usize = 4;

/// Estimates of what guessing brings.
#[derive(Clone, Debug, Default)]
pub struct Odds {
    classes: [Class; CLASSES],
    /// Steps that were measured, weighted like the sums.
    steps: f64,
    /// Weighted sums over steps: of products of what they held, and of those with seconds.
    products: [[f64; COSTS]; COSTS],
    seconds: [f64; COSTS],
    /// Seconds.
    costs: [f64; COSTS],
}

impl Odds {
    /// How many tokens to guess behind a match of this length, in a step of so many sequences.
    pub fn worth(&mut self, length: usize, sequences: usize) -> usize {
        let share = self.guess_share(sequences);
        let class = &mut self.classes[class(length)];
        // Before anything was compared, guesses are thought to hold.
        let holds: f64 = (class.held + 3.9) / (class.compared + 4.0);
        let count = (share.ln() / holds.ln()) as usize; // holds^count > share
        if count > 0 {
            return count.min(DRAFT_MAX);
        }
        class.passed_over += 1;
        usize::from(class.passed_over.is_multiple_of(TRY_EVERY))
    }

    /// Counts a guess of `drafted` tokens of which the first `accepted` held.
    pub fn compared(&mut self, length: usize, drafted: usize, accepted: usize) {
        let class = &mut self.classes[class(length)];
        let compared = drafted.min(accepted + 1); // behind the first that fails nothing is learned
        class.compared = class.compared * KEPT_COUNT + compared as f64;
        class.held = class.held * KEPT_COUNT + accepted as f64;
    }

    /// Takes in how long a step took.
    pub fn measured(&mut self, measured: Measured) {
        let Measured { prompt_rows, sequences, guessed_rows, seconds } = measured;
        let terms = [1.0, prompt_rows as f64, sequences as f64, guessed_rows as f64];
        let foreseen: f64 = terms.iter().zip(self.costs).map(|(term, cost)| term * cost).sum();
        let seconds = match self.steps >= STEPS_MIN && foreseen > 0.0 {
            true => seconds.min(SLOW_MAX * foreseen),
            false => seconds,
        };
        let rows = ROWS_OF_STEP + PROMPT_DOUBT * terms[1] + terms[2] + terms[3];
        let weight = rows.powi(-2);
        self.steps = self.steps * KEPT_STEP + 1.0;
        for i in 0..COSTS {
            for j in 0..COSTS {
                let product = weight * terms[i] * terms[j];
                self.products[i][j] = self.products[i][j] * KEPT_STEP + product;
            }
            self.seconds[i] = self.seconds[i] * KEPT_STEP + weight * terms[i] * seconds;
        }
        // As if steps of guesses had been measured that cost what they are thought to.
        let thought = [0.0, -GUESS_UNKNOWN, 0.0, 1.0];
        let mut products = self.products;
        for i in 0..COSTS {
            for j in 0..COSTS {
                products[i][j] += UNKNOWN_WEIGHT * thought[i] * thought[j];
            }
        }
        fit(&mut self.costs, &products, &self.seconds);
    }

    /// What a guessed row costs of what a turn of a sequence costs.
    fn guess_share(&self, sequences: usize) -> f64 {
        if self.steps < STEPS_MIN {
            return SHARE_UNKNOWN;
        }
        let [step, _, sequence, guess] = self.costs;
        let turn = sequence + step / sequences.max(1) as f64;
        if turn > 0.0 { (guess / turn).clamp(0.02, 0.98) } else { SHARE_UNKNOWN }
    }
}

fn class(length: usize) -> usize {
    match length.saturating_sub(MATCH_MIN) {
        0 => 0,
        more => (more.ilog2() as usize + 1).min(CLASSES - 1),
    }
}

/// Brings costs nearer to those that fit best of all that are not below zero (Gauss-Seidel with projection). Where steps
/// are alike, what they have in common may fall to either of two costs, and stays with the one that had it.
fn fit(costs: &mut [f64; COSTS], products: &[[f64; COSTS]; COSTS], seconds: &[f64; COSTS]) {
    const SWEEPS: usize = 16;
    for _ in 0..SWEEPS {
        for i in 0..COSTS {
            let others = (0..COSTS).filter(|&j| j != i);
            let explained: f64 = others.map(|j| products[i][j] * costs[j]).sum();
            if products[i][i] > 0.0 {
                costs[i] = ((seconds[i] - explained) / products[i][i]).max(0.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Costs of a step, a row of a prompt, a sequence and a guess.
    type Costs = [f64; COSTS];

    /// Steps that cost so much, off by up to a fifth of themselves, one in fifty five times as much: with prompts of up
    /// to 180 rows, `sequences` or up to four fewer, and guesses in one of two if any are made.
    fn measured(costs: Costs, sequences: u64, guesses: bool) -> Odds {
        let mut odds = Odds::default();
        for index in 0..400u64 {
            let prompt_rows = (index % 9).max(5) * 60 - 300;
            let sequences = sequences - (index % 5).min(sequences / 8);
            let guessed_rows = if guesses && index % 2 == 0 { index % 11 } else { 0 };
            let terms = [1, prompt_rows, sequences, guessed_rows].map(|term| term as f64);
            let seconds: f64 = terms.iter().zip(costs).map(|(term, cost)| term * cost).sum();
            let off = (index as f64 * 12.9898).sin() / 5.0;
            let seconds = seconds * if index % 50 == 49 { 5.0 } else { 1.0 + off };
            odds.measured(Measured { prompt_rows, sequences, guessed_rows, seconds });
        }
        odds
    }

    /// What is guessed by 8 sequences with such costs, if guesses hold so often.
    fn check(costs: Costs, holds: f64, expected: std::ops::RangeInclusive<usize>) {
        let mut odds = measured(costs, 8, true);
        for index in 0..400u32 {
            let held =
                (f64::from(index) * holds) as usize != (f64::from(index + 1) * holds) as usize;
            odds.compared(5, 1, usize::from(held));
        }
        let found = odds.worth(5, 8);
        assert!(expected.contains(&found), "{found} for {costs:?}, {holds}");
    }

    #[test]
    fn what_costs_nothing_is_always_guessed() {
        check([1.0, 5e-7, 1e-6, 1e-6], 0.9, DRAFT_MAX..=DRAFT_MAX);
    }

    #[test]
    fn what_costs_all_is_guessed_only_if_it_surely_holds() {
        check([0.0, 0.5, 1.0, 1.1], 0.9, 0..=0);
        check([0.0, 0.5, 1.0, 0.9], 1.0, DRAFT_MAX..=DRAFT_MAX);
    }

    #[test]
    fn rows_are_added_while_they_bring_more_than_they_cost() {
        // A guess is half of what a turn costs, so guesses go on while they hold with one half.
        check([8.0, 0.5, 1.0, 1.0], 0.8, 2..=4);
        check([8.0, 0.5, 1.0, 1.0], 0.4, 0..=0);
    }

    #[test]
    fn reading_keys_and_values_is_saved_by_a_guess_that_holds() {
        for (sequences, guesses) in [(32, true), (32, false), (8, true)] {
            // As measured with texts of a thousand tokens, in microseconds.
            let odds = measured([1000.0, 115.0, 480.0, 200.0], sequences, guesses);
            let share = odds.guess_share(sequences as usize);
            let expected = 200.0 / (480.0 + 1000.0 / sequences as f64);
            assert!(
                (share / expected - 1.0).abs() < 0.3,
                "{share} {expected} {sequences} {guesses}"
            );
        }
    }

    #[test]
    fn what_did_not_pay_is_tried_again_once_in_a_while() {
        let mut odds = Odds::default();
        for _ in 0..100 {
            odds.compared(3, 1, 0);
        }
        let tried: usize = (0..10 * TRY_EVERY).map(|_| odds.worth(3, 1)).sum();
        assert_eq!(tried, 10);
    }

    #[test]
    fn matches_are_told_apart_by_length() {
        let classes: Vec<usize> = [3, 4, 5, 6, 7, 10, 11, 18, 19, 32].map(class).to_vec();
        assert_eq!(classes, [0, 1, 2, 2, 3, 3, 4, 4, 5, 5]);
    }
}
