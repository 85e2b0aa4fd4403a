//! The forward and the backward pass of a task.

// Reason: tasks write different columns and rows of the same outputs, which slices cannot express.
#![expect(unsafe_code, reason = "columns of one output are written by several threads")]

use super::super::super::layout::{self, panel_of_columns, rows_of_columns};
use super::super::super::matmul::View;
use super::super::super::real::{Real, dot, simd};
use super::super::super::share::Target;
use super::super::super::tiles::{Ahead, PANEL};
use super::{Block, Buffers, MOST_WORDS, QUERIES, Saved, Scores, Task, row_of};
use std::ops::Range;

/// One number for each query of a block.
type Column = [f32; QUERIES];

impl Task<'_> {
    pub(super) fn forward(
        &self,
        buffers: &mut Buffers,
        output: &Target<'_>,
        log_sums: &Target<'_>,
    ) {
        let Buffers { key_rows, value_columns, q, weights, scores, .. } = buffers;
        let (kind, words, stride) = (self.of.kind, self.words(), self.row_words());
        self.pack_rows(self.of.k, key_rows);
        self.pack_columns(self.of.v, value_columns);
        weights.resize(QUERIES * self.stride(), 0);
        scores.resize(self.panels(), [[0.0; PANEL]; QUERIES]);
        let (mut inverse, mut log_sum) = ([0.0; QUERIES], [0.0; QUERIES]);
        for block in self.blocks() {
            self.pack_block(self.queries(self.of.q, &block), q);
            let scores = &mut scores[..block.panels.len()];
            let keys = key_rows.chunks_exact(words * PANEL).skip(block.panels.start);
            for (scores, keys) in scores.iter_mut().zip(keys) {
                kind.tile(q, stride, keys, Ahead::NOTHING, &mut scores[..block.rows()]);
            }
            simd(
                #[inline(always)]
                || self.weigh(&block, scores, [&mut inverse, &mut log_sum]),
            );
            for (index, scores) in scores.iter().enumerate() {
                self.put_weights(&scores[..block.rows()], index, weights);
            }
            self.multiply(&block, weights, value_columns, |query, column, values| {
                let (row, width) = (self.start + block.queries.start + query, values.len());
                // SAFETY: a row and head belong to one task.
                let out = unsafe { output.columns(row, column, width) };
                out.iter_mut().zip(values).for_each(|(out, x)| *out = x * inverse[query]);
            });
            for (row, log_sum) in block.queries.clone().zip(log_sum) {
                // SAFETY: a row and head belong to one task.
                unsafe { log_sums.columns(self.start + row, block.head, 1)[0] = log_sum };
            }
        }
    }

    /// Turns scores into weights that are not divided by their sum yet; writes what they are to be multiplied with,
    /// and the logarithm of the sum.
    #[inline(always)]
    fn weigh(&self, block: &Block, scores: &mut [Scores], [inverse, log_sum]: [&mut Column; 2]) {
        let scale = self.of.heads.scale() as f32;
        for query in 0..block.rows() {
            let row = block.queries.start + query;
            if row >= block.queries.end {
                scores.iter_mut().for_each(|scores| scores[query] = [0.0; PANEL]);
                continue;
            }
            let mut tops = [f32::NEG_INFINITY; PANEL];
            for (panel, scores) in block.panels.clone().zip(scores.iter_mut()) {
                let own = &mut scores[query];
                hide(own, self.seen(row, panel), f32::NEG_INFINITY);
                for lane in 0..PANEL {
                    tops[lane] = if own[lane] > tops[lane] { own[lane] } else { tops[lane] };
                }
            }
            let top = scale * tops.iter().fold(f32::NEG_INFINITY, |top, &x| top.max(x));
            let mut totals = [0.0; PANEL];
            for (panel, scores) in block.panels.clone().zip(scores.iter_mut()) {
                let mut own = scores[query];
                for lane in 0..PANEL {
                    own[lane] = Real::exp(own[lane].mul_add(scale, -top));
                }
                hide(&mut own, self.seen(row, panel), 0.0);
                for lane in 0..PANEL {
                    totals[lane] += own[lane];
                }
                scores[query] = own;
            }
            let total: f32 = totals.iter().sum();
            inverse[query] = 1.0 / total;
            log_sum[query] = top + total.ln();
        }
    }

    /// Multiplies weights of a block with what is packed by columns: `put(query, column of all heads, values)`.
    fn multiply(
        &self,
        block: &Block,
        weights: &[u32],
        columns: &[u32],
        mut put: impl FnMut(usize, usize, &[f32]),
    ) {
        let (width, words) = (self.of.heads.width, self.panel_words() * PANEL);
        let mut out = [[0.0; PANEL]; QUERIES];
        let stripes = columns.chunks_exact(self.panels() * words).enumerate();
        for (stripe, panels) in stripes {
            let panels = &panels[block.panels.start * words..block.panels.end * words];
            let out = &mut out[..block.rows()];
            self.of.kind.tile(weights, self.stride(), panels, Ahead::NOTHING, out);
            let first = stripe * PANEL;
            for (query, out) in out.iter().take(block.queries.len()).enumerate() {
                put(query, block.head * width + first, &out[..PANEL.min(width - first)]);
            }
        }
    }

    pub(super) fn backward(
        &self,
        buffers: &mut Buffers,
        saved: Saved<'_>,
        [of_q, of_k, of_v]: [&Target<'_>; 3],
    ) {
        self.pack_rows(self.of.k, &mut buffers.key_rows);
        self.pack_columns(self.of.k, &mut buffers.key_columns);
        self.pack_rows(self.of.v, &mut buffers.value_rows);
        buffers.weights.resize(QUERIES * self.stride(), 0);
        for sums in [&mut buffers.of_keys, &mut buffers.of_values] {
            sums.clear();
            sums.resize(self.panels() * self.padded(), [0.0; PANEL]);
        }
        for block in self.blocks() {
            self.backward_block(&block, buffers, saved);
            self.multiply(
                &block,
                &buffers.weights,
                &buffers.key_columns,
                |query, column, values| {
                    let row = self.start + block.queries.start + query;
                    // SAFETY: a row and head belong to one task.
                    unsafe { of_q.columns(row, column, values.len()) }.copy_from_slice(values);
                },
            );
        }
        let width = self.of.heads.width;
        for (target, sums) in [(of_k, &buffers.of_keys), (of_v, &buffers.of_values)] {
            for row in 0..self.rows {
                let (sums, lane) = (&sums[row / PANEL * self.padded()..], row % PANEL);
                // SAFETY: a row and key-value head belong to one task.
                let out = unsafe { target.columns(self.start + row, self.group * width, width) };
                out.iter_mut().zip(sums).for_each(|(out, sums)| *out = sums[lane]);
            }
        }
    }

    /// Gradients of the scores of a block, as `weights`, and what they add to those of keys and values.
    fn backward_block(&self, block: &Block, buffers: &mut Buffers, saved: Saved<'_>) {
        let (kind, words, count) = (self.of.kind, self.words(), block.queries.len());
        let (q, of_output) = (self.queries(self.of.q, block), self.queries(saved.of_output, block));
        self.pack_block(q, &mut buffers.q);
        self.pack_block(of_output, &mut buffers.of_output);
        let (stride, inputs) = (self.row_words(), count.next_multiple_of(PANEL));
        let (depth, turned_stride) = (kind.words(inputs), kind.row_words(inputs));
        self.turn(q, turned_stride, &mut buffers.q_turned);
        self.turn(of_output, turned_stride, &mut buffers.of_output_turned);
        let rows = self.rows_of(block, of_output, saved);
        let (mut p, mut ds) = ([[0.0; PANEL]; QUERIES], [[0.0; PANEL]; QUERIES]);
        let (mut panels, mut out) = ([[[0; PANEL]; MOST_WORDS]; 2], [[0.0; PANEL]; PANEL]);
        for (index, panel) in block.panels.clone().enumerate() {
            let own = panel * words * PANEL..(panel + 1) * words * PANEL;
            let (p, ds) = (&mut p[..block.rows()], &mut ds[..block.rows()]);
            kind.tile(&buffers.q, stride, &buffers.key_rows[own.clone()], Ahead::NOTHING, p);
            let values = &buffers.value_rows[own];
            kind.tile(&buffers.of_output, stride, values, Ahead::NOTHING, ds);
            simd(
                #[inline(always)]
                || {
                    self.of_scores(block, panel, &rows, [&mut *p, &mut *ds]);
                    for (scores, panel) in [&*ds, &*p].into_iter().zip(&mut panels) {
                        let scores = View::rows(scores.as_flattened(), count, PANEL, PANEL);
                        panel_of_columns(
                            kind.in_panels(),
                            scores,
                            0,
                            panel[..depth].as_flattened_mut(),
                        );
                    }
                },
            );
            self.put_weights(ds, index, &mut buffers.weights);
            let own = panel * self.padded()..(panel + 1) * self.padded();
            for (turned, panel, sums) in [
                (&buffers.q_turned, &panels[0], &mut buffers.of_keys[own.clone()]),
                (&buffers.of_output_turned, &panels[1], &mut buffers.of_values[own]),
            ] {
                let panel = panel[..depth].as_flattened();
                let rows = turned.chunks_exact(PANEL * turned_stride);
                for (rows, sums) in rows.zip(sums.chunks_exact_mut(PANEL)) {
                    kind.tile(rows, turned_stride, panel, Ahead::NOTHING, &mut out);
                    add(sums, &out);
                }
            }
        }
    }

    /// The columns of a block as rows.
    fn turn(&self, x: View<'_, f32>, stride: usize, words: &mut Vec<u32>) {
        words.resize(self.padded() * stride, 0);
        simd(
            #[inline(always)]
            || rows_of_columns(self.of.kind.in_rows(), x, 0, words, stride),
        );
    }

    /// Log-sums of the queries of a block, and the products of their outputs with those gradients.
    fn rows_of(&self, block: &Block, of_output: View<'_, f32>, saved: Saved<'_>) -> [Column; 2] {
        let output = self.queries(saved.output, block);
        let heads = self.of.heads.query;
        let (mut log_sums, mut along) = ([0.0; QUERIES], [0.0; QUERIES]);
        simd(
            #[inline(always)]
            || {
                for query in 0..block.queries.len() {
                    let row = self.start + block.queries.start + query;
                    log_sums[query] = saved.log_sums[row * heads + block.head];
                    along[query] = dot(row_of(of_output, query), row_of(output, query));
                }
            },
        );
        [log_sums, along]
    }

    /// From raw scores and the gradients of weights to the weights and the gradients of raw scores.
    #[inline(always)]
    fn of_scores(
        &self,
        block: &Block,
        panel: usize,
        [log_sums, along]: &[Column; 2],
        [scores, gradients]: [&mut [[f32; PANEL]]; 2],
    ) {
        let scale = self.of.heads.scale() as f32;
        for query in 0..block.queries.len() {
            let seen = self.seen(block.queries.start + query, panel);
            let (mut p, mut ds) = (scores[query], gradients[query]);
            for lane in 0..PANEL {
                p[lane] = Real::exp(p[lane].mul_add(scale, -log_sums[query]));
            }
            hide(&mut p, seen, 0.0);
            for lane in 0..PANEL {
                ds[lane] = p[lane] * (ds[lane] - along[query]) * scale;
            }
            (scores[query], gradients[query]) = (p, ds);
        }
        gradients[block.queries.len()..].fill([0.0; PANEL]);
    }

    /// Writes what the scores of a panel are multiplied with.
    fn put_weights(&self, scores: &[[f32; PANEL]], index: usize, weights: &mut [u32]) {
        let weights = &mut weights[index * self.of.kind.row_words(PANEL)..];
        simd(
            #[inline(always)]
            || layout::rows(self.of.kind.in_rows(), scores, weights, self.stride()),
        );
    }
}

/// Puts `value` wherever nothing is seen.
#[inline(always)]
fn hide(own: &mut [f32; PANEL], seen: Range<u32>, value: f32) {
    if seen == (0..PANEL as u32) {
        return;
    }
    for lane in 0..PANEL {
        let is_seen = (lane as u32).wrapping_sub(seen.start) < seen.end - seen.start;
        own[lane] = if is_seen { own[lane] } else { value };
    }
}

fn add(sums: &mut [[f32; PANEL]], own: &[[f32; PANEL]; PANEL]) {
    simd(
        #[inline(always)]
        || {
            for (sums, own) in sums.iter_mut().zip(own) {
                for lane in 0..PANEL {
                    sums[lane] += own[lane];
                }
            }
        },
    );
}
