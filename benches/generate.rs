//! How fast does the engine generate? Prompts of the bundled sample through the bundled synthesizer: a
//! prompt, then 128 tokens each, with no end.

use candle_core::Device;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use crossbeam_channel::unbounded;
use headwater::engine::metrics::EngineCounters;
use headwater::engine::schedule::{Means, PrefixReuse, Speculation};
use headwater::engine::{self, EngineSettings};
use headwater::synthesizer::{Request, Synthesizer};
use headwater_benches::{prompts, synthesizer};
use std::sync::Arc;

const NEW_TOKENS: usize = 128;

fn generate(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("generate");
    for batch in [1, 8, 32] {
        let model = synthesizer().load(&Device::Cpu).expect("it loads");
        let settings = EngineSettings {
            sequences_max: batch,
            step_tokens_max: 512,
            cache_bytes: 1 << 30,
            queue_max: 2 * batch,
            // The same prompts again and again: nothing of the last time may be left.
            means: Means { prefix_reuse: PrefixReuse::Off, speculation: Speculation::Off },
        };
        let counters = Arc::new(EngineCounters::default());
        let (queue, _) = engine::start(model, Vec::new(), settings, counters, |error| {
            panic!("{error}");
        })
        .expect("the cache fits");
        let (woken, wakes) = unbounded();
        let mut handle = queue.open(Arc::new(move || {
            let _ = woken.send(()); // nobody listens at the end
        }));
        let prompts = prompts(batch);
        group.throughput(Throughput::Elements((batch * NEW_TOKENS) as u64)).sample_size(10);
        group.bench_function(format!("batch {batch}"), |bencher| {
            bencher.iter(|| {
                for (key, prompt) in (0..).zip(&prompts) {
                    let request =
                        Request { key, tokens: prompt.clone(), new_tokens_max: NEW_TOKENS };
                    handle.submit(request).expect("the queue has room");
                }
                let mut answers = 0;
                while answers < batch {
                    wakes.recv().expect("the engine lives");
                    answers += std::iter::from_fn(|| handle.poll()).count();
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, generate);
criterion_main!(benches);
