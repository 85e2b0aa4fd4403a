//! From f32 to bf16, to the nearest, ties to even: two in a word, the first in its low half.
//!
//! A CPU with `vcvtne2ps2bf16` takes numbers below 2^-126 for zero, as its products of bf16 do; elsewhere they are rounded
//! like all others.

// Reason: loads and stores of `std::arch` take raw pointers, and functions compiled for an instruction set may only be
// called where the CPU has it. Pointers are those of arrays of the right size; the instruction set is asked for.
#![expect(unsafe_code, reason = "vector loads take raw pointers, of arrays of the right size")]

use super::tiles::PANEL;
use pulp::Simd;

/// Whether this CPU rounds whole vectors.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn has_vectors() -> bool {
    is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw")
}

/// A word of two elements.
#[inline(always)]
pub(crate) fn pair(low: f32, high: f32) -> u32 {
    round(low) | round(high) << 16
}

/// The bits of the nearest bf16. What is no number stays none.
#[inline(always)]
pub(crate) fn round(x: f32) -> u32 {
    const QUIET: u32 = 0x40;
    let bits = x.to_bits();
    let nearest = (bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16;
    if x.is_nan() { bits >> 16 | QUIET } else { nearest }
}

/// The bits of an f32 that was rounded to bf16.
#[inline(always)]
pub(crate) fn rounded(x: f32) -> u32 {
    round(x) << 16
}

/// [`rounded`] of each lane. Of what is no number the result is of no meaning.
#[inline(always)]
pub(crate) fn rounded_vector<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let bits = simd.transmute_u32s_f32s(x);
    let odd =
        simd.and_u32s(simd.wrapping_dyn_shr_u32s(bits, simd.splat_u32s(16)), simd.splat_u32s(1));
    let up = simd.add_u32s(simd.splat_u32s(0x7fff), odd);
    let nearest = simd.and_u32s(simd.add_u32s(bits, up), simd.splat_u32s(0xffff_0000));
    simd.transmute_f32s_u32s(nearest)
}

/// Rounds a row into words.
#[inline(always)]
pub(crate) fn round_row(x: &[f32], words: &mut [u32]) {
    #[cfg(target_arch = "x86_64")]
    if x.len() >= PANEL && has_vectors() {
        // SAFETY: the CPU has the instructions.
        return unsafe { vectors::round_row(x, words) };
    }
    round_one_by_one(x, words);
}

/// Rounds rows into words, `stride` words apart.
#[inline(always)]
pub(crate) fn round_rows(x: &[[f32; PANEL]], words: &mut [u32], stride: usize) {
    #[cfg(target_arch = "x86_64")]
    if has_vectors() {
        // SAFETY: the CPU has the instructions.
        return unsafe { vectors::round_rows(x, words, stride) };
    }
    for (x, words) in x.iter().zip(words.chunks_mut(stride)) {
        round_one_by_one(x, words);
    }
}

/// A word for each column of two rows.
#[inline(always)]
pub(crate) fn pair_rows(low: &[f32; PANEL], high: &[f32; PANEL]) -> [u32; PANEL] {
    let mut out = [0; PANEL];
    #[cfg(target_arch = "x86_64")]
    if has_vectors() {
        // SAFETY: the CPU has the instructions.
        unsafe { vectors::pair_rows(low, high, &mut out) };
        return out;
    }
    for lane in 0..PANEL {
        out[lane] = pair(low[lane], high[lane]);
    }
    out
}

#[inline(always)]
fn round_one_by_one(x: &[f32], words: &mut [u32]) {
    let (whole, rest) = x.as_chunks::<2>();
    for (word, x) in words.iter_mut().zip(whole) {
        *word = pair(x[0], x[1]);
    }
    if let [last] = rest {
        words[whole.len()] = round(*last);
    }
}

#[cfg(target_arch = "x86_64")]
mod vectors {
    use super::{PANEL, round_one_by_one};
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_permutexvar_epi16,
        _mm512_storeu_si512,
    };

    /// Elements of a vector of f32, and words of one of bf16.
    const LANES: usize = PANEL / 2;

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn round_row(x: &[f32], words: &mut [u32]) {
        let (whole, rest) = x.as_chunks::<PANEL>();
        let (out, others) = words.split_at_mut(whole.len() * LANES);
        for (x, out) in whole.iter().zip(out.as_chunks_mut().0) {
            round_panel(x, out);
        }
        round_one_by_one(rest, others);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn round_rows(x: &[[f32; PANEL]], words: &mut [u32], stride: usize) {
        for (x, words) in x.iter().zip(words.chunks_mut(stride)) {
            round_panel(x, words.first_chunk_mut().expect("a row holds its words"));
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn round_panel(x: &[f32; PANEL], out: &mut [u32; LANES]) {
        // SAFETY: an array of 32 numbers is two vectors of 16, and one of 16 words a vector.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[LANES..].as_ptr()));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), words_of(_mm512_cvtne2ps_pbh(high, low)));
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn pair_rows(low: &[f32; PANEL], high: &[f32; PANEL], out: &mut [u32; PANEL]) {
        let mut order = [0u16; PANEL];
        for lane in 0..LANES {
            (order[2 * lane], order[2 * lane + 1]) = (lane as u16, (lane + LANES) as u16);
        }
        // SAFETY: both types are 512 bits without invalid values.
        let order: __m512i = unsafe { std::mem::transmute(order) };
        for (half, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let (low, high) = (&low[half * LANES..][..LANES], &high[half * LANES..][..LANES]);
            // SAFETY: slices of 16 numbers are a vector each, and so are 16 words.
            unsafe {
                let (low, high) = (_mm512_loadu_ps(low.as_ptr()), _mm512_loadu_ps(high.as_ptr()));
                let words = words_of(_mm512_cvtne2ps_pbh(high, low));
                let words = _mm512_permutexvar_epi16(order, words);
                _mm512_storeu_si512(out.as_mut_ptr().cast(), words);
            }
        }
    }

    #[inline(always)]
    fn words_of(x: __m512bh) -> __m512i {
        // SAFETY: both types are 512 bits without invalid values.
        unsafe { std::mem::transmute(x) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::twin::random;
    use super::*;
    use candle_core::DType;

    fn half(words: &[u32], index: usize) -> f32 {
        let word = words[index / 2];
        f32::from_bits(if index.is_multiple_of(2) { word << 16 } else { word & 0xffff_0000 })
    }

    #[test]
    fn rounding_is_to_the_nearest_and_ties_go_to_even() {
        for count in [0, 1, 2, 31, 32, 33, 64, 4001] {
            let x = random(&[count], DType::F32);
            let twin = x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
            let (x, twin) = (x.to_vec1::<f32>().unwrap(), twin.to_vec1::<f32>().unwrap());
            let (mut words, mut one_by_one) =
                (vec![0; count.div_ceil(2)], vec![0; count.div_ceil(2)]);
            round_row(&x, &mut words);
            round_one_by_one(&x, &mut one_by_one);
            assert_eq!(words, one_by_one);
            assert!((0..count).all(|index| half(&words, index) == twin[index]));
        }
        let ties = [0x3f80_8000, 0x3f81_8000, 0xbf80_8000, 0x3f80_8001].map(f32::from_bits);
        let mut words = [0; 64];
        round_row(&ties.repeat(32), &mut words);
        for pair in words.chunks(2) {
            assert_eq!(pair, [0x3f82_3f80, 0x3f81_bf80]);
        }
    }

    #[test]
    fn a_vector_is_rounded_as_its_lanes() {
        struct Vectors<'a>(&'a mut [f32]);
        impl pulp::WithSimd for Vectors<'_> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, simd: S) {
                let (vectors, _) = S::as_mut_simd_f32s(self.0);
                vectors.iter_mut().for_each(|x| *x = rounded_vector(simd, *x));
            }
        }
        let ties = [0x3f80_8000, 0x3f81_8000, 0xbf80_8000, 0x3f80_8001, 0x0000_8001];
        let others = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-30, 1.0 / 3.0];
        let mut x: Vec<f32> = ties.map(f32::from_bits).into_iter().chain(others).collect();
        x.resize(2 * PANEL, 0.1);
        let expected: Vec<u32> = x.iter().map(|&x| rounded(x)).collect();
        pulp::Arch::new().dispatch(Vectors(&mut x));
        assert!(x.iter().map(|x| x.to_bits()).eq(expected));
    }

    #[test]
    fn rows_are_rounded_as_one_and_paired_as_numbers() {
        let x: Vec<f32> = random(&[5 * PANEL], DType::F32).to_vec1().unwrap();
        let rows = x.as_chunks::<PANEL>().0;
        let (mut words, mut row) = (vec![7; 5 * 20], [0; PANEL / 2]);
        round_rows(rows, &mut words, 20);
        for (x, words) in rows.iter().zip(words.chunks(20)) {
            round_one_by_one(x, &mut row);
            assert_eq!(words[..16], row);
            assert_eq!(words[16..], [7; 4], "wrote between the rows");
        }
        let pairs = pair_rows(&rows[0], &rows[1]);
        assert!((0..PANEL).all(|lane| pairs[lane] == pair(rows[0][lane], rows[1][lane])));
    }

    #[test]
    fn infinities_and_what_is_no_number_stay_what_they_are() {
        for (bits, rounded) in [
            (0x7f80_0000, 0x7f80),
            (0xff80_0000, 0xff80),
            (0x7fff_ffff, 0x7fff),
            (0xffff_ffff, 0xffff),
            (0x7f80_0001, 0x7fc0),
        ] {
            let (x, mut words) = (f32::from_bits(bits), [0; PANEL / 2 + 1]);
            round_row(&[x; PANEL + 1], &mut words);
            assert_eq!(words[..PANEL / 2], [rounded << 16 | rounded; PANEL / 2]);
            assert_eq!(words[PANEL / 2], rounded, "the last one");
        }
    }
}
