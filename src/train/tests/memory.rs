//! How much memory training takes, beside what is told before it is taken.

use super::*;
use crate::kernels::cuda::footprint;
use crate::kernels::cuda::testing::machines;
use crate::kernels::cuda::{forget_peak, peak_bytes};
use crate::model::backward::Keep;
use crate::model::size::Step;
use candle_core::DType::{BF16, F32};
use rayon::ThreadPoolBuilder;

/// What decides how much memory steps take.
#[derive(Debug)]
struct Case {
    compute: DType,
    recompute: bool,
    dropped: f64,
    is_tied: bool,
    micro_batches: usize,
}

/// How large a model is, the item of each sequence of a step, and how many steps are made.
struct Size {
    vocabulary: usize,
    hidden: usize,
    tokens: u32,
    sequences: u32,
    steps: usize,
}

const CASES: [Case; 6] = [
    Case { compute: F32, recompute: false, dropped: 0.0, is_tied: true, micro_batches: 1 },
    Case { compute: F32, recompute: true, dropped: 0.0, is_tied: false, micro_batches: 2 },
    Case { compute: BF16, recompute: false, dropped: 0.3, is_tied: false, micro_batches: 1 },
    Case { compute: BF16, recompute: true, dropped: 0.0, is_tied: true, micro_batches: 4 },
    Case { compute: BF16, recompute: true, dropped: 0.0, is_tied: true, micro_batches: 1 },
    Case { compute: F32, recompute: true, dropped: 0.0, is_tied: false, micro_batches: 1 },
];

impl Case {
    /// That a trainer and its steps take what is told before, but for so large a share of it.
    fn check(&self, size: &Size, (device, is_host): (&Device, bool), share: f64) {
        let Case { compute, recompute, dropped, is_tied, micro_batches } = *self;
        let config = ModelConfig {
            vocab_size: size.vocabulary,
            hidden_size: size.hidden,
            intermediate_size: 5 * size.hidden / 2,
            num_hidden_layers: 4,
            head_dim: size.hidden / 4,
            max_position_embeddings: size.tokens as usize,
            tie_word_embeddings: is_tied,
            ..config()
        };
        let rows = (size.sequences * size.tokens) as usize / micro_batches;
        let settings = TrainSettings {
            batch_sequences: size.sequences as usize,
            micro_batch_tokens: rows,
            ..dropping(settings(recompute, 1e-3), dropped)
        };
        let keep = if recompute { Keep::Inputs } else { Keep::Everything };
        let has_dropout = dropped > 0.0;
        let step = Step { config: &config, compute, keep, has_dropout, rows, micro_batches };
        let told = step_bytes(&step, is_host).unwrap() as f64;
        let sequences: Vec<Sequence> =
            (0..size.sequences).map(|index| size.sequence(index)).collect();
        let most = most_of(device, || {
            let values = initial(&config, 1, device).unwrap();
            let devices = std::slice::from_ref(device);
            let mut trainer = Trainer::new(&config, values, settings, compute, devices).unwrap();
            (0..size.steps).for_each(|_| drop(trainer.step(&sequences).unwrap()));
        });
        let off = most as f64 / told - 1.0;
        assert!(
            off.abs() < share,
            "{self:?} on {device:?}: {most} bytes are {off} off the {told} that were told"
        );
    }
}

impl Size {
    /// A sequence of one item.
    fn sequence(&self, index: u32) -> Sequence {
        let length = self.tokens;
        let segment = Segment { item: "item".into(), source: 0, offset: 0, length };
        let token = |token| (index * length + token) * 37 % self.vocabulary as u32;
        let (tokens, learned) = ((0..length).map(token).collect(), vec![true; length as usize]);
        Sequence { tokens, learned, segments: vec![segment], shots: Vec::new() }
    }
}

/// The most bytes that this thread holds at a time while work is done, or that are in use on a GPU, beyond those before.
fn most_of(device: &Device, work: impl FnOnce()) -> usize {
    if device.is_cpu() {
        return footprint::most_of(work).1;
    }
    let devices = std::slice::from_ref(device);
    let peak = || {
        device.synchronize().unwrap(); // what was given back is free then
        peak_bytes(devices).unwrap().expect("a GPU that trains counts its bytes")
    };
    device.synchronize().unwrap();
    forget_peak(devices).unwrap();
    let before = peak();
    work();
    (peak() - before) as usize
}

#[test]
fn a_cpu_takes_what_was_told() {
    // One thread that does everything, and nothing of other tests: what it takes is all.
    let alone = ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    // It has buffers for products and attention besides, which do not grow with the model.
    let size = Size { vocabulary: 2000, hidden: 256, tokens: 256, sequences: 4, steps: 3 };
    alone.install(|| CASES.iter().for_each(|case| case.check(&size, (&Device::Cpu, true), 0.1)));
}

#[test]
fn tensors_take_what_was_told() {
    // One order of threads: what is held does not depend on it.
    if let Some(tested) = machines().into_iter().find(|tested| tested.device.is_cpu()) {
        let size = Size { vocabulary: 300, hidden: 64, tokens: 32, sequences: 4, steps: 3 };
        // More rows than the head takes at a time.
        let long = Size { vocabulary: 600, tokens: 8, sequences: 260, steps: 1, ..size };
        let emulated = (&tested.device, false);
        tested.trains(|| {
            CASES.iter().for_each(|case| case.check(&size, emulated, 0.05));
            CASES[4].check(&long, emulated, 0.05);
        });
    }
    // A GPU hands out whole units of memory, and positions and tiles are on it: larger tensors. Other tests of this
    // program would be counted, too.
    for tested in machines().into_iter().filter(|tested| !tested.device.is_cpu()) {
        let size = Size { vocabulary: 4000, hidden: 512, tokens: 512, sequences: 4, steps: 3 };
        let gpu = (&tested.device, false);
        CASES.iter().for_each(|case| case.check(&size, gpu, 0.1));
    }
}
