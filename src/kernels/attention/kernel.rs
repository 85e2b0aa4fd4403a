//! Attention on the CPU: one task for each span and key-value head, products through `gemm`, softmax
//! rows in vector loops.

use super::super::{
    matmul::{Into, View, multiply},
    real::{Real, dot, max, simd, sum},
    storage::{elements, tensor},
};
use super::{Attended, Heads};
use candle_core::{Result, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Query rows whose scores exist at a time.
const BLOCK: usize = 64;

pub(super) fn forward<T: Real>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spans: &[Range<usize>],
    heads: &Heads,
) -> Result<Attended> {
    let rows = q.dim(0)?;
    let (q, k, v) = (elements::<T>(q)?, elements::<T>(k)?, elements::<T>(v)?);
    let parts: Vec<(Vec<T>, Vec<T>)> = tasks(spans, heads)
        .into_par_iter()
        .map(|(span, group)| Task::new(&q, &k, &v, span, group, heads).forward())
        .collect();
    let (outputs, log_sums): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    let output = assemble(rows, spans, heads.key_value, heads.group(), heads.width, &outputs);
    let log_sums = assemble(rows, spans, heads.key_value, heads.group(), 1, &log_sums);
    Ok(Attended {
        output: tensor(output, (rows, heads.query * heads.width))?,
        log_sums: tensor(log_sums, (rows, heads.query))?,
    })
}

pub(super) fn backward<T: Real>(
    [q, k, v]: [&Tensor; 3],
    attended: &Attended,
    gradient: &Tensor,
    spans: &[Range<usize>],
    heads: &Heads,
) -> Result<[Tensor; 3]> {
    let rows = q.dim(0)?;
    let (queries, keys, values) = (elements::<T>(q)?, elements::<T>(k)?, elements::<T>(v)?);
    let saved = Saved {
        output: &elements::<T>(&attended.output)?,
        log_sums: &elements::<T>(&attended.log_sums)?,
        gradient: &elements::<T>(gradient)?,
    };
    let parts: Vec<[Vec<T>; 3]> = tasks(spans, heads)
        .into_par_iter()
        .map(|(span, group)| {
            Task::new(&queries, &keys, &values, span, group, heads).backward(&saved)
        })
        .collect();
    let mut columns = [Vec::new(), Vec::new(), Vec::new()];
    for part in parts {
        columns.iter_mut().zip(part).for_each(|(all, one)| all.push(one));
    }
    let [of_q, of_k, of_v] = columns;
    let whole =
        |parts: &[Vec<T>], group| assemble(rows, spans, heads.key_value, group, heads.width, parts);
    Ok([
        tensor(whole(&of_q, heads.group()), q.shape())?,
        tensor(whole(&of_k, 1), k.shape())?,
        tensor(whole(&of_v, 1), v.shape())?,
    ])
}

/// What the forward pass left for the backward pass.
struct Saved<'a, T> {
    output: &'a [T],   // (rows, query heads * width)
    log_sums: &'a [T], // (rows, query heads)
    gradient: &'a [T], // (rows, query heads * width)
}

/// Spans in order, and in each the key-value heads in order.
fn tasks<'a>(spans: &'a [Range<usize>], heads: &Heads) -> Vec<(&'a Range<usize>, usize)> {
    let groups = heads.key_value;
    spans.iter().flat_map(|span| (0..groups).map(move |group| (span, group))).collect()
}

/// The query heads of one key-value head over one span.
struct Task<'a, T> {
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    start: usize,
    rows: usize,
    group: usize,
    heads: &'a Heads,
}

impl<'a, T: Real> Task<'a, T> {
    fn new(
        q: &'a [T],
        k: &'a [T],
        v: &'a [T],
        span: &Range<usize>,
        group: usize,
        heads: &'a Heads,
    ) -> Self {
        Task { q, k, v, start: span.start, rows: span.len(), group, heads }
    }

    /// Rows `range` of the span in columns of head `head` of a matrix with `heads` heads.
    fn view<'b>(
        &self,
        data: &'b [T],
        heads: usize,
        head: usize,
        range: Range<usize>,
    ) -> View<'b, T> {
        let (width, stride) = (self.heads.width, heads * self.heads.width);
        let from = (self.start + range.start) * stride + head * width;
        View::rows(data.get(from..).unwrap_or_default(), range.len(), width, stride)
    }

    fn keys(&self, range: Range<usize>) -> View<'a, T> {
        self.view(self.k, self.heads.key_value, self.group, range)
    }

    fn values(&self, range: Range<usize>) -> View<'a, T> {
        self.view(self.v, self.heads.key_value, self.group, range)
    }

    /// Blocks of query rows, each with the keys that any of its rows sees.
    fn blocks(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let (rows, heads) = (self.rows, *self.heads);
        (0..rows).step_by(BLOCK).map(move |first| {
            let end = rows.min(first + BLOCK);
            (first..end, heads.first_visible(first)..end)
        })
    }

    /// Output `[head in group][row][width]` and log-sums `[head in group][row]`.
    fn forward(&self) -> (Vec<T>, Vec<T>) {
        let (width, group) = (self.heads.width, self.heads.group());
        let mut output = vec![T::ZERO; group * self.rows * width];
        let mut log_sums = vec![T::ZERO; group * self.rows];
        let mut scores = vec![T::ZERO; BLOCK * self.rows];
        for member in 0..group {
            let head = self.group * group + member;
            for (queries, keys) in self.blocks() {
                let columns = keys.len();
                let q = self.view(self.q, self.heads.query, head, queries.clone());
                let k = self.keys(keys.clone()).transposed();
                multiply(&mut scores, columns, q, k, Into::Set);
                let at = member * self.rows + queries.start;
                let sums = &mut log_sums[at..at + queries.len()];
                simd(
                    #[inline(always)]
                    || softmax_rows(&mut scores, sums, &queries, &keys, self.heads),
                );
                let weights = View::rows(&scores, queries.len(), columns, columns);
                let out = &mut output[at * width..(at + queries.len()) * width];
                multiply(out, width, weights, self.values(keys), Into::Set);
            }
        }
        (output, log_sums)
    }

    /// Gradients of q `[head in group][row][width]`, k and v `[row][width]`.
    fn backward(&self, saved: &Saved<'_, T>) -> [Vec<T>; 3] {
        let (width, group) = (self.heads.width, self.heads.group());
        let mut of_q = vec![T::ZERO; group * self.rows * width];
        let mut of_k = vec![T::ZERO; self.rows * width];
        let mut of_v = vec![T::ZERO; self.rows * width];
        let mut weights = vec![T::ZERO; BLOCK * self.rows];
        let mut of_scores = vec![T::ZERO; BLOCK * self.rows];
        for member in 0..group {
            let head = self.group * group + member;
            for (queries, keys) in self.blocks() {
                let (rows, columns) = (queries.len(), keys.len());
                let q = self.view(self.q, self.heads.query, head, queries.clone());
                let dy = self.view(saved.gradient, self.heads.query, head, queries.clone());
                let y = self.view(saved.output, self.heads.query, head, queries.clone());
                multiply(&mut weights, columns, q, self.keys(keys.clone()).transposed(), Into::Set);
                let values = self.values(keys.clone()).transposed();
                multiply(&mut of_scores, columns, dy, values, Into::Set);
                let log_sum =
                    |row: usize| saved.log_sums[(self.start + row) * self.heads.query + head];
                simd(
                    #[inline(always)]
                    || {
                        for (i, row) in queries.clone().enumerate() {
                            let along = dot(row_of(&dy, i), row_of(&y, i));
                            let visible = visible(row, &keys, self.heads);
                            let span = i * columns..(i + 1) * columns;
                            let (p, ds) = (&mut weights[span.clone()], &mut of_scores[span]);
                            backward_row(p, ds, visible, log_sum(row), along, self.heads);
                        }
                    },
                );
                let p = View::rows(&weights, rows, columns, columns);
                let ds = View::rows(&of_scores, rows, columns, columns);
                let at = (member * self.rows + queries.start) * width;
                let out = &mut of_q[at..at + rows * width];
                multiply(out, width, ds, self.keys(keys.clone()), Into::Set);
                let range = keys.start * width..keys.end * width;
                multiply(&mut of_k[range.clone()], width, ds.transposed(), q, Into::Add);
                multiply(&mut of_v[range], width, p.transposed(), dy, Into::Add);
            }
        }
        [of_q, of_k, of_v]
    }
}

/// The columns of a block of keys that `row` sees.
#[inline(always)]
fn visible(row: usize, keys: &Range<usize>, heads: &Heads) -> Range<usize> {
    heads.first_visible(row).max(keys.start) - keys.start..row + 1 - keys.start
}

#[inline(always)]
fn row_of<'a, T>(view: &View<'a, T>, row: usize) -> &'a [T] {
    &view.data[row * view.row_stride..row * view.row_stride + view.columns]
}

/// Turns rows of raw scores into weights, and notes the log-sum-exp of each.
#[inline(always)]
fn softmax_rows<T: Real>(
    scores: &mut [T],
    log_sums: &mut [T],
    queries: &Range<usize>,
    keys: &Range<usize>,
    heads: &Heads,
) {
    let scale = T::real(heads.scale());
    let rows = scores.chunks_exact_mut(keys.len());
    for ((row, scores), log_sum) in queries.clone().zip(rows).zip(log_sums) {
        let visible = visible(row, keys, heads);
        scores[..visible.start].fill(T::ZERO);
        scores[visible.end..].fill(T::ZERO);
        let scores = &mut scores[visible];
        let top = max(scores) * scale;
        for score in scores.iter_mut() {
            *score = score.mul_add(scale, -top).exp();
        }
        let total = sum(scores);
        let inverse = T::ONE / total;
        for score in scores.iter_mut() {
            *score *= inverse;
        }
        *log_sum = top + total.ln();
    }
}

/// From raw scores and the gradient of the weights to the weights and the gradient of the raw scores.
#[inline(always)]
fn backward_row<T: Real>(
    scores: &mut [T],
    gradient: &mut [T],
    visible: Range<usize>,
    log_sum: T,
    along: T,
    heads: &Heads,
) {
    let scale = T::real(heads.scale());
    for side in [0..visible.start, visible.end..scores.len()] {
        scores[side.clone()].fill(T::ZERO);
        gradient[side].fill(T::ZERO);
    }
    let (scores, gradient) = (&mut scores[visible.clone()], &mut gradient[visible]);
    for i in 0..scores.len() {
        let weight = scores[i].mul_add(scale, -log_sum).exp();
        scores[i] = weight;
        gradient[i] = weight * (gradient[i] - along) * scale;
    }
}

/// Puts the parts of all tasks, `[member][row][width]` each, into one matrix of
/// `groups * members * width` columns.
fn assemble<T: Real>(
    rows: usize,
    spans: &[Range<usize>],
    groups: usize,
    members: usize,
    width: usize,
    parts: &[Vec<T>],
) -> Vec<T> {
    let stride = groups * members * width;
    let mut out = vec![T::ZERO; rows * stride];
    let (mut rest, mut end) = (&mut out[..], 0);
    let mut regions = Vec::with_capacity(spans.len());
    for span in spans {
        let (_, tail) = rest.split_at_mut((span.start - end) * stride);
        let (region, tail) = tail.split_at_mut(span.len() * stride);
        regions.push(region);
        (rest, end) = (tail, span.end);
    }
    regions.into_par_iter().zip(parts.par_chunks(groups)).for_each(|(region, parts)| {
        let rows = region.len() / stride;
        for (group, part) in parts.iter().enumerate() {
            for member in 0..members {
                let column = (group * members + member) * width;
                for row in 0..rows {
                    let from = (member * rows + row) * width;
                    region[row * stride + column..][..width]
                        .copy_from_slice(&part[from..from + width]);
                }
            }
        }
    });
    out
}
