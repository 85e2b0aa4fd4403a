//! The set-ups that were published for the method (arXiv 2406.14491, sections 3 and 4, table 7).

use super::plan::{bytes, count};
use candle_core::DType;
use headwater::model::backward::Keep;
use headwater::model::shape::Shape;
use headwater::model::size::Step;

/// How a published model was trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Published {
    /// What `--published` calls it.
    pub name: &'static str,
    /// Its shape.
    pub shape: &'static str,
    /// Tokens of the vocabulary the published model has.
    pub vocabulary: usize,
    /// Tokens of a sequence.
    pub length: usize,
    /// Tokens of one step.
    pub batch_tokens: usize,
    /// Peak learning rate; it falls along a cosine.
    pub rate: f64,
    /// Steps of warm-up.
    pub warmup: u64,
    /// Steps in all.
    pub steps: u64,
}

impl Published {
    /// Sequences of one step.
    pub fn batch_sequences(&self) -> usize {
        self.batch_tokens / self.length
    }

    /// Tokens that are trained on.
    pub fn tokens(&self) -> u64 {
        self.steps * (self.batch_sequences() * self.length) as u64
    }

    /// The set-up in words: what it takes on the published vocabulary.
    ///
    /// # Panics
    /// If its shape is unknown.
    pub fn describe(&self) -> String {
        let config = Shape::named(self.shape).expect("published shapes are known").config();
        let step = Step {
            config: &config,
            compute: DType::BF16,
            keep: Keep::Everything,
            has_dropout: false,
            rows: self.length,
            micro_batches: self.batch_sequences(),
        };
        let flops = config.training_flops_per_token(self.length) * self.tokens() as f64;
        format!(
            "{}: {} parameters with a vocabulary of {}, {} tokens in {} steps of {} sequences of {}, peak rate \
             {:.1e}, warm-up {}; {flops:.2e} FLOPs, {} of memory on one GPU in bf16 and micro-batches of one sequence",
            self.name,
            count(config.parameter_count()),
            count(config.vocab_size as u64),
            count(self.tokens()),
            count(self.steps),
            self.batch_sequences(),
            self.length,
            self.rate,
            self.warmup,
            bytes(step.tensor_bytes()),
        )
    }
}

/// General models from scratch: 100 billion tokens each.
pub const SCRATCH: [Published; 2] = [
    Published {
        name: "500m",
        shape: "500m",
        vocabulary: 32_000,
        length: 2048,
        batch_tokens: 256 * 2048,
        rate: 3e-4,
        warmup: 1000,
        steps: 200_000,
    },
    Published {
        name: "1.3b",
        shape: "1.3b",
        vocabulary: 32_000,
        length: 2048,
        batch_tokens: 512 * 2048,
        rate: 2e-4,
        warmup: 1000,
        steps: 100_000,
    },
];

/// Llama-3-8B, continued on a domain: about a billion tokens.
pub const DOMAIN: [Published; 1] = [Published {
    name: "llama-3-8b",
    shape: "8b",
    vocabulary: 128_256,
    length: 4096,
    batch_tokens: 64 * 4096,
    rate: 1e-5,
    warmup: 1000,
    steps: 4000,
}];

/// All models that are trained, whatever made their sequences.
pub static MODELS: [Published; 3] = [SCRATCH[0], SCRATCH[1], DOMAIN[0]];

/// The synthesizer, tuned from Mistral-7B: 0.2 billion tokens, 5 times. The number of passes is not certain.
pub const SYNTHESIZER: Published = Published {
    name: "mistral-7b",
    shape: "7b",
    vocabulary: 32_000,
    length: 4096,
    batch_tokens: 4 * 4096,
    rate: 5e-6,
    warmup: 1000,
    steps: 61_000,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_runs_have_the_published_tokens() {
        let tokens = |published: &Published| published.tokens() as f64 / 1e9;
        assert!(SCRATCH.iter().all(|scratch| (100.0..106.0).contains(&tokens(scratch))));
        assert!((1.0..1.1).contains(&tokens(&DOMAIN[0])));
        assert!((0.99..1.01).contains(&tokens(&SYNTHESIZER)));
    }

    #[test]
    fn published_shapes_are_known_with_their_vocabularies() {
        for published in SCRATCH.iter().chain(&DOMAIN).chain([&SYNTHESIZER]) {
            let config = Shape::named(published.shape).unwrap().config();
            assert_eq!(config.vocab_size, published.vocabulary, "{}", published.name);
            assert!(config.max_position_embeddings >= published.length, "{}", published.name);
        }
    }
}
