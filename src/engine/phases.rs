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
    /// Room for `prompts` and `new_tokens` behind each; steps of prompts have about `step_tokens` rows.
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
        self.run_prompts(0..self.fitting(0))?;
        self.tokens = vec![0; self.prompts.len()];
        self.steps(1)?;
        self.tokens.clear();
        Ok(())
    }

    /// Runs all prompts, as many in a step as its rows allow, one at least.
    ///
    /// # Errors
    /// If the device fails.
    pub fn prompts(&mut self) -> Result<Phase> {
        let start = Instant::now();
        let mut first = 0;
        self.tokens.clear();
        while first < self.prompts.len() {
            let end = self.fitting(first);
            self.run_prompts(first..end)?;
            first = end;
        }
        let tokens = self.prompts.iter().map(|prompt| prompt.len() as u64).sum();
        Ok(Phase { tokens, seconds: start.elapsed().as_secs_f64() })
    }

    /// Behind the prompts from `first` that fit a step, one at least.
    fn fitting(&self, first: usize) -> usize {
        let mut rows = 0;
        let fits = self.prompts[first..].iter().take_while(|prompt| {
            rows += prompt.len();
            rows <= self.step_tokens
        });
        first + fits.count().max(1)
    }

    fn run_prompts(&mut self, range: std::ops::Range<usize>) -> Result<()> {
        let (mut ids, mut positions, mut runs, mut last) = (vec![], vec![], vec![], vec![]);
        for index in range {
            let prompt = &self.prompts[index];
            runs.push(Run {
                first_row: ids.len(),
                rows: prompt.len(),
                position: 0,
                table: self.tables[index].clone(),
            });
            ids.extend(prompt);
            positions.extend(0..prompt.len() as u32);
            last.push(ids.len() as u32 - 1);
        }
        let tokens = self.step(&ids, &positions, &runs, &last)?;
        self.tokens.extend(tokens);
        Ok(())
    }

    /// Generates `count` tokens behind each prompt, one step of all after another.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Panics
    /// If the prompts have not been run.
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
        let stepped = self.model.step(&mut self.cache, &rows).context("generation step")?;
        stepped.most_likely().context("generation step")
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
