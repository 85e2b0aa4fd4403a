//! Brings the parameters of a model into the form that it computes in.

use super::config::ModelConfig;
use super::layers::Block;
use super::packed::{PackedBlock, PackedLayers};
use super::precision::Precision;
use super::weights::Weights;
use super::{EMBEDDING, PlainLayers};
use crate::error::Result as LoadResult;
use crate::kernels::packed::{PackedWeight, WeightType};
use candle_core::{DType, Device, Tensor};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// The shape of each parameter, by name.
pub(super) type Shapes = BTreeMap<String, Vec<usize>>;

/// Where the parameters of a model come from.
pub(super) trait Parameters {
    /// A parameter of a known shape as a tensor.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> LoadResult<Tensor>;

    /// A weight of a known shape, packed.
    fn packed(&mut self, name: &str, shape: &[usize], kind: WeightType)
    -> LoadResult<PackedWeight>;
}

/// Parameters by a function.
pub(super) struct Given<F>(pub(super) F);

impl<F: FnMut(&str, &[usize]) -> LoadResult<Tensor>> Parameters for Given<F> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> LoadResult<Tensor> {
        (self.0)(name, shape)
    }

    fn packed(
        &mut self,
        name: &str,
        shape: &[usize],
        kind: WeightType,
    ) -> LoadResult<PackedWeight> {
        Ok(PackedWeight::of_type(&self.tensor(name, shape)?, kind)?)
    }
}

/// Parameters of a checkpoint.
pub(super) struct Loaded<'a> {
    pub(super) weights: &'a Weights,
    pub(super) precision: Precision,
}

impl Parameters for Loaded<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> LoadResult<Tensor> {
        let dtype = match self.precision {
            Precision::Int8 if name == EMBEDDING => DType::BF16,
            Precision::Int8 => DType::F32, // normalisations
            precision => precision.tensors()?,
        };
        self.weights.get(name, shape, dtype, &Device::Cpu)
    }

    fn packed(&mut self, name: &str, shape: &[usize], _: WeightType) -> LoadResult<PackedWeight> {
        self.weights.packed(name, shape, self.precision)
    }
}

/// Plain layers.
pub(super) fn plain(
    config: &ModelConfig,
    embed_tokens: &Tensor,
    mut get: impl FnMut(&str) -> LoadResult<Tensor>,
) -> LoadResult<PlainLayers> {
    let mut blocks = Vec::with_capacity(config.num_hidden_layers);
    for layer in 0..config.num_hidden_layers {
        let name = format!("model.layers.{layer}");
        let mut part = |part: &str| get(&format!("{name}.{part}.weight"));
        blocks.push(Block {
            input_layernorm: part("input_layernorm")?,
            q_proj: part("self_attn.q_proj")?,
            k_proj: part("self_attn.k_proj")?,
            v_proj: part("self_attn.v_proj")?,
            o_proj: part("self_attn.o_proj")?,
            post_attention_layernorm: part("post_attention_layernorm")?,
            gate_proj: part("mlp.gate_proj")?,
            up_proj: part("mlp.up_proj")?,
            down_proj: part("mlp.down_proj")?,
            epsilon: config.rms_norm_eps,
            name,
        });
    }
    let norm = get("model.norm.weight")?;
    let head = match config.tie_word_embeddings {
        true => embed_tokens.clone(),
        false => get("lm_head.weight")?,
    };
    Ok(PlainLayers { blocks, norm, head })
}

/// Layers packed for the CPU.
pub(super) fn pack(
    config: &ModelConfig,
    kind: WeightType,
    shapes: &Shapes,
    parameters: &mut impl Parameters,
) -> LoadResult<PackedLayers> {
    let parameters = RefCell::new(parameters);
    let wide = |name: &str| -> LoadResult<Vec<f32>> {
        let tensor = parameters.borrow_mut().tensor(name, shape_of(shapes, name))?;
        Ok(tensor.to_dtype(DType::F32)?.to_vec1()?)
    };
    let packed = |name: &str| parameters.borrow_mut().packed(name, shape_of(shapes, name), kind);
    let mut blocks = Vec::with_capacity(config.num_hidden_layers);
    for layer in 0..config.num_hidden_layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        blocks.push(PackedBlock {
            input_layernorm: wide(&name("input_layernorm"))?,
            q_proj: packed(&name("self_attn.q_proj"))?,
            k_proj: packed(&name("self_attn.k_proj"))?,
            v_proj: packed(&name("self_attn.v_proj"))?,
            o_proj: packed(&name("self_attn.o_proj"))?,
            post_attention_layernorm: wide(&name("post_attention_layernorm"))?,
            gate_proj: packed(&name("mlp.gate_proj"))?,
            up_proj: packed(&name("mlp.up_proj"))?,
            down_proj: packed(&name("mlp.down_proj"))?,
            epsilon: config.rms_norm_eps,
        });
    }
    let norm = wide("model.norm.weight")?;
    let head = packed(if config.tie_word_embeddings { EMBEDDING } else { "lm_head.weight" })?;
    Ok(PackedLayers { kind, blocks, norm, head, epsilon: config.rms_norm_eps })
}

/// The shape of a parameter of the config.
pub(super) fn shape_of<'a>(shapes: &'a Shapes, name: &str) -> &'a [usize] {
    shapes.get(name).expect("every name here is a parameter of the config")
}
