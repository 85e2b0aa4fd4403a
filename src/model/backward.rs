//! The loss of packed items and its gradient, block by block.
//!
//! There is no recorded graph: each block's backward pass is written beside what its forward pass saved,
//! so that nothing is kept longer than needed and the order of every sum is known. With
//! [`Keep::Inputs`], a block's forward pass is run again instead of being saved.

use super::Llama;
use super::layers::{Block, Trace};
use crate::kernels::attention::{Attended, Heads, attention, attention_backward};
use crate::kernels::cross_entropy::{self, Objective, cross_entropy};
use crate::kernels::embedding::{embed, embed_backward};
use crate::kernels::rms_norm::{rms_norm, rms_norm_backward};
use crate::kernels::rope::{RopeTable, Turn, rope};
use crate::kernels::storage::change;
use crate::kernels::swiglu::{swiglu, swiglu_backward};
use candle_core::{DType, Device, Result, Tensor, bail};
use rayon::prelude::*;
use std::collections::BTreeMap;
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
}

/// What to keep between the forward and the backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keep {
    /// All that the backward pass needs: fastest.
    Everything,
    /// The input of each block: one more forward pass, least memory.
    Inputs,
}

/// Gradients by parameter name, in f32 or wider.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    by_name: BTreeMap<String, Tensor>,
}

impl Gradients {
    /// Adds the gradient of one parameter.
    pub fn add(&mut self, name: &str, gradient: Tensor) -> Result<()> {
        let gradient = match gradient.dtype() {
            DType::F32 | DType::F64 => gradient,
            _ => gradient.to_dtype(DType::F32)?,
        };
        match self.by_name.get_mut(name) {
            Some(sum) => *sum = (&*sum + gradient)?,
            None => drop(self.by_name.insert(name.to_owned(), gradient)),
        }
        Ok(())
    }

    /// Zeros for every parameter, in f32 on the CPU.
    pub(crate) fn zeros(parameters: &[(String, Vec<usize>)]) -> Result<Self> {
        let zero = |(name, shape): &(String, Vec<usize>)| {
            Ok((name.clone(), Tensor::zeros(shape.as_slice(), DType::F32, &Device::Cpu)?))
        };
        Ok(Gradients { by_name: parameters.iter().map(zero).collect::<Result<_>>()? })
    }

    /// Sets all to zero, in their memory.
    pub(crate) fn clear(&mut self) -> Result<()> {
        let zero = |gradient: &Tensor| {
            change(gradient, |values| {
                values.par_chunks_mut(1 << 16).for_each(|values| values.fill(0.0));
            })
        };
        self.by_name.values().try_for_each(zero)
    }

    /// The gradient of one parameter, which is there.
    pub(crate) fn of(&self, name: &str) -> Result<&Tensor> {
        match self.by_name.get(name) {
            Some(gradient) => Ok(gradient),
            None => bail!("parameter {name:?} has no gradient"),
        }
    }

    /// The gradient of each of `parameters` as a flat tensor in its memory: zeros on `device` where there is none.
    pub(crate) fn flat(
        &mut self,
        parameters: &[(String, Vec<usize>)],
        device: &Device,
    ) -> Result<Vec<Tensor>> {
        let flat = |(name, shape): &(String, Vec<usize>)| {
            let whole = match self.by_name.get(name) {
                Some(gradient) => gradient.contiguous()?,
                None => Tensor::zeros(shape.as_slice(), DType::F32, device)?,
            };
            let flat = whole.flatten_all()?;
            self.by_name.insert(name.clone(), whole);
            Ok(flat)
        };
        parameters.iter().map(flat).collect()
    }

    /// The gradients in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.by_name.iter().map(|(name, gradient)| (name.as_str(), gradient))
    }

    /// The gradient of one parameter.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name)
    }

    /// The Euclidean norm of all gradients together, summed in the order of names.
    pub fn norm(&self) -> Result<f64> {
        let mut total = 0.0;
        for gradient in self.by_name.values() {
            total += sum_of_squares(gradient)?;
        }
        Ok(total.sqrt())
    }
}

impl Llama {
    /// The loss of each target of `batch`, in nats.
    pub fn losses(&self, batch: &Batch) -> Result<Vec<f64>> {
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
        objective: Objective,
        keep: Keep,
        gradients: &mut Gradients,
    ) -> Result<Vec<f64>> {
        let (inputs, layers) = self.plain()?;
        let pass = Pass { batch, heads: self.config.heads(), table: &inputs.table };
        let mut x = embed(&inputs.embed_tokens, &batch.ids)?;
        let blocks = &layers.blocks;
        let mut saved = Vec::with_capacity(blocks.len());
        for block in blocks {
            let (y, trace) = pass.forward(block, x)?;
            saved.push(match keep {
                Keep::Everything => Saved::Trace(Box::new(trace)),
                Keep::Inputs => Saved::Input(trace.x),
            });
            x = y;
        }
        let (losses, mut gradient) = self.learn_head(&x, batch, objective, gradients)?;
        drop(x);
        for block in blocks.iter().rev() {
            let trace = match saved.pop().expect("one for each block") {
                Saved::Trace(trace) => *trace,
                Saved::Input(x) => pass.forward(block, x)?.1,
            };
            gradient = pass.backward(block, &trace, gradient, gradients)?;
        }
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
        let index = Tensor::new(batch.rows.as_slice(), x.device())?;
        Ok((loss.losses, x.zeros_like()?.index_add(&index, &of_rows, 0)?))
    }
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
}

impl Pass<'_> {
    fn forward(&self, block: &Block, x: Tensor) -> Result<(Tensor, Trace<Attended>)> {
        block.forward(x, self.table, &self.batch.positions, |[q, k, v]| {
            let attended = attention(q, k, v, &self.batch.spans, &self.heads)?;
            Ok((attended.output.clone(), attended))
        })
    }

    /// From the gradient of a block's output to that of its input.
    fn backward(
        &self,
        block: &Block,
        trace: &Trace<Attended>,
        gradient: Tensor,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let of_middle = feed_forward_backward(block, trace, gradient, gradients)?;
        let output = &trace.attended.output;
        let of_output = Part { block, gradients, name: "self_attn.o_proj", weight: &block.o_proj }
            .backward(output, &of_middle)?;
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
    block: &Block,
    trace: &Trace<Attended>,
    gradient: Tensor,
    gradients: &mut Gradients,
) -> Result<Tensor> {
    let gated = swiglu(&trace.gate, &trace.up)?;
    let of_gated = Part { block, gradients, name: "mlp.down_proj", weight: &block.down_proj }
        .backward(&gated, &gradient)?;
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
        let of_weight = gradient.t()?.matmul(x)?;
        self.gradients.add(&format!("{}.{}.weight", self.block.name, self.name), of_weight)?;
        gradient.matmul(self.weight)
    }
}

/// In blocks of fixed size, in f64.
fn sum_of_squares(tensor: &Tensor) -> Result<f64> {
    if !tensor.device().is_cpu() {
        return tensor.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar();
    }
    let flat = tensor.flatten_all()?.contiguous()?;
    crate::kernels::sum_of_squares(&flat)
}

#[cfg(test)]
mod tests {
    use super::super::Form;
    use super::super::config::ModelConfig;
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

    fn learn(config: &ModelConfig, keep: Keep) -> (f64, Gradients) {
        let mut gradients = Gradients::default();
        let losses = model(config, None)
            .learn(&batch(), Objective::scaled(1.0), keep, &mut gradients)
            .unwrap();
        (losses.iter().sum(), gradients)
    }

    #[test]
    fn gradients_equal_finite_differences() {
        for tied in [true, false] {
            let config = config(tied);
            let (_, gradients) = learn(&config, Keep::Everything);
            let mut stream = seed::stream(2, "entries", "test");
            for (name, shape) in config.parameters() {
                let gradient: Vec<f64> =
                    gradients.get(&name).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                for _ in 0..6 {
                    let index = stream.index(shape.iter().product());
                    let loss = |by| -> f64 {
                        let model = model(&config, Some((&name, index, by)));
                        model.losses(&batch()).unwrap().iter().sum()
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
        let (_, gradients) = learn(&config, Keep::Everything);
        for (name, shape) in config.parameters() {
            let gradient = gradients.get(&name).expect(&name);
            assert_eq!(gradient.dims(), shape, "{name}");
            assert!(sum_of_squares(gradient).unwrap() > 0.0, "{name}");
        }
    }

    #[test]
    fn a_flat_gradient_is_the_gradient_itself_and_zero_where_there_is_none() {
        let row = Tensor::new(&[[1f32, 2.0, 3.0]], &Device::Cpu).unwrap();
        let mut gradients = Gradients::default();
        gradients.add("a", row.broadcast_as((2, 3)).unwrap()).unwrap(); // not contiguous
        let parameters = [("a".to_owned(), vec![2, 3]), ("b".to_owned(), vec![4])];
        let flat = gradients.flat(&parameters, &Device::Cpu).unwrap();
        flat[0].slice_set(&Tensor::new(&[9f32], &Device::Cpu).unwrap(), 0, 4).unwrap();
        let a: Vec<Vec<f32>> = gradients.of("a").unwrap().to_vec2().unwrap();
        assert_eq!(a, [[1.0, 2.0, 3.0], [1.0, 9.0, 3.0]]);
        assert_eq!(gradients.of("b").unwrap().to_vec1::<f32>().unwrap(), [0.0; 4]);
    }

    #[test]
    fn running_a_block_again_changes_no_bit() {
        let config = config(true);
        let (loss, gradients) = learn(&config, Keep::Everything);
        let (again, of_inputs) = learn(&config, Keep::Inputs);
        assert_eq!(loss.to_bits(), again.to_bits());
        for ((name, kept), (_, again)) in gradients.iter().zip(of_inputs.iter()) {
            let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            assert_eq!(bits(kept), bits(again), "{name}");
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
            };
            alone.extend(model(&config, None).losses(&one).unwrap());
        }
        let worst = together.iter().zip(&alone).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-12, "{worst}");
    }
}
