//! The blocks of a model that is packed for generation on a CPU.
//!
//! What [`super::layers::Block`] does in tensors is done here in place: one stream that every block adds
//! to, one product for queries, keys and values, one for gate and up with the activation in it, and memory
//! that is used again for every block. The test below holds the two against each other.

use crate::kernels::attention::Heads;
use crate::kernels::cached::Cut;
use crate::kernels::first_of_largest;
use crate::kernels::packed::{PackedWeight, WeightType};
use crate::kernels::product;
use crate::kernels::rms_norm::normalise_rows;
use crate::kernels::rope::{RopeTable, Turn, turn_rows};
use crate::kernels::rows::Rows;
use crate::kernels::share::each;
use crate::threads;
use candle_core::Result;
use std::cell::Cell;

/// The parameters of one block, under the names of the checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct PackedBlock {
    pub(crate) input_layernorm: Vec<f32>,
    pub(crate) q_proj: PackedWeight,
    pub(crate) k_proj: PackedWeight,
    pub(crate) v_proj: PackedWeight,
    pub(crate) o_proj: PackedWeight,
    pub(crate) post_attention_layernorm: Vec<f32>,
    pub(crate) gate_proj: PackedWeight,
    pub(crate) up_proj: PackedWeight,
    pub(crate) down_proj: PackedWeight,
    pub(crate) epsilon: f64,
}

/// All blocks, the last normalisation and the head.
#[derive(Clone, Debug)]
pub(crate) struct PackedLayers {
    pub(crate) kind: WeightType,
    pub(crate) blocks: Vec<PackedBlock>,
    pub(crate) norm: Vec<f32>,
    pub(crate) head: PackedWeight,
    pub(crate) epsilon: f64,
}

/// Memory of a step. It is kept by the thread that computes steps, for its next one.
#[derive(Debug, Default)]
struct Scratch {
    rows: Rows,
    /// Queries, keys, values.
    qkv: [Vec<f32>; 3],
    attended: Vec<f32>,
    middle: Vec<f32>,
    logits: Vec<f32>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Runs `work` on a thread of the pool, where the pieces of a step are cheapest to share.
fn with_scratch<R: Send>(work: impl FnOnce(&mut Scratch) -> R + Send) -> R {
    let mut scratch = SCRATCH.take();
    let result = threads::run(|| work(&mut scratch));
    SCRATCH.set(scratch);
    result
}

impl PackedLayers {
    /// How a step is cut for so many threads.
    ///
    /// # Panics
    /// If there are no blocks.
    pub(crate) fn cut(&self, threads: usize, heads: &Heads) -> Cut {
        let block = &self.blocks[0];
        let weights = [&block.q_proj, &block.k_proj, &block.v_proj, &block.o_proj];
        let weights =
            weights.into_iter().chain([&block.gate_proj, &block.up_proj, &block.down_proj]);
        let products: usize = weights.map(|weight| weight.inputs() * weight.outputs()).sum();
        Cut {
            parts: threads,
            rows_min: product::rows_of_part(self.kind),
            // Two multiply-adds for each element of a query, at about half the rate of products.
            positions_of_row: products / (4 * heads.query * heads.width),
            positions_max: heads.window.unwrap_or(usize::MAX),
        }
    }

    /// Runs all blocks over `x (rows, hidden)`, in place. Where only some rows are `wanted` (each once, in
    /// their order), the last block computes no more of the others than their keys and values, and `x` has
    /// these rows alone behind it.
    ///
    /// `attend(layer, [queries, keys, values], out)` takes rows of keys and values in, and writes rows of
    /// attention output, one for each query.
    pub(crate) fn forward(
        &self,
        x: &mut Vec<f32>,
        table: &RopeTable,
        positions: &[u32],
        wanted: Option<&[u32]>,
        mut attend: impl FnMut(usize, [&[f32]; 3], &mut [f32]) -> Result<()> + Send,
    ) -> Result<()> {
        let wanted = wanted.filter(|wanted| wanted.len() < positions.len());
        with_scratch(|scratch| {
            for (layer, block) in self.blocks.iter().enumerate() {
                let attend = |qkv: [&[f32]; 3], out: &mut [f32]| attend(layer, qkv, out);
                match wanted.filter(|_| layer + 1 == self.blocks.len()) {
                    None => block.forward(x, scratch, table, positions, attend)?,
                    Some(rows) => block.narrow(x, scratch, table, (positions, rows), attend)?,
                }
            }
            Ok(())
        })
    }

    /// The logits of rows that [`PackedLayers::forward`] left.
    pub(crate) fn logits(&self, x: &[f32]) -> Vec<f32> {
        with_scratch(|Scratch { rows, .. }| {
            normalise_rows(x, &self.norm, self.epsilon, self.kind, rows);
            let mut out = vec![0.0; rows.count() * self.head.outputs()];
            product::set([(&self.head, &mut out)], rows);
            out
        })
    }

    /// The most likely next token after each of some rows, the first of several.
    pub(crate) fn most_likely(&self, x: &[f32]) -> Vec<u32> {
        if x.is_empty() {
            return Vec::new();
        }
        with_scratch(|Scratch { rows, logits, .. }| {
            normalise_rows(x, &self.norm, self.epsilon, self.kind, rows);
            let vocabulary = self.head.outputs();
            logits.resize(rows.count() * vocabulary, 0.0);
            product::set([(&self.head, logits.as_mut_slice())], rows);
            let mut best = vec![0; rows.count()];
            each(best.iter_mut().zip(logits.chunks_exact(vocabulary)), |(best, logits)| {
                *best = first_of_largest(logits) as u32;
            });
            best
        })
    }
}

impl PackedBlock {
    /// All of the block for all rows.
    fn forward(
        &self,
        x: &mut [f32],
        scratch: &mut Scratch,
        table: &RopeTable,
        positions: &[u32],
        attend: impl FnOnce([&[f32]; 3], &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let Scratch { rows, qkv, .. } = scratch;
        normalise_rows(x, &self.input_layernorm, self.epsilon, self.o_proj.kind(), rows);
        let weights = [&self.q_proj, &self.k_proj, &self.v_proj];
        for (out, weight) in qkv.iter_mut().zip(weights) {
            out.resize(positions.len() * weight.outputs(), 0.0);
        }
        let [q, k, v] = qkv;
        let [q_proj, k_proj, v_proj] = weights;
        product::set([(q_proj, &mut **q), (k_proj, &mut **k), (v_proj, &mut **v)], rows);
        turn_rows([q, k], table, positions, Turn::Forward)?;
        self.finish(x, scratch, attend)
    }

    /// Keys and values of all rows, and all else for the `wanted` ones, which `x` is left with.
    fn narrow(
        &self,
        x: &mut Vec<f32>,
        scratch: &mut Scratch,
        table: &RopeTable,
        (positions, wanted): (&[u32], &[u32]),
        attend: impl FnOnce([&[f32]; 3], &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let (kind, hidden) = (self.o_proj.kind(), self.input_layernorm.len());
        let Scratch { rows, qkv: [q, k, v], .. } = scratch;
        normalise_rows(x, &self.input_layernorm, self.epsilon, kind, rows);
        for (out, weight) in [(&mut *k, &self.k_proj), (&mut *v, &self.v_proj)] {
            out.resize(positions.len() * weight.outputs(), 0.0);
        }
        product::set([(&self.k_proj, &mut **k), (&self.v_proj, &mut **v)], rows);
        turn_rows([k], table, positions, Turn::Forward)?;
        for (row, &from) in wanted.iter().enumerate() {
            let from = from as usize * hidden;
            x.copy_within(from..from + hidden, row * hidden);
        }
        x.truncate(wanted.len() * hidden);
        q.resize(wanted.len() * self.q_proj.outputs(), 0.0);
        if wanted.is_empty() {
            return attend([q, k, v], &mut []);
        }
        normalise_rows(x, &self.input_layernorm, self.epsilon, kind, rows);
        product::set([(&self.q_proj, &mut **q)], rows);
        let positions: Vec<u32> = wanted.iter().map(|&row| positions[row as usize]).collect();
        turn_rows([q], table, &positions, Turn::Forward)?;
        self.finish(x, scratch, attend)
    }

    /// What follows queries, keys and values.
    fn finish(
        &self,
        x: &mut [f32],
        Scratch { rows, qkv: [q, k, v], attended, middle, .. }: &mut Scratch,
        attend: impl FnOnce([&[f32]; 3], &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let (kind, count) = (self.o_proj.kind(), x.len() / self.input_layernorm.len());
        attended.resize(q.len(), 0.0);
        attend([q, k, v], attended)?;
        rows.set(kind, attended, count, self.o_proj.inputs());
        product::add(&self.o_proj, rows, x);
        normalise_rows(x, &self.post_attention_layernorm, self.epsilon, kind, rows);
        middle.resize(count * self.gate_proj.outputs(), 0.0);
        product::gated(&self.gate_proj, &self.up_proj, rows, middle);
        rows.set(kind, middle, count, self.down_proj.inputs());
        product::add(&self.down_proj, rows, x);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::ModelConfig;
    use super::super::{Form, Llama, sampled};
    use super::*;
    use crate::kernels::cached::{Run, StepRows};
    use crate::model::shape::Shape;
    use crate::seed;
    use candle_core::{Device, Tensor};

    fn model(form: Form) -> Llama {
        model_with(form, None)
    }

    fn model_with(form: Form, sliding_window: Option<usize>) -> Llama {
        let shape = Shape::named("2m").unwrap();
        let config =
            ModelConfig { vocab_size: 200, num_hidden_layers: 2, sliding_window, ..shape.config() };
        Llama::build(&config, form, &Device::Cpu, |name, shape| {
            let mut stream = seed::stream(5, name, "packed test");
            let values: Vec<f32> =
                (0..shape.iter().product()).map(|_| 0.1 * stream.normal() as f32).collect();
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
            Ok(if name.contains("norm") { (tensor + 1.0)? } else { tensor })
        })
        .unwrap()
    }

    fn logits(form: Form) -> Tensor {
        let model = model(form);
        let mut cache = model.cache(2).unwrap();
        let ids: Vec<u32> = (0..100).map(|i| i * 37 % 200).collect();
        let positions: Vec<u32> = (0..100).collect();
        let runs = [Run { first_row: 0, rows: 100, position: 0, table: vec![0, 1] }];
        let rows = StepRows { ids: &ids, positions: &positions, runs: &runs, samples: &positions };
        model.step(&mut cache, &rows).unwrap().logits().unwrap()
    }

    fn check(form: Form, noise_max: f32) {
        let exact = logits(Form::Plain);
        let mean = |t: &Tensor| t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        let noise = mean(&(logits(form) - &exact).unwrap()) / mean(&exact);
        assert!(noise < noise_max, "{form:?}: noise is {noise} of the signal");
    }

    #[test]
    fn the_most_likely_token_is_the_first_with_the_largest_logit() {
        for form in [Form::Plain, Form::Packed, Form::PackedAs(WeightType::Bf16)] {
            let model = model(form);
            let mut cache = model.cache(1).unwrap();
            let ids: Vec<u32> = (0..40).map(|i| i * 37 % 200).collect();
            let positions: Vec<u32> = (0..40).collect();
            let runs = [Run { first_row: 0, rows: 40, position: 0, table: vec![0] }];
            let samples = [3, 39, 0, 3];
            let rows =
                StepRows { ids: &ids, positions: &positions, runs: &runs, samples: &samples };
            let stepped = model.step(&mut cache, &rows).unwrap();
            let logits: Vec<Vec<f32>> = stepped.logits().unwrap().to_vec2().unwrap();
            for (logits, token) in logits.iter().zip(stepped.most_likely().unwrap()) {
                let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                assert_eq!(logits.iter().position(|&x| x == top), Some(token as usize));
            }
        }
    }

    #[test]
    fn rows_that_nobody_asks_for_change_no_bit_of_those_asked_for_nor_of_later_steps() {
        for (kind, window) in [
            (WeightType::F32, None),
            (WeightType::Bf16, Some(40)),
            (WeightType::Bf16x3, None),
            (WeightType::BlockFloat, None),
            (WeightType::Int8, None),
        ] {
            let model = model_with(Form::PackedAs(kind), window);
            let [all, after] = sampled::all_logits(&model);
            for samples in sampled::CASES {
                let [some, later] = sampled::logits(&model, samples);
                let expected: Vec<_> =
                    samples.iter().map(|&row| all[row as usize].clone()).collect();
                assert_eq!(some, expected, "{kind:?} {samples:?}");
                assert_eq!(later, after, "{kind:?} {samples:?}");
            }
        }
    }

    #[test]
    fn packed_blocks_equal_plain_ones_as_far_as_their_type_goes() {
        check(Form::Packed, 1e-10);
        check(Form::PackedAs(WeightType::Bf16), 3e-4);
        check(Form::PackedAs(WeightType::BlockFloat), 3e-4);
        check(Form::PackedAs(WeightType::Int8), 3e-3);
    }
}
