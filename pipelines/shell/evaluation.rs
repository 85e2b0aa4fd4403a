//! Puts an exam to a model.

use super::args::StepArgs;
use super::stop;
use anyhow::{Context, Result, anyhow};
use candle_core::Device;
use crossbeam_channel::unbounded;
use headwater::engine::metrics::EngineCounters;
use headwater::engine::{self, EngineSettings};
use headwater::eval::{Exam, Scores};
use headwater::model::Llama;
use headwater::model::config::ModelConfig;
use headwater::model::precision::Precision;
use headwater::model::weights::Weights;
use headwater::synthesizer::{Completion, Synthesizer};
use headwater::tokenizer::Tokenizer;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Tokens of a question with its answer at most: the context of the published synthesizer (recipe (b)).
pub const CONTEXT_MAX: usize = 4096;

/// Asks the model in `directory`, and marks its answers; none if the run is to stop.
///
/// # Errors
/// If the model cannot be loaded or the device fails.
pub fn evaluate(exam: &Exam, directory: &Path, device: &Device) -> Result<Option<Scores>> {
    let mut config = ModelConfig::read(directory)?;
    config.max_position_embeddings = config.max_position_embeddings.min(CONTEXT_MAX);
    let tokenizer = Tokenizer::read(directory)?;
    let precision = if device.is_cpu() { Precision::F32 } else { Precision::Bf16 };
    let model = Llama::load(&config, &Weights::open(directory)?, precision, device)?;
    let (failed, failure) = unbounded();
    let ends = tokenizer.eos().into_iter().collect();
    let steps = StepArgs::default();
    let settings = steps.settings(device.is_cpu(), 0)?;
    let reserved = model.step_bytes(settings.step_tokens_max) as u64;
    let cache_bytes = steps.cache_bytes(model.free_bytes()?, reserved, 1);
    let settings = EngineSettings { cache_bytes, ..settings };
    let counters = Arc::new(EngineCounters::default());
    let (queue, thread) = engine::start(model, ends, settings, counters, move |error| {
        let _ = failed.send(error);
    })?;
    let (woken, wakes) = unbounded();
    let mut handle = queue.open(Arc::new(move || {
        let _ = woken.send(()); // nobody listens when all is answered
    }));
    let mut waiting = exam.requests().iter().cloned().rev().collect::<Vec<_>>();
    let mut answers: Vec<Completion> = Vec::new();
    while answers.len() < exam.requests().len() {
        if stop::asked() {
            return Ok(None);
        }
        if let Ok(error) = failure.try_recv() {
            return Err(anyhow!(error)).context("could not evaluate");
        }
        while let Some(request) = waiting.pop() {
            if let Err(refused) = handle.submit(request) {
                waiting.push(refused);
                break;
            }
        }
        let _ = wakes.recv_timeout(Duration::from_millis(100));
        answers.extend(std::iter::from_fn(|| handle.poll()));
    }
    drop((handle, queue));
    // What the engine holds is free again before anything else asks for memory.
    thread.join().map_err(|_| anyhow!("the engine's thread failed"))?;
    answers.sort_by_key(|answer| answer.key); // sums of floats are in one order
    Ok(Some(exam.mark(&answers, &tokenizer)))
}
