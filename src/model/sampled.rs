//! For tests: what a model makes of the rows of a step that are sampled.

use super::Llama;
use crate::kernels::cached::{Run, StepRows};

/// Which rows are sampled of a step of 70 rows of one sequence and 30 of another.
pub(super) const CASES: [&[u32]; 4] = [&[], &[99], &[70, 69], &[99, 3, 3, 68, 69, 71]];

/// Logits of these rows, and of the one row of each sequence that follows in the next step.
pub(super) fn logits(model: &Llama, samples: &[u32]) -> [Vec<Vec<f32>>; 2] {
    let mut cache = model.cache(3).unwrap();
    let mut step = |rows: [usize; 2], position: [usize; 2], samples: &[u32]| {
        let run = |index: usize, first_row| {
            let table = [vec![2, 0], vec![1]][index].clone();
            Run { first_row, rows: rows[index], position: position[index], table }
        };
        let runs = [run(0, 0), run(1, rows[0])];
        let of_run = |run: &Run| run.position as u32..(run.position + run.rows) as u32;
        let positions: Vec<u32> = runs.iter().flat_map(of_run).collect();
        let ids: Vec<u32> = positions.iter().map(|at| at * 37 % 200).collect();
        let rows = StepRows { ids: &ids, positions: &positions, runs: &runs, samples };
        let stepped = model.step(&mut cache, &rows).unwrap();
        match samples {
            [] => Vec::new(),
            _ => stepped.logits().unwrap().to_vec2().unwrap(),
        }
    };
    [step([70, 30], [0, 0], samples), step([1, 1], [70, 30], &[0, 1])]
}

/// Logits of all rows.
pub(super) fn all_logits(model: &Llama) -> [Vec<Vec<f32>>; 2] {
    logits(model, &(0..100).collect::<Vec<u32>>())
}
