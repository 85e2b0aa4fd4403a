//! Attention over a cache of keys and values, kept in blocks of 64 positions.
//!
//! ```text
//! keys    [block][head][column][64 positions]     a query meets 64 positions in one sweep of columns
//! values  [block][head][64 positions][columns]
//! ```
//!
//! A query walks through its blocks in order and folds each into a running maximum, sum and weighted value
//! (Milakov and Gimelshein, 2018; arXiv 1805.02867). What it computes does not depend on which other
//! queries are there, nor on whether it came in one step with its neighbours or alone: prompts may be cut
//! into chunks anywhere without changing a bit.

use super::attention::Heads;
use super::real::{LANES, Real, max, simd, sum};
use super::storage::{elements, tensor};
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
        let elements = blocks * heads.key_value * heads.width * BLOCK;
        LayerCache { keys: vec![0.0; elements], values: vec![0.0; elements], heads }
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

    fn store(&mut self, k: &[f32], v: &[f32], runs: &[Run]) {
        let Heads { key_value, width, .. } = self.heads;
        for run in runs {
            for row in 0..run.rows {
                let position = run.position + row;
                let (block, lane) = (run.table[position / BLOCK] as usize, position % BLOCK);
                let from = (run.first_row + row) * key_value * width;
                for head in 0..key_value {
                    let at = (block * key_value + head) * width * BLOCK;
                    let key = &k[from + head * width..][..width];
                    for (column, &value) in key.iter().enumerate() {
                        self.keys[at + column * BLOCK + lane] = value;
                    }
                    let value = &v[from + head * width..][..width];
                    self.values[at + lane * width..][..width].copy_from_slice(value);
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
        let parts: Vec<Vec<f32>> =
            tasks.par_iter().map(|task| simd(#[inline(always)] || task.attend(self, q))).collect();
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
    #[inline(always)]
    fn attend(&self, cache: &LayerCache, q: &[f32]) -> Vec<f32> {
        let heads = &cache.heads;
        let (width, group) = (heads.width, heads.group());
        let mut out = vec![0.0; self.count * group * width];
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
        let last = self.run.position + self.first + self.count - 1;
        let from = queries[0].first_visible / BLOCK;
        for block in from..=last / BLOCK {
            let at = (self.run.table[block] as usize * heads.key_value + self.head) * width * BLOCK;
            let keys = &cache.keys[at..at + width * BLOCK];
            let values = &cache.values[at..at + width * BLOCK];
            let scale = heads.scale() as f32;
            let mut rest = (queries.as_mut_slice(), out.as_mut_slice());
            while !rest.0.is_empty() {
                let fold = Fold { keys, values, start: block * BLOCK, width, scale };
                let taken = if rest.0.len() >= 4 { 4 } else { 1 };
                let (queries, more) = rest.0.split_at_mut(taken);
                let (out, more_out) = rest.1.split_at_mut(taken * width);
                match taken {
                    4 => fold.run::<4>(queries, out),
                    _ => fold.run::<1>(queries, out),
                }
                rest = (more, more_out);
            }
        }
        for (query, out) in queries.iter().zip(out.chunks_exact_mut(width)) {
            let inverse = 1.0 / query.total;
            for value in out {
                *value *= inverse;
            }
        }
        out
    }
}

/// One block about to be folded into some queries.
struct Fold<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    start: usize,
    width: usize,
    scale: f32,
}

impl Fold<'_> {
    /// `COUNT` queries share the loads of the block; each computes as if alone.
    #[inline(always)]
    fn run<const COUNT: usize>(&self, queries: &mut [Query<'_>], out: &mut [f32]) {
        let mut scores = [[0.0f32; BLOCK]; COUNT];
        let (columns, _) = self.keys.as_chunks::<BLOCK>();
        for (column, keys) in columns.iter().enumerate() {
            for (query, scores) in queries.iter().zip(&mut scores) {
                let x = query.columns[column];
                for lane in 0..BLOCK {
                    scores[lane] = x.mul_add(keys[lane], scores[lane]);
                }
            }
        }
        for (index, (query, weights)) in queries.iter_mut().zip(&mut scores).enumerate() {
            let from = query.first_visible.max(self.start) - self.start;
            let to = (query.position + 1).min(self.start + BLOCK).saturating_sub(self.start);
            if from >= to {
                continue;
            }
            let out = &mut out[index * self.width..(index + 1) * self.width];
            self.fold(query, weights, from, to, out);
        }
    }

    /// Turns scores of positions `from..to` into weights and adds the values they weigh.
    #[inline(always)]
    fn fold(
        &self,
        query: &mut Query<'_>,
        weights: &mut [f32; BLOCK],
        from: usize,
        to: usize,
        out: &mut [f32],
    ) {
        for score in &mut weights[..] {
            *score *= self.scale;
        }
        let top = max(&weights[from..to]).max(query.top);
        let keep = match query.top == f32::NEG_INFINITY {
            true => 0.0,
            false => Real::exp(query.top - top),
        };
        for (lane, weight) in weights.iter_mut().enumerate() {
            let exponential = Real::exp(*weight - top);
            *weight = if lane >= from && lane < to { exponential } else { 0.0 };
        }
        query.top = top;
        query.total = query.total * keep + sum(&weights[..]);
        for value in out.iter_mut() {
            *value *= keep;
        }
        for (lane, values) in self.values.chunks_exact(self.width).enumerate().take(to).skip(from) {
            let weight = weights[lane];
            for (out, &value) in out.iter_mut().zip(values) {
                *out = weight.mul_add(value, *out);
            }
        }
    }
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
