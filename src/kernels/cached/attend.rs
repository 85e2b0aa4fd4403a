//! Attention of some queries to the blocks of their sequence.

use super::super::attention::Heads;
use super::super::fetch::{begin_to_fetch, fetch_all};
use super::super::layout;
use super::super::packed::WeightType;
use super::super::pairs::are_widened;
use super::super::real::{simd, sum};
use super::super::tiles::{Ahead, PANEL, ROWS, room, rows_at_once};
use super::few::{Few, are_few};
use super::weigh::{AT_ONCE, Query, Scores};
use super::{BLOCK, Block, LayerCache, Layout, Run};
use pulp::{Arch, Simd, WithSimd};
use std::cell::RefCell;
use std::ops::Range;

/// Some rows of a run and the query heads of one key-value head.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    pub(super) run: &'a Run,
    /// First row of the run.
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) head: usize,
}

impl Task<'_> {
    /// The first block that any of its queries sees.
    pub(super) fn first_block(&self, heads: Heads) -> usize {
        heads.first_visible(self.run.position + self.first) / BLOCK
    }

    /// The position behind the last that any of its queries sees.
    pub(super) fn end(&self) -> usize {
        self.run.position + self.first + self.count
    }

    /// Row of the step, and query of the group, of its query `index`.
    #[inline(always)]
    pub(super) fn place(&self, layout: Layout, index: usize) -> (usize, usize) {
        let group = layout.heads.group();
        (self.run.first_row + self.first + index / group, index % group)
    }

    /// Its query `index`, which has seen nothing yet.
    #[inline(always)]
    pub(super) fn query(&self, layout: Layout, index: usize) -> Query {
        let position = self.run.position + self.first + index / layout.heads.group();
        Query::new(layout.heads, position)
    }

    /// The words of its queries, for the product with keys.
    #[inline(always)]
    pub(super) fn words(&self, layout: Layout, q: &[f32], words: &mut Vec<u32>) {
        let Heads { query, width, .. } = layout.heads;
        let (group, stride) = (layout.heads.group(), layout.query_words());
        let count = self.count * group;
        words.resize(room(layout.kind, count) * stride, 0);
        for (index, words) in words.chunks_exact_mut(stride).take(count).enumerate() {
            let (row, member) = self.place(layout, index);
            let at = row * query + self.head * group + member;
            layout::row(layout.kind.in_rows(), &q[at * width..][..width], words);
        }
    }

    /// Calls `put(row, query of the group, values)` for each result; what `next` begins with is fetched.
    pub(super) fn attend(
        &self,
        cache: &LayerCache,
        q: &[f32],
        next: Option<&Task<'_>>,
        put: impl Fn(usize, usize, &[f32]),
    ) {
        let layout = cache.layout;
        if are_few(layout, self.count * layout.heads.group()) {
            let next = next
                .and_then(|next| cache.block(next.run, next.head, next.first_block(layout.heads)));
            return BUFFERS.with_borrow_mut(|Buffers { words, sums, .. }| {
                Arch::new().dispatch(Few { task: self, cache, q, next, words, sums, put });
            });
        }
        BUFFERS.with_borrow_mut(|Buffers { queries, words, sums, scratch }| {
            let (heads, stride, padded) = (layout.heads, layout.query_words(), layout.padded());
            let count = self.count * heads.group();
            queries.clear();
            queries.extend((0..count).map(|index| self.query(layout, index)));
            self.words(layout, q, words);
            sums.clear();
            sums.resize(count * padded, 0.0);
            // The scores of a fold are computed before the weights of the one before it, which they can hide
            // the latency of.
            let folds = self.folds(cache, next, queries);
            for (index, fold) in folds.iter().enumerate() {
                let next = fold.next.map(|next| next.keys);
                let before = index.checked_sub(1).map(|before| &folds[before]);
                let then = before.map(|before| before.block.values).or(next);
                fold.score(&words[fold.rows.start * stride..], then, scratch);
                if let Some(before) = before {
                    before.add(queries, sums, next, scratch);
                }
            }
            if let Some(last) = folds.last() {
                last.add(queries, sums, last.next.map(|next| next.keys), scratch);
            }
            let results = queries.iter().zip(sums.chunks_exact_mut(padded));
            for (index, (query, sums)) in results.enumerate() {
                simd(
                    #[inline(always)]
                    || {
                        let inverse = 1.0 / sum(&query.total);
                        sums.iter_mut().for_each(|sum| *sum *= inverse);
                    },
                );
                let (row, member) = self.place(layout, index);
                put(row, member, &sums[..heads.width]);
            }
        });
    }

    /// The blocks in their order, and the queries that see something of each, in tiles.
    fn folds<'a>(
        &'a self,
        cache: &'a LayerCache,
        next: Option<&'a Task<'_>>,
        queries: &[Query],
    ) -> Vec<Fold<'a>> {
        let (layout, heads) = (cache.layout, cache.layout.heads);
        let last = (self.end() - 1) / BLOCK;
        let mut folds = Vec::with_capacity(last + 1);
        for block in self.first_block(heads)..=last {
            let mut following = match next {
                _ if block < last => cache.block(self.run, self.head, block + 1),
                Some(next) => cache.block(next.run, next.head, next.first_block(heads)),
                None => None,
            };
            let own = cache.block(self.run, self.head, block).expect("a table of all blocks");
            let at_once = rows_at_once(layout.kind);
            for first in (0..queries.len()).step_by(at_once) {
                let rows = first..(first + at_once).min(queries.len());
                let start = block * BLOCK;
                let seen = queries[rows.clone()].iter().map(|query| query.seen(start).end);
                let end = seen.max().unwrap_or(0);
                if end > 0 {
                    let (next, side) = (following.take(), folds.len() % 2);
                    folds.push(Fold { layout, block: own, next, start, rows, end, side });
                }
            }
        }
        folds
    }
}

/// Memory of a task, used again by the next one of the thread.
struct Buffers {
    queries: Vec<Query>,
    /// `[query][word of columns]`
    words: Vec<u32>,
    /// `[query][column]`
    sums: Vec<f32>,
    scratch: Box<Scratch>,
}

/// What folding a block needs on the way. No vector of it lies in two lines of the cache.
#[repr(align(64))]
struct Scratch {
    /// `[side][half][query][position]`
    scores: [[[[f32; PANEL]; ROWS]; BLOCK / PANEL]; 2],
    /// `[query][word of positions]`
    weights: [u32; ROWS * BLOCK],
    /// `[query][column of a stripe]`
    out: [[f32; PANEL]; ROWS],
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::new(Buffers {
        queries: Vec::new(),
        words: Vec::new(),
        sums: Vec::new(),
        scratch: Box::new(Scratch {
            scores: [[[[0.0; PANEL]; ROWS]; BLOCK / PANEL]; 2],
            weights: [0; ROWS * BLOCK],
            out: [[0.0; PANEL]; ROWS],
        }),
    });
}

/// One block about to be folded into some queries, at most [`ROWS`]. They share its loads; each computes as
/// if alone.
struct Fold<'a> {
    layout: Layout,
    block: Block<'a>,
    /// To be fetched on the way.
    next: Option<Block<'a>>,
    /// Position of the block in the sequence.
    start: usize,
    /// Which of the queries.
    rows: Range<usize>,
    /// Positions of the block that any of them sees.
    end: usize,
    /// Which of the two buffers holds the scores.
    side: usize,
}

impl Fold<'_> {
    /// Multiplies queries and keys. On the way it fetches the block that is read `then`.
    fn score(&self, words: &[u32], then: Option<&[u32]>, scratch: &mut Scratch) {
        let (kind, stride) = (self.layout.kind, self.layout.query_words());
        let room = room(kind, self.rows.len());
        let half = self.layout.key_words() * PANEL;
        let next = self.next.map(|next| next.keys);
        let halves = self.block.keys.chunks_exact(half).zip(&mut scratch.scores[self.side]);
        for (index, (keys, out)) in halves.enumerate().take(self.end.div_ceil(PANEL)) {
            let ahead = ahead(kind, next, index * half..(index + 1) * half, (then, index * half));
            kind.tile(words, stride, keys, ahead, &mut out[..room]);
        }
    }

    /// Turns scores into weights, and adds the values. On the way it fetches the block that is read `then`.
    fn add(
        &self,
        queries: &mut [Query],
        sums: &mut [f32],
        then: Option<&[u32]>,
        scratch: &mut Scratch,
    ) {
        let kind = self.layout.kind;
        let Scratch { scores, weights, out } = scratch;
        let queries = &mut queries[self.rows.clone()];
        let room = room(kind, queries.len());
        // Whole steps of a matrix unit, where there is one: weights behind the last visible position are zeros. Vectors fetch
        // as `ahead` has it.
        let (whole, then) = match rows_at_once(kind) {
            ROWS => (PANEL, then.unwrap_or(&[])),
            _ => (1, &[][..]),
        };
        let depth = kind.words(self.end.next_multiple_of(whole));
        let half = then.len() / 2;
        let mut keep = [1.0; ROWS];
        Arch::new().dispatch(Weigh {
            fold: self,
            queries,
            scores: &scores[self.side],
            weights,
            keep: &mut keep,
            then: &then[..half],
        });
        // Behind the last visible position weights are zero, and values those of nobody.
        let stripe = kind.words(BLOCK) * PANEL;
        let next = self.next.map(|next| next.values);
        let padded = self.layout.padded();
        let sums = &mut sums[self.rows.start * padded..self.rows.end * padded];
        for (index, values) in self.block.values.chunks_exact(stripe).enumerate() {
            let at = index * stripe..(index + 1) * stripe;
            let ahead = ahead(kind, next, at, (Some(then), half + index * stripe));
            let values = &values[..depth * PANEL];
            kind.tile(&*weights, BLOCK, values, ahead, &mut out[..room]);
            simd(
                #[inline(always)]
                || {
                    let stripes = sums.as_chunks_mut::<PANEL>().0.iter_mut();
                    let stripes = stripes.skip(index).step_by(padded / PANEL);
                    for ((sums, &out), keep) in stripes.zip(&*out).zip(keep) {
                        let mut own = *sums;
                        for lane in 0..PANEL {
                            own[lane] = own[lane].mul_add(keep, out[lane]);
                        }
                        *sums = own;
                    }
                },
            );
        }
    }
}

/// Turns the scores of a fold into weights, and those that a query does not see into zeros.
struct Weigh<'a> {
    fold: &'a Fold<'a>,
    queries: &'a mut [Query],
    /// `[half][query][position]`
    scores: &'a [[[f32; PANEL]; ROWS]; BLOCK / PANEL],
    /// `[query][word of positions]`
    weights: &'a mut [u32; ROWS * BLOCK],
    /// What the earlier blocks of each query are to be multiplied with.
    keep: &'a mut [f32; ROWS],
    /// To be fetched on the way.
    then: &'a [u32],
}

impl WithSimd for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Weigh { fold, queries, scores: [left, right], weights, keep, then } = self;
        let (kind, scale) = (fold.layout.kind, fold.layout.heads.scale() as f32);
        let mut then = then.chunks(then.len().div_ceil(queries.len()).max(1));
        for (row, query) in queries.iter_mut().enumerate() {
            fetch_all(then.next().unwrap_or(&[]));
            let scores = Scores { halves: [&left[row], &right[row]], scale };
            let mut own = [0.0; BLOCK];
            let (vectors, _) = S::as_mut_simd_f32s(&mut own);
            let earlier = query.weigh(
                simd,
                fold.start,
                scores,
                #[inline(always)]
                |first, weights| vectors[first..first + AT_ONCE].copy_from_slice(&weights),
            );
            keep[row] = simd.reduce_max_f32s(earlier);
            let weights = &mut weights[row * BLOCK..][..kind.row_words(BLOCK)];
            layout::row(kind.in_rows(), &own, weights);
        }
    }
}

/// What is fetched while a tile is multiplied (docs/engine.md has what was tried): on a matrix unit what is read
/// `then`, whole, and its part of the `next` block is begun with; on vectors that part, or half of it where they
/// multiply bf16.
fn ahead<'a>(
    kind: WeightType,
    next: Option<&'a [u32]>,
    part: Range<usize>,
    (then, at): (Option<&'a [u32]>, usize),
) -> Ahead<'a> {
    let next = next.and_then(|next| next.get(part)).unwrap_or(&[]);
    if rows_at_once(kind) != ROWS {
        let is_half = kind == WeightType::Bf16 && !are_widened();
        return Ahead::new(next, if is_half { PANEL / 2 } else { PANEL });
    }
    begin_to_fetch(next);
    Ahead::new(then.and_then(|then| then.get(at..)).unwrap_or(&[]), PANEL)
}
