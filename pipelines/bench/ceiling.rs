//! What a device can do at best, and which share of it a model makes use of.
//!
//! ```text
//! prompts   operations / matrix rate
//!           the last block: all of it for the last token, keys and values alone for the others
//! a step    the longer of: operations / matrix rate, bytes / bandwidth
//!           bytes = weights once, keys and values of each sequence once
//! ```

use crate::shell::plan::{best_seconds, cpu_matrix_rate, matrix_rate};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use headwater::kernels::packed::WeightType;
use headwater::kernels::peak;
use headwater::model::config::ModelConfig;
use headwater::model::precision::Precision;

/// The ceilings of a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ceiling {
    /// Floating-point operations (or those of 8 bits) a second.
    pub(super) operations_per_s: f64,
    /// Bytes a second that are read from memory.
    pub(super) bytes_per_s: f64,
}

impl Ceiling {
    /// Measures a device when all is done: what is read for it would else be the most memory that a small model ever has.
    /// It is known to have done so many operations a second `before`, and the better counts: either may fall into a bad
    /// moment of a shared machine.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn measure(device: &Device, precision: Precision, before: f64) -> Result<Self> {
        let operations_per_s = operations_per_second(device, precision)?.max(before);
        let bytes_per_s = match device.is_cpu() {
            true => peak::bytes_per_second(),
            false => copies(device)?,
        };
        Ok(Ceiling { operations_per_s, bytes_per_s })
    }
}

/// Operations a second of a device: in the registers of a CPU, in large products of any other.
///
/// # Errors
/// If the device fails.
pub(super) fn operations_per_second(device: &Device, precision: Precision) -> Result<f64> {
    match device.is_cpu() {
        true => Ok(peak::operations_per_second(precision.packed(), peak::TURNS)),
        false => products(device, precision.tensors()?),
    }
}

/// Bytes that a GPU reads and writes in a second where it copies a tensor far larger than its caches, several times for each
/// wait: to begin takes as long as to copy a small one.
fn copies(device: &Device) -> Result<f64> {
    const TIMES: usize = 4;
    let tensor = Tensor::zeros(COPIED, DType::U8, device)?;
    let copy = || (1..TIMES).try_fold(tensor.copy()?, |_, _| tensor.copy());
    Ok((2 * TIMES * COPIED) as f64 / best_seconds(8, device, copy)?)
}

/// Side of a matrix that keeps a GPU busy.
const SIDE: usize = 8192;

/// Bytes of a tensor that is copied.
const COPIED: usize = 1 << 30;

/// Side of one that is large for a CPU.
const CPU_SIDE: usize = 2048;

/// Operations a second in large products of a GPU.
///
/// # Errors
/// If the device fails.
pub(super) fn products(device: &Device, dtype: DType) -> Result<f64> {
    matrix_rate(device, dtype, SIDE)
}

/// Operations a second in large products of a CPU in `kind`. In f32 that is the faster of whole numbers and
/// three parts.
///
/// # Errors
/// If there is not enough memory.
pub(super) fn cpu_products(kind: WeightType) -> Result<f64> {
    let own = cpu_matrix_rate(kind, CPU_SIDE)?;
    match kind {
        WeightType::Bf16x3 => Ok(own.max(cpu_matrix_rate(WeightType::F32, CPU_SIDE)?)),
        _ => Ok(own),
    }
}

/// What a model costs: operations and bytes of one token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    /// Operations of the products of all blocks.
    blocks: f64,
    /// Operations of the head.
    head: f64,
    /// Of `blocks`, what the last block computes only of a row whose next token is wanted: all but keys and values.
    last: f64,
    /// Operations of attention for each visible position.
    position: f64,
    /// Of `position`, those of the last block.
    last_position: f64,
    /// Bytes of all weights that a step reads.
    weights: f64,
    /// Bytes of the keys and values of one position.
    cached: f64,
}

impl Cost {
    /// The cost of a model whose weights and cache have elements of so many bytes.
    pub(super) fn new(config: &ModelConfig, weight_bytes: f64, cache_bytes: f64) -> Self {
        let hidden = config.hidden_size as f64;
        let heads = (config.num_attention_heads * config.head_dim) as f64;
        let narrow = (config.num_key_value_heads * config.head_dim) as f64;
        let layers = config.num_hidden_layers as f64;
        let last = hidden * (2.0 * heads + 3.0 * config.intermediate_size as f64);
        let products = layers * (last + hidden * 2.0 * narrow);
        let head = hidden * config.vocab_size as f64;
        Cost {
            blocks: 2.0 * products,
            head: 2.0 * head,
            last: 2.0 * last,
            position: 4.0 * layers * heads,
            last_position: 4.0 * heads,
            weights: (products + head) * weight_bytes,
            cached: 2.0 * layers * narrow * cache_bytes,
        }
    }

    /// Operations of a prompt of `length` tokens of which the last is sampled.
    pub(super) fn prompt(&self, length: usize) -> f64 {
        let length = length as f64;
        let (others, others_positions) = (length - 1.0, length * (length - 1.0) / 2.0);
        let all = length * self.blocks + self.head + self.position * length * (length + 1.0) / 2.0;
        all - others * self.last - others_positions * self.last_position
    }

    /// Seconds that a step of `batch` sequences of `length` positions takes at best.
    pub(super) fn step(&self, batch: f64, length: f64, ceiling: &Ceiling) -> f64 {
        let operations = batch * (self.blocks + self.head + self.position * length);
        let bytes = self.weights + batch * length * self.cached;
        (operations / ceiling.operations_per_s).max(bytes / ceiling.bytes_per_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use headwater::model::shape::Shape;

    #[test]
    fn the_cost_of_a_token_is_that_of_its_products() {
        let config = Shape::named("110m").expect("a shape").config();
        let cost = Cost::new(&config, 2.0, 2.0);
        let looked_up = (config.vocab_size * config.hidden_size) as u64;
        let norms = ((2 * config.num_hidden_layers + 1) * config.hidden_size) as u64;
        let products = (config.parameter_count() - looked_up - norms) as f64;
        assert_eq!(cost.blocks + cost.head, 2.0 * products);
        let rates = Ceiling { operations_per_s: 1.0, bytes_per_s: f64::INFINITY };
        assert_eq!(cost.prompt(1), cost.step(1.0, 1.0, &rates));
        // Of a row before the last one, the last block computes keys and values.
        let narrow = (config.num_key_value_heads * config.head_dim * config.hidden_size) as f64;
        let layers = config.num_hidden_layers as f64;
        let of_first = cost.blocks * (layers - 1.0) / layers + 4.0 * narrow;
        let seen = cost.position * (layers - 1.0) / layers;
        assert_eq!(cost.prompt(2), cost.step(1.0, 2.0, &rates) + of_first + seen);
        let slow = Ceiling { operations_per_s: f64::INFINITY, bytes_per_s: 1.0 };
        assert_eq!(cost.step(1.0, 0.0, &slow), 2.0 * products);
    }
}
