//! What an engine does: figures of one step, and totals that others may read at any time.

use super::step_log::StepLog;
use crate::error::Result;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepMetrics {
    /// Sequences with rows in it.
    pub sequences: u64,
    /// Rows of prompts, and of what is computed again after a preemption.
    pub prompt_tokens: u64,
    /// Rows of tokens that were generated one step before.
    pub decode_tokens: u64,
    /// Tokens of prompts that were admitted for the first time.
    pub admitted_tokens: u64,
    /// Those of them that were in the cache already.
    pub cached_tokens: u64,
    /// Rows of guessed tokens.
    pub drafted_tokens: u64,
    /// Guessed tokens that held.
    pub accepted_tokens: u64,
    /// Tokens that were generated.
    pub generated_tokens: u64,
    /// Sequences that lost their blocks.
    pub preemptions: u64,
    /// Blocks that were given to other texts.
    pub evictions: u64,
    /// Blocks that sequences held.
    pub blocks_held: u64,
    /// Blocks of the cache.
    pub blocks: u64,
    /// Whether it was laid out before the tokens of the step before were known.
    pub is_ahead: bool,
}

/// What an engine has done so far.
#[derive(Debug, Default)]
pub struct EngineCounters {
    /// Requests answered.
    pub requests: AtomicU64,
    /// Steps.
    pub steps: AtomicU64,
    /// Those of them that were laid out before the tokens of the step before were known.
    pub steps_ahead: AtomicU64,
    /// Sequences of all steps: divided by the steps, the mean batch.
    pub sequences: AtomicU64,
    /// Prompt tokens computed.
    pub prompt_tokens: AtomicU64,
    /// Rows of tokens that were generated one step before.
    pub decode_tokens: AtomicU64,
    /// Tokens of prompts that were admitted for the first time.
    pub admitted_tokens: AtomicU64,
    /// Those of them that were in the cache already.
    pub cached_tokens: AtomicU64,
    /// Tokens guessed.
    pub drafted_tokens: AtomicU64,
    /// Guessed tokens that held.
    pub accepted_tokens: AtomicU64,
    /// Tokens generated.
    pub generated_tokens: AtomicU64,
    /// Sequences that lost their blocks to older ones, and were computed again.
    pub preemptions: AtomicU64,
    /// Blocks of earlier texts that were given to others.
    pub evictions: AtomicU64,
    /// Blocks that sequences hold now, in the engine that went a step last.
    pub blocks_held: AtomicU64,
    /// Microseconds that steps took.
    pub step_us: AtomicU64,
    /// Where steps are written down.
    log: Option<Mutex<StepLog>>,
}

impl EngineCounters {
    /// Counts that also write down what steps do, behind what a file holds ([`StepLog::open`]).
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn with_log(path: &Path, now: fn() -> f64) -> Result<Self> {
        Ok(EngineCounters { log: Some(Mutex::new(StepLog::open(path, now)?)), ..Self::default() })
    }

    /// Adds a step that took so long and left sequences with so many blocks.
    ///
    /// # Errors
    /// If it is to be written down and the disk refuses.
    pub fn note(&self, step: &StepMetrics, seconds: f64, blocks_held: usize) -> Result<()> {
        for (total, amount) in [
            (&self.steps, 1),
            (&self.steps_ahead, u64::from(step.is_ahead)),
            (&self.sequences, step.sequences),
            (&self.prompt_tokens, step.prompt_tokens),
            (&self.decode_tokens, step.decode_tokens),
            (&self.admitted_tokens, step.admitted_tokens),
            (&self.cached_tokens, step.cached_tokens),
            (&self.drafted_tokens, step.drafted_tokens),
            (&self.accepted_tokens, step.accepted_tokens),
            (&self.generated_tokens, step.generated_tokens),
            (&self.preemptions, step.preemptions),
            (&self.evictions, step.evictions),
            (&self.step_us, (seconds * 1e6) as u64),
        ] {
            total.fetch_add(amount, Relaxed);
        }
        self.blocks_held.store(blocks_held as u64, Relaxed);
        self.in_log(|log| log.note(step, seconds))
    }

    /// An engine has nothing to do.
    ///
    /// # Errors
    /// If the disk refuses what is to be written down.
    pub fn rest(&self) -> Result<()> {
        self.in_log(StepLog::end_line)
    }

    fn in_log(&self, write: impl FnOnce(&mut StepLog) -> Result<()>) -> Result<()> {
        match &self.log {
            Some(log) => write(&mut log.lock().unwrap_or_else(PoisonError::into_inner)),
            None => Ok(()),
        }
    }

    /// Name and value of each count, for whoever writes them down.
    pub fn figures(&self) -> [(&'static str, u64); 15] {
        [
            ("requests", &self.requests),
            ("steps", &self.steps),
            ("steps_ahead", &self.steps_ahead),
            ("sequences", &self.sequences),
            ("prompt_tokens", &self.prompt_tokens),
            ("decode_tokens", &self.decode_tokens),
            ("admitted_tokens", &self.admitted_tokens),
            ("cached_tokens", &self.cached_tokens),
            ("drafted_tokens", &self.drafted_tokens),
            ("accepted_tokens", &self.accepted_tokens),
            ("generated_tokens", &self.generated_tokens),
            ("preemptions", &self.preemptions),
            ("evictions", &self.evictions),
            ("blocks_held", &self.blocks_held),
            ("step_us", &self.step_us),
        ]
        .map(|(name, count)| (name, count.load(Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_add_up_and_blocks_are_those_that_are_held_now() {
        let counters = EngineCounters::default();
        for blocks_held in [5, 3] {
            let step = StepMetrics { sequences: 2, ..StepMetrics::default() };
            counters.note(&step, 0.25, blocks_held).unwrap();
        }
        let figures = std::collections::BTreeMap::from(counters.figures());
        let found = ["steps", "sequences", "blocks_held", "step_us"].map(|name| figures[name]);
        assert_eq!(found, [2, 4, 3, 500_000]);
    }
}
