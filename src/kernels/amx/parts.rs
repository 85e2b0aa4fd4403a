//! Products of numbers in three parts on the matrix unit.

// Reason: as in `unit`, whose checks these are.
#![expect(unsafe_code, reason = "instructions of the matrix unit have no stable functions")]

use super::super::bf16x3::PARTS;
use super::super::tiles::PANEL;
use super::unit::{Operands, clear, near, store};
use super::{PANEL_BYTES, SQUARE};
use std::arch::asm;

/// The product of the tiles of a square, and what is fetched meanwhile.
macro_rules! square {
    ($square:tt, $($near:tt)*) => {
        concat!(square!($square), "\n", near!($($near)*))
    };
    (0) => { "tdpbf16ps tmm0, tmm4, tmm6" };
    (1) => { "tdpbf16ps tmm1, tmm4, tmm7" };
    (2) => { "tdpbf16ps tmm2, tmm5, tmm6" };
    (3) => { "tdpbf16ps tmm3, tmm5, tmm7" };
}

/// `sums[row] = rows · panel` for 32 rows whose elements, like those of the panel, are sums of three parts: the six products
/// of parts that matter, the small ones first. A step is 48 words; of its 24 products one to four follow each load.
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
            "tileloadd tmm4, [{rows} + {stride} + 128]",
            "tileloadd tmm6, [{panel} + {panel_stride}]",
            square!(0, panel "6144"),
            "tileloadd tmm7, [{panel} + {panel_stride} + 64]",
            square!(1, rows "320"),
            "tileloadd tmm5, [{below} + {stride} + 128]",
            square!(2, panel "6656"),
            "tileloadd tmm4, [{rows} + {stride} + 64]",
            square!(3, rows),
            // mid · high
            square!(0, panel "7168"),
            "tileloadd tmm5, [{below} + {stride} + 64]",
            square!(1, rows),
            square!(2, panel "7680"),
            "tileloadd tmm6, [{panel} + {panel_stride} + 2048]",
            square!(3, rows),
            // mid · mid
            "tileloadd tmm7, [{panel} + {panel_stride} + 2112]",
            square!(0, panel "8192"),
            square!(1, rows "256"),
            "tileloadd tmm4, [{rows} + {stride}]",
            square!(2, panel "8704"),
            square!(3, rows),
            // high · mid
            "tileloadd tmm5, [{below} + {stride}]",
            square!(0, panel "9216"),
            square!(1, rows),
            square!(2, panel "9728"),
            "tileloadd tmm6, [{panel} + {panel_stride} + 4096]",
            square!(3, rows),
            // high · low
            "tileloadd tmm7, [{panel} + {panel_stride} + 4160]",
            square!(0, panel "10240"),
            square!(2, rows "192"),
            "tileloadd tmm6, [{panel} + {panel_stride}]",
            square!(1, panel "10752"),
            square!(3, rows),
            // high · high
            "tileloadd tmm7, [{panel} + {panel_stride} + 64]",
            square!(0, panel "11264"),
            square!(2, rows),
            square!(1, panel "11776"),
            square!(3, rows),
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
