//! Products on the matrix unit of Intel server processors (AMX), over the panels that are there anyway.
//!
//! ```text
//! 32 rows × 16 words   ·   16 words × 32 outputs   =   four squares of 16 × 16 sums      per step
//! ```
//!
//! One step takes 16 words of each row: 32 inputs in bf16, 64 in 8 bits, and is some eight times as fast as
//! with vectors. Rows that are not there are computed as well, from whatever stands behind the last one, and
//! thrown away; a row's sums depend on no other row. Within a step the unit adds the products of a word to
//! its sum in a fixed order, word after word.
//!
//! Sums in 8 bits are whole numbers, and equal those of `quads` bit for bit. Those in bf16 are in
//! f32 like those of `pairs`, with another order of roundings.

// Reason: Rust has no stable functions for the unit, so its instructions are written out; they take raw
// pointers, whose bounds are asserted. Its tile registers are never used by compiled code.
#![expect(unsafe_code, reason = "instructions of the matrix unit have no stable functions")]

use super::quads::{self, QuadPanel, QuadRows};
use super::real::simd;
use super::tiles::{self, Ahead, PANEL};
use std::arch::asm;
use std::cell::{Cell, RefCell};
use std::sync::LazyLock;

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

/// Shapes of the eight tile registers: each 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static SHAPES: Shapes = Shapes {
    palette: 1,
    start: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Sets the shapes of this thread's tiles, once: no other code of the program has tiles.
fn configure() {
    thread_local! {
        static DONE: Cell<bool> = const { Cell::new(false) };
    }
    if !DONE.get() {
        assert!(is_there());
        // SAFETY: the unit is there, and the shapes are 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const SHAPES, options(nostack, readonly)) };
        DONE.set(true);
    }
}

/// What the unit stores: 32 bits of which every pattern is a number.
trait Sum: Copy {}
impl Sum for f32 {}
impl Sum for i32 {}

/// Rows, a panel and what is fetched on the way, cut to whole steps.
#[derive(Clone, Copy)]
struct Operands<'a> {
    rows: &'a [u32],
    /// Words from one row to the next.
    stride: usize,
    panel: &'a [u32],
    steps: usize,
    ahead: Ahead<'a>,
}

/// `sums[row] = rows · panel` for the first `SQUARES` times 16 rows: in bf16 with sums in f32, or in bytes with
/// whole numbers.
///
/// # Panics
/// If rows, panel or sums are too short.
fn multiply<const SQUARES: usize, const BYTES: bool, T: Sum>(
    operands: Operands<'_>,
    sums: &mut [[T; PANEL]],
) {
    const { assert!(size_of::<T>() == 4) };
    let Operands { rows, stride, panel, steps, ahead } = operands;
    let count = SQUARES * SQUARE;
    assert!(steps > 0 && rows.len() >= (count - 1) * stride + steps * STEP);
    assert!(panel.len() >= steps * STEP * PANEL && sums.len() >= count);
    configure();
    let second = if SQUARES == 2 { SQUARE * stride } else { 0 };
    // Lines of 64 bytes to fetch in each step, where there is something.
    let lines = if ahead.words.is_empty() { 0 } else { ahead.step };
    macro_rules! run {
        ($multiply:literal) => {
            // SAFETY: the unit is there and configured. Loads stay within rows and panel and stores within
            // the sums, as asserted above; a prefetch may name any address.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tileloadd tmm6, [{panel} + {panel_stride}]",
                    "tileloadd tmm7, [{panel} + {panel_stride} + 64]",
                    "tileloadd tmm4, [{rows} + {stride}]",
                    concat!($multiply, " tmm0, tmm4, tmm6"),
                    concat!($multiply, " tmm1, tmm4, tmm7"),
                    "test {second}, {second}",
                    "jz 3f",
                    "lea {at}, [{rows} + {second}]",
                    "tileloadd tmm5, [{at} + {stride}]",
                    concat!($multiply, " tmm2, tmm5, tmm6"),
                    concat!($multiply, " tmm3, tmm5, tmm7"),
                    "3:",
                    "mov {at}, {lines}",
                    "test {at}, {at}",
                    "jz 5f", // nothing to fetch
                    "4:",
                    "prefetcht1 [{ahead}]",
                    "add {ahead}, 64",
                    "dec {at}",
                    "jnz 4b",
                    "5:",
                    "add {rows}, 64",
                    "add {panel}, 2048",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{sums} + {panel_stride}], tmm0",
                    "tilestored [{sums} + {panel_stride} + 64], tmm1",
                    "test {second}, {second}",
                    "jz 6f",
                    "add {sums}, 2048",
                    "tilestored [{sums} + {panel_stride}], tmm2",
                    "tilestored [{sums} + {panel_stride} + 64], tmm3",
                    "6:",
                    rows = inout(reg) rows.as_ptr() => _,
                    panel = inout(reg) panel.as_ptr() => _,
                    sums = inout(reg) sums.as_mut_ptr() => _,
                    steps = inout(reg) steps => _,
                    ahead = inout(reg) ahead.words.as_ptr() => _,
                    stride = in(reg) 4 * stride,
                    panel_stride = in(reg) PANEL_BYTES,
                    second = in(reg) 4 * second,
                    lines = in(reg) lines,
                    at = out(reg) _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        };
    }
    // Bytes of rows are signed, those of weights are not.
    if BYTES { run!("tdpbsud") } else { run!("tdpbf16ps") }
}

/// Multiplies what registers hold, `turns` times, in bf16 or in bytes; returns how many operations that were.
pub(crate) fn chains<const BYTES: bool>(turns: usize) -> usize {
    configure();
    macro_rules! run {
        ($multiply:literal) => {
            // SAFETY: the unit is there and configured; no memory is touched.
            unsafe {
                asm!(
                    "tilezero tmm6",
                    "tilezero tmm7",
                    "2:",
                    concat!($multiply, " tmm0, tmm6, tmm7"),
                    concat!($multiply, " tmm1, tmm6, tmm7"),
                    concat!($multiply, " tmm2, tmm6, tmm7"),
                    concat!($multiply, " tmm3, tmm6, tmm7"),
                    "dec {turns}",
                    "jnz 2b",
                    turns = inout(reg) turns => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, nomem),
                );
            }
        };
    }
    match BYTES {
        false => run!("tdpbf16ps"),
        true => run!("tdpbsud"),
    }
    let inputs = STEP * if BYTES { 4 } else { 2 };
    4 * turns * 2 * SQUARE * SQUARE * inputs
}

/// Runs `work` with rows and panel of whole steps and squares: as they are, or copied with zeros behind
/// them. `work` gets the number of squares.
fn padded(operands: Operands<'_>, count: usize, work: impl FnOnce(Operands<'_>, usize)) {
    thread_local! {
        static COPIES: RefCell<(Vec<u32>, Vec<u32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
    }
    let depth = operands.panel.len() / PANEL;
    let squares = count.div_ceil(SQUARE);
    let whole = depth.next_multiple_of(STEP);
    let has_room = operands.rows.len() >= (squares * SQUARE - 1) * operands.stride + whole;
    if depth == whole && has_room {
        return work(operands, squares);
    }
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
        padded(
            Operands { rows, stride, panel, steps, ahead },
            out.len(),
            |operands, squares| match (squares, out.len()) {
                (1, SQUARE) => multiply::<1, false, _>(operands, out),
                (2, ROWS) => multiply::<2, false, _>(operands, out),
                (1, count) => {
                    let mut sums = [[0.0; PANEL]; SQUARE];
                    multiply::<1, false, _>(operands, &mut sums);
                    out.copy_from_slice(&sums[..count]);
                }
                (_, count) => {
                    let mut sums = [[0.0; PANEL]; ROWS];
                    multiply::<2, false, _>(operands, &mut sums);
                    out.copy_from_slice(&sums[..count]);
                }
            },
        );
    }
}

/// `out[row]` = the 32 outputs of `panel` for each row, in 8 bits.
pub(crate) fn quads_tile(
    rows: QuadRows<'_>,
    panel: QuadPanel<'_>,
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
                    1 => multiply::<1, true, _>(operands, &mut sums),
                    _ => multiply::<2, true, _>(operands, &mut sums),
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
        let ahead = match self.ahead.words.get(words * self.ahead.step..) {
            Some(words) => Ahead { words, ..self.ahead },
            None => Ahead::NOTHING,
        };
        Operands {
            rows: &self.rows[words..],
            panel: &self.panel[words * PANEL..],
            steps: STEPS.min(self.steps - group * STEPS),
            ahead,
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pairs;
    use super::super::twin::random;
    use super::*;
    use candle_core::DType;

    fn words(count: usize) -> Vec<u32> {
        let x: Vec<f32> =
            random(&[2 * count], DType::F32).to_vec1().expect("a vector of that many");
        x.chunks(2).map(|x| pairs::pair(x[0], x[1])).collect()
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
