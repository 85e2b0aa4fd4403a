//! A whole small model: on the CPU, and on every machine with kernels of its own that is there.

use super::super::backward::{Batch, Gradients, Keep, Learning};
use super::super::{Form, Llama, sampled};
use super::*;
use crate::kernels::cached::Run;
use crate::kernels::cross_entropy::Objective;
use crate::kernels::cuda::testing::{Tested, machines};
use crate::kernels::packed::WeightType;
use crate::model::shape::Shape;
use crate::seed;

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 300,
        max_position_embeddings: 800,
        num_hidden_layers: 2,
        sliding_window: Some(600),
        tie_word_embeddings: false,
        ..Shape::named("2m").unwrap().config()
    }
}

fn parameter(name: &str, shape: &[usize], dtype: DType) -> LoadResult<Tensor> {
    let mut stream = seed::stream(5, name, "gpu parity");
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| 0.1 * stream.normal() as f32).collect();
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
    let tensor = if name.contains("norm") { (tensor + 1.0)? } else { tensor };
    Ok(tensor.to_dtype(dtype)?)
}

/// The model on a machine.
fn on(tested: &Tested, dtype: DType) -> Llama {
    let machine = tested.machine.clone();
    Llama::build_on(&config(), machine, |name, shape| parameter(name, shape, dtype)).unwrap()
}

/// The model on the CPU.
fn twin(form: Form, dtype: DType) -> Llama {
    Llama::build(&config(), form, &Device::Cpu, |name, shape| parameter(name, shape, dtype))
        .unwrap()
}

/// Logits of all rows of two sequences: one in one piece, of one row; the other in pieces.
fn logits(model: &Llama) -> Tensor {
    let mut cache = model.cache(3).unwrap();
    let id = |i: usize| (i * 37 % 300) as u32;
    let mut all = Vec::new();
    for (position, rows) in [(0, 70), (70, 1), (71, 3)] {
        let long = Run { first_row: 0, rows, position, table: vec![2, 0] };
        let mut runs = vec![long];
        let mut positions: Vec<u32> = (position..position + rows).map(|p| p as u32).collect();
        if position == 0 {
            runs.push(Run { first_row: rows, rows: 1, position: 0, table: vec![1] });
            positions.push(0);
        }
        let ids: Vec<u32> = positions.iter().map(|&p| id(p as usize)).collect();
        let samples: Vec<u32> = (0..ids.len() as u32).collect();
        let rows = StepRows { ids: &ids, positions: &positions, runs: &runs, samples: &samples };
        let stepped = model.step(&mut cache, &rows).unwrap();
        let logits = stepped.logits().unwrap();
        let largest = stepped.most_likely().unwrap();
        let twin: Vec<u32> = logits.argmax(1).unwrap().to_vec1().unwrap();
        assert_eq!(largest, twin, "the largest of the logits");
        all.push(logits);
    }
    Tensor::cat(&all, 0).unwrap()
}

/// The noise of a model, as a share of the signal.
fn noise(found: &Tensor, exact: &Tensor) -> f32 {
    let mean = |t: &Tensor| t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    mean(&(found - exact).unwrap()) / mean(exact)
}

#[test]
fn logits_are_those_of_the_cpu() {
    let exact = logits(&twin(Form::Plain, DType::F32));
    let on_cpu = noise(&logits(&twin(Form::PackedAs(WeightType::Bf16), DType::F32)), &exact);
    for tested in machines() {
        let found = noise(&logits(&on(&tested, DType::F32)), &exact);
        assert!(found < 1e-10, "f32 on {}: noise is {found} of the signal", tested.name);
        let found = noise(&logits(&on(&tested, DType::BF16)), &exact);
        assert!(found < 3.0 * on_cpu, "bf16 on {}: {found}, on the CPU {on_cpu}", tested.name);
        let found = noise(&logits(&on(&tested, DType::F16)), &exact);
        assert!(found < on_cpu / 4.0, "f16 on {}: {found}, bf16 on the CPU {on_cpu}", tested.name);
    }
}

#[test]
fn rows_that_nobody_asks_for_change_neither_those_asked_for_nor_later_steps() {
    let off = |found: &[Vec<f32>], exact: &[Vec<f32>]| {
        let [found, exact] = [found, exact].map(|t| Tensor::new(t.concat(), &Device::Cpu).unwrap());
        noise(&found, &exact)
    };
    let exact = sampled::all_logits(&twin(Form::Plain, DType::F32));
    let rounded = sampled::all_logits(&twin(Form::PackedAs(WeightType::Bf16), DType::F32));
    let on_cpu = off(&rounded[0], &exact[0]);
    for tested in machines() {
        for (dtype, bound) in [(DType::F32, 1e-10), (DType::BF16, 3.0 * on_cpu)] {
            let model = on(&tested, dtype);
            for samples in sampled::CASES {
                let [found, later] = sampled::logits(&model, samples);
                let what = format!("{dtype:?} on {}, rows {samples:?}", tested.name);
                let noise = off(&later, &exact[1]);
                assert!(noise < bound, "{what}: {noise} of the signal in the next step");
                let wanted: Vec<_> =
                    samples.iter().map(|&row| exact[0][row as usize].clone()).collect();
                assert_eq!(found.len(), wanted.len(), "{what}");
                if !samples.is_empty() {
                    let noise = off(&found, &wanted);
                    assert!(noise < bound, "{what}: noise is {noise} of the signal");
                }
            }
        }
    }
}

/// Three items, one of a single row; every third token has no target.
fn batch() -> Batch {
    let mut batch = Batch { spans: vec![0..70, 70..71, 71..150], ..Batch::default() };
    for (row, position) in batch.spans.clone().into_iter().flat_map(|span| {
        let start = span.start;
        span.map(move |row| (row, row - start))
    }) {
        batch.ids.push((row * row * 7 % 300) as u32);
        batch.positions.push(position as u32);
        if row % 3 != 0 {
            batch.rows.push(row as u32);
            batch.targets.push((row * 5 % 300) as u32);
        }
    }
    batch
}

/// Losses and gradients of a model in training on a device.
fn learned(device: &Device, dtype: DType, keep: Keep) -> (Tensor, Gradients) {
    let get = |name: &str, shape: &[usize]| Ok(parameter(name, shape, dtype)?.to_device(device)?);
    let config = ModelConfig { sliding_window: Some(40), ..config() };
    let model = Llama::build(&config, Form::Plain, device, get).unwrap();
    let mut gradients = Gradients::default();
    let objective = Objective { scale: 0.01, z_loss: 1e-3 };
    let learning = Learning { objective, keep, dropout: None };
    let losses = model.learn(&batch(), learning, &mut gradients).unwrap();
    assert_eq!(losses, model.losses(&batch()).unwrap(), "losses without gradients");
    let losses: Vec<f32> = losses.into_iter().map(|loss| loss as f32).collect();
    (Tensor::new(losses, &Device::Cpu).unwrap(), gradients)
}

/// The largest noise among losses and gradients.
fn learned_noise(found: &(Tensor, Gradients), exact: &(Tensor, Gradients)) -> f32 {
    let on_cpu = |t: &Tensor| t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let of = exact.1.iter().map(|(name, exact)| noise(&on_cpu(found.1.of(name).unwrap()), exact));
    of.fold(noise(&found.0, &exact.0), f32::max)
}

#[test]
fn what_is_learned_is_that_of_the_cpu() {
    let exact = learned(&Device::Cpu, DType::F32, Keep::Everything);
    let composed = learned(&Device::Cpu, DType::BF16, Keep::Everything);
    let bound = learned_noise(&composed, &exact);
    for tested in machines() {
        for keep in [Keep::Everything, Keep::Inputs] {
            let on = |dtype| tested.trains(|| learned(&tested.device, dtype, keep));
            let found = learned_noise(&on(DType::F32), &exact);
            assert!(found < 1e-8, "f32 on {}: noise is {found:e}", tested.name);
            let found = learned_noise(&on(DType::BF16), &exact);
            assert!(found < bound, "bf16 on {}: {found:e}, composed {bound:e}", tested.name);
        }
    }
}

#[test]
fn what_there_are_no_kernels_for_is_refused() {
    for tested in machines() {
        let refused = |config: &ModelConfig, reason: &str| {
            let machine = tested.machine.clone();
            let model =
                Llama::build_on(config, machine, |name, shape| parameter(name, shape, DType::F32));
            let error = model.map(|_| ()).unwrap_err().to_string();
            assert!(error.starts_with("this model cannot run on a GPU: "), "{error}");
            assert!(error.contains(reason), "{error}");
        };
        let wide = ModelConfig { head_dim: 512, ..config() };
        refused(&wide, "heads of at most 256 columns, a multiple of 4, not 512");
        let odd = ModelConfig { intermediate_size: 30, ..config() };
        refused(&odd, "30 columns are not a multiple of 4");
    }
}
