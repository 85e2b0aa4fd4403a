//! Products in bf16: two neighbouring inputs in one word, multiplied and added in f32.
//!
//! ```text
//! row    [word]        word = bf16 of input 2i (low half), bf16 of input 2i + 1 (high half)
//! panel  [word][32 outputs]
//! ```
//!
//! Where the CPU has a matrix unit (`amx`) it takes 16 words of 32 rows at once. Elsewhere
//! `vdpbf16ps` takes both products of a word at once, one after the other, in one chain for each output.
//! Where the CPU has no such instruction both sides are widened to f32: the same function up to rounding. Rows are
//! when they come, a panel in the registers of each tile.

// Reason: loads and broadcasts of `std::arch` take raw pointers, and functions compiled for an instruction
// set may only be called where the CPU has it. The bounds are asserted, the instruction set is asked for.
#![expect(unsafe_code, reason = "vector loads take raw pointers; bounds are asserted before them")]

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::tiles::{Ahead, PANEL, PanelTile, whole_tile};

/// Words of a row of `inputs` elements.
pub(crate) fn words(inputs: usize) -> usize {
    inputs.div_ceil(2)
}

/// What this CPU multiplies bf16 with: each rounds sums in another order.
pub(super) fn unit() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    match (amx::is_there(), avx512::is_there()) {
        (true, _) => return "bf16 matrices",
        (false, true) => return "bf16 vectors",
        (false, false) => {}
    }
    "bf16 widened to f32"
}

/// `out[row]` = the 32 outputs of `panel` for each row; rows are `stride` words apart.
#[inline]
pub(crate) fn tile(
    rows: &[u32],
    stride: usize,
    panel: &[u32],
    ahead: Ahead<'_>,
    out: &mut [[f32; PANEL]],
) {
    #[cfg(target_arch = "x86_64")]
    if amx::is_there() {
        return amx::pairs_tile(rows, stride, panel, ahead, out);
    }
    #[cfg(target_arch = "x86_64")]
    if avx512::is_there() {
        return avx512::tile(rows, stride, panel, ahead, out);
    }
    let ahead = ahead.beside(panel.len() / PANEL);
    whole_tile::<2>(PanelTile { rows, stride, panel, ahead, goes_on: false, out });
}

/// Whether this CPU multiplies bf16 in f32. Rows then stand in f32 already.
#[inline(always)]
pub(crate) fn are_widened() -> bool {
    #[cfg(target_arch = "x86_64")]
    return !amx::is_there() && !avx512::is_there();
    #[cfg(not(target_arch = "x86_64"))]
    true
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Ahead, PANEL};
    use crate::kernels::tiles::by_rows;
    use std::arch::x86_64::{
        __m512, __m512bh, _MM_HINT_T1, _mm_prefetch, _mm512_dpbf16_ps, _mm512_loadu_ps,
        _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    /// Whether this CPU multiplies bf16.
    #[inline(always)]
    pub(super) fn is_there() -> bool {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
    }

    pub(super) fn tile(
        rows: &[u32],
        stride: usize,
        panel: &[u32],
        ahead: Ahead<'_>,
        out: &mut [[f32; PANEL]],
    ) {
        assert!(is_there());
        by_rows!(out.len(), first, ROWS => {
            let (rows, out) = (&rows[first * stride..], &mut out[first..]);
            // SAFETY: the CPU has the instructions, as asserted above.
            unsafe { rows_tile::<ROWS>(rows, stride, panel, ahead, out) }
        });
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn rows_tile<const ROWS: usize>(
        rows: &[u32],
        stride: usize,
        panel: &[u32],
        ahead: Ahead<'_>,
        out: &mut [[f32; PANEL]],
    ) {
        let depth = panel.len() / PANEL;
        assert!(rows.len() >= (ROWS - 1) * stride + depth && out.len() >= ROWS);
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        let starts: [*const u32; ROWS] = std::array::from_fn(|row| rows[row * stride..].as_ptr());
        let (panel, half) = (panel.as_ptr(), ahead.step() / 2);
        for word in 0..depth {
            // SAFETY: `word < depth`, so the 32 words of the panel and the word of each row are inside
            // their slices, as asserted above. A prefetch may name any address.
            unsafe {
                _mm_prefetch::<_MM_HINT_T1>(ahead.at(word).cast());
                _mm_prefetch::<_MM_HINT_T1>(ahead.at(word).wrapping_add(half).cast());
                let left = _mm512_loadu_ps(panel.add(word * PANEL).cast());
                let right = _mm512_loadu_ps(panel.add(word * PANEL + 16).cast());
                let (left, right) = (halves(left), halves(right));
                for row in 0..ROWS {
                    let x = _mm512_set1_ps(f32::from_bits(*starts[row].add(word)));
                    let x = halves(x);
                    sums[row][0] = _mm512_dpbf16_ps(sums[row][0], x, left);
                    sums[row][1] = _mm512_dpbf16_ps(sums[row][1], x, right);
                }
            }
        }
        for row in 0..ROWS {
            let (left, right) = out[row].split_at_mut(PANEL / 2);
            // SAFETY: each half holds 16 numbers.
            unsafe {
                _mm512_storeu_ps(left.as_mut_ptr(), sums[row][0]);
                _mm512_storeu_ps(right.as_mut_ptr(), sums[row][1]);
            }
        }
    }

    #[inline(always)]
    fn halves(words: __m512) -> __m512bh {
        // SAFETY: both types are 512 bits without invalid values.
        unsafe { std::mem::transmute(words) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fetch::Span;
    use super::super::layout;
    use super::super::packed::WeightType;
    use super::super::rounding::{pair, rounded};
    use super::super::twin::{close, random};
    use super::*;
    use candle_core::{DType, Device, Tensor};
    use proptest::prelude::*;

    fn check(rows: usize, inputs: usize) {
        let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let x = flat(random(&[rows, inputs], DType::F32));
        let (depth, kind) = (words(inputs), WeightType::Bf16);
        let pack = |words: layout::Words| {
            let stride = words.count(inputs) + 3;
            let mut packed = vec![0; rows * stride];
            for (x, row) in x.chunks(inputs).zip(packed.chunks_mut(stride)) {
                layout::row(words, x, row);
            }
            (packed, stride)
        };
        let weight = flat(random(&[depth * 2 * PANEL], DType::F32));
        let panel: Vec<u32> = weight.chunks(2).map(|w| pair(w[0], w[1])).collect();
        // One number at a time: inputs in their order.
        let mut twin = vec![[0.0f32; PANEL]; rows];
        for (x, out) in x.chunks(inputs).zip(&mut twin) {
            for (input, &x) in x.iter().enumerate() {
                for (lane, out) in out.iter_mut().enumerate() {
                    let w = weight[(input / 2 * PANEL + lane) * 2 + input % 2];
                    let [x, w] = [x, w].map(|x| f32::from_bits(rounded(x)));
                    *out = x.mul_add(w, *out);
                }
            }
        }
        let tensor = |t: &[[f32; PANEL]]| {
            Tensor::from_slice(t.as_flattened(), (rows, PANEL), &Device::Cpu).unwrap()
        };
        let mut ours = vec![[0.0; PANEL]; rows];
        let (packed, stride) = pack(kind.in_rows());
        tile(&packed, stride, &panel, Ahead::NOTHING, &mut ours);
        close(&tensor(&ours), &tensor(&twin), "a tile");
        if are_widened() {
            assert_eq!(ours, twin, "a tile");
        }
        let (packed, stride) = pack(layout::Words::Rounded);
        for count in [1, rows] {
            check_widened((&packed, stride), &panel, inputs, &twin[..count]);
        }
        #[cfg(target_arch = "x86_64")]
        if avx512::is_there() {
            let (packed, stride) = pack(layout::Words::Pairs);
            avx512::tile(&packed, stride, &panel, Ahead::NOTHING, &mut ours);
            close(&tensor(&ours), &tensor(&twin), "a tile of vectors");
        }
    }

    /// Rows in f32 against a panel that is widened in registers, whole and in two parts.
    fn check_widened(
        (packed, stride): (&[u32], usize),
        panel: &[u32],
        inputs: usize,
        twin: &[[f32; PANEL]],
    ) {
        let what = format!("{} rows of {inputs} inputs", twin.len());
        let mut found = vec![[f32::NAN; PANEL]; twin.len()];
        let multiply = |rows, panel: &[u32], goes_on, out: &mut [[f32; PANEL]]| {
            // Fetching ends far behind the panel, which is allowed.
            let ahead = Span::new(panel.as_ptr(), 1 << 20);
            whole_tile::<2>(PanelTile { rows, stride, panel, ahead, goes_on, out });
        };
        multiply(packed, panel, false, &mut found);
        assert_eq!(found, twin, "{what}");
        if inputs.is_multiple_of(4) {
            let (first, rest) = panel.split_at(panel.len() / 2);
            multiply(packed, first, false, &mut found);
            multiply(&packed[inputs / 2..], rest, true, &mut found);
            assert_eq!(found, twin, "{what}, in two parts");
        }
    }

    #[test]
    fn the_kernel_equals_its_portable_twin() {
        for rows in (1..30).chain([33, 64]) {
            for inputs in [1, 2, 7, 64, 129] {
                check(rows, inputs);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_tile_equals_its_portable_twin(rows in 1usize..80, inputs in 1usize..700) {
            check(rows, inputs);
        }
    }
}
