//! The local synthesizer: continuous batching of greedy generation on one device.
//!
//! ```text
//! queue ─▶ schedule ─▶ step: rows of many sequences below each other ─▶ next tokens ─▶ completions
//!             ▲                                                              │
//!             └──────────────────────────────────────────────────────────────┘
//! ```
//!
//! One thread owns the model and its cache. Rows of all sequences stand in one matrix without padding;
//! every kernel computes a row as if it were alone, so an answer does not depend on its company.

pub mod schedule;

use crate::error::{Context, Error, Result};
use crate::kernels::cached::BLOCK;
use crate::model::Llama;
use crate::model::cache::Cache;
use crate::record::Finish;
use crate::synthesizer::{Job, Queue};
use candle_core::{D, DType, Tensor};
use crossbeam_channel::{Receiver, TryRecvError};
use schedule::{Bounds, Schedule, Step};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;

/// How an engine uses its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineSettings {
    /// Sequences that run at a time.
    pub sequences_max: usize,
    /// Rows of one step.
    pub step_tokens_max: usize,
    /// Bytes for keys and values.
    pub cache_bytes: usize,
    /// Requests that may wait in the queue.
    pub queue_max: usize,
}

/// What an engine has done so far.
#[derive(Debug, Default)]
pub struct EngineCounters {
    /// Requests answered.
    pub requests: AtomicU64,
    /// Prompt tokens computed.
    pub prompt_tokens: AtomicU64,
    /// Tokens generated.
    pub generated_tokens: AtomicU64,
    /// Steps.
    pub steps: AtomicU64,
}

/// Starts an engine; it ends when the last [`Queue`] and handle are gone.
///
/// `failed` is called, once, if the device fails: requests in flight are then never answered.
///
/// # Errors
/// If the cache cannot be allocated.
pub fn start(
    model: Llama,
    ends: Vec<u32>,
    settings: EngineSettings,
    counters: Arc<EngineCounters>,
    failed: impl FnOnce(Error) + Send + 'static,
) -> Result<(Queue, JoinHandle<()>)> {
    let mut engine = Engine::new(model, ends, settings, counters)?;
    let (queue, jobs) = Queue::new(settings.queue_max);
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
        if let Err(error) = engine.serve(&jobs) {
            failed(error);
        }
    });
    let thread = thread.map_err(|error| Error::Stopped(format!("no engine thread: {error}")))?;
    Ok((queue, thread))
}

/// A model with its cache and the sequences it is generating.
pub struct Engine {
    model: Llama,
    cache: Cache,
    schedule: Schedule<Job>,
    ends: Vec<u32>,
    counters: Arc<EngineCounters>,
}

impl Engine {
    /// An idle engine. `ends` are the tokens that end a generation.
    ///
    /// # Errors
    /// If the cache cannot be allocated or not even one sequence fits into it.
    pub fn new(
        model: Llama,
        ends: Vec<u32>,
        settings: EngineSettings,
        counters: Arc<EngineCounters>,
    ) -> Result<Self> {
        let EngineSettings { sequences_max, step_tokens_max, cache_bytes, queue_max: _ } = settings;
        let context = model.config.max_position_embeddings;
        let wanted = sequences_max * context.div_ceil(BLOCK);
        let block = Cache::block_bytes(&model.config, model.dtype());
        let blocks = wanted.min(cache_bytes / block);
        if blocks < context.div_ceil(BLOCK) {
            return Err(Error::Setting(format!(
                "a cache of {cache_bytes} bytes holds {} tokens, less than the {context} of one \
                 sequence",
                blocks * BLOCK,
            )));
        }
        let cache = Cache::new(&model.config, blocks, model.dtype(), model.device())?;
        let bounds = Bounds { sequences_max, step_tokens_max, blocks };
        Ok(Engine { model, cache, schedule: Schedule::new(bounds), ends, counters })
    }

    /// Answers jobs until their senders are gone and all is answered.
    ///
    /// # Errors
    /// If the device fails.
    pub fn serve(&mut self, jobs: &Receiver<Job>) -> Result<()> {
        let mut open = true;
        while open || !self.schedule.is_empty() {
            while open && !self.schedule.is_full() {
                let job = match self.schedule.is_empty() {
                    true => jobs.recv().map_err(|_| TryRecvError::Disconnected),
                    false => jobs.try_recv(),
                };
                match job {
                    Ok(job) => self.admit(job),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => open = false,
                }
            }
            if !self.schedule.is_empty() {
                self.step()?;
            }
        }
        Ok(())
    }

    fn admit(&mut self, mut job: Job) {
        let prompt = std::mem::take(&mut job.request.tokens);
        let (length, new) = (prompt.len(), job.request.new_tokens_max);
        let context = self.model.config.max_position_embeddings;
        if length + new > context {
            let reason = format!("{length} + {new} tokens do not fit the context of {context}");
            return job.complete(Vec::new(), Finish::Failed(reason));
        }
        if new == 0 {
            return job.complete(Vec::new(), Finish::Length);
        }
        if let Err(job) = self.schedule.push(prompt, new, job) {
            let reason = format!("a prompt of {length} tokens cannot be served");
            job.complete(Vec::new(), Finish::Failed(reason));
        }
    }

    fn step(&mut self) -> Result<()> {
        let step = self.schedule.plan();
        let sampled = self.compute(&step).context("generation step")?;
        let rows = step.ids.len() as u64;
        let decoded = step.runs.iter().filter(|run| run.rows == 1 && run.position > 0).count();
        self.counters.steps.fetch_add(1, Relaxed);
        self.counters.prompt_tokens.fetch_add(rows - decoded as u64, Relaxed);
        self.counters.generated_tokens.fetch_add(sampled.len() as u64, Relaxed);
        for (sequence, closed) in self.schedule.take(&step, &sampled, &self.ends) {
            let finish = if closed { Finish::Stop } else { Finish::Length };
            let tokens = sequence.generated().to_vec();
            self.counters.requests.fetch_add(1, Relaxed);
            sequence.owner.complete(tokens, finish);
        }
        Ok(())
    }

    /// The most likely next token of each sampled row.
    fn compute(&mut self, step: &Step) -> candle_core::Result<Vec<u32>> {
        let (model, cache) = (&self.model, &mut self.cache);
        let x = model
            .forward(&step.ids, &step.positions, |layer, qkv| cache.step(layer, qkv, &step.runs))?;
        if step.samples.is_empty() {
            return Ok(Vec::new());
        }
        let rows = Tensor::new(step.samples.as_slice(), x.device())?;
        let logits = model.logits(&x.index_select(&rows, 0)?)?;
        match logits.device().is_cpu() {
            true => {
                Ok(logits.to_dtype(DType::F32)?.to_vec2()?.iter().map(|row| best(row)).collect())
            }
            false => logits.argmax(D::Minus1)?.to_vec1(),
        }
    }
}

/// The index of the largest element, the first of several.
fn best(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = index;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Form;
    use crate::model::config::ModelConfig;
    use crate::model::shape::Shape;
    use crate::seed;
    use crate::synthesizer::{Request, Synthesizer};
    use candle_core::Device;

    fn model(form: Form) -> Llama {
        let config = ModelConfig {
            vocab_size: 97,
            max_position_embeddings: 256,
            num_hidden_layers: 2,
            ..Shape::named("2m").unwrap().config()
        };
        Llama::build(&config, form, &Device::Cpu, |name, shape| {
            let mut stream = seed::stream(5, name, "engine test");
            let values: Vec<f32> =
                (0..shape.iter().product()).map(|_| 0.3 * stream.normal() as f32).collect();
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
            Ok(if name.contains("norm") { (tensor + 1.0)? } else { tensor })
        })
        .unwrap()
    }

    fn prompts() -> Vec<(Vec<u32>, usize)> {
        let mut stream = seed::stream(9, "prompts", "engine test");
        (0..24)
            .map(|index| {
                let length = 1 + stream.index(150);
                ((0..length).map(|_| stream.index(97) as u32).collect(), 5 + index % 20)
            })
            .collect()
    }

    fn generate(settings: EngineSettings) -> Vec<(Vec<u32>, Finish)> {
        let counters = Arc::default();
        let failed = |error| panic!("{error}");
        let model = model(Form::Packed);
        let (queue, thread) = start(model, vec![3], settings, counters, failed).unwrap();
        let (woken, wakes) = crossbeam_channel::unbounded();
        let mut handle = queue.open(Arc::new(move || {
            let _ = woken.send(());
        }));
        drop(queue);
        let prompts = prompts();
        let mut answers = vec![None; prompts.len()];
        let (mut sent, mut done) = (0, 0);
        while done < prompts.len() {
            while sent < prompts.len() {
                let (tokens, new_tokens_max) = prompts[sent].clone();
                match handle.submit(Request { key: sent as u64, tokens, new_tokens_max }) {
                    Ok(()) => sent += 1,
                    Err(_) => break,
                }
            }
            wakes.recv().unwrap();
            while let Some(completion) = handle.poll() {
                answers[completion.key as usize] = Some((completion.tokens, completion.finish));
                done += 1;
            }
        }
        drop(handle);
        thread.join().unwrap();
        answers.into_iter().map(Option::unwrap).collect()
    }

    const SETTINGS: EngineSettings = EngineSettings {
        sequences_max: 8,
        step_tokens_max: 64,
        cache_bytes: 64 << 20,
        queue_max: 4,
    };

    #[test]
    fn an_answer_does_not_depend_on_its_company_or_its_chunks() {
        let alone = generate(EngineSettings { sequences_max: 1, step_tokens_max: 512, ..SETTINGS });
        for (sequences_max, step_tokens_max) in [(1, 7), (4, 33), (24, 64), (24, 4096)] {
            let settings = EngineSettings { sequences_max, step_tokens_max, ..SETTINGS };
            assert_eq!(generate(settings), alone, "{sequences_max} at {step_tokens_max} a step");
        }
        assert!(alone.iter().any(|(_, finish)| *finish == Finish::Length));
    }

    #[test]
    fn answers_equal_those_of_computing_each_text_anew() {
        use crate::model::backward::Batch;
        let plain = model(Form::Plain);
        let answers = generate(SETTINGS);
        for ((prompt, limit), (tokens, finish)) in prompts().iter().zip(&answers).take(6) {
            let mut all = prompt.clone();
            for &token in tokens {
                // The token that was chosen costs least among all.
                let loss = |next: u32| {
                    let mut ids = all.clone();
                    ids.push(next);
                    let rows = ids.len();
                    let batch = Batch {
                        positions: (0..rows as u32).collect(),
                        spans: std::iter::once(0..rows).collect(),
                        rows: vec![rows as u32 - 2],
                        targets: vec![next],
                        ids,
                    };
                    plain.losses(&batch).unwrap()[0]
                };
                let chosen = loss(token);
                assert!((0..97).all(|next| loss(next) >= chosen - 1e-4));
                all.push(token);
            }
            assert!(tokens.len() <= *limit && (*finish == Finish::Stop || tokens.len() == *limit));
        }
    }

    #[test]
    fn what_cannot_be_served_fails_alone() {
        let mut engine =
            Engine::new(model(Form::Packed), vec![3], SETTINGS, Arc::default()).unwrap();
        let (queue, jobs) = Queue::new(4);
        let mut handle = queue.open(Arc::new(|| {}));
        for (key, length) in [(1, 300), (2, 0), (3, 10)] {
            handle.submit(Request { key, tokens: vec![5; length], new_tokens_max: 5 }).unwrap();
        }
        drop(queue);
        let answers: Vec<(u64, bool)> = std::thread::scope(|scope| {
            scope.spawn(move || engine.serve(&jobs).unwrap());
            let mut answers = Vec::new();
            while answers.len() < 3 {
                if let Some(completion) = handle.poll() {
                    answers.push((completion.key, matches!(completion.finish, Finish::Failed(_))));
                }
                std::thread::yield_now();
            }
            drop(handle);
            answers.sort_unstable();
            answers
        });
        assert_eq!(answers, [(1, true), (2, true), (3, false)]);
    }
}
