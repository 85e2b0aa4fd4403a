//! How many guessed tokens are worth computing: an online estimate without tensors.
//!
//! ```text
//! a row is computed if    P(its guess holds) * (row + step / sequences)  >  row
//! ```
//!
//! A guess that holds saves the row of a later step and a share of what a step costs whatever its rows; a
//! guess that fails costs its row. Both costs are fitted to measured steps, and how often guesses hold is
//! counted by how much of what precedes them was equal. Estimates decide how fast tokens come, never which.

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
/// The share of a row in what a token costs while nothing is measured.
const SHARE_UNKNOWN: f64 = 0.5;

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
    pub prompt_rows: usize,
    /// Rows whose next token was wanted.
    pub sampled_rows: usize,
    /// Seconds.
    pub seconds: f64,
}

/// Estimates of what guessing brings.
#[derive(Clone, Debug, Default)]
pub struct Odds {
    classes: [Class; CLASSES],
    /// Weighted sums over steps: of products of (1, prompt rows, sampled rows), and of those with seconds.
    products: [[f64; 3]; 3],
    seconds: [f64; 3],
}

impl Odds {
    /// How many tokens to guess behind a match of this length, in a step of so many sequences.
    pub fn worth(&mut self, length: usize, sequences: usize) -> usize {
        let share = self.row_share(sequences);
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
        let Measured { prompt_rows, sampled_rows, seconds } = measured;
        let terms = [1.0, prompt_rows as f64, sampled_rows as f64];
        for i in 0..3 {
            for j in 0..3 {
                self.products[i][j] = self.products[i][j] * KEPT_STEP + terms[i] * terms[j];
            }
            self.seconds[i] = self.seconds[i] * KEPT_STEP + terms[i] * seconds;
        }
    }

    /// What a row costs of what a token costs.
    fn row_share(&self, sequences: usize) -> f64 {
        if self.products[0][0] < STEPS_MIN {
            return SHARE_UNKNOWN;
        }
        let [step, _, row] = solve(self.products, self.seconds);
        let (step, row) = (step.max(0.0), row.max(0.0));
        let token = row + step / sequences.max(1) as f64;
        if token > 0.0 { (row / token).clamp(0.02, 0.98) } else { SHARE_UNKNOWN }
    }
}

fn class(length: usize) -> usize {
    match length.saturating_sub(MATCH_MIN) {
        0 => 0,
        more => (more.ilog2() as usize + 1).min(CLASSES - 1),
    }
}

/// The solution of three equations, by elimination; a little is added to the diagonal so that there is one.
fn solve(mut left: [[f64; 3]; 3], mut right: [f64; 3]) -> [f64; 3] {
    for i in 0..3 {
        left[i][i] += 1e-6 * left[i][i] + 1e-9;
    }
    for i in 0..3 {
        for below in i + 1..3 {
            let factor = left[below][i] / left[i][i];
            for j in i..3 {
                left[below][j] -= factor * left[i][j];
            }
            right[below] -= factor * right[i];
        }
    }
    let mut found = [0.0; 3];
    for i in (0..3).rev() {
        let known: f64 = (i + 1..3).map(|j| left[i][j] * found[j]).sum();
        found[i] = (right[i] - known) / left[i][i];
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is guessed once steps cost `step + row * rows` and guesses hold so often.
    fn check(step: f64, row: f64, holds: f64, expected: std::ops::RangeInclusive<usize>) {
        let mut odds = Odds::default();
        for index in 0..400 {
            let (prompt_rows, sampled_rows) = (index % 7 * 30, 8 + index % 5);
            let seconds = step + row * (0.5 * prompt_rows as f64 + sampled_rows as f64);
            odds.measured(Measured { prompt_rows, sampled_rows, seconds });
            let held = (index as f64 * holds) as usize != ((index + 1) as f64 * holds) as usize;
            odds.compared(5, 1, usize::from(held));
        }
        let found = odds.worth(5, 8);
        assert!(expected.contains(&found), "{found} for {step}, {row}, {holds}");
    }

    #[test]
    fn what_costs_nothing_is_always_guessed() {
        check(1.0, 1e-6, 0.9, DRAFT_MAX..=DRAFT_MAX);
    }

    #[test]
    fn what_costs_all_is_guessed_only_if_it_surely_holds() {
        check(0.0, 1.0, 0.9, 0..=0);
        check(0.0, 1.0, 1.0, DRAFT_MAX..=DRAFT_MAX);
    }

    #[test]
    fn rows_are_added_while_they_bring_more_than_they_cost() {
        // A row is half of a token's cost, so guesses go on while they hold with one half.
        check(8.0, 1.0, 0.8, 3..=3);
        check(8.0, 1.0, 0.4, 0..=0);
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
