//! The shape of a model, as `config.json` of a Hugging Face directory states it.

use crate::error::{Error, Result};
use crate::kernels::attention::Heads;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path;

/// A decoder of the Llama and Mistral family. Field names are those of `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `llama` or `mistral`. They differ in the sliding window only.
    pub model_type: String,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward block.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key-value heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// The longest sequence the model is made for, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in normalisation.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How rotary frequencies are stretched for long contexts.
    pub rope_scaling: RopeScaling,
    /// A token sees the last so many tokens, itself included.
    pub sliding_window: Option<usize>,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// The token that opens a text.
    pub bos_token_id: Option<u32>,
    /// The tokens that end one.
    pub eos_token_ids: Vec<u32>,
}

/// How rotary frequencies are stretched for long contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All by the same factor.
    Linear {
        /// What frequencies are divided by.
        factor: f64,
    },
    /// Low frequencies by a factor, high ones not, those between by degrees (Llama 3.1).
    Llama3 {
        /// What low frequencies are divided by.
        factor: f64,
        /// Wavelengths beyond the original context divided by this are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths within the original context divided by this are high frequencies.
        high_freq_factor: f64,
        /// The context before stretching, in tokens.
        original_max_position_embeddings: usize,
    },
    /// Each by its own factor, as GGUF files say it; `config.json` has no words for it.
    Factors(Vec<f32>),
}

impl ModelConfig {
    /// Reads `config.json` of a model directory.
    ///
    /// # Errors
    /// Names the file, and the setting that is missing or that this implementation does not have.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(Error::file("read", &path))?;
        Self::parse(&text).map_err(|reason| Error::malformed(&path, reason))
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// Says which setting is missing, malformed or not supported.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let raw: Raw = serde_json::from_str(text).map_err(|error| error.to_string())?;
        raw.check()
    }

    /// The `config.json` of this model, to be read by Hugging Face transformers.
    pub fn to_json(&self) -> Value {
        let architecture = match self.model_type.as_str() {
            "mistral" => "MistralForCausalLM",
            _ => "LlamaForCausalLM",
        };
        let mut json = json!({
            "architectures": [architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling.to_json(),
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": true,
        });
        if self.model_type == "mistral" {
            json["sliding_window"] = json!(self.sliding_window);
        }
        if let Some(bos) = self.bos_token_id {
            json["bos_token_id"] = json!(bos);
        }
        json["eos_token_id"] = one_or_many(&self.eos_token_ids);
        json
    }

    /// The `generation_config.json` beside it.
    pub fn generation_json(&self) -> Value {
        let mut json = json!({ "eos_token_id": one_or_many(&self.eos_token_ids) });
        if let Some(bos) = self.bos_token_id {
            json["bos_token_id"] = json!(bos);
        }
        json
    }

    /// Names and shapes of all parameters, in checkpoint order.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, middle) = (self.hidden_size, self.intermediate_size);
        let (query, key_value) =
            (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let mut all = vec![("model.embed_tokens.weight".into(), vec![self.vocab_size, hidden])];
        for layer in 0..self.num_hidden_layers {
            let parts: [(&str, Vec<usize>); 9] = [
                ("input_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![query, hidden]),
                ("self_attn.k_proj", vec![key_value, hidden]),
                ("self_attn.v_proj", vec![key_value, hidden]),
                ("self_attn.o_proj", vec![hidden, query]),
                ("post_attention_layernorm", vec![hidden]),
                ("mlp.gate_proj", vec![middle, hidden]),
                ("mlp.up_proj", vec![middle, hidden]),
                ("mlp.down_proj", vec![hidden, middle]),
            ];
            all.extend(
                parts.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape)),
            );
        }
        all.push(("model.norm.weight".into(), vec![hidden]));
        if !self.tie_word_embeddings {
            all.push(("lm_head.weight".into(), vec![self.vocab_size, hidden]));
        }
        all
    }

    /// The number of parameters.
    pub fn parameter_count(&self) -> u64 {
        let sizes = self.parameters().into_iter();
        sizes.map(|(_, shape)| shape.iter().map(|&n| n as u64).product::<u64>()).sum()
    }

    /// How rows divide into heads.
    pub fn heads(&self) -> Heads {
        Heads {
            query: self.num_attention_heads,
            key_value: self.num_key_value_heads,
            width: self.head_dim,
            window: self.sliding_window,
        }
    }

    /// The rotary frequencies of half a head, in radians a position.
    pub fn rope_frequencies(&self) -> Vec<f32> {
        (0..self.head_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / self.head_dim as f32;
                let frequency = 1.0 / (self.rope_theta.powf(f64::from(exponent)) as f32);
                self.rope_scaling.stretch(i, frequency)
            })
            .collect()
    }
}

impl RopeScaling {
    fn stretch(&self, index: usize, frequency: f32) -> f32 {
        match *self {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor as f32,
            RopeScaling::Factors(ref factors) => frequency / factors[index],
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let context = original_max_position_embeddings as f64;
                let frequency = f64::from(frequency);
                let wavelength = std::f64::consts::TAU / frequency;
                let stretched = if wavelength < context / high_freq_factor {
                    frequency
                } else if wavelength > context / low_freq_factor {
                    frequency / factor
                } else {
                    let smooth = (context / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                };
                stretched as f32
            }
        }
    }

    fn to_json(&self) -> Value {
        match *self {
            RopeScaling::None => Value::Null,
            RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
            RopeScaling::Factors(ref factors) => {
                json!({ "rope_type": "factors", "factors": factors })
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
        }
    }
}

fn one_or_many(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    }
}

/// `config.json` as it is found, over several generations of the format.
#[derive(Deserialize)]
struct Raw {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    sliding_window: Option<usize>,
    #[serde(default)]
    tie_word_embeddings: bool,
    bos_token_id: Option<Ids>,
    eos_token_id: Option<Ids>,
    hidden_act: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
}

/// `rope_scaling` (older) or `rope_parameters` (newer, with the base inside).
#[derive(Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl Ids {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Ids::One(id) => vec![id],
            Ids::Many(ids) => ids,
        }
    }
}

impl Raw {
    fn check(self) -> std::result::Result<ModelConfig, String> {
        if !matches!(self.model_type.as_str(), "llama" | "mistral") {
            return Err(format!(
                "model_type {:?} is not of the Llama and Mistral family",
                self.model_type
            ));
        }
        if let Some(act) = self.hidden_act.filter(|act| act != "silu") {
            return Err(format!("hidden_act {act:?} is not supported, only \"silu\""));
        }
        if self.attention_bias || self.mlp_bias {
            return Err("biases in projections are not supported".into());
        }
        for (name, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
        ] {
            if size == 0 {
                return Err(format!("{name} must be 1 at least"));
            }
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(format!("rms_norm_eps must be 0 or more, not {}", self.rms_norm_eps));
        }
        let key_value = self.num_key_value_heads.unwrap_or(self.num_attention_heads);
        if key_value == 0 || !self.num_attention_heads.is_multiple_of(key_value) {
            return Err(format!(
                "{} query heads do not divide into {key_value} groups",
                self.num_attention_heads
            ));
        }
        let rope = self.rope_parameters.or(self.rope_scaling);
        let rope_theta = self.rope_theta.or(rope.as_ref().and_then(|rope| rope.rope_theta));
        if let Some(theta) = rope_theta.filter(|theta| !(theta.is_finite() && *theta > 0.0)) {
            return Err(format!("rope_theta must be above 0, not {theta}"));
        }
        Ok(ModelConfig {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: key_value,
            head_dim: self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads),
            max_position_embeddings: self.max_position_embeddings,
            rms_norm_eps: self.rms_norm_eps,
            rope_theta: rope_theta.unwrap_or(10_000.0),
            rope_scaling: rope.map_or(Ok(RopeScaling::None), RawRope::check)?,
            sliding_window: self.sliding_window.filter(|_| self.model_type == "mistral"),
            tie_word_embeddings: self.tie_word_embeddings,
            bos_token_id: self.bos_token_id.and_then(|ids| ids.into_vec().first().copied()),
            eos_token_ids: self.eos_token_id.map_or(Vec::new(), Ids::into_vec),
            model_type: self.model_type,
        })
    }
}

impl RawRope {
    fn check(self) -> std::result::Result<RopeScaling, String> {
        let kind = self.rope_type.as_deref().unwrap_or("default");
        let need = |value: Option<f64>, name| value.ok_or(format!("{kind} rope needs {name}"));
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: need(self.factor, "factor")? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: need(self.factor, "factor")?,
                low_freq_factor: need(self.low_freq_factor, "low_freq_factor")?,
                high_freq_factor: need(self.high_freq_factor, "high_freq_factor")?,
                original_max_position_embeddings: self
                    .original_max_position_embeddings
                    .ok_or("llama3 rope needs original_max_position_embeddings")?,
            }),
            other => Err(format!("rope scaling {other:?} is not supported")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MISTRAL: &str = r#"{"architectures":["MistralForCausalLM"],"bos_token_id":1,
        "eos_token_id":2,"hidden_act":"silu","hidden_size":4096,"intermediate_size":14336,
        "max_position_embeddings":32768,"model_type":"mistral","num_attention_heads":32,
        "num_hidden_layers":32,"num_key_value_heads":8,"rms_norm_eps":1e-5,"rope_theta":10000.0,
        "sliding_window":4096,"tie_word_embeddings":false,"vocab_size":32000}"#;

    fn check(change: impl FnOnce(&mut Value), expected: std::result::Result<ModelConfig, &str>) {
        let mut json: Value = serde_json::from_str(MISTRAL).unwrap();
        change(&mut json);
        let found = ModelConfig::parse(&json.to_string());
        assert_eq!(found, expected.map_err(str::to_owned));
    }

    fn mistral() -> ModelConfig {
        ModelConfig::parse(MISTRAL).unwrap()
    }

    #[test]
    fn mistral_7b_is_read_as_published() {
        let config = mistral();
        assert_eq!(config.parameter_count(), 7_241_732_096);
        assert_eq!((config.head_dim, config.sliding_window), (128, Some(4096)));
    }

    #[test]
    fn what_is_written_is_read_back() {
        for scaling in [
            RopeScaling::None,
            RopeScaling::Linear { factor: 2.0 },
            RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            },
        ] {
            let config = ModelConfig {
                rope_scaling: scaling,
                eos_token_ids: vec![2, 7],
                bos_token_id: None,
                ..mistral()
            };
            assert_eq!(ModelConfig::parse(&config.to_json().to_string()), Ok(config));
        }
    }

    #[test]
    fn newer_files_keep_the_rotary_base_inside() {
        check(
            |json| {
                json.as_object_mut().unwrap().remove("rope_theta");
                json["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e5});
            },
            Ok(ModelConfig { rope_theta: 5e5, ..mistral() }),
        );
    }

    #[test]
    fn llama_has_no_sliding_window() {
        check(
            |json| json["model_type"] = json!("llama"),
            Ok(ModelConfig { model_type: "llama".into(), sliding_window: None, ..mistral() }),
        );
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        check(
            |json| json["model_type"] = json!("gpt2"),
            Err("model_type \"gpt2\" is not of the Llama and Mistral family"),
        );
        for name in ["num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"] {
            let expected = format!("{name} must be 1 at least");
            check(|json| json[name] = json!(0), Err(&expected));
        }
        check(
            |json| json["rms_norm_eps"] = json!(-1.0),
            Err("rms_norm_eps must be 0 or more, not -1"),
        );
        check(|json| json["rope_theta"] = json!(0.0), Err("rope_theta must be above 0, not 0"));
        check(
            |json| json["hidden_act"] = json!("gelu"),
            Err("hidden_act \"gelu\" is not supported, only \"silu\""),
        );
        check(
            |json| json["rope_scaling"] = json!({"type": "yarn", "factor": 4.0}),
            Err("rope scaling \"yarn\" is not supported"),
        );
        check(
            |json| json["attention_bias"] = json!(true),
            Err("biases in projections are not supported"),
        );
        check(
            |json| json["num_key_value_heads"] = json!(5),
            Err("32 query heads do not divide into 5 groups"),
        );
    }
}
