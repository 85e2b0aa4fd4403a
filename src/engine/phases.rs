//! What a model does in each phase of generation alone: prompts, and steps of a whole batch.
//!
//! An engine mixes both in one step, so its own counts do not tell them apart. Here each runs by itself, on
//! the same blocks and kernels, for benchmarks that compare phase by phase.

use crate::error::{Context, Result};
use crate::kernels::cached::{BLOCK, Run, StepRows};
use crate::model::Llama;
use crate::model::cache::Cache;
use std::time::Instant;

/// How many tokens took how long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Phase {
    /// Rows of prompts, or tokens generated.
    pub tokens: u64,
    /// Seconds.
    pub seconds: f64,
}

impl Phase {
    /// Tokens a second.
    pub fn rate(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

/// Some prompts in a cache that has room for more tokens behind each.
pub struct Phases<'a> {
    model: &'a Llama,
    cache: Cache,
    prompts: &'a [Vec<u32>],
    tables: Vec<Vec<u32>>,
    tokens: Vec<u32>,
    step_tokens: usize,
}

impl<'a> Phases<'a> {
    /// Room for `prompts` and `new_tokens` behind each; steps of prompts have `step_tokens` rows at most.
    ///
    /// # Errors
    /// If the device has no room.
    ///
    /// # Panics
    /// If there is no prompt, or an empty one.
    pub fn new(
        model: &'a Llama,
        prompts: &'a [Vec<u32>],
        new_tokens: usize,
        step_tokens: usize,
    ) -> Result<Self> {
        assert!(!prompts.is_empty() && prompts.iter().all(|prompt| !prompt.is_empty()));
        let mut blocks = 0..;
        let table = |prompt: &Vec<u32>| {
            let count = (prompt.len() + new_tokens).div_ceil(BLOCK);
            blocks.by_ref().take(count).collect()
        };
        let tables: Vec<Vec<u32>> = prompts.iter().map(table).collect();
        let blocks = tables.iter().map(Vec::len).sum();
        let cache = model.cache(blocks)?;
        Ok(Phases { model, cache, prompts, tables, tokens: Vec::new(), step_tokens })
    }

    /// Runs a step of prompts and one of a token behind each which do not count: for the first of each a device has to load
    /// kernels, and memory is asked for.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Panics
    /// If there is no room for a token behind the prompts.
    pub fn warm_up(&mut self) -> Result<()> {
        self.tokens = vec![0; self.prompts.len()];
        self.run_prompts(&mut vec![0; self.prompts.len()])?;
        self.steps(1)?;
        self.tokens.clear();
        Ok(())
    }

    /// Runs all prompts, in steps as an engine takes them: some prompts at once, the others behind them.
    ///
    /// # Errors
    /// If the device fails.
    pub fn prompts(&mut self) -> Result<Phase> {
        let start = Instant::now();
        self.tokens = vec![0; self.prompts.len()];
        let mut computed = vec![0; self.prompts.len()];
        while computed.iter().zip(self.prompts).any(|(&computed, prompt)| computed < prompt.len()) {
            self.run_prompts(&mut computed)?;
        }
        let tokens = self.prompts.iter().map(|prompt| prompt.len() as u64).sum();
        Ok(Phase { tokens, seconds: start.elapsed().as_secs_f64() })
    }

    /// Rows that each prompt has of a step, when of each so many are computed.
    fn portions(&self, computed: &[usize]) -> Vec<usize> {
        let left = || self.prompts.iter().zip(computed).map(|(prompt, &done)| prompt.len() - done);
        let share = self.step_tokens.div_ceil(self.model.parts_of_step(self.step_tokens)).max(1);
        let mut room = self.step_tokens.max(1);
        let mut take = |wanted: usize| {
            let rows = wanted.min(room);
            room -= rows;
            rows
        };
        let portions: Vec<usize> = left().map(|left| take(left.min(share))).collect();
        left().zip(portions).map(|(left, rows)| rows + take(left - rows)).collect()
    }

    fn run_prompts(&mut self, computed: &mut [usize]) -> Result<()> {
        let (mut ids, mut positions, mut runs) = (vec![], vec![], vec![]);
        let (mut samples, mut sampled) = (vec![], vec![]);
        for (index, rows) in self.portions(computed).into_iter().enumerate() {
            if rows == 0 {
                continue;
            }
            let (prompt, position) = (&self.prompts[index], computed[index]);
            let table = self.tables[index].clone();
            runs.push(Run { first_row: ids.len(), rows, position, table });
            ids.extend(&prompt[position..position + rows]);
            positions.extend(position as u32..(position + rows) as u32);
            computed[index] += rows;
            if computed[index] == prompt.len() {
                samples.push(ids.len() as u32 - 1);
                sampled.push(index);
            }
        }
        let tokens = self.step(&ids, &positions, &runs, &samples)?;
        for (index, token) in sampled.into_iter().zip(tokens) {
            self.tokens[index] = token;
        }
        Ok(())
    }

    /// Generates `count` tokens behind each prompt, one step of all after another.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Panics
    /// If the prompts have not been run, or there is no room for so many.
    pub fn steps(&mut self, count: usize) -> Result<Phase> {
        let batch = self.prompts.len();
        assert_eq!(self.tokens.len(), batch, "prompts come first");
        let rows: Vec<u32> = (0..batch as u32).collect();
        let start = Instant::now();
        for step in 0..count {
            let position = |index: usize| self.prompts[index].len() + step;
            let run = |index| {
                let (position, table) = (position(index), self.tables[index].clone());
                Run { first_row: index, rows: 1, position, table }
            };
            let runs: Vec<Run> = (0..batch).map(run).collect();
            let positions: Vec<u32> = (0..batch).map(|index| position(index) as u32).collect();
            let ids = std::mem::take(&mut self.tokens);
            self.tokens = self.step(&ids, &positions, &runs, &rows)?;
        }
        Ok(Phase { tokens: (batch * count) as u64, seconds: start.elapsed().as_secs_f64() })
    }

    fn step(
        &mut self,
        ids: &[u32],
        positions: &[u32],
        runs: &[Run],
        samples: &[u32],
    ) -> Result<Vec<u32>> {
        let rows = StepRows { ids, positions, runs, samples };
        self.model.next_tokens(&mut self.cache, &rows).context("generation step")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Form;
    use crate::model::config::ModelConfig;
    use crate::model::shape::Shape;
    use crate::seed;
    use candle_core::{Device, Tensor};

    fn model() -> Llama {
        let shape = Shape::named("2m").unwrap();
        let config = ModelConfig { vocab_size: 90, num_hidden_layers: 2, ..shape.config() };
        Llama::build(&config, Form::Packed, &Device::Cpu, |name, shape| {
            let mut stream = seed::stream(5, name, "phases");
            let count = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|_| stream.normal() as f32).collect();
            Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
        })
        .unwrap()
    }

    fn prompts() -> Vec<Vec<u32>> {
        let prompt = |length: u32| (0..length).map(|i| i * length % 90).collect();
        [5, 70, 1, 40].map(prompt).to_vec()
    }

    fn check(step_tokens: usize) {
        let (model, prompts) = (model(), prompts());
        let mut together = Phases::new(&model, &prompts, 4, step_tokens).unwrap();
        together.warm_up().unwrap();
        assert_eq!(together.prompts().unwrap().tokens, 116);
        assert_eq!(together.steps(4).unwrap().tokens, 16);
        for (index, prompt) in prompts.iter().enumerate() {
            let mut alone =
                Phases::new(&model, std::slice::from_ref(prompt), 4, step_tokens).unwrap();
            alone.prompts().unwrap();
            alone.steps(4).unwrap();
            assert_eq!(alone.tokens[0], together.tokens[index], "prompt {index}");
        }
    }

    #[test]
    fn sequences_go_on_as_if_each_were_alone() {
        check(1);
        check(80);
        check(1000);
    }
}
