//! Products of rows with packed weights: how they are cut into tiles, and where the results go.
//!
//! ```text
//! few rows:    threads share the panels; a weight is read once, and fetched one panel ahead
//! many rows:   blocks of rows that stay in the cache, and all panels for each of them
//! ```

// Reason: threads write different columns of the same rows, which slices cannot express.
#![expect(unsafe_code, reason = "tiles of one output are written by several threads")]

use super::layout::{self, SQUARE};
use super::packed::{PackedWeight, Panel, WeightType};
use super::pairs::are_widened;
use super::real::{Real, simd};
use super::rows::Rows;
use super::share::{Target, each};
use super::tiles::{PANEL, ROWS, pieces, room, rows_at_once};
use std::ops::Range;

/// Bytes of a block of rows at most: half of a second-level cache, on CPUs with a matrix unit of a larger one
/// (256 rows of 4 KiB and what stands between them).
const BLOCK_BYTES: [usize; 2] = [512 << 10, 1088 << 10];
/// Tasks that the panels of a block are cut into.
const TASKS: usize = 24;

/// `out = x W^T` for some weights with the same inputs.
pub(crate) fn set<const COUNT: usize>(parts: [(&PackedWeight, &mut [f32]); COUNT], x: &Rows) {
    run(
        parts,
        x,
        #[inline(always)]
        |out, value| *out = value,
    );
}

/// `out += x W^T`.
pub(crate) fn add(weight: &PackedWeight, x: &Rows, out: &mut [f32]) {
    run(
        [(weight, out)],
        x,
        #[inline(always)]
        |out, value| *out += value,
    );
}

/// `out = W x^T`: an output of the weight is a row, and a row of `x` a column.
pub(crate) fn set_turned(weight: &PackedWeight, x: &Rows, out: &mut [f32]) {
    run_turned(
        weight,
        x,
        out,
        #[inline(always)]
        |out, value| *out = value,
    );
}

/// `out += W x^T`.
pub(crate) fn add_turned(weight: &PackedWeight, x: &Rows, out: &mut [f32]) {
    run_turned(
        weight,
        x,
        out,
        #[inline(always)]
        |out, value| *out += value,
    );
}

fn run_turned(
    weight: &PackedWeight,
    x: &Rows,
    out: &mut [f32],
    put: impl Fn(&mut f32, f32) + Send + Sync,
) {
    let target = Target::new(out, x.count(), weight.outputs());
    share(weight.panels(), x, |panels, rows| {
        let mut own = [[0.0; PANEL]; ROWS];
        for panel in panels {
            tiles([weight], panel, x, &rows, |[words], tile, rows| {
                for lane in 0..weight.width(panel) {
                    target.fetch(panel * PANEL + lane, rows.start, rows.len());
                }
                let ahead = weight.ahead(panel, tile, rows.len());
                words.tile(x, rows.start, ahead, &mut own[..room(x.kind(), rows.len())]);
                simd(
                    #[inline(always)]
                    || {
                        for (lane, values) in
                            turned(&own).iter().take(weight.width(panel)).enumerate()
                        {
                            let row = panel * PANEL + lane;
                            // SAFETY: `share` hands out each row and panel once.
                            let out = unsafe { target.columns(row, rows.start, rows.len()) };
                            put_row(out, values, &put);
                        }
                    },
                );
            });
        }
    });
}

/// A tile with rows and columns exchanged.
#[inline(always)]
fn turned(tile: &[[f32; PANEL]; ROWS]) -> [[f32; ROWS]; PANEL] {
    let mut out = [[0.0; ROWS]; PANEL];
    for row in [0, SQUARE] {
        for column in [0, SQUARE] {
            let mut square = [[0.0; SQUARE]; SQUARE];
            for index in 0..SQUARE {
                square[index].copy_from_slice(&tile[row + index][column..column + SQUARE]);
            }
            let square = layout::turned(&square);
            for index in 0..SQUARE {
                out[column + index][row..row + SQUARE].copy_from_slice(&square[index]);
            }
        }
    }
    out
}

/// `out = silu(x G^T) * x U^T`.
pub(crate) fn gated(gate: &PackedWeight, up: &PackedWeight, x: &Rows, out: &mut [f32]) {
    assert_eq!(gate.outputs(), up.outputs(), "a gate for each");
    let target = Target::new(out, gate.outputs(), x.count());
    share(gate.panels(), x, |panels, rows| {
        let (mut gates, mut ups) = ([[0.0; PANEL]; ROWS], [[0.0; PANEL]; ROWS]);
        for panel in panels {
            tiles([gate, up], panel, x, &rows, |words, tile, rows| {
                let parts = [gate, up].into_iter().zip(words).zip([&mut gates, &mut ups]);
                for ((weight, words), out) in parts {
                    let ahead = weight.ahead(panel, tile, rows.len());
                    words.tile(x, rows.start, ahead, &mut out[..room(x.kind(), rows.len())]);
                }
                simd(
                    #[inline(always)]
                    || {
                        for (gates, ups) in gates.iter_mut().zip(&ups).take(rows.len()) {
                            for lane in 0..PANEL {
                                let open = 1.0 / (1.0 + Real::exp(-gates[lane]));
                                gates[lane] = gates[lane] * open * ups[lane];
                            }
                        }
                    },
                );
                for (row, values) in rows.zip(&gates) {
                    // SAFETY: `share` hands out each row and panel once.
                    let out = unsafe { target.columns(row, panel * PANEL, gate.width(panel)) };
                    put_row(out, values, |out, value| *out = value);
                }
            });
        }
    });
}

fn run<const COUNT: usize>(
    parts: [(&PackedWeight, &mut [f32]); COUNT],
    x: &Rows,
    put: impl Fn(&mut f32, f32) + Send + Sync,
) {
    let parts = parts.map(|(weight, out)| (weight, Target::new(out, weight.outputs(), x.count())));
    let panels = parts.iter().map(|(weight, _)| weight.panels()).sum();
    share(panels, x, |panels, rows| {
        let (mut first, mut out) = (0, [[0.0; PANEL]; ROWS]);
        for (weight, target) in &parts {
            let own = first..first + weight.panels();
            first = own.end;
            let own = panels.start.max(own.start) - own.start
                ..panels.end.min(own.end).max(own.start) - own.start;
            for panel in own {
                let width = weight.width(panel);
                tiles([weight], panel, x, &rows, |[words], tile, rows| {
                    for row in rows.clone() {
                        target.fetch(row, panel * PANEL, width);
                    }
                    let ahead = weight.ahead(panel, tile, rows.len());
                    words.tile(x, rows.start, ahead, &mut out[..room(x.kind(), rows.len())]);
                    simd(
                        #[inline(always)]
                        || {
                            for (row, values) in rows.zip(&out) {
                                // SAFETY: `share` hands out each row and panel once.
                                let out = unsafe { target.columns(row, panel * PANEL, width) };
                                put_row(out, values, &put);
                            }
                        },
                    );
                });
            }
        }
    });
}

/// Puts a row of a tile where it belongs.
#[inline(always)]
fn put_row(out: &mut [f32], values: &[f32; PANEL], put: impl Fn(&mut f32, f32)) {
    match out.as_mut_array::<PANEL>() {
        Some(out) => {
            let mut own = *out;
            for lane in 0..PANEL {
                put(&mut own[lane], values[lane]);
            }
            *out = own;
        }
        None => out.iter_mut().zip(values).for_each(|(out, &value)| put(out, value)),
    }
}

/// Calls `work` for every panel and row once, with ranges of both, on the threads of the pool.
fn share(panels: usize, x: &Rows, work: impl Fn(Range<usize>, Range<usize>) + Send + Sync) {
    let at_once = rows_at_once(x.kind());
    let has_matrix_unit = usize::from(at_once == ROWS);
    // A widened panel wants rows that it was widened for, however long they are.
    let least = match x.kind() {
        WeightType::Bf16 if are_widened() => 2 * at_once,
        _ => at_once,
    };
    let most = (BLOCK_BYTES[has_matrix_unit] / (4 * x.stride())).max(least);
    let blocks = x.count().div_ceil(most).max(1);
    let block = x.count().div_ceil(blocks).max(1).next_multiple_of(at_once);
    let step = panels.div_ceil(TASKS).max(1);
    for first in (0..x.count()).step_by(block) {
        let rows = first..(first + block).min(x.count());
        let tasks = (0..panels).step_by(step).map(|first| first..(first + step).min(panels));
        each(tasks, |panels| work(panels, rows.clone()));
    }
}

/// Cuts rows that meet a panel of each weight into pieces of what a tile takes: `work(panels, (index, pieces), rows)`.
fn tiles<const COUNT: usize>(
    weights: [&PackedWeight; COUNT],
    panel: usize,
    x: &Rows,
    rows: &Range<usize>,
    mut work: impl FnMut(&mut [Panel<'_>; COUNT], (usize, usize), Range<usize>),
) {
    debug_assert!(weights.iter().all(|weight| weight.kind() == x.kind()));
    PackedWeight::with_panels(weights, panel, rows.len(), |mut panels| {
        let count = rows.len().div_ceil(rows_at_once(x.kind()));
        for (index, rows) in pieces(x.kind(), rows.clone()).enumerate() {
            work(&mut panels, (index, count), rows);
        }
    });
}
