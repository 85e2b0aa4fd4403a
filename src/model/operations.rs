//! What training computes, by the shape of a model.

use super::config::ModelConfig;

impl ModelConfig {
    /// Floating-point operations to train on one token of a sequence of `length` tokens: six for each
    /// weight of a matrix product, and twelve for each head element of each visible position
    /// (Chowdhery et al., 2022, appendix B; arXiv 2204.02311), of which a token sees half of its sequence in the mean, or
    /// with a window `w` of `length` positions `w - w² / (2 length)`.
    pub fn training_flops_per_token(&self, length: usize) -> f64 {
        let embedding = (self.vocab_size * self.hidden_size) as u64;
        let looked_up = if self.tie_word_embeddings { 0 } else { embedding };
        let products = (self.parameter_count() - looked_up) as f64;
        let window = self.sliding_window.map_or(length, |window| window.min(length)) as f64;
        let visible = window - window * window / (2.0 * length.max(1) as f64);
        let attention = (self.num_hidden_layers * self.num_attention_heads * self.head_dim) as f64;
        6.0 * products + 12.0 * attention * visible
    }
}

#[cfg(test)]
mod tests {
    use super::super::shape::Shape;
    use super::*;

    #[test]
    fn a_window_is_what_a_token_sees_of_a_long_sequence() {
        let config = Shape::named("2m").unwrap().config();
        let heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim;
        let of_position = 12.0 * heads as f64;
        let attention = |length| {
            let flops = |sliding_window| {
                ModelConfig { sliding_window, ..config.clone() }.training_flops_per_token(length)
            };
            let products = flops(Some(0));
            [flops(None), flops(Some(4))].map(|flops| (flops - products) / of_position)
        };
        // Tokens see 1, 2, 3, 4, 4, 4, … positions; a triangle is counted as half of its square.
        assert_eq!(attention(4), [2.0, 2.0]);
        assert_eq!(attention(16), [8.0, 3.5]);
    }
}
