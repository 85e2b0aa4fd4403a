//! Products in block floating point: integers of 13 bits, two in one word, with one scale for each group of 128 inputs.
//!
//! ```text
//! weight of output o  =  scale(o, group) * integer    -4096..=4096, the scale is a power of two
//! input i of a row    =  scale(row, group) * integer  -4095..=4095, quantised when it comes
//! y(row, o)           =  sum over groups, in order, of scale * scale * (sum over the group of integer * integer)
//! word                =  inputs 16c + l (low half) and 16c + 8 + l (high half), for chunk c and l in 0..8
//! ```
//!
//! What weights in bf16 become on CPUs that multiply neither bf16 nor, in f32, more than eight numbers at once:
//! `vpmaddwd` takes 16 integers, and a unit for floats only 8 (Drumond, Lin, Jaggi and Falsafi, 2018; arXiv 1804.01526,
//! train with numbers of this kind). A number of bf16 has 8 bits: weights down to a sixteenth of the largest of their
//! group are exact, and smaller ones as near as that. Rows have an error of at most 1/8190 of their group's largest
//! element, where bf16 has 1/512 of each.
//!
//! Sums within a group are integers of 32 bits, exact in any order: 128 * 4096 * 4095 is less than 2^31. Between groups
//! there is one chain of fused multiply-adds. So all implementations agree bit for bit.

#[cfg(target_arch = "x86_64")]
mod avx2;

use super::groups::{Group, GroupedPanel, GroupedRows, INPUTS, LANES, SHIFT, chunk, scales_by};
use super::real::simd;
use super::tiles::{Ahead, PANEL};

/// Words of one group.
pub(crate) const GROUP: usize = INPUTS / 2;

/// The largest integer of a row.
const TOP: f32 = 4095.0;

/// Words of a chunk.
const CHUNK: usize = LANES / 2;

/// Words of a row of `inputs` elements.
pub(crate) fn words(inputs: usize) -> usize {
    inputs.div_ceil(LANES) * CHUNK
}

/// Whether this is the fastest that the CPU can do with weights in bf16.
pub(crate) fn pays() -> bool {
    #[cfg(target_arch = "x86_64")]
    return avx2::is_there() && !is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Rounds elements after scaling, at most a group of them, and gives their words by chunks.
#[inline(always)]
fn quantise(x: &[f32], inverse: f32, mut put: impl FnMut(usize, [u32; CHUNK])) {
    for (index, x) in x.chunks(LANES).enumerate() {
        let x = chunk(x);
        let mut words = [0; CHUNK];
        for lane in 0..CHUNK {
            let low = x[lane].mul_add(inverse, SHIFT).to_bits();
            let high = x[CHUNK + lane].mul_add(inverse, SHIFT).to_bits();
            words[lane] = (low & 0xffff) | high << 16;
        }
        put(index, words);
    }
}

/// Quantises a row.
#[inline(always)]
pub(crate) fn quantise_row(x: &[f32], words: &mut [u32], groups: &mut [Group]) {
    for ((x, words), group) in x.chunks(INPUTS).zip(words.chunks_mut(GROUP)).zip(groups) {
        let (scale, inverse) = scales_by(
            x,
            #[inline(always)]
            |top| (top / TOP, TOP / top),
        );
        let chunks = words.as_chunks_mut().0;
        quantise(
            x,
            inverse,
            #[inline(always)]
            |index, own| chunks[index] = own,
        );
        *group = Group { scale, correction: 0 };
    }
}

/// Quantises the inputs of one output: its words, and a scale for each group.
pub(crate) fn quantise_weight(x: &[f32], words: &mut [u32], scale: &mut [f32]) {
    simd(
        #[inline(always)]
        || {
            for ((x, words), scale) in x.chunks(INPUTS).zip(words.chunks_mut(GROUP)).zip(scale) {
                let (unit, inverse) = scales_by(
                    x,
                    #[inline(always)]
                    |top| {
                        // The power of two that is no larger.
                        let power = f32::from_bits(top.to_bits() & 0x7f80_0000);
                        (power / 2048.0, 2048.0 / power)
                    },
                );
                let chunks = words.as_chunks_mut().0;
                quantise(x, inverse, |index, own| chunks[index] = own);
                *scale = unit;
            }
        },
    );
}

/// `out[row]` = the 32 outputs of `panel` for each row.
pub(crate) fn tile(
    rows: GroupedRows<'_>,
    panel: GroupedPanel<'_>,
    ahead: Ahead<'_>,
    out: &mut [[f32; PANEL]],
) {
    #[cfg(target_arch = "x86_64")]
    if avx2::is_there() {
        return avx2::tile(rows, panel, ahead, out);
    }
    let _ = ahead;
    portable(rows, panel, out);
}

fn portable(rows: GroupedRows<'_>, panel: GroupedPanel<'_>, out: &mut [[f32; PANEL]]) {
    let halves = |word: u32| [i32::from(word as i16), i32::from((word >> 16) as i16)];
    for (row, out) in out.iter_mut().enumerate() {
        let rows = rows.from(row);
        let own = rows.words.chunks(GROUP).zip(rows.groups);
        *out = [0.0; PANEL];
        for ((panel, scales), (words, group)) in panel.groups(GROUP).zip(own) {
            for lane in 0..PANEL {
                let products = panel.iter().zip(words).map(|(weights, &word)| {
                    let ([low, high], x) = (halves(weights[lane]), halves(word));
                    (low * x[0]).wrapping_add(high * x[1])
                });
                let sum = products.fold(0, i32::wrapping_add);
                out[lane] = (sum as f32).mul_add(scales[lane] * group.scale, out[lane]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::rounding::rounded;
    use super::super::twin::random;
    use super::*;
    use candle_core::DType;
    use proptest::prelude::*;

    /// `x (count, inputs)` times `weight (at most 32, inputs)`, by the kernel, which its twins agree with in every bit.
    fn product(x: &[f32], weight: &[f32], inputs: usize) -> Vec<[f32; PANEL]> {
        let count = x.len() / inputs;
        let (depth, each) = (words(inputs), inputs.div_ceil(INPUTS));
        let (mut packed, mut groups) =
            (vec![0; count * (depth + 8)], vec![Group::default(); count * each]);
        let rows = packed.chunks_mut(depth + 8).zip(groups.chunks_mut(each));
        for (x, (words, groups)) in x.chunks(inputs).zip(rows) {
            quantise_row(x, &mut words[..depth], groups);
        }
        let (mut panel, mut scales) = (vec![0; depth * PANEL], vec![0.0; each * PANEL]);
        for (lane, x) in weight.chunks(inputs).enumerate() {
            let (mut own, mut own_scales) = (vec![0; depth], vec![0.0; each]);
            quantise_weight(x, &mut own, &mut own_scales);
            own.iter().enumerate().for_each(|(word, &own)| panel[word * PANEL + lane] = own);
            own_scales.iter().enumerate().for_each(|(at, &s)| scales[at * PANEL + lane] = s);
        }
        let rows =
            GroupedRows { words: &packed, stride: depth + 8, groups: &groups, group_stride: each };
        let panel = GroupedPanel { words: &panel, scales: &scales };
        // What is no number has bits of its own in every unit.
        let bits = |out: &[[f32; PANEL]]| -> Vec<_> {
            let bits = |x: &f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
            out.as_flattened().iter().map(bits).collect()
        };
        let mut ours = vec![[7.0; PANEL]; count];
        tile(rows, panel, Ahead::NOTHING, &mut ours);
        let mut twin = vec![[7.0; PANEL]; count];
        portable(rows, panel, &mut twin);
        assert_eq!(bits(&ours), bits(&twin), "{count} rows of {inputs}");
        ours
    }

    fn flat(rows: usize, inputs: usize) -> Vec<f32> {
        random(&[rows, inputs], DType::F32).flatten_all().unwrap().to_vec1().unwrap()
    }

    fn exact(x: &[f32], weight: &[f32]) -> f64 {
        x.iter().zip(weight).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum()
    }

    fn check(count: usize, inputs: usize) {
        let (x, weight) = (flat(count, inputs), flat(PANEL, inputs));
        let ours = product(&x, &weight, inputs);
        for (x, out) in x.chunks(inputs).zip(ours) {
            for (weight, out) in weight.chunks(inputs).zip(out) {
                let error = (f64::from(out) - exact(x, weight)).abs();
                assert!(error < 3e-3 * (inputs as f64).sqrt(), "{error}");
            }
        }
    }

    #[test]
    fn the_kernel_equals_its_portable_twin_bit_for_bit() {
        for count in (1..15).chain([29, 32, 33, 70]) {
            for inputs in [1, 4, 15, 16, 17, 64, 128, 129, 300, 768] {
                check(count, inputs);
            }
        }
    }

    #[test]
    fn the_largest_integers_do_not_overflow() {
        // Just below a power of two, which it is rounded to: the largest integer of a weight.
        let weight = vec![1.999_999_9; PANEL * 256];
        for sign in [1.0, -1.0] {
            let out = product(&vec![sign * 3.0; 7 * 256], &weight, 256);
            let error = |out: &f32| (out - sign * 256.0 * 6.0).abs();
            assert!(out.as_flattened().iter().all(|out| error(out) < 1e-3), "{:?}", out[0]);
        }
    }

    #[test]
    fn weights_in_bf16_are_exact_down_to_a_sixteenth_of_their_largest() {
        let bf16 = |x: f32| f32::from_bits(rounded(x));
        let weight: Vec<f32> = (0..INPUTS).map(|at| bf16(1.99 - at as f32 * 0.0145)).collect();
        assert!(weight.iter().all(|&w| w > 1.99 / 16.0), "{weight:?}");
        let (mut own, mut scale) = (vec![0; GROUP], [0.0]);
        quantise_weight(&weight, &mut own, &mut scale);
        for (at, &weight) in weight.iter().enumerate() {
            let (chunk, lane) = (at / LANES, at % LANES);
            let word = own[chunk * CHUNK + lane % CHUNK];
            let integer = if lane < CHUNK { word as i16 } else { (word >> 16) as i16 };
            assert_eq!(f32::from(integer) * scale[0], weight, "input {at}");
        }
    }

    /// The mean square of errors of products, as a share of that of the products; rows hold what `spread` makes of random
    /// numbers.
    fn noise(spread: impl Fn(f32) -> f32) -> [f64; 2] {
        const ROWS: usize = 40;
        const WIDTH: usize = 768;
        let x: Vec<f32> = flat(ROWS, WIDTH).into_iter().map(spread).collect();
        let bf16 =
            |x: &[f32]| -> Vec<f32> { x.iter().map(|&x| f32::from_bits(rounded(x))).collect() };
        let weight = bf16(&flat(PANEL, WIDTH));
        let (ours, rounded) = (product(&x, &weight, WIDTH), bf16(&x));
        let (mut errors, mut all) = ([0.0; 2], 0.0);
        for row in 0..ROWS {
            for lane in 0..PANEL {
                let own = |x: &[f32]| exact(&x[row * WIDTH..][..WIDTH], &weight[lane * WIDTH..]);
                let true_sum = own(&x);
                all += true_sum.powi(2);
                errors[0] += (f64::from(ours[row][lane]) - true_sum).powi(2);
                errors[1] += (own(&rounded) - true_sum).powi(2);
            }
        }
        errors.map(|error| error / all)
    }

    #[test]
    fn products_are_nearer_than_those_of_rows_in_bf16() {
        for (what, [ours, bf16]) in [
            ("normal", noise(|x| x)),
            ("heavy tails", noise(|x| x.powi(5))),
            ("an outlier in most groups", noise(|x| if x > 2.3 { 30.0 * x } else { x })),
        ] {
            assert!(5.0 * ours < bf16, "{what}: noise is {ours:e} of the signal, {bf16:e} in bf16");
        }
    }

    #[test]
    fn what_is_not_finite_gives_no_number() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![0.5; 3 * 200];
            x[200 + 150] = value;
            let out = product(&x, &vec![0.25; PANEL * 200], 200);
            assert!(out[1].iter().all(|out| out.is_nan()), "{value}: {:?}", out[1]);
            for row in [0, 2] {
                assert!(out[row].iter().all(|out| (out - 25.0).abs() < 1e-3), "{:?}", out[row]);
            }
            let mut weight = vec![0.25; PANEL * 200];
            weight[7 * 200 + 3] = value;
            let out = product(&[0.5; 200], &weight, 200);
            let numbers = out[0].iter().enumerate().filter(|(_, out)| out.is_nan());
            assert_eq!(numbers.map(|(lane, _)| lane).collect::<Vec<_>>(), [7], "{value}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_tile_equals_its_portable_twin(count in 1usize..80, inputs in 1usize..700) {
            check(count, inputs);
        }
    }
}
