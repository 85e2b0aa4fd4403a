//! One block of the decoder on slices, forward and backward.

use super::Pass;
use crate::kernels::attention::tiled::{Packed, Saved};
use crate::kernels::dropout::{Mask, Site};
use crate::kernels::linear::{self, Branch, Layout, Scratch, Weight, sized};
use crate::kernels::matmul::Into;
use crate::kernels::packed::WeightType;
use crate::kernels::rms_norm::{normalise, normalise_backward};
use crate::kernels::rope::{Turn, turn_rows};
use crate::kernels::storage::{change, elements};
use crate::kernels::swiglu::{gated, gated_backward};
use crate::model::backward::Gradients;
use candle_core::{Result, Tensor};

/// The parameters of a block.
#[derive(Debug)]
pub(super) struct Block {
    /// Its number, from 0.
    layer: usize,
    /// Name of the block in the checkpoint, such as `model.layers.0`.
    name: String,
    input_layernorm: Tensor,
    q_proj: Weight,
    k_proj: Weight,
    v_proj: Weight,
    o_proj: Weight,
    post_attention_layernorm: Tensor,
    gate_proj: Weight,
    up_proj: Weight,
    down_proj: Weight,
    epsilon: f64,
}

/// What a block leaves for its backward pass besides its input. All are `(rows, …)`.
#[derive(Debug, Default)]
pub(super) struct Trace {
    /// Turned.
    q: Vec<f32>,
    /// Turned.
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    log_sums: Vec<f32>,
    /// The stream between attention and feed-forward.
    middle: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

/// Memory that blocks use one after the other.
#[derive(Debug, Default)]
pub(super) struct BlockMemory {
    /// Where traces are not kept: the one of the block that runs.
    pub(super) trace: Trace,
    pub(super) scratch: Scratch,
    normed: Vec<f32>,
    of_normed: Vec<f32>,
    gated: Vec<f32>,
    of_gated: Vec<f32>,
    of_attended: Vec<f32>,
    of_qkv: [Vec<f32>; 3],
    /// What dropout acts on: the output of a part of the block, or its gradient. Empty without dropout.
    dropped: Vec<f32>,
}

impl Block {
    /// The block `layer` of a model of f32 tensors by name; how products are computed, and when weights are laid out.
    pub(super) fn new<E: From<candle_core::Error>>(
        layer: usize,
        epsilon: f64,
        (kind, layout): (WeightType, Layout),
        parameter: &mut impl FnMut(&str) -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<Self, E> {
        let name = format!("model.layers.{layer}");
        let mut value = |part: &str| parameter(&format!("{name}.{part}.weight"));
        let input_layernorm = value("input_layernorm")?;
        let post_attention_layernorm = value("post_attention_layernorm")?;
        let mut weight = |part: &str| Ok::<_, E>(Weight::new(value(part)?, kind, layout)?);
        Ok(Block {
            input_layernorm,
            q_proj: weight("self_attn.q_proj")?,
            k_proj: weight("self_attn.k_proj")?,
            v_proj: weight("self_attn.v_proj")?,
            o_proj: weight("self_attn.o_proj")?,
            post_attention_layernorm,
            gate_proj: weight("mlp.gate_proj")?,
            up_proj: weight("mlp.up_proj")?,
            down_proj: weight("mlp.down_proj")?,
            epsilon,
            layer,
            name,
        })
    }

    /// Follows the parameters, which have moved.
    pub(super) fn follow(&mut self) -> Result<()> {
        let attention = [&mut self.q_proj, &mut self.k_proj, &mut self.v_proj, &mut self.o_proj];
        let feed_forward = [&mut self.gate_proj, &mut self.up_proj, &mut self.down_proj];
        attention.into_iter().chain(feed_forward).try_for_each(Weight::follow)
    }

    /// Adds what the block makes of its input `x` to `stream`, which holds `x`.
    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        x: &[f32],
        trace: &mut Trace,
        stream: &mut [f32],
        memory: &mut BlockMemory,
    ) -> Result<()> {
        let BlockMemory { scratch, normed, gated: open, dropped, .. } = memory;
        let Trace { q, k, v, attended, log_sums, middle, gate, up } = trace;
        let rows = pass.batch.ids.len();
        let normed = sized(normed, x.len());
        normalise(x, &elements(&self.input_layernorm)?, self.epsilon, normed);
        let [q, k, v] = [(q, &self.q_proj), (k, &self.k_proj), (v, &self.v_proj)]
            .map(|(out, weight)| sized(out, rows * weight.outputs()));
        let parts = [(&self.q_proj, &mut *q), (&self.k_proj, &mut *k), (&self.v_proj, &mut *v)];
        linear::forward(parts, normed, scratch)?;
        turn_rows([q, k], pass.table, &pass.batch.positions, Turn::Forward)?;
        let attended = sized(attended, q.len());
        pass.attention([q, k, v]).forward(attended, sized(log_sums, rows * pass.heads.query));
        let mask = pass.mask(Site::Attention(self.layer));
        join((&self.o_proj, mask), attended, stream, (scratch, dropped))?;
        let middle = sized(middle, x.len());
        middle.copy_from_slice(stream);

        normalise(middle, &elements(&self.post_attention_layernorm)?, self.epsilon, normed);
        let [gate, up] = [(gate, &self.gate_proj), (up, &self.up_proj)]
            .map(|(out, weight)| sized(out, rows * weight.outputs()));
        linear::forward(
            [(&self.gate_proj, &mut *gate), (&self.up_proj, &mut *up)],
            normed,
            scratch,
        )?;
        let open = sized(open, gate.len());
        gated(gate, up, open);
        let mask = pass.mask(Site::FeedForward(self.layer));
        join((&self.down_proj, mask), open, stream, (scratch, dropped))
    }

    /// From the gradient of the block's output to that of its input `x`, in place.
    pub(super) fn backward(
        &self,
        pass: &Pass<'_>,
        (x, trace): (&[f32], &Trace),
        of_stream: &mut [f32],
        memory: &mut BlockMemory,
        gradients: &Gradients,
    ) -> Result<()> {
        self.feed_forward_backward(pass, trace, of_stream, memory, gradients)?;
        let BlockMemory { scratch, normed, of_normed, of_attended, of_qkv, dropped, .. } = memory;
        let Trace { q, k, v, attended, log_sums, .. } = trace;
        let of_attended = sized(of_attended, attended.len());
        let of_output = left(pass.mask(Site::Attention(self.layer)), of_stream, dropped);
        let sums = (gradients, pass.sums);
        let branch = self.branch(("self_attn.o_proj", &self.o_proj), of_output, sums)?;
        linear::backward(&[branch], attended, of_attended, scratch)?;
        let [of_q, of_k, of_v] = of_qkv;
        let of_qkv = [(of_q, q), (of_k, k), (of_v, v)].map(|(of, own)| sized(of, own.len()));
        let saved = Saved { output: attended, log_sums, of_output: of_attended };
        let [of_q, of_k, of_v] = of_qkv;
        pass.attention([q, k, v]).backward(saved, [&mut *of_q, &mut *of_k, of_v]);
        turn_rows([of_q, of_k], pass.table, &pass.batch.positions, Turn::Back)?;

        let (normed, of_normed) = (sized(normed, x.len()), sized(of_normed, x.len()));
        let norm = elements(&self.input_layernorm)?;
        normalise(x, &norm, self.epsilon, normed);
        let branches = [
            self.branch(("self_attn.q_proj", &self.q_proj), of_q, sums)?,
            self.branch(("self_attn.k_proj", &self.k_proj), of_k, sums)?,
            self.branch(("self_attn.v_proj", &self.v_proj), of_v, sums)?,
        ];
        linear::backward(&branches, normed, of_normed, scratch)?;
        change(self.gradient("input_layernorm", gradients)?, |of_norm| {
            pass.start(of_norm);
            normalise_backward(x, &norm, self.epsilon, of_normed, [of_stream, of_norm]);
        })
    }

    /// From the gradient of the block's output to that of the stream between attention and feed-forward.
    fn feed_forward_backward(
        &self,
        pass: &Pass<'_>,
        trace: &Trace,
        of_stream: &mut [f32],
        memory: &mut BlockMemory,
        gradients: &Gradients,
    ) -> Result<()> {
        let BlockMemory { scratch, normed, of_normed, gated: open, of_gated, dropped, .. } = memory;
        let Trace { middle, gate, up, .. } = trace;
        let (open, of_up) = (sized(open, gate.len()), sized(of_gated, gate.len()));
        gated(gate, up, open);
        let of_output = left(pass.mask(Site::FeedForward(self.layer)), of_stream, dropped);
        let sums = (gradients, pass.sums);
        let branch = self.branch(("mlp.down_proj", &self.down_proj), of_output, sums)?;
        linear::backward(&[branch], open, of_up, scratch)?;
        let of_gate = open;
        gated_backward(gate, up, of_gate, of_up);

        let (normed, of_normed) = (sized(normed, middle.len()), sized(of_normed, middle.len()));
        let norm = elements(&self.post_attention_layernorm)?;
        normalise(middle, &norm, self.epsilon, normed);
        let branches = [
            self.branch(("mlp.gate_proj", &self.gate_proj), of_gate, sums)?,
            self.branch(("mlp.up_proj", &self.up_proj), of_up, sums)?,
        ];
        linear::backward(&branches, normed, of_normed, scratch)?;
        change(self.gradient("post_attention_layernorm", gradients)?, |of_norm| {
            pass.start(of_norm);
            normalise_backward(middle, &norm, self.epsilon, of_normed, [of_stream, of_norm]);
        })
    }

    fn gradient<'a>(&self, part: &str, gradients: &'a Gradients) -> Result<&'a Tensor> {
        gradients.of(&format!("{}.{part}.weight", self.name))
    }

    fn branch<'a>(
        &self,
        (part, weight): (&str, &'a Weight),
        of_output: &'a [f32],
        (gradients, into): (&'a Gradients, Into),
    ) -> Result<Branch<'a>> {
        Ok(Branch { weight, of_output, of_weight: self.gradient(part, gradients)?, into })
    }
}

/// Adds what a part of a block puts out to the stream, or what dropout leaves of it.
fn join(
    (weight, mask): (&Weight, Option<Mask>),
    x: &[f32],
    stream: &mut [f32],
    (scratch, output): (&mut Scratch, &mut Vec<f32>),
) -> Result<()> {
    let Some(mask) = mask else { return linear::forward_add(weight, x, stream, scratch) };
    let output = sized(output, stream.len());
    linear::forward([(weight, &mut *output)], x, scratch)?;
    mask.add(output, stream);
    Ok(())
}

/// The gradient of what a part of a block put out: that of the stream, or what dropout leaves of it.
fn left<'a>(mask: Option<Mask>, of_stream: &'a [f32], of_output: &'a mut Vec<f32>) -> &'a [f32] {
    let Some(mask) = mask else { return of_stream };
    let of_output = sized(of_output, of_stream.len());
    of_output.copy_from_slice(of_stream);
    mask.apply(of_output);
    of_output
}

impl Pass<'_> {
    fn attention<'a>(&'a self, [q, k, v]: [&'a [f32]; 3]) -> Packed<'a> {
        let Pass { batch, heads, kind, .. } = *self;
        Packed { kind, heads, spans: &batch.spans, q, k, v }
    }
}
