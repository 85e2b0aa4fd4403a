//! The model on a GPU: what [`super::layers::Block`] does, by the kernels of [`crate::kernels::cuda`].
//!
//! In a step, ids, positions, slots and tables go to the GPU once, and the sampled ids come back. The stream is
//! f32, and products add to it; weights, keys and values are of one type, bf16 or whatever the model was loaded
//! in. Queries, keys and values are one product, and so are gate and up.

use super::config::ModelConfig;
use super::launched::Launched;
use crate::error::{Context, Error, Result as LoadResult};
use crate::kernels::cached::{Expected, StepRows};
use crate::kernels::cuda::kernels::{Angles, Columns, DeviceStep, Kernels, Pages, VECTOR};
use crate::kernels::cuda::machine::{Element, Machine, Mark, Matrix};
use crate::kernels::cuda::plan::Limits;
use crate::kernels::rope::RopeTable;
use candle_core::{DType, Device, Result, Tensor, bail};
use std::sync::Arc;

/// Rows of logits that there are at a time: with a large vocabulary they take more memory than all else.
const LOGIT_ROWS: usize = 256;

/// The parameters of one block.
#[derive(Debug)]
struct GpuBlock {
    input_layernorm: Matrix,
    /// Query, key and value projections below each other.
    qkv_proj: Matrix,
    o_proj: Matrix,
    post_attention_layernorm: Matrix,
    /// Gate and up projections below each other.
    gate_up_proj: Matrix,
    down_proj: Matrix,
}

/// A model in the memory of a GPU.
#[derive(Debug)]
pub(crate) struct GpuModel {
    kernels: Arc<Kernels>,
    embed_tokens: Arc<Matrix>,
    angles: Angles,
    blocks: Vec<GpuBlock>,
    norm: Matrix,
    head: Arc<Matrix>,
    epsilon: f64,
}

/// Keys and values of all layers, in the memory of a GPU.
#[derive(Debug)]
pub(crate) struct GpuCache {
    layers: Vec<Pages>,
    blocks: usize,
}

/// What a step left on a GPU.
#[derive(Debug)]
pub(crate) struct GpuStepped {
    /// The stream behind the last block: `(rows, hidden)`; of the wanted rows alone, where there are others.
    x: Matrix,
    step: DeviceStep,
}

/// A step that a GPU has begun with.
#[derive(Debug)]
pub(crate) struct GpuLaunched {
    kernels: Arc<Kernels>,
    tokens: Columns,
    /// Where all of it is done.
    done: Mark,
}

impl GpuLaunched {
    /// The next token of each sample, as soon as they are there.
    pub(crate) fn tokens(&self) -> Result<Vec<u32>> {
        self.kernels.download_columns(&self.tokens, &self.done)
    }
}

impl GpuModel {
    /// Brings parameters, which `get` returns in host memory, onto a machine.
    ///
    /// # Errors
    /// Whatever `get` returns, or if there are no kernels for such a model.
    pub(crate) fn new(
        config: &ModelConfig,
        machine: Arc<dyn Machine>,
        mut get: impl FnMut(&str) -> LoadResult<Tensor>,
    ) -> LoadResult<Self> {
        for columns in [config.hidden_size, config.intermediate_size] {
            if !columns.is_multiple_of(VECTOR) {
                let reason = format!("{columns} columns are not a multiple of {VECTOR}");
                return Err(unsupported(candle_core::Error::msg(reason)));
            }
        }
        let embed_tokens = get("model.embed_tokens.weight")?;
        let element = Element::of(embed_tokens.dtype())?;
        let kernels =
            Arc::new(Kernels::new(machine, element, config.heads()).map_err(unsupported)?);
        let upload = |name: &str, parts: &[Tensor]| kernels.upload(parts).context(name);
        let embed_tokens = Arc::new(upload("model.embed_tokens.weight", &[embed_tokens])?);
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for layer in 0..config.num_hidden_layers {
            let mut below = |names: &[&str]| -> LoadResult<Matrix> {
                let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
                let parts = names.iter().map(|part| get(&name(part)));
                upload(&name(names[0]), &parts.collect::<LoadResult<Vec<_>>>()?)
            };
            blocks.push(GpuBlock {
                input_layernorm: below(&["input_layernorm"])?,
                qkv_proj: below(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])?,
                o_proj: below(&["self_attn.o_proj"])?,
                post_attention_layernorm: below(&["post_attention_layernorm"])?,
                gate_up_proj: below(&["mlp.gate_proj", "mlp.up_proj"])?,
                down_proj: below(&["mlp.down_proj"])?,
            });
        }
        let norm = upload("model.norm.weight", &[get("model.norm.weight")?])?;
        let head = match config.tie_word_embeddings {
            true => embed_tokens.clone(),
            false => Arc::new(upload("lm_head.weight", &[get("lm_head.weight")?])?),
        };
        let context = config.max_position_embeddings;
        let table = RopeTable::new(&config.rope_frequencies(), context, DType::F32, &Device::Cpu)?;
        let angles = Angles {
            cosines: kernels.upload(&[table.cosines().clone()])?,
            sines: kernels.upload(&[table.sines().clone()])?,
        };
        let epsilon = config.rms_norm_eps;
        Ok(GpuModel { kernels, embed_tokens, angles, blocks, norm, head, epsilon })
    }

    /// The type of keys and values.
    pub(crate) fn dtype(&self) -> DType {
        self.kernels.element().dtype()
    }

    /// Bytes that are free.
    pub(crate) fn free_bytes(&self) -> Result<usize> {
        self.kernels.free_bytes()
    }

    /// Bytes that a step of so many rows takes at its height: the stream, all that is computed in a block, and
    /// logits. Keys and values are the cache's.
    pub(crate) fn step_bytes(&self, rows: usize) -> usize {
        let element = self.kernels.element().bytes();
        let hidden = self.embed_tokens.columns;
        let logits = LOGIT_ROWS.min(rows) * (4 * self.head.rows + element * hidden);
        let within = self.blocks.iter().map(|block| {
            let attention = block.qkv_proj.rows + block.o_proj.columns;
            let feed_forward = block.gate_up_proj.rows + block.down_proj.columns;
            hidden + attention + feed_forward
        });
        rows * (4 * hidden + element * within.max().unwrap_or(0)) + logits
    }

    /// Room for `blocks` blocks of keys and values.
    pub(crate) fn cache(&self, blocks: usize) -> Result<GpuCache> {
        let layers = self.blocks.iter().map(|_| self.kernels.pages(blocks));
        Ok(GpuCache { layers: layers.collect::<Result<_>>()?, blocks })
    }

    /// Computes the rows of a step, and stores their keys and values. Where the next token of few is wanted,
    /// the last block takes the keys and values of all, and runs whole for these. `before` is the step before, and the
    /// rows whose ids are tokens of it.
    pub(crate) fn step(
        &self,
        cache: &mut GpuCache,
        rows: &StepRows<'_>,
        before: Option<(&Launched, &[Expected])>,
    ) -> Result<GpuStepped> {
        let limits = Limits {
            ids: self.embed_tokens.rows,
            positions: self.angles.cosines.rows,
            blocks: cache.blocks,
        };
        let kernels = &self.kernels;
        let step = kernels.begin(rows, limits)?;
        if let Some((before, expected)) = before.filter(|(_, expected)| !expected.is_empty()) {
            let Some(before) = before.gpu() else { bail!("the step before was not on this GPU") };
            kernels.fill_ids(&step, &before.tokens, expected)?;
        }
        let narrow = self.narrow(rows, limits)?;
        let mut x = kernels.embed(&self.embed_tokens, &step)?;
        let mut layers = self.blocks.iter().zip(&mut cache.layers).collect::<Vec<_>>();
        let last = narrow.and_then(|narrow| Some((layers.pop()?, narrow)));
        for layer in layers {
            self.run(layer, &mut x, &step)?;
        }
        Ok(match last {
            None => GpuStepped { x, step },
            Some(((block, pages), narrow)) => {
                self.qkv((block, pages), &x, &step)?;
                let mut x = kernels.take(&x, &narrow)?;
                self.run((block, pages), &mut x, &narrow)?;
                GpuStepped { x, step: narrow }
            }
        })
    }

    /// Launches [`GpuModel::step`], and what finds the most likely next tokens, the first of several.
    pub(crate) fn launch(
        &self,
        cache: &mut GpuCache,
        rows: &StepRows<'_>,
        before: Option<(&Launched, &[Expected])>,
    ) -> Result<GpuLaunched> {
        let stepped = self.step(cache, rows, before)?;
        self.most_likely(&stepped)
    }

    /// The rows of a step whose next token is wanted as a step of their own, whose ids name rows of the
    /// stream. None where they are so many that computing their queries, keys and values twice, and launching
    /// the kernels for it, saves nothing.
    fn narrow(&self, rows: &StepRows<'_>, limits: Limits) -> Result<Option<DeviceStep>> {
        let wanted = rows.wanted()?;
        let count = rows.ids.len();
        if 2 * wanted.rows.len() > count || wanted.rows.is_empty() {
            return Ok(None);
        }
        let positions = wanted.rows.iter().map(|&row| rows.positions[row as usize]);
        let step = StepRows {
            ids: &wanted.rows,
            positions: &positions.collect::<Vec<_>>(),
            runs: &wanted.runs,
            samples: &wanted.samples,
        };
        self.kernels.begin(&step, Limits { ids: count, ..limits }).map(Some)
    }

    /// Queries, keys and values of a block, turned; the cache has taken keys and values in.
    fn qkv(
        &self,
        (block, pages): (&GpuBlock, &mut Pages),
        x: &Matrix,
        step: &DeviceStep,
    ) -> Result<Matrix> {
        let kernels = &self.kernels;
        let normed = kernels.rms_norm(x, &block.input_layernorm, self.epsilon)?;
        let mut qkv = kernels.project(&normed, &block.qkv_proj, kernels.element())?;
        kernels.rope_store(&mut qkv, &self.angles, step, pages)?;
        Ok(qkv)
    }

    /// A whole block.
    fn run(
        &self,
        (block, pages): (&GpuBlock, &mut Pages),
        x: &mut Matrix,
        step: &DeviceStep,
    ) -> Result<()> {
        let kernels = &self.kernels;
        let qkv = self.qkv((block, pages), x, step)?;
        let attended = kernels.attend(&qkv, step, pages)?;
        kernels.project_onto(&attended, &block.o_proj, x)?;
        let normed = kernels.rms_norm(x, &block.post_attention_layernorm, self.epsilon)?;
        let gate_up = kernels.project(&normed, &block.gate_up_proj, kernels.element())?;
        let middle = kernels.swiglu(&gate_up)?;
        kernels.project_onto(&middle, &block.down_proj, x)
    }

    /// Logits of the rows whose next token is wanted, some at a time, each with the first of them.
    fn logits_of(
        &self,
        stepped: &GpuStepped,
        mut take: impl FnMut(usize, Matrix) -> Result<()>,
    ) -> Result<()> {
        let count = stepped.step.samples();
        for first in (0..count).step_by(LOGIT_ROWS) {
            let rows = (&stepped.step, first, LOGIT_ROWS.min(count - first));
            let normed =
                self.kernels.rms_norm_samples(&stepped.x, rows, &self.norm, self.epsilon)?;
            take(first, self.kernels.project(&normed, &self.head, Element::F32)?)?;
        }
        Ok(())
    }

    /// The logits of the rows whose next token is wanted, in host memory: `(samples, vocabulary)`, f32.
    pub(crate) fn logits(&self, stepped: &GpuStepped) -> Result<Tensor> {
        let mut parts = Vec::new();
        self.logits_of(stepped, |_, logits| {
            parts.push(self.kernels.download(&logits)?);
            Ok(())
        })?;
        Tensor::cat(&parts, 0)
    }

    /// The most likely next tokens, the first of several: all come to the host at once.
    pub(crate) fn most_likely(&self, stepped: &GpuStepped) -> Result<GpuLaunched> {
        let tokens = self.kernels.columns_of(stepped.step.samples())?;
        self.logits_of(stepped, |first, logits| self.kernels.argmax(&logits, &tokens, first))?;
        Ok(GpuLaunched { kernels: self.kernels.clone(), tokens, done: self.kernels.mark()? })
    }
}

/// A model that there are no kernels for is a matter of settings.
fn unsupported(reason: candle_core::Error) -> Error {
    Error::Setting(format!("this model cannot run on a GPU: {reason}"))
}

#[cfg(test)]
mod parity;
