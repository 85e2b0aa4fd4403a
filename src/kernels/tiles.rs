//! The innermost loops of generation, in explicit vectors of whatever width the CPU has.
//!
//! Each is one chain of fused multiply-adds for each result, in a fixed order; how many results share a
//! loop, and how wide the vectors are, changes no bit. Written out with vector types rather than left to
//! the optimiser: whether it keeps a hundred sums in registers depends on what stands around the loop.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::packed::WeightType;
use pulp::{Simd, WithSimd};
use std::marker::PhantomData;

/// Outputs of a panel that lie side by side.
pub(crate) const PANEL: usize = 32;

/// Rows of a tile at most.
pub(crate) const ROWS: usize = 32;

/// Rows of a tile of vectors: 12 by two vectors fill the 32 registers of a 512-bit unit.
pub(crate) const VECTOR_ROWS: usize = 12;

/// Rows that a tile takes at a time.
pub(crate) fn rows_at_once(kind: WeightType) -> usize {
    #[cfg(target_arch = "x86_64")]
    if kind != WeightType::F32 && amx::is_there() {
        return amx::ROWS;
    }
    let _ = kind;
    VECTOR_ROWS
}

/// Words that a tile fetches into the cache on its way, for whoever comes next: one in `step` for each of
/// its own. Small enough to travel in registers.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<'a> {
    start: *const u32,
    step: usize,
    words: PhantomData<&'a [u32]>,
}

impl<'a> Ahead<'a> {
    pub(crate) const NOTHING: Ahead<'static> =
        Ahead { start: std::ptr::null(), step: 0, words: PhantomData };

    pub(crate) fn new(words: &'a [u32], step: usize) -> Self {
        match words {
            [] => Ahead::NOTHING,
            _ => Ahead { start: words.as_ptr(), step, words: PhantomData },
        }
    }

    /// Where the words are, as far as a prefetch is concerned: it may name any address.
    #[inline(always)]
    pub(crate) fn at(self, word: usize) -> *const u32 {
        self.start.wrapping_add(word * self.step)
    }

    /// 0 if there is nothing to fetch.
    #[inline(always)]
    pub(crate) fn step(self) -> usize {
        self.step
    }

    /// What is fetched after so many words of the tile's own.
    pub(crate) fn after(self, words: usize) -> Self {
        Ahead { start: self.at(words), ..self }
    }
}

/// Rows of output that a tile of `count` rows is best given: those behind `count` are of no meaning.
pub(crate) fn room(kind: WeightType, count: usize) -> usize {
    match rows_at_once(kind) {
        ROWS => count.next_multiple_of(ROWS / 2),
        _ => count,
    }
}

/// Cuts `$count` rows into pieces of at most 12 and runs the body for each, with their number as a
/// constant.
macro_rules! by_rows {
    ($count:expr, $first:ident, $Rows:ident => $body:expr) => {{
        let mut left = $count;
        let mut $first = 0;
        while left > 0 {
            let rows = left.min($crate::kernels::tiles::VECTOR_ROWS);
            $crate::kernels::tiles::by_rows!(@ rows, $Rows, $body; 1 2 3 4 5 6 7 8 9 10 11 12);
            $first += rows;
            left -= rows;
        }
    }};
    (@ $rows:ident, $Rows:ident, $body:expr; $($count:literal)*) => {
        match $rows {
            $($count => { const $Rows: usize = $count; $body })*
            _ => unreachable!("at most 12 rows"),
        }
    };
}
pub(crate) use by_rows;

/// Rows against a panel of weights.
pub(crate) struct PanelTile<'a> {
    /// Rows, `stride` elements apart.
    pub(crate) x: &'a [f32],
    pub(crate) stride: usize,
    /// `[input][32]`
    pub(crate) panel: &'a [f32],
    /// `[row][32]`
    pub(crate) out: &'a mut [[f32; PANEL]],
}

impl WithSimd for PanelTile<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let PanelTile { x, stride, panel, out } = self;
        let mut row = 0;
        while row < out.len() {
            let (x, out) = (&x[row * stride..], &mut out[row..]);
            // 12 rows by two vectors fill the 32 registers of a 512-bit unit, 6 the 16 of others.
            row += match out.len() {
                12.. if S::F32_LANES >= 16 => panel_rows::<12, S>(simd, x, stride, panel, out),
                6.. => panel_rows::<6, S>(simd, x, stride, panel, out),
                4.. => panel_rows::<4, S>(simd, x, stride, panel, out),
                2.. => panel_rows::<2, S>(simd, x, stride, panel, out),
                _ => panel_rows::<1, S>(simd, x, stride, panel, out),
            };
        }
    }
}

/// The first `ROWS` rows; returns how many that are.
#[inline(always)]
fn panel_rows<const ROWS: usize, S: Simd>(
    simd: S,
    x: &[f32],
    stride: usize,
    panel: &[f32],
    out: &mut [[f32; PANEL]],
) -> usize {
    let inputs = panel.len() / PANEL;
    let rows: [&[f32]; ROWS] = std::array::from_fn(|row| &x[row * stride..][..inputs]);
    let (panel, _) = S::as_simd_f32s(panel);
    let vectors = PANEL / S::F32_LANES;
    for vector in (0..vectors).step_by(2) {
        let mut sums = [[simd.splat_f32s(0.0); 2]; ROWS];
        for (input, weights) in panel.chunks_exact(vectors).enumerate() {
            let (left, right) = (weights[vector], weights[vector + 1]);
            for row in 0..ROWS {
                let x = simd.splat_f32s(rows[row][input]);
                sums[row][0] = simd.mul_add_f32s(x, left, sums[row][0]);
                sums[row][1] = simd.mul_add_f32s(x, right, sums[row][1]);
            }
        }
        for row in 0..ROWS {
            let (out, _) = S::as_mut_simd_f32s(&mut out[row]);
            out[vector] = sums[row][0];
            out[vector + 1] = sums[row][1];
        }
    }
    ROWS
}
