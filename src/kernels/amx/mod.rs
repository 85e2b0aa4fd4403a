//! Products on the matrix unit of Intel server processors (AMX), over the panels that are there anyway.
//!
//! ```text
//! 32 rows × 16 words   ·   16 words × 32 outputs   =   four squares of 16 × 16 sums      per step
//! ```
//!
//! One step takes 16 words of each row: 32 inputs in bf16, 64 in 8 bits. Rows that are not there are computed
//! as well, from whatever stands behind the last one, and thrown away; a row's sums depend on no other row.
//! Within a step the unit adds the products of a word to its sum in a fixed order, word after word.
//!
//! Sums in 8 bits are whole numbers, and equal those of `quads` bit for bit. Those in bf16 are in
//! f32 like those of `pairs`, with another order of roundings.

// Reason: whether the unit is there is asked in instructions and a system call of its own.
#![expect(unsafe_code, reason = "the CPU and the system are asked for the unit")]

mod parts;
mod unit;

pub(crate) use unit::chains;

use super::bf16x3::PARTS;
use super::groups::{GroupedPanel, GroupedRows};
use super::quads;
use super::real::simd;
use super::tiles::{self, Ahead, PANEL};
use parts::parts_of_squares;
use std::cell::RefCell;
use std::sync::LazyLock;
use unit::{Operands, one_square, two_squares};

/// Rows that are taken at a time.
pub(crate) const ROWS: usize = tiles::ROWS;

/// Rows of one square.
const SQUARE: usize = 16;

/// Words of a step.
const STEP: usize = 16;

/// Bytes from one row of a panel, or of sums, to the next.
const PANEL_BYTES: usize = PANEL * 4;

/// Whether this CPU has the unit and the system lets us use it. The system is asked for it once.
pub(crate) fn is_there() -> bool {
    static IS_THERE: LazyLock<bool> = LazyLock::new(|| has_unit() && is_permitted());
    *IS_THERE
}

fn has_unit() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    const TILES: u32 = 1 << 22 | 1 << 24 | 1 << 25; // bf16, tiles, int8: leaf 7, EDX
    const TILE_STATE: u64 = 0b11 << 17; // configuration and data: XCR0

    #[target_feature(enable = "xsave")]
    fn saved_states() -> u64 {
        // SAFETY: the system has enabled XGETBV, which was asked for before the call.
        unsafe { _xgetbv(0) }
    }

    let saves = __cpuid(0).eax >= 7 && __cpuid(1).ecx >> 27 & 1 == 1;
    // The vectors are for what is done to the sums.
    saves
        && __cpuid_count(7, 0).edx & TILES == TILES
        && is_x86_feature_detected!("avx512f")
        // SAFETY: the CPU has XGETBV, as asked above.
        && unsafe { saved_states() } & TILE_STATE == TILE_STATE
}

/// Linux gives a process the room to save tiles in only if it asks.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers and touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

impl Operands<'_> {
    /// Whether rows and panel of so many squares are whole steps as they are.
    #[inline(always)]
    fn are_whole(&self, squares: usize) -> bool {
        let depth = self.panel.len() / PANEL;
        depth.is_multiple_of(STEP)
            && self.rows.len() >= (squares * SQUARE - 1) * self.stride + depth
    }
}

/// Runs `work` with rows and panel of whole steps and squares: as they are, or copied with zeros behind
/// them. `work` gets the number of squares.
fn padded(operands: Operands<'_>, count: usize, work: impl FnOnce(Operands<'_>, usize)) {
    thread_local! {
        static COPIES: RefCell<(Vec<u32>, Vec<u32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
    }
    let squares = count.div_ceil(SQUARE);
    if operands.are_whole(squares) {
        return work(operands, squares);
    }
    let depth = operands.panel.len() / PANEL;
    let whole = depth.next_multiple_of(STEP);
    COPIES.with_borrow_mut(|(rows, panel)| {
        rows.clear();
        rows.resize(squares * SQUARE * whole, 0);
        let own = operands.rows.chunks(operands.stride.max(1)).filter_map(|row| row.get(..depth));
        for (copy, own) in rows.chunks_exact_mut(whole).zip(own).take(count) {
            copy[..depth].copy_from_slice(own);
        }
        let panel = match depth == whole {
            true => operands.panel,
            false => {
                panel.clear();
                panel.extend(operands.panel);
                panel.resize(whole * PANEL, 0);
                panel
            }
        };
        work(Operands { rows, stride: whole, panel, ..operands }, squares);
    });
}

/// `out[row]` = the 32 outputs of `panel` for each row, in bf16; rows are `stride` words apart.
///
/// Whole squares are stored in place: rows that are none of the caller's cost nothing if he leaves room.
pub(crate) fn pairs_tile(
    rows: &[u32],
    stride: usize,
    panel: &[u32],
    ahead: Ahead<'_>,
    out: &mut [[f32; PANEL]],
) {
    for (index, out) in out.chunks_mut(ROWS).enumerate() {
        let rows = &rows[index * ROWS * stride..];
        let steps = (panel.len() / PANEL).div_ceil(STEP);
        let ahead = if index == 0 { ahead } else { Ahead::NOTHING };
        let operands = Operands { rows, stride, panel, steps, ahead };
        // What is usual takes no copies and no further calls.
        match out.len() {
            SQUARE if operands.are_whole(1) => one_square::<false, _>(operands, out),
            ROWS if operands.are_whole(2) => two_squares::<false, _>(operands, out),
            _ => part_of_tile(operands, out),
        }
    }
}

/// The same for rows that are no whole squares, or words that are no whole steps.
#[cold]
fn part_of_tile(operands: Operands<'_>, out: &mut [[f32; PANEL]]) {
    let mut sums = [[0.0; PANEL]; ROWS];
    padded(operands, out.len(), |operands, squares| match squares {
        1 => one_square::<false, _>(operands, &mut sums),
        _ => two_squares::<false, _>(operands, &mut sums),
    });
    out.copy_from_slice(&sums[..out.len()]);
}

/// `out[row]` = the 32 outputs of `panel` for each row, in three parts of bf16; rows are `stride` words apart.
pub(crate) fn parts_tile(rows: &[u32], stride: usize, panel: &[u32], out: &mut [[f32; PANEL]]) {
    let steps = panel.len() / (PANEL * PARTS * STEP);
    if steps == 0 {
        return out.fill([0.0; PANEL]);
    }
    for (index, out) in out.chunks_mut(ROWS).enumerate() {
        let rows = &rows[index * ROWS * stride..];
        let operands = Operands { rows, stride, panel, steps, ahead: Ahead::NOTHING };
        match out.len() {
            ROWS if operands.are_whole(2) => parts_of_squares(operands, out),
            count => {
                let mut sums = [[0.0; PANEL]; ROWS];
                let whole = |operands: Operands<'_>, _| parts_of_squares(operands, &mut sums);
                padded(operands, ROWS, whole);
                out.copy_from_slice(&sums[..count]);
            }
        }
    }
}

/// `out[row]` = the 32 outputs of `panel` for each row, in 8 bits.
pub(crate) fn quads_tile(
    rows: GroupedRows<'_>,
    panel: GroupedPanel<'_>,
    ahead: Ahead<'_>,
    out: &mut [[f32; PANEL]],
) {
    for (index, out) in out.chunks_mut(ROWS).enumerate() {
        let groups = &rows.groups[index * ROWS * rows.group_stride..];
        let operands = Operands {
            rows: &rows.words[index * ROWS * rows.stride..],
            stride: rows.stride,
            panel: panel.words,
            steps: (panel.words.len() / PANEL).div_ceil(STEP),
            ahead: if index == 0 { ahead } else { Ahead::NOTHING },
        };
        padded(operands, out.len(), |operands, squares| {
            out.fill([0.0; PANEL]);
            let mut sums = [[0i32; PANEL]; ROWS];
            for (group, scales) in panel.scales.as_chunks::<PANEL>().0.iter().enumerate() {
                let operands = operands.group(group);
                match squares {
                    1 => one_square::<true, _>(operands, &mut sums),
                    _ => two_squares::<true, _>(operands, &mut sums),
                }
                simd(
                    #[inline(always)]
                    || {
                        let groups = groups[group..].iter().step_by(rows.group_stride);
                        for ((out, sums), own) in out.iter_mut().zip(&sums).zip(groups) {
                            for lane in 0..PANEL {
                                let sum = sums[lane].wrapping_add(own.correction);
                                let scale = scales[lane] * own.scale;
                                out[lane] = (sum as f32).mul_add(scale, out[lane]);
                            }
                        }
                    },
                );
            }
        });
    }
}

impl<'a> Operands<'a> {
    /// The steps of one group of 8-bit words.
    fn group(self, group: usize) -> Self {
        const STEPS: usize = quads::GROUP / STEP;
        let words = group * quads::GROUP;
        Operands {
            rows: &self.rows[words..],
            panel: &self.panel[words * PANEL..],
            steps: STEPS.min(self.steps - group * STEPS),
            ahead: self.ahead.after(words),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::rounding;
    use super::super::twin::random;
    use super::*;
    use candle_core::DType;

    fn words(count: usize) -> Vec<u32> {
        let x: Vec<f32> =
            random(&[2 * count], DType::F32).to_vec1().expect("a vector of that many");
        x.chunks(2).map(|x| rounding::pair(x[0], x[1])).collect()
    }

    fn check_pairs(rows: usize, depth: usize) {
        let stride = depth + 3;
        let (x, panel) = (words(rows * stride), words(depth * PANEL));
        let mut ours = vec![[0.0; PANEL]; rows];
        pairs_tile(&x, stride, &panel, Ahead::NOTHING, &mut ours);
        let wide = |word: u32| [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
        for (row, ours) in ours.iter().enumerate() {
            for (lane, ours) in ours.iter().enumerate() {
                let products = (0..depth).flat_map(|word| {
                    let (x, w) = (wide(x[row * stride + word]), wide(panel[word * PANEL + lane]));
                    [f64::from(x[0]) * f64::from(w[0]), f64::from(x[1]) * f64::from(w[1])]
                });
                let (exact, size) =
                    products.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
                let error = (f64::from(*ours) - exact).abs();
                assert!(error <= 1e-6 * size, "{rows} rows, {depth} words: {ours} is not {exact}");
            }
        }
        // What is fetched on the way changes nothing: once for each way to fetch.
        for step in [2, 8, PANEL] {
            let mut again = vec![[0.0; PANEL]; rows];
            pairs_tile(&x, stride, &panel, Ahead::new(&panel, step), &mut again);
            assert_eq!(again, ours);
        }
        // A row alone is what it is among others.
        for row in [0, rows / 2, rows - 1] {
            let mut alone = [[0.0; PANEL]];
            let own = &x[row * stride..][..depth];
            pairs_tile(own, depth, &panel, Ahead::NOTHING, &mut alone);
            assert_eq!(alone[0], ours[row]);
        }
    }

    #[test]
    fn products_in_bf16_are_those_of_plain_numbers() {
        if !is_there() {
            eprintln!("skipped: this CPU has no matrix unit");
            return;
        }
        for rows in [1, 2, 15, 16, 17, 31, 32, 33, 70] {
            for depth in [1, 5, 16, 17, 32, 64, 200] {
                check_pairs(rows, depth);
            }
        }
    }
}
