//! One block of the decoder in tensors, for training, and for generation wherever it is not packed.
//!
//! ```text
//! x ─┬─ norm ─ q,k,v ─ rope ─ attend ─ o ─(+)─┬─ norm ─ gate,up ─ swiglu ─ down ─(+)─ y
//!    └─────────────────────────────────────┘  └───────────────────────────────────┘
//! ```
//!
//! Rows are tokens; the rows of many sequences stand below each other with nothing between them. How
//! rows see each other is the caller's business: within packed items when training, through a cache when
//! generating.

use crate::kernels::rms_norm::rms_norm;
use crate::kernels::rope::{RopeTable, Turn, rope};
use crate::kernels::storage::product;
use crate::kernels::swiglu::swiglu;
use candle_core::{Result, Tensor};

/// The parameters of one block, under the names of the checkpoint.
#[derive(Clone, Debug)]
pub struct Block {
    /// Name of the block in the checkpoint, such as `model.layers.0`.
    pub name: String,
    /// `(hidden)`
    pub input_layernorm: Tensor,
    /// `(query heads * width, hidden)`
    pub q_proj: Tensor,
    /// `(key-value heads * width, hidden)`
    pub k_proj: Tensor,
    /// `(key-value heads * width, hidden)`
    pub v_proj: Tensor,
    /// `(hidden, query heads * width)`
    pub o_proj: Tensor,
    /// `(hidden)`
    pub post_attention_layernorm: Tensor,
    /// `(middle, hidden)`
    pub gate_proj: Tensor,
    /// `(middle, hidden)`
    pub up_proj: Tensor,
    /// `(hidden, middle)`
    pub down_proj: Tensor,
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

/// What the two parts of a block put out is multiplied by, `(rows, hidden)` in f32 or wider.
#[derive(Clone, Debug)]
pub struct Masks {
    /// For the output of the attention.
    pub attention: Tensor,
    /// For that of the feed-forward part.
    pub feed_forward: Tensor,
}

impl Block {
    /// Runs the block over rows at `positions`.
    ///
    /// `attend` takes turned queries and keys, and values; it returns rows of attention output, and
    /// whatever the caller wants to keep of it.
    ///
    /// With `masks`, what its parts put out is multiplied by them before it joins the stream.
    pub fn forward<A>(
        &self,
        x: Tensor,
        table: &RopeTable,
        positions: &[u32],
        masks: Option<&Masks>,
        attend: impl FnOnce(&[Tensor; 3]) -> Result<(Tensor, A)>,
    ) -> Result<(Tensor, Trace<A>)> {
        let normed = rms_norm(&x, &self.input_layernorm, self.epsilon)?;
        let qkv = [
            rope(&project(&normed, &self.q_proj)?, table, positions, Turn::Forward)?,
            rope(&project(&normed, &self.k_proj)?, table, positions, Turn::Forward)?,
            project(&normed, &self.v_proj)?,
        ];
        let (output, attended) = attend(&qkv)?;
        let output = project(&output, &self.o_proj)?;
        let middle = (&x + masked(&output, masks.map(|masks| &masks.attention))?)?;
        let normed = rms_norm(&middle, &self.post_attention_layernorm, self.epsilon)?;
        let (gate, up) = (project(&normed, &self.gate_proj)?, project(&normed, &self.up_proj)?);
        let output = project(&swiglu(&gate, &up)?, &self.down_proj)?;
        let y = (&middle + masked(&output, masks.map(|masks| &masks.feed_forward))?)?;
        Ok((y, Trace { x, qkv, attended, middle, gate, up }))
    }
}

/// `x` times a mask, if there is one; the product is rounded once.
pub(super) fn masked(x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    match mask {
        None => Ok(x.clone()),
        Some(mask) => (x.to_dtype(mask.dtype())? * mask)?.to_dtype(x.dtype()),
    }
}

/// A projection without bias: `y = x W^T`.
pub(crate) fn project(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    product(x, &weight.t()?)
}
