//! Rows of a step, brought to the type of the weight that they are about to meet.

// Reason: threads write different words of the same rows and panels, which slices cannot express.
#![expect(unsafe_code, reason = "words of one matrix are written by several threads")]

use super::ROWS_PER_TASK;
use super::aligned::Aligned;
use super::columns::{self, parts};
use super::groups::Group;
use super::layout::{self, INPUTS, SQUARE, squares_of_columns};
use super::matmul::View;
use super::packed::{PackedWeight, WeightType};
use super::real::simd;
use super::share::{Target, each};
use super::tiles::ROWS;
use super::{block_float, quads};

/// Rows in words. Its memory is used again for the next ones.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    kind: WeightType,
    words: Aligned<u32>,
    groups: Vec<Group>,
    depth: usize,
    stride: usize,
    group_stride: usize,
    count: usize,
}

/// One row about to be written.
pub(crate) struct RowMut<'a> {
    kind: WeightType,
    words: &'a mut [u32],
    groups: &'a mut [Group],
    buffer: &'a mut [f32],
}

impl RowMut<'_> {
    /// Writes the row that `compute` computes.
    #[inline(always)]
    pub(crate) fn set_with(self, compute: impl FnOnce(&mut [f32])) {
        let RowMut { kind, words, groups, buffer } = self;
        compute(buffer);
        RowMut { kind, words, groups, buffer: &mut [] }.set(buffer);
    }

    /// Writes the row. To be inlined into a vectorised loop.
    #[inline(always)]
    pub(crate) fn set(self, x: &[f32]) {
        match self.kind {
            WeightType::Int8 => quads::quantise_row(x, self.words, self.groups),
            WeightType::BlockFloat => block_float::quantise_row(x, self.words, self.groups),
            kind => layout::row(kind.in_rows(), x, self.words),
        }
    }
}

/// Words that so many rows take. A tile may read the rows of a whole one; what it makes of those that are not there
/// is thrown away.
pub(crate) fn words_of_rows(kind: WeightType, count: usize, inputs: usize) -> usize {
    count.next_multiple_of(ROWS) * stride(kind.row_words(inputs))
}

/// An odd number of cache lines: rows of a tile then never fall into one set of the cache.
fn stride(depth: usize) -> usize {
    (depth.div_ceil(16) | 1) * 16
}

impl Rows {
    /// Takes the rows of `x`.
    pub(crate) fn set(&mut self, kind: WeightType, x: &[f32], count: usize, inputs: usize) {
        assert!(x.len() == count * inputs, "{} elements in {count} rows of {inputs}", x.len());
        self.fill(
            kind,
            count,
            inputs,
            #[inline(always)]
            |index, row| row.set(&x[index * inputs..][..inputs]),
        );
    }

    /// Has each of `count` rows written, in a vectorised loop.
    pub(crate) fn fill(
        &mut self,
        kind: WeightType,
        count: usize,
        inputs: usize,
        write: impl Fn(usize, RowMut<'_>) + Send + Sync,
    ) {
        self.shape(kind, count, inputs);
        let Rows { words, groups, depth, stride, group_stride, .. } = self;
        let words = &mut words[..count * *stride];
        let task = ROWS_PER_TASK;
        let groups = groups.chunks_mut((*group_stride * task).max(1)).map(Some);
        let tasks =
            words.chunks_mut(*stride * task).zip(groups.chain(std::iter::repeat_with(|| None)));
        each(tasks.enumerate(), |(index, (words, groups))| {
            let mut buffer = vec![0.0; inputs];
            simd(
                #[inline(always)]
                || {
                    let mut groups = groups.unwrap_or_default().chunks_mut((*group_stride).max(1));
                    for (row, words) in words.chunks_mut(*stride).enumerate() {
                        let row_mut = RowMut {
                            kind,
                            words: &mut words[..*depth],
                            groups: groups.next().unwrap_or_default(),
                            buffer: &mut buffer,
                        };
                        write(index * task + row, row_mut);
                    }
                },
            );
        });
    }

    /// Takes the columns of `x` as rows; rows are the inputs, with zeros behind them up to whole steps.
    pub(crate) fn set_columns(&mut self, kind: WeightType, x: View<'_, f32>) {
        self.shape(kind, x.columns, x.rows.next_multiple_of(INPUTS));
        let (stride, kind) = (self.stride, kind.in_rows());
        let target = Target::new(&mut self.words[..x.columns * stride], stride, x.columns);
        each(parts(x), |(first, x)| {
            let (at, depth) = (kind.count(first), kind.count(x.rows.next_multiple_of(INPUTS)));
            simd(
                #[inline(always)]
                || {
                    for first in (0..x.columns).step_by(SQUARE) {
                        squares_of_columns(
                            kind,
                            x,
                            depth,
                            first,
                            #[inline(always)]
                            |word, square| {
                                for (column, square) in (first..x.columns).zip(square) {
                                    // SAFETY: a part of the rows of `x` has words of its own.
                                    let out = unsafe { target.columns(column, at + word, SQUARE) };
                                    out.copy_from_slice(square);
                                }
                            },
                        );
                    }
                },
            );
        });
    }

    /// Takes the rows of `x` as they are, and its columns as the outputs of `panels`, in one pass over it.
    pub(crate) fn set_with_panels(
        &mut self,
        kind: WeightType,
        x: View<'_, f32>,
        panels: &mut PackedWeight,
    ) {
        // Whole steps, as in the weight that the rows meet: zero times what memory held may be no number.
        self.shape(kind, x.rows, x.columns.next_multiple_of(INPUTS));
        let (stride, depth) = (self.stride, self.depth);
        columns::set(
            panels,
            kind,
            x,
            self.words.chunks_mut(ROWS_PER_TASK * stride),
            #[inline(always)]
            |x, rows| {
                for (row, words) in rows.chunks_mut(stride).take(x.rows).enumerate() {
                    let own = &x.data[row * x.row_stride..][..x.columns];
                    layout::row(kind.in_rows(), own, &mut words[..depth]);
                }
            },
        );
    }

    fn shape(&mut self, kind: WeightType, count: usize, inputs: usize) {
        self.kind = kind;
        self.count = count;
        self.depth = kind.row_words(inputs);
        self.stride = stride(self.depth);
        let length = words_of_rows(kind, count, inputs);
        self.words.make_room(length);
        self.group_stride = kind.groups(inputs);
        self.groups.resize(count * self.group_stride, Group::default());
    }

    pub(crate) fn kind(&self) -> WeightType {
        self.kind
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Words from one row to the next.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Groups from one row to the next.
    pub(crate) fn group_stride(&self) -> usize {
        self.group_stride
    }

    /// The words of row `first` and those behind it.
    pub(crate) fn words_from(&self, first: usize) -> &[u32] {
        &self.words[first * self.stride..]
    }

    /// The groups of row `first` and those behind it.
    pub(crate) fn groups_from(&self, first: usize) -> &[Group] {
        &self.groups[first * self.group_stride..]
    }
}
