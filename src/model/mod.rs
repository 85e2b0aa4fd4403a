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
mod packed;
pub mod precision;
pub mod shape;
pub mod weights;

use crate::error::Result as LoadResult;
use crate::kernels::embedding::embed;
use crate::kernels::packed::{PackedWeight, WeightType};
use crate::kernels::rms_norm::rms_norm;
use crate::kernels::rope::RopeTable;
use candle_core::{D, DType, Device, Result, Tensor, bail};
use config::ModelConfig;
use layers::{Block, project};
use packed::{PackedBlock, PackedLayers};
use precision::Precision;
use std::cell::RefCell;
use std::collections::BTreeMap;
use weights::Weights;

/// The table of embeddings, and the head of models that tie them.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// A decoder with its parameters.
#[derive(Clone, Debug)]
pub struct Llama {
    /// The shape.
    pub config: ModelConfig,
    embed_tokens: Tensor, // (vocabulary, hidden)
    layers: Layers,
    table: RopeTable,
}

#[derive(Clone, Debug)]
enum Layers {
    Plain(PlainLayers),
    Packed(PackedLayers),
}

#[derive(Clone, Debug)]
struct PlainLayers {
    blocks: Vec<Block>,
    norm: Tensor, // (hidden)
    head: Tensor, // (vocabulary, hidden)
}

/// What projections are made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// Plain tensors: for training, and for devices other than the CPU.
    Plain,
    /// Packed for the CPU, each in the type it comes in: bf16, or else f32.
    Packed,
    /// Packed for the CPU in this type.
    PackedAs(WeightType),
}

/// Where the parameters of a model come from.
trait Parameters {
    /// A parameter of a known shape as a tensor.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> LoadResult<Tensor>;

    /// A weight of a known shape, packed.
    fn packed(&mut self, name: &str, shape: &[usize], kind: WeightType)
    -> LoadResult<PackedWeight>;
}

/// Parameters by a function.
struct Given<F>(F);

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
struct Loaded<'a> {
    weights: &'a Weights,
    precision: Precision,
    device: &'a Device,
}

impl Parameters for Loaded<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> LoadResult<Tensor> {
        let dtype = match self.precision {
            Precision::Int8 if name == EMBEDDING => DType::BF16,
            Precision::Int8 => DType::F32, // normalisations
            precision => precision.tensors()?,
        };
        self.weights.get(name, shape, dtype, self.device)
    }

    fn packed(&mut self, name: &str, shape: &[usize], _: WeightType) -> LoadResult<PackedWeight> {
        self.weights.packed(name, shape, self.precision)
    }
}

impl Llama {
    /// Loads a checkpoint for generation: packed on a CPU, plain elsewhere.
    ///
    /// In 8 bits the table of embeddings is in bf16, and normalisations are in f32.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape than `config` says, or the device does not compute
    /// in this precision.
    pub fn load(
        config: &ModelConfig,
        weights: &Weights,
        precision: Precision,
        device: &Device,
    ) -> LoadResult<Self> {
        let form = match device.is_cpu() {
            true => Form::PackedAs(precision.packed()),
            false => precision.tensors().map(|_| Form::Plain)?,
        };
        Self::assemble(config, form, device, &mut Loaded { weights, precision, device })
    }

    /// Builds the model from parameters by name and shape.
    ///
    /// # Errors
    /// Whatever `parameter` returns.
    pub fn build(
        config: &ModelConfig,
        form: Form,
        device: &Device,
        parameter: impl FnMut(&str, &[usize]) -> LoadResult<Tensor>,
    ) -> LoadResult<Self> {
        Self::assemble(config, form, device, &mut Given(parameter))
    }

    fn assemble(
        config: &ModelConfig,
        form: Form,
        device: &Device,
        parameters: &mut impl Parameters,
    ) -> LoadResult<Self> {
        let shapes: BTreeMap<_, _> = config.parameters().into_iter().collect();
        let embed_tokens = parameters.tensor(EMBEDDING, shape_of(&shapes, EMBEDDING))?;
        let kind = match form {
            Form::PackedAs(kind) => kind,
            _ if embed_tokens.dtype() == DType::BF16 => WeightType::Bf16,
            _ => WeightType::F32,
        };
        let layers = match form {
            Form::Plain => Layers::Plain(plain(config, &embed_tokens, |name| {
                parameters.tensor(name, shape_of(&shapes, name))
            })?),
            Form::Packed | Form::PackedAs(_) => {
                Layers::Packed(pack(config, kind, &shapes, parameters)?)
            }
        };
        let wide = match form {
            Form::Plain => embed_tokens.dtype(),
            Form::Packed | Form::PackedAs(_) => DType::F32,
        };
        let context = config.max_position_embeddings;
        let table = RopeTable::new(&config.rope_frequencies(), context, wide, device)?;
        Ok(Llama { config: config.clone(), embed_tokens, layers, table })
    }

    /// The device the parameters are on.
    pub fn device(&self) -> &Device {
        self.embed_tokens.device()
    }

    /// The type of the keys and values of a [`cache::Cache`] for this model.
    pub fn dtype(&self) -> DType {
        match &self.layers {
            Layers::Plain(layers) => layers.norm.dtype(),
            Layers::Packed(layers) => layers.cache_type(),
        }
    }

    /// Runs all blocks over rows of tokens: `(rows, hidden)`, before the last normalisation.
    ///
    /// `attend(layer, [queries, keys, values])` returns rows of attention output.
    pub fn forward(
        &self,
        ids: &[u32],
        positions: &[u32],
        mut attend: impl FnMut(usize, &[Tensor; 3]) -> Result<Tensor> + Send,
    ) -> Result<Tensor> {
        let mut x = embed(&self.embed_tokens, ids)?;
        match &self.layers {
            Layers::Plain(layers) => {
                for (layer, block) in layers.blocks.iter().enumerate() {
                    let attend = |qkv: &[Tensor; 3]| Ok((attend(layer, qkv)?, ()));
                    (x, _) = block.forward(x, &self.table, positions, attend)?;
                }
                Ok(x)
            }
            Layers::Packed(layers) => {
                let shape = x.shape().clone();
                let mut x = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
                layers.forward(&mut x, &self.table, positions, attend)?;
                Tensor::from_vec(x, shape, &Device::Cpu)
            }
        }
    }

    /// The logits of rows that [`Llama::forward`] returned: `(rows, vocabulary)`.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        match &self.layers {
            Layers::Plain(layers) => {
                project(&rms_norm(x, &layers.norm, self.config.rms_norm_eps)?, &layers.head)
            }
            Layers::Packed(layers) => {
                let rows = x.dim(0)?;
                let logits = layers.logits(&x.flatten_all()?.to_vec1()?);
                Tensor::from_vec(logits, (rows, self.config.vocab_size), &Device::Cpu)
            }
        }
    }

    /// The most likely next token after each of `rows` of what [`Llama::forward`] returned, the first of
    /// several.
    pub fn most_likely(&self, x: &Tensor, rows: &[u32]) -> Result<Vec<u32>> {
        let x = x.index_select(&Tensor::new(rows, x.device())?, 0)?;
        match &self.layers {
            Layers::Plain(_) => self.logits(&x)?.argmax(D::Minus1)?.to_vec1(),
            Layers::Packed(layers) => Ok(layers.most_likely(&x.flatten_all()?.to_vec1()?)),
        }
    }

    /// The layers of a model that can be trained.
    fn plain(&self) -> Result<&PlainLayers> {
        match &self.layers {
            Layers::Plain(layers) => Ok(layers),
            Layers::Packed(_) => bail!("a model that was packed for generation cannot be trained"),
        }
    }
}

fn plain(
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

fn pack(
    config: &ModelConfig,
    kind: WeightType,
    shapes: &BTreeMap<String, Vec<usize>>,
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

fn shape_of<'a>(shapes: &'a BTreeMap<String, Vec<usize>>, name: &str) -> &'a [usize] {
    shapes.get(name).expect("every name here is a parameter of the config")
}
