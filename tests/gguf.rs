//! GGUF files to read: small models with random weights, written as llama.cpp's converter writes them.

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Result, Tensor};
use headwater::model::config::ModelConfig;
use headwater::seed;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

/// What a file is made of, to be changed before it is written.
pub struct GgufFile {
    /// Settings by key.
    pub settings: BTreeMap<String, Value>,
    /// Tensors under their names in GGUF files.
    pub tensors: BTreeMap<String, QTensor>,
}

/// Random parameters by their names in checkpoints.
///
/// # Errors
/// If a shape is none.
pub fn random(config: &ModelConfig) -> Result<BTreeMap<String, Tensor>> {
    let value = |(name, shape): (String, Vec<usize>)| {
        let mut draw = seed::stream(7, &name, "gguf");
        let values = (0..shape.iter().product()).map(|_| draw.normal() as f32);
        let (scale, offset) = if shape.len() == 1 { (0.1, 1.0) } else { (0.08, 0.0) };
        let values: Vec<f32> = values.map(|value| offset + scale * value).collect();
        Ok((name, Tensor::from_vec(values, shape, &Device::Cpu)?))
    };
    config.parameters().into_iter().map(value).collect()
}

impl GgufFile {
    /// A model, its weights in the types that `kind` says by their names in checkpoints.
    ///
    /// # Errors
    /// If a weight does not come in such blocks.
    pub fn new(
        config: &ModelConfig,
        values: &BTreeMap<String, Tensor>,
        kind: impl Fn(&str) -> GgmlDType,
    ) -> Result<Self> {
        let count = |number: usize| Value::U32(number as u32);
        let settings = [
            ("general.architecture", Value::String("llama".into())),
            ("llama.embedding_length", count(config.hidden_size)),
            ("llama.block_count", count(config.num_hidden_layers)),
            ("llama.feed_forward_length", count(config.intermediate_size)),
            ("llama.attention.head_count", count(config.num_attention_heads)),
            ("llama.attention.head_count_kv", count(config.num_key_value_heads)),
            ("llama.attention.key_length", count(config.head_dim)),
            ("llama.context_length", count(config.max_position_embeddings)),
            ("llama.rope.freq_base", Value::F32(config.rope_theta as f32)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32)),
        ];
        let mut file = GgufFile {
            settings: settings.map(|(key, value)| (key.to_owned(), value)).into(),
            tensors: BTreeMap::new(),
        };
        for (parameter, value) in values {
            let heads = match parameter {
                name if name.ends_with("q_proj.weight") => Some(config.num_attention_heads),
                name if name.ends_with("k_proj.weight") => Some(config.num_key_value_heads),
                _ => None,
            };
            let value = match heads {
                Some(heads) => interleaved(value, heads)?,
                None => value.clone(),
            };
            let kind = if value.rank() == 1 { GgmlDType::F32 } else { kind(parameter) };
            file.tensors.insert(name_of(parameter), QTensor::quantize(&value, kind)?);
        }
        Ok(file)
    }

    /// Adds a tokenizer without merges: single characters.
    pub fn with_characters(mut self, count: usize) -> Self {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
        let letters = (0x100..).filter_map(char::from_u32).map(String::from);
        let bytes = (33..=126).map(|byte: u8| char::from(byte).to_string()).chain(letters);
        tokens.extend(bytes.take(count - 3));
        let kinds = (0..count).map(|id| Value::I32([2, 3, 3].get(id).copied().unwrap_or(1)));
        let texts = tokens.into_iter().map(Value::String).collect();
        for (key, value) in [
            ("model", Value::String("gpt2".into())),
            ("pre", Value::String("gpt-2".into())),
            ("token_type", Value::Array(kinds.collect())),
            ("tokens", Value::Array(texts)),
            ("merges", Value::Array(vec![Value::String("! \"".into())])),
            ("bos_token_id", Value::U32(1)),
            ("eos_token_id", Value::U32(2)),
        ] {
            self.settings.insert(format!("tokenizer.ggml.{key}"), value);
        }
        if let Some(Value::Array(tokens)) = self.settings.get_mut("tokenizer.ggml.tokens") {
            tokens.push(Value::String("!\"".into())); // what the merge makes
        }
        if let Some(Value::Array(kinds)) = self.settings.get_mut("tokenizer.ggml.token_type") {
            kinds.push(Value::I32(1));
        }
        self
    }

    /// Writes the file.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn write(&self, path: &Path) -> Result<()> {
        let settings: Vec<(&str, &Value)> =
            self.settings.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<(&str, &QTensor)> =
            self.tensors.iter().map(|(name, value)| (name.as_str(), value)).collect();
        gguf_file::write(&mut File::create(path)?, &settings, &tensors)
    }
}

/// The parameters as a file of these types gives them back.
///
/// # Errors
/// If a weight does not come in such blocks.
pub fn after_quantising(
    values: &BTreeMap<String, Tensor>,
    kind: impl Fn(&str) -> GgmlDType,
) -> Result<BTreeMap<String, Tensor>> {
    let value = |(name, value): (&String, &Tensor)| {
        let value = match value.rank() {
            1 => value.clone(),
            _ => QTensor::quantize(value, kind(name))?.dequantize(&Device::Cpu)?,
        };
        Ok((name.clone(), value))
    };
    values.iter().map(value).collect()
}

/// Rows in the order that llama.cpp wants: of each head the first of both halves, the second of both, …
fn interleaved(value: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, width) = value.dims2()?;
    let halves = value.reshape((heads, 2, rows / heads / 2, width))?;
    halves.transpose(1, 2)?.contiguous()?.reshape((rows, width))
}

fn name_of(parameter: &str) -> String {
    let names = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    names.iter().fold(parameter.to_owned(), |name, (from, to)| name.replace(from, to))
}
