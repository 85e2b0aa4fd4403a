//! How much memory learning in tensors takes on a GPU, before it is taken.

use super::backward::Keep;
use super::config::ModelConfig;
use crate::kernels::cross_entropy::TENSOR_CHUNK;
use candle_core::DType;

/// Bytes of an element in f32.
const EXACT: u64 = 4;

/// What decides how much memory learning takes.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The shape of the model.
    pub config: &'a ModelConfig,
    /// What it is computed in; parameters, moments and gradients are in f32.
    pub compute: DType,
    /// What is kept from the forward pass.
    pub keep: Keep,
    /// Whether anything is dropped.
    pub has_dropout: bool,
    /// Tokens of a micro-batch, all of which have a target.
    pub rows: usize,
    /// Micro-batches of a step and device.
    pub micro_batches: usize,
}

impl Step<'_> {
    /// Bytes on a device that learns in tensors, at the moment when it holds most. What libraries and the driver keep for
    /// themselves is not known here.
    pub fn tensor_bytes(&self) -> u64 {
        let (parameters, layers) =
            (self.config.parameter_count(), self.config.num_hidden_layers as u64);
        let copy = if self.size() == EXACT { 0 } else { self.size() };
        let table = self.config.max_position_embeddings * self.config.head_dim;
        let state = parameters * (3 * EXACT + copy) + self.size() * table as u64;
        let all = parameters * EXACT;
        let head = self.head_elements() * EXACT;
        let before = if self.adds() { all } else { 0 };
        let first = if self.adds() { all } else { head };
        let has_table = self.adds() || self.config.tie_word_embeddings; // the head's gradient is the table's then
        let last = if has_table { all } else { all - head };
        let (kept, one) = (layers * self.kept(), self.kept());
        let in_blocks = self.in_block() + (first + kept).max(last + one);
        let behind_blocks = all + self.in_embedding().max(self.in_norm());
        state + (before + kept + self.in_head()).max(in_blocks).max(behind_blocks)
    }

    /// Bytes of an element that is computed.
    fn size(&self) -> u64 {
        self.compute.size_in_bytes() as u64
    }

    /// Whether gradients are there that others are added to.
    fn adds(&self) -> bool {
        self.micro_batches > 1
    }

    fn rows(&self) -> u64 {
        self.rows as u64
    }

    fn hidden(&self) -> u64 {
        self.config.hidden_size as u64
    }

    fn middle(&self) -> u64 {
        self.config.intermediate_size as u64
    }

    /// Columns of queries, and of keys.
    fn columns(&self) -> [u64; 2] {
        let config = self.config;
        [config.num_attention_heads, config.num_key_value_heads]
            .map(|heads| (heads * config.head_dim) as u64)
    }

    fn head_elements(&self) -> u64 {
        self.config.vocab_size as u64 * self.hidden()
    }

    /// What a block leaves for its backward pass besides its input.
    fn trace(&self) -> u64 {
        let [wide, narrow] = self.columns();
        let row = 2 * wide + 2 * narrow + self.hidden() + 2 * self.middle();
        self.rows() * (self.size() * row + EXACT * self.config.num_attention_heads as u64)
    }

    /// What is kept of a block.
    fn kept(&self) -> u64 {
        let input = self.size() * self.rows() * self.hidden();
        if self.keep == Keep::Everything { input + self.trace() } else { input }
    }

    /// The largest weight of a block, its gradient as it is computed, in f32, and added to that of before.
    fn of_weight(&self) -> u64 {
        let [wide, _] = self.columns();
        self.gradient(self.hidden() * self.middle().max(wide))
    }

    /// A gradient on its way to the others.
    fn gradient(&self, elements: u64) -> u64 {
        let computed = if self.size() == EXACT { EXACT } else { self.size() + EXACT };
        elements * if self.adds() { computed.max(2 * EXACT) } else { computed }
    }

    /// What the head takes: rows before and after their normalisation and their gradient, logits and the gradient of the
    /// weight.
    fn in_head(&self) -> u64 {
        let logits =
            self.size() * self.rows().min(TENSOR_CHUNK as u64) * self.config.vocab_size as u64;
        // The gradient of a further chunk, and its sum with that of those before.
        let chunks = if self.rows > TENSOR_CHUNK { 3 * EXACT } else { 0 };
        let weight = self.gradient(self.head_elements()).max(chunks * self.head_elements());
        4 * self.size() * self.rows() * self.hidden() + logits + weight
    }

    /// What the backward pass of a block holds at a time, with what it computes again.
    fn in_block(&self) -> u64 {
        let (hidden, middle, [wide, narrow]) = (self.hidden(), self.middle(), self.columns());
        let row = (4 * middle + 5 * hidden).max(4 * wide + 4 * narrow + 6 * hidden);
        let again = if self.keep == Keep::Everything { 0 } else { self.trace() };
        let masks = if self.has_dropout { 4 * EXACT * self.rows() * hidden } else { 0 };
        self.size() * self.rows() * row + again + masks + self.of_weight()
    }

    /// What the gradient of the table of embeddings takes, where the head has one there already or others are added to.
    fn in_embedding(&self) -> u64 {
        let sum = if self.adds() || self.config.tie_word_embeddings { 2 } else { 0 };
        sum * EXACT * self.head_elements() + 2 * self.size() * self.rows() * self.hidden()
    }

    /// What the norm of all gradients takes: the squares of the largest.
    fn in_norm(&self) -> u64 {
        let [wide, _] = self.columns();
        EXACT * self.head_elements().max(self.hidden() * self.middle().max(wide))
    }
}
