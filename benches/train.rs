//! How fast does the trainer learn? Forward, backward and AdamW on packed sequences, in tokens a second.

use candle_core::{DType, Device};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use headwater::augment::item;
use headwater::pack::{PackMode, Packer};
use headwater::record::Sequence;
use headwater::train::optimizer::AdamW;
use headwater::train::schedule::Schedule;
use headwater::train::{TrainSettings, Trainer};
use headwater_benches::{synthesizer, texts};

const LENGTH: usize = 512;
const BATCH: usize = 8;

fn sequences() -> Vec<Sequence> {
    let tokenizer = synthesizer().tokenizer;
    let mut packer = Packer::new(LENGTH, PackMode::default());
    let items = texts().into_iter().enumerate();
    items
        .flat_map(|(index, text)| packer.push(&item(&index.to_string(), 0, &text, &tokenizer)))
        .take(BATCH)
        .collect()
}

fn train(criterion: &mut Criterion) {
    let model = synthesizer();
    let values = model.parameters(1, &Device::Cpu).expect("it loads");
    let settings = TrainSettings {
        batch_sequences: BATCH,
        micro_batch_tokens: 4096,
        schedule: Schedule { peak: 1e-4, warmup_steps: 0, total_steps: 1 << 30, floor_share: 0.1 },
        optimizer: AdamW {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
        },
        recompute: false,
    };
    let device = Device::Cpu;
    let mut trainer = Trainer::new(&model.config, values, settings, DType::F32, &device)
        .expect("the parameters fit the config");
    let sequences = sequences();
    let tokens: usize = sequences.iter().map(|sequence| sequence.tokens.len()).sum();
    let mut group = criterion.benchmark_group("train");
    group.throughput(Throughput::Elements(tokens as u64)).sample_size(10);
    group.bench_function(format!("{LENGTH} x {BATCH}, f32"), |bencher| {
        bencher.iter(|| trainer.step(&sequences).expect("it does not diverge"));
    });
    group.finish();
}

criterion_group!(benches, train);
criterion_main!(benches);
