//! One block of the decoder, written once for training and generation.
//!
//! ```text
//! x ─┬─ norm ─ q,k,v ─ rope ─ attend ─ o ─(+)─┬─ norm ─ gate,up ─ swiglu ─ down ─(+)─ y
//!    └─────────────────────────────────────┘  └───────────────────────────────────┘
//! ```
//!
//! Rows are tokens; the rows of many sequences stand below each other with nothing between them. How
//! rows see each other is the caller's business: within packed items when training, through a cache when
//! generating.

use crate::kernels::packed::PackedWeight;
use crate::kernels::rms_norm::rms_norm;
use crate::kernels::rope::{RopeTable, Turn, rope};
use crate::kernels::swiglu::swiglu;
use candle_core::{Result, Tensor};

/// A projection without bias: `y = x W^T`.
#[derive(Clone, Debug)]
pub enum Linear {
    /// The weight as it is, `(out, in)`; the only form that can be trained.
    Plain(Tensor),
    /// Laid out for the CPU, so that a row's result does not depend on the other rows.
    Packed(PackedWeight),
}

impl Linear {
    /// `(rows, in)` to `(rows, out)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Linear::Plain(weight) => x.matmul(&weight.t()?),
            Linear::Packed(weight) => weight.multiply(x),
        }
    }
}

/// The parameters of one block, under the names of the checkpoint.
#[derive(Clone, Debug)]
pub struct Block {
    /// Name of the block in the checkpoint, such as `model.layers.0`.
    pub name: String,
    /// `(hidden)`
    pub input_layernorm: Tensor,
    /// `(query heads * width, hidden)`
    pub q_proj: Linear,
    /// `(key-value heads * width, hidden)`
    pub k_proj: Linear,
    /// `(key-value heads * width, hidden)`
    pub v_proj: Linear,
    /// `(hidden, query heads * width)`
    pub o_proj: Linear,
    /// `(hidden)`
    pub post_attention_layernorm: Tensor,
    /// `(middle, hidden)`
    pub gate_proj: Linear,
    /// `(middle, hidden)`
    pub up_proj: Linear,
    /// `(hidden, middle)`
    pub down_proj: Linear,
    /// Added to the mean square in normalisation.
    pub epsilon: f64,
}

/// What a block computed on the way, for its backward pass.
#[derive(Clone, Debug)]
pub struct Trace<A> {
    /// The input, `(rows, hidden)`.
    pub x: Tensor,
    /// Turned queries, turned keys, values.
    pub qkv: [Tensor; 3],
    /// What the attention returned.
    pub attended: A,
    /// The stream after attention, `(rows, hidden)`.
    pub middle: Tensor,
    /// The gate before its activation, `(rows, middle)`.
    pub gate: Tensor,
    /// What is gated, `(rows, middle)`.
    pub up: Tensor,
}

impl Block {
    /// Runs the block over rows at `positions`.
    ///
    /// `attend` takes turned queries and keys, and values; it returns rows of attention output, and
    /// whatever the caller wants to keep of it.
    pub fn forward<A>(
        &self,
        x: Tensor,
        table: &RopeTable,
        positions: &[u32],
        attend: impl FnOnce(&[Tensor; 3]) -> Result<(Tensor, A)>,
    ) -> Result<(Tensor, Trace<A>)> {
        let normed = rms_norm(&x, &self.input_layernorm, self.epsilon)?;
        let qkv = [
            rope(&self.q_proj.forward(&normed)?, table, positions, Turn::Forward)?,
            rope(&self.k_proj.forward(&normed)?, table, positions, Turn::Forward)?,
            self.v_proj.forward(&normed)?,
        ];
        let (output, attended) = attend(&qkv)?;
        let middle = (&x + self.o_proj.forward(&output)?)?;
        let normed = rms_norm(&middle, &self.post_attention_layernorm, self.epsilon)?;
        let (gate, up) = (self.gate_proj.forward(&normed)?, self.up_proj.forward(&normed)?);
        let y = (&middle + self.down_proj.forward(&swiglu(&gate, &up)?)?)?;
        Ok((y, Trace { x, qkv, attended, middle, gate, up }))
    }
}
