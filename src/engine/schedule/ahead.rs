//! Steps that are laid out before the tokens of the step before them are known.
//!
//! ```text
//! device   step n ───────────────▶ step n + 1 ──────────────▶
//! host            plan n + 1 │ take n │ plan n + 2 │ take n + 1
//! ```
//!
//! Where nothing is guessed, only the ids of rows depend on tokens: a device that samples them can fill them in. A
//! sequence that a token then closes has a row in the step behind it that nobody looks at; its blocks are given to
//! others, but what these write comes after that step.

use super::{Schedule, Speculation, Step};
use crate::kernels::cached::Expected;

/// Stands for a token that is not known yet.
const UNKNOWN: u32 = 0;

impl<T> Schedule<T> {
    /// Lays out the step behind one whose tokens are to come, if it has any rows and does not depend on them but for ids.
    pub fn plan_ahead(&mut self, before: &Step) -> Option<Step> {
        if !self.is_foreseeable(before) {
            return None;
        }
        let mut sampled = Vec::new();
        let mut sample = 0;
        for want in &before.wants {
            sample += want.samples;
            // Whoever is not there any more was ended by the step before that.
            if want.samples == 1
                && let Some(index) = self.index_of(want.sequence)
            {
                let sequence = &mut self.running[index];
                sequence.tokens.push(UNKNOWN);
                sequence.expects = true;
                sampled.push((want.sequence, sample as u32 - 1));
            }
        }
        let mut step = self.plan();
        let mut sampled = sampled.into_iter().peekable();
        for (run, want) in step.runs.iter().zip(&step.wants) {
            // Both are in the order sequences came in.
            while sampled.next_if(|&(sequence, _)| sequence < want.sequence).is_some() {}
            if let Some((_, sample)) = sampled.next_if(|&(sequence, _)| sequence == want.sequence) {
                step.expected.push(Expected { row: run.first_row as u32, sample });
            }
        }
        step.metrics.is_ahead = true;
        (!step.runs.is_empty()).then_some(step)
    }

    /// Whether the step behind one is the same whatever its tokens are.
    fn is_foreseeable(&self, before: &Step) -> bool {
        let nothing_is_guessed = self.means.speculation == Speculation::Off;
        // Each wants one block at most. Who loses its blocks would have to compute a token that is not known.
        let nobody_goes_back = self.blocks.available() >= self.running.len();
        before.samples.is_empty() || (nothing_is_guessed && nobody_goes_back)
    }

    /// Takes in what guesses are looked for in, as far as tokens are known.
    pub fn prepare(&mut self) {
        if self.means.speculation != Speculation::Off {
            for sequence in self.running.iter_mut().filter(|sequence| !sequence.expects) {
                sequence.lookup.extend(&sequence.tokens);
            }
        }
    }
}
