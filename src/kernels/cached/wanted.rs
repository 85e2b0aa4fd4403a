//! Rows that go on when all others have left their keys and values.
//!
//! Behind the last block only the rows are read whose next token is wanted. Of all others it has to compute
//! keys and values, which later rows attend to, and nothing else: of a prompt, all but its last row.

use super::{Run, StepRows};
use candle_core::{Result, bail};

/// The rows of a step that its samples are read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Rows of the step, each once, in their order.
    pub(crate) rows: Vec<u32>,
    /// The same rows in their sequences, as if the step had no others.
    pub(crate) runs: Vec<Run>,
    /// Where each sample stands among them.
    pub(crate) samples: Vec<u32>,
}

impl StepRows<'_> {
    /// The rows whose next token is wanted.
    ///
    /// # Errors
    /// If a sample is no row of the step.
    pub(crate) fn wanted(&self) -> Result<Wanted> {
        let count = self.positions.len();
        let mut rows = self.samples.to_vec();
        rows.sort_unstable();
        rows.dedup();
        if let Some(row) = rows.last().filter(|&&row| row as usize >= count) {
            bail!("row {row} is sampled of a step of {count}");
        }
        let place = |row| rows.binary_search(row).expect("each sample is among them") as u32;
        let samples = self.samples.iter().map(place).collect();
        Ok(Wanted {
            runs: self.runs.iter().flat_map(|run| parts(run, &rows)).collect(),
            samples,
            rows,
        })
    }
}

/// What of a run is among `rows`, neighbours together.
fn parts(run: &Run, rows: &[u32]) -> Vec<Run> {
    let place = |row: usize| rows.partition_point(|&other| (other as usize) < row);
    let mut parts: Vec<Run> = Vec::new();
    for first_row in place(run.first_row)..place(run.first_row + run.rows) {
        let position = run.position + rows[first_row] as usize - run.first_row;
        match parts.last_mut() {
            Some(part) if part.position + part.rows == position => part.rows += 1,
            _ => parts.push(Run { first_row, rows: 1, position, table: run.table.clone() }),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first_row: usize, rows: usize, position: usize, block: u32) -> Run {
        Run { first_row, rows, position, table: vec![block] }
    }

    fn wanted(runs: &[Run], samples: &[u32]) -> Result<Wanted> {
        StepRows { ids: &[5; 12], positions: &[0; 12], runs, samples }.wanted()
    }

    #[test]
    fn neighbours_of_a_run_stay_together_and_samples_keep_their_order() {
        let runs = [run(0, 4, 10, 1), run(4, 1, 7, 2), run(5, 6, 0, 3)];
        let Wanted { rows, runs, samples } = wanted(&runs, &[10, 2, 3, 6, 9, 2]).unwrap();
        assert_eq!(rows, [2, 3, 6, 9, 10]);
        assert_eq!(runs, [run(0, 2, 12, 1), run(2, 1, 1, 3), run(3, 2, 4, 3)]);
        assert_eq!(samples, [4, 0, 1, 2, 3, 0]);
    }

    #[test]
    fn a_row_of_no_run_is_in_no_part_of_one() {
        let Wanted { rows, runs, samples } = wanted(&[run(0, 11, 0, 1)], &[11, 0]).unwrap();
        assert_eq!((rows, runs, samples), (vec![0, 11], vec![run(0, 1, 0, 1)], vec![1, 0]));
    }

    #[test]
    fn without_samples_nothing_goes_on() {
        let nothing = Wanted { rows: vec![], runs: vec![], samples: vec![] };
        assert_eq!(wanted(&[run(0, 12, 0, 1)], &[]).unwrap(), nothing);
    }

    #[test]
    fn a_sample_beyond_the_step_is_an_error() {
        let error = wanted(&[run(0, 12, 0, 1)], &[3, 12]).unwrap_err();
        assert!(error.to_string().contains("row 12"), "{error}");
    }
}
