//! Attention of a model in training on a CPU, on the tiles of products: in f32, or in bf16 with sums in f32.
//!
//! ```text
//! forward    S = Q K^T     P = softmax(S)        O = P V
//! backward   dP = dO V^T   dS = P (dP - dO·O)    dQ = dS K    dK^T += Q^T dS    dV^T += dO^T P
//! ```
//!
//! One task for each span and key-value head: it brings its keys and values into panels once. 64 queries meet 32
//! keys at a time; what a block of queries does not see is not computed. Gradients of keys and values are summed
//! transposed, so that scores are panels as they stand. Each sum has a fixed order.

mod pass;

use super::super::layout::{self, panel_of_columns, panel_of_rows};
use super::super::matmul::View;
use super::super::packed::WeightType;
use super::super::real::simd;
use super::super::share::{Target, each};
use super::super::tiles::PANEL;
use super::{Heads, check};
use std::cell::RefCell;
use std::ops::Range;

/// Queries that meet a panel of keys together.
const QUERIES: usize = 64;

/// Words that the queries of a block take in a column at most: in three parts.
const MOST_WORDS: usize = 3 * QUERIES / 2;

/// Scores of a block of queries with a panel of keys.
type Scores = [[f32; PANEL]; QUERIES];

/// Rows of queries, keys and values, already turned, and the spans within which they see each other.
#[derive(Clone, Copy)]
pub(crate) struct Packed<'a> {
    /// What products are computed in: f32, three parts of bf16, or bf16.
    pub(crate) kind: WeightType,
    pub(crate) heads: Heads,
    pub(crate) spans: &'a [Range<usize>],
    /// `(rows, query heads * width)`
    pub(crate) q: &'a [f32],
    /// `(rows, key-value heads * width)`
    pub(crate) k: &'a [f32],
    /// `(rows, key-value heads * width)`
    pub(crate) v: &'a [f32],
}

/// What the forward pass left, and the gradient of its output.
#[derive(Clone, Copy)]
pub(crate) struct Saved<'a> {
    /// `(rows, query heads * width)`
    pub(crate) output: &'a [f32],
    /// `(rows, query heads)`
    pub(crate) log_sums: &'a [f32],
    /// `(rows, query heads * width)`
    pub(crate) of_output: &'a [f32],
}

impl Packed<'_> {
    /// Writes the output `(rows, query heads * width)`, and the logarithm of each row's sum of exponentiated scores
    /// `(rows, query heads)`. They are zero for rows outside all spans.
    pub(crate) fn forward(&self, output: &mut [f32], log_sums: &mut [f32]) {
        let (rows, Heads { query, width, .. }) = (self.rows(), self.heads);
        self.clear_gaps(rows, [&mut *output, &mut *log_sums]);
        let output = Target::new(output, query * width, rows);
        let log_sums = Target::new(log_sums, query, rows);
        each(self.tasks(), |task| {
            BUFFERS.with_borrow_mut(|buffers| task.forward(buffers, &output, &log_sums));
        });
    }

    /// Writes the gradients of queries, keys and values.
    pub(crate) fn backward(&self, saved: Saved<'_>, [of_q, of_k, of_v]: [&mut [f32]; 3]) {
        let (rows, Heads { query, key_value, width, .. }) = (self.rows(), self.heads);
        self.clear_gaps(rows, [&mut *of_q, &mut *of_k, &mut *of_v]);
        let of_q = Target::new(of_q, query * width, rows);
        let of_k = Target::new(of_k, key_value * width, rows);
        let of_v = Target::new(of_v, key_value * width, rows);
        each(self.tasks(), |task| {
            BUFFERS.with_borrow_mut(|buffers| task.backward(buffers, saved, [&of_q, &of_k, &of_v]));
        });
    }

    /// Where spans do not cover all rows, nobody writes what lies between them.
    fn clear_gaps<const COUNT: usize>(&self, rows: usize, outputs: [&mut [f32]; COUNT]) {
        if self.spans.iter().map(Range::len).sum::<usize>() < rows {
            outputs.into_iter().for_each(|output| output.fill(0.0));
        }
    }

    fn rows(&self) -> usize {
        let rows = self.q.len() / (self.heads.query * self.heads.width);
        check(self.spans, rows);
        rows
    }

    /// Spans in order, and in each the key-value heads in order.
    fn tasks(&self) -> impl Iterator<Item = Task<'_>> {
        let of = *self;
        let spans = of.spans.iter().filter(|span| !span.is_empty());
        spans.flat_map(move |span| {
            let (start, rows) = (span.start, span.len());
            (0..of.heads.key_value).map(move |group| Task { of, start, rows, group })
        })
    }
}

/// The query heads of one key-value head over one span.
struct Task<'a> {
    of: Packed<'a>,
    start: usize,
    rows: usize,
    group: usize,
}

/// A block of queries of one head, and the panels of keys that any of them sees.
struct Block {
    head: usize,
    queries: Range<usize>,
    panels: Range<usize>,
}

impl Block {
    /// Its queries, and what fills the last tile.
    fn rows(&self) -> usize {
        self.queries.len().next_multiple_of(PANEL)
    }
}

/// Memory of a task, used again by the next one of the thread.
#[derive(Default)]
struct Buffers {
    /// `[panel][word of columns][32 rows]`
    key_rows: Vec<u32>,
    value_rows: Vec<u32>,
    /// `[stripe][word of rows][32 columns]`
    key_columns: Vec<u32>,
    value_columns: Vec<u32>,
    /// `[query][word of columns]`
    q: Vec<u32>,
    of_output: Vec<u32>,
    /// `[column][word of queries]`
    q_turned: Vec<u32>,
    of_output_turned: Vec<u32>,
    /// `[query][word of keys]`
    weights: Vec<u32>,
    /// `[panel]`
    scores: Vec<Scores>,
    /// `[panel][column][32 keys]`
    of_keys: Vec<[f32; PANEL]>,
    of_values: Vec<[f32; PANEL]>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

impl Task<'_> {
    /// Columns, padded to whole panels.
    fn padded(&self) -> usize {
        self.of.heads.width.next_multiple_of(PANEL)
    }

    /// Words of the columns of a key or value in a panel.
    fn words(&self) -> usize {
        self.of.kind.words(self.padded())
    }

    /// Words of the columns of a query, or of the gradient of an output.
    fn row_words(&self) -> usize {
        self.of.kind.row_words(self.padded())
    }

    /// Words of the keys of a panel.
    fn panel_words(&self) -> usize {
        self.of.kind.words(PANEL)
    }

    fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Words from the weights of one query to those of the next: an odd number of cache lines, for rows of a tile
    /// are not to fall into one set of the cache.
    fn stride(&self) -> usize {
        ((self.panels() * self.of.kind.row_words(PANEL)).div_ceil(16) | 1) * 16
    }

    /// Rows `rows` of the span in the columns of head `head` of a matrix with `heads` heads.
    fn view<'b>(
        &self,
        data: &'b [f32],
        heads: usize,
        head: usize,
        rows: Range<usize>,
    ) -> View<'b, f32> {
        let (width, stride) = (self.of.heads.width, heads * self.of.heads.width);
        let from = (self.start + rows.start) * stride + head * width;
        View::rows(&data[from..], rows.len(), width, stride)
    }

    /// The queries of a block, or what belongs to them.
    fn queries<'b>(&self, data: &'b [f32], block: &Block) -> View<'b, f32> {
        self.view(data, self.of.heads.query, block.head, block.queries.clone())
    }

    /// Keys or values by rows.
    fn pack_rows(&self, data: &[f32], words: &mut Vec<u32>) {
        let x = self.view(data, self.of.heads.key_value, self.group, 0..self.rows);
        let length = self.words() * PANEL;
        words.resize(self.panels() * length, 0);
        for (panel, words) in words.chunks_exact_mut(length).enumerate() {
            simd(
                #[inline(always)]
                || panel_of_rows(self.of.kind.in_panels(), x, panel * PANEL, words),
            );
        }
    }

    /// Keys or values by columns.
    fn pack_columns(&self, data: &[f32], words: &mut Vec<u32>) {
        let x = self.view(data, self.of.heads.key_value, self.group, 0..self.rows);
        let length = self.panels() * self.panel_words() * PANEL;
        words.resize(self.padded() / PANEL * length, 0);
        for (stripe, words) in words.chunks_exact_mut(length).enumerate() {
            simd(
                #[inline(always)]
                || panel_of_columns(self.of.kind.in_panels(), x, stripe * PANEL, words),
            );
        }
    }

    /// The rows of a block, zeros for those that are not there.
    fn pack_block(&self, x: View<'_, f32>, words: &mut Vec<u32>) {
        let stride = self.row_words();
        words.resize(x.rows.next_multiple_of(PANEL) * stride, 0);
        simd(
            #[inline(always)]
            || {
                for (row, words) in words.chunks_exact_mut(stride).enumerate() {
                    match row < x.rows {
                        true => layout::row(self.of.kind.in_rows(), row_of(x, row), words),
                        false => words.fill(0),
                    }
                }
            },
        );
    }

    /// The blocks of all heads in order.
    fn blocks(&self) -> impl Iterator<Item = Block> {
        let (heads, rows) = (self.of.heads, self.rows);
        let first_head = self.group * heads.group();
        (first_head..first_head + heads.group()).flat_map(move |head| {
            (0..rows).step_by(QUERIES).map(move |first| {
                let end = rows.min(first + QUERIES);
                let panels = heads.first_visible(first) / PANEL..end.div_ceil(PANEL);
                Block { head, queries: first..end, panels }
            })
        })
    }

    /// What of panel `panel` the query at `row` sees.
    #[inline(always)]
    fn seen(&self, row: usize, panel: usize) -> Range<u32> {
        let (first, start) = (self.of.heads.first_visible(row), panel * PANEL);
        let from = first.max(start) - start;
        let to = (row + 1).min(start + PANEL).saturating_sub(start);
        from as u32..to.max(from) as u32
    }
}

#[inline(always)]
fn row_of<'a>(x: View<'a, f32>, row: usize) -> &'a [f32] {
    &x.data[row * x.row_stride..][..x.columns]
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "one span is a case of its own")]
mod tests {
    use super::super::super::storage::tensor;
    use super::super::super::twin::{close, random};
    use super::super::composed;
    use super::*;
    use candle_core::{DType, Tensor};

    fn check_kind(kind: WeightType, rows: usize, spans: &[Range<usize>], heads: Heads) {
        let (wide, narrow) = (heads.query * heads.width, heads.key_value * heads.width);
        let [q, k, v, of_output] =
            [wide, narrow, narrow, wide].map(|width| random(&[rows, width], DType::F32));
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (q_rows, k_rows, v_rows) = (flat(&q), flat(&k), flat(&v));
        let packed = Packed { kind, heads, spans, q: &q_rows, k: &k_rows, v: &v_rows };
        let (mut output, mut log_sums) = (vec![7.0; rows * wide], vec![7.0; rows * heads.query]);
        packed.forward(&mut output, &mut log_sums);
        let of_output_rows = flat(&of_output);
        let saved = Saved { output: &output, log_sums: &log_sums, of_output: &of_output_rows };
        let [mut of_q, mut of_k, mut of_v] = [wide, narrow, narrow].map(|w| vec![7.0; rows * w]);
        packed.backward(saved, [&mut of_q, &mut of_k, &mut of_v]);

        let twin = composed::forward(&q, &k, &v, spans, &heads).unwrap().output;
        let twins = composed::backward([&q, &k, &v], &twin, &of_output, spans, &heads).unwrap();
        let ours = [(output, wide), (of_q, wide), (of_k, narrow), (of_v, narrow)];
        let twins = std::iter::once(twin).chain(twins);
        for ((what, (ours, width)), twin) in
            ["output", "of q", "of k", "of v"].iter().zip(ours).zip(twins)
        {
            let ours = tensor(ours, (rows, width)).unwrap();
            match kind {
                WeightType::F32 | WeightType::Bf16x3 => close(&ours, &twin, what),
                _ => near(&ours, &twin, 0.1 * norm(&of_output), what),
            }
        }
    }

    /// Rounding to bf16 is wrong by one in 512 at most, and differences that are small keep what theirs were.
    fn near(ours: &Tensor, twin: &Tensor, size: f32, what: &str) {
        let error = norm(&(ours - twin).unwrap()) / norm(twin).max(size);
        assert!(error < 0.02, "{what}: off by {error} of its norm");
    }

    fn norm(t: &Tensor) -> f32 {
        t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt()
    }

    fn check(rows: usize, spans: &[Range<usize>], heads: Heads) {
        for kind in [WeightType::F32, WeightType::Bf16x3, WeightType::Bf16] {
            check_kind(kind, rows, spans, heads);
        }
    }

    const HEADS: Heads = Heads { query: 4, key_value: 2, width: 8, window: None };

    #[test]
    fn the_kernel_equals_its_composed_twin() {
        check(2, &[0..2], HEADS);
        check(150, &[0..150], HEADS);
        check(150, &[0..1, 1..70, 70..70, 75..150], HEADS);
        check(64, &[0..64], Heads { key_value: 4, width: 64, ..HEADS });
        check(90, &[0..90], Heads { key_value: 1, width: 5, ..HEADS });
        check(200, &[0..200], Heads { width: 40, ..HEADS });
    }

    #[test]
    fn a_window_hides_what_lies_further_back() {
        for window in [1, 3, 64, 100, 1000] {
            check(200, &[0..130, 130..200], Heads { window: Some(window), ..HEADS });
        }
    }
}
