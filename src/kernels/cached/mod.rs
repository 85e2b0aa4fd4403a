//! Attention over a cache of keys and values, kept in blocks of 64 positions, in f32 or bf16.
//!
//! ```text
//! for each head  keys    [block][half][word of columns][32 positions]
//!                values  [block][stripe][word of positions][32 columns]
//! ```
//!
//! Both are panels as [`super::packed`] has them, so queries meet keys, and weights meet values, in the
//! same tiles that rows meet weights in; in bf16, queries and weights are rounded too.
//!
//! A query walks through its blocks in order and folds each into a running maximum, sum and weighted value
//! (Milakov and Gimelshein, 2018; arXiv 1805.02867). What it computes does not depend on which other
//! queries are there, nor on whether it came in one step with its neighbours or alone: prompts may be cut
//! into chunks anywhere without changing a bit. (That is of finite keys and values: a weight of zero times what is not
//! finite is no number, and queries of a tile share values that not all of them see.)

// Reason: threads write different columns of the same rows, which slices cannot express.
#![expect(
    unsafe_code,
    reason = "rows of one output, and blocks of one cache, are written by several threads"
)]

mod attend;
mod few;
mod pages;
mod parts;
mod wanted;
mod weigh;

use super::attention::Heads;
use super::packed::WeightType;
use super::real::LANES;
use super::share::{Target, each};
use super::storage::{elements, tensor};
use super::tiles::PANEL;
use attend::Task;
use candle_core::{DType, Result, Tensor, bail};
use pages::Pages;
pub(crate) use parts::{CachePart, Cut, StepPart, share};

/// Positions of one block.
pub const BLOCK: usize = LANES;

/// Query rows of one task.
const ROWS_PER_TASK: usize = 32;

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

/// The rows of a step of generation.
#[derive(Clone, Copy, Debug)]
pub struct StepRows<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// Position of each row in its sequence.
    pub positions: &'a [u32],
    /// The rows of each sequence, one sequence after the other.
    pub runs: &'a [Run],
    /// Rows whose next token is wanted.
    pub samples: &'a [u32],
}

/// A row of a step whose id is a token that the step before samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The row.
    pub row: u32,
    /// Which sample of the step before.
    pub sample: u32,
}

/// Keys and values of one layer.
#[derive(Debug)]
pub struct LayerCache {
    pages: Vec<Pages>,
    layout: Layout,
}

/// Keys and values of one block.
#[derive(Clone, Copy, Debug)]
struct Block<'a> {
    keys: &'a [u32],
    values: &'a [u32],
}

#[derive(Clone, Copy, Debug)]
struct Layout {
    kind: WeightType,
    heads: Heads,
}

impl Layout {
    /// Words of the columns of a key.
    fn key_words(self) -> usize {
        self.kind.words(self.heads.width)
    }

    /// Words of the columns of a query.
    fn query_words(self) -> usize {
        self.kind.row_words(self.heads.width)
    }

    /// Words of a block of keys.
    fn key_page(self) -> usize {
        self.key_words() * BLOCK
    }

    /// Columns of a value, padded to whole stripes.
    fn padded(self) -> usize {
        self.heads.width.div_ceil(PANEL) * PANEL
    }

    /// Words of a block of values.
    fn value_page(self) -> usize {
        self.kind.words(BLOCK) * self.padded()
    }
}

impl LayerCache {
    /// Room for `blocks` blocks of keys and values in `dtype`: bf16 or else f32.
    pub fn new(blocks: usize, heads: Heads, dtype: DType) -> Self {
        let kind = if dtype == DType::BF16 { WeightType::Bf16 } else { WeightType::F32 };
        let layout = Layout { kind, heads };
        LayerCache {
            pages: (0..heads.key_value).map(|_| Pages::new(blocks, layout)).collect(),
            layout,
        }
    }

    /// How its rows divide into heads.
    pub(crate) fn heads(&self) -> &Heads {
        &self.layout.heads
    }

    /// Stores the rows' keys and values, then attends: `(rows, query heads * width)`.
    ///
    /// # Errors
    /// If the tensors are not contiguous f32 on the CPU, or runs overlap.
    ///
    /// # Panics
    /// If a run's table is too short or names a block that does not exist.
    pub fn step(&mut self, [q, k, v]: &[Tensor; 3], runs: &[Run]) -> Result<Tensor> {
        let shape = q.dims2()?;
        let mut out = vec![0.0; shape.0 * shape.1];
        self.store([&elements(k)?, &elements(v)?], runs)?;
        self.attend(&elements(q)?, runs, &mut out)?;
        tensor(out, shape)
    }

    /// Stores rows of keys and values.
    ///
    /// # Errors
    /// If runs overlap or reach beyond the rows.
    pub(crate) fn store(&mut self, kv: [&[f32]; 2], runs: &[Run]) -> Result<()> {
        // SAFETY: the layer is borrowed by nobody else.
        unsafe { self.store_beside(kv, runs) }
    }

    /// [`LayerCache::store`] while others use other blocks.
    ///
    /// # Safety
    /// Nobody else uses the blocks that the runs write to.
    unsafe fn store_beside(&self, [k, v]: [&[f32]; 2], runs: &[Run]) -> Result<()> {
        let layout = self.layout;
        covered(runs, k.len() / (layout.heads.key_value * layout.heads.width))?;
        each(self.pages.iter().enumerate(), |(head, pages)| {
            for run in runs {
                for row in 0..run.rows {
                    let from = (run.first_row + row) * layout.heads.key_value + head;
                    let columns = from * layout.heads.width..(from + 1) * layout.heads.width;
                    let position = run.position + row;
                    let at = (run.table[position / BLOCK] as usize, position % BLOCK);
                    // SAFETY: a head is one task, and nobody else uses the block.
                    unsafe { pages.store(layout, at, &k[columns.clone()], &v[columns]) };
                }
            }
        });
        Ok(())
    }

    /// Attends to what is stored, that of the rows themselves included; rows of no run become zeros.
    ///
    /// # Errors
    /// If runs overlap or reach beyond the rows.
    pub(crate) fn attend(&self, q: &[f32], runs: &[Run], out: &mut [f32]) -> Result<()> {
        let width = self.layout.heads.query * self.layout.heads.width;
        let rows = q.len() / width;
        if covered(runs, rows)? < rows {
            out.fill(0.0);
        }
        self.attend_into(q, Target::new(out, width, rows), runs);
        Ok(())
    }

    fn attend_into(&self, q: &[f32], out: Target<'_>, runs: &[Run]) {
        let Heads { key_value, width, .. } = self.layout.heads;
        let columns = self.layout.heads.group() * width;
        let tasks = runs.iter().flat_map(|run| {
            let firsts = (0..run.rows).step_by(ROWS_PER_TASK);
            firsts.flat_map(move |first| {
                let count = ROWS_PER_TASK.min(run.rows - first);
                (0..key_value).map(move |head| Task { run, first, count, head })
            })
        });
        let tasks: Vec<Task<'_>> = tasks.collect();
        each(0..tasks.len(), |index| {
            let task = &tasks[index];
            task.attend(self, q, tasks.get(index + 1), |row, query, values| {
                let at = task.head * columns + query * width;
                // SAFETY: runs do not overlap, and each of their rows and heads is in one task.
                unsafe { out.columns(row, at, width) }.copy_from_slice(values);
            });
        });
    }

    /// A block of a sequence, if it has so many.
    fn block(&self, run: &Run, head: usize, block: usize) -> Option<Block<'_>> {
        let at = *run.table.get(block)? as usize;
        // SAFETY: a layer that is borrowed is not written to, but by parts of a step, each to blocks that no other uses.
        Some(unsafe { self.pages[head].block(at) })
    }
}

/// How many of so many rows belong to runs.
fn covered(runs: &[Run], rows: usize) -> Result<usize> {
    let mut end = 0;
    for run in runs {
        if run.first_row < end || run.first_row + run.rows > rows {
            bail!("runs overlap or reach beyond the {rows} rows of the step")
        }
        end = run.first_row + run.rows;
    }
    Ok(runs.iter().map(|run| run.rows).sum())
}

#[cfg(test)]
mod tests {
    use super::super::attention::attention;
    use super::super::twin::{close, random};
    use super::*;
    use candle_core::DType;
    use proptest::prelude::*;

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
        let mut cache = LayerCache::new(block as usize, heads, DType::F32);
        close(&cache.step(&qkv, &runs).unwrap(), &packed, "output");

        let mut cache = LayerCache::new(block as usize, heads, DType::BF16);
        let rounded = cache.step(&qkv, &runs).unwrap();
        let worst = (rounded - packed).unwrap().abs().unwrap().max_all().unwrap();
        assert!(worst.to_scalar::<f32>().unwrap() < 0.05, "off by {worst}");
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
        for dtype in [DType::F32, DType::BF16] {
            check_chunks(Heads { window: Some(90), ..HEADS }, dtype);
            check_chunks(Heads { query: 2, width: 70, ..HEADS }, dtype);
            // One to six queries at a time, of which some see nothing of a block.
            for (query, window) in [(2, 1), (6, 1), (6, 5), (8, 70), (10, 70)] {
                check_chunks(Heads { query, window: Some(window), ..HEADS }, dtype);
            }
            check_chunks(Heads { query: 8, width: 32, ..HEADS }, dtype);
        }
    }

    #[test]
    fn rows_that_belong_to_no_sequence_are_zeros_whatever_stood_there() {
        let widths = [HEADS.query, HEADS.key_value, HEADS.key_value].map(|n| n * HEADS.width);
        let qkv = widths.map(|width| vec![1.0; 3 * width]);
        let mut out = vec![7.0; 3 * widths[0]];
        let mut cache = LayerCache::new(1, HEADS, DType::F32);
        let run = Run { first_row: 1, rows: 1, position: 0, table: vec![0] };
        let ([q, k, v], runs) = (&qkv, [run]);
        cache.store([k, v], &runs).unwrap();
        cache.attend(q, &runs, &mut out).unwrap();
        let (first, rest) = out.split_at(widths[0]);
        let (second, third) = rest.split_at(widths[0]);
        assert!(first.iter().chain(third).all(|&x| x == 0.0));
        assert!(second.iter().all(|&x| x == 1.0), "it sees itself only: {second:?}");
    }

    fn check_chunks(heads: Heads, dtype: DType) {
        let (wide, narrow) = (heads.query * heads.width, heads.key_value * heads.width);
        let qkv = [wide, narrow, narrow].map(|width| random(&[180, width], DType::F32));
        let part = |from, rows| qkv.clone().map(|t| t.narrow(0, from, rows).unwrap());
        let bits = |t: &Tensor| t.to_vec2::<f32>().unwrap();

        let mut cache = LayerCache::new(3, heads, dtype);
        let whole = Run { first_row: 0, rows: 180, position: 0, table: vec![0, 1, 2] };
        let whole = bits(&cache.step(&qkv, &[whole]).unwrap());

        let mut cache = LayerCache::new(6, heads, dtype);
        let mut position = 0;
        for rows in [1, 2, 61, 1, 62, 2, 1, 5, 45] {
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

    /// Heads of any kind that there are kernels for.
    fn heads() -> impl Strategy<Value = Heads> {
        let window = prop::option::of(1usize..150);
        (1usize..=3, 1usize..=8, 1usize..=40, window).prop_map(
            |(key_value, group, half, window)| Heads {
                query: group * key_value,
                key_value,
                width: 2 * half,
                window,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn any_heads_equal_attention_within_items(
            heads in heads(), lengths in prop::collection::vec(1usize..150, 1..4),
        ) {
            check(&lengths, heads);
        }

        #[test]
        fn any_heads_compute_the_same_bits_in_any_chunks(heads in heads()) {
            check_chunks(heads, DType::F32);
            check_chunks(heads, DType::BF16);
        }
    }
}
