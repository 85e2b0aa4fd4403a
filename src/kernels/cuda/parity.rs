//! Each kernel against its twin on the CPU, on every machine that is there.

use super::kernels::{Angles, DeviceStep, Kernels, Pages};
use super::machine::{Element, Matrix};
use super::plan::Limits;
use super::testing::{Tested, machines};
use crate::kernels::attention::Heads;
use crate::kernels::cached::{BLOCK, Expected, LayerCache, Run, StepRows};
use crate::kernels::first_of_largest;
use crate::kernels::rms_norm::rms_norm;
use crate::kernels::rope::{RopeTable, Turn, rope};
use crate::kernels::swiglu::swiglu;
use crate::kernels::twin::random;
use candle_core::{DType, Device, Tensor};

const HEADS: Heads = Heads { query: 4, key_value: 2, width: 32, window: None };
const ELEMENTS: [Element; 3] = [Element::F32, Element::Bf16, Element::F16];
const POSITIONS: usize = 1400;

/// Half a unit in the last place, relative: what rounding a number once may cost.
pub(super) fn rounding(element: Element) -> f64 {
    match element {
        Element::F32 => 0.5f64.powi(24),
        Element::Bf16 => 0.5f64.powi(8),
        Element::F16 => 0.5f64.powi(11),
    }
}

/// Rounded to an element type, and back in f32.
pub(super) fn rounded(tensor: &Tensor, element: Element) -> Tensor {
    tensor.to_dtype(element.dtype()).unwrap().to_dtype(DType::F32).unwrap()
}

pub(super) fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub(super) fn bits(tensor: &Tensor) -> Vec<u32> {
    let values: Vec<f32> =
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// That each number is within `relative` of its twin, or `absolute`.
pub(super) fn near(found: &Tensor, twin: &Tensor, relative: f64, absolute: f64, what: &str) {
    assert_eq!(found.dims(), twin.dims(), "{what}: shapes differ");
    for (index, (found, twin)) in values(found).iter().zip(values(twin)).enumerate() {
        let error = (found - twin).abs();
        let bound = relative * twin.abs() + absolute;
        assert!(error <= bound, "{what}, element {index}: {found}, not {twin}");
    }
}

struct Bench {
    tested: Tested,
    kernels: Kernels,
    element: Element,
}

impl Bench {
    fn new(tested: &Tested, element: Element, heads: Heads) -> Self {
        let kernels = Kernels::new(tested.machine.clone(), element, heads).unwrap();
        Bench { tested: tested.clone(), kernels, element }
    }

    fn up(&self, tensor: &Tensor, element: Element) -> Matrix {
        self.kernels.upload(&[tensor.to_dtype(element.dtype()).unwrap()]).unwrap()
    }

    fn down(&self, matrix: &Matrix) -> Tensor {
        self.kernels.download(matrix).unwrap()
    }

    fn what(&self, of: &str) -> String {
        format!("{of} in {} on {}", self.element.name(), self.tested.name)
    }
}

/// Calls `check` with kernels of every type on every machine.
fn on_all(check: impl Fn(&Bench)) {
    for tested in machines() {
        for element in ELEMENTS {
            check(&Bench::new(&tested, element, HEADS));
        }
    }
}

/// A step of one sequence of `ids`, of which `samples` are wanted.
fn one_sequence(kernels: &Kernels, ids: &[u32], samples: &[u32]) -> DeviceStep {
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    let blocks = ids.len().div_ceil(BLOCK);
    let table = (0..blocks as u32).collect();
    let runs = [Run { first_row: 0, rows: ids.len(), position: 0, table }];
    let limits = Limits { ids: 50, positions: POSITIONS, blocks };
    let rows = StepRows { ids, positions: &positions, runs: &runs, samples };
    kernels.begin(&rows, limits).unwrap()
}

#[test]
fn embedded_rows_are_those_of_the_table() {
    on_all(|bench| {
        let table = random(&[50, 44], DType::F32);
        let ids = [7, 0, 49, 7, 20];
        let step = one_sequence(&bench.kernels, &ids, &[]);
        let found = bench.kernels.embed(&bench.up(&table, bench.element), &step).unwrap();
        let ids = Tensor::new(&ids, &Device::Cpu).unwrap();
        let twin = rounded(&table, bench.element).index_select(&ids, 0).unwrap();
        assert_eq!(bits(&bench.down(&found)), bits(&twin), "{}", bench.what("embed"));
    });
}

#[test]
fn rows_are_normalised_as_on_the_cpu() {
    on_all(|bench| {
        for (rows, columns) in [(1, 4), (3, 100), (5, 1028)] {
            let (x, weight) =
                (random(&[rows, columns], DType::F32), random(&[columns], DType::F32));
            let weight = rounded(&weight, bench.element);
            let (on, weights) = (bench.up(&x, Element::F32), bench.up(&weight, bench.element));
            let found = bench.kernels.rms_norm(&on, &weights, 1e-5).unwrap();
            let twin = rms_norm(&x, &weight, 1e-5).unwrap();
            let relative = 1e-5 + rounding(bench.element);
            near(&bench.down(&found), &twin, relative, 1e-7, &bench.what("rms_norm"));

            let samples: Vec<u32> = (0..rows as u32).rev().chain([0]).collect();
            let step = one_sequence(&bench.kernels, &vec![1; rows], &samples);
            let picked = bench.kernels.rms_norm_samples(&on, (&step, 1, rows), &weights, 1e-5);
            let order = Tensor::new(&samples[1..], &Device::Cpu).unwrap();
            let all = bench.down(&found).index_select(&order, 0).unwrap();
            assert_eq!(
                bits(&bench.down(&picked.unwrap())),
                bits(&all),
                "{}",
                bench.what("samples")
            );
        }
    });
}

#[test]
fn gates_open_as_on_the_cpu() {
    on_all(|bench| {
        for (rows, columns) in [(1, 4), (3, 1100), (2, 2048)] {
            let gate_up = (random(&[rows, 2 * columns], DType::F32) * 3.0).unwrap();
            let gate_up = rounded(&gate_up, bench.element);
            let found = bench.kernels.swiglu(&bench.up(&gate_up, bench.element)).unwrap();
            let part = |from| gate_up.narrow(1, from, columns).unwrap().contiguous().unwrap();
            let twin = swiglu(&part(0), &part(columns)).unwrap();
            let relative = 1e-5 + rounding(bench.element);
            near(&bench.down(&found), &twin, relative, 1e-7, &bench.what("swiglu"));
        }
    });
}

#[test]
fn products_are_those_of_the_cpu_and_add_to_the_stream() {
    on_all(|bench| {
        for (rows, inputs, outputs) in [(1, 8, 12), (7, 96, 40), (70, 32, 8)] {
            let x = rounded(&random(&[rows, inputs], DType::F32), bench.element);
            let weight = rounded(&random(&[outputs, inputs], DType::F32), bench.element);
            let (on, weights) = (bench.up(&x, bench.element), bench.up(&weight, bench.element));
            let twin = x.matmul(&weight.t().unwrap()).unwrap();
            let narrow = bench.kernels.project(&on, &weights, bench.element).unwrap();
            let relative = rounding(bench.element);
            near(&bench.down(&narrow), &twin, relative, 1e-4, &bench.what("product"));
            let wide = bench.kernels.project(&on, &weights, Element::F32).unwrap();
            near(&bench.down(&wide), &twin, 0.0, 1e-4, &bench.what("f32 product"));
            let stream = random(&[rows, outputs], DType::F32);
            let mut onto = bench.up(&stream, Element::F32);
            bench.kernels.project_onto(&on, &weights, &mut onto).unwrap();
            let twin = (stream + twin).unwrap();
            near(&bench.down(&onto), &twin, 0.0, 1e-4, &bench.what("product onto the stream"));
        }
    });
}

fn first_of_each(rows: &Tensor) -> Vec<u32> {
    let rows = rows.to_vec2::<f32>().unwrap();
    rows.iter().map(|row| first_of_largest(row) as u32).collect()
}

#[test]
fn the_first_of_the_largest_is_found() {
    for tested in machines() {
        let bench = Bench::new(&tested, Element::F32, HEADS);
        for columns in [1, 31, 1024, 5000] {
            let mut rows = random(&[5, columns], DType::F32).to_vec2::<f32>().unwrap();
            rows[1].fill(f32::NEG_INFINITY);
            rows[2].fill(2.5);
            let again = rows[3].iter().copied().fold(f32::NEG_INFINITY, f32::max);
            rows[3][columns / 2] = again;
            rows[4][columns - 1] = f32::NAN;
            let logits = bench.up(&Tensor::new(rows.clone(), &Device::Cpu).unwrap(), Element::F32);
            let mut twin: Vec<u32> = rows.iter().map(|row| first_of_largest(row) as u32).collect();
            let numbers = &rows[4][..columns - 1]; // what is no number is never the largest
            twin[4] = if numbers.is_empty() { 0 } else { first_of_largest(numbers) as u32 };
            let others = bench.up(&random(&[3, columns], DType::F32), Element::F32);
            let found = bench.kernels.columns_of(8).unwrap();
            bench.kernels.argmax(&others, &found, 0).unwrap();
            bench.kernels.argmax(&logits, &found, 3).unwrap();
            let mark = bench.kernels.mark().unwrap();
            let found = bench.kernels.download_columns(&found, &mark).unwrap();
            assert_eq!(found[3..], twin, "{columns} columns");
            assert_eq!(found[..3], first_of_each(&bench.down(&others)), "{columns} columns");
        }
    }
}

#[test]
fn ids_that_are_expected_are_tokens_of_the_step_before() {
    for tested in machines() {
        let bench = Bench::new(&tested, Element::F32, HEADS);
        let table = random(&[400, 8], DType::F32);
        let on_machine = bench.up(&table, Element::F32);
        let logits = bench.up(&random(&[150, 400], DType::F32), Element::F32);
        let tokens = bench.kernels.columns_of(150).unwrap();
        bench.kernels.argmax(&logits, &tokens, 0).unwrap();
        let mut ids: Vec<u32> = (0..200).collect();
        let positions: Vec<u32> = (0..200).collect();
        let runs = [Run { first_row: 0, rows: 200, position: 0, table: vec![0, 1, 2, 3] }];
        let rows = StepRows { ids: &ids, positions: &positions, runs: &runs, samples: &[] };
        let limits = Limits { ids: 400, positions: 200, blocks: 4 };
        let step = bench.kernels.begin(&rows, limits).unwrap();
        let expected: Vec<Expected> =
            (0..140).map(|i| Expected { row: 199 - i, sample: (i * 7) % 150 }).collect();
        bench.kernels.fill_ids(&step, &tokens, &expected).unwrap();
        let found = bench.down(&bench.kernels.embed(&on_machine, &step).unwrap());
        let largest = first_of_each(&bench.down(&logits));
        for Expected { row, sample } in expected {
            ids[row as usize] = largest[sample as usize];
        }
        let twin = table.index_select(&Tensor::new(ids, &Device::Cpu).unwrap(), 0).unwrap();
        assert_eq!(found.to_vec2::<f32>().unwrap(), twin.to_vec2::<f32>().unwrap());
        for beyond in [Expected { row: 200, sample: 0 }, Expected { row: 0, sample: 150 }] {
            assert!(bench.kernels.fill_ids(&step, &tokens, &[beyond]).is_err(), "{beyond:?}");
        }
    }
}

/// Sequences of which some rows are new in a step, on a machine and on the CPU.
struct Sequences {
    bench: Bench,
    heads: Heads,
    angles: Angles,
    table: RopeTable,
    limits: Limits,
    /// Length of each sequence, how many rows of it are new, and its blocks.
    all: Vec<(usize, usize, Vec<u32>)>,
    /// Queries, keys and values of each sequence, rounded.
    qkv: Vec<Tensor>,
}

impl Sequences {
    fn new(tested: &Tested, element: Element, heads: Heads, shapes: &[(usize, usize)]) -> Self {
        let bench = Bench::new(tested, element, heads);
        let columns = (heads.query + 2 * heads.key_value) * heads.width;
        let frequencies: Vec<f32> =
            (0..heads.width / 2).map(|i| 0.7f32.powi(i as i32 % 30)).collect();
        let table = RopeTable::new(&frequencies, POSITIONS, DType::F32, &Device::Cpu).unwrap();
        let angles = Angles {
            cosines: bench.up(table.cosines(), Element::F32),
            sines: bench.up(table.sines(), Element::F32),
        };
        let blocks: usize = shapes.iter().map(|(length, _)| length.div_ceil(BLOCK)).sum();
        // Blocks of a sequence stand anywhere.
        let mut free: Vec<u32> = (0..blocks as u32).map(|i| i * 7 % blocks as u32).collect();
        if blocks.is_multiple_of(7) {
            free = (0..blocks as u32).rev().collect();
        }
        let all = shapes.iter().map(|&(length, new)| {
            (length, new, free.split_off(free.len() - length.div_ceil(BLOCK)))
        });
        let all = all.collect();
        let qkv = shapes.iter().map(|&(length, _)| {
            // Scores of some size, so that weights differ.
            let spread = (random(&[length, columns], DType::F32) * 1.5).unwrap();
            rounded(&spread, element)
        });
        let qkv = qkv.collect();
        let limits = Limits { ids: 1, positions: POSITIONS, blocks };
        Sequences { bench, heads, angles, table, limits, all, qkv }
    }

    /// A step of rows `from..to` of some sequences; their queries, keys and values.
    fn step(&self, parts: &[(usize, usize, usize)]) -> (DeviceStep, Matrix) {
        let (mut runs, mut positions, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        let mut first_row = 0;
        for &(index, from, to) in parts {
            let table = self.all[index].2[..to.div_ceil(BLOCK)].to_vec();
            runs.push(Run { first_row, rows: to - from, position: from, table });
            positions.extend(from as u32..to as u32);
            rows.push(self.qkv[index].narrow(0, from, to - from).unwrap());
            first_row += to - from;
        }
        let ids = vec![0; first_row];
        let rows_of = StepRows { ids: &ids, positions: &positions, runs: &runs, samples: &[] };
        let step = self.bench.kernels.begin(&rows_of, self.limits).unwrap();
        (step, self.bench.up(&Tensor::cat(&rows, 0).unwrap(), self.bench.element))
    }

    fn store(&self, pages: &mut Pages, parts: &[(usize, usize, usize)]) -> (DeviceStep, Matrix) {
        let (step, mut qkv) = self.step(parts);
        self.bench.kernels.rope_store(&mut qkv, &self.angles, &step, pages).unwrap();
        (step, qkv)
    }

    /// Pages that hold all that is not new. In the rest of each block there is no number.
    fn pages(&self) -> Pages {
        let mut pages = self.bench.kernels.pages(self.limits.blocks).unwrap();
        let block = self.heads.key_value * BLOCK * self.heads.width * self.bench.element.bytes();
        let spoiled = vec![0xff; self.limits.blocks * block];
        for memory in [&pages.keys, &pages.values] {
            self.bench.tested.machine.upload(&spoiled, memory, 0).unwrap();
        }
        let before = self.all.iter().enumerate();
        let before: Vec<_> = before
            .map(|(index, (length, new, _))| (index, 0, length - new))
            .filter(|part| part.2 > 0)
            .collect();
        if !before.is_empty() {
            self.store(&mut pages, &before);
        }
        pages
    }

    /// What a machine computes for some rows.
    fn found(&self, pages: &mut Pages, parts: &[(usize, usize, usize)]) -> Tensor {
        let (step, qkv) = self.store(pages, parts);
        let out = self.bench.kernels.attend(&qkv, &step, pages).unwrap();
        rounded(&self.bench.down(&out), Element::F32)
    }

    /// The new rows of all sequences.
    fn new_rows(&self) -> Vec<(usize, usize, usize)> {
        let all = self.all.iter().enumerate();
        all.map(|(index, (length, new, _))| (index, length - new, *length)).collect()
    }

    /// What the CPU computes for the new rows of a sequence, in f32 from rounded queries, keys and values; and
    /// the largest of the values.
    fn twin(&self, index: usize) -> (Tensor, f64) {
        let Heads { query, key_value, width, .. } = self.heads;
        let (length, new, _) = self.all[index];
        let part = |from: usize, heads: usize| {
            self.qkv[index].narrow(1, from * width, heads * width).unwrap().contiguous().unwrap()
        };
        let positions: Vec<u32> = (0..length as u32).collect();
        let turned = |x: Tensor| {
            let turned = rope(&x, &self.table, &positions, Turn::Forward).unwrap();
            rounded(&turned, self.bench.element)
        };
        let v = part(query + key_value, key_value);
        let largest = values(&v).iter().fold(0.0f64, |top, x| top.max(x.abs()));
        let qkv = [turned(part(0, query)), turned(part(query, key_value)), v];
        let blocks = length.div_ceil(BLOCK);
        let mut cache = LayerCache::new(blocks, self.heads, DType::F32);
        let table = (0..blocks as u32).collect();
        let run = Run { first_row: 0, rows: length, position: 0, table };
        let all = cache.step(&qkv, &[run]).unwrap();
        (all.narrow(0, length - new, new).unwrap(), largest)
    }
}

/// Lengths of sequences, and how many of their rows are new: one token at all kinds of places, guesses, and
/// prompts in pieces, within a partition and across several.
const SHAPES: [(usize, usize); 10] = [
    (1, 1),
    (64, 1),
    (65, 1),
    (513, 1),
    (1100, 1),
    (700, 4),
    (40, 40),
    (600, 70),
    (520, 10),
    (1030, 5),
];

fn check_attention(tested: &Tested, element: Element, heads: Heads, shapes: &[(usize, usize)]) {
    let sequences = Sequences::new(tested, element, heads, shapes);
    let found = sequences.found(&mut sequences.pages(), &sequences.new_rows());
    let mut first = 0;
    for (index, &(length, new)) in shapes.iter().enumerate() {
        let (twin, largest) = sequences.twin(index);
        let found = found.narrow(0, first, new).unwrap();
        // Weights are rounded once on tensor cores, and results once: each by so much at most, and by far less
        // in the mean.
        let error = 2.0 * rounding(element) + 1e-5;
        let what = sequences.bench.what(&format!("{heads:?}, {new} of {length}"));
        near(&found, &twin, 0.0, error * largest, &what);
        let mean = |t: &Tensor| values(t).iter().map(|x| x * x).sum::<f64>();
        let noise = mean(&(found - &twin).unwrap()) / mean(&twin);
        assert!(noise < rounding(element).powi(2) + 1e-10, "{what}: noise is {noise:e}");
        first += new;
    }
}

#[test]
fn rows_attend_as_on_the_cpu() {
    for tested in machines() {
        for element in ELEMENTS {
            check_attention(&tested, element, HEADS, &SHAPES);
            check_attention(&tested, element, Heads { window: Some(90), ..HEADS }, &SHAPES);
        }
        for window in [1, 64, 530] {
            let heads = Heads { window: Some(window), ..HEADS };
            check_attention(&tested, Element::Bf16, heads, &SHAPES);
        }
        let wide = Heads { query: 6, width: 64, ..HEADS };
        check_attention(&tested, Element::Bf16, wide, &SHAPES[..8]);
        let widest = Heads { query: 8, width: 128, window: Some(600), ..HEADS };
        check_attention(&tested, Element::Bf16, widest, &SHAPES[2..8]);
        let alone = Heads { query: 2, width: 128, ..HEADS };
        check_attention(&tested, Element::Bf16, alone, &SHAPES[3..6]);
    }
}

#[test]
fn heads_of_other_widths_attend_as_on_the_cpu() {
    for tested in machines() {
        for element in ELEMENTS {
            for width in [4, 80, 256] {
                check_attention(&tested, element, Heads { width, ..HEADS }, &[(130, 3), (70, 1)]);
            }
        }
        let odd = Heads { width: 30, ..HEADS };
        let error = Kernels::new(tested.machine.clone(), Element::F32, odd).unwrap_err();
        assert!(error.to_string().contains("a multiple of 4, not 30"), "{error}");
    }
}

#[test]
fn a_row_attends_to_the_same_bits_alone_in_company_and_in_any_piece() {
    for tested in machines() {
        for (element, window) in
            [(Element::Bf16, None), (Element::Bf16, Some(300)), (Element::F32, Some(300))]
        {
            let heads = Heads { window, ..HEADS };
            let shapes = [(600, 100), (1030, 5), (40, 33), (1100, 1)];
            let sequences = Sequences::new(&tested, element, heads, &shapes);
            let together = sequences.found(&mut sequences.pages(), &sequences.new_rows());
            let mut first = 0;
            for (index, (length, new)) in shapes.into_iter().enumerate() {
                let own = bits(&together.narrow(0, first, new).unwrap());
                let columns = own.len() / new;
                let mut pages = sequences.pages();
                let (mut from, mut pieces) =
                    (length - new, [1, 1, 37, 2, 1, 9].into_iter().cycle());
                while from < length {
                    let to = length.min(from + pieces.next().unwrap());
                    let alone = bits(&sequences.found(&mut pages, &[(index, from, to)]));
                    let at = (from + new - length) * columns;
                    let what = format!("rows {from}..{to} of {length}");
                    assert!(alone == own[at..at + alone.len()], "{}", sequences.bench.what(&what));
                    from = to;
                }
                first += new;
            }
        }
    }
}
