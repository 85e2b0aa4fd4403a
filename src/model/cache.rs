//! The keys and values of sequences that are being generated, on whatever device the model is.

use super::config::ModelConfig;
use crate::kernels::attention::Heads;
use crate::kernels::cached::{BLOCK, LayerCache, Run};
use candle_core::{D, DType, Device, Result, Tensor};

/// Keys and values of all layers, in blocks that sequences own.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<Layer>,
    heads: Heads,
}

#[derive(Debug)]
enum Layer {
    /// On the CPU: laid out for the kernel.
    Kernel(LayerCache),
    /// Elsewhere: one row a position, attended to by plain tensor operations.
    Rows { keys: Tensor, values: Tensor },
}

impl Cache {
    /// Room for `blocks` blocks of [`BLOCK`] positions.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn new(config: &ModelConfig, blocks: usize, dtype: DType, device: &Device) -> Result<Self> {
        let heads = config.heads();
        let rows = (blocks * BLOCK, heads.key_value * heads.width);
        let layer = |_| {
            Ok(match device.is_cpu() {
                true => Layer::Kernel(LayerCache::new(blocks, heads, dtype)),
                false => Layer::Rows {
                    keys: Tensor::zeros(rows, dtype, device)?,
                    values: Tensor::zeros(rows, dtype, device)?,
                },
            })
        };
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        Ok(Cache { layers, heads })
    }

    /// Bytes of one block in all layers.
    pub fn block_bytes(config: &ModelConfig, dtype: DType) -> usize {
        let heads = config.heads();
        2 * config.num_hidden_layers * heads.key_value * heads.width * BLOCK * dtype.size_in_bytes()
    }

    /// Stores the rows of a step in one layer and attends to all that their sequences hold.
    pub fn step(&mut self, layer: usize, qkv: &[Tensor; 3], runs: &[Run]) -> Result<Tensor> {
        match &mut self.layers[layer] {
            Layer::Kernel(cache) => cache.step(qkv, runs),
            Layer::Rows { keys, values } => rows_step(keys, values, qkv, runs, &self.heads),
        }
    }
}

fn rows_step(
    keys: &Tensor,
    values: &Tensor,
    [q, k, v]: &[Tensor; 3],
    runs: &[Run],
    heads: &Heads,
) -> Result<Tensor> {
    let device = q.device();
    let row = |run: &Run, position: usize| {
        run.table[position / BLOCK] * BLOCK as u32 + (position % BLOCK) as u32
    };
    let new: Vec<u32> = runs
        .iter()
        .flat_map(|run| (run.position..run.position + run.rows).map(|p| row(run, p)))
        .collect();
    let (count, width) = k.dims2()?;
    let index = Tensor::from_vec(new, (count, 1), device)?.broadcast_as((count, width))?;
    let index = index.contiguous()?;
    keys.scatter_set(&index, &k.contiguous()?, 0)?;
    values.scatter_set(&index, &v.contiguous()?, 0)?;
    let mut outputs = Vec::with_capacity(runs.len());
    for run in runs {
        let end = run.position + run.rows;
        let rows: Vec<u32> = (0..end).map(|position| row(run, position)).collect();
        let rows = Tensor::new(rows, device)?;
        let (k, v) = (keys.index_select(&rows, 0)?, values.index_select(&rows, 0)?);
        outputs.push(attend(&q.narrow(0, run.first_row, run.rows)?, &k, &v, run, heads)?);
    }
    Tensor::cat(&outputs, 0)
}

/// The rows of one sequence against all its positions.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, run: &Run, heads: &Heads) -> Result<Tensor> {
    let Heads { query, key_value, width, .. } = *heads;
    let (rows, all) = (run.rows, k.dim(0)?);
    // (key-value heads, group * rows, width): query heads of a group share their keys
    let q = q.reshape((rows, key_value, heads.group(), width))?.permute((1, 2, 0, 3))?;
    let q = q.contiguous()?.reshape((key_value, heads.group() * rows, width))?;
    let by_head = |t: &Tensor| t.reshape((all, key_value, width))?.transpose(0, 1)?.contiguous();
    let (k, v) = (by_head(k)?, by_head(v)?);
    let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? * heads.scale())?;
    let hidden: Vec<f32> = (0..heads.group() * rows)
        .flat_map(|index| {
            let position = run.position + index % rows;
            let visible = heads.first_visible(position)..=position;
            (0..all).map(move |key| if visible.contains(&key) { 0.0 } else { f32::NEG_INFINITY })
        })
        .collect();
    let hidden = Tensor::from_vec(hidden, (1, heads.group() * rows, all), q.device())?;
    let scores = scores.to_dtype(DType::F32)?.broadcast_add(&hidden)?;
    let exponentials = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?;
    let out = weights.to_dtype(v.dtype())?.matmul(&v)?;
    let out = out.reshape((key_value, heads.group(), rows, width))?.permute((2, 0, 1, 3))?;
    out.contiguous()?.reshape((rows, query * width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shape::Shape;
    use crate::seed;

    #[test]
    fn plain_operations_equal_the_kernel() {
        let config = ModelConfig {
            num_hidden_layers: 1,
            sliding_window: Some(80),
            ..Shape::named("2m").unwrap().config()
        };
        let heads = config.heads();
        let mut stream = seed::stream(1, "cache", "test");
        let mut random = |rows: usize, width: usize| {
            let values: Vec<f32> = (0..rows * width).map(|_| stream.normal() as f32).collect();
            Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
        };
        let mut cache = Cache::new(&config, 4, DType::F32, &Device::Cpu).unwrap();
        let rows = (4 * BLOCK, heads.key_value * heads.width);
        let zeros = || Tensor::zeros(rows, DType::F32, &Device::Cpu).unwrap();
        let (keys, values) = (zeros(), zeros());
        for (position, rows) in [(0, 100), (100, 1), (101, 20)] {
            let runs = [
                Run { first_row: 0, rows, position, table: vec![3, 1] },
                Run { first_row: rows, rows, position, table: vec![0, 2] },
            ];
            let (wide, narrow) = (heads.query * heads.width, heads.key_value * heads.width);
            let qkv = [wide, narrow, narrow].map(|width| random(2 * rows, width));
            let ours = cache.step(0, &qkv, &runs).unwrap();
            let twin = rows_step(&keys, &values, &qkv, &runs, &heads).unwrap();
            let worst = (ours - twin).unwrap().abs().unwrap().max_all().unwrap();
            assert!(worst.to_scalar::<f32>().unwrap() < 1e-5);
        }
    }
}
