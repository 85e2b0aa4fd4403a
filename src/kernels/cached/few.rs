//! Attention of a few queries, those of a token or two, to the blocks of their sequence, where vectors multiply in
//! f32.
//!
//! One loop walks through all blocks, where [`super::attend`] calls a tile for every part of one: with few queries
//! the calls take as long as the products. Chains and roundings are the same, so results are bit for bit those of
//! any number of queries.

use super::super::fetch::{Span, fetch_lines};
use super::super::packed::WeightType;
use super::super::pairs::are_widened;
use super::super::real::sum;
use super::super::rounding::rounded_vector;
use super::super::tiles::{PANEL, PanelTile};
use super::attend::Task;
use super::weigh::{AT_ONCE, Query, Scores};
use super::{BLOCK, Block, LayerCache, Layout};
use pulp::bytemuck::cast_slice;
use pulp::{Simd, WithSimd};

/// Queries at most: whose sums stay in the registers of a 256-bit unit.
const QUERIES_MAX: usize = 6;

/// Whether so many queries are few.
pub(super) fn are_few(layout: Layout, queries: usize) -> bool {
    let in_f32 = match layout.kind {
        WeightType::F32 => true,
        WeightType::Bf16 => are_widened(),
        WeightType::Bf16x3 | WeightType::BlockFloat | WeightType::Int8 => false,
    };
    in_f32 && queries <= QUERIES_MAX
}

/// A task of few queries.
pub(super) struct Few<'a, Put> {
    pub(super) task: &'a Task<'a>,
    pub(super) cache: &'a LayerCache,
    /// Rows of queries of the step.
    pub(super) q: &'a [f32],
    /// What the next task begins with, to be fetched.
    pub(super) next: Option<Block<'a>>,
    /// Memory for `[query][word of columns]`.
    pub(super) words: &'a mut Vec<u32>,
    /// Memory for `[query][column]`.
    pub(super) sums: &'a mut Vec<f32>,
    /// `put(row, query of the group, values)`
    pub(super) put: Put,
}

/// Calls the walk with the number of queries, and of vectors of a tile that goes with it, as constants.
macro_rules! by_queries {
    ($few:ident, $simd:ident, $count:expr; $(($($queries:literal)*) $vectors:literal),*) => {
        match $count {
            $($($queries => $few.walk::<S, INPUTS, $queries, $vectors>($simd),)*)*
            _ => unreachable!("at most 6 queries"),
        }
    };
}

impl<Put: Fn(usize, usize, &[f32])> WithSimd for Few<'_, Put> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.cache.layout.kind {
            WeightType::F32 => self.walk_any::<S, 1>(simd),
            _ => self.walk_any::<S, 2>(simd),
        }
    }
}

impl<Put: Fn(usize, usize, &[f32])> Few<'_, Put> {
    #[inline(always)]
    fn walk_any<S: Simd, const INPUTS: usize>(self, simd: S) {
        let count = self.task.count * self.cache.layout.heads.group();
        match S::F32_LANES {
            8 => by_queries!(self, simd, count; (1 2 3) 4, (4 5 6) 2),
            _ => by_queries!(self, simd, count; (1 2 3 4 5 6) 2),
        }
    }

    /// All blocks in their order. A word of the cache holds `INPUTS` inputs.
    #[inline(always)]
    fn walk<S: Simd, const INPUTS: usize, const QUERIES: usize, const VECTORS: usize>(
        self,
        simd: S,
    ) {
        let Few { task, cache, q, next, words, sums, put } = self;
        let layout = cache.layout;
        let mut queries: [Query; QUERIES] = std::array::from_fn(|at| task.query(layout, at));
        task.words(layout, q, words);
        sums.clear();
        sums.resize(QUERIES * layout.padded(), 0.0);
        let mut scratch = Scratch::<QUERIES>::new();
        let (first, last) = (task.first_block(layout.heads), (task.end() - 1) / BLOCK);
        let block = |index| cache.block(task.run, task.head, index);
        for index in first..=last {
            let own = block(index).expect("a table of all blocks");
            let then = if index < last { block(index + 1) } else { next };
            let fold = Fold::<INPUTS, QUERIES, VECTORS> {
                layout,
                start: index * BLOCK,
                end: (task.end() - index * BLOCK).min(BLOCK),
                block: own,
                next: then.unwrap_or(own),
            };
            fold.score(simd, words, &mut scratch);
            let keep = fold.weigh(simd, &mut queries, &mut scratch);
            fold.add(simd, &keep, sums, &mut scratch);
        }
        let results = queries.iter().zip(sums.chunks_exact_mut(layout.padded()));
        for (at, (query, sums)) in results.enumerate() {
            let inverse = 1.0 / sum(&query.total);
            sums.iter_mut().for_each(|sum| *sum *= inverse);
            let (row, member) = task.place(layout, at);
            put(row, member, &sums[..layout.heads.width]);
        }
    }
}

/// What folding a block needs on the way. No vector of it lies in two lines of the cache.
#[repr(align(64))]
struct Scratch<const QUERIES: usize> {
    /// `[half][query][position]`
    scores: [[[f32; PANEL]; QUERIES]; BLOCK / PANEL],
    /// `[query][position]`, rounded as values are.
    weights: [[f32; BLOCK]; QUERIES],
    /// `[query][column of a stripe]`
    out: [[f32; PANEL]; QUERIES],
}

impl<const QUERIES: usize> Scratch<QUERIES> {
    #[inline(always)]
    fn new() -> Self {
        Scratch {
            scores: [[[0.0; PANEL]; QUERIES]; BLOCK / PANEL],
            weights: [[0.0; BLOCK]; QUERIES],
            out: [[0.0; PANEL]; QUERIES],
        }
    }
}

/// One block about to be folded into the queries.
struct Fold<'a, const INPUTS: usize, const QUERIES: usize, const VECTORS: usize> {
    layout: Layout,
    /// Position of the block in the sequence.
    start: usize,
    /// Positions of the block that any query sees.
    end: usize,
    block: Block<'a>,
    /// To be fetched on the way.
    next: Block<'a>,
}

impl<const INPUTS: usize, const QUERIES: usize, const VECTORS: usize>
    Fold<'_, INPUTS, QUERIES, VECTORS>
{
    /// Multiplies queries and keys.
    #[inline(always)]
    fn score<S: Simd>(&self, simd: S, words: &[u32], scratch: &mut Scratch<QUERIES>) {
        let half = self.layout.key_words() * PANEL;
        let halves = self.block.keys.chunks_exact(half).zip(self.next.keys.chunks_exact(half));
        let seen = self.end.div_ceil(PANEL);
        for (index, ((keys, next), out)) in halves.zip(&mut scratch.scores).enumerate() {
            if index >= seen {
                fetch_lines(next);
                continue;
            }
            let tile = PanelTile::<INPUTS> {
                rows: words,
                stride: self.layout.query_words(),
                panel: keys,
                ahead: Span::of(next),
                goes_on: false,
                out,
            };
            tile.multiply::<S, QUERIES, VECTORS>(simd);
        }
    }

    /// What of the next values is fetched between the products, which else are too fast for memory.
    #[inline(always)]
    fn fetched_early(&self) -> &[u32] {
        &self.next.values[..self.next.values.len() / 4]
    }

    /// What of them is fetched in the product with a stripe.
    #[inline(always)]
    fn fetched_beside(&self, stripe: usize, stripes: usize) -> Span<'_> {
        let late = &self.next.values[self.fetched_early().len()..];
        let share = late.len() / stripes;
        let share = &late[stripe * share..][..share];
        if self.end < BLOCK {
            // A short product has no time for all of it.
            fetch_lines(share);
            return Span::NOTHING;
        }
        Span::of(share)
    }

    /// Turns scores into weights, and those that a query does not see into zeros; returns what the earlier
    /// blocks of each query are to be multiplied with.
    #[inline(always)]
    fn weigh<S: Simd>(
        &self,
        simd: S,
        queries: &mut [Query; QUERIES],
        scratch: &mut Scratch<QUERIES>,
    ) -> [S::f32s; QUERIES] {
        let mut keep = [simd.splat_f32s(1.0); QUERIES];
        let early = self.fetched_early();
        let mut early =
            early.chunks(early.len().div_ceil(QUERIES * BLOCK / S::F32_LANES / AT_ONCE));
        let scale = self.layout.heads.scale() as f32;
        let Scratch { scores: [left, right], weights, .. } = scratch;
        for (row, query) in queries.iter_mut().enumerate() {
            let scores = Scores { halves: [&left[row], &right[row]], scale };
            let (weights, _) = S::as_mut_simd_f32s(&mut weights[row]);
            keep[row] = query.weigh(
                simd,
                self.start,
                scores,
                #[inline(always)]
                |first, own| {
                    fetch_lines(early.next().unwrap_or(&[]));
                    for at in 0..AT_ONCE {
                        weights[first + at] = match INPUTS {
                            1 => own[at],
                            _ => rounded_vector(simd, own[at]),
                        };
                    }
                },
            );
        }
        keep
    }

    /// Adds the weighted values.
    #[inline(always)]
    fn add<S: Simd>(
        &self,
        simd: S,
        keep: &[S::f32s; QUERIES],
        sums: &mut [f32],
        scratch: &mut Scratch<QUERIES>,
    ) {
        let (kind, padded) = (self.layout.kind, self.layout.padded());
        // Behind the last visible position weights are zero, and values those of nobody.
        let stripe = kind.words(BLOCK) * PANEL;
        let seen = kind.words(self.end) * PANEL;
        for (index, values) in self.block.values.chunks_exact(stripe).enumerate() {
            let tile = PanelTile::<INPUTS> {
                rows: cast_slice(scratch.weights.as_flattened()),
                stride: BLOCK,
                panel: &values[..seen],
                ahead: self.fetched_beside(index, padded / PANEL),
                goes_on: false,
                out: &mut scratch.out,
            };
            tile.multiply::<S, QUERIES, VECTORS>(simd);
            for row in 0..QUERIES {
                let sums = &mut sums[row * padded + index * PANEL..][..PANEL];
                let (sums, _) = S::as_mut_simd_f32s(sums);
                let (out, _) = S::as_simd_f32s(&scratch.out[row]);
                for (sum, &out) in sums.iter_mut().zip(out) {
                    *sum = simd.mul_add_f32s(*sum, keep[row], out);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::attention::Heads;
    use super::super::Run;
    use super::*;
    use candle_core::DType;
    use std::cell::RefCell;

    type Put<'a> = &'a dyn Fn(usize, usize, &[f32]);

    fn check(heads: Heads, dtype: DType, count: usize) {
        let random = |rows: usize, heads: usize| {
            let number = |index: usize| ((index * 7919 + 13) % 1009) as f32 / 300.0 - 1.7;
            (0..rows * heads * HEADS.width).map(number).collect::<Vec<f32>>()
        };
        let mut cache = LayerCache::new(3, heads, dtype);
        let (rows, table) = (150, vec![2, 0, 1]);
        let keys = random(rows, heads.key_value);
        let values: Vec<f32> = keys.iter().rev().copied().collect();
        let all = Run { first_row: 0, rows, position: 0, table: table.clone() };
        cache.store([&keys, &values], &[all]).unwrap();
        let run = Run { first_row: 0, rows: count, position: rows - count, table };
        let task = Task { run: &run, first: 0, count, head: 1 };
        let q = random(count, heads.query);
        let found = |work: &dyn Fn(Few<'_, Put<'_>>)| {
            let out = RefCell::new(Vec::new());
            let put = |_: usize, _: usize, values: &[f32]| {
                out.borrow_mut().extend(values.iter().map(|value| value.to_bits()));
            };
            let (next, words, sums) = (None, &mut Vec::new(), &mut Vec::new());
            work(Few { task: &task, cache: &cache, q: &q, next, words, sums, put: &put });
            out.into_inner()
        };
        let widest = found(&|few| pulp::Arch::new().dispatch(few));
        assert_eq!(widest.len(), count * heads.group() * heads.width);
        assert_eq!(found(&|few| few.with_simd(pulp::Scalar)), widest, "one lane");
        assert_eq!(found(&|few| few.with_simd(pulp::Scalar256b)), widest, "8 lanes");
        assert_eq!(found(&|few| few.with_simd(pulp::Scalar512b)), widest, "16 lanes");
    }

    const HEADS: Heads = Heads { query: 6, key_value: 2, width: 42, window: None };

    #[test]
    fn vectors_of_any_width_compute_the_same_bits() {
        for dtype in [DType::F32, DType::BF16] {
            if dtype == DType::F32 || are_widened() {
                check(HEADS, dtype, 1);
                check(Heads { window: Some(21), ..HEADS }, dtype, 2);
                check(Heads { query: 2, window: Some(1), ..HEADS }, dtype, 6);
            }
        }
    }
}
