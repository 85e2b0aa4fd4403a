//! The innermost loops of generation, in explicit vectors of whatever width the CPU has.
//!
//! Each is one chain of fused multiply-adds for each result, in a fixed order; how many results share a
//! loop, and how wide the vectors are, changes no bit. Written out with vector types rather than left to
//! the optimiser: whether it keeps a hundred sums in registers depends on what stands around the loop.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::packed::WeightType;
use pulp::bytemuck::cast_slice;
use pulp::{Simd, WithSimd};
use std::marker::PhantomData;
use std::sync::atomic::{Ordering, compiler_fence};

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

/// Calls [`PanelTile::multiply`] with the number of rows, and the number of vectors that goes with it, as constants.
macro_rules! by_constant {
    ($part:ident, $simd:ident; $(($($rows:literal)*) $vectors:literal),*) => {
        match $part.out.len() {
            $($($rows => $part.multiply::<S, $rows, $vectors>($simd),)*)*
            _ => unreachable!("no more rows than registers"),
        }
    };
}

/// Rows in f32 against a panel in f32.
pub(crate) fn whole_tile(rows: &[u32], stride: usize, panel: &[u32], out: &mut [[f32; PANEL]]) {
    pulp::Arch::new().dispatch(PanelTile::<1> { rows, stride, panel, out });
}

/// Rows in f32 against a panel whose words hold `INPUTS` inputs: one in f32, or two in bf16.
pub(crate) struct PanelTile<'a, const INPUTS: usize> {
    /// Rows, `stride` words apart.
    pub(crate) rows: &'a [u32],
    pub(crate) stride: usize,
    /// `[word][32]`
    pub(crate) panel: &'a [u32],
    /// `[row][32]`
    pub(crate) out: &'a mut [[f32; PANEL]],
}

impl<const INPUTS: usize> WithSimd for PanelTile<'_, INPUTS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // 12 rows by two vectors fill the 32 registers of a 512-bit unit, or 9 where panels are widened on the
        // way, by what the compiler makes of them; 6 fill the 16 of others. Few rows take four vectors of
        // 256 bits, for a unit has more than four sums under way.
        let most = match S::F32_LANES {
            16.. if INPUTS == 1 => VECTOR_ROWS,
            16.. => 9,
            _ => VECTOR_ROWS / 2,
        };
        let (count, pieces) = (self.out.len(), self.out.len().div_ceil(most));
        let cut = |piece: usize| piece * count / pieces;
        for piece in 0..pieces {
            let rows = &self.rows[cut(piece) * self.stride..];
            let out = &mut self.out[cut(piece)..cut(piece + 1)];
            let part = PanelTile::<INPUTS> { rows, stride: self.stride, panel: self.panel, out };
            match S::F32_LANES {
                8 => by_constant!(part, simd; (1 2 3) 4, (4 5 6) 2),
                16 => by_constant!(part, simd; (1 2 3 4 5 6 7 8 9 10 11 12) 2),
                _ => by_constant!(part, simd; (1 2 3 4 5 6) 2),
            }
        }
    }
}

impl<const INPUTS: usize> PanelTile<'_, INPUTS> {
    /// All rows, `VECTORS` vectors of outputs at a time.
    #[inline(always)]
    fn multiply<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S) {
        let depth = self.panel.len() / PANEL;
        let rows: [&[[f32; INPUTS]]; ROWS] = std::array::from_fn(|row| {
            let row: &[f32] = cast_slice(&self.rows[row * self.stride..]);
            &row.as_chunks().0[..depth]
        });
        let (panel, _) = S::as_simd_u32s(self.panel);
        let vectors = PANEL / S::F32_LANES;
        for first in (0..vectors).step_by(VECTORS) {
            let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
            for (word, weights) in panel.chunks_exact(vectors).enumerate() {
                let weights = &weights[first..first + VECTORS];
                for input in 0..INPUTS {
                    // Else the compiler widens both inputs of a word at once, and runs out of registers.
                    if INPUTS > 1 {
                        compiler_fence(Ordering::SeqCst);
                    }
                    // What is used most often stays in registers: the vectors of the panel, or else the rows.
                    if VECTORS < ROWS {
                        let mut own = [simd.splat_f32s(0.0); VECTORS];
                        for vector in 0..VECTORS {
                            own[vector] = widened::<INPUTS, S>(simd, weights[vector], input);
                        }
                        for row in 0..ROWS {
                            let x = simd.splat_f32s(rows[row][word][input]);
                            for vector in 0..VECTORS {
                                let sum = &mut sums[row][vector];
                                *sum = simd.mul_add_f32s(x, own[vector], *sum);
                            }
                        }
                    } else {
                        let mut x = [simd.splat_f32s(0.0); ROWS];
                        for row in 0..ROWS {
                            x[row] = simd.splat_f32s(rows[row][word][input]);
                        }
                        for vector in 0..VECTORS {
                            let own = widened::<INPUTS, S>(simd, weights[vector], input);
                            for row in 0..ROWS {
                                let sum = &mut sums[row][vector];
                                *sum = simd.mul_add_f32s(x[row], own, *sum);
                            }
                        }
                    }
                }
            }
            for row in 0..ROWS {
                let (out, _) = S::as_mut_simd_f32s(&mut self.out[row]);
                out[first..first + VECTORS].copy_from_slice(&sums[row]);
            }
        }
    }
}

/// Input `input` of each word, in f32.
#[inline(always)]
fn widened<const INPUTS: usize, S: Simd>(simd: S, words: S::u32s, input: usize) -> S::f32s {
    simd.transmute_f32s_u32s(match (INPUTS, input) {
        (1, _) => words,
        (_, 0) => simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(16)),
        _ => simd.and_u32s(words, simd.splat_u32s(0xffff_0000)),
    })
}
