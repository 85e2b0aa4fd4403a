//! One model on several devices: here CPUs, with sums on the host.

use super::*;
use crate::kernels::all_reduce::{AllReduce, HostSum};
use crate::train::replicas::Replica;

fn group(count: usize) -> Group {
    Group { devices: vec![Device::Cpu; count], sums: Box::new(HostSum) }
}

/// Steps of five sequences in micro-batches of one.
fn several(count: usize, peak: f64) -> Trainer {
    several_that_drop(count, peak, 0.0)
}

fn several_that_drop(count: usize, peak: f64, probability: f64) -> Trainer {
    let settings = TrainSettings { micro_batch_tokens: 20, ..settings(false, peak) };
    let settings = dropping(settings, probability);
    let config = config();
    let values = initial(&config, 1, &Device::Cpu).unwrap();
    Trainer::of(&config, values, settings, DType::F32, group(count)).unwrap()
}

fn five(seed: u64) -> Vec<Sequence> {
    let mut five: Vec<Sequence> = (0..3).flat_map(|i| sequences(10 * seed + i)).take(5).collect();
    five[4].learned.fill(false); // micro-batches weigh differently
    five[4].learned[5] = true;
    five
}

fn values_of(replica: &Replica) -> Vec<Vec<f32>> {
    let parameters = replica.parameters.iter();
    let state = parameters.flat_map(|(_, parameter)| {
        let (mean, mean_square) = parameter.moments().unwrap();
        [parameter.value().unwrap(), mean, mean_square]
    });
    state.map(|tensor| tensor.flatten_all().unwrap().to_vec1().unwrap()).collect()
}

fn bits_of(replica: &Replica) -> Vec<u32> {
    values_of(replica).concat().into_iter().map(f32::to_bits).collect()
}

/// The largest difference of two parameters, or of two moments.
fn distance(a: &Trainer, b: &Trainer) -> f32 {
    let (a, b) = (values_of(a.replicas.first()).concat(), values_of(b.replicas.first()).concat());
    assert_eq!(a.len(), b.len());
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn several_devices_learn_what_one_learns_but_for_the_order_of_a_sum() {
    for (count, dropped) in [(2, 0.0), (3, 0.0), (7, 0.0), (3, 0.2)] {
        let several = |count| several_that_drop(count, 1e-3, dropped);
        let (mut one, mut all) = (several(1), several(count));
        for step in 0..4 {
            let (expected, found) =
                (one.step(&five(step)).unwrap(), all.step(&five(step)).unwrap());
            if step == 0 {
                assert_eq!(found.loss.to_bits(), expected.loss.to_bits());
                assert_eq!(found.sources, expected.sources);
            }
            assert!((found.loss / expected.loss - 1.0).abs() < 1e-5, "{count}: {found:?}");
            assert!((found.grad_norm / expected.grad_norm - 1.0).abs() < 1e-5, "{count}");
            assert_eq!((found.learned, found.next_sequence), (4 * 18 + 1, 5 * step + 5));
        }
        let far = distance(&one, &all);
        assert!(far < 2e-5, "{count}: {far}");
        let held_out = five(9);
        let (one, all) = (one.evaluate(&held_out).unwrap(), all.evaluate(&held_out).unwrap());
        assert!((one / all - 1.0).abs() < 1e-5, "{one} and {all}");
    }
}

#[test]
fn replicas_stay_equal_bit_by_bit() {
    let mut trainer = several(3, 1e-2);
    let start = bits_of(trainer.replicas.first());
    for step in 0..6 {
        trainer.step(&five(step)).unwrap();
        let first = bits_of(trainer.replicas.first());
        assert_ne!(first, start);
        assert!(trainer.replicas.all.iter().all(|replica| bits_of(replica) == first), "{step}");
    }
}

#[test]
fn a_resumed_run_on_several_devices_ends_with_the_same_bits() {
    let place = tempfile::tempdir().unwrap();
    let (mut whole, mut parts) = (several(2, 1e-2), several(2, 1e-2));
    for step in 0..5 {
        let expected = whole.step(&five(step)).unwrap();
        let path = parts.snapshot().unwrap().save(place.path(), &small()).unwrap();
        let settings = *parts.settings();
        parts = Trainer::resume_of(&path, settings, DType::F32, group(2)).unwrap();
        assert_eq!(parts.step(&five(step)).unwrap(), expected);
    }
    let all = whole.replicas.all.iter().zip(&parts.replicas.all);
    assert!(all.into_iter().all(|(a, b)| bits_of(a) == bits_of(b)));
    assert_eq!(parts.progress(), whole.progress());
}

/// That a step ends with an error that says so, and leaves all replicas as they were.
fn check_failure(trainer: &mut Trainer, sequences: &[Sequence], said: &str) {
    let before: Vec<_> = trainer.replicas.all.iter().map(bits_of).collect();
    let progress = trainer.progress();
    let error = trainer.step(sequences).unwrap_err().to_string();
    assert!(error.contains(said), "{said:?} in {error}");
    assert_eq!(trainer.replicas.all.iter().map(bits_of).collect::<Vec<_>>(), before);
    assert_eq!(trainer.progress(), progress);
}

#[test]
fn a_device_that_fails_stops_the_step_and_leaves_no_other_waiting() {
    let mut trainer = several(3, 1e-2);
    let mut unknown = five(0);
    unknown[4].tokens[3] = small().vocabulary() as u32; // the fifth micro-batch is dealt to device 1
    let mut trained = several(3, 1e-2);
    check_failure(&mut trainer, &unknown, "on device 1 of 3");
    trainer.step(&five(1)).unwrap();
    trained.step(&five(1)).unwrap();
    assert_eq!(bits_of(trainer.replicas.first()), bits_of(trained.replicas.first()));
}

#[test]
fn the_error_of_a_device_is_told_once_all_are_back() {
    let mut trainer = several(3, 1e-2);
    let back = std::sync::atomic::AtomicUsize::new(0);
    let answers = trainer.replicas.on_each(|rank, _| {
        back.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if rank == 1 { Err(Error::Stopped("out of memory".into())) } else { Ok(rank) }
    });
    assert_eq!(answers.unwrap_err().to_string(), "out of memory");
    assert_eq!(back.into_inner(), 3);
    assert_eq!(trainer.replicas.on_each(|rank, _| Ok(rank)).unwrap(), [0, 1, 2]);
}

/// Sums that fail, or that one rank gets wrong.
#[derive(Debug)]
enum Broken {
    Refuses,
    GivesRankOneAnother,
}

impl AllReduce for Broken {
    fn sum(&self, parts: &[Tensor]) -> candle_core::Result<()> {
        HostSum.sum(parts)?;
        match self {
            Broken::Refuses => candle_core::bail!("a link is down"),
            Broken::GivesRankOneAnother => {
                let other = (&parts[1] * 1.001)?;
                parts[1].slice_set(&other, 0, 0)
            }
        }
    }

    fn wait(&self) -> candle_core::Result<()> {
        Ok(())
    }
}

#[test]
fn sums_that_fail_or_differ_stop_the_step() {
    for (broken, said) in
        [(Broken::Refuses, "a link is down"), (Broken::GivesRankOneAnother, "other gradients")]
    {
        let values = initial(&config(), 1, &Device::Cpu).unwrap();
        let group = Group { devices: vec![Device::Cpu; 2], sums: Box::new(broken) };
        let settings = settings(false, 1e-2);
        let trainer = Trainer::of(&config(), values, settings, DType::F32, group);
        check_failure(&mut trainer.unwrap(), &five(0), said);
    }
}

#[test]
fn guards_look_at_the_whole_step() {
    let values = initial(&config(), 1, &Device::Cpu).unwrap();
    let settings = settings(false, 1e-2);
    let mut trainer = Trainer::of(&config(), values, settings, DType::F32, group(2)).unwrap();
    let mut table = trainer.replicas.all.iter().map(|replica| {
        replica.parameters.get("model.embed_tokens.weight").unwrap().value().unwrap()
    });
    let nan = Tensor::full(f32::NAN, (1, 16), &Device::Cpu).unwrap();
    table.try_for_each(|table| table.slice_set(&nan, 0, POISON as usize)).unwrap();
    drop(table);
    check_failure(&mut trainer, &poisoned(), "--on-nonfinite skip");
    trainer = trainer.with_guards(guards(OnFault::Skip, None));
    assert_eq!(trainer.step(&poisoned()).unwrap().skipped, Some(Fault::Nonfinite));
    assert_eq!(trainer.step(&five(0)).unwrap().skipped, None);
}

#[test]
fn a_step_has_work_for_every_device() {
    let check = |sequences, devices, works| {
        let found = check_dealing(sequences, 512, 4096, devices).map_err(|error| error.to_string());
        assert_eq!(found.is_ok(), works, "{sequences} for {devices}: {found:?}");
    };
    check(8, 1, true);
    check(8, 2, false);
    check(9, 2, true);
    check(32, 4, true);
    check(24, 4, false);
    assert!(check_dealing(2, 8192, 4096, 2).is_ok());
    assert!(Group::new(&[]).is_err());
}
