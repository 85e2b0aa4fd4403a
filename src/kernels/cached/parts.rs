//! A step in parts: rows of some of its sequences each, which go through all blocks beside each other.
//!
//! ```text
//! in one part      thread 0  products ▓▓▓ attention ░░░ products ▓▓▓     threads wait for each other
//!                  thread 1  products ▓▓▓ attention ░░░ products ▓▓▓     behind everything
//! in two parts     thread 0  products ▓▓▓ attention ░░ products ▓▓▓      for none; while one reads keys
//!                  thread 1  products ▓▓ attention ░░░ products ▓▓▓      and values, the other multiplies
//! ```
//!
//! Rows do not know their company, so no bit depends on it. A part that has ended helps the others: what they
//! do is still cut into tasks.

// Reason: parts write to blocks of one cache.
#![expect(unsafe_code, reason = "blocks of one cache are written by several parts")]

use super::wanted::Wanted;
use super::{BLOCK, LayerCache, Run, StepRows};
use candle_core::{Result, bail};
use std::collections::HashMap;
use std::ops::Range;

/// Rows of some sequences of a step.
#[derive(Debug)]
pub(crate) struct StepPart<'a> {
    pub(crate) ids: &'a [u32],
    pub(crate) positions: &'a [u32],
    runs: Vec<Run>,
    /// Those of the rows that samples are read from.
    pub(crate) wanted: Wanted,
}

/// How a step is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Parts at most.
    pub(crate) parts: usize,
    /// Rows of a part at least.
    pub(crate) rows_min: usize,
    /// Positions to attend to that take as long as all else of a row.
    pub(crate) positions_of_row: usize,
    /// Positions that a row sees at most.
    pub(crate) positions_max: usize,
}

/// The keys and values of all layers, for one part of a step.
pub(crate) struct CachePart<'a> {
    layers: &'a [LayerCache],
    part: &'a StepPart<'a>,
}

impl Cut {
    /// Parts of so many rows at most, one at least.
    pub(crate) fn parts_of(self, rows: usize) -> usize {
        self.parts.min(rows / self.rows_min.max(1)).max(1)
    }
}

impl<'a> StepRows<'a> {
    /// The step in parts of about the same work, one behind another. It stays whole where its samples or sequences do not
    /// stand in their order.
    ///
    /// # Errors
    /// If a sample is no row of the step.
    pub(crate) fn parts(&self, cut: Cut) -> Result<Vec<StepPart<'a>>> {
        let mut ends = self.ends(cut);
        ends.push(self.runs.len());
        let mut first = 0;
        let parts = ends.into_iter().map(|end| self.part(std::mem::replace(&mut first, end)..end));
        parts.collect()
    }

    fn part(&self, runs: Range<usize>) -> Result<StepPart<'a>> {
        let row_of =
            |run: usize| self.runs.get(run).map_or(self.positions.len(), |run| run.first_row);
        let first = if runs.start == 0 { 0 } else { row_of(runs.start) };
        let rows = first..row_of(runs.end);
        let place = |row| self.samples.partition_point(|&sample| (sample as usize) < row);
        let samples = match runs.len() == self.runs.len() {
            true => self.samples, // in any order
            false => &self.samples[place(rows.start)..place(rows.end)],
        };
        let samples: Vec<u32> = samples.iter().map(|&row| row - first as u32).collect();
        let run = |run: &Run| Run { first_row: run.first_row - first, ..run.clone() };
        let runs: Vec<Run> = self.runs[runs].iter().map(run).collect();
        let (ids, positions) = (&self.ids[rows.clone()], &self.positions[rows]);
        let own = StepRows { ids, positions, runs: &runs, samples: &samples };
        let wanted = own.wanted()?;
        Ok(StepPart { ids, positions, runs, wanted })
    }

    /// Runs before which the step is cut.
    fn ends(&self, cut: Cut) -> Vec<usize> {
        let rows = self.positions.len();
        let parts = cut.parts_of(rows).min(self.runs.len());
        if parts < 2 || !self.is_in_order() {
            return Vec::new();
        }
        let work = |run: &Run| {
            let seen = (run.position + run.rows / 2).min(cut.positions_max);
            run.rows * (cut.positions_of_row + seen)
        };
        let mut all = 0;
        let mut starts = Vec::with_capacity(self.runs.len());
        for run in self.runs {
            starts.push(all);
            all += work(run);
        }
        let mut ends: Vec<usize> = Vec::new();
        let mut first_row = 0;
        for part in 1..parts {
            let wanted = all * part / parts;
            let nearest = (1..starts.len()).min_by_key(|&run| starts[run].abs_diff(wanted));
            let Some(run) = nearest else { break };
            let row = self.runs[run].first_row;
            if row >= first_row + cut.rows_min && row + cut.rows_min <= rows {
                ends.push(run);
                first_row = row;
            }
        }
        ends
    }

    /// Whether runs are all rows and samples some of them, each in their order.
    fn is_in_order(&self) -> bool {
        let mut next = 0;
        let are_all = self.runs.iter().all(|run| {
            let follows = run.first_row == next;
            next += run.rows;
            follows
        });
        are_all
            && next == self.positions.len()
            && self.samples.is_sorted()
            && self.samples.last().is_none_or(|&row| (row as usize) < next)
    }
}

/// The layers for parts that run beside each other.
///
/// # Errors
/// If a part would use what another writes.
pub(crate) fn share<'a>(
    layers: &'a mut [LayerCache],
    parts: &'a [StepPart<'a>],
) -> Result<Vec<CachePart<'a>>> {
    if parts.len() > 1 {
        check(parts)?;
    }
    let layers = &*layers;
    Ok(parts.iter().map(|part| CachePart { layers, part }).collect())
}

/// That no part uses a block that another one writes to.
fn check(parts: &[StepPart<'_>]) -> Result<()> {
    let mut writers: HashMap<u32, usize> = HashMap::new();
    for (index, part) in parts.iter().enumerate() {
        for run in part.runs.iter().filter(|run| run.rows > 0) {
            let written = run.position / BLOCK..=(run.position + run.rows - 1) / BLOCK;
            for &block in run.table.get(written).unwrap_or(&run.table) {
                if writers.insert(block, index).is_some_and(|other| other != index) {
                    bail!("block {block} is written to by two parts of a step")
                }
            }
        }
    }
    for (index, part) in parts.iter().enumerate() {
        for block in part.runs.iter().flat_map(|run| &run.table) {
            if writers.get(block).is_some_and(|&other| other != index) {
                bail!("block {block} is used by a part of a step while another writes to it")
            }
        }
    }
    Ok(())
}

impl CachePart<'_> {
    /// Stores keys and values of all rows of the part, then attends: all of them, or in the last layer those that are wanted.
    ///
    /// # Errors
    /// If runs overlap or reach beyond the rows.
    pub(crate) fn step(
        &mut self,
        layer: usize,
        [q, k, v]: [&[f32]; 3],
        out: &mut [f32],
    ) -> Result<()> {
        let StepPart { runs, wanted, .. } = self.part;
        let own = &self.layers[layer];
        // SAFETY: `share` has seen that no other part uses blocks that this one writes to, and the layers are borrowed.
        unsafe { own.store_beside([k, v], runs)? };
        let runs = if layer + 1 < self.layers.len() { runs } else { &wanted.runs };
        own.attend(q, runs, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TWO: Cut = Cut { parts: 2, rows_min: 2, positions_of_row: 100, positions_max: 50 };

    /// Runs of so many rows at some position, one behind another, each with blocks of its own.
    fn runs(shapes: &[(usize, usize)]) -> Vec<Run> {
        let (mut first_row, mut block) = (0, 0);
        let run = |&(rows, position): &(usize, usize)| {
            let blocks = (position + rows).div_ceil(BLOCK) as u32;
            let run = Run { first_row, rows, position, table: (block..block + blocks).collect() };
            (first_row, block) = (first_row + rows, block + blocks);
            run
        };
        shapes.iter().map(run).collect()
    }

    /// Rows of each part of a step, which put behind one another are the step.
    fn check_cut(runs: &[Run], samples: &[u32], cut: Cut) -> Vec<usize> {
        let ids: Vec<u32> = (0..runs.iter().map(|run| run.rows as u32).sum()).collect();
        let positions: Vec<u32> = ids.iter().map(|id| id + 7).collect();
        let step = StepRows { ids: &ids, positions: &positions, runs, samples };
        let whole = step.wanted().unwrap();
        let parts = step.parts(cut).unwrap();
        let (mut own, mut own_samples) = (Vec::new(), Vec::new());
        let mut first = 0;
        for part in &parts {
            let end = first + part.ids.len();
            assert_eq!([part.ids, part.positions], [&ids[first..end], &positions[first..end]]);
            own.extend(
                part.runs.iter().map(|run| Run { first_row: first + run.first_row, ..run.clone() }),
            );
            let row = |&at: &u32| first as u32 + part.wanted.rows[at as usize];
            own_samples.extend(part.wanted.samples.iter().map(row));
            first = end;
        }
        assert_eq!(own, runs);
        assert_eq!(own_samples, samples);
        assert_eq!(
            parts.iter().map(|part| part.wanted.rows.len()).sum::<usize>(),
            whole.rows.len()
        );
        parts.iter().map(|part| part.ids.len()).collect()
    }

    #[test]
    fn parts_have_about_the_same_work() {
        let tokens = runs(&[(1, 30); 9]);
        assert_eq!(check_cut(&tokens, &[0, 3, 8], TWO), [4, 5]);
        assert_eq!(check_cut(&tokens, &[], Cut { parts: 3, ..TWO }), [3, 3, 3]);
        // A row that sees 50 positions, and no more, is one and a half of one that sees nothing.
        let long = runs(&[(4, 0), (1, 900), (1, 900), (1, 900), (1, 900)]);
        assert_eq!(check_cut(&long, &[3], TWO), [5, 3]);
    }

    #[test]
    fn a_step_of_too_few_rows_or_of_one_sequence_stays_whole() {
        assert_eq!(check_cut(&runs(&[(1, 3); 3]), &[2], TWO), [3]);
        assert_eq!(check_cut(&runs(&[(90, 3)]), &[89], TWO), [90]);
        assert_eq!(check_cut(&runs(&[(90, 3), (1, 5)]), &[90], TWO), [91]);
        assert_eq!(check_cut(&runs(&[(1, 3); 8]), &[], Cut { parts: 1, ..TWO }), [8]);
    }

    #[test]
    fn samples_out_of_order_leave_a_step_whole() {
        assert_eq!(check_cut(&runs(&[(3, 0); 4]), &[11, 2, 2], TWO), [12]);
    }

    fn shared(runs: &[Run]) -> Result<usize> {
        let (ids, positions) = (vec![0; 8], vec![0; 8]);
        let step = StepRows { ids: &ids, positions: &positions, runs, samples: &[] };
        let parts = step.parts(TWO)?;
        assert_eq!(parts.len(), 2);
        Ok(share(&mut [], &parts)?.len())
    }

    #[test]
    fn parts_may_read_a_block_together_but_not_one_that_is_written_to() {
        let of = |first_row, table: &[u32]| Run {
            first_row,
            rows: 4,
            position: BLOCK,
            table: table.to_vec(),
        };
        assert_eq!(shared(&[of(0, &[1, 2]), of(4, &[1, 3])]).unwrap(), 2);
        for (left, right) in [([1, 2], [2, 3]), ([3, 2], [1, 3]), ([1, 2], [3, 2])] {
            let error = shared(&[of(0, &left), of(4, &right)]).unwrap_err().to_string();
            assert!(error.contains("block"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn parts_are_the_step_and_none_is_too_small(
            shapes in prop::collection::vec((1usize..40, 0usize..200), 1..20),
            parts in 1usize..6,
            rows_min in 1usize..30,
            every in 1usize..9,
        ) {
            let runs = runs(&shapes);
            let rows = runs.iter().map(|run| run.rows as u32).sum();
            let samples: Vec<u32> = (0..rows).step_by(every).collect();
            let found = check_cut(&runs, &samples, Cut { parts, rows_min, ..TWO });
            prop_assert!(found.len() <= parts);
            prop_assert!(found.len() == 1 || found.iter().all(|&rows| rows >= rows_min));
        }
    }
}
