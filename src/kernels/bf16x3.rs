//! Products of f32 on a unit for bf16: each number is the sum of three of bf16.
//!
//! ```text
//! x = high + mid + low      high = bf16(x)   mid = bf16(x - high)   low = x - high - mid
//!
//! row    [step of 32 inputs][high, mid, low][16 words]                 word = two inputs, as in `pairs`
//! panel  [step of 32 inputs][high, mid, low][16 words][32 outputs]
//! ```
//!
//! Three parts of eight significant bits hold all 24 of an f32, so nothing is lost in the split of a number above 2^-103. Of the nine products of parts the
//! six largest are added up, in f32: what is left out is 2^-23 of the product of two numbers at most (Henry, Tang and Heinecke, 2019;
//! arXiv 1904.06376). The tests hold the error of sums against that of a chain of fused multiply-adds in f32.
//!
//! Where it differs from f32: parts below 2^-126 are taken for zero, so that numbers below some 2^-103 lose digits, those below
//! 2^-118 have the eight of bf16, and those below 2^-126 are zero. A sum with an infinite input, or one above the largest bf16
//! (3.39e38), is no number.
//!
//! A unit that multiplies bf16 more than six times as fast as f32 gains by it: the matrix unit (`amx`). Elsewhere parts are put
//! together again and multiplied in f32, which is exact but for the roundings of the sum, and gains nothing.

// Reason: loads and stores of `std::arch` take raw pointers, and functions compiled for an instruction set may only be
// called where the CPU has it. Pointers are those of arrays of the right size; the instruction set is asked for.
#![expect(unsafe_code, reason = "vector loads take raw pointers, of arrays of the right size")]

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::fetch::Span;
use super::real::simd;
use super::rounding;
use super::tiles::{PANEL, PanelTile, whole_tile};
use pulp::bytemuck::cast_slice;
use std::cell::RefCell;

/// Parts of a number.
pub(crate) const PARTS: usize = 3;

/// Products of parts that are computed for one of two numbers.
pub(crate) const PRODUCTS: usize = 6;

/// Inputs of a step.
pub(crate) const INPUTS: usize = 32;

/// Words of a part of a step.
const WORDS: usize = INPUTS / 2;

/// Words of a row of `inputs` elements: whole steps.
pub(crate) fn words(inputs: usize) -> usize {
    inputs.div_ceil(INPUTS) * PARTS * WORDS
}

/// Whether this CPU has a unit that is faster this way.
pub(crate) fn pays() -> bool {
    #[cfg(target_arch = "x86_64")]
    return amx::is_there();
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// Writes the parts of a row; what is not there of the last step is zero.
#[inline(always)]
pub(crate) fn split_row(x: &[f32], words: &mut [u32]) {
    let (whole, rest) = x.as_chunks::<INPUTS>();
    let (steps, _) = words.as_chunks_mut::<{ PARTS * WORDS }>();
    let (own, last) = steps.split_at_mut(whole.len());
    for (x, out) in whole.iter().zip(own) {
        split_step(x, out);
    }
    if !rest.is_empty() {
        let mut x = [0.0; INPUTS];
        x[..rest.len()].copy_from_slice(rest);
        split_step(&x, &mut last[0]);
    }
}

#[inline(always)]
fn split_step(x: &[f32; INPUTS], out: &mut [u32; PARTS * WORDS]) {
    #[cfg(target_arch = "x86_64")]
    if rounding::has_vectors() {
        // SAFETY: the CPU has the instructions.
        return unsafe { vectors::split_step(x, out) };
    }
    let (pairs, _) = x.as_chunks::<2>();
    for (word, &[low, high]) in pairs.iter().enumerate() {
        for (part, own) in split_pair(low, high).into_iter().enumerate() {
            out[part * WORDS + word] = own;
        }
    }
}

/// Writes the parts of two rows, a word for each column.
#[inline(always)]
pub(crate) fn split_rows<const LANES: usize>(
    low: &[f32; LANES],
    high: &[f32; LANES],
    out: [&mut [u32; LANES]; PARTS],
) {
    #[cfg(target_arch = "x86_64")]
    if LANES.is_multiple_of(WORDS) && rounding::has_vectors() {
        // SAFETY: the CPU has the instructions.
        return unsafe { vectors::split_rows(low, high, out) };
    }
    for lane in 0..LANES {
        let words = split_pair(low[lane], high[lane]);
        for part in 0..PARTS {
            out[part][lane] = words[part];
        }
    }
}

/// The parts of two numbers.
#[inline(always)]
fn split_pair(mut low: f32, mut high: f32) -> [u32; PARTS] {
    std::array::from_fn(|_| {
        let word = rounding::pair(low, high);
        low -= f32::from_bits(word << 16);
        high -= f32::from_bits(word & 0xffff_0000);
        word
    })
}

/// `out[row]` = the 32 outputs of `panel` for each row; rows are `stride` words apart.
#[inline]
pub(crate) fn tile(rows: &[u32], stride: usize, panel: &[u32], out: &mut [[f32; PANEL]]) {
    #[cfg(target_arch = "x86_64")]
    if amx::is_there() {
        return amx::parts_tile(rows, stride, panel, out);
    }
    portable(rows, stride, panel, out);
}

/// The same in plain f32.
fn portable(rows: &[u32], stride: usize, panel: &[u32], out: &mut [[f32; PANEL]]) {
    thread_local! {
        static WHOLE: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
    }
    const STEP: usize = PARTS * WORDS;
    let steps = panel.len() / (STEP * PANEL);
    WHOLE.with_borrow_mut(|(x, whole)| {
        x.resize(out.len() * steps * INPUTS, 0.0);
        whole.resize(steps * INPUTS * PANEL, 0.0);
        simd(
            #[inline(always)]
            || {
                for (row, x) in x.chunks_exact_mut((steps * INPUTS).max(1)).enumerate() {
                    let words = rows[row * stride..].as_chunks::<STEP>().0;
                    for (x, words) in x.as_chunks_mut::<INPUTS>().0.iter_mut().zip(words) {
                        for input in 0..INPUTS {
                            x[input] = sum_of(input, |part| words[part * WORDS + input / 2]);
                        }
                    }
                }
                let panels = panel.as_chunks::<{ STEP * PANEL }>().0;
                for (whole, words) in
                    whole.as_chunks_mut::<{ INPUTS * PANEL }>().0.iter_mut().zip(panels)
                {
                    for input in 0..INPUTS {
                        for lane in 0..PANEL {
                            whole[input * PANEL + lane] = sum_of(input, |part| {
                                words[(part * WORDS + input / 2) * PANEL + lane]
                            });
                        }
                    }
                }
            },
        );
        whole_tile::<1>(PanelTile {
            rows: cast_slice(x),
            stride: steps * INPUTS,
            panel: cast_slice(whole),
            ahead: Span::NOTHING,
            goes_on: false,
            out,
        });
    });
}

/// The number whose parts stand in the low halves of words, or in the high ones.
#[inline(always)]
fn sum_of(input: usize, word: impl Fn(usize) -> u32) -> f32 {
    let half = |part| match input.is_multiple_of(2) {
        true => f32::from_bits(word(part) << 16),
        false => f32::from_bits(word(part) & 0xffff_0000),
    };
    half(0) + (half(1) + half(2))
}

#[cfg(target_arch = "x86_64")]
mod vectors {
    use super::{INPUTS, PARTS, WORDS};
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_and_si512, _mm512_castsi512_ps, _mm512_cvtne2ps_pbh,
        _mm512_loadu_ps, _mm512_loadu_si512, _mm512_permutex2var_ps, _mm512_permutexvar_epi16,
        _mm512_set1_epi32, _mm512_slli_epi32, _mm512_storeu_si512, _mm512_sub_ps,
    };

    /// Where the halves of words stand before they are paired: those of the first vector, then those of the second.
    static PAIRS: [u16; INPUTS] = {
        let mut order = [0; INPUTS];
        let mut word = 0;
        while word < WORDS {
            (order[2 * word], order[2 * word + 1]) = (word as u16, (word + WORDS) as u16);
            word += 1;
        }
        order
    };

    /// Places of the even and of the odd ones of 32 numbers.
    static HALVES: [[u32; WORDS]; 2] = {
        let mut order = [[0; WORDS]; 2];
        let mut word = 0;
        while word < WORDS {
            (order[0][word], order[1][word]) = (2 * word as u32, 2 * word as u32 + 1);
            word += 1;
        }
        order
    };

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn split_step(x: &[f32; INPUTS], out: &mut [u32; PARTS * WORDS]) {
        // SAFETY: an array of 16 words is a vector.
        let order = |half: usize| unsafe { _mm512_loadu_si512(HALVES[half].as_ptr().cast()) };
        // SAFETY: an array of 32 numbers is two vectors of 16.
        let (left, right) =
            unsafe { (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[WORDS..].as_ptr())) };
        let low = _mm512_permutex2var_ps(left, order(0), right);
        let high = _mm512_permutex2var_ps(left, order(1), right);
        for (out, own) in out.as_chunks_mut::<WORDS>().0.iter_mut().zip(split(low, high)) {
            // SAFETY: 16 words are a vector.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), own) };
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn split_rows<const LANES: usize>(
        low: &[f32; LANES],
        high: &[f32; LANES],
        mut out: [&mut [u32; LANES]; PARTS],
    ) {
        for at in (0..LANES).step_by(WORDS) {
            let (low, high) = (&low[at..][..WORDS], &high[at..][..WORDS]);
            // SAFETY: slices of 16 numbers are a vector each.
            let (low, high) =
                unsafe { (_mm512_loadu_ps(low.as_ptr()), _mm512_loadu_ps(high.as_ptr())) };
            for (out, own) in out.iter_mut().zip(split(low, high)) {
                let out = &mut out[at..][..WORDS];
                // SAFETY: 16 words are a vector.
                unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), own) };
            }
        }
    }

    /// Words of the parts of two vectors.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn split(mut low: __m512, mut high: __m512) -> [__m512i; PARTS] {
        let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
        // SAFETY: an array of 32 halves is a vector.
        let order = unsafe { _mm512_loadu_si512(PAIRS.as_ptr().cast()) };
        let mut out = [upper; PARTS];
        for out in &mut out {
            let words = _mm512_permutexvar_epi16(order, words_of(_mm512_cvtne2ps_pbh(high, low)));
            *out = words;
            low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)));
            high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_and_si512(words, upper)));
        }
        out
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

    fn numbers(count: usize) -> Vec<f32> {
        random(&[count], DType::F32).to_vec1().unwrap()
    }

    #[test]
    fn parts_add_up_to_the_number_exactly() {
        let mut x = numbers(4096);
        for (index, x) in x.iter_mut().enumerate() {
            *x *= [1.0, 1e-20, 1e20, 3e-7][index % 4];
        }
        x[..4].copy_from_slice(&[0.0, -0.0, 1.0, f32::MIN_POSITIVE]);
        let mut row = vec![7; words(x.len())];
        split_row(&x, &mut row);
        for (index, &x) in x.iter().enumerate() {
            let (step, input) = (index / INPUTS, index % INPUTS);
            let word = |part| row[(step * PARTS + part) * WORDS + input / 2];
            assert_eq!(sum_of(input, word), x);
            let other = if input.is_multiple_of(2) { 0..16 } else { 16..32 };
            let pair = if input.is_multiple_of(2) { [x, 0.0] } else { [0.0, x] };
            for (part, own) in split_pair(pair[0], pair[1]).into_iter().enumerate() {
                assert_eq!(own >> other.start, word(part) << (32 - other.end) >> 16, "{x}");
            }
        }
    }

    #[test]
    fn rows_are_split_as_numbers_and_the_last_step_is_filled_with_zeros() {
        let x = numbers(77);
        let mut row = vec![7; words(77)];
        split_row(&x, &mut row);
        let at = |index: usize| x.get(index).copied().unwrap_or(0.0);
        for word in 0..words(77) / PARTS {
            let (step, own) = (word / WORDS, word % WORDS);
            let pair = split_pair(at(2 * word), at(2 * word + 1));
            for (part, pair) in pair.into_iter().enumerate() {
                assert_eq!(row[(step * PARTS + part) * WORDS + own], pair);
            }
        }
        fn check<const LANES: usize>() {
            let (low, high) = (numbers(LANES), numbers(LANES));
            let (low, high) = (low.as_array().unwrap(), high.as_array().unwrap());
            let mut split = [[7; LANES]; PARTS];
            split_rows::<LANES>(low, high, split.each_mut());
            for lane in 0..LANES {
                let pair = split_pair(low[lane], high[lane]);
                assert_eq!(split.map(|part| part[lane]), pair);
            }
        }
        check::<16>();
        check::<32>();
        check::<5>();
    }

    /// Errors of the tile, of its portable twin and of a chain of fused multiply-adds of the numbers themselves, each
    /// relative to the sum of the sizes of all products: their root mean squares.
    fn errors(rows: usize, inputs: usize, spread: f32) -> [f64; 3] {
        let scaled =
            |x: Vec<f32>| -> Vec<f32> { x.into_iter().map(|x| x * (spread * x).exp()).collect() };
        let (x, w) = (scaled(numbers(rows * inputs)), scaled(numbers(PANEL * inputs)));
        let stride = words(inputs) + 16;
        let (mut words_of_x, mut panel) =
            (vec![0; rows.next_multiple_of(PANEL) * stride], vec![0; words(inputs) * PANEL]);
        for (x, out) in x.chunks(inputs).zip(words_of_x.chunks_mut(stride)) {
            split_row(x, &mut out[..words(inputs)]);
        }
        let mut row = vec![0; words(inputs)];
        for (lane, w) in w.chunks(inputs).enumerate() {
            split_row(w, &mut row);
            row.iter().enumerate().for_each(|(word, &own)| panel[word * PANEL + lane] = own);
        }
        let (mut ours, mut twin) = (vec![[7.0; PANEL]; rows], vec![[7.0; PANEL]; rows]);
        tile(&words_of_x, stride, &panel, &mut ours);
        portable(&words_of_x, stride, &panel, &mut twin);
        let mut sums = [0.0; 3];
        for row in 0..rows {
            for lane in 0..PANEL {
                let pairs = x[row * inputs..][..inputs].iter().zip(&w[lane * inputs..]);
                let chain = pairs.clone().fold(0.0, |sum: f32, (x, w)| x.mul_add(*w, sum));
                let products = pairs.map(|(&x, &w)| f64::from(x) * f64::from(w));
                let (exact, size) = products
                    .fold((0.0, 0.0), |(sum, size): (f64, f64), x| (sum + x, size + x.abs()));
                for (sum, own) in sums.iter_mut().zip([ours[row][lane], twin[row][lane], chain]) {
                    let error = (f64::from(own) - exact).abs() / size;
                    // A chain of so many roundings is wrong by that much at most.
                    let bound = (inputs + 2) as f64 * 2f64.powi(-24);
                    assert!(error < bound, "{rows} rows, {inputs} inputs: {own} is not {exact}");
                    *sum += error * error;
                }
            }
        }
        sums.map(|sum| (sum / (rows * PANEL) as f64).sqrt())
    }

    #[test]
    fn products_are_as_exact_as_those_of_f32() {
        for (rows, inputs) in [(1, 1), (5, 31), (16, 32), (31, 33), (32, 768), (70, 2048)] {
            for spread in [0.0, 1.0] {
                let [ours, twin, chain] = errors(rows, inputs, spread);
                for ours in [ours, twin] {
                    assert!(
                        ours <= 1.1 * chain.max(2f64.powi(-24)),
                        "{rows} rows, {inputs} inputs, spread {spread}: {ours:e}, a chain {chain:e}"
                    );
                }
            }
        }
    }

    #[test]
    fn small_numbers_lose_digits_and_smaller_ones_are_zero() {
        let of_ones = |x: f32| {
            let (mut row, mut panel) = (vec![0; 16 * 48], vec![0; 48 * PANEL]);
            split_row(&[x; INPUTS], &mut row[..48]);
            panel[..16 * PANEL].fill(0x3f80_3f80);
            let mut out = [[0.0; PANEL]];
            tile(&row, 48, &panel, &mut out);
            (out[0][0] / INPUTS as f32 / x - 1.0).abs()
        };
        let at = |exponent: i32| 1.2345678 * 2f32.powi(exponent);
        assert!(of_ones(at(-100)) <= 2f32.powi(-22));
        assert!(of_ones(at(-117)) <= 2f32.powi(-8));
        if pays() {
            assert!(of_ones(at(-117)) > 2f32.powi(-18));
        }
    }

    #[test]
    fn what_is_no_number_or_infinite_leaves_none() {
        for bad in [f32::NAN, f32::INFINITY, f32::MAX] {
            let mut x = vec![1.0; INPUTS];
            x[3] = bad;
            let (mut row, mut panel) = (vec![0; 16 * 48], vec![0; 48 * PANEL]);
            split_row(&x, &mut row[..48]);
            panel[..16 * PANEL].fill(0x3f80_3f80);
            let mut out = [[0.0; PANEL]];
            tile(&row, 48, &panel, &mut out);
            assert!(out[0].iter().all(|x| x.is_nan()), "{bad}: {:?}", out[0][0]);
        }
    }
}
