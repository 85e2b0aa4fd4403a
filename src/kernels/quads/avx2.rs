//! The same in vectors of 256 bits, for CPUs that do not multiply and add bytes in one instruction.

use super::super::fetch::{Span, Steps};
use super::{Ahead, GROUP, GroupedPanel, GroupedRows, PANEL};
use std::arch::x86_64::{
    __m256i, _mm256_abs_epi8, _mm256_add_epi32, _mm256_cvtepi32_ps, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_mul_ps,
    _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_si256,
    _mm256_sign_epi8, _mm256_storeu_ps, _mm256_xor_si256,
};

/// Rows at a time: with two vectors of outputs, their sums are half of the registers.
const ROWS: usize = 4;

/// Outputs of a vector.
const LANES: usize = 8;

/// Whether this CPU has such vectors.
#[inline(always)]
pub(super) fn is_there() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

pub(super) fn tile(
    rows: GroupedRows<'_>,
    panel: GroupedPanel<'_>,
    ahead: Ahead<'_>,
    out: &mut [[f32; PANEL]],
) {
    assert!(is_there());
    let (ahead, count) = (ahead.beside(panel.words.len() / PANEL), out.len());
    for (index, out) in out.chunks_mut(ROWS).enumerate() {
        let first = index * ROWS;
        let rows = rows.from(first);
        let ahead = ahead.part(first..first + out.len(), count);
        // SAFETY: the CPU has the instructions, as asserted above.
        unsafe {
            match out.len() {
                1 => rows_tile::<1>(rows, panel, ahead, out),
                2 => rows_tile::<2>(rows, panel, ahead, out),
                3 => rows_tile::<3>(rows, panel, ahead, out),
                _ => rows_tile::<ROWS>(rows, panel, ahead, out),
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
fn rows_tile<const ROWS: usize>(
    rows: GroupedRows<'_>,
    panel: GroupedPanel<'_>,
    ahead: Span<'_>,
    out: &mut [[f32; PANEL]],
) {
    let (panels, rest) = panel.words.as_chunks::<PANEL>();
    assert!(rest.is_empty() && out.len() >= ROWS);
    assert!(panel.scales.len() >= panels.len().div_ceil(GROUP) * PANEL);
    assert!(rows.words.len() >= (ROWS - 1) * rows.stride + panels.len());
    out[..ROWS].fill([0.0; PANEL]);
    let mut ahead = ahead.steps(panels.len() * PANEL / (2 * LANES), panels);
    let groups = panels.chunks(GROUP).zip(panel.scales.as_chunks::<PANEL>().0);
    for (index, (panels, scales)) in groups.enumerate() {
        let words = rows.words[index * GROUP..].as_ptr();
        let own: [f32; ROWS] =
            std::array::from_fn(|row| rows.groups[row * rows.group_stride + index].scale);
        for first in (0..PANEL).step_by(2 * LANES) {
            // SAFETY: each row has a word for each of the panel, as asserted above.
            let sums =
                unsafe { sums_of_group::<ROWS>((words, rows.stride), panels, first, &mut ahead) };
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

/// Sums of a group for two vectors of outputs from `first`. Bytes of weights are -127..=127, or -128 in outputs that
/// are not there, and those of rows -127..=127: two products are at most 32,512 in size, and fit 16 bits.
///
/// # Safety
/// From `words` on, and so many words from one row to the next, there is a word for each of the panels.
#[target_feature(enable = "avx2,fma")]
unsafe fn sums_of_group<const ROWS: usize>(
    (words, stride): (*const u32, usize),
    panels: &[[u32; PANEL]],
    first: usize,
    ahead: &mut Steps,
) -> [[__m256i; 2]; ROWS] {
    assert!(first + 2 * LANES <= PANEL);
    let mut sums = [[_mm256_setzero_si256(); 2]; ROWS];
    let (offset, ones) = (_mm256_set1_epi8(-128), _mm256_set1_epi16(1));
    for (word, panel) in panels.iter().enumerate() {
        ahead.fetch(1);
        for half in 0..2 {
            // SAFETY: two vectors from `first` are within a panel, as asserted above; words are as promised. Checks of
            // slices take an eighth of the time of this loop.
            unsafe {
                let own = _mm256_loadu_si256(panel.as_ptr().add(first + half * LANES).cast());
                let weights = _mm256_xor_si256(own, offset);
                let sizes = _mm256_abs_epi8(weights);
                for row in 0..ROWS {
                    let x = _mm256_set1_epi32(*words.add(row * stride + word) as i32);
                    let pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(x, weights));
                    let quads = _mm256_madd_epi16(pairs, ones);
                    sums[row][half] = _mm256_add_epi32(sums[row][half], quads);
                }
            }
        }
    }
    sums
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
