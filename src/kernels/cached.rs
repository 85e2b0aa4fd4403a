//! Attention over a cache of keys and values, kept in blocks of 64 positions.
//!
//! ```text
//! keys    [block][head][column][64 positions]          a query meets 64 positions in one sweep
//! values  [block][head][stripe][64 positions][32 columns]
//! ```
//!
//! A query walks through its blocks in order and folds each into a running maximum, sum and weighted value
//! (Milakov and Gimelshein, 2018; arXiv 1805.02867). What it computes does not depend on which other
//! queries are there, nor on whether it came in one step with its neighbours or alone: prompts may be cut
//! into chunks anywhere without changing a bit.

use super::attention::Heads;
use super::real::{LANES, Real, max, simd, sum};
use super::storage::{elements, tensor};
use super::tiles::{PANEL, PARTIAL, ScoreTile, ValueTile};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

/// Positions of one block.
pub const BLOCK: usize = LANES;

/// Query rows of one task.
const ROWS_PER_TASK: usize = 16;

/// Rows of one sequence in a step: they stand at consecutive positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// First row of the step that belongs to the sequence.
    pub first_row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Position of the first row in the sequence.
    pub position: usize,
    /// The blocks of the sequence, enough for all its positions so far.
    pub table: Vec<u32>,
}

/// Keys and values of one layer.
#[derive(Debug)]
pub struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
    heads: Heads,
}

impl LayerCache {
    /// Room for `blocks` blocks.
    pub fn new(blocks: usize, heads: Heads) -> Self {
        let pages = blocks * heads.key_value;
        LayerCache {
            keys: vec![0.0; pages * heads.width * BLOCK],
            values: vec![0.0; pages * heads.width.div_ceil(PANEL) * PANEL * BLOCK],
            heads,
        }
    }

    /// Stores the rows' keys and values, then attends: `(rows, query heads * width)`.
    ///
    /// # Errors
    /// If the tensors are not contiguous f32 on the CPU.
    ///
    /// # Panics
    /// If a run's table is too short or names a block that does not exist.
    pub fn step(&mut self, [q, k, v]: &[Tensor; 3], runs: &[Run]) -> Result<Tensor> {
        let rows = q.dim(0)?;
        if runs.iter().any(|run| run.first_row + run.rows > rows) {
            bail!("a run reaches beyond the {rows} rows of the step")
        }
        self.store(&elements(k)?, &elements(v)?, runs);
        let width = self.heads.query * self.heads.width;
        let out = self.attend(&elements(q)?, rows, runs);
        tensor(out, (rows, width))
    }

    /// The keys `[column][position]` of a block and head.
    fn keys(&mut self, block: usize, head: usize) -> &mut [f32] {
        let page = self.heads.width * BLOCK;
        let at = (block * self.heads.key_value + head) * page;
        &mut self.keys[at..at + page]
    }

    /// The values `[stripe][position][column in stripe]` of a block and head.
    fn values(&mut self, block: usize, head: usize) -> &mut [f32] {
        let page = self.heads.width.div_ceil(PANEL) * PANEL * BLOCK;
        let at = (block * self.heads.key_value + head) * page;
        &mut self.values[at..at + page]
    }

    fn store(&mut self, k: &[f32], v: &[f32], runs: &[Run]) {
        let Heads { key_value, width, .. } = self.heads;
        for run in runs {
            for row in 0..run.rows {
                let position = run.position + row;
                let (block, lane) = (run.table[position / BLOCK] as usize, position % BLOCK);
                for head in 0..key_value {
                    let from = ((run.first_row + row) * key_value + head) * width;
                    let keys = self.keys(block, head);
                    if lane == 0 {
                        keys.fill(0.0); // nothing is left of whoever had the block before
                    }
                    for (column, &key) in k[from..from + width].iter().enumerate() {
                        keys[column * BLOCK + lane] = key;
                    }
                    let values = self.values(block, head);
                    if lane == 0 {
                        values.fill(0.0);
                    }
                    for (stripe, value) in v[from..from + width].chunks(PANEL).enumerate() {
                        let at = (stripe * BLOCK + lane) * PANEL;
                        values[at..at + value.len()].copy_from_slice(value);
                    }
                }
            }
        }
    }

    fn attend(&self, q: &[f32], rows: usize, runs: &[Run]) -> Vec<f32> {
        let Heads { query, key_value, width, .. } = self.heads;
        let mut tasks = Vec::new();
        for run in runs {
            for first in (0..run.rows).step_by(ROWS_PER_TASK) {
                let count = ROWS_PER_TASK.min(run.rows - first);
                tasks.extend((0..key_value).map(|head| Task { run, first, count, head }));
            }
        }
        let parts: Vec<Vec<f32>> = tasks.par_iter().map(|task| task.attend(self, q)).collect();
        let mut out = vec![0.0; rows * query * width];
        let group = self.heads.group();
        for (task, part) in tasks.iter().zip(parts) {
            for (row, part) in part.chunks_exact(group * width).enumerate() {
                let row = task.run.first_row + task.first + row;
                let at = (row * query + task.head * group) * width;
                out[at..at + group * width].copy_from_slice(part);
            }
        }
        out
    }
}

/// Some rows of a run and the query heads of one key-value head.
struct Task<'a> {
    run: &'a Run,
    first: usize,
    count: usize,
    head: usize,
}

/// One query on its way through the blocks.
struct Query<'a> {
    columns: &'a [f32],
    position: usize,
    first_visible: usize,
    top: f32,
    total: f32,
}

impl Task<'_> {
    /// `[row][head in group][width]`
    fn attend(&self, cache: &LayerCache, q: &[f32]) -> Vec<f32> {
        let heads = &cache.heads;
        let (width, group) = (heads.width, heads.group());
        let padded = width.div_ceil(PANEL) * PANEL;
        let mut queries: Vec<Query<'_>> = (0..self.count * group)
            .map(|index| {
                let (row, member) = (self.first + index / group, index % group);
                let head = self.head * group + member;
                let at = ((self.run.first_row + row) * heads.query + head) * width;
                let position = self.run.position + row;
                Query {
                    columns: &q[at..at + width],
                    position,
                    first_visible: heads.first_visible(position),
                    top: f32::NEG_INFINITY,
                    total: 0.0,
                }
            })
            .collect();
        let mut sums = vec![0.0; queries.len() * padded];
        let mut weights = [0.0; 4 * BLOCK];
        let last = self.run.position + self.first + self.count - 1;
        let from = queries[0].first_visible / BLOCK;
        for block in from..=last / BLOCK {
            let page = self.run.table[block] as usize * heads.key_value + self.head;
            let fold = Fold {
                keys: &cache.keys[page * width * BLOCK..(page + 1) * width * BLOCK],
                values: &cache.values[page * padded * BLOCK..(page + 1) * padded * BLOCK],
                start: block * BLOCK,
                padded,
                scale: heads.scale() as f32,
            };
            let (mut queries, mut sums) = (queries.as_mut_slice(), sums.as_mut_slice());
            while !queries.is_empty() {
                let taken = match queries.len() {
                    4.. => 4,
                    2.. => 2,
                    _ => 1,
                };
                let (own, more) = queries.split_at_mut(taken);
                let (own_sums, more_sums) = sums.split_at_mut(taken * padded);
                match taken {
                    4 => fold.run::<4>(own, own_sums, &mut weights),
                    2 => fold.run::<2>(own, own_sums, &mut weights),
                    _ => fold.run::<1>(own, own_sums, &mut weights),
                }
                (queries, sums) = (more, more_sums);
            }
        }
        let mut out = Vec::with_capacity(queries.len() * width);
        for (query, sums) in queries.iter().zip(sums.chunks_exact(padded)) {
            let inverse = 1.0 / query.total;
            out.extend(sums[..width].iter().map(|sum| sum * inverse));
        }
        out
    }
}

/// One block about to be folded into some queries.
struct Fold<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    start: usize,
    padded: usize,
    scale: f32,
}

impl Fold<'_> {
    /// `COUNT` queries share the loads of the block; each computes as if alone.
    fn run<const COUNT: usize>(
        &self,
        queries: &mut [Query<'_>],
        sums: &mut [f32],
        weights: &mut [f32],
    ) {
        let arch = pulp::Arch::new();
        let weights = &mut weights[..COUNT * BLOCK];
        let columns = std::array::from_fn(|index| queries[index].columns);
        arch.dispatch(ScoreTile::<COUNT> { queries: columns, keys: self.keys, out: weights });
        let (mut keep, mut end) = ([1.0; COUNT], 0);
        let (rows, _) = weights.as_chunks_mut::<BLOCK>();
        for ((query, weights), keep) in queries.iter_mut().zip(rows).zip(&mut keep) {
            let from = query.first_visible.max(self.start) - self.start;
            let to = (query.position + 1).min(self.start + BLOCK).saturating_sub(self.start);
            if from < to {
                *keep = simd(
                    #[inline(always)]
                    || weigh(query, weights, from, to, self.scale),
                );
                end = end.max(to);
            } else {
                weights.fill(0.0);
            }
        }
        // Behind the last visible position weights are zero, and values those of nobody.
        let end = end.div_ceil(PARTIAL) * PARTIAL * PANEL;
        for (stripe, values) in self.values.chunks_exact(BLOCK * PANEL).enumerate() {
            let mut own = sums.chunks_exact_mut(self.padded);
            let sums = std::array::from_fn(|_| {
                let own = own.next().expect("one for each query");
                &mut own[stripe * PANEL..(stripe + 1) * PANEL]
            });
            arch.dispatch(ValueTile::<COUNT> { weights, values: &values[..end], keep, sums });
        }
    }
}

/// Turns scores of positions `from..to` into weights, the others into zeros; returns what earlier blocks
/// are to be multiplied with.
#[inline(always)]
fn weigh(
    query: &mut Query<'_>,
    weights: &mut [f32; BLOCK],
    from: usize,
    to: usize,
    scale: f32,
) -> f32 {
    for lane in 0..BLOCK {
        weights[lane] *= scale;
    }
    weights[..from].fill(f32::NEG_INFINITY);
    weights[to..].fill(f32::NEG_INFINITY);
    let top = max(&weights[..]).max(query.top);
    let keep = match query.top == f32::NEG_INFINITY {
        true => 0.0,
        false => Real::exp(query.top - top),
    };
    for lane in 0..BLOCK {
        weights[lane] = Real::exp(weights[lane] - top);
    }
    weights[..from].fill(0.0);
    weights[to..].fill(0.0);
    query.top = top;
    query.total = query.total * keep + sum(&weights[..]);
    keep
}

#[cfg(test)]
mod tests {
    use super::super::attention::attention;
    use super::super::twin::{close, random};
    use super::*;
    use candle_core::DType;

    const HEADS: Heads = Heads { query: 6, key_value: 2, width: 10, window: None };

    fn check(lengths: &[usize], heads: Heads) {
        let rows = lengths.iter().sum();
        let (wide, narrow) = (heads.query * heads.width, heads.key_value * heads.width);
        let qkv = [wide, narrow, narrow].map(|width| random(&[rows, width], DType::F32));
        let (mut spans, mut runs, mut at, mut block) = (Vec::new(), Vec::new(), 0, 0);
        for &length in lengths {
            spans.push(at..at + length);
            let blocks = length.div_ceil(BLOCK) as u32;
            let table = (block..block + blocks).rev().collect();
            runs.push(Run { first_row: at, rows: length, position: 0, table });
            (at, block) = (at + length, block + blocks);
        }
        let [q, k, v] = &qkv;
        let packed = attention(q, k, v, &spans, &heads).unwrap().output;
        let mut cache = LayerCache::new(block as usize, heads);
        close(&cache.step(&qkv, &runs).unwrap(), &packed, "output");
    }

    #[test]
    fn the_kernel_equals_attention_within_items() {
        check(&[1], HEADS);
        check(&[64, 65, 63], HEADS);
        check(&[200, 1, 130], HEADS);
        check(&[150], Heads { width: 32, query: 4, ..HEADS });
        for window in [1, 5, 64, 100] {
            check(&[200, 70], Heads { window: Some(window), ..HEADS });
        }
    }

    #[test]
    fn a_sequence_computes_the_same_bits_in_any_chunks_and_any_company() {
        let heads = Heads { window: Some(90), ..HEADS };
        let (wide, narrow) = (heads.query * heads.width, heads.key_value * heads.width);
        let qkv = [wide, narrow, narrow].map(|width| random(&[180, width], DType::F32));
        let part = |from, rows| qkv.clone().map(|t| t.narrow(0, from, rows).unwrap());
        let bits = |t: &Tensor| t.to_vec2::<f32>().unwrap();

        let mut cache = LayerCache::new(3, heads);
        let whole = Run { first_row: 0, rows: 180, position: 0, table: vec![0, 1, 2] };
        let whole = bits(&cache.step(&qkv, &[whole]).unwrap());

        let mut cache = LayerCache::new(6, heads);
        let mut position = 0;
        for rows in [1, 2, 61, 1, 70, 16, 29] {
            // Beside it, a sequence that takes the same tokens from their end.
            let mine = Run { first_row: 0, rows, position, table: vec![5, 1, 3] };
            let other = Run { first_row: rows, rows, position, table: vec![0, 2, 4] };
            let both: Vec<Tensor> = part(position, rows)
                .iter()
                .zip(&part(180 - position - rows, rows))
                .map(|(a, b)| Tensor::cat(&[a, b], 0).unwrap())
                .collect();
            let out = cache.step(&both.try_into().unwrap(), &[mine, other]).unwrap();
            assert_eq!(bits(&out)[..rows], whole[position..position + rows]);
            position += rows;
        }
    }
}
