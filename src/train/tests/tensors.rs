//! The trainer in tensors, as on a GPU: on the emulation, and on a GPU where there is one.

use super::*;
use crate::kernels::cuda::testing::{Tested, machines};
use candle_core::DType::{BF16, F32};

fn trainer_on(tested: &Tested, settings: TrainSettings, compute: DType) -> Trainer {
    let config = config();
    let values = initial(&config, 1, &tested.device).unwrap();
    Trainer::new(&config, values, settings, compute, std::slice::from_ref(&tested.device)).unwrap()
}

/// Losses and gradient norms of some steps.
fn learned(mut trainer: Trainer) -> Vec<[f64; 2]> {
    let step = |step| {
        let report = trainer.step(&sequences(step)).unwrap();
        [report.loss, report.grad_norm]
    };
    (0..3).map(step).collect()
}

fn on_cpu(settings: TrainSettings) -> Trainer {
    let config = config();
    let values = initial(&config, 1, &Device::Cpu).unwrap();
    Trainer::new(&config, values, settings, F32, &[Device::Cpu]).unwrap()
}

#[test]
fn steps_in_tensors_are_those_of_the_cpu() {
    let plain = TrainSettings { z_loss: 1e-3, ..settings(false, 1e-2) };
    for settings in [plain, TrainSettings { recompute: true, ..dropping(plain, 0.3) }] {
        let expected = learned(on_cpu(settings));
        for tested in machines() {
            for (compute, most) in [(F32, 1e-4), (BF16, 2e-2)] {
                let run = || learned(trainer_on(&tested, settings, compute));
                let found = tested.trains(run);
                for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
                    let off = (found / expected - 1.0).abs();
                    assert!(off < most, "{compute:?} on {}: {found}, {expected}", tested.name);
                }
            }
        }
    }
}

#[test]
fn a_resumed_run_in_tensors_ends_with_the_same_bits() {
    // Both runs take products of the same shapes in the same order, which cuBLAS computes to the same bits.
    for tested in machines() {
        for (compute, recompute, dropped) in [(F32, false, 0.0), (BF16, true, 0.3)] {
            let place = tempfile::tempdir().unwrap();
            let settings = dropping(settings(recompute, 1e-2), dropped);
            let devices = [tested.device.clone()];
            tested.trains(|| {
                let mut whole = trainer_on(&tested, settings, compute);
                let mut parts = trainer_on(&tested, settings, compute);
                for step in 0..3 {
                    let path = parts.snapshot().unwrap().save(place.path(), &small()).unwrap();
                    parts = Trainer::resume(&path, settings, compute, &devices).unwrap();
                    let (found, expected) =
                        (parts.step(&sequences(step)), whole.step(&sequences(step)));
                    assert_eq!(found.unwrap(), expected.unwrap(), "{compute:?}, {}", tested.name);
                }
                assert_eq!(bits(&parts), bits(&whole), "{compute:?} on {}", tested.name);
            });
        }
    }
}

/// A micro-batch, and a whole step, in which nothing is to be learned.
#[test]
fn what_has_no_targets_is_no_error_in_tensors() {
    let parts = |from: usize| {
        let mut all = sequences(0);
        all[from..].iter_mut().for_each(|sequence| sequence.learned.fill(false));
        all
    };
    let steps = [parts(1), parts(0), sequences(1)];
    let run = |mut trainer: Trainer| {
        let losses: Vec<f64> = steps.iter().map(|step| trainer.step(step).unwrap().loss).collect();
        (losses, trainer.evaluate(&parts(1)).unwrap(), trainer.evaluate(&parts(0)).unwrap())
    };
    let settings = settings(false, 1e-2);
    let (expected, part, none) = run(on_cpu(settings));
    for tested in machines() {
        let found = tested.trains(|| run(trainer_on(&tested, settings, F32)));
        for (found, expected) in found.0.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-4, "{found} and {expected} on {}", tested.name);
        }
        assert!((found.1 - part).abs() < 1e-4 && found.2 == none, "{found:?} on {}", tested.name);
    }
}

#[test]
fn a_bad_step_in_tensors_is_skipped_and_changes_nothing() {
    for tested in machines() {
        tested.trains(|| {
            let mut trainer = trainer_on(&tested, settings(false, 1e-2), BF16);
            trainer = trainer.with_guards(guards(OnFault::Skip, None));
            let table = trainer.replicas.first().parameters.get("model.embed_tokens.weight");
            let nan = Tensor::full(f32::NAN, (1, 16), &tested.device).unwrap();
            let table = table.unwrap();
            table.value().unwrap().slice_set(&nan, 0, POISON as usize).unwrap();
            table
                .clone()
                .computed_in(BF16)
                .unwrap()
                .slice_set(&nan.to_dtype(BF16).unwrap(), 0, POISON as usize)
                .unwrap();
            let before = bits(&trainer);
            assert_eq!(trainer.step(&poisoned()).unwrap().skipped, Some(Fault::Nonfinite));
            assert_eq!(bits(&trainer), before);
            assert_eq!(trainer.step(&sequences(0)).unwrap().skipped, None);
            assert_ne!(bits(&trainer), before);
        });
    }
}
