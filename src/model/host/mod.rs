//! A model in training on a CPU: the same pass as in tensors (`backward.rs`), in memory of its own.
//!
//! ```text
//! ids ─ embed ─ block ─ … ─ block ─ rows that predict ─ norm ─ head: loss, gradient of the stream
//!                 ▲  traces, or inputs only                                 │
//!                 └──────────────── gradient of the stream ◀────────────────┘
//! ```
//!
//! Products are in f32, or in bf16 with everything else in f32. Each micro-batch uses the memory of the one before
//! it, so that a step takes none.

mod block;
mod size;

use super::backward::{Batch, Gradients, Keep, Learning};
use super::config::ModelConfig;
use crate::kernels::attention::Heads;
use crate::kernels::cross_entropy::{HeadMemory, Objective, learn_rows};
use crate::kernels::dropout::{Dropout, Mask, Site};
use crate::kernels::embedding::{add_rows, copy_rows};
use crate::kernels::linear::{Layout, Weight, sized};
use crate::kernels::matmul::Into;
use crate::kernels::packed::WeightType;
use crate::kernels::rms_norm::{normalise, normalise_backward};
use crate::kernels::rope::RopeTable;
use crate::kernels::storage::{change, clear, elements};
use crate::threads;
use block::{Block, BlockMemory, Trace};
use candle_core::{DType, Device, Result, Tensor, bail};

const EMBEDDING: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm.weight";

/// A decoder whose parameters are shared with an optimizer.
#[derive(Debug)]
pub(crate) struct HostModel {
    config: ModelConfig,
    kind: WeightType,
    table: RopeTable,
    embed_tokens: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    head: Weight,
    memory: Memory,
}

/// What a micro-batch is computed in.
#[derive(Debug, Default)]
struct Memory {
    /// The input of each block.
    inputs: Vec<Vec<f32>>,
    /// What else each block leaves, where that is kept.
    traces: Vec<Trace>,
    block: BlockMemory,
    /// The stream, and its gradient: `(rows, hidden)`.
    stream: Vec<f32>,
    of_stream: Vec<f32>,
    /// The rows that predict, before and after the last normalisation, and the gradient after it.
    predicting: Vec<f32>,
    hidden: Vec<f32>,
    of_hidden: Vec<f32>,
    head: HeadMemory,
}

/// What the blocks of a pass have in common.
#[derive(Clone, Copy)]
struct Pass<'a> {
    batch: &'a Batch,
    heads: Heads,
    table: &'a RopeTable,
    kind: WeightType,
    hidden: usize,
    dropout: Option<Dropout>,
    /// What becomes of what stands in the gradients of parameters.
    sums: Into,
}

/// When the weights of blocks are laid out. Kept in three parts, and in both directions, they would take 12 bytes a parameter. The
/// head is used by few rows at a time, and kept.
fn layout_of_blocks(kind: WeightType) -> Layout {
    match kind {
        WeightType::Bf16x3 => Layout::AtUse,
        _ => Layout::Kept,
    }
}

impl Pass<'_> {
    /// What is dropped at a site, if anything.
    fn mask(&self, site: Site) -> Option<Mask> {
        self.dropout.map(|dropout| dropout.mask(site, self.batch.first_row, self.hidden))
    }

    /// Has a gradient that is always added to begin with nothing, where that is wanted.
    fn start(&self, gradient: &mut [f32]) {
        if self.sums == Into::Set {
            gradient.fill(0.0);
        }
    }
}

impl HostModel {
    /// A model of f32 tensors on the CPU by name; products are computed in `kind`: f32, three parts of bf16, or bf16.
    pub(crate) fn new<E: From<candle_core::Error>>(
        config: &ModelConfig,
        kind: WeightType,
        mut parameter: impl FnMut(&str) -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<Self, E> {
        let (positions, frequencies) = (config.max_position_embeddings, config.rope_frequencies());
        let table = RopeTable::new(&frequencies, positions, DType::F32, &Device::Cpu)?;
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for layer in 0..config.num_hidden_layers {
            let products = (kind, layout_of_blocks(kind));
            blocks.push(Block::new(layer, config.rms_norm_eps, products, &mut parameter)?);
        }
        let head = Weight::new(parameter(head_name(config))?, kind, Layout::Kept)?;
        Ok(HostModel {
            config: config.clone(),
            kind,
            table,
            embed_tokens: parameter(EMBEDDING)?,
            blocks,
            norm: parameter(NORM)?,
            head,
            memory: Memory::default(),
        })
    }

    /// Follows the parameters, which have moved.
    pub(crate) fn follow(&mut self) -> Result<()> {
        self.head.follow()?;
        self.blocks.iter_mut().try_for_each(Block::follow)
    }

    /// The loss of each target of `batch`, in nats.
    pub(crate) fn losses(&mut self, batch: &Batch) -> Result<Vec<f64>> {
        threads::run(|| {
            self.forward(batch, Keep::Inputs, None)?;
            self.predict(batch, None)?;
            Ok(std::mem::take(&mut self.memory.head.losses))
        })
    }

    /// The loss of each target, with the gradient of the objective in `gradients`, which has all parameters: by itself, or
    /// added to what is there.
    pub(crate) fn learn(
        &mut self,
        batch: &Batch,
        learning: Learning,
        (gradients, sums): (&Gradients, Into),
    ) -> Result<Vec<f64>> {
        let Learning { objective, keep, dropout } = learning;
        threads::run(|| {
            self.forward(batch, keep, dropout)?;
            self.predict(batch, Some((objective, gradients, sums)))?;
            self.backward(batch, dropout, (gradients, sums))?;
            Ok(std::mem::take(&mut self.memory.head.losses))
        })
    }

    /// That the model knows what it is asked about.
    fn check(&self, batch: &Batch) -> Result<()> {
        let (vocabulary, context) = (self.config.vocab_size, self.table.positions());
        if let Some(id) =
            batch.ids.iter().chain(&batch.targets).find(|&&id| id as usize >= vocabulary)
        {
            bail!("token id {id} is beyond the vocabulary of {vocabulary}");
        }
        if let Some(position) = batch.positions.iter().find(|&&at| at as usize >= context) {
            bail!("position {position} is beyond the context of {context} tokens");
        }
        Ok(())
    }

    /// From ids to the stream behind the last block.
    fn forward(&mut self, batch: &Batch, keep: Keep, dropout: Option<Dropout>) -> Result<()> {
        self.check(batch)?;
        let model = (&self.config, &self.table, self.kind);
        let pass = pass(model, batch, dropout, Into::Add);
        let Memory { inputs, traces, block: memory, stream, .. } = &mut self.memory;
        let length = batch.ids.len() * self.config.hidden_size;
        let kept = if keep == Keep::Everything { self.blocks.len() } else { 0 };
        traces.resize_with(kept, Trace::default);
        inputs.resize_with(self.blocks.len(), Vec::new);
        let stream = sized(stream, length);
        copy_rows(&elements::<f32>(&self.embed_tokens)?, &batch.ids, stream);
        if let Some(mask) = pass.mask(Site::Embedding) {
            mask.apply(stream);
        }
        for (layer, (block, x)) in self.blocks.iter().zip(inputs).enumerate() {
            let x = sized(x, length);
            x.copy_from_slice(stream);
            match traces.get_mut(layer) {
                Some(trace) => block.forward(&pass, x, trace, stream, memory)?,
                None => again(block, &pass, x, stream, memory)?,
            }
        }
        Ok(())
    }

    /// Losses, and with `learning` the gradient of the stream behind the last block.
    fn predict(
        &mut self,
        batch: &Batch,
        learning: Option<(Objective, &Gradients, Into)>,
    ) -> Result<()> {
        let (width, epsilon) = (self.config.hidden_size, self.config.rms_norm_eps);
        let Memory { block, stream, of_stream, predicting, hidden, of_hidden, head, .. } =
            &mut self.memory;
        let scratch = &mut block.scratch;
        let length = batch.rows.len() * width;
        let norm = elements::<f32>(&self.norm)?;
        copy_rows(stream, &batch.rows, sized(predicting, length));
        normalise(predicting, &norm, epsilon, sized(hidden, length));
        head.losses.clear();
        let Some((objective, gradients, sums)) = learning else {
            return learn_rows(&self.head, hidden, &batch.targets, None, (head, scratch));
        };
        let of_head = gradients.of(head_name(&self.config))?;
        let wanted = Some((objective, sized(of_hidden, length), (of_head, sums)));
        learn_rows(&self.head, hidden, &batch.targets, wanted, (head, scratch))?;
        // The place of the hidden rows is free: it takes the gradient of the rows before the normalisation.
        hidden.fill(0.0);
        if sums == Into::Set {
            clear(gradients.of(NORM)?)?;
        }
        change(gradients.of(NORM)?, |of_norm| {
            normalise_backward(predicting, &norm, epsilon, of_hidden, [hidden, of_norm]);
        })?;
        let of_stream = sized(of_stream, stream.len());
        of_stream.fill(0.0);
        add_rows(hidden, &batch.rows, of_stream);
        Ok(())
    }

    /// From the gradient of the stream behind the last block to those of all parameters before it.
    fn backward(
        &mut self,
        batch: &Batch,
        dropout: Option<Dropout>,
        (gradients, sums): (&Gradients, Into),
    ) -> Result<()> {
        let pass = pass((&self.config, &self.table, self.kind), batch, dropout, sums);
        let Memory { inputs, traces, block: memory, stream, of_stream, .. } = &mut self.memory;
        for (layer, (block, x)) in self.blocks.iter().zip(inputs).enumerate().rev() {
            if let Some(trace) = traces.get(layer) {
                block.backward(&pass, (x, trace), of_stream, memory, gradients)?;
                continue;
            }
            stream.copy_from_slice(x);
            again(block, &pass, x, stream, memory)?;
            let trace = std::mem::take(&mut memory.trace);
            block.backward(&pass, (x, &trace), of_stream, memory, gradients)?;
            memory.trace = trace;
        }
        if let Some(mask) = pass.mask(Site::Embedding) {
            mask.apply(of_stream);
        }
        let of_table = gradients.of(EMBEDDING)?;
        if sums == Into::Set && head_name(&self.config) != EMBEDDING {
            clear(of_table)?;
        }
        change(of_table, |of_table| add_rows(of_stream, &batch.ids, of_table))
    }
}

/// Runs a block whose trace is not kept beyond the next one.
fn again(
    block: &Block,
    pass: &Pass<'_>,
    x: &[f32],
    stream: &mut [f32],
    memory: &mut BlockMemory,
) -> Result<()> {
    let mut trace = std::mem::take(&mut memory.trace);
    let done = block.forward(pass, x, &mut trace, stream, memory);
    memory.trace = trace;
    done
}

fn pass<'a>(
    (config, table, kind): (&ModelConfig, &'a RopeTable, WeightType),
    batch: &'a Batch,
    dropout: Option<Dropout>,
    sums: Into,
) -> Pass<'a> {
    Pass { batch, heads: config.heads(), table, kind, hidden: config.hidden_size, dropout, sums }
}

fn head_name(config: &ModelConfig) -> &'static str {
    match config.tie_word_embeddings {
        true => EMBEDDING,
        false => "lm_head.weight",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shape::Shape;
    use crate::model::{Form, Llama};
    use crate::seed;

    const OBJECTIVE: Objective = Objective { scale: 0.5, z_loss: 1e-3 };

    /// Learning with this probability of dropout, none for 0.
    fn learning(keep: Keep, probability: f64) -> Learning {
        let dropout = (probability > 0.0).then(|| Dropout::new(probability, 3, 8));
        Learning { objective: OBJECTIVE, keep, dropout }
    }

    fn config(tied: bool) -> ModelConfig {
        ModelConfig {
            vocab_size: 300,
            hidden_size: 64,
            intermediate_size: 96,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            max_position_embeddings: 128,
            sliding_window: Some(50),
            tie_word_embeddings: tied,
            ..Shape::named("2m").unwrap().config()
        }
    }

    fn parameters(config: &ModelConfig) -> Vec<(String, Tensor)> {
        let random = |(name, shape): (String, Vec<usize>)| {
            let mut stream = seed::stream(3, &name, "test");
            let centre = if name.contains("norm") { 1.0 } else { 0.0 };
            let values: Vec<f32> = (0..shape.iter().product())
                .map(|_| (0.1 * stream.normal() + centre) as f32)
                .collect();
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
            (name, tensor)
        };
        config.parameters().into_iter().map(random).collect()
    }

    fn named(parameters: &[(String, Tensor)], name: &str) -> Result<Tensor> {
        Ok(parameters.iter().find(|(own, _)| own == name).unwrap().1.clone())
    }

    /// Two items of 90 and 43 tokens, every third without a target.
    fn batch() -> Batch {
        let mut batch = Batch { spans: vec![0..90, 90..133], first_row: 1000, ..Batch::default() };
        for span in batch.spans.clone() {
            for (position, row) in span.enumerate() {
                batch.ids.push((row * row % 300) as u32);
                batch.positions.push(position as u32);
                if row % 3 != 0 {
                    batch.rows.push(row as u32);
                    batch.targets.push((row * 5 % 300) as u32);
                }
            }
        }
        batch
    }

    fn learn(
        config: &ModelConfig,
        kind: WeightType,
        learning: Learning,
    ) -> (Vec<f64>, Gradients, HostModel) {
        let parameters = parameters(config);
        let mut model = HostModel::new(config, kind, |name| named(&parameters, name)).unwrap();
        let gradients = Gradients::zeros(&config.parameters()).unwrap();
        for (_, gradient) in gradients.iter() {
            change(gradient, |values| values.fill(f32::NAN)).unwrap();
        }
        let losses = model.learn(&batch(), learning, (&gradients, Into::Set)).unwrap();
        (losses, gradients, model)
    }

    fn flat(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Losses, and the length of the difference of each gradient as a share of its length, are within bounds.
    fn check(tied: bool, kind: WeightType, dropout: f64, (loss_bound, bound): (f64, f32)) {
        let config = config(tied);
        let parameters = parameters(&config);
        let get = |name: &str, _: &[usize]| Ok(named(&parameters, name)?);
        let twin = Llama::build(&config, Form::Plain, &Device::Cpu, get).unwrap();
        let mut exact = Gradients::default();
        let how = learning(Keep::Everything, dropout);
        let theirs = twin.learn(&batch(), how, &mut exact).unwrap();
        let (ours, gradients, mut model) = learn(&config, kind, how);
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert!((ours - theirs).abs() <= loss_bound, "loss {ours}, not {theirs}");
        }
        // Where nothing is learned, nothing is dropped.
        let (_, _, mut without) = learn(&config, kind, learning(Keep::Everything, 0.0));
        assert_eq!(model.losses(&batch()).unwrap(), without.losses(&batch()).unwrap());
        assert_eq!(model.losses(&batch()).unwrap() == ours, dropout == 0.0);
        for (name, exact) in exact.iter() {
            let (ours, exact) = (flat(gradients.of(name).unwrap()), flat(exact));
            let length = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
            let size = length(&mut exact.iter().copied());
            let error = length(&mut ours.iter().zip(&exact).map(|(a, b)| a - b)) / size;
            assert!(size > 0.0 && error <= bound, "{name}: off by {error} of {size}");
        }
    }

    #[test]
    fn losses_and_gradients_are_those_of_tensors() {
        for tied in [true, false] {
            for kind in [WeightType::F32, WeightType::Bf16x3] {
                check(tied, kind, 0.0, (1e-5, 1e-5));
                check(tied, kind, 0.2, (1e-5, 1e-5));
            }
        }
    }

    #[test]
    fn in_bf16_they_are_near() {
        for tied in [true, false] {
            check(tied, WeightType::Bf16, 0.0, (0.05, 0.03));
            check(tied, WeightType::Bf16, 0.2, (0.05, 0.03));
        }
    }

    #[test]
    fn running_a_block_again_changes_no_bit_and_neither_does_used_memory() {
        let kinds = [WeightType::F32, WeightType::Bf16x3, WeightType::Bf16];
        for (kind, dropout) in kinds.into_iter().flat_map(|kind| [(kind, 0.0), (kind, 0.2)]) {
            let config = config(true);
            let (everything, inputs) =
                (learning(Keep::Everything, dropout), learning(Keep::Inputs, dropout));
            let (losses, gradients, mut model) = learn(&config, kind, everything);
            let (again, of_inputs, _) = learn(&config, kind, inputs);
            assert_eq!(losses, again);
            let mut reused = Gradients::zeros(&config.parameters()).unwrap();
            // A batch that leaves no numbers behind.
            let before = flat(&model.embed_tokens)[7];
            change(&model.embed_tokens, |table| table[7] = f32::NAN).unwrap();
            let mut bad = batch();
            bad.ids.fill(0);
            assert!(model.learn(&bad, inputs, (&reused, Into::Set)).unwrap()[0].is_nan());
            change(&model.embed_tokens, |table| table[7] = before).unwrap();
            reused.clear().unwrap();
            assert_eq!(model.learn(&batch(), inputs, (&reused, Into::Add)).unwrap(), losses);
            for (name, gradient) in gradients.iter() {
                assert_eq!(flat(gradient), flat(of_inputs.of(name).unwrap()), "{name}");
                assert_eq!(flat(gradient), flat(reused.of(name).unwrap()), "{name}");
            }
        }
    }

    #[test]
    fn a_batch_without_targets_has_no_losses_and_gradients_of_nothing() {
        for tied in [true, false] {
            let config = config(tied);
            let everything = learning(Keep::Everything, 0.0);
            let (_, gradients, mut model) = learn(&config, WeightType::F32, everything);
            let none = Batch { rows: Vec::new(), targets: Vec::new(), ..batch() };
            let losses = model.learn(&none, everything, (&gradients, Into::Set)).unwrap();
            assert_eq!(losses, [0.0; 0]);
            for (name, gradient) in gradients.iter() {
                assert!(flat(gradient).iter().all(|&x| x == 0.0), "{name}");
            }
        }
    }

    #[test]
    fn gradients_of_two_batches_add_up() {
        let config = config(false);
        let everything = learning(Keep::Everything, 0.1);
        let (_, once, mut model) = learn(&config, WeightType::F32, everything);
        let twice = Gradients::zeros(&config.parameters()).unwrap();
        for into in [Into::Set, Into::Add] {
            model.learn(&batch(), everything, (&twice, into)).unwrap();
        }
        for (name, once) in once.iter() {
            let (once, twice) = (flat(once), flat(twice.of(name).unwrap()));
            let size = once.iter().fold(0.0f32, |size, x| size.max(x.abs()));
            for (once, twice) in once.iter().zip(twice) {
                assert!((2.0 * once - twice).abs() <= 1e-5 * size, "{name}: {once} and {twice}");
            }
        }
    }

    #[test]
    fn what_the_model_does_not_know_is_an_error() {
        let config = config(true);
        let everything = learning(Keep::Everything, 0.0);
        let (_, gradients, mut model) = learn(&config, WeightType::F32, everything);
        let mut unknown = batch();
        unknown.ids[7] = 300;
        let mut far = batch();
        far.positions[3] = 128;
        for (batch, said) in [(unknown, "token id 300"), (far, "position 128")] {
            let error = model.learn(&batch, everything, (&gradients, Into::Set)).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
        }
    }
}
