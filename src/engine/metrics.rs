//! What an engine does: figures of one step, and totals that others may read at any time.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepMetrics {
    /// Sequences with rows in it.
    pub sequences: u64,
    /// Rows of prompts, and of what is computed again after a preemption.
    pub prompt_tokens: u64,
    /// Rows of tokens that were generated one step before.
    pub decode_tokens: u64,
    /// Prompt tokens of admitted sequences that were in the cache already.
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
}

/// What an engine has done so far.
#[derive(Debug, Default)]
pub struct EngineCounters {
    /// Requests answered.
    pub requests: AtomicU64,
    /// Steps.
    pub steps: AtomicU64,
    /// Sequences of all steps: divided by the steps, the mean batch.
    pub sequences: AtomicU64,
    /// Prompt tokens computed.
    pub prompt_tokens: AtomicU64,
    /// Rows of tokens that were generated one step before.
    pub decode_tokens: AtomicU64,
    /// Prompt tokens that were in the cache already.
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
    /// Blocks that sequences hold now.
    pub blocks_held: AtomicU64,
    /// Microseconds that steps took.
    pub step_us: AtomicU64,
}

impl EngineCounters {
    /// Adds a step that took so long.
    pub fn note(&self, step: &StepMetrics, seconds: f64) {
        let StepMetrics {
            sequences,
            prompt_tokens,
            decode_tokens,
            cached_tokens,
            drafted_tokens,
            accepted_tokens,
            generated_tokens,
            preemptions,
            evictions,
            blocks_held,
        } = *step;
        for (total, amount) in [
            (&self.steps, 1),
            (&self.sequences, sequences),
            (&self.prompt_tokens, prompt_tokens),
            (&self.decode_tokens, decode_tokens),
            (&self.cached_tokens, cached_tokens),
            (&self.drafted_tokens, drafted_tokens),
            (&self.accepted_tokens, accepted_tokens),
            (&self.generated_tokens, generated_tokens),
            (&self.preemptions, preemptions),
            (&self.evictions, evictions),
            (&self.step_us, (seconds * 1e6) as u64),
        ] {
            total.fetch_add(amount, Relaxed);
        }
        self.blocks_held.store(blocks_held, Relaxed);
    }

    /// Name and value of each count, for whoever writes them down.
    pub fn figures(&self) -> [(&'static str, u64); 13] {
        [
            ("requests", &self.requests),
            ("steps", &self.steps),
            ("sequences", &self.sequences),
            ("prompt_tokens", &self.prompt_tokens),
            ("decode_tokens", &self.decode_tokens),
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
    fn steps_add_up_and_blocks_are_those_of_the_last() {
        let counters = EngineCounters::default();
        for blocks_held in [5, 3] {
            let step = StepMetrics { sequences: 2, blocks_held, ..StepMetrics::default() };
            counters.note(&step, 0.25);
        }
        let figures = std::collections::BTreeMap::from(counters.figures());
        let found = ["steps", "sequences", "blocks_held", "step_us"].map(|name| figures[name]);
        assert_eq!(found, [2, 4, 3, 500_000]);
    }
}
