//! How much memory a micro-batch takes, before it is taken.

use super::{HostModel, layout_of_blocks};
use crate::kernels::cross_entropy::CHUNK;
use crate::kernels::layout::INPUTS;
use crate::kernels::linear::Layout;
use crate::kernels::packed::WeightType;
use crate::kernels::rows::words_of_rows;
use crate::kernels::tiles::PANEL;
use crate::model::backward::Keep;
use crate::model::config::ModelConfig;

impl HostModel {
    /// Bytes of everything but the parameters and their gradients, for micro-batches of `rows` rows that all have a
    /// target: buffers of the pass, and weights as products want them. Threads have some buffers for
    /// attention besides, which grow with the longest item.
    pub(crate) fn bytes(
        config: &ModelConfig,
        kind: WeightType,
        keep: Keep,
        has_dropout: bool,
        rows: usize,
    ) -> u64 {
        let (hidden, middle) = (config.hidden_size, config.intermediate_size);
        let wide = config.num_attention_heads * config.head_dim;
        let narrow = config.num_key_value_heads * config.head_dim;
        let layers = config.num_hidden_layers;
        let kept = if keep == Keep::Everything { layers } else { 1 };
        let trace = 2 * wide + 2 * narrow + config.num_attention_heads + hidden + 2 * middle;
        let block = 2 * hidden + 2 * middle + 2 * wide + 2 * narrow;
        let dropped = if has_dropout { hidden } else { 0 };
        let columns = layers * hidden + kept * trace + block + 5 * hidden + dropped;
        let logits = CHUNK.min(rows) * config.vocab_size;
        let table = config.max_position_embeddings * config.head_dim;
        let laid_out = match kind {
            WeightType::F32 => 0,
            _ => laid_out_words(config, kind, rows),
        };
        4 * (rows * columns + logits + table + laid_out) as u64
    }
}

/// Words of weights that are kept in both directions, of the largest that is laid out at use, and of what they meet.
fn laid_out_words(config: &ModelConfig, kind: WeightType, rows: usize) -> usize {
    let (hidden, middle, vocabulary) =
        (config.hidden_size, config.intermediate_size, config.vocab_size);
    let panels = |columns: usize, rows: usize| {
        columns.next_multiple_of(PANEL) * kind.words(rows.next_multiple_of(INPUTS))
    };
    let wide = config.num_attention_heads * config.head_dim;
    let widest = middle.max(wide).max(hidden).next_multiple_of(INPUTS);
    let looked_up = if config.tie_word_embeddings { 0 } else { vocabulary * hidden };
    let head = panels(vocabulary, hidden) + panels(hidden, vocabulary);
    let weights = match layout_of_blocks(kind) {
        Layout::Kept => config.parameter_count() as usize - looked_up - vocabulary * hidden + head,
        Layout::AtUse => {
            head + panels(middle.max(wide), hidden).max(panels(hidden, middle.max(wide)))
        }
    };
    let chunk = CHUNK.min(rows);
    let logits = words_of_rows(kind, chunk, vocabulary.next_multiple_of(INPUTS));
    let meeting = words_of_rows(kind, rows, widest).max(logits);
    let turned = words_of_rows(kind, widest, rows);
    weights + meeting + turned + panels(widest, rows).max(panels(vocabulary, chunk))
}
