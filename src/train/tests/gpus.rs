//! One model on two GPUs by NCCL, where there are two.

use super::*;
use crate::kernels::all_reduce::{AllReduce, HostSum, nccl};
use crate::model::device;

/// The first two GPUs. Says why not, where there are none.
fn gpus() -> Option<Vec<Device>> {
    match device::group("cuda:0,cuda:1") {
        Ok(devices) => Some(devices),
        Err(reason) => {
            skipped(&reason.to_string());
            None
        }
    }
}

#[cfg(test)]
fn skipped(reason: &str) {
    println!("skipped on two GPUs: {reason}");
}

fn on_host(tensor: &Tensor) -> Vec<f32> {
    tensor.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A part for each device, of numbers of many sizes.
fn parts(devices: &[Device], length: usize) -> Vec<Tensor> {
    let part = |(rank, device): (usize, &Device)| {
        let mut stream = seed::stream(rank as u64, &length.to_string(), "test");
        let mut number = || (stream.normal() * (8.0 * stream.normal()).exp()) as f32;
        let values: Vec<f32> = (0..length).map(|_| number()).collect();
        Tensor::new(values, device).unwrap()
    };
    devices.iter().enumerate().map(part).collect()
}

/// Two numbers have one sum, in whatever order: NCCL's must be that of the host, bit by bit.
#[test]
fn nccl_adds_two_parts_as_the_host_does() {
    let Some(devices) = gpus() else { return };
    let sums = nccl(&devices).unwrap();
    for length in [1, 1000, 1 << 20, (25 << 18) + 3] {
        let summed = |sums: &dyn AllReduce| {
            let parts = parts(&devices, length);
            sums.sum(&parts).unwrap();
            sums.wait().unwrap();
            parts.iter().map(on_host).collect::<Vec<_>>()
        };
        assert_eq!(summed(&*sums), summed(&HostSum), "{length} numbers");
    }
}

#[test]
fn two_gpus_learn_what_one_learns_but_for_the_order_of_a_sum() {
    let Some(devices) = gpus() else { return };
    let config = config();
    let settings = TrainSettings { micro_batch_tokens: 20, ..settings(false, 1e-3) };
    let trainer = |devices: &[Device]| {
        let values = initial(&config, 1, &devices[0]).unwrap();
        Trainer::new(&config, values, settings, DType::F32, devices).unwrap()
    };
    let (mut one, mut both) = (trainer(&devices[..1]), trainer(&devices));
    for step in 0..10 {
        let (expected, found) =
            (one.step(&sequences(step)).unwrap(), both.step(&sequences(step)).unwrap());
        assert!((found.loss / expected.loss - 1.0).abs() < 1e-4, "{found:?} {expected:?}");
        assert!(
            (found.grad_norm / expected.grad_norm - 1.0).abs() < 1e-3,
            "{found:?} {expected:?}"
        );
        let state = |rank: usize| -> Vec<Vec<f32>> {
            let parameters = both.replicas.all[rank].parameters.iter();
            parameters.map(|(_, parameter)| on_host(&parameter.value().unwrap())).collect()
        };
        assert_eq!(state(0), state(1), "step {step}");
    }
}
