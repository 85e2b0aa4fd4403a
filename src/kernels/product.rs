//! Products of rows with packed weights: how they are cut into tiles, and where the results go.
//!
//! ```text
//! few rows:    threads share the panels; a weight is read once, and what comes next is fetched on the way
//! many rows:   blocks of rows that stay in the cache, and all panels for each of them
//! long rows:   a part of their inputs after another (`panel`), where sums may go on
//! ```

// Reason: threads write different columns of the same rows, which slices cannot express.
#![expect(unsafe_code, reason = "tiles of one output are written by several threads")]

use super::aligned::Aligned;
use super::layout::{self, SQUARE};
use super::packed::{PackedWeight, WeightType};
use super::panel::{self, part_of_row};
use super::real::{Real, simd};
use super::rows::Rows;
use super::share::{Target, each};
use super::tiles::{PANEL, ROWS, pieces, room, rows_at_once};
use std::cell::RefCell;
use std::ops::Range;

/// Bytes of a block of rows at most, of a part of their inputs where these are cut: half of a second-level cache, on
/// CPUs with a matrix unit of a larger one (256 rows of 4 KiB and what stands between them).
const BLOCK_BYTES: [usize; 2] = [512 << 10, 1088 << 10];
/// Tasks that the panels of a block are cut into.
const TASKS: usize = 24;

/// Rows from which on each thread may as well read all weights by itself, for it takes longer to multiply (docs/engine.md).
/// Wider vectors and matrix units multiply in a fraction of the time, and need more rows: there it is not measured, and
/// so many that weights take a small part of the time by counting.
pub(crate) fn rows_of_part(kind: WeightType) -> usize {
    match kind {
        _ if has_wide_vectors() => 128,
        WeightType::F32 | WeightType::Bf16x3 => 16,
        WeightType::Bf16 | WeightType::BlockFloat => 12,
        WeightType::Int8 => 8,
    }
}

/// Whether anything multiplies in vectors of 512 bits.
fn has_wide_vectors() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

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
        for panel in panels {
            let near = |rows: Range<usize>| {
                for lane in 0..weight.width(panel) {
                    target.fetch(panel * PANEL + lane, rows.start, rows.len());
                }
            };
            tiles([weight], panel, x, &rows, near, |rows, [sums]| {
                simd(
                    #[inline(always)]
                    || {
                        let lanes =
                            if rows.len() > SQUARE { turned::<2>(sums) } else { turned::<1>(sums) };
                        for (lane, values) in lanes.iter().take(weight.width(panel)).enumerate() {
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

/// The first rows of a tile, so many squares of them, with rows and columns exchanged.
#[inline(always)]
fn turned<const SQUARES: usize>(tile: &[[f32; PANEL]; ROWS]) -> [[f32; ROWS]; PANEL] {
    let mut out = [[0.0; ROWS]; PANEL];
    for row in (0..SQUARES * SQUARE).step_by(SQUARE) {
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
        for panel in panels {
            let near = |_| ();
            tiles([gate, up], panel, x, &rows, near, |rows, [gates, ups]| {
                simd(
                    #[inline(always)]
                    || {
                        for (gates, ups) in gates.iter_mut().zip(ups).take(rows.len()) {
                            for lane in 0..PANEL {
                                let open = 1.0 / (1.0 + Real::exp(-gates[lane]));
                                gates[lane] = gates[lane] * open * ups[lane];
                            }
                        }
                    },
                );
                for (row, values) in rows.zip(gates) {
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
        let mut first = 0;
        for (weight, target) in &parts {
            let own = first..first + weight.panels();
            first = own.end;
            let own = panels.start.max(own.start) - own.start
                ..panels.end.min(own.end).max(own.start) - own.start;
            for panel in own {
                let width = weight.width(panel);
                let near = |rows: Range<usize>| {
                    rows.for_each(|row| target.fetch(row, panel * PANEL, width));
                };
                tiles([weight], panel, x, &rows, near, |rows, [sums]| {
                    simd(
                        #[inline(always)]
                        || {
                            for (row, values) in rows.zip(sums) {
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
    let bytes = BLOCK_BYTES[has_matrix_unit];
    let most = (bytes / (4 * part_of_row(x.kind(), x.stride()))).max(at_once);
    let blocks = x.count().div_ceil(most).max(1);
    let block = x.count().div_ceil(blocks).max(1).next_multiple_of(at_once);
    let step = panels.div_ceil(TASKS).max(1);
    for first in (0..x.count()).step_by(block) {
        let rows = first..(first + block).min(x.count());
        let tasks = (0..panels).step_by(step).map(|first| first..(first + step).min(panels));
        each(tasks, |panels| work(panels, rows.clone()));
    }
}

/// Sums of some rows, in whole tiles.
type Sums = [[f32; PANEL]; ROWS];

/// Has rows meet a panel of each weight, in pieces of what a tile takes: `done(rows, sums)` for each of them,
/// and `near(rows)` shortly before. `done` may write to the sums of its rows; those behind them may be of
/// rows that wait.
fn tiles<const COUNT: usize>(
    weights: [&PackedWeight; COUNT],
    panel: usize,
    x: &Rows,
    rows: &Range<usize>,
    near: impl Fn(Range<usize>),
    mut done: impl FnMut(Range<usize>, [&mut Sums; COUNT]),
) {
    debug_assert!(weights.iter().all(|weight| weight.kind() == x.kind()));
    let parts = panel::parts(weights[0], rows.len());
    let pieces = pieces(x.kind(), rows.clone());
    let count = pieces.clone().count();
    // Where inputs are cut, the sums of all rows wait for the next part; else those of a piece are used up at once.
    let waiting = if parts.clone().count() > 1 { rows.len() } else { 0 };
    with_sums(waiting + ROWS, |mut sums: [&mut [[f32; PANEL]]; COUNT]| {
        let panels = weights.map(|weight| weight.meeting(panel));
        for part in parts {
            for (index, piece) in pieces.clone().enumerate() {
                if part.is_last() {
                    near(piece.clone());
                }
                let at = (piece.start - rows.start).min(waiting);
                for ((weight, own), sums) in weights.iter().zip(&panels).zip(&mut sums) {
                    let ahead = weight.ahead((panel, part), (index, count), piece.len());
                    let out = &mut sums[at..at + room(x.kind(), piece.len())];
                    own.tile(x, piece.start, part, ahead, out);
                }
                if part.is_last() {
                    let whole = "room for a whole tile behind each";
                    let sums = sums.each_mut();
                    done(piece, sums.map(|sums| sums[at..].first_chunk_mut().expect(whole)));
                }
            }
        }
    });
}

/// Calls `work` with room for so many rows of sums of each of some weights.
fn with_sums<const COUNT: usize>(rows: usize, work: impl FnOnce([&mut [[f32; PANEL]]; COUNT])) {
    thread_local! {
        static SUMS: RefCell<[Aligned<f32>; 2]> = const { RefCell::new([const { Aligned::empty() }; 2]) };
    }
    const { assert!(COUNT <= 2, "a buffer for each") };
    SUMS.with_borrow_mut(|sums| {
        let mut sums = sums.iter_mut();
        work(std::array::from_fn(|_| {
            let sums = sums.next().expect("a buffer for each");
            sums.make_room(rows * PANEL);
            &mut sums.as_chunks_mut().0[..rows]
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::super::rounding::rounded;
    use super::super::twin::random;
    use super::super::{packed::WeightType, pairs::are_widened};
    use super::*;
    use candle_core::{DType, Tensor};

    /// Several parts, the last one odd.
    const INPUTS: usize = 2125;
    const OUTPUTS: usize = 40;

    fn flat(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Each output of each row, one multiply-add after another.
    fn chains(x: &[f32], weight: &[f32], round: fn(f32) -> f32) -> Vec<f32> {
        let chain = |x: &[f32], weight: &[f32]| {
            let pairs = x.iter().zip(weight);
            pairs.fold(0.0f32, |sum, (&x, &weight)| round(x).mul_add(round(weight), sum))
        };
        let rows = x.chunks(INPUTS);
        rows.flat_map(|x| weight.chunks(INPUTS).map(move |weight| chain(x, weight))).collect()
    }

    fn turned(rows: &[f32]) -> Vec<f32> {
        let column = |output| rows.iter().skip(output).step_by(OUTPUTS).copied();
        (0..OUTPUTS).flat_map(column).collect()
    }

    #[test]
    fn rows_of_a_tile_become_columns_in_one_square_and_in_two() {
        let tile: Sums =
            std::array::from_fn(|row| std::array::from_fn(|lane| (100 * row + lane) as f32));
        let (one, two) = (super::turned::<1>(&tile), super::turned::<2>(&tile));
        for lane in 0..PANEL {
            let column = tile.map(|row| row[lane]);
            assert_eq!(one[lane][..SQUARE], column[..SQUARE]);
            assert_eq!(two[lane], column);
        }
    }

    fn check(kind: WeightType, round: fn(f32) -> f32) {
        let weights = [0, 1].map(|_| random(&[OUTPUTS, INPUTS], DType::F32));
        let packed = weights.each_ref().map(|t| PackedWeight::of_type(t, kind).unwrap());
        let x = flat(&random(&[150, INPUTS], DType::F32));
        let [one, other] = weights.map(|weight| chains(&x, &flat(&weight), round));
        for count in [1, 8, 13, 25, 150] {
            let mut rows = Rows::default();
            rows.set(kind, &x[..count * INPUTS], count, INPUTS);
            let (one, other) = (&one[..count * OUTPUTS], &other[..count * OUTPUTS]);
            let found = |work: &dyn Fn(&mut [f32])| {
                let mut out = vec![1.0; one.len()];
                work(&mut out);
                out
            };
            let what = format!("{kind:?}, {count} rows");
            assert_eq!(found(&|out| set([(&packed[0], out)], &rows)), one, "{what}");
            let more: Vec<f32> = one.iter().map(|sum| 1.0 + sum).collect();
            assert_eq!(found(&|out| add(&packed[0], &rows, out)), more, "{what}, added");
            assert_eq!(found(&|out| set_turned(&packed[0], &rows, out)), turned(one), "{what}");
            assert_eq!(found(&|out| add_turned(&packed[0], &rows, out)), turned(&more), "{what}");
            let silu = |x: f32| x * (1.0 / (1.0 + Real::exp(-x)));
            let gates: Vec<f32> = one.iter().zip(other).map(|(&x, up)| silu(x) * up).collect();
            let found = found(&|out| gated(&packed[0], &packed[1], &rows, out));
            assert_eq!(found, gates, "{what}, gated");
        }
    }

    #[test]
    fn an_output_is_one_chain_over_all_inputs_wherever_they_are_cut() {
        check(WeightType::F32, |x| x);
        if are_widened() {
            // A unit for bf16 sums in its own order, and takes all inputs at once.
            check(WeightType::Bf16, |x| f32::from_bits(rounded(x)));
        }
    }
}
