//! Shapes by name, for models that start from random weights.

use super::config::{ModelConfig, RopeScaling};

/// A named shape.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// What the command line calls it.
    pub name: &'static str,
    /// Where it comes from.
    pub origin: &'static str,
    hidden: usize,
    middle: usize,
    layers: usize,
    heads: usize,
    key_value: usize,
    vocabulary: usize,
    context: usize,
    tied: bool,
}

/// All shapes, smallest first.
pub const SHAPES: [Shape; 8] = [
    Shape {
        name: "2m",
        origin: "for demonstrations: trains visibly within a minute on two cores",
        hidden: 128,
        middle: 384,
        layers: 4,
        heads: 4,
        key_value: 2,
        vocabulary: 6144,
        context: 2048,
        tied: true,
    },
    Shape {
        name: "7m",
        origin: "the bundled synthesizer",
        hidden: 256,
        middle: 640,
        layers: 8,
        heads: 8,
        key_value: 4,
        vocabulary: 6144,
        context: 2048,
        tied: true,
    },
    Shape {
        name: "10m",
        origin: "S of the benchmarks",
        hidden: 256,
        middle: 1024,
        layers: 6,
        heads: 8,
        key_value: 4,
        vocabulary: 8192,
        context: 2048,
        tied: false,
    },
    Shape {
        name: "110m",
        origin: "M of the benchmarks",
        hidden: 768,
        middle: 2048,
        layers: 12,
        heads: 12,
        key_value: 4,
        vocabulary: 32_000,
        context: 2048,
        tied: false,
    },
    Shape {
        name: "500m",
        origin: "InstructLM-500M (arXiv 2406.14491)",
        hidden: 1536,
        middle: 4320,
        layers: 16,
        heads: 24,
        key_value: 24,
        vocabulary: 32_000,
        context: 2048,
        tied: false,
    },
    Shape {
        name: "1.3b",
        origin: "InstructLM-1.3B (arXiv 2406.14491)",
        hidden: 2048,
        middle: 8192,
        layers: 20,
        heads: 32,
        key_value: 8,
        vocabulary: 32_000,
        context: 2048,
        tied: false,
    },
    Shape {
        name: "7b",
        origin: "Mistral-7B-v0.1, the published synthesizer",
        hidden: 4096,
        middle: 14_336,
        layers: 32,
        heads: 32,
        key_value: 8,
        vocabulary: 32_000,
        context: 4096,
        tied: false,
    },
    Shape {
        name: "8b",
        origin: "Llama-3-8B, the published domain models",
        hidden: 4096,
        middle: 14_336,
        layers: 32,
        heads: 32,
        key_value: 8,
        vocabulary: 128_256,
        context: 8192,
        tied: false,
    },
];

impl Shape {
    /// The shape called `name`.
    pub fn named(name: &str) -> Option<&'static Shape> {
        SHAPES.iter().find(|shape| shape.name == name)
    }

    /// The names of all shapes, for messages.
    pub fn names() -> String {
        SHAPES.map(|shape| shape.name).join(", ")
    }

    /// The configuration of a model of this shape with its usual vocabulary.
    pub fn config(&self) -> ModelConfig {
        ModelConfig {
            model_type: "llama".into(),
            vocab_size: self.vocabulary,
            hidden_size: self.hidden,
            intermediate_size: self.middle,
            num_hidden_layers: self.layers,
            num_attention_heads: self.heads,
            num_key_value_heads: self.key_value,
            head_dim: self.hidden / self.heads,
            max_position_embeddings: self.context,
            rms_norm_eps: 1e-5,
            rope_theta: if self.name == "8b" { 500_000.0 } else { 10_000.0 },
            rope_scaling: RopeScaling::None,
            sliding_window: None,
            tie_word_embeddings: self.tied,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, parameters: u64) {
        assert_eq!(Shape::named(name).unwrap().config().parameter_count(), parameters, "{name}");
    }

    #[test]
    fn published_shapes_have_the_published_sizes() {
        check("500m", 567_854_592);
        check("1.3b", 1_347_504_128);
        check("7b", 7_241_732_096);
        check("8b", 8_030_261_248);
    }
}
