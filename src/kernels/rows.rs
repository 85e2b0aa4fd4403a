//! Rows of a step, brought to the type of the weight that they are about to meet.

use super::packed::WeightType;
use super::quads::{self, Group};
use super::real::simd;
use super::share::each;
use super::tiles::ROWS;
use super::{ROWS_PER_TASK, pairs};
use pulp::bytemuck::cast_slice;

/// Rows in words. Its memory is used again for the next ones.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    kind: WeightType,
    words: Vec<u32>,
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
            WeightType::F32 => self.words.copy_from_slice(cast_slice(x)),
            WeightType::Bf16 => pairs::round_row(x, self.words),
            WeightType::Int8 => quads::quantise_row(x, self.words, self.groups),
        }
    }
}

impl Rows {
    /// Takes the rows of `x`.
    pub(crate) fn set(&mut self, kind: WeightType, x: &[f32], count: usize, inputs: usize) {
        assert!(x.len() == count * inputs, "{} elements in {count} rows of {inputs}", x.len());
        self.fill(kind, count, inputs, |index, row| row.set(&x[index * inputs..][..inputs]));
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

    fn shape(&mut self, kind: WeightType, count: usize, inputs: usize) {
        self.kind = kind;
        self.count = count;
        self.depth = kind.words(inputs);
        // An odd number of cache lines: rows of a tile then never fall into one set of the cache.
        self.stride = (self.depth.div_ceil(16) | 1) * 16;
        // A tile may read the rows of a whole one; what it makes of those that are not there is thrown away.
        self.words.resize(count.next_multiple_of(ROWS) * self.stride, 0);
        self.group_stride = match kind {
            WeightType::Int8 => self.depth.div_ceil(quads::GROUP),
            _ => 0,
        };
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
