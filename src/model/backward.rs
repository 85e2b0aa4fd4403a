//! The loss of packed items and its gradient, block by block.
//!
//! There is no recorded graph: each block's backward pass is written beside what its forward pass saved,
//! so that nothing is kept longer than needed and the order of every sum is known. With
//! [`Keep::Inputs`], a block's forward pass is run again instead of being saved.

use super::Llama;
pub use super::gradients::Gradients;
use super::layers::{Block, Masks, Trace, masked};
use crate::kernels::attention::{Attended, Heads, attention, attention_backward};
use crate::kernels::cross_entropy::{self, Objective, cross_entropy};
use crate::kernels::dropout::{Dropout, Site};
use crate::kernels::embedding::{embed, embed_backward};
use crate::kernels::rms_norm::{rms_norm, rms_norm_backward};
use crate::kernels::rope::{RopeTable, Turn, rope};
use crate::kernels::storage::product;
use crate::kernels::swiglu::{swiglu, swiglu_backward};
use candle_core::{DType, Device, Result, Tensor};
use std::ops::Range;

/// Items to learn from, without any padding.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Token ids, item after item.
    pub ids: Vec<u32>,
    /// Position of each token in its item.
    pub positions: Vec<u32>,
    /// Rows of each item.
    pub spans: Vec<Range<usize>>,
    /// Rows that must predict a token.
    pub rows: Vec<u32>,
    /// The token each of them must predict.
    pub targets: Vec<u32>,
    /// The number of the first row among all rows of a step.
    pub first_row: u64,
}

/// How to learn from a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Learning {
    /// What is to become small.
    pub objective: Objective,
    /// What to keep between the forward and the backward pass.
    pub keep: Keep,
    /// What is dropped, if anything.
    pub dropout: Option<Dropout>,
}

/// What to keep between the forward and the backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keep {
    /// All that the backward pass needs: fastest.
    Everything,
    /// The input of each block: one more forward pass, least memory.
    Inputs,
}

impl Llama {
    /// The loss of each target of `batch`, in nats.
    pub fn losses(&self, batch: &Batch) -> Result<Vec<f64>> {
        if batch.rows.is_empty() {
            return Ok(Vec::new());
        }
        let heads = self.config.heads();
        let x = self.forward(&batch.ids, &batch.positions, |_, [q, k, v]| {
            Ok(attention(q, k, v, &batch.spans, &heads)?.output)
        })?;
        let (_, hidden) = self.predicting_rows(&x, batch)?;
        let head = &self.plain()?.1.head;
        let loss = cross_entropy(&hidden, head, &batch.targets, cross_entropy::Gradients::Skip)?;
        Ok(loss.losses)
    }

    /// The loss of each target, with the gradient of the objective added to `gradients`.
    pub fn learn(
        &self,
        batch: &Batch,
        learning: Learning,
        gradients: &mut Gradients,
    ) -> Result<Vec<f64>> {
        let Learning { objective, keep, dropout } = learning;
        let (inputs, layers) = self.plain()?;
        if batch.rows.is_empty() {
            // Nothing is to be learned of it, and a GPU has no tensors of nothing.
            gradients.complete(self.config.parameters(), &inputs.embed_tokens)?;
            return Ok(Vec::new());
        }
        let pass = Pass { batch, heads: self.config.heads(), table: &inputs.table, dropout };
        let x = embed(&inputs.embed_tokens, &batch.ids)?;
        let mut x = masked(&x, pass.mask(Site::Embedding, &x)?.as_ref())?;
        let blocks = &layers.blocks;
        let mut saved = Vec::with_capacity(blocks.len());
        for (layer, block) in blocks.iter().enumerate() {
            let masks = pass.masks(layer, &x)?;
            let (y, trace) = pass.forward(block, x, masks.as_ref())?;
            saved.push(match keep {
                Keep::Everything => Saved::Trace(Box::new(trace)),
                Keep::Inputs => Saved::Input(trace.x),
            });
            x = y;
        }
        let (losses, mut gradient) = self.learn_head(&x, batch, objective, gradients)?;
        drop(x);
        for (layer, block) in blocks.iter().enumerate().rev() {
            let masks = pass.masks(layer, &gradient)?;
            let trace = match saved.pop().expect("one for each block") {
                Saved::Trace(trace) => *trace,
                Saved::Input(x) => pass.forward(block, x, masks.as_ref())?.1,
            };
            gradient = pass.backward((block, masks.as_ref()), &trace, gradient, gradients)?;
        }
        let gradient = masked(&gradient, pass.mask(Site::Embedding, &gradient)?.as_ref())?;
        let of_table = embed_backward(&gradient, &batch.ids, self.config.vocab_size)?;
        gradients.add("model.embed_tokens.weight", of_table)?;
        Ok(losses)
    }

    /// The rows that predict something, before and after the last normalisation.
    fn predicting_rows(&self, x: &Tensor, batch: &Batch) -> Result<(Tensor, Tensor)> {
        let index = Tensor::new(batch.rows.as_slice(), x.device())?;
        let rows = x.index_select(&index, 0)?;
        let hidden = rms_norm(&rows, &self.plain()?.1.norm, self.config.rms_norm_eps)?;
        Ok((rows, hidden))
    }

    /// Losses, and the gradient of the stream after the last block.
    fn learn_head(
        &self,
        x: &Tensor,
        batch: &Batch,
        objective: Objective,
        gradients: &mut Gradients,
    ) -> Result<(Vec<f64>, Tensor)> {
        let (rows, hidden) = self.predicting_rows(x, batch)?;
        let scaled = cross_entropy::Gradients::Of(objective);
        let loss = cross_entropy(&hidden, &self.plain()?.1.head, &batch.targets, scaled)?;
        let (of_hidden, of_head) = loss.gradients.expect("asked for");
        let head = match self.config.tie_word_embeddings {
            true => "model.embed_tokens.weight",
            false => "lm_head.weight",
        };
        gradients.add(head, of_head)?;
        let epsilon = self.config.rms_norm_eps;
        let (of_rows, of_norm) =
            rms_norm_backward(&rows, &self.plain()?.1.norm, epsilon, &of_hidden)?;
        gradients.add("model.norm.weight", of_norm)?;
        Ok((loss.losses, spread(&of_rows, &batch.rows, x.dim(0)?)?))
    }
}

/// Rows that stand at `places` among `count` rows, zeros elsewhere. No place has two of them, so that each row of the result
/// is a copy, which a GPU makes of all at once; adding rows up would go through them one by one there.
fn spread(rows: &Tensor, places: &[u32], count: usize) -> Result<Tensor> {
    let none = places.len() as u32;
    let mut from = vec![none; count];
    for (row, &place) in places.iter().enumerate() {
        from[place as usize] = row as u32;
    }
    let zero = Tensor::zeros((1, rows.dim(1)?), rows.dtype(), rows.device())?;
    let rows = Tensor::cat(&[rows, &zero], 0)?;
    rows.index_select(&Tensor::new(from, rows.device())?, 0)
}

enum Saved {
    Trace(Box<Trace<Attended>>),
    Input(Tensor),
}

/// One forward and backward pass over a batch.
struct Pass<'a> {
    batch: &'a Batch,
    heads: Heads,
    table: &'a RopeTable,
    dropout: Option<Dropout>,
}

impl Pass<'_> {
    fn forward(
        &self,
        block: &Block,
        x: Tensor,
        masks: Option<&Masks>,
    ) -> Result<(Tensor, Trace<Attended>)> {
        block.forward(x, self.table, &self.batch.positions, masks, |[q, k, v]| {
            let attended = attention(q, k, v, &self.batch.spans, &self.heads)?;
            Ok((attended.output.clone(), attended))
        })
    }

    /// What rows like `x` are multiplied by at a site.
    fn mask(&self, site: Site, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(dropout) = self.dropout else { return Ok(None) };
        let (rows, width) = x.dims2()?;
        let factors = dropout.mask(site, self.batch.first_row, width).factors(rows);
        let exact = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let mask = Tensor::from_vec(factors, (rows, width), &Device::Cpu)?;
        Ok(Some(mask.to_dtype(exact)?.to_device(x.device())?))
    }

    /// The masks of a layer whose stream is like `x`.
    fn masks(&self, layer: usize, x: &Tensor) -> Result<Option<Masks>> {
        let attention = self.mask(Site::Attention(layer), x)?;
        let feed_forward = self.mask(Site::FeedForward(layer), x)?;
        Ok(attention
            .zip(feed_forward)
            .map(|(attention, feed_forward)| Masks { attention, feed_forward }))
    }

    /// From the gradient of a block's output to that of its input.
    fn backward(
        &self,
        (block, masks): (&Block, Option<&Masks>),
        trace: &Trace<Attended>,
        gradient: Tensor,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let of_middle = feed_forward_backward((block, masks), trace, gradient, gradients)?;
        let output = &trace.attended.output;
        let of_output = masked(&of_middle, masks.map(|masks| &masks.attention))?;
        let of_output = Part { block, gradients, name: "self_attn.o_proj", weight: &block.o_proj }
            .backward(output, &of_output)?;
        let [q, k, v] = &trace.qkv;
        let [of_q, of_k, of_v] = attention_backward(
            [q, k, v],
            &trace.attended,
            &of_output,
            &self.batch.spans,
            &self.heads,
        )?;
        let of_q = rope(&of_q, self.table, &self.batch.positions, Turn::Back)?;
        let of_k = rope(&of_k, self.table, &self.batch.positions, Turn::Back)?;
        let normed = rms_norm(&trace.x, &block.input_layernorm, block.epsilon)?;
        let of_normed = Part { block, gradients, name: "self_attn.q_proj", weight: &block.q_proj }
            .backward(&normed, &of_q)?;
        let of_normed = (of_normed
            + Part { block, gradients, name: "self_attn.k_proj", weight: &block.k_proj }
                .backward(&normed, &of_k)?)?;
        let of_normed = (of_normed
            + Part { block, gradients, name: "self_attn.v_proj", weight: &block.v_proj }
                .backward(&normed, &of_v)?)?;
        let (of_x, of_weight) =
            rms_norm_backward(&trace.x, &block.input_layernorm, block.epsilon, &of_normed)?;
        gradients.add(&format!("{}.input_layernorm.weight", block.name), of_weight)?;
        of_middle + of_x
    }
}

/// From the gradient of a block's output to that of the stream between attention and feed-forward.
fn feed_forward_backward(
    (block, masks): (&Block, Option<&Masks>),
    trace: &Trace<Attended>,
    gradient: Tensor,
    gradients: &mut Gradients,
) -> Result<Tensor> {
    let gated = swiglu(&trace.gate, &trace.up)?;
    let of_output = masked(&gradient, masks.map(|masks| &masks.feed_forward))?;
    let of_gated = Part { block, gradients, name: "mlp.down_proj", weight: &block.down_proj }
        .backward(&gated, &of_output)?;
    let (of_gate, of_up) = swiglu_backward(&trace.gate, &trace.up, &of_gated)?;
    let normed = rms_norm(&trace.middle, &block.post_attention_layernorm, block.epsilon)?;
    let of_normed = Part { block, gradients, name: "mlp.gate_proj", weight: &block.gate_proj }
        .backward(&normed, &of_gate)?;
    let of_normed = (of_normed
        + Part { block, gradients, name: "mlp.up_proj", weight: &block.up_proj }
            .backward(&normed, &of_up)?)?;
    let (of_middle, of_weight) = rms_norm_backward(
        &trace.middle,
        &block.post_attention_layernorm,
        block.epsilon,
        &of_normed,
    )?;
    gradients.add(&format!("{}.post_attention_layernorm.weight", block.name), of_weight)?;
    gradient + of_middle
}

/// A projection of a block, about to be differentiated.
struct Part<'a> {
    block: &'a Block,
    gradients: &'a mut Gradients,
    name: &'a str,
    weight: &'a Tensor,
}

impl Part<'_> {
    /// Notes the gradient of the weight and returns that of the input `x`.
    fn backward(self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let of_weight = product(&gradient.t()?, x)?;
        self.gradients.add(&format!("{}.{}.weight", self.block.name, self.name), of_weight)?;
        product(gradient, self.weight)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Form;
    use super::super::config::ModelConfig;
    use super::super::gradients::sum_of_squares;
    use super::super::shape::Shape;
    use super::*;
    use crate::seed;

    fn config(tied: bool) -> ModelConfig {
        ModelConfig {
            vocab_size: 37,
            hidden_size: 16,
            intermediate_size: 24,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 6,
            max_position_embeddings: 32,
            sliding_window: Some(9),
            tie_word_embeddings: tied,
            ..Shape::named("2m").unwrap().config()
        }
    }

    fn random(name: &str, shape: &[usize]) -> Tensor {
        let mut stream = seed::stream(1, name, "test");
        let norm = name.contains("norm");
        let values: Vec<f64> = (0..shape.iter().product())
            .map(|_| 0.3 * stream.normal() + if norm { 1.0 } else { 0.0 })
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn model(config: &ModelConfig, changed: Option<(&str, usize, f64)>) -> Llama {
        Llama::build(config, Form::Plain, &Device::Cpu, |name, shape| {
            let tensor = random(name, shape);
            let Some((at, index, by)) = changed.filter(|(changed, ..)| *changed == name) else {
                return Ok(tensor);
            };
            assert_eq!(at, name);
            let mut values: Vec<f64> = tensor.flatten_all()?.to_vec1()?;
            values[index] += by;
            Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
        })
        .unwrap()
    }

    /// Two items of 14 and 20 tokens, every third token without a target.
    fn batch() -> Batch {
        let mut batch = Batch { spans: vec![0..14, 14..34], ..Batch::default() };
        for span in &batch.spans {
            for (position, row) in span.clone().enumerate() {
                batch.ids.push((row * row % 37) as u32);
                batch.positions.push(position as u32);
                if row % 3 != 0 {
                    batch.rows.push(row as u32);
                    batch.targets.push((row * 5 % 37) as u32);
                }
            }
        }
        batch
    }

    /// Learning with and without dropout.
    const DROPOUT: [Option<f64>; 2] = [None, Some(0.3)];

    fn learning(keep: Keep, dropout: Option<f64>) -> Learning {
        let dropout = dropout.map(|probability| Dropout::new(probability, 3, 8));
        Learning { objective: Objective::scaled(1.0), keep, dropout }
    }

    fn learn(config: &ModelConfig, learning: Learning) -> (f64, Gradients) {
        let mut gradients = Gradients::default();
        let losses = model(config, None).learn(&batch(), learning, &mut gradients).unwrap();
        (losses.iter().sum(), gradients)
    }

    #[test]
    fn gradients_equal_finite_differences() {
        for (tied, dropout) in [(true, None), (false, None), (true, Some(0.3)), (false, Some(0.1))]
        {
            let config = config(tied);
            let how = learning(Keep::Everything, dropout);
            let (_, gradients) = learn(&config, how);
            let mut stream = seed::stream(2, "entries", "test");
            for (name, shape) in config.parameters() {
                let gradient: Vec<f64> =
                    gradients.get(&name).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                for _ in 0..6 {
                    let index = stream.index(shape.iter().product());
                    let loss = |by| -> f64 {
                        let model = model(&config, Some((&name, index, by)));
                        let losses = match dropout {
                            None => model.losses(&batch()),
                            Some(_) => model.learn(&batch(), how, &mut Gradients::default()),
                        };
                        losses.unwrap().iter().sum()
                    };
                    let step = 1e-5;
                    let slope = (loss(step) - loss(-step)) / (2.0 * step);
                    let error = (slope - gradient[index]).abs() / (slope.abs() + 1e-3);
                    assert!(error < 1e-6, "{name}[{index}]: {} and {slope}", gradient[index]);
                }
            }
        }
    }

    #[test]
    fn every_parameter_has_a_gradient_that_is_not_zero() {
        let config = config(false);
        let (_, gradients) = learn(&config, learning(Keep::Everything, None));
        for (name, shape) in config.parameters() {
            let gradient = gradients.get(&name).expect(&name);
            assert_eq!(gradient.dims(), shape, "{name}");
            assert!(sum_of_squares(gradient).unwrap() > 0.0, "{name}");
        }
    }

    #[test]
    fn running_a_block_again_changes_no_bit() {
        let config = config(true);
        for dropout in DROPOUT {
            let (loss, gradients) = learn(&config, learning(Keep::Everything, dropout));
            let (again, of_inputs) = learn(&config, learning(Keep::Inputs, dropout));
            assert_eq!(loss.to_bits(), again.to_bits());
            for ((name, kept), (_, again)) in gradients.iter().zip(of_inputs.iter()) {
                let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                assert_eq!(bits(kept), bits(again), "{name}");
            }
        }
    }

    #[test]
    fn items_packed_together_are_learned_as_if_alone() {
        let (config, all) = (config(true), batch());
        let together = model(&config, None).losses(&all).unwrap();
        let mut alone = Vec::new();
        for span in &all.spans {
            let mine = |row: &u32| span.contains(&(*row as usize));
            let one = Batch {
                ids: all.ids[span.clone()].to_vec(),
                positions: all.positions[span.clone()].to_vec(),
                spans: std::iter::once(0..span.len()).collect(),
                rows: all.rows.iter().filter(|r| mine(r)).map(|r| r - span.start as u32).collect(),
                targets: all
                    .rows
                    .iter()
                    .zip(&all.targets)
                    .filter(|(row, _)| mine(row))
                    .map(|(_, target)| *target)
                    .collect(),
                ..Batch::default()
            };
            alone.extend(model(&config, None).losses(&one).unwrap());
        }
        let worst = together.iter().zip(&alone).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-12, "{worst}");
    }
}
