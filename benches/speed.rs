//! How fast does the engine generate with models of the published benchmark shapes and random weights?
//!
//! ```sh
//! cargo bench -p headwater-benches --bench speed -- [10m,110m] [bf16,f32,int8] [8,32] [requests]
//! ```
//!
//! Prompts of 512 tokens, 128 new tokens each, no end. One run, in tokens a second: prompt tokens alone, one
//! step of all sequences alone, and all requests through the queue, counting new tokens.

use candle_core::{Device, Tensor};
use crossbeam_channel::unbounded;
use headwater::engine::metrics::EngineCounters;
use headwater::engine::schedule::{Means, PrefixReuse, Speculation};
use headwater::engine::{self, EngineSettings};
use headwater::kernels::cached::{BLOCK, Run, StepRows};
use headwater::kernels::packed::WeightType;
use headwater::model::shape::Shape;
use headwater::model::{Form, Llama};
use headwater::seed;
use headwater::synthesizer::{Request, Synthesizer};
use std::sync::Arc;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const PROMPT: usize = 512;
const NEW: usize = 128;

fn model(shape: &str, kind: WeightType) -> Llama {
    let config = Shape::named(shape).expect("a known shape").config();
    let mut stream = seed::stream(5, shape, "speed");
    let mut next = move || stream.normal() as f32;
    Llama::build(&config, Form::PackedAs(kind), &Device::Cpu, |name, shape| {
        let scale = if name.contains("norm") { 0.0 } else { 0.03 };
        let offset = if name.contains("norm") { 1.0 } else { 0.0 };
        // A thousand numbers, again and again with shifting signs: as good as any for speed.
        let base: Vec<f32> = (0..1009).map(|_| next()).collect();
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|i| offset + scale * base[i % 1009]).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    })
    .expect("the shape is whole")
}

fn prompt(index: usize, vocabulary: usize) -> Vec<u32> {
    let mut stream = seed::stream(9, &index.to_string(), "speed prompt");
    (0..PROMPT).map(|_| stream.index(vocabulary) as u32).collect()
}

/// Tokens a second of prompts alone and of steps of `batch` sequences alone.
fn parts(model: &Llama, batch: usize) -> (f64, f64) {
    let blocks_each = (PROMPT + NEW).div_ceil(BLOCK);
    let mut cache = model.cache(batch * blocks_each).expect("it fits");
    let table = |index: usize| (0..blocks_each).map(|b| (index * blocks_each + b) as u32).collect();
    let start = Instant::now();
    for index in 0..batch {
        let run = Run { first_row: 0, rows: PROMPT, position: 0, table: table(index) };
        let positions: Vec<u32> = (0..PROMPT as u32).collect();
        let ids = prompt(index, model.config.vocab_size);
        let rows = StepRows { ids: &ids, positions: &positions, runs: &[run], samples: &[] };
        model.step(&mut cache, &rows).expect("a CPU does not fail");
    }
    let prefill = (batch * PROMPT) as f64 / start.elapsed().as_secs_f64();
    let start = Instant::now();
    for step in 0..NEW {
        let position = PROMPT + step;
        let runs: Vec<Run> = (0..batch)
            .map(|index| Run { first_row: index, rows: 1, position, table: table(index) })
            .collect();
        let ids: Vec<u32> = (0..batch as u32).map(|i| i * 7 + step as u32).collect();
        let positions = vec![position as u32; batch];
        let samples: Vec<u32> = (0..batch as u32).collect();
        let rows = StepRows { ids: &ids, positions: &positions, runs: &runs, samples: &samples };
        let stepped = model.step(&mut cache, &rows).expect("a CPU does not fail");
        stepped.most_likely().expect("a CPU does not fail");
    }
    (prefill, (batch * NEW) as f64 / start.elapsed().as_secs_f64())
}

/// New tokens a second of `count` requests through the engine.
fn whole(model: Llama, batch: usize, count: usize) -> f64 {
    let settings = EngineSettings {
        sequences_max: batch,
        step_tokens_max: 512,
        cache_bytes: 4 << 30,
        queue_max: count,
        // Random tokens: nothing is shared, nothing can be guessed.
        means: Means { prefix_reuse: PrefixReuse::Off, speculation: Speculation::Off },
    };
    let vocabulary = model.config.vocab_size;
    let counters = Arc::new(EngineCounters::default());
    let failed = |error| panic!("{error}");
    let (queue, _) =
        engine::start(model, Vec::new(), settings, counters, failed).expect("the cache fits");
    let (woken, wakes) = unbounded();
    let mut handle = queue.open(Arc::new(move || {
        let _ = woken.send(()); // nobody listens at the end
    }));
    let start = Instant::now();
    for index in 0..count {
        let tokens = prompt(index, vocabulary);
        let request = Request { key: index as u64, tokens, new_tokens_max: NEW };
        handle.submit(request).expect("the queue has room");
    }
    let mut answers = 0;
    while answers < count {
        wakes.recv().expect("the engine lives");
        answers += std::iter::from_fn(|| handle.poll()).count();
    }
    (count * NEW) as f64 / start.elapsed().as_secs_f64()
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let list = |index: usize, default: &str| -> Vec<String> {
        let text = arguments.get(index).map_or(default, |text| text);
        text.split(',').map(str::to_owned).collect()
    };
    let count: usize = list(3, "64")[0].parse().expect("a number of requests");
    for shape in list(0, "10m,110m") {
        for kind in list(1, "bf16") {
            let kind = match kind.as_str() {
                "f32" => WeightType::F32,
                "int8" => WeightType::Int8,
                _ => WeightType::Bf16,
            };
            let model = model(&shape, kind);
            for batch in list(2, "8,32") {
                let batch = batch.parse().expect("a batch");
                let (prefill, decode) = parts(&model, batch);
                print!("{shape} {kind:?} batch {batch}: prefill {prefill:.0} decode {decode:.0}");
                if count > 0 {
                    print!(" whole {:.0}", whole(model.clone(), batch, count));
                }
                println!();
            }
        }
    }
}
