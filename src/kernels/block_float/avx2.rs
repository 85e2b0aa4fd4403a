//! The same in vectors of 256 bits.

// Reason: functions compiled for an instruction set may only be called where the CPU has it, loads and broadcasts take
// raw pointers, and a pair of instructions is written out. The bounds are asserted, the instruction set is asked for.
#![expect(unsafe_code, reason = "instruction sets are asked for, and bounds asserted")]

use super::super::fetch::{LINE, Span, Steps};
use super::{Ahead, GROUP, GroupedPanel, GroupedRows, PANEL};
use std::arch::asm;
use std::arch::x86_64::{
    __m256i, _mm256_cvtepi32_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_mul_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_si256, _mm256_storeu_ps,
};
use std::sync::atomic::{Ordering, compiler_fence};

/// Outputs of a vector.
const LANES: usize = 8;

/// Words at a time: one is hardly more work than moving on.
const STEP: usize = 4;

/// Calls [`rows_tile`] with the number of rows, and of vectors that goes with it, as constants.
macro_rules! by_constant {
    ($rows:expr, $panel:ident, $ahead:ident, $out:ident; $($count:literal)*) => {
        match $out.len() {
            $($count => rows_tile::<$count, { vectors($count) }>($rows, $panel, $ahead, $out),)*
            _ => unreachable!("no more rows than registers"),
        }
    };
}

/// Runs the body for each word of a step.
macro_rules! each_word {
    ($word:ident => $body:expr) => {
        each_word!($word, $body; 0 1 2 3)
    };
    ($word:ident, $body:expr; $($number:literal)*) => {
        $({ let $word = $number; $body })*
    };
}

/// Rows that one register points to: an address has another for what is once or twice between them.
const ROWS_OF_START: usize = 3;

/// Rows at a time at most.
const MOST_ROWS: usize = 6;

/// Whether this CPU has such vectors.
#[inline(always)]
pub(super) fn is_there() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// Vectors of outputs at a time: with the rows, their sums are at most 12 of the 16 registers.
const fn vectors(rows: usize) -> usize {
    match rows {
        ..=2 => 4,
        _ => 2,
    }
}

pub(super) fn tile(
    rows: GroupedRows<'_>,
    panel: GroupedPanel<'_>,
    ahead: Ahead<'_>,
    out: &mut [[f32; PANEL]],
) {
    assert!(is_there());
    let (ahead, count) = (ahead.beside(panel.words.len() / PANEL), out.len());
    // The fewest pieces, as even as can be.
    let most = count.div_ceil(count.div_ceil(MOST_ROWS).max(1));
    for first in (0..count).step_by(most.max(1)) {
        let own = first..(first + most).min(count);
        let (ahead, out) = (ahead.part(own.clone(), count), &mut out[own]);
        // SAFETY: the CPU has the instructions, as asserted above.
        unsafe { by_constant!(rows.from(first), panel, ahead, out; 1 2 3 4 5 6) }
    }
}

#[target_feature(enable = "avx2,fma")]
fn rows_tile<const ROWS: usize, const VECTORS: usize>(
    rows: GroupedRows<'_>,
    panel: GroupedPanel<'_>,
    ahead: Span<'_>,
    out: &mut [[f32; PANEL]],
) {
    let (depth, out) = (panel.words.len() / PANEL, &mut out[..ROWS]);
    assert!(rows.words.len() >= (ROWS - 1) * rows.stride + depth);
    out.fill([0.0; PANEL]);
    let mut ahead = ahead.steps(size_of_val(panel.words) / LINE, panel.words);
    for (index, (panels, scales)) in panel.groups(GROUP).enumerate() {
        let words = rows.words[index * GROUP..].as_ptr();
        let own: [f32; ROWS] =
            std::array::from_fn(|row| rows.groups[row * rows.group_stride + index].scale);
        for first in (0..PANEL).step_by(VECTORS * LANES) {
            let own_words = (words, rows.stride);
            // SAFETY: each row has a word for each of the panel, as asserted above.
            let sums =
                unsafe { sums_of_group::<ROWS, VECTORS>(own_words, panels, first, &mut ahead) };
            for row in 0..ROWS {
                let out = out[row][first..].as_chunks_mut::<LANES>().0.iter_mut();
                let scales = scales[first..].as_chunks::<LANES>().0;
                for ((out, scales), sum) in out.zip(scales).zip(sums[row]) {
                    add_scaled(out, scales, own[row], sum);
                }
            }
        }
    }
}

/// Sums of a group for some vectors of outputs from `first`.
///
/// # Safety
/// From `words` on, and so many words from one row to the next, there is a word for each of the panels.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn sums_of_group<const ROWS: usize, const VECTORS: usize>(
    (words, stride): (*const u32, usize),
    panels: &[[u32; PANEL]],
    first: usize,
    ahead: &mut Steps,
) -> [[__m256i; VECTORS]; ROWS] {
    assert!(first + VECTORS * LANES <= PANEL);
    let mut sums = [[_mm256_setzero_si256(); VECTORS]; ROWS];
    let (steps, rest) = panels.as_chunks::<STEP>();
    assert!(rest.is_empty());
    let mut starts: [*const u32; MOST_ROWS / ROWS_OF_START] =
        std::array::from_fn(|start| words.wrapping_add(start * ROWS_OF_START * stride));
    for panels in steps {
        ahead.fetch(STEP * VECTORS * LANES * size_of::<u32>() / LINE);
        for start in &mut starts[..ROWS.div_ceil(ROWS_OF_START)] {
            // SAFETY: nothing is done. Where rows start is thus in registers, and not computed anew for each word.
            unsafe {
                asm!("/* {0} */", inout(reg) * start, options(readonly, nostack, preserves_flags));
            };
        }
        // Written out, for the compiler keeps long loops.
        each_word!(word => {
            // Else the compiler loads what comes next, and runs out of registers.
            compiler_fence(Ordering::SeqCst);
            // SAFETY: the vectors from `first` are within a panel, as asserted above; words are as promised.
            unsafe {
                let mut weights = [_mm256_setzero_si256(); VECTORS];
                for vector in 0..VECTORS {
                    let own = panels[word].as_ptr().add(first + vector * LANES);
                    weights[vector] = _mm256_loadu_si256(own.cast());
                }
                for row in 0..ROWS {
                    let start = starts[row / ROWS_OF_START];
                    let x = start.wrapping_add(row % ROWS_OF_START * stride).add(word);
                    let x = _mm256_set1_epi32(*x as i32);
                    for vector in 0..VECTORS {
                        sums[row][vector] = multiply_add(sums[row][vector], x, weights[vector]);
                    }
                }
            }
        });
        starts = starts.map(|start| start.wrapping_add(STEP));
    }
    sums
}

/// `sum` and the products of the pairs of `x` and `weights`: `_mm256_add_epi32` behind `_mm256_madd_epi16`, which the
/// compiler would add up in another order, with more sums than there are registers.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn multiply_add(mut sum: __m256i, x: __m256i, weights: __m256i) -> __m256i {
    // SAFETY: the instructions read and write nothing but these registers.
    unsafe {
        asm!(
            "vpmaddwd {pairs}, {x}, {weights}",
            "vpaddd {sum}, {sum}, {pairs}",
            pairs = lateout(ymm_reg) _,
            x = in(ymm_reg) x,
            weights = in(ymm_reg) weights,
            sum = inout(ymm_reg) sum,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

#[target_feature(enable = "avx2,fma")]
fn add_scaled(out: &mut [f32; LANES], scales: &[f32; LANES], own: f32, sum: __m256i) {
    // SAFETY: an array of eight numbers is a vector.
    unsafe {
        let scale = _mm256_mul_ps(_mm256_loadu_ps(scales.as_ptr()), _mm256_set1_ps(own));
        let before = _mm256_loadu_ps(out.as_ptr());
        let after = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, before);
        _mm256_storeu_ps(out.as_mut_ptr(), after);
    }
}
