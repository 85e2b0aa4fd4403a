//! Plans: every pair is in one tile, tables and slots are those of the runs, and what kernels compute by a plan,
//! computed here by it in plain loops, is attention.

use super::*;
use crate::kernels::attention::attention;
use crate::kernels::twin::{close, random};
use candle_core::{DType, Tensor};
use proptest::prelude::*;
use std::collections::BTreeMap;

const HEADS: Heads = Heads { query: 6, key_value: 2, width: 4, window: None };
const LIMITS: Limits = Limits { ids: 10, positions: 5000, blocks: 400 };

/// Runs of sequences at positions, with tables that share no block.
fn runs(shapes: &[(usize, usize)]) -> Vec<Run> {
    let (mut first_row, mut block) = (0, 0);
    let run = |&(position, rows): &(usize, usize)| {
        let blocks = (position + rows).div_ceil(BLOCK);
        let table = (block..block + blocks as u32).rev().collect();
        (first_row, block) = (first_row + rows, block + blocks as u32);
        Run { first_row: first_row - rows, rows, position, table }
    };
    shapes.iter().map(run).collect()
}

fn plan(runs: &[Run], heads: &Heads, way: Way) -> Result<Plan> {
    let positions: Vec<u32> = runs
        .iter()
        .flat_map(|run| (run.position..run.position + run.rows).map(|p| p as u32))
        .collect();
    let ids = vec![3; positions.len()];
    Plan::new(
        &StepRows { ids: &ids, positions: &positions, runs, samples: &[0] },
        heads,
        LIMITS,
        way,
    )
}

impl Plan {
    fn quads(&self, section: Section) -> Vec<[usize; 4]> {
        let words = &self.words[section.start..][..4 * section.count];
        words.as_chunks().0.iter().map(|quad: &[u32; 4]| quad.map(|word| word as usize)).collect()
    }
}

/// What is true of every plan.
fn check_plan(shapes: &[(usize, usize)], heads: &Heads) {
    let runs = runs(shapes);
    let plan = plan(&runs, heads, Way::Tiles).unwrap();
    for section in [plan.runs, plan.split, plan.whole, plan.merges] {
        assert_eq!(section.start % 4, 0);
    }
    for (run, [first_row, rows, position, table]) in runs.iter().zip(plan.quads(plan.runs)) {
        assert_eq!((first_row, rows, position), (run.first_row, run.rows, run.position));
        assert_eq!(plan.words[table..table + run.table.len()], run.table);
    }
    // How often each pair is computed for each partition, and where its partial result goes.
    let mut computed: BTreeMap<(usize, usize, usize), usize> = BTreeMap::new();
    let mut taken = vec![false; plan.partials];
    let mut partial_of = BTreeMap::new();
    let pairs = |run: usize| runs[run].rows * heads.group();
    for [run, first, partition, partial] in plan.quads(plan.split) {
        let count = SPLIT_PAIRS.min(pairs(run) - first);
        for pair in first..first + count {
            *computed.entry((run, pair, partition)).or_default() += 1;
        }
        if partial != DIRECT as usize {
            partial_of.insert((run, first, partition), partial);
            for taken in &mut taken[partial..partial + count] {
                assert!(!std::mem::replace(taken, true), "two partial results in one place");
            }
        }
    }
    assert!(taken.iter().all(|&taken| taken), "no room is wasted");
    for [run, first, _, _] in plan.quads(plan.whole) {
        let count = WHOLE_PAIRS.min(pairs(run) - first);
        for pair in first..first + count {
            for partition in partitions(&runs[run], first, count, heads) {
                *computed.entry((run, pair, partition)).or_default() += 1;
            }
        }
    }
    for [run, first, parts, partial] in plan.quads(plan.merges) {
        let count = SPLIT_PAIRS.min(pairs(run) - first);
        let own = partitions(&runs[run], first, count, heads);
        assert_eq!(own.len(), parts);
        for (part, partition) in own.enumerate() {
            let found = partial_of.remove(&(run, first, partition));
            assert_eq!(found, Some(partial + part * count));
        }
    }
    assert!(partial_of.is_empty(), "all partial results are merged");
    for (index, run) in runs.iter().enumerate() {
        for pair in 0..pairs(index) {
            for partition in partitions(run, pair, 1, heads) {
                assert_eq!(computed[&(index, pair, partition)], 1, "{run:?}, pair {pair}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn every_pair_is_computed_once_for_each_partition_it_sees(
        shapes in prop::collection::vec((0usize..2500, 1usize..90), 1..6),
        window in prop::option::of(1usize..1500),
        group in 1usize..9,
    ) {
        check_plan(&shapes, &Heads { query: 2 * group, window, ..HEADS });
    }
}

/// A row on its way through positions, as a lane has it.
#[derive(Clone)]
struct Row {
    top: f32,
    total: f32,
    sums: Vec<f32>,
}

impl Row {
    fn new() -> Self {
        Row { top: f32::NEG_INFINITY, total: 0.0, sums: vec![0.0; HEADS.width] }
    }

    /// As `put_together` in attention.cuh.
    fn put_together(&mut self, part: &Row) {
        let (mut before, mut share) = (1.0, 0.0);
        if part.top != f32::NEG_INFINITY {
            let top = self.top.max(part.top);
            (before, share) = ((self.top - top).exp2(), (part.top - top).exp2());
            self.top = top;
        }
        self.total = self.total.mul_add(before, part.total * share);
        for (sum, part) in self.sums.iter_mut().zip(&part.sums) {
            *sum = sum.mul_add(before, part * share);
        }
    }

    fn result(&self) -> impl Iterator<Item = f32> {
        let inverse = 1.0 / self.total;
        self.sums.iter().map(move |sum| sum * inverse)
    }
}

/// A machine that reads nothing but the words of a plan, and keys and values in the layout of the cache.
struct Reader<'a> {
    plan: &'a Plan,
    heads: Heads,
    q: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Reader<'_> {
    fn run(&self, index: usize) -> [usize; 4] {
        self.plan.quads(self.plan.runs)[index]
    }

    /// Row of the step and query head of a pair.
    fn row_and_head(&self, run: usize, pair: usize, head: usize) -> (usize, usize) {
        let group = self.heads.group();
        (self.run(run)[0] + pair / group, head * group + pair % group)
    }

    /// One partition of one pair in a tile that walks through blocks `blocks`.
    fn part(&self, run: usize, pair: usize, head: usize, blocks: Range<usize>) -> Row {
        let Heads { query, key_value, width, .. } = self.heads;
        let [_, _, position, table] = self.run(run);
        let position = position + pair / self.heads.group();
        let seen = self.heads.first_visible(position)..=position;
        let (row, of_query) = self.row_and_head(run, pair, head);
        let q = &self.q[(row * query + of_query) * width..][..width];
        let scale = (self.heads.scale() * std::f64::consts::LOG2_E) as f32;
        let mut part = Row::new();
        for block in blocks {
            let page = self.plan.words[table + block] as usize * key_value + head;
            let at = |lane: usize| (page * BLOCK + lane) * width;
            let scores: Vec<f32> = (0..BLOCK)
                .map(|lane| match seen.contains(&(block * BLOCK + lane)) {
                    true => {
                        let key = &self.keys[at(lane)..][..width];
                        q.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() * scale
                    }
                    false => f32::NEG_INFINITY,
                })
                .collect();
            let top = scores.iter().copied().fold(part.top, f32::max);
            let reference = if top == f32::NEG_INFINITY { 0.0 } else { top };
            let keep = (part.top - reference).exp2();
            let weights = scores.iter().map(|score| (score - reference).exp2());
            part.sums.iter_mut().for_each(|sum| *sum *= keep);
            let mut total = 0.0;
            for (lane, weight) in weights.enumerate() {
                total += weight;
                for (sum, value) in part.sums.iter_mut().zip(&self.values[at(lane)..][..width]) {
                    *sum += weight * value;
                }
            }
            (part.top, part.total) = (top, part.total.mul_add(keep, total));
        }
        part
    }

    /// All tiles and merges: `(rows, query heads * width)`.
    fn attend(&self, rows: usize) -> Vec<f32> {
        let Heads { query, key_value, width, .. } = self.heads;
        let mut out = vec![f32::NAN; rows * query * width];
        let mut put = |run, pair, head, row: &Row| {
            let (to, of_query) = self.row_and_head(run, pair, head);
            let to = &mut out[(to * query + of_query) * width..][..width];
            to.iter_mut().zip(row.result()).for_each(|(to, from)| *to = from);
        };
        let each = PARTITION / BLOCK;
        let group = self.heads.group();
        let mut partials = vec![Row::new(); self.plan.partials * key_value];
        for head in 0..key_value {
            // Blocks that a tile walks through.
            let blocks = |run: usize, first: usize, count: usize| {
                let [_, _, position, _] = self.run(run);
                let from = self.heads.first_visible(position + first / group);
                from / BLOCK..(position + (first + count - 1) / group) / BLOCK + 1
            };
            for [run, first, partition, partial] in self.plan.quads(self.plan.split) {
                let count = SPLIT_PAIRS.min(self.run(run)[1] * group - first);
                let all = blocks(run, first, count);
                let own = all.start.max(partition * each)..all.end.min((partition + 1) * each);
                for pair in first..first + count {
                    let row = self.part(run, pair, head, own.clone());
                    match partial == DIRECT as usize {
                        true => put(run, pair, head, &row),
                        false => {
                            let at = partial * key_value + head * count + pair - first;
                            partials[at] = row;
                        }
                    }
                }
            }
            for [run, first, _, _] in self.plan.quads(self.plan.whole) {
                let count = WHOLE_PAIRS.min(self.run(run)[1] * group - first);
                let all = blocks(run, first, count);
                for pair in first..first + count {
                    let mut row = Row::new();
                    for partition in all.start / each..(all.end - 1) / each + 1 {
                        let own =
                            all.start.max(partition * each)..all.end.min((partition + 1) * each);
                        row.put_together(&self.part(run, pair, head, own));
                    }
                    put(run, pair, head, &row);
                }
            }
            for [run, first, parts, partial] in self.plan.quads(self.plan.merges) {
                let count = SPLIT_PAIRS.min(self.run(run)[1] * group - first);
                for pair in 0..count {
                    let mut row = Row::new();
                    for part in 0..parts {
                        let at = (partial + part * count) * key_value + head * count + pair;
                        row.put_together(&partials[at]);
                    }
                    put(run, first + pair, head, &row);
                }
            }
        }
        out
    }
}

/// Keys or values of whole sequences, where the plan's tables say.
fn paged(rows: &[Tensor], runs: &[Run]) -> Vec<f32> {
    let Heads { key_value, width, .. } = HEADS;
    let blocks: usize = runs.iter().map(|run| run.table.len()).sum();
    let mut pages = vec![0.0; blocks * key_value * BLOCK * width];
    for (rows, run) in rows.iter().zip(runs) {
        for (position, row) in rows.to_vec2::<f32>().unwrap().iter().enumerate() {
            let block = run.table[position / BLOCK] as usize;
            for (head, columns) in row.chunks_exact(width).enumerate() {
                let at = ((block * key_value + head) * BLOCK + position % BLOCK) * width;
                pages[at..at + width].copy_from_slice(columns);
            }
        }
    }
    pages
}

fn check_attention(shapes: &[(usize, usize)], window: Option<usize>) {
    let heads = Heads { window, ..HEADS };
    let runs = runs(shapes);
    let plan = plan(&runs, &heads, Way::Tiles).unwrap();
    let (wide, narrow) = (heads.query * heads.width, heads.key_value * heads.width);
    let all: Vec<[Tensor; 3]> = shapes
        .iter()
        .map(|(position, rows)| {
            [wide, narrow, narrow].map(|columns| random(&[position + rows, columns], DType::F32))
        })
        .collect();
    let mut twins = Vec::new();
    let mut queries = Vec::new();
    for ([q, k, v], &(position, rows)) in all.iter().zip(shapes) {
        let span = std::iter::once(0..position + rows).collect::<Vec<_>>();
        let twin = attention(q, k, v, &span, &heads).unwrap().output;
        twins.push(twin.narrow(0, position, rows).unwrap());
        queries.push(q.narrow(0, position, rows).unwrap());
    }
    let part = |index: usize| all.iter().map(|qkv| qkv[index].clone()).collect::<Vec<_>>();
    let queries = Tensor::cat(&queries, 0).unwrap();
    let rows = queries.dim(0).unwrap();
    let q = queries.flatten_all().unwrap().to_vec1().unwrap();
    let (keys, values) = (paged(&part(1), &runs), paged(&part(2), &runs));
    let found = Reader { plan: &plan, heads, q, keys, values }.attend(rows);
    let found = Tensor::from_vec(found, (rows, wide), &candle_core::Device::Cpu).unwrap();
    close(&found, &Tensor::cat(&twins, 0).unwrap(), "output");
}

#[test]
fn what_is_computed_by_a_plan_is_attention() {
    let shapes =
        [(0, 1), (63, 1), (64, 3), (511, 1), (512, 1), (1500, 8), (500, 30), (0, 90), (1020, 10)];
    for window in [None, Some(1), Some(100), Some(512), Some(700)] {
        check_attention(&shapes, window);
    }
}

#[test]
fn a_step_that_reaches_beyond_its_limits_is_refused() {
    let refused = |change: fn(&mut Vec<Run>), reason: &str| {
        let mut runs = runs(&[(5, 3), (70, 2)]);
        change(&mut runs);
        let error = plan(&runs, &HEADS, Way::Rows).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    };
    refused(|runs| runs[1].first_row = 4, "one after the other");
    refused(|runs| runs[0].rows = 0, "one after the other");
    refused(|runs| runs[1].table.truncate(1), "beyond its table");
    refused(|runs| runs[1].table[0] = 400, "beyond the 400 of the cache");
    refused(
        |runs| {
            runs[1].position = 5000;
            runs[1].table = vec![0; 100];
        },
        "the 5000 positions",
    );
    let run = &runs(&[(5, 3)]);
    let wrong = |ids: &[u32], positions: &[u32], samples: &[u32], reason: &str| {
        let rows = StepRows { ids, positions, runs: run, samples };
        let error = Plan::new(&rows, &HEADS, LIMITS, Way::Tiles).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    };
    wrong(&[1, 2, 10], &[5, 6, 7], &[], "token 10 is beyond the vocabulary of 10");
    wrong(&[1, 2, 3], &[5, 6, 7], &[3], "row 3 is wanted of a step of 3");
    wrong(&[1, 2, 3], &[5, 6, 8], &[], "at other positions");
    wrong(&[1, 2, 3, 4], &[5, 6, 7, 8], &[], "runs have 3 rows, the step 4");
}

#[test]
fn each_row_has_its_slot_and_its_run() {
    let runs = runs(&[(63, 3), (0, 1)]); // blocks 1, 0 and 2
    let plan = plan(&runs, &HEADS, Way::Rows).unwrap();
    let words = |section: Section| &plan.words[section.start..][..section.count];
    assert_eq!(words(plan.slots), [64 + 63, 0, 1, 128]);
    assert_eq!(words(plan.positions), [63, 64, 65, 0]);
    assert_eq!(words(plan.row_runs), [0, 0, 0, 1]);
    assert_eq!(plan.split.count + plan.whole.count + plan.merges.count, 0);
}
