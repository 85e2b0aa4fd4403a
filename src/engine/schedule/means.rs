//! What a schedule keeps to, and what it makes use of.

/// The bounds of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Sequences that run at a time.
    pub sequences_max: usize,
    /// Rows of one step.
    pub step_tokens_max: usize,
    /// Blocks of the cache.
    pub blocks: usize,
    /// Prompts that have an equal share of a step, if there are so many: its parts then have about the same work.
    pub prompts_at_once: usize,
}

/// Whether blocks of earlier sequences are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixReuse {
    /// A sequence computes all its tokens.
    Off,
    /// A sequence computes what is not in the cache.
    On,
}

/// Whether tokens are guessed ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speculation {
    /// Never.
    Off,
    /// Where it is estimated to be faster.
    Auto,
    /// Wherever there is something to guess from.
    Always,
}

/// What a schedule makes use of. Nothing of it changes a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Means {
    /// Whether blocks of earlier sequences are used again.
    pub prefix_reuse: PrefixReuse,
    /// Whether tokens are guessed ahead.
    pub speculation: Speculation,
}
