//! The keys and values of sequences that are being generated, wherever the model is.

use super::config::ModelConfig;
use super::gpu::GpuCache;
use crate::kernels::cached::{BLOCK, LayerCache, Run};
use candle_core::{DType, Result, Tensor, bail};

/// Keys and values of all layers, in blocks that sequences own. [`super::Llama::cache`] makes it.
#[derive(Debug)]
pub struct Cache {
    pub(super) store: Store,
}

#[derive(Debug)]
pub(super) enum Store {
    Host(Vec<LayerCache>),
    Gpu(GpuCache),
}

impl Store {
    /// Room for `blocks` blocks of [`BLOCK`] positions in host memory.
    pub(super) fn host(config: &ModelConfig, blocks: usize, dtype: DType) -> Self {
        let layer = |_| LayerCache::new(blocks, config.heads(), dtype);
        Store::Host((0..config.num_hidden_layers).map(layer).collect())
    }
}

impl Cache {
    /// Bytes of one block in all layers.
    pub fn block_bytes(config: &ModelConfig, dtype: DType) -> usize {
        let heads = config.heads();
        2 * config.num_hidden_layers * heads.key_value * heads.width * BLOCK * dtype.size_in_bytes()
    }

    /// Stores the rows of a step in one layer of a cache in host memory, and attends to all that their sequences
    /// hold.
    ///
    /// # Errors
    /// If `qkv` are not rows in host memory, or the cache is not.
    pub fn step(&mut self, layer: usize, qkv: &[Tensor; 3], runs: &[Run]) -> Result<Tensor> {
        self.layers()?[layer].step(qkv, runs)
    }

    /// All layers of a cache in host memory.
    pub(super) fn layers(&mut self) -> Result<&mut [LayerCache]> {
        match &mut self.store {
            Store::Host(layers) => Ok(layers),
            Store::Gpu(_) => bail!("a cache on a GPU takes whole steps"),
        }
    }
}
