//! Which tokens of which sequences a step computes: a plain data structure without tensors.
//!
//! ```text
//! waiting ─▶ running: prompt in chunks ─▶ one token a step, with guesses behind it ─▶ finished
//!    ▲          │ a block is wanted and none is there: the youngest goes back
//!    └──────────┘ its tokens are kept, its blocks are not
//! ```
//!
//! Everything is bounded: sequences that run, tokens of a step, blocks of the cache. A sequence is admitted
//! when there are blocks for its tokens so far, and takes more as it grows. Sequences run and wait in the
//! order they came in. The oldest has a row in every step, until its last token is only waited for, and takes blocks from
//! the youngest, so it comes to its end, and so does the next.

mod ahead;
mod means;

use super::blocks::Blocks;
use super::draft::{DRAFT_MAX, Lookup};
use super::metrics::StepMetrics;
use super::odds::{Measured, Odds};
use crate::kernels::cached::{BLOCK, Expected, Run};
use std::collections::VecDeque;

pub use means::{Bounds, Means, PrefixReuse, Speculation};

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
    /// How many came in before it.
    number: u64,
    /// Whether it has had blocks before.
    was_admitted: bool,
    /// Whether its last token stands for one that a step in flight samples (`ahead`).
    expects: bool,
    /// Tokens whose keys and values are in the cache.
    computed: usize,
    table: Vec<u32>,
    /// Blocks of the table, from its beginning, that others can find.
    filed: usize,
    lookup: Lookup,
}

impl<T> Sequence<T> {
    /// The tokens generated so far.
    pub fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }

    /// Whether it has all tokens that it may have, though not all need be known.
    fn is_over(&self) -> bool {
        self.generated().len() >= self.new_tokens_max
    }

    /// Tokens whose rows are to come.
    fn left(&self) -> usize {
        if self.is_over() { 0 } else { self.tokens.len() - self.computed }
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
    /// Rows whose ids are samples of the step before, and not known yet.
    pub expected: Vec<Expected>,
    /// What it does.
    pub metrics: StepMetrics,
    /// What each run wants.
    wants: Vec<Want>,
}

/// What a sequence has of a step.
#[derive(Debug)]
struct Portion {
    rows: usize,
    /// Tokens behind the last row.
    guess: Vec<u32>,
    /// Length of the match that they come from.
    matched: usize,
}

/// What a run wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Want {
    /// The number of its sequence.
    sequence: u64,
    /// Rows at its end whose next token is wanted: none, or one and one for each guess.
    samples: usize,
    /// Length of the match that the guesses come from.
    matched: usize,
}

/// Sequences that run, those that wait, and the blocks of the cache.
#[derive(Debug)]
pub struct Schedule<T> {
    bounds: Bounds,
    means: Means,
    waiting: VecDeque<Sequence<T>>,
    /// The oldest first.
    running: Vec<Sequence<T>>,
    blocks: Blocks,
    odds: Odds,
    /// Sequences that came in.
    pushed: u64,
    /// What the step that is being laid out does.
    metrics: StepMetrics,
}

impl<T> Schedule<T> {
    /// An empty schedule.
    ///
    /// # Panics
    /// If a bound is zero.
    pub fn new(bounds: Bounds, means: Means) -> Self {
        let Bounds { sequences_max, step_tokens_max, blocks, prompts_at_once } = bounds;
        let all = [sequences_max, step_tokens_max, blocks, prompts_at_once];
        assert!(all.iter().all(|&bound| bound > 0), "{bounds:?}");
        Schedule {
            bounds,
            means,
            waiting: VecDeque::new(),
            running: Vec::new(),
            blocks: Blocks::new(blocks),
            odds: Odds::default(),
            pushed: 0,
            metrics: StepMetrics::default(),
        }
    }

    /// Takes a prompt in, or hands its owner back if the whole cache would be too small for it or nothing is wanted.
    ///
    /// # Errors
    /// The owner.
    pub fn push(&mut self, prompt: Vec<u32>, new_tokens_max: usize, owner: T) -> Result<(), T> {
        let blocks = (prompt.len() + new_tokens_max).div_ceil(BLOCK);
        if blocks > self.bounds.blocks || prompt.is_empty() || new_tokens_max == 0 {
            return Err(owner);
        }
        self.waiting.push_back(Sequence {
            prompt: prompt.len(),
            tokens: prompt,
            new_tokens_max,
            owner,
            number: self.pushed,
            was_admitted: false,
            expects: false,
            computed: 0,
            table: Vec::new(),
            filed: 0,
            lookup: Lookup::default(),
        });
        self.pushed += 1;
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

    /// Whether there are as many sequences as may run at a time, though some may have to wait for blocks.
    pub fn is_full(&self) -> bool {
        self.waiting.len() + self.going_on() >= self.bounds.sequences_max
    }

    /// Sequences that run, but for those whose last token is only waited for.
    fn going_on(&self) -> usize {
        self.running.iter().filter(|sequence| !sequence.is_over()).count()
    }

    /// Blocks that sequences hold.
    pub fn blocks_held(&self) -> usize {
        self.blocks.held()
    }

    /// Takes in how many seconds a step took: costs decide how much is guessed.
    pub fn measured(&mut self, step: &Step, seconds: f64) {
        let StepMetrics { prompt_tokens, decode_tokens, drafted_tokens, .. } = step.metrics;
        self.odds.measured(Measured {
            prompt_rows: prompt_tokens,
            sequences: decode_tokens,
            guessed_rows: drafted_tokens,
            seconds,
        });
    }

    /// Admits what fits and lays out the next step.
    pub fn plan(&mut self) -> Step {
        let evictions = self.blocks.evictions();
        self.admit();
        let mut step = Step::default();
        for (index, Portion { rows, guess, matched }) in self.share_out().into_iter().enumerate() {
            let sequence = &mut self.running[index];
            let left = sequence.left();
            if left == 0 {
                continue;
            }
            let samples = if rows == left { 1 + guess.len() } else { 0 };
            step.add(sequence, rows, &guess, Want { sequence: sequence.number, samples, matched });
            match left {
                1 => self.metrics.decode_tokens += 1,
                _ => self.metrics.prompt_tokens += rows as u64,
            }
            self.metrics.drafted_tokens += guess.len() as u64;
        }
        self.metrics.sequences = step.runs.len() as u64;
        self.metrics.evictions = self.blocks.evictions() - evictions;
        self.metrics.blocks_held = self.blocks.held() as u64;
        self.metrics.blocks = self.bounds.blocks as u64;
        step.metrics = std::mem::take(&mut self.metrics);
        step
    }

    /// What each running sequence has of the next step, the oldest first.
    fn share_out(&mut self) -> Vec<Portion> {
        let mut portions = Vec::new();
        let mut room = self.bounds.step_tokens_max;
        // Rows that younger sequences need to go on with: prompts leave them room.
        let mut decoding = self.running.iter().filter(|sequence| sequence.left() == 1).count();
        let of_prompts = room.saturating_sub(decoding);
        let share = of_prompts.div_ceil(self.bounds.prompts_at_once).max(1);
        while portions.len() < self.running.len() && room > 0 {
            let index = portions.len();
            let left = self.running[index].left();
            decoding -= usize::from(left == 1 && decoding > 0);
            let most = room.saturating_sub(decoding).max(1);
            let rows = left.min(most).min(share);
            if !self.secure(index, rows) {
                break;
            }
            let (guess, matched) = match left {
                1 => self.guess(index, most - rows),
                _ => (Vec::new(), 0),
            };
            room -= rows + guess.len();
            portions.push(Portion { rows, guess, matched });
        }
        // What no younger prompt wanted.
        for (portion, sequence) in portions.iter_mut().zip(&self.running) {
            let more = sequence.left().min(sequence.room()) - portion.rows;
            let more = more.min(room);
            portion.rows += more;
            room -= more;
        }
        portions
    }

    /// Appends the sampled tokens; returns the sequences that are finished, and whether each was closed
    /// by one of `ends`. Steps are taken in the order they were laid out in.
    ///
    /// # Panics
    /// If there is not one token for each sample of the step.
    pub fn take(
        &mut self,
        step: &mut Step,
        sampled: &[u32],
        ends: &[u32],
    ) -> Vec<(Sequence<T>, bool)> {
        assert_eq!(step.samples.len(), sampled.len(), "one token for each sample");
        let mut done = Vec::new();
        let mut taken = 0;
        for want in &step.wants {
            let rows = &step.samples[taken..taken + want.samples];
            let own = &sampled[taken..taken + want.samples];
            taken += want.samples;
            let Some(index) = self.index_of(want.sequence) else {
                continue; // the step before has ended it, or its blocks are gone again
            };
            let sequence = &mut self.running[index];
            let guesses = rows.iter().skip(1).map(|&row| step.ids[row as usize]);
            let (accepted, end) = sequence.accept(own, guesses, ends);
            if want.samples > 1 {
                self.odds.compared(want.matched, want.samples - 1, accepted);
            }
            step.metrics.accepted_tokens += accepted as u64;
            step.metrics.generated_tokens += own.len().min(accepted + 1) as u64;
            if self.means.prefix_reuse == PrefixReuse::On {
                sequence.file(&mut self.blocks);
            }
            done.extend(end.map(|closed| (index, closed)));
        }
        done.reverse(); // removal keeps earlier indices
        done.into_iter()
            .map(|(index, closed)| {
                let mut sequence = self.running.remove(index);
                self.blocks.release(&mut sequence.table);
                (sequence, closed)
            })
            .collect()
    }

    /// Where a sequence stands among those that run.
    fn index_of(&self, number: u64) -> Option<usize> {
        self.running.binary_search_by_key(&number, |sequence| sequence.number).ok()
    }

    fn admit(&mut self) {
        while self.going_on() < self.bounds.sequences_max
            && let Some(next) = self.waiting.front()
        {
            let tokens = &next.tokens;
            let found = match self.means.prefix_reuse {
                PrefixReuse::Off => Vec::new(),
                PrefixReuse::On => self.blocks.find(&tokens[..tokens.len() - 1]), // a row is left
            };
            if self.means.prefix_reuse == PrefixReuse::On && self.is_on_its_way(tokens, found.len())
            {
                return;
            }
            let idle = found.iter().filter(|&&block| self.blocks.is_idle(block)).count();
            let fresh = tokens.len().div_ceil(BLOCK) - found.len();
            // Each of those that run is about to want a block: whoever comes leaves them one.
            if idle + fresh + self.running.len() > self.blocks.available() {
                return;
            }
            let mut sequence = self.waiting.pop_front().expect("there is one in front");
            for &block in &found {
                self.blocks.hold(block);
            }
            sequence.filed = found.len();
            sequence.computed = found.len() * BLOCK;
            sequence.table = found;
            sequence.table.extend((0..fresh).map_while(|_| self.blocks.take()));
            // What it finds of its own after it lost its blocks is not what earlier texts saved it.
            if !sequence.was_admitted {
                sequence.was_admitted = true;
                self.metrics.admitted_tokens += sequence.prompt as u64;
                self.metrics.cached_tokens += sequence.computed as u64;
            }
            self.running.push(sequence);
        }
    }

    /// Whether a running sequence begins with the same tokens, and is about to compute the block behind those that were
    /// found: whoever waits for it need not compute it again.
    fn is_on_its_way(&self, tokens: &[u32], found: usize) -> bool {
        let end = (found + 1) * BLOCK;
        // The last token has a row in any case.
        let Some(wanted) = tokens[..tokens.len() - 1].get(..end) else { return false };
        let computes =
            |one: &Sequence<T>| one.filed <= found && one.tokens.get(..end) == Some(wanted);
        self.running.iter().any(computes)
    }

    /// Makes sure that a sequence has blocks for so many more rows, at the cost of younger ones. False if
    /// it is the youngest and had to go itself.
    fn secure(&mut self, index: usize, rows: usize) -> bool {
        while self.running[index].room() < rows {
            if let Some(block) = self.blocks.take() {
                self.running[index].table.push(block);
                continue;
            }
            let mut youngest = self.running.pop().expect("a sequence that wants blocks runs");
            self.blocks.release(&mut youngest.table);
            (youngest.computed, youngest.filed) = (0, 0);
            self.waiting.push_front(youngest);
            self.metrics.preemptions += 1;
            if index == self.running.len() {
                return false;
            }
        }
        true
    }

    /// How a sequence may go on behind its last token, at most so many tokens; and the length of the match
    /// it is guessed from.
    fn guess(&mut self, index: usize, room: usize) -> (Vec<u32>, usize) {
        let sequence = &mut self.running[index];
        let wanted = sequence.new_tokens_max - sequence.generated().len();
        let room = room.min(wanted - 1); // the last one needs no row
        if self.means.speculation == Speculation::Off || room == 0 {
            return (Vec::new(), 0);
        }
        sequence.lookup.extend(&sequence.tokens);
        let Some(found) = sequence.lookup.find(&sequence.tokens) else {
            return (Vec::new(), 0);
        };
        let worth = match self.means.speculation {
            Speculation::Auto => self.odds.worth(found.length, self.running.len()),
            _ => DRAFT_MAX,
        };
        let sequence = &mut self.running[index];
        let count = room.min(worth);
        // Guesses take blocks that are there; none is sent back for them.
        while sequence.room() < 1 + count
            && let Some(block) = self.blocks.take()
        {
            sequence.table.push(block);
        }
        let count = count.min(sequence.room() - 1);
        (found.guess(&sequence.tokens, count), found.length)
    }
}

impl<T> Sequence<T> {
    /// Rows that its blocks have room for.
    fn room(&self) -> usize {
        self.table.len() * BLOCK - self.computed
    }

    /// Takes in the model's tokens behind the last one and behind each guess, for as long as guesses hold.
    /// Returns how many held, and whether the sequence is finished: closed, or at its limit.
    fn accept(
        &mut self,
        sampled: &[u32],
        guesses: impl Iterator<Item = u32>,
        ends: &[u32],
    ) -> (usize, Option<bool>) {
        let mut accepted = 0;
        let mut guesses = guesses.fuse();
        if std::mem::take(&mut self.expects) && !sampled.is_empty() {
            self.tokens.pop();
        }
        for &token in sampled {
            if ends.contains(&token) {
                return (accepted, Some(true));
            }
            self.tokens.push(token);
            if self.generated().len() >= self.new_tokens_max {
                return (accepted, Some(false));
            }
            if guesses.next() != Some(token) {
                break;
            }
            accepted += 1;
            self.computed += 1; // its row was in the step
        }
        (accepted, None)
    }

    /// Files the blocks that have become full. What guesses left behind is not among the computed tokens,
    /// so it is never part of one.
    fn file(&mut self, blocks: &mut Blocks) {
        // A row behind the last token is computed of what was not known to have ended.
        while (self.filed + 1) * BLOCK <= self.computed.min(self.tokens.len()) {
            let before = self.filed.checked_sub(1).map(|before| self.table[before]);
            let tokens = self.tokens.as_chunks::<BLOCK>().0[self.filed];
            self.table[self.filed] = blocks.file(before, tokens, self.table[self.filed]);
            self.filed += 1;
        }
    }
}

impl Step {
    /// Adds the next rows of a sequence, and rows of guesses behind them.
    fn add<T>(&mut self, sequence: &mut Sequence<T>, rows: usize, guess: &[u32], want: Want) {
        let (first_row, from) = (self.ids.len(), sequence.computed);
        let table = sequence.table.clone();
        let all = rows + guess.len();
        self.runs.push(Run { first_row, rows: all, position: from, table });
        self.ids.extend_from_slice(&sequence.tokens[from..from + rows]);
        self.ids.extend_from_slice(guess);
        self.positions.extend((from..from + all).map(|position| position as u32));
        let end = self.ids.len();
        self.samples.extend((end - want.samples..end).map(|row| row as u32));
        self.wants.push(want);
        sequence.computed += rows;
    }
}

#[cfg(test)]
mod laws;
