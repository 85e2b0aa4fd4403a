//! Products of numbers in three parts on the matrix unit.

// Reason: as in `unit`, whose checks these are.
#![expect(unsafe_code, reason = "instructions of the matrix unit have no stable functions")]

use super::super::bf16x3::PARTS;
use super::super::tiles::PANEL;
use super::unit::{Operands, clear, near, store};
use super::{PANEL_BYTES, SQUARE};
use std::arch::asm;

/// Loads a tile of the upper or lower rows, or of the panel.
macro_rules! load {
    (panel $offset:literal) => {
        concat!("tileloadd tmm5, [{panel} + {panel_stride} + ", $offset, "]")
    };
    ($rows:ident $offset:literal) => {
        concat!("tileloadd tmm4, [{", stringify!($rows), "} + {stride} + ", $offset, "]")
    };
}

/// Loads a tile, multiplies for a square, and fetches meanwhile.
macro_rules! square {
    ($square:literal, $of:ident $offset:literal, $($near:tt)*) => {
        concat!(load!($of $offset), "\ntdpbf16ps tmm", $square, ", tmm4, tmm5\n", near!($($near)*))
    };
}

/// `sums[row] = rows · panel` for 32 rows whose elements, like those of the panel, are sums of three parts: the six products
/// of parts that matter, the small ones first. A step is 48 words; a tile is loaded before each of its 24 products.
///
/// # Panics
/// If rows, panel or sums are too short.
#[inline(always)]
pub(super) fn parts_of_squares(operands: Operands<'_>, sums: &mut [[f32; PANEL]]) {
    let Operands { rows, stride, panel, steps, .. } = operands;
    Operands { steps: PARTS * steps, ..operands }.check(2 * SQUARE, sums);
    let (rows, panel) = (rows.as_ptr(), panel.as_ptr());
    let (sums, stride) = (sums.as_mut_ptr(), 4 * stride);
    // SAFETY: the unit is there and configured. Loads stay within rows and panel and stores within the sums, as `check`
    // asserts; a prefetch may name any address.
    unsafe {
        asm!(
            clear!(),
            "2:",
            // low · high
            load!(rows "128"),
            square!(0, panel "0", panel "6144"),
            square!(1, panel "64", rows "320"),
            square!(3, below "128", panel "6656"),
            square!(2, panel "0", rows),
            // mid · high
            square!(2, below "64", panel "7168"),
            square!(3, panel "64", rows),
            square!(1, rows "64", panel "7680"),
            square!(0, panel "0", rows),
            // mid · mid
            square!(0, panel "2048", panel "8192"),
            square!(1, panel "2112", rows "256"),
            square!(3, below "64", panel "8704"),
            square!(2, panel "2048", rows),
            // high · mid
            square!(2, below "0", panel "9216"),
            square!(3, panel "2112", rows),
            square!(1, rows "0", panel "9728"),
            square!(0, panel "2048", rows),
            // high · low
            square!(0, panel "4096", panel "10240"),
            square!(1, panel "4160", rows "192"),
            square!(3, below "0", panel "10752"),
            square!(2, panel "4096", rows),
            // high · high
            square!(2, panel "0", panel "11264"),
            square!(3, panel "64", rows),
            square!(1, rows "0", panel "11776"),
            square!(0, panel "0", rows),
            "add {rows}, 192",
            "add {below}, 192",
            "add {panel}, 6144",
            "dec {steps}",
            "jnz 2b",
            store!(),
            rows = inout(reg) rows => _,
            below = inout(reg) rows.byte_add(SQUARE * stride) => _,
            near = out(reg) _,
            panel = inout(reg) panel => _,
            sums = in(reg) sums,
            steps = inout(reg) steps => _,
            stride = in(reg) stride,
            panel_stride = in(reg) PANEL_BYTES,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
