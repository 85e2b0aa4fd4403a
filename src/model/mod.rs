//! The model: a decoder of the Llama and Mistral family.
//!
//! ```text
//! ids ─ embed ─ block ─ … ─ block ─ norm ─ head ─ logits
//! ```

pub mod backward;
pub mod cache;
pub mod config;
pub mod device;
mod gpu;
mod gradients;
pub(crate) mod host;
pub mod launched;
pub mod layers;
mod load;
mod operations;
mod packed;
pub mod precision;
#[cfg(test)]
mod sampled;
pub mod shape;
pub mod size;
mod steps;
pub mod weights;

use crate::error::Result as LoadResult;
use crate::kernels::cached::{Expected, StepRows};
use crate::kernels::cuda::machine::{Machine, machine};
use crate::kernels::embedding::embed;
use crate::kernels::packed::WeightType;
use crate::kernels::rms_norm::rms_norm;
use crate::kernels::rope::RopeTable;
use crate::threads;
use cache::{Cache, Store};
use candle_core::{D, DType, Device, Result, Tensor, bail};
use config::ModelConfig;
use gpu::{GpuModel, GpuStepped};
use launched::Launched;
use layers::{Block, project};
use load::{Given, Loaded, Parameters, Shapes, shape_of};
use packed::PackedLayers;
use precision::Precision;
use std::sync::Arc;
use weights::Weights;

/// The table of embeddings, and the head of models that tie them.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// A decoder with its parameters.
#[derive(Clone, Debug)]
pub struct Llama {
    /// The shape.
    pub config: ModelConfig,
    layers: Layers,
}

#[derive(Clone, Debug)]
enum Layers {
    Plain(Inputs, PlainLayers),
    Packed(Inputs, PackedLayers),
    Gpu(Arc<GpuModel>),
}

/// What tokens and positions are looked up in.
#[derive(Clone, Debug)]
struct Inputs {
    embed_tokens: Tensor, // (vocabulary, hidden)
    table: RopeTable,
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
    /// Plain tensors: for training, on any device.
    Plain,
    /// Packed for the CPU, each in the type it comes in: bf16, or else f32.
    Packed,
    /// Packed for the CPU in this type.
    PackedAs(WeightType),
    /// For generation on a GPU.
    Gpu,
}

/// What [`Llama::step`] computed: the rows whose next token is wanted.
#[derive(Debug)]
pub struct Stepped<'a> {
    model: &'a Llama,
    rows: SteppedRows,
}

#[derive(Debug)]
enum SteppedRows {
    /// `(samples, hidden)`
    Host(Tensor),
    Gpu(Box<GpuStepped>),
}

impl Llama {
    /// Loads a checkpoint for generation: packed on a CPU, with kernels of its own on a GPU.
    ///
    /// In 8 bits the table of embeddings is in bf16, and normalisations are in f32.
    ///
    /// # Errors
    /// If a parameter is missing, has another shape than `config` says or is none that it says, or the device does not
    /// compute in this precision.
    pub fn load(
        config: &ModelConfig,
        weights: &Weights,
        precision: Precision,
        device: &Device,
    ) -> LoadResult<Self> {
        weights.check_all_used(config)?;
        let form = match device.is_cpu() {
            true => Form::PackedAs(precision.packed()),
            false => precision.tensors().map(|_| Form::Gpu)?,
        };
        Self::assemble(config, form, device, Loaded { weights, precision })
    }

    /// Builds the model from parameters by name and shape. They are in host memory, but for [`Form::Plain`].
    ///
    /// # Errors
    /// Whatever `parameter` returns, or if the device cannot run such a model.
    pub fn build(
        config: &ModelConfig,
        form: Form,
        device: &Device,
        parameter: impl FnMut(&str, &[usize]) -> LoadResult<Tensor>,
    ) -> LoadResult<Self> {
        Self::assemble(config, form, device, Given(parameter))
    }

    fn assemble(
        config: &ModelConfig,
        form: Form,
        device: &Device,
        mut parameters: impl Parameters,
    ) -> LoadResult<Self> {
        if form == Form::Gpu {
            return Self::build_on(config, machine(device)?, |name, shape| {
                parameters.tensor(name, shape)
            });
        }
        let shapes: Shapes = config.parameters().into_iter().collect();
        let embed_tokens = parameters.tensor(EMBEDDING, shape_of(&shapes, EMBEDDING))?;
        let kind = match form {
            Form::PackedAs(kind) => kind,
            _ if embed_tokens.dtype() == DType::BF16 => WeightType::Bf16,
            _ => WeightType::F32,
        };
        let wide = if form == Form::Plain { embed_tokens.dtype() } else { DType::F32 };
        let context = config.max_position_embeddings;
        let table = RopeTable::new(&config.rope_frequencies(), context, wide, device)?;
        let layers = match form {
            Form::Plain => {
                let get = |name: &str| parameters.tensor(name, shape_of(&shapes, name));
                let layers = load::plain(config, &embed_tokens, get)?;
                Layers::Plain(Inputs { embed_tokens, table }, layers)
            }
            _ => {
                let layers = load::pack(config, kind, &shapes, &mut parameters)?;
                Layers::Packed(Inputs { embed_tokens, table }, layers)
            }
        };
        Ok(Llama { config: config.clone(), layers })
    }

    /// Builds the model on a machine, from parameters in host memory.
    pub(crate) fn build_on(
        config: &ModelConfig,
        machine: Arc<dyn Machine>,
        parameter: impl FnMut(&str, &[usize]) -> LoadResult<Tensor>,
    ) -> LoadResult<Self> {
        let model = GpuModel::new(config, machine, by_name(config, parameter))?;
        Ok(Llama { config: config.clone(), layers: Layers::Gpu(Arc::new(model)) })
    }

    /// The type of the keys and values of a [`Cache`] for this model.
    pub fn dtype(&self) -> DType {
        match &self.layers {
            Layers::Plain(_, layers) => layers.norm.dtype(),
            Layers::Packed(_, layers) => layers.kind.cache_type(),
            Layers::Gpu(model) => model.dtype(),
        }
    }

    /// Bytes that are free where a GPU keeps this model; none if it is in host memory.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn free_bytes(&self) -> LoadResult<Option<usize>> {
        match &self.layers {
            Layers::Gpu(model) => Ok(Some(model.free_bytes()?)),
            _ => Ok(None),
        }
    }

    /// About how many bytes a GPU takes to compute so many rows; 0 for a model in host memory.
    pub fn step_bytes(&self, rows: usize) -> usize {
        match &self.layers {
            Layers::Gpu(model) => model.step_bytes(rows),
            _ => 0,
        }
    }

    /// Parts that a step of so many rows is computed in, where its sequences are as many.
    pub fn parts_of_step(&self, rows: usize) -> usize {
        match &self.layers {
            Layers::Packed(_, layers) => {
                layers.cut(threads::all(), &self.config.heads()).parts_of(rows)
            }
            _ => 1,
        }
    }

    /// Room for `blocks` blocks of keys and values, where the model is.
    ///
    /// # Errors
    /// If there is not so much, or the model is a plain one on a GPU.
    pub fn cache(&self, blocks: usize) -> Result<Cache> {
        let store = match &self.layers {
            Layers::Plain(inputs, _) if !inputs.embed_tokens.device().is_cpu() => {
                bail!("a model that was loaded for training generates nothing on a GPU")
            }
            Layers::Gpu(model) => Store::Gpu(model.cache(blocks)?),
            _ => Store::host(&self.config, blocks, self.dtype()),
        };
        Ok(Cache { store })
    }

    /// Computes rows of sequences with what `cache` holds of these, and adds the rows to it.
    ///
    /// # Errors
    /// If the device fails, or the cache is another model's.
    pub fn step(&self, cache: &mut Cache, rows: &StepRows<'_>) -> Result<Stepped<'_>> {
        let computed = match (&self.layers, &mut cache.store) {
            (Layers::Gpu(model), Store::Gpu(cache)) => {
                SteppedRows::Gpu(Box::new(model.step(cache, rows, None)?))
            }
            (Layers::Packed(inputs, layers), _) => {
                SteppedRows::Host(steps::step((inputs, layers), cache, rows)?)
            }
            _ => {
                let attend = |layer, qkv: &[Tensor; 3]| cache.step(layer, qkv, rows.runs);
                let x = self.forward(rows.ids, rows.positions, attend)?;
                SteppedRows::Host(x.index_select(&Tensor::new(rows.samples, x.device())?, 0)?)
            }
        };
        Ok(Stepped { model: self, rows: computed })
    }

    /// Whether steps are computed by a device while this thread goes on.
    pub fn has_own_device(&self) -> bool {
        matches!(self.layers, Layers::Gpu(_))
    }

    /// [`Llama::step`], and the most likely next token of each sample, the first of several. A device of its own has only
    /// begun when this returns. `before` is the step before, and the rows whose ids are tokens of it.
    ///
    /// # Errors
    /// If the device fails, the cache is another model's, or the step before has no such tokens.
    pub fn launch(
        &self,
        cache: &mut Cache,
        rows: &StepRows<'_>,
        before: Option<(&Launched, &[Expected])>,
    ) -> Result<Launched> {
        if let (Layers::Gpu(model), Store::Gpu(cache)) = (&self.layers, &mut cache.store) {
            return model.launch(cache, rows, before).map(Launched::on_gpu);
        }
        let ids = launched::known_ids(rows, before)?;
        let rows = &StepRows { ids: &ids, ..*rows };
        let tokens = match &self.layers {
            Layers::Packed(inputs, layers) => steps::next_tokens((inputs, layers), cache, rows)?,
            _ if rows.samples.is_empty() => {
                self.step(cache, rows)?;
                Vec::new()
            }
            _ => self.step(cache, rows)?.most_likely()?,
        };
        Ok(Launched::on_host(tokens))
    }

    /// [`Llama::launch`], and waits for the tokens.
    ///
    /// # Errors
    /// As [`Llama::launch`].
    pub fn next_tokens(&self, cache: &mut Cache, rows: &StepRows<'_>) -> Result<Vec<u32>> {
        self.launch(cache, rows, None)?.tokens()
    }

    /// Runs all blocks over rows of tokens in host memory, or, for training, on any device: `(rows, hidden)`,
    /// before the last normalisation.
    ///
    /// `attend(layer, [queries, keys, values])` returns rows of attention output.
    pub fn forward(
        &self,
        ids: &[u32],
        positions: &[u32],
        mut attend: impl FnMut(usize, &[Tensor; 3]) -> Result<Tensor> + Send,
    ) -> Result<Tensor> {
        match &self.layers {
            Layers::Plain(inputs, layers) => {
                let mut x = embed(&inputs.embed_tokens, ids)?;
                for (layer, block) in layers.blocks.iter().enumerate() {
                    let attend = |qkv: &[Tensor; 3]| Ok((attend(layer, qkv)?, ()));
                    (x, _) = block.forward(x, &inputs.table, positions, None, attend)?;
                }
                Ok(x)
            }
            Layers::Packed(inputs, layers) => {
                let tensor = |rows: &[f32]| {
                    let shape = (ids.len(), rows.len() / ids.len());
                    Tensor::from_slice(rows, shape, &Device::Cpu)
                };
                let model = (inputs, layers);
                let x = steps::run(model, (ids, positions), None, |layer, [q, k, v], out| {
                    let attended = attend(layer, &[tensor(q)?, tensor(k)?, tensor(v)?])?;
                    out.copy_from_slice(&attended.flatten_all()?.to_vec1()?);
                    Ok(())
                })?;
                tensor(&x)
            }
            Layers::Gpu(_) => bail!("a model on a GPU attends by itself: it takes steps"),
        }
    }

    /// The logits of rows that [`Llama::forward`] returned: `(rows, vocabulary)`.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        match &self.layers {
            Layers::Plain(_, layers) => {
                project(&rms_norm(x, &layers.norm, self.config.rms_norm_eps)?, &layers.head)
            }
            Layers::Packed(_, layers) => {
                let rows = x.dim(0)?;
                let logits = layers.logits(&x.flatten_all()?.to_vec1()?);
                Tensor::from_vec(logits, (rows, self.config.vocab_size), &Device::Cpu)
            }
            Layers::Gpu(_) => bail!("a model on a GPU has the logits of its steps only"),
        }
    }

    /// The layers of a model that can be trained.
    fn plain(&self) -> Result<(&Inputs, &PlainLayers)> {
        match &self.layers {
            Layers::Plain(inputs, layers) => Ok((inputs, layers)),
            _ => bail!("a model that was loaded for generation cannot be trained"),
        }
    }
}

impl Stepped<'_> {
    /// The logits, in host memory but for a plain model: `(samples, vocabulary)`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn logits(&self) -> Result<Tensor> {
        match (&self.model.layers, &self.rows) {
            (Layers::Gpu(model), SteppedRows::Gpu(stepped)) => model.logits(stepped),
            (_, SteppedRows::Host(x)) => self.model.logits(x),
            _ => unreachable!("a step is of one model"),
        }
    }

    /// The most likely next tokens, each the first of several.
    ///
    /// # Errors
    /// If the device fails.
    pub fn most_likely(&self) -> Result<Vec<u32>> {
        match (&self.model.layers, &self.rows) {
            (Layers::Gpu(model), SteppedRows::Gpu(stepped)) => model.most_likely(stepped)?.tokens(),
            (Layers::Packed(_, layers), SteppedRows::Host(x)) => {
                Ok(layers.most_likely(&x.flatten_all()?.to_vec1()?))
            }
            (_, SteppedRows::Host(x)) => self.model.logits(x)?.argmax(D::Minus1)?.to_vec1(),
            _ => unreachable!("a step is of one model"),
        }
    }
}

/// Looks parameters up by their names.
fn by_name(
    config: &ModelConfig,
    mut parameter: impl FnMut(&str, &[usize]) -> LoadResult<Tensor>,
) -> impl FnMut(&str) -> LoadResult<Tensor> {
    let shapes: Shapes = config.parameters().into_iter().collect();
    move |name| parameter(name, shape_of(&shapes, name))
}
