//! Products in 8 bits: four neighbouring inputs in one word, with one scale for each group of 128.
//!
//! ```text
//! weight of output o  =  scale(o, group) * (byte - 128)      bytes 1..=255
//! input i of a row    =  scale(row, group) * byte            bytes -127..=127, quantised when it comes
//! y(row, o)           =  sum over groups, in order, of scale * scale * (sum over the group of byte * byte)
//! ```
//!
//! Sums within a group are integers and thus exact, in whatever order `vpdpbusd`, `vpmaddubsw` or a plain loop takes
//! them; between groups there is one chain of fused multiply-adds. So all implementations agree bit for
//! bit. Groups of 128 cost 3 % of memory and a tenth of the time of a tile; every width of the family is
//! a multiple of them or of half of them, and the last group of a row may be short.

// Reason: loads and broadcasts of `std::arch` take raw pointers, and functions compiled for an instruction
// set may only be called where the CPU has it. The bounds are asserted, the instruction set is asked for.
#![expect(unsafe_code, reason = "vector loads take raw pointers; bounds are asserted before them")]

#[cfg(target_arch = "x86_64")]
mod avx2;

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::groups::{Group, GroupedPanel, GroupedRows, INPUTS, LANES, SHIFT, chunk, scales_by};
use super::real::simd;
use super::tiles::{Ahead, PANEL};

/// Words of one group.
pub(crate) const GROUP: usize = INPUTS / 4;

/// Words of a row of `inputs` elements.
pub(crate) fn words(inputs: usize) -> usize {
    inputs.div_ceil(4)
}

/// Quantises elements of the range -127..=127 after scaling, at most a group of them, and gives their bytes
/// by words; returns their sum. To be inlined into a vectorised loop.
#[inline(always)]
fn quantise(x: &[f32], inverse: f32, mut put: impl FnMut(usize, u32)) -> i32 {
    let mut sums = [0i32; LANES];
    for (index, x) in x.chunks(LANES).enumerate() {
        let x = chunk(x);
        let mut bytes = [0u8; LANES];
        for lane in 0..LANES {
            let bits = x[lane].mul_add(inverse, SHIFT).to_bits();
            let integer = bits.wrapping_sub(SHIFT.to_bits()) as i32;
            sums[lane] = sums[lane].wrapping_add(integer);
            bytes[lane] = bits as u8;
        }
        for (word, &bytes) in bytes.as_chunks::<4>().0.iter().enumerate() {
            put(index * LANES / 4 + word, u32::from_le_bytes(bytes));
        }
    }
    sums.iter().fold(0, |sum, own| sum.wrapping_add(*own))
}

/// The scale of a group, and its inverse.
#[inline(always)]
fn scales(x: &[f32]) -> (f32, f32) {
    scales_by(
        x,
        #[inline(always)]
        |top| (top / 127.0, 127.0 / top),
    )
}

/// Quantises a row.
#[inline(always)]
pub(crate) fn quantise_row(x: &[f32], words: &mut [u32], groups: &mut [Group]) {
    let chunks = x.chunks(INPUTS).zip(words.chunks_mut(GROUP));
    for ((x, words), group) in chunks.zip(groups) {
        let (scale, inverse) = scales(x);
        let sum = match <&mut [u32; GROUP]>::try_from(&mut *words) {
            Ok(words) => quantise(x, inverse, |word, bytes| words[word] = bytes),
            // Words beyond the last of a short group are zeros.
            Err(_) => quantise(x, inverse, |word, bytes| {
                if let Some(own) = words.get_mut(word) {
                    *own = bytes;
                }
            }),
        };
        *group = Group { scale, correction: sum.wrapping_mul(-128) };
    }
}

/// Quantises the inputs of one output: its words, and a scale for each group.
pub(crate) fn quantise_weight(x: &[f32], mut put: impl FnMut(usize, u32), scale: &mut [f32]) {
    let words = words(x.len());
    simd(
        #[inline(always)]
        || {
            for (group, x) in x.chunks(INPUTS).enumerate() {
                let (unit, inverse) = scales(x);
                scale[group] = unit;
                quantise(x, inverse, |word, bytes| {
                    let word = group * GROUP + word;
                    if word < words {
                        // Each byte plus 128.
                        put(word, bytes ^ 0x8080_8080);
                    }
                });
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
    if amx::is_there() {
        return amx::quads_tile(rows, panel, ahead, out);
    }
    #[cfg(target_arch = "x86_64")]
    if avx512::is_there() {
        return avx512::tile(rows, panel, ahead, out);
    }
    #[cfg(target_arch = "x86_64")]
    if avx2::is_there() {
        return avx2::tile(rows, panel, ahead, out);
    }
    let _ = ahead;
    portable(rows, panel, out);
}

fn portable(rows: GroupedRows<'_>, panel: GroupedPanel<'_>, out: &mut [[f32; PANEL]]) {
    simd(
        #[inline(always)]
        || {
            for (row, out) in out.iter_mut().enumerate() {
                *out = [0.0; PANEL];
                let groups = &rows.groups[row * rows.group_stride..];
                let words = &rows.words[row * rows.stride..];
                let panels = panel.words.chunks(GROUP * PANEL);
                let scales = panel.scales.chunks_exact(PANEL);
                for (((panel, scales), words), group) in
                    panels.zip(scales).zip(words.chunks(GROUP)).zip(groups)
                {
                    let mut sums = [group.correction; PANEL];
                    for (weights, word) in panel.chunks_exact(PANEL).zip(words) {
                        for byte in 0..4 {
                            let x = i32::from((word >> (8 * byte)) as i8);
                            for lane in 0..PANEL {
                                sums[lane] += (weights[lane] >> (8 * byte) & 255) as i32 * x;
                            }
                        }
                    }
                    for lane in 0..PANEL {
                        let scale = scales[lane] * group.scale;
                        out[lane] = (sums[lane] as f32).mul_add(scale, out[lane]);
                    }
                }
            }
        },
    );
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Ahead, GROUP, GroupedPanel, GroupedRows, PANEL};
    use crate::kernels::tiles::by_rows;
    use std::arch::x86_64::{
        _MM_HINT_T1, _mm_prefetch, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps,
        _mm512_setzero_ps, _mm512_setzero_si512, _mm512_storeu_ps,
    };

    /// Whether this CPU multiplies bytes.
    #[inline(always)]
    pub(super) fn is_there() -> bool {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni")
    }

    pub(super) fn tile(
        rows: GroupedRows<'_>,
        panel: GroupedPanel<'_>,
        ahead: Ahead<'_>,
        out: &mut [[f32; PANEL]],
    ) {
        assert!(is_there());
        by_rows!(out.len(), first, ROWS => {
            // SAFETY: the CPU has the instructions, as asserted above.
            unsafe { rows_tile::<ROWS>(rows.from(first), panel, ahead, &mut out[first..]) }
        });
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn rows_tile<const ROWS: usize>(
        rows: GroupedRows<'_>,
        panel: GroupedPanel<'_>,
        ahead: Ahead<'_>,
        out: &mut [[f32; PANEL]],
    ) {
        let depth = panel.words.len() / PANEL;
        let groups = depth.div_ceil(GROUP);
        assert!(rows.words.len() >= (ROWS - 1) * rows.stride + depth && out.len() >= ROWS);
        assert!(panel.scales.len() >= groups * PANEL);
        let starts: [*const u32; ROWS] =
            std::array::from_fn(|row| rows.words[row * rows.stride..].as_ptr());
        let (words, scales) = (panel.words.as_ptr(), panel.scales.as_ptr());
        let mut totals = [[_mm512_setzero_ps(); 2]; ROWS];
        for group in 0..groups {
            let mut sums = [[_mm512_setzero_si512(); 2]; ROWS];
            for row in 0..ROWS {
                let group = rows.groups[row * rows.group_stride + group];
                sums[row] = [_mm512_set1_epi32(group.correction); 2];
            }
            for word in group * GROUP..((group + 1) * GROUP).min(depth) {
                // SAFETY: `word < depth`, so the 32 words of the panel and the word of each row are
                // inside their slices, as asserted above. A prefetch may name any address.
                unsafe {
                    let next = ahead.at(word);
                    _mm_prefetch::<_MM_HINT_T1>(next.cast());
                    _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(ahead.step() / 2).cast());
                    let left = _mm512_loadu_si512(words.add(word * PANEL).cast());
                    let right = _mm512_loadu_si512(words.add(word * PANEL + 16).cast());
                    for row in 0..ROWS {
                        let x = _mm512_set1_epi32(*starts[row].add(word) as i32);
                        sums[row][0] = _mm512_dpbusd_epi32(sums[row][0], left, x);
                        sums[row][1] = _mm512_dpbusd_epi32(sums[row][1], right, x);
                    }
                }
            }
            for half in 0..2 {
                // SAFETY: each group has 32 scales, as asserted above.
                let scale = unsafe { _mm512_loadu_ps(scales.add(group * PANEL + 16 * half)) };
                for row in 0..ROWS {
                    let own = rows.groups[row * rows.group_stride + group].scale;
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(own));
                    let sum = _mm512_cvtepi32_ps(sums[row][half]);
                    totals[row][half] = _mm512_fmadd_ps(sum, scale, totals[row][half]);
                }
            }
        }
        for row in 0..ROWS {
            let (left, right) = out[row].split_at_mut(PANEL / 2);
            // SAFETY: each half holds 16 numbers.
            unsafe {
                _mm512_storeu_ps(left.as_mut_ptr(), totals[row][0]);
                _mm512_storeu_ps(right.as_mut_ptr(), totals[row][1]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::twin::random;
    use super::*;
    use candle_core::DType;
    use proptest::prelude::*;

    /// `x (count, inputs)` times `weight (at most 32, inputs)`, by the kernel, which its twins agree with in every bit.
    fn product(x: &[f32], weight: &[f32], inputs: usize) -> Vec<[f32; PANEL]> {
        let count = x.len() / inputs;
        let (depth, groups_each) = (words(inputs), words(inputs).div_ceil(GROUP));
        let (mut packed, mut groups) =
            (vec![0; count * (depth + 1)], vec![Group::default(); count * groups_each]);
        let rows = packed.chunks_mut(depth + 1).zip(groups.chunks_mut(groups_each));
        for (x, (words, groups)) in x.chunks(inputs).zip(rows) {
            quantise_row(x, &mut words[..depth], groups);
        }
        let (mut panel, mut scales) = (vec![0; depth * PANEL], vec![0.0; groups_each * PANEL]);
        for (lane, x) in weight.chunks(inputs).enumerate() {
            let mut own = vec![0.0; groups_each];
            quantise_weight(x, |word, bytes| panel[word * PANEL + lane] = bytes, &mut own);
            own.iter().enumerate().for_each(|(group, &s)| scales[group * PANEL + lane] = s);
        }
        let rows = GroupedRows {
            words: &packed,
            stride: depth + 1,
            groups: &groups,
            group_stride: groups_each,
        };
        let panel = GroupedPanel { words: &panel, scales: &scales };
        let run = |kernel: &dyn Fn(&mut [[f32; PANEL]])| {
            let mut out = vec![[7.0; PANEL]; count];
            kernel(&mut out);
            out
        };
        // What is no number has bits of its own in every unit.
        let bits = |out: &[[f32; PANEL]]| -> Vec<_> {
            let bits = |x: &f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
            out.as_flattened().iter().map(bits).collect()
        };
        let ours = run(&|out| tile(rows, panel, Ahead::NOTHING, out));
        let twin = bits(&run(&|out| portable(rows, panel, out)));
        assert_eq!(bits(&ours), twin, "{count} rows of {inputs}");
        #[cfg(target_arch = "x86_64")]
        if avx512::is_there() {
            let out = run(&|out| avx512::tile(rows, panel, Ahead::NOTHING, out));
            assert_eq!(bits(&out), twin, "{count} rows of {inputs}, in vectors");
        }
        #[cfg(target_arch = "x86_64")]
        if avx2::is_there() {
            let out = run(&|out| avx2::tile(rows, panel, Ahead::NOTHING, out));
            assert_eq!(bits(&out), twin, "{count} rows of {inputs}, in vectors of 256 bits");
        }
        ours
    }

    fn check(count: usize, inputs: usize) {
        let flat = |rows| random(&[rows, inputs], DType::F32).flatten_all().unwrap();
        let (x, weight): (Vec<f32>, Vec<f32>) =
            (flat(count).to_vec1().unwrap(), flat(PANEL).to_vec1().unwrap());
        let ours = product(&x, &weight, inputs);
        for row in 0..count {
            for lane in 0..PANEL {
                let pairs = x[row * inputs..].iter().zip(&weight[lane * inputs..]).take(inputs);
                let exact: f32 = pairs.map(|(x, w)| x * w).sum();
                let error = (ours[row][lane] - exact).abs();
                assert!(error < 0.06 * (inputs as f32).sqrt(), "{error} of {exact}");
            }
        }
    }

    #[test]
    fn the_largest_bytes_do_not_overflow() {
        let sign =
            |lane: usize, input: usize| if (input >> (lane % 8)) & 1 == 0 { 1.0 } else { -1.0 };
        let rows = |count: usize| -> Vec<f32> {
            (0..count * 256).map(|at| sign(at / 256, at % 256)).collect()
        };
        // Outputs 20 to 31 are not there.
        let (x, weight) = (rows(9), rows(20));
        for (row, out) in product(&x, &weight, 256).into_iter().enumerate() {
            for (lane, out) in out.into_iter().take(20).enumerate() {
                let exact: f32 = (0..256).map(|input| sign(row, input) * sign(lane, input)).sum();
                assert!((out - exact).abs() < 1e-3, "row {row}, output {lane}: {out}, not {exact}");
            }
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
                assert!(out[row].iter().all(|out| (out - 25.0).abs() < 0.5), "{:?}", out[row]);
            }
            let mut weight = vec![0.25; PANEL * 200];
            weight[7 * 200 + 3] = value;
            let out = product(&[0.5; 200], &weight, 200);
            let numbers = out[0].iter().enumerate().filter(|(_, out)| out.is_nan());
            assert_eq!(numbers.map(|(lane, _)| lane).collect::<Vec<_>>(), [7], "{value}");
        }
    }

    #[test]
    fn the_kernel_equals_its_portable_twin_bit_for_bit() {
        for count in [1, 2, 3, 11, 12, 13, 29, 32, 33, 70] {
            for inputs in [1, 4, 7, 64, 128, 129, 300, 768] {
                check(count, inputs);
            }
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
