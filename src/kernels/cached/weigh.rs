//! From scores to weights: the softmax of a query that walks through its blocks.

use super::super::real::exp_vectors;
use super::super::tiles::PANEL;
use super::{BLOCK, Heads};
use pulp::Simd;
use std::ops::Range;

/// Vectors of weights that are computed side by side.
pub(super) const AT_ONCE: usize = 4;

/// One query on its way through the blocks. No vector of its sums lies in two lines of the cache.
#[repr(C, align(64))]
pub(super) struct Query {
    /// Sum of the weights so far, in lanes that are added at the end.
    pub(super) total: [f32; BLOCK],
    position: usize,
    first_visible: usize,
    /// The highest score so far.
    top: f32,
}

impl Query {
    /// The query at a position, which has seen nothing yet.
    #[inline(always)]
    pub(super) fn new(heads: Heads, position: usize) -> Self {
        let first_visible = heads.first_visible(position);
        Query { position, first_visible, top: f32::NEG_INFINITY, total: [0.0; BLOCK] }
    }

    /// What of the block from `start` it sees.
    #[inline(always)]
    pub(super) fn seen(&self, start: usize) -> Range<usize> {
        let from = self.first_visible.max(start) - start;
        let to = (self.position + 1).min(start + BLOCK).saturating_sub(start);
        if from < to { from..to } else { 0..0 }
    }

    /// Turns the scores of the block from `start` into weights, and those that are not seen into zeros: `put(first
    /// vector, vectors)`. Returns what comes from earlier blocks is to be multiplied with.
    #[inline(always)]
    pub(super) fn weigh<S: Simd>(
        &mut self,
        simd: S,
        start: usize,
        scores: Scores<'_>,
        put: impl FnMut(usize, [S::f32s; AT_ONCE]),
    ) -> S::f32s {
        let seen = self.seen(start);
        match seen == (0..BLOCK) {
            true => self.weigh_seen(simd, &Seen::<S, true>::new(simd, &seen), scores, put),
            false => self.weigh_seen(simd, &Seen::<S, false>::new(simd, &seen), scores, put),
        }
    }

    #[inline(always)]
    fn weigh_seen<S: Simd, const ALL: bool>(
        &mut self,
        simd: S,
        seen: &Seen<S, ALL>,
        scores: Scores<'_>,
        mut put: impl FnMut(usize, [S::f32s; AT_ONCE]),
    ) -> S::f32s {
        let vectors = BLOCK / S::F32_LANES;
        let before = simd.splat_f32s(self.top);
        let mut top = before;
        for vector in 0..vectors {
            let score = scores.vector(simd, vector);
            top = simd.max_f32s(seen.or(simd, vector, score, f32::NEG_INFINITY), top);
        }
        self.top = simd.reduce_max_f32s(top);
        let top = simd.splat_f32s(self.top);
        let [keep] = match ALL || seen.any {
            true => exp_vectors(simd, [simd.sub_f32s(before, top)]),
            // Nothing may have been seen before either, which is not a number here.
            false => [simd.splat_f32s(1.0)],
        };
        let (totals, _) = S::as_mut_simd_f32s(&mut self.total);
        for first in (0..vectors).step_by(AT_ONCE) {
            let mut own = [top; AT_ONCE];
            for at in 0..AT_ONCE {
                own[at] = simd.sub_f32s(scores.vector(simd, first + at), top);
            }
            // Lanes that are not seen may be anything.
            own = exp_vectors(simd, own);
            for at in 0..AT_ONCE {
                own[at] = seen.or(simd, first + at, own[at], 0.0);
                totals[first + at] = simd.mul_add_f32s(totals[first + at], keep, own[at]);
            }
            put(first, own);
        }
        keep
    }
}

/// Products of a query and the keys of a block.
#[derive(Clone, Copy)]
pub(super) struct Scores<'a> {
    pub(super) halves: [&'a [f32; PANEL]; BLOCK / PANEL],
    /// What they are to be multiplied with.
    pub(super) scale: f32,
}

impl Scores<'_> {
    #[inline(always)]
    fn vector<S: Simd>(self, simd: S, vector: usize) -> S::f32s {
        let vectors = PANEL / S::F32_LANES;
        let (half, _) = S::as_simd_f32s(self.halves[vector / vectors]);
        simd.mul_f32s(half[vector % vectors], simd.splat_f32s(self.scale))
    }
}

/// What of a block a query sees; `ALL` if it is known to be all of it.
struct Seen<S: Simd, const ALL: bool> {
    from: S::f32s,
    to: S::f32s,
    any: bool,
}

impl<S: Simd, const ALL: bool> Seen<S, ALL> {
    #[inline(always)]
    fn new(simd: S, seen: &Range<usize>) -> Self {
        let (from, to) = (simd.splat_f32s(seen.start as f32), simd.splat_f32s(seen.end as f32));
        Seen { from, to, any: !seen.is_empty() }
    }

    /// A vector of the block, with `value` wherever nothing is seen.
    #[inline(always)]
    fn or(&self, simd: S, vector: usize, x: S::f32s, value: f32) -> S::f32s {
        if ALL {
            return x;
        }
        let (lanes, _) = S::as_simd_f32s(&POSITIONS);
        let value = simd.splat_f32s(value);
        let x = simd.select_f32s(simd.less_than_f32s(lanes[vector], self.to), x, value);
        simd.select_f32s(simd.less_than_f32s(lanes[vector], self.from), value, x)
    }
}

/// Positions of a block.
static POSITIONS: [f32; BLOCK] = {
    let mut positions = [0.0; BLOCK];
    let mut lane = 0;
    while lane < BLOCK {
        positions[lane] = lane as f32;
        lane += 1;
    }
    positions
};
