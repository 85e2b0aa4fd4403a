//! Each kernel of training against its twin on the CPU, on every machine that is there.

use super::super::machine::Element;
use super::super::parity::{bits, near, rounded, rounding, values};
use super::super::testing::{Tested, machines};
use crate::kernels::adamw::{Parameter, Update};
use crate::kernels::attention::{Heads, attention, attention_backward};
use crate::kernels::cross_entropy::{Gradients, Objective, TENSOR_CHUNK, cross_entropy};
use crate::kernels::embedding::embed_backward;
use crate::kernels::rms_norm::{rms_norm, rms_norm_backward};
use crate::kernels::rope::{RopeTable, Turn, rope};
use crate::kernels::swiglu::{swiglu, swiglu_backward};
use crate::kernels::twin::random;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// A machine, and the type that its tensors have.
struct Bench {
    tested: Tested,
    element: Element,
}

impl Bench {
    /// A random tensor: where the machine takes it, and the same numbers in f32 on the CPU.
    fn random(&self, shape: &[usize]) -> (Tensor, Tensor) {
        self.place(&random(shape, DType::F32))
    }

    fn place(&self, tensor: &Tensor) -> (Tensor, Tensor) {
        let own = tensor.to_dtype(self.element.dtype()).unwrap();
        (own.to_device(&self.tested.device).unwrap(), rounded(tensor, self.element))
    }

    /// That a result is that of the twin, but for a rounding of it and of sums.
    fn near(&self, found: &Tensor, twin: &Tensor, what: &str) {
        let scale = values(twin).iter().fold(1.0f64, |top, x| top.max(x.abs()));
        let own = self.element.dtype() == found.dtype();
        let relative = 1e-5 + if own { rounding(self.element) } else { 0.0 };
        near(&down(found), twin, relative, 3e-6 * scale, &self.what(what));
    }

    fn what(&self, of: &str) -> String {
        format!("{of} in {} on {}", self.element.name(), self.tested.name)
    }
}

fn down(tensor: &Tensor) -> Tensor {
    tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
}

/// Calls `check` on every machine with every type that there are kernels for.
fn on_all(check: impl Fn(&Bench)) {
    for tested in machines() {
        for element in [Element::F32, Element::Bf16] {
            check(&Bench { tested: tested.clone(), element });
        }
    }
}

#[test]
fn rows_are_normalised_and_differentiated() {
    on_all(|bench| {
        for (rows, columns) in [(1, 1), (3, 7), (65, 100), (130, 33), (64, 1028)] {
            let (x, x_twin) = bench.random(&[rows, columns]);
            let (weight, weight_twin) = bench.random(&[columns]);
            let (gradient, gradient_twin) = bench.random(&[rows, columns]);
            let (out, (of_x, of_weight)) = bench.tested.trains(|| {
                let back = rms_norm_backward(&x, &weight, 1e-5, &gradient).unwrap();
                (rms_norm(&x, &weight, 1e-5).unwrap(), back)
            });
            assert_eq!(of_weight.dtype(), DType::F32);
            let twin = rms_norm(&x_twin, &weight_twin, 1e-5).unwrap();
            bench.near(&out, &twin, "rms_norm");
            let twin = rms_norm_backward(&x_twin, &weight_twin, 1e-5, &gradient_twin).unwrap();
            bench.near(&of_x, &twin.0, "gradient of rows");
            near(&down(&of_weight), &twin.1, 1e-5, 1e-4, &bench.what("gradient of a weight"));
        }
    });
}

#[test]
fn heads_are_turned_there_and_back() {
    on_all(|bench| {
        for (heads, half) in [(1, 1), (3, 4), (2, 15), (5, 32)] {
            let frequencies: Vec<f32> = (0..half).map(|i| 0.7f32.powi(i)).collect();
            let table = RopeTable::new(&frequencies, 40, DType::F32, &Device::Cpu).unwrap();
            let positions: Vec<u32> = (0..70).map(|row| row * 13 % 40).collect();
            let (x, x_twin) = bench.random(&[70, heads * 2 * half as usize]);
            let own = table.moved(bench.element.dtype(), &bench.tested.device).unwrap();
            let table = own.moved(DType::F32, &Device::Cpu).unwrap();
            for turn in [Turn::Forward, Turn::Back] {
                let found = bench.tested.trains(|| rope(&x, &own, &positions, turn).unwrap());
                let twin = rope(&x_twin, &table, &positions, turn).unwrap();
                bench.near(&found, &twin, "rope");
            }
        }
    });
}

#[test]
fn gates_open_and_are_differentiated() {
    on_all(|bench| {
        for (rows, columns) in [(1, 1), (3, 7), (3, 1100), (5, 2048)] {
            let spread = (random(&[rows, columns], DType::F32) * 3.0).unwrap();
            let (gate, gate_twin) = bench.place(&spread);
            let (up, up_twin) = bench.random(&[rows, columns]);
            let (gradient, gradient_twin) = bench.random(&[rows, columns]);
            let (out, back) = bench.tested.trains(|| {
                let out = swiglu(&gate, &up).unwrap();
                (out, swiglu_backward(&gate, &up, &gradient).unwrap())
            });
            bench.near(&out, &swiglu(&gate_twin, &up_twin).unwrap(), "swiglu");
            let twin = swiglu_backward(&gate_twin, &up_twin, &gradient_twin).unwrap();
            bench.near(&back.0, &twin.0, "gradient of gates");
            bench.near(&back.1, &twin.1, "gradient of what is gated");
        }
    });
}

#[test]
fn rows_of_a_token_are_added_in_their_order() {
    on_all(|bench| {
        for (rows, columns, vocabulary) in [(1, 1, 1), (200, 33, 70), (90, 1100, 500), (64, 8, 1)] {
            let ids: Vec<u32> = (0..rows).map(|i| (i * i * 13 % vocabulary) as u32).collect();
            let (gradient, twin) = bench.random(&[rows, columns]);
            let found = bench.tested.trains(|| embed_backward(&gradient, &ids, vocabulary));
            let twin = embed_backward(&twin, &ids, vocabulary).unwrap();
            assert_eq!(bits(&down(&found.unwrap())), bits(&twin), "{}", bench.what("embedding"));
        }
    });
}

/// Losses and gradients of rows of logits in f64.
fn losses_of(logits: &Tensor, targets: &[u32], objective: Objective) -> (Vec<f64>, Vec<f64>) {
    let columns = logits.dim(1).unwrap();
    let (mut losses, mut gradients) = (Vec::new(), Vec::new());
    for (row, &target) in values(logits).chunks_exact(columns).zip(targets) {
        let total: f64 = row.iter().map(|x| x.exp()).sum();
        losses.push(total.ln() - row[target as usize]);
        let pull = 1.0 + 2.0 * objective.z_loss * total.ln();
        gradients.extend(row.iter().enumerate().map(|(i, x)| {
            let is_target = f64::from(u8::from(i == target as usize));
            objective.scale * (x.exp() / total * pull - is_target)
        }));
    }
    (losses, gradients)
}

#[test]
fn logits_become_losses_and_their_own_gradient() {
    on_all(|bench| {
        for (rows, columns) in [(1, 1), (3, 7), (5, 1024), (3, 4099), (2, 5000)] {
            let spread = (random(&[rows, columns], DType::F32) * 4.0).unwrap();
            let (logits, twin) = bench.place(&spread);
            let targets: Vec<u32> = (0..rows).map(|row| (row * 7919 % columns) as u32).collect();
            let objective = Objective { scale: 0.25, z_loss: 0.01 };
            let (twin_losses, twin_gradients) = losses_of(&twin, &targets, objective);
            for wanted in [Gradients::Skip, Gradients::Of(objective)] {
                let machine = &*bench.tested.machine;
                let (losses, in_place) =
                    super::cross_entropy(machine, logits.clone(), &targets, wanted).unwrap();
                assert_eq!(in_place.is_some(), wanted != Gradients::Skip);
                let expected = Tensor::new(twin_losses.as_slice(), &Device::Cpu).unwrap();
                near(&down(&losses), &expected, 1e-6, 1e-5, &bench.what("losses"));
            }
            let expected = Tensor::from_vec(twin_gradients, (rows, columns), &Device::Cpu);
            bench.near(&logits, &expected.unwrap(), "gradient of logits");
        }
    });
}

#[test]
fn losses_of_all_chunks_are_those_of_the_cpu() {
    on_all(|bench| {
        for (rows, vocabulary) in [(0, 129), (5, 129), (300, 129), (TENSOR_CHUNK + 9, 12)] {
            if rows == 0 && !bench.tested.device.is_cpu() {
                continue; // a GPU has no tensors of nothing
            }
            let small = (random(&[rows, 24], DType::F32) * 0.3).unwrap();
            let (hidden, hidden_twin) = bench.place(&small);
            let (weight, weight_twin) = bench.random(&[vocabulary, 24]);
            let targets: Vec<u32> = (0..rows).map(|row| (row * 7 % vocabulary) as u32).collect();
            let wanted = Gradients::Of(Objective { scale: 0.25, z_loss: 0.01 });
            let found =
                bench.tested.trains(|| cross_entropy(&hidden, &weight, &targets, wanted).unwrap());
            let twin = cross_entropy(&hidden_twin, &weight_twin, &targets, wanted).unwrap();
            // Logits are rounded, those of some size by more.
            let error = 1e-5 + 8.0 * rounding(bench.element);
            for (found, twin) in found.losses.iter().zip(&twin.losses) {
                assert!((found - twin).abs() < error, "{}", bench.what("losses"));
            }
            let (found, twin) = (found.gradients.unwrap(), twin.gradients.unwrap());
            assert_eq!(found.1.dtype(), DType::F32);
            near(&down(&found.0), &twin.0, 0.0, 4.0 * error, &bench.what("gradient of rows"));
            near(&down(&found.1), &twin.1, 0.0, 4.0 * error, &bench.what("gradient of a head"));
        }
    });
}

#[test]
fn parameters_and_their_copies_move_to_the_bits_of_the_cpu() {
    for tested in machines() {
        for (shape, computed) in [
            ([1, 1], DType::F32),
            ([7, 5], DType::BF16),
            ([40, 100], DType::BF16),
            ([40, 100], DType::F32),
            ([9, 3], DType::F16),
            ([12, 12], DType::F16),
        ] {
            let start = random(&shape, DType::F32);
            let mut twin = Parameter::new(&start).unwrap();
            let mut own = Parameter::new(&start.to_device(&tested.device).unwrap()).unwrap();
            let copies = [&mut own, &mut twin].map(|all| all.computed_in(computed).unwrap());
            for step in 1..=4 {
                let gradient = random(&shape, DType::F32);
                let (rate, decay, gradient_scale) = (1e-2, 0.1, 0.5);
                let (beta1, beta2, epsilon) = (0.9, 0.95, 1e-8);
                let update = Update { rate, beta1, beta2, epsilon, decay, step, gradient_scale };
                twin.update(&gradient, &update).unwrap();
                let gradient = gradient.to_device(&tested.device).unwrap();
                tested.trains(|| own.update(&gradient, &update).unwrap());
            }
            let all = |parameter: &Parameter| {
                let (mean, square) = parameter.moments().unwrap();
                [parameter.value().unwrap(), mean, square].map(|part| bits(&down(&part)))
            };
            let what = format!("{shape:?} in {} on {}", computed.as_str(), tested.name);
            assert_eq!(all(&own), all(&twin), "{what}");
            let [copy, copy_of_twin] = copies.map(|copy| bits(&down(&copy)));
            assert_eq!(copy, copy_of_twin, "copy of {what}");
            let rounded = own.value().unwrap().to_dtype(computed).unwrap();
            assert_eq!(copy, bits(&down(&rounded)), "copy of {what}");
        }
    }
}

const HEADS: Heads = Heads { query: 4, key_value: 2, width: 32, window: None };

/// Output, and gradients of queries, keys and values.
fn attended(
    qkv: &[Tensor; 3],
    gradient: &Tensor,
    spans: &[Range<usize>],
    heads: &Heads,
) -> [Tensor; 4] {
    let [q, k, v] = qkv;
    let attended = attention(q, k, v, spans, heads).unwrap();
    let back = attention_backward([q, k, v], &attended, gradient, spans, heads).unwrap();
    let [of_q, of_k, of_v] = back;
    [attended.output, of_q, of_k, of_v]
}

/// Compares with the CPU; returns the bits of the output and of all gradients.
fn check_attention(
    bench: &Bench,
    inputs: &[Tensor; 4],
    spans: &[Range<usize>],
    heads: &Heads,
) -> Vec<Vec<u32>> {
    let placed = inputs.each_ref().map(|input| bench.place(input));
    let [q, k, v, gradient] = placed.each_ref().map(|(own, _)| own.clone());
    let found = bench.tested.trains(|| attended(&[q, k, v], &gradient, spans, heads));
    let [q, k, v, gradient] = placed.map(|(_, twin)| twin);
    let twin = attended(&[q, k, v], &gradient, spans, heads);
    let names = ["output", "gradient of q", "gradient of k", "gradient of v"];
    for (name, (found, twin)) in names.iter().zip(found.iter().zip(&twin)) {
        let what = bench.what(&format!("{name}, {heads:?}, {spans:?}"));
        let found = down(found);
        let largest = values(twin).iter().fold(1.0f64, |top, x| top.max(x.abs()));
        // Weights, their gradients and results are rounded once each: by far less than this in the mean.
        near(&found, twin, 0.0, (2.0 * rounding(bench.element) + 1e-5) * largest, &what);
        let mean = |t: &Tensor| {
            let values = values(t);
            values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64
        };
        // A row that sees itself only has no gradient: what is computed is noise of no signal.
        let noise = mean(&(found - twin).unwrap()) / mean(twin).max(1e-2);
        assert!(
            noise < 2.0 * rounding(bench.element).powi(2) + 1e-10,
            "{what}: noise is {noise:e}"
        );
    }
    found.iter().map(|tensor| bits(&down(tensor))).collect()
}

fn inputs(rows: usize, heads: &Heads) -> [Tensor; 4] {
    let (wide, narrow) = (heads.query * heads.width, heads.key_value * heads.width);
    [wide, narrow, narrow, wide].map(|columns| random(&[rows, columns], DType::F32))
}

/// Checks all machines, and that one gets the same bits in any order of its threads.
fn on_all_machines(rows: usize, spans: &[Range<usize>], heads: Heads) {
    let inputs = inputs(rows, &heads);
    for element in [Element::F32, Element::Bf16] {
        let mut before = None;
        for tested in machines() {
            let is_emulated = tested.device.is_cpu();
            let bench = Bench { tested, element };
            let found = check_attention(&bench, &inputs, spans, &heads);
            if is_emulated {
                assert!(*before.get_or_insert(found.clone()) == found, "{}", bench.what("bits"));
            }
        }
    }
}

#[test]
fn packed_rows_attend_within_their_items() {
    on_all_machines(1, &[Range { start: 0, end: 1 }], HEADS);
    on_all_machines(150, &[0..1, 1..70, 70..70, 75..148], HEADS);
    on_all_machines(200, &[0..64, 64..193], Heads { query: 6, key_value: 2, width: 64, ..HEADS });
    on_all_machines(
        140,
        &[3..140, 140..140],
        Heads { query: 3, key_value: 1, width: 128, ..HEADS },
    );
}

#[test]
fn a_window_hides_what_lies_further_back() {
    for window in [1, 3, 64, 100, 1000] {
        on_all_machines(180, &[0..110, 110..180], Heads { window: Some(window), ..HEADS });
    }
    let wide = Heads { width: 128, window: Some(70), ..HEADS };
    on_all_machines(130, &[1..130, 130..130], wide);
}

#[test]
fn heads_of_other_widths_attend_row_by_row() {
    for (width, window) in [(1, None), (5, Some(9)), (80, None), (256, Some(40))] {
        on_all_machines(75, &[0..20, 21..75], Heads { width, window, ..HEADS });
    }
}

#[test]
fn items_packed_together_attend_to_the_bits_that_they_have_alone() {
    on_all(|bench| {
        let heads = Heads { window: Some(70), ..HEADS };
        let inputs = inputs(170, &heads).map(|input| bench.place(&input).0);
        let run = |from: usize, rows: usize, spans: &[Range<usize>]| {
            let [q, k, v, gradient] =
                inputs.each_ref().map(|input| input.narrow(0, from, rows).unwrap());
            bench.tested.trains(|| attended(&[q, k, v], &gradient, spans, &heads))
        };
        let together = run(0, 170, &[0..33, 33..170]);
        for span in [0..33, 33..170] {
            let alone = run(span.start, span.len(), &[Range { start: 0, end: span.len() }]);
            for (together, alone) in together.iter().zip(&alone) {
                let part = together.narrow(0, span.start, span.len()).unwrap();
                assert!(bits(&down(&part)) == bits(&down(alone)), "{}", bench.what("an item"));
            }
        }
    });
}
