//! The instructions of the matrix unit.

// Reason: Rust has no stable functions for the unit, so its instructions are written out; they take raw
// pointers, whose bounds are asserted. Its tile registers are never used by compiled code.
#![expect(unsafe_code, reason = "instructions of the matrix unit have no stable functions")]

use super::super::tiles::{Ahead, PANEL};
use super::{PANEL_BYTES, SQUARE, STEP, is_there};
use std::arch::asm;
use std::cell::Cell;

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
pub(super) trait Sum: Copy {}
impl Sum for f32 {}
impl Sum for i32 {}

/// Rows, a panel and what is fetched on the way, cut to whole steps.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub(super) rows: &'a [u32],
    /// Words from one row to the next.
    pub(super) stride: usize,
    pub(super) panel: &'a [u32],
    pub(super) steps: usize,
    pub(super) ahead: Ahead<'a>,
}

impl Operands<'_> {
    /// # Panics
    /// If rows, panel or `sums` are too short for so many rows.
    #[inline(always)]
    pub(super) fn check<T>(&self, count: usize, sums: &[[T; PANEL]]) {
        const { assert!(size_of::<T>() == 4) };
        assert!(self.steps > 0 && self.rows.len() >= (count - 1) * self.stride + self.steps * STEP);
        assert!(self.panel.len() >= self.steps * STEP * PANEL && sums.len() >= count);
        configure();
    }
}

/// Instructions that make all tiles zero: sums, and what an earlier product has left. Where two threads share a core,
/// products were the faster the fewer tiles hold something, as if both shared the registers that it renames tiles to; one that
/// is zero costs nothing (docs/engine.md).
macro_rules! clear {
    () => {
        ".irp i,0,1,2,3,4,5,6,7\ntilezero tmm\\i\n.endr"
    };
}
pub(super) use clear;

/// Instructions with which one of the four places of a step fetches.
macro_rules! lines {
    (1) => {
        "prefetcht1 [{ahead}]\nadd {ahead}, 64"
    };
    (4) => {
        ".irp i,0,1,2,3\nprefetcht1 [{ahead} + 64*\\i]\n.endr\nadd {ahead}, 256"
    };
    // Wanted at once.
    (8) => {
        ".irp i,0,1,2,3,4,5,6,7\nprefetcht0 [{ahead} + 64*\\i]\n.endr\nadd {ahead}, 512"
    };
    // Where the CPU's own prefetcher begins; it stops at the end of every page, and tiles do not start it in time.
    (first of 32) => {
        "prefetcht1 [{ahead}]\nprefetcht1 [{ahead} + 64]\nadd {ahead}, 2048"
    };
    (none) => {
        "/* {ahead} */"
    };
}

/// Runs `$run!(multiply, first, fetch)` with what the first of the four places of a step fetches, and each other.
/// `$first` and `$fetch` are for what is fetched whole.
macro_rules! with_fetch {
    ($ahead:expr, $run:ident, $multiply:literal, $first:expr, $fetch:expr) => {
        match $ahead.step() {
            0 => $run!($multiply, lines!(none), lines!(none)),
            1..=4 => $run!($multiply, lines!(1), lines!(1)),
            5..=16 => $run!($multiply, lines!(4), lines!(4)),
            _ => $run!($multiply, $first, $fetch),
        }
    };
}

/// `sums[row] = rows · panel` for 16 rows: in bf16 with sums in f32, or in bytes with whole numbers.
///
/// # Panics
/// If rows, panel or sums are too short.
#[inline(always)]
pub(super) fn one_square<const BYTES: bool, T: Sum>(
    operands: Operands<'_>,
    sums: &mut [[T; PANEL]],
) {
    operands.check(SQUARE, sums);
    let Operands { rows, stride, panel, steps, ahead } = operands;
    let (rows, panel, fetched) = (rows.as_ptr(), panel.as_ptr(), ahead.at(0));
    let (sums, stride) = (sums.as_mut_ptr(), 4 * stride);
    macro_rules! run {
        ($multiply:literal, $first:expr, $fetch:expr) => {
            // SAFETY: the unit is there and configured. Loads stay within rows and panel and stores within
            // the sums, as `check` asserts; a prefetch may name any address.
            unsafe {
                asm!(
                    clear!(),
                    "2:",
                    "tileloadd tmm4, [{rows} + {stride}]",
                    $first,
                    "tileloadd tmm6, [{panel} + {panel_stride}]",
                    $fetch,
                    concat!($multiply, " tmm0, tmm4, tmm6"),
                    "tileloadd tmm7, [{panel} + {panel_stride} + 64]",
                    $fetch,
                    concat!($multiply, " tmm1, tmm4, tmm7"),
                    $fetch,
                    "add {rows}, 64",
                    "add {panel}, 2048",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{sums} + {panel_stride}], tmm0",
                    "tilestored [{sums} + {panel_stride} + 64], tmm1",
                    rows = inout(reg) rows => _,
                    panel = inout(reg) panel => _,
                    sums = in(reg) sums,
                    steps = inout(reg) steps => _,
                    ahead = inout(reg) fetched => _,
                    stride = in(reg) stride,
                    panel_stride = in(reg) PANEL_BYTES,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        };
    }
    // Bytes of rows are signed, those of weights are not.
    match BYTES {
        true => with_fetch!(ahead, run, "tdpbsud", lines!(8), lines!(8)),
        false => with_fetch!(ahead, run, "tdpbf16ps", lines!(8), lines!(8)),
    }
}

/// Instructions that bring eight lines of what comes next into the first cache: of a panel, and of rows that lie a stride apart,
/// from the first one or going on. Where the core is shared with another thread, tiles wait for the second cache unless they
/// are asked for early.
macro_rules! near {
    (panel $offset:literal) => {
        concat!(".irp i,0,1,2,3,4,5,6,7\nprefetcht0 [{panel} + ", $offset, " + 64*\\i]\n.endr")
    };
    (rows $offset:literal) => {
        concat!("lea {near}, [{rows} + ", $offset, "]\n", near!(rows))
    };
    (rows) => {
        ".rept 8\nprefetcht0 [{near}]\nadd {near}, {stride}\n.endr"
    };
}
pub(super) use near;

/// Instructions that store the sums of 32 rows.
macro_rules! store {
    () => {
        "tilestored [{sums} + {panel_stride}], tmm0
        tilestored [{sums} + {panel_stride} + 64], tmm1
        tilestored [{sums} + {panel_stride} + 2048], tmm2
        tilestored [{sums} + {panel_stride} + 2112], tmm3"
    };
}
pub(super) use store;

/// The same for 32 rows. One register is for rows and one for the panel, whose left half is loaded twice.
///
/// # Panics
/// If rows, panel or sums are too short.
#[inline(always)]
pub(super) fn two_squares<const BYTES: bool, T: Sum>(
    operands: Operands<'_>,
    sums: &mut [[T; PANEL]],
) {
    operands.check(2 * SQUARE, sums);
    let Operands { rows, stride, panel, steps, ahead } = operands;
    let (rows, panel, fetched) = (rows.as_ptr(), panel.as_ptr(), ahead.at(0));
    let (sums, stride) = (sums.as_mut_ptr(), 4 * stride);
    macro_rules! run {
        ($multiply:literal, $first:expr, $fetch:expr) => {
            // SAFETY: as above.
            unsafe {
                asm!(
                    clear!(),
                    "2:",
                    "tileloadd tmm4, [{rows} + {stride}]",
                    "tileloadd tmm5, [{panel} + {panel_stride}]",
                    concat!($multiply, " tmm0, tmm4, tmm5"),
                    $first,
                    near!(panel "4096"),
                    near!(rows "128"),
                    "tileloadd tmm5, [{panel} + {panel_stride} + 64]",
                    concat!($multiply, " tmm1, tmm4, tmm5"),
                    $fetch,
                    near!(panel "4608"),
                    near!(rows),
                    "tileloadd tmm4, [{below} + {stride}]",
                    concat!($multiply, " tmm3, tmm4, tmm5"),
                    $fetch,
                    near!(panel "5120"),
                    near!(rows),
                    "tileloadd tmm5, [{panel} + {panel_stride}]",
                    concat!($multiply, " tmm2, tmm4, tmm5"),
                    $fetch,
                    near!(panel "5632"),
                    near!(rows),
                    "add {rows}, 64",
                    "add {below}, 64",
                    "add {panel}, 2048",
                    "dec {steps}",
                    "jnz 2b",
                    store!(),
                    rows = inout(reg) rows => _,
                    below = inout(reg) rows.byte_add(SQUARE * stride) => _,
                    near = out(reg) _,
                    panel = inout(reg) panel => _,
                    sums = in(reg) sums,
                    steps = inout(reg) steps => _,
                    ahead = inout(reg) fetched => _,
                    stride = in(reg) stride,
                    panel_stride = in(reg) PANEL_BYTES,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        };
    }
    match BYTES {
        true => with_fetch!(ahead, run, "tdpbsud", lines!(first of 32), lines!(none)),
        false => with_fetch!(ahead, run, "tdpbf16ps", lines!(first of 32), lines!(none)),
    }
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
