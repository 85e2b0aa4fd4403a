//! The shape of a model, from the settings of its GGUF file.

use super::header::{Header, Place, Value};
use crate::model::config::{ModelConfig, RopeScaling};
use crate::model::precision::Precision;
use candle_core::quantized::GgmlDType;

/// The factors that rotary frequencies are divided by, in files of Llama 3.1 and later.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Widths and counts beyond this are no model's.
const SIZE_MAX: i128 = 1 << 24;

/// Tokens of a context at most: there is a table of so many rotations.
const CONTEXT_MAX: i128 = 1 << 20;

/// Width of a head at most.
const HEAD_MAX: usize = 512;

type Result<T> = std::result::Result<T, String>;

/// The width of a head: what the file says, or `usual`.
fn head_width(keys: &Keys<'_>, usual: usize) -> Result<usize> {
    let head_dim = keys.count("llama.attention.key_length", SIZE_MAX)?.unwrap_or(usual);
    if head_dim == 0 || head_dim > HEAD_MAX || head_dim % 2 != 0 {
        return Err(format!(
            "heads cannot be {head_dim} wide: even numbers to {HEAD_MAX} are supported"
        ));
    }
    for key in ["llama.attention.value_length", "llama.rope.dimension_count"] {
        if let Some(width) = keys.count(key, SIZE_MAX)?.filter(|&width| width != head_dim) {
            return Err(format!("{key:?} is {width}, heads are {head_dim} wide: not supported"));
        }
    }
    Ok(head_dim)
}

/// Reads the shape; `factors` are those of [`ROPE_FACTORS`], if the file has them.
///
/// # Errors
/// Names the key that is missing, or says something that is not supported.
pub(super) fn config(header: &Header, factors: Option<Vec<f32>>) -> Result<ModelConfig> {
    let keys = Keys(header);
    let architecture = keys.text("general.architecture")?;
    if architecture != "llama" {
        return Err(format!(
            "the architecture {architecture:?} is not supported, only \"llama\" (Llama and Mistral)"
        ));
    }
    if keys.count("split.count", SIZE_MAX)?.is_some_and(|parts| parts > 1) {
        return Err("is one part of several; join them with llama-gguf-split --merge".into());
    }
    if keys.count("llama.expert_count", SIZE_MAX)?.is_some_and(|experts| experts > 0) {
        return Err("mixtures of experts are not supported".into());
    }
    let (vocab_size, hidden_size) = embedding(header)?;
    let stated = keys.size("llama.embedding_length")?;
    if stated != hidden_size {
        return Err(format!(
            "\"llama.embedding_length\" is {stated}, but rows of \"token_embd.weight\" have {hidden_size} elements"
        ));
    }
    let heads = keys.size("llama.attention.head_count")?;
    let key_value = keys.count("llama.attention.head_count_kv", SIZE_MAX)?.unwrap_or(heads);
    if key_value == 0 || !heads.is_multiple_of(key_value) {
        return Err(format!("{heads} query heads do not divide into {key_value} groups"));
    }
    let head_dim = head_width(&keys, hidden_size / heads)?;
    let window =
        keys.count("llama.attention.sliding_window", SIZE_MAX)?.filter(|&window| window > 0);
    let token = |key: &str| -> Result<Option<u32>> {
        let id = keys.count(key, vocab_size as i128 - 1)?;
        Ok(id.map(|id| id as u32))
    };
    let end = token("tokenizer.ggml.eos_token_id")?;
    let end_of_turn = token("tokenizer.ggml.eot_token_id")?;
    let mut eos_token_ids: Vec<u32> = end.into_iter().chain(end_of_turn).collect();
    eos_token_ids.dedup();
    Ok(ModelConfig {
        model_type: if window.is_some() { "mistral" } else { "llama" }.into(),
        vocab_size,
        hidden_size,
        intermediate_size: keys.size("llama.feed_forward_length")?,
        num_hidden_layers: layers(&keys)?,
        num_attention_heads: heads,
        num_key_value_heads: key_value,
        head_dim,
        max_position_embeddings: need(
            keys.count("llama.context_length", CONTEXT_MAX)?.filter(|&tokens| tokens > 0),
            "llama.context_length",
        )?,
        rms_norm_eps: need(
            keys.positive("llama.attention.layer_norm_rms_epsilon")?,
            "llama.attention.layer_norm_rms_epsilon",
        )?,
        rope_theta: keys.positive("llama.rope.freq_base")?.unwrap_or(10_000.0),
        rope_scaling: scaling(&keys, factors, head_dim)?,
        sliding_window: window,
        tie_word_embeddings: !header.tensors.contains_key("output.weight"),
        bos_token_id: token("tokenizer.ggml.bos_token_id")?,
        eos_token_ids,
    })
}

/// Vocabulary and width, as the table of embeddings has them.
fn embedding(header: &Header) -> Result<(usize, usize)> {
    match header.tensors.get("token_embd.weight").map(|place| place.shape.as_slice()) {
        Some(&[vocabulary, hidden]) if vocabulary > 0 && hidden > 0 => Ok((vocabulary, hidden)),
        Some(shape) => Err(format!("tensor \"token_embd.weight\" cannot have the shape {shape:?}")),
        None => Err("the file has no tensor \"token_embd.weight\"".into()),
    }
}

/// Blocks, of which every one has nine tensors.
fn layers(keys: &Keys<'_>) -> Result<usize> {
    let layers = keys.size("llama.block_count")?;
    let tensors = keys.0.tensors.len();
    match 9 * layers <= tensors {
        true => Ok(layers),
        false => Err(format!("{layers} blocks cannot be made of {tensors} tensors")),
    }
}

fn scaling(keys: &Keys<'_>, factors: Option<Vec<f32>>, head_dim: usize) -> Result<RopeScaling> {
    let kind = match keys.0.values.get("llama.rope.scaling.type") {
        Some(_) => Some(keys.text("llama.rope.scaling.type")?),
        None => None,
    };
    let older = keys.positive("llama.rope.scale_linear")?;
    let factor = keys.positive("llama.rope.scaling.factor")?.or(older);
    let scaling = match (kind, factor) {
        (Some("none"), _) | (None, None) => RopeScaling::None,
        (Some("linear") | None, Some(1.0)) => RopeScaling::None,
        (Some("linear") | None, Some(factor)) => RopeScaling::Linear { factor },
        (Some("linear"), None) => return Err(missing("llama.rope.scaling.factor")),
        (Some(other), _) => return Err(format!("rope scaling {other:?} is not supported")),
    };
    let Some(factors) = factors else { return Ok(scaling) };
    if scaling != RopeScaling::None {
        return Err(format!("{ROPE_FACTORS:?} beside another rope scaling is not supported"));
    }
    let good = factors.iter().all(|factor| factor.is_finite() && *factor > 0.0);
    match good && factors.len() == head_dim / 2 {
        true => Ok(RopeScaling::Factors(factors)),
        false => Err(format!("{ROPE_FACTORS:?} must hold {} factors above 0", head_dim / 2)),
    }
}

/// The type that suits the weights of a file: 8 bits if any of them are quantised, else their own.
pub(super) fn own_precision(header: &Header) -> Precision {
    let weights = || header.tensors.values().filter(|place| place.shape.len() == 2);
    let is_plain =
        |place: &Place| matches!(place.kind, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
    if !weights().all(is_plain) {
        Precision::Int8
    } else if weights().all(|place| place.kind == GgmlDType::BF16) {
        Precision::Bf16
    } else {
        Precision::F32
    }
}

fn missing(key: &str) -> String {
    format!("the key {key:?} is missing")
}

fn need<T>(value: Option<T>, key: &str) -> Result<T> {
    value.ok_or_else(|| missing(key))
}

/// Whether all numbers are this whole one.
fn is_same(all: &[f64], number: f64) -> bool {
    number.fract() == 0.0 && all.iter().all(|next| *next == number)
}

/// Settings by key.
pub(super) struct Keys<'a>(pub(super) &'a Header);

impl<'a> Keys<'a> {
    pub(super) fn text(&self, key: &str) -> Result<&'a str> {
        match need(self.0.values.get(key), key)? {
            Value::Text(text) => Ok(text),
            _ => Err(format!("{key:?} is not a text")),
        }
    }

    pub(super) fn truth(&self, key: &str) -> Result<Option<bool>> {
        match self.0.values.get(key) {
            None => Ok(None),
            Some(Value::Truth(truth)) => Ok(Some(*truth)),
            Some(_) => Err(format!("{key:?} is not a truth value")),
        }
    }

    pub(super) fn texts(&self, key: &str) -> Result<&'a [String]> {
        match need(self.0.values.get(key), key)? {
            Value::Texts(texts) => Ok(texts),
            _ => Err(format!("{key:?} is not a list of texts")),
        }
    }

    pub(super) fn numbers(&self, key: &str) -> Result<Option<&'a [f64]>> {
        match self.0.values.get(key) {
            None => Ok(None),
            Some(Value::Numbers(numbers)) => Ok(Some(numbers)),
            Some(_) => Err(format!("{key:?} is not a list of numbers")),
        }
    }

    /// A number without a fraction from 0 to `most`. Some files have one for each block: these must agree.
    pub(super) fn count(&self, key: &str, most: i128) -> Result<Option<usize>> {
        let number = match self.0.values.get(key) {
            None => return Ok(None),
            Some(Value::Integer(number)) => *number,
            Some(Value::Numbers(all)) if all.first().is_some_and(|first| is_same(all, *first)) => {
                all[0] as i128
            }
            Some(Value::Numbers(_)) => {
                return Err(format!("{key:?} differs between blocks, which is not supported"));
            }
            Some(_) => return Err(format!("{key:?} is not a whole number")),
        };
        match (0..=most).contains(&number) {
            true => Ok(Some(number as usize)),
            false => Err(format!("{key:?} cannot be {number}")),
        }
    }

    /// A count that must be there, and not 0.
    fn size(&self, key: &str) -> Result<usize> {
        match need(self.count(key, SIZE_MAX)?, key)? {
            0 => Err(format!("{key:?} cannot be 0")),
            size => Ok(size),
        }
    }

    fn positive(&self, key: &str) -> Result<Option<f64>> {
        let number = match self.0.values.get(key) {
            None => return Ok(None),
            Some(Value::Real(number)) => *number,
            Some(Value::Integer(number)) => *number as f64,
            Some(_) => return Err(format!("{key:?} is not a number")),
        };
        match number.is_finite() && number > 0.0 {
            true => Ok(Some(number)),
            false => Err(format!("{key:?} cannot be {number}")),
        }
    }
}
