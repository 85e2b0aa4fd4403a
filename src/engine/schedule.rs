//! Which tokens of which sequences a step computes: a plain data structure without tensors.
//!
//! ```text
//! waiting ─▶ admitted when its blocks are free ─▶ prompt in chunks ─▶ one token a step ─▶ finished
//! ```
//!
//! Everything is bounded: sequences that run, tokens of a step, blocks of the cache. A sequence reserves
//! all blocks it can come to need when it is admitted, so that none is ever stopped half-way. Sequences
//! that have their prompt behind them go first; the rest of a step is prompt, oldest sequence first, so
//! none starves.

use crate::kernels::cached::{BLOCK, Run};
use std::collections::VecDeque;

/// The bounds of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Sequences that run at a time.
    pub sequences_max: usize,
    /// Rows of one step.
    pub step_tokens_max: usize,
    /// Blocks of the cache.
    pub blocks: usize,
}

/// A sequence that is being generated; `T` is whatever belongs to it.
#[derive(Debug)]
pub struct Sequence<T> {
    /// Prompt, then what was generated.
    pub tokens: Vec<u32>,
    /// Length of the prompt.
    pub prompt: usize,
    /// Tokens to generate at most.
    pub new_tokens_max: usize,
    /// What belongs to it.
    pub owner: T,
    computed: usize,
    table: Vec<u32>,
}

impl<T> Sequence<T> {
    /// The tokens generated so far.
    pub fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }

    fn blocks(&self) -> usize {
        (self.prompt + self.new_tokens_max).div_ceil(BLOCK)
    }
}

/// What one step computes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Token ids of all rows.
    pub ids: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// The rows of each sequence.
    pub runs: Vec<Run>,
    /// Rows whose next token is wanted.
    pub samples: Vec<u32>,
    /// For each of them, the index of its sequence among the running ones.
    sampled: Vec<usize>,
}

/// Sequences that run, and the blocks that are free.
#[derive(Debug)]
pub struct Schedule<T> {
    bounds: Bounds,
    waiting: VecDeque<Sequence<T>>,
    running: Vec<Sequence<T>>,
    free: Vec<u32>,
}

impl<T> Schedule<T> {
    /// An empty schedule.
    ///
    /// # Panics
    /// If a bound is zero.
    pub fn new(bounds: Bounds) -> Self {
        let Bounds { sequences_max, step_tokens_max, blocks } = bounds;
        assert!(sequences_max > 0 && step_tokens_max > 0 && blocks > 0, "{bounds:?}");
        let free = (0..blocks as u32).rev().collect();
        Schedule { bounds, waiting: VecDeque::new(), running: Vec::new(), free }
    }

    /// Takes a prompt in, or hands its owner back if the whole cache would be too small for it.
    pub fn push(&mut self, prompt: Vec<u32>, new_tokens_max: usize, owner: T) -> Result<(), T> {
        let sequence = Sequence {
            prompt: prompt.len(),
            tokens: prompt,
            new_tokens_max,
            owner,
            computed: 0,
            table: Vec::new(),
        };
        if sequence.blocks() > self.bounds.blocks || sequence.prompt == 0 {
            return Err(sequence.owner);
        }
        self.waiting.push_back(sequence);
        Ok(())
    }

    /// Number of sequences that wait or run.
    pub fn len(&self) -> usize {
        self.waiting.len() + self.running.len()
    }

    /// Whether nothing waits or runs.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether another prompt would only wait.
    pub fn is_full(&self) -> bool {
        !self.waiting.is_empty() || self.running.len() >= self.bounds.sequences_max
    }

    /// Admits what fits and lays out the next step.
    pub fn plan(&mut self) -> Step {
        self.admit();
        let mut step = Step::default();
        let mut room = self.bounds.step_tokens_max;
        let decoding = |sequence: &Sequence<T>| sequence.computed + 1 == sequence.tokens.len();
        for pass in [true, false] {
            for (index, sequence) in self.running.iter_mut().enumerate() {
                let left = sequence.tokens.len() - sequence.computed;
                if decoding(sequence) != pass || room == 0 || left == 0 {
                    continue;
                }
                let rows = left.min(room);
                room -= rows;
                let from = sequence.computed;
                step.runs.push(Run {
                    first_row: step.ids.len(),
                    rows,
                    position: from,
                    table: sequence.table.clone(),
                });
                step.ids.extend_from_slice(&sequence.tokens[from..from + rows]);
                step.positions.extend((from..from + rows).map(|position| position as u32));
                sequence.computed += rows;
                if sequence.computed == sequence.tokens.len() {
                    step.samples.push(step.ids.len() as u32 - 1);
                    step.sampled.push(index);
                }
            }
        }
        step
    }

    /// Appends the sampled tokens; returns the sequences that are finished, and whether each was closed
    /// by one of `ends`.
    ///
    /// # Panics
    /// If there is not one token for each sample of the step.
    pub fn take(&mut self, step: &Step, sampled: &[u32], ends: &[u32]) -> Vec<(Sequence<T>, bool)> {
        assert_eq!(step.sampled.len(), sampled.len(), "one token for each sample");
        let mut done = Vec::new();
        for (&index, &token) in step.sampled.iter().zip(sampled) {
            let sequence = &mut self.running[index];
            let closed = ends.contains(&token);
            if !closed {
                sequence.tokens.push(token);
            }
            if closed || sequence.generated().len() >= sequence.new_tokens_max {
                done.push((index, closed));
            }
        }
        done.sort_by_key(|&(index, _)| std::cmp::Reverse(index)); // removal keeps earlier indices
        done.into_iter()
            .map(|(index, closed)| {
                let mut sequence = self.running.remove(index);
                self.free.append(&mut sequence.table);
                (sequence, closed)
            })
            .collect()
    }

    fn admit(&mut self) {
        while self.running.len() < self.bounds.sequences_max
            && let Some(next) = self.waiting.front()
            && next.blocks() <= self.free.len()
        {
            let mut sequence = self.waiting.pop_front().expect("there is one in front");
            sequence.table = self.free.split_off(self.free.len() - sequence.blocks());
            self.running.push(sequence);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const END: u32 = 0;

    /// Generates from prompts of the given lengths with a model that writes `length` tokens and closes.
    fn run(prompts: &[(usize, usize)], bounds: Bounds, limit: usize) -> Vec<(usize, usize, bool)> {
        let mut schedule = Schedule::new(bounds);
        let mut finished = Vec::new();
        for (owner, &(prompt, _)) in prompts.iter().enumerate() {
            if schedule.push(vec![1; prompt], limit, owner).is_err() {
                finished.push((owner, usize::MAX, false));
            }
        }
        while !schedule.is_empty() {
            let step = schedule.plan();
            assert!(!step.ids.is_empty(), "a step without rows: nothing would ever finish");
            assert!(step.ids.len() <= bounds.step_tokens_max);
            assert!(step.runs.len() <= bounds.sequences_max);
            let mut blocks: Vec<u32> = step.runs.iter().flat_map(|run| run.table.clone()).collect();
            let all = blocks.len();
            blocks.sort_unstable();
            blocks.dedup();
            assert_eq!(blocks.len(), all, "two sequences share a block");
            for run in &step.runs {
                assert!((run.position + run.rows).div_ceil(BLOCK) <= run.table.len());
            }
            let next = |&index: &usize| {
                let sequence = &schedule.running[index];
                let wanted = prompts[sequence.owner].1;
                if sequence.generated().len() < wanted { 7 } else { END }
            };
            let tokens: Vec<u32> = step.sampled.iter().map(next).collect();
            for (sequence, closed) in schedule.take(&step, &tokens, &[END]) {
                finished.push((sequence.owner, sequence.generated().len(), closed));
            }
        }
        assert_eq!(schedule.free.len(), bounds.blocks, "blocks were lost");
        finished.sort_unstable();
        finished
    }

    const BOUNDS: Bounds = Bounds { sequences_max: 3, step_tokens_max: 50, blocks: 12 };

    #[test]
    fn a_sequence_ends_where_the_model_closes_it_or_at_its_limit() {
        let found = run(&[(100, 5), (10, 9), (70, 0)], BOUNDS, 8);
        assert_eq!(found, [(0, 5, true), (1, 8, false), (2, 0, true)]);
    }

    #[test]
    fn a_prompt_that_can_never_fit_is_handed_back() {
        let found = run(&[(12 * BLOCK, 1), (5, 1), (0, 1)], BOUNDS, 8);
        assert_eq!(found, [(0, usize::MAX, false), (1, 1, true), (2, usize::MAX, false)]);
    }

    #[test]
    fn running_sequences_go_before_prompts() {
        let mut schedule = Schedule::new(BOUNDS);
        for owner in ["a", "b"] {
            schedule.push(vec![1; if owner == "a" { 3 } else { 90 }], 4, owner).unwrap();
        }
        let step = schedule.plan();
        assert_eq!(step.runs.iter().map(|run| run.rows).collect::<Vec<_>>(), [3, 47]);
        schedule.take(&step, &[7], &[END]);
        let step = schedule.plan();
        assert_eq!(
            step.runs.iter().map(|run| (run.rows, run.position)).collect::<Vec<_>>(),
            [(1, 3), (43, 47)]
        );
    }

    proptest! {
        #[test]
        fn every_prompt_is_answered_within_the_bounds(
            prompts in prop::collection::vec((1usize..300, 0usize..20), 0..30),
            sequences_max in 1usize..6,
            step_tokens_max in 1usize..200,
            blocks in 1usize..20,
        ) {
            let bounds = Bounds { sequences_max, step_tokens_max, blocks };
            let found = run(&prompts, bounds, 10);
            prop_assert_eq!(found.len(), prompts.len());
            for ((owner, length, closed), (prompt, wanted)) in found.iter().zip(&prompts) {
                if (prompt + 10).div_ceil(BLOCK) > blocks {
                    prop_assert_eq!(*length, usize::MAX);
                } else {
                    prop_assert_eq!((*length, *closed), ((*wanted).min(10), *wanted < 10), "{}", owner);
                }
            }
        }
    }
}
