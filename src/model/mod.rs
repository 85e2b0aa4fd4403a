//! The model: a decoder of the Llama and Mistral family.
//!
//! ```text
//! ids ─ embed ─ block ─ … ─ block ─ norm ─ head ─ logits
//! ```

pub mod backward;
pub mod cache;
pub mod config;
pub mod device;
pub mod layers;
pub mod shape;
pub mod weights;

use crate::error::Result as LoadResult;
use crate::kernels::embedding::embed;
use crate::kernels::packed::PackedWeight;
use crate::kernels::rms_norm::rms_norm;
use crate::kernels::rope::RopeTable;
use candle_core::{DType, Device, Result, Tensor};
use config::ModelConfig;
use layers::{Block, Linear};
use weights::Weights;

/// A decoder with its parameters.
#[derive(Clone, Debug)]
pub struct Llama {
    /// The shape.
    pub config: ModelConfig,
    embed_tokens: Tensor, // (vocabulary, hidden)
    blocks: Vec<Block>,
    norm: Tensor, // (hidden)
    lm_head: Linear,
    table: RopeTable,
}

/// What projections are made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// Plain tensors: for training, and for devices other than the CPU.
    Plain,
    /// Packed for the CPU.
    Packed,
}

impl Llama {
    /// Loads a checkpoint for generation: packed on a CPU, plain elsewhere.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape than `config` says.
    pub fn load(
        config: &ModelConfig,
        weights: &Weights,
        dtype: DType,
        device: &Device,
    ) -> LoadResult<Self> {
        let form = if device.is_cpu() { Form::Packed } else { Form::Plain };
        Self::build(config, form, device, |name, shape| weights.get(name, shape, dtype, device))
    }

    /// Builds the model from parameters by name and shape.
    ///
    /// # Errors
    /// Whatever `parameter` returns.
    pub fn build(
        config: &ModelConfig,
        form: Form,
        device: &Device,
        mut parameter: impl FnMut(&str, &[usize]) -> LoadResult<Tensor>,
    ) -> LoadResult<Self> {
        let shapes: std::collections::BTreeMap<_, _> = config.parameters().into_iter().collect();
        let mut get = |name: &str| {
            let shape = shapes.get(name).expect("every name below is a parameter of the config");
            parameter(name, shape)
        };
        let linear = |weight: Tensor| -> LoadResult<Linear> {
            Ok(match form {
                Form::Plain => Linear::Plain(weight),
                Form::Packed => Linear::Packed(PackedWeight::new(&weight)?),
            })
        };
        let embed_tokens = get("model.embed_tokens.weight")?;
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for layer in 0..config.num_hidden_layers {
            let name = format!("model.layers.{layer}");
            let mut part = |part: &str| get(&format!("{name}.{part}.weight"));
            blocks.push(Block {
                input_layernorm: part("input_layernorm")?,
                q_proj: linear(part("self_attn.q_proj")?)?,
                k_proj: linear(part("self_attn.k_proj")?)?,
                v_proj: linear(part("self_attn.v_proj")?)?,
                o_proj: linear(part("self_attn.o_proj")?)?,
                post_attention_layernorm: part("post_attention_layernorm")?,
                gate_proj: linear(part("mlp.gate_proj")?)?,
                up_proj: linear(part("mlp.up_proj")?)?,
                down_proj: linear(part("mlp.down_proj")?)?,
                epsilon: config.rms_norm_eps,
                name,
            });
        }
        let norm = get("model.norm.weight")?;
        let lm_head = match config.tie_word_embeddings {
            true => linear(embed_tokens.clone())?,
            false => linear(get("lm_head.weight")?)?,
        };
        let wide = match embed_tokens.dtype() {
            _ if form == Form::Packed => DType::F32,
            dtype => dtype,
        };
        let context = config.max_position_embeddings;
        let table = RopeTable::new(&config.rope_frequencies(), context, wide, device)?;
        let small = |tensor: &Tensor| tensor.to_dtype(wide);
        for block in &mut blocks {
            block.input_layernorm = small(&block.input_layernorm)?;
            block.post_attention_layernorm = small(&block.post_attention_layernorm)?;
        }
        let norm = small(&norm)?;
        Ok(Llama { config: config.clone(), embed_tokens, blocks, norm, lm_head, table })
    }

    /// The device the parameters are on.
    pub fn device(&self) -> &Device {
        self.norm.device()
    }

    /// The type of the stream between blocks.
    pub fn dtype(&self) -> DType {
        self.norm.dtype()
    }

    /// Runs all blocks over rows of tokens: `(rows, hidden)`, before the last normalisation.
    ///
    /// `attend(layer, [queries, keys, values])` returns rows of attention output.
    pub fn forward(
        &self,
        ids: &[u32],
        positions: &[u32],
        mut attend: impl FnMut(usize, &[Tensor; 3]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut x = embed(&self.embed_tokens, ids)?.to_dtype(self.dtype())?;
        for (layer, block) in self.blocks.iter().enumerate() {
            (x, _) =
                block.forward(x, &self.table, positions, |qkv| Ok((attend(layer, qkv)?, ())))?;
        }
        Ok(x)
    }

    /// The logits of rows that [`Llama::forward`] returned: `(rows, vocabulary)`.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.lm_head.forward(&rms_norm(x, &self.norm, self.config.rms_norm_eps)?)
    }
}
