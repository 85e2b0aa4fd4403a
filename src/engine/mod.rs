//! The local synthesizer: continuous batching of greedy generation on one device.
//!
//! ```text
//! queue ─▶ schedule ─▶ step: rows of many sequences below each other ─▶ next tokens ─▶ completions
//!             ▲                                                              │
//!             └──────────────────────────────────────────────────────────────┘
//! ```
//!
//! One thread owns the model and its cache. Rows of all sequences stand in one matrix without padding;
//! every kernel computes a row as if it were alone, so an answer does not depend on its company, on how its
//! prompt is cut, on what the cache holds of earlier requests, nor on what was guessed.

pub mod blocks;
pub mod draft;
pub mod metrics;
pub mod odds;
pub mod phases;
pub mod router;
pub mod schedule;
pub mod step_log;

#[cfg(test)]
mod invariance;

use crate::error::{Context, Error, Result};
use crate::kernels::cached::{BLOCK, StepRows};
use crate::model::Llama;
use crate::model::cache::Cache;
use crate::model::launched::Launched;
use crate::record::Finish;
use crate::synthesizer::{Job, Queue};
use crate::threads;
use crossbeam_channel::Receiver;
use metrics::EngineCounters;
use schedule::{Bounds, Means, PrefixReuse, Schedule, Step};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::Instant;

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
    /// What makes it faster.
    pub means: Means,
}

/// Starts an engine; it ends when the last [`Queue`] and handle are gone.
///
/// It computes in the share of threads that the caller has [entered](threads::Share::enter), if there is one. `failed` is called, once, if the device fails: requests in flight are then never answered.
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
    let share = threads::entered();
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
        if let Some(share) = share {
            share.enter();
        }
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
        let EngineSettings { sequences_max, step_tokens_max, cache_bytes, queue_max: _, means } =
            settings;
        let context = model.config.max_position_embeddings;
        let block = Cache::block_bytes(&model.config, model.dtype());
        let blocks = blocks_wanted(&settings, context).min(cache_bytes / block);
        if blocks < context.div_ceil(BLOCK) {
            return Err(Error::Setting(format!(
                "a cache of {cache_bytes} bytes holds {} tokens, less than the {context} of one \
                 sequence",
                blocks * BLOCK,
            )));
        }
        let cache = model.cache(blocks)?;
        let prompts_at_once = model.parts_of_step(step_tokens_max);
        let bounds = Bounds { sequences_max, step_tokens_max, blocks, prompts_at_once };
        Ok(Engine { model, cache, schedule: Schedule::new(bounds, means), ends, counters })
    }

    /// Answers jobs until their senders are gone and all is answered.
    ///
    /// # Errors
    /// If the device fails, or the disk that steps are written down to.
    pub fn serve(&mut self, jobs: &Receiver<Job>) -> Result<()> {
        loop {
            if self.schedule.is_empty() {
                self.counters.rest()?;
                threads::set_at_work(false);
                match jobs.recv() {
                    Ok(job) => admit(&mut self.schedule, &self.model, job),
                    Err(_) => return Ok(()),
                }
                threads::set_at_work(true);
            }
            admit_waiting(&mut self.schedule, &self.model, jobs);
            if !self.schedule.is_empty() {
                self.go_on(jobs)?;
            }
        }
    }

    /// Computes a step, and those behind it that can be laid out before its tokens are known. A device of its own has
    /// the next step before it is through with one.
    fn go_on(&mut self, jobs: &Receiver<Job>) -> Result<()> {
        let mut start = Instant::now();
        let mut step = self.schedule.plan();
        let mut launched = self.launch(&step, None)?;
        loop {
            let next = match self.model.has_own_device() {
                true => self.plan_next(jobs, &step),
                false => None,
            };
            let next = match next {
                Some(next) => Some((self.launch(&next, Some(&launched))?, next)),
                None => None,
            };
            let sampled = launched.tokens().context("generation step")?;
            let end = Instant::now();
            self.take(&mut step, &sampled, (end - start).as_secs_f64())?;
            match next {
                Some(next) => (launched, step) = next,
                None => return Ok(()),
            }
            start = end;
        }
    }

    /// What can be done for the next step while a device is at one: it is laid out, or all but that.
    fn plan_next(&mut self, jobs: &Receiver<Job>, step: &Step) -> Option<Step> {
        admit_waiting(&mut self.schedule, &self.model, jobs);
        let next = self.schedule.plan_ahead(step);
        if next.is_none() {
            self.schedule.prepare();
        }
        next
    }

    /// Has the device begin with a step; ids that are not known are those of the step before.
    fn launch(&mut self, step: &Step, before: Option<&Launched>) -> Result<Launched> {
        let Step { ids, positions, runs, samples, expected, .. } = step;
        let rows = StepRows { ids, positions, runs, samples };
        let before = before.map(|before| (before, &expected[..]));
        self.model.launch(&mut self.cache, &rows, before).context("generation step")
    }

    fn take(&mut self, step: &mut Step, sampled: &[u32], seconds: f64) -> Result<()> {
        let done = self.schedule.take(step, sampled, &self.ends);
        self.schedule.measured(step, seconds);
        // Before the answers are out: whoever has the last may look at the counts.
        self.counters.note(&step.metrics, seconds, self.schedule.blocks_held())?;
        for (sequence, closed) in done {
            let finish = if closed { Finish::Stop } else { Finish::Length };
            let tokens = sequence.generated().to_vec();
            self.counters.requests.fetch_add(1, Relaxed);
            sequence.owner.complete(tokens, finish);
        }
        Ok(())
    }
}

/// Takes in what waits in the queue, as far as it would not only wait again.
fn admit_waiting(schedule: &mut Schedule<Job>, model: &Llama, jobs: &Receiver<Job>) {
    while !schedule.is_full()
        && let Ok(job) = jobs.try_recv()
    {
        admit(schedule, model, job);
    }
}

fn admit(schedule: &mut Schedule<Job>, model: &Llama, mut job: Job) {
    let prompt = std::mem::take(&mut job.request.tokens);
    let (length, new) = (prompt.len(), job.request.new_tokens_max);
    let context = model.config.max_position_embeddings;
    if length + new > context {
        let reason = format!("{length} + {new} tokens do not fit the context of {context}");
        return job.complete(Vec::new(), Finish::Failed(reason));
    }
    if new == 0 {
        return job.complete(Vec::new(), Finish::Length);
    }
    if let Err(job) = schedule.push(prompt, new, job) {
        let reason = format!("a prompt of {length} tokens cannot be served");
        job.complete(Vec::new(), Finish::Failed(reason));
    }
}

/// Blocks that an engine has a use for: the whole context of each sequence, and as much again for what
/// chains left behind that are to go on.
pub fn blocks_wanted(settings: &EngineSettings, context: usize) -> usize {
    let running = settings.sequences_max * context.div_ceil(BLOCK);
    match settings.means.prefix_reuse {
        PrefixReuse::Off => running,
        PrefixReuse::On => 2 * running,
    }
}
