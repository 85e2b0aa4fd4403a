//! Where the rows of a step are and who computes them, as words that all kernels of the step read.
//!
//! ```text
//! words   ids │ positions │ slots │ samples │ run of each row │ runs │ tables │ split │ whole │ merges
//! ```
//!
//! They are uploaded once a step, and once more for the last block where it runs for fewer rows. Runs, tiles and merges are
//! four words each and start at multiples of four. `attention_tiles.cu` says what tiles are; here they are cut. Which tile a row is in, and whether it is split,
//! depends on the other rows of its run, but nothing of what is computed for the row does.

use crate::kernels::attention::Heads;
use crate::kernels::cached::{BLOCK, Run, StepRows};
use candle_core::{Result, bail};
use std::ops::Range;

/// Positions of a partition: `PARTITION` in attention.cuh.
pub(crate) const PARTITION: usize = 512;

/// Pairs of a row and a query head in a split tile.
pub(crate) const SPLIT_PAIRS: usize = 16;

/// Pairs in a whole tile.
pub(crate) const WHOLE_PAIRS: usize = 64;

/// A run of so many pairs at most is cut into split tiles: a whole tile would be half empty.
const SPLIT_RUN_PAIRS: usize = WHOLE_PAIRS / 2;

/// No partial result: the tile has one partition.
const DIRECT: u32 = u32::MAX;

/// Which attention kernels a model uses, for all of its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Tiles on tensor cores.
    Tiles,
    /// A warp a row and head.
    Rows,
}

/// What a step is to stay within.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Rows that ids may name: of the embedding table, or of a stream.
    pub(crate) ids: usize,
    /// Positions of the rotary table.
    pub(crate) positions: usize,
    /// Blocks of the cache.
    pub(crate) blocks: usize,
}

/// A part of the words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Section {
    /// First word.
    pub(crate) start: usize,
    /// Entries.
    pub(crate) count: usize,
}

/// The words of a step, and where they are.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) words: Vec<u32>,
    pub(crate) ids: Section,
    pub(crate) positions: Section,
    /// Where each row's keys and values go: block * 64 + position within it.
    pub(crate) slots: Section,
    pub(crate) samples: Section,
    /// The index of each row's run. Empty for [`Way::Tiles`].
    pub(crate) row_runs: Section,
    /// First row, rows, position, and the word at which the table starts.
    pub(crate) runs: Section,
    /// Run, first pair, partition, first partial result. Empty for [`Way::Rows`], as those below.
    pub(crate) split: Section,
    /// Run, first pair, nothing, nothing.
    pub(crate) whole: Section,
    /// Run, first pair, partitions, first partial result.
    pub(crate) merges: Section,
    /// Partial results of one key-value head.
    pub(crate) partials: usize,
    /// Pairs of the largest merge.
    pub(crate) merge_pairs: usize,
}

/// The partitions of what `count` pairs of a run from pair `first` see.
pub(crate) fn partitions(run: &Run, first: usize, count: usize, heads: &Heads) -> Range<usize> {
    let group = heads.group();
    let from = heads.first_visible(run.position + first / group);
    let last = run.position + (first + count - 1) / group;
    from / PARTITION..last / PARTITION + 1
}

impl Plan {
    /// Lays out a step.
    ///
    /// # Errors
    /// If the runs are not the rows of the step, or reach beyond the limits.
    pub(crate) fn new(
        rows: &StepRows<'_>,
        heads: &Heads,
        limits: Limits,
        way: Way,
    ) -> Result<Self> {
        check(rows, limits)?;
        let mut plan = Plan::default();
        plan.ids = plan.add(1, rows.ids.iter().copied());
        plan.positions = plan.add(1, rows.positions.iter().copied());
        let slots = rows.runs.iter().flat_map(|run| {
            (run.position..run.position + run.rows)
                .map(|p| run.table[p / BLOCK] * BLOCK as u32 + (p % BLOCK) as u32)
        });
        plan.slots = plan.add(1, slots);
        plan.samples = plan.add(1, rows.samples.iter().copied());
        if way == Way::Rows {
            let runs = rows.runs.iter().enumerate();
            let row_runs =
                runs.flat_map(|(index, run)| std::iter::repeat_n(index as u32, run.rows));
            plan.row_runs = plan.add(1, row_runs);
        }
        let mut table = plan.words.len().next_multiple_of(4) + 4 * rows.runs.len();
        let runs = rows.runs.iter().flat_map(|run| {
            let own = table;
            table += run.table.len();
            [run.first_row, run.rows, run.position, own].map(|word| word as u32)
        });
        plan.runs = plan.add(4, runs);
        plan.add(1, rows.runs.iter().flat_map(|run| run.table.iter().copied()));
        if way == Way::Tiles {
            plan.cut(rows.runs, heads);
        }
        if u32::try_from(plan.words.len().max(plan.partials)).is_err() {
            bail!("a step of {} rows is too large", rows.ids.len())
        }
        Ok(plan)
    }

    /// Cuts runs into tiles.
    fn cut(&mut self, runs: &[Run], heads: &Heads) {
        let (mut split, mut whole, mut merges) = (Vec::new(), Vec::new(), Vec::new());
        for (index, run) in runs.iter().enumerate() {
            let pairs = run.rows * heads.group();
            if pairs > SPLIT_RUN_PAIRS {
                let firsts = (0..pairs).step_by(WHOLE_PAIRS);
                whole.extend(firsts.flat_map(|first| [index as u32, first as u32, 0, 0]));
                continue;
            }
            for first in (0..pairs).step_by(SPLIT_PAIRS) {
                let count = SPLIT_PAIRS.min(pairs - first);
                let partitions = partitions(run, first, count, heads);
                let base = self.partials;
                if partitions.len() > 1 {
                    let merge = [index, first, partitions.len(), base];
                    merges.extend(merge.map(|word| word as u32));
                    self.partials += partitions.len() * count;
                    self.merge_pairs = self.merge_pairs.max(count);
                }
                for (part, partition) in partitions.clone().enumerate() {
                    let partial = match partitions.len() {
                        1 => DIRECT,
                        _ => (base + part * count) as u32,
                    };
                    split.extend([index as u32, first as u32, partition as u32, partial]);
                }
            }
        }
        self.split = self.add(4, split);
        self.whole = self.add(4, whole);
        self.merges = self.add(4, merges);
    }

    /// Adds entries of `size` words.
    fn add(&mut self, size: usize, words: impl IntoIterator<Item = u32>) -> Section {
        self.words.resize(self.words.len().next_multiple_of(size), 0);
        let start = self.words.len();
        self.words.extend(words);
        Section { start, count: (self.words.len() - start) / size }
    }
}

fn check(rows: &StepRows<'_>, limits: Limits) -> Result<()> {
    let count = rows.ids.len();
    if let Some(id) = rows.ids.iter().find(|&&id| id as usize >= limits.ids) {
        bail!("token {id} is beyond the vocabulary of {}", limits.ids)
    }
    if let Some(row) = rows.samples.iter().find(|&&row| row as usize >= count) {
        bail!("row {row} is wanted of a step of {count}")
    }
    let mut next = 0;
    for run in rows.runs {
        let end = run.position + run.rows;
        if run.first_row != next || run.rows == 0 {
            bail!("runs must be all rows of a step, one after the other: {run:?} at row {next}")
        }
        if end > limits.positions || run.table.len() * BLOCK < end {
            bail!("{run:?} reaches beyond its table, or the {} positions", limits.positions)
        }
        if run.table.iter().any(|&block| block as usize >= limits.blocks) {
            bail!("{run:?} names a block beyond the {} of the cache", limits.blocks)
        }
        let own = rows.positions.get(next..next + run.rows);
        if !own.is_some_and(|own| own.iter().map(|&p| p as usize).eq(run.position..end)) {
            bail!("rows of {run:?} are at other positions")
        }
        next += run.rows;
    }
    if next != count || rows.positions.len() != count {
        bail!("runs have {next} rows, the step {count}")
    }
    Ok(())
}

#[cfg(test)]
mod tests;
