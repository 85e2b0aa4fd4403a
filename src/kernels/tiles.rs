//! The innermost loops of generation, in explicit vectors of whatever width the CPU has.
//!
//! Each is one chain of fused multiply-adds for each result, in a fixed order; how many results share a
//! loop, and how wide the vectors are, changes no bit. Written out with vector types rather than left to
//! the optimiser: whether it keeps a hundred sums in registers depends on what stands around the loop.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::fetch::Span;
use super::packed::WeightType;
use pulp::bytemuck::cast_slice;
use pulp::{Simd, WithSimd};
use std::hint::black_box;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{Ordering, compiler_fence};

/// Outputs of a panel that lie side by side.
pub(crate) const PANEL: usize = 32;

/// Rows of a tile at most.
pub(crate) const ROWS: usize = 32;

/// Rows of a tile of vectors: 12 by two vectors fill the 32 registers of a 512-bit unit.
pub(crate) const VECTOR_ROWS: usize = 12;

/// Rows that a tile takes at a time. No matrix unit multiplies f32, or integers of 13 bits.
pub(crate) fn rows_at_once(kind: WeightType) -> usize {
    #[cfg(target_arch = "x86_64")]
    if !matches!(kind, WeightType::F32 | WeightType::BlockFloat) && amx::is_there() {
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

    /// All that is fetched beside so many words of a tile's own.
    pub(crate) fn beside(self, words: usize) -> Span<'a> {
        Span::new(self.start, words * self.step * size_of::<u32>())
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

/// Cuts rows into the fewest pieces that a tile takes at a time.
pub(crate) fn pieces(
    kind: WeightType,
    rows: Range<usize>,
) -> impl Iterator<Item = Range<usize>> + Clone {
    cut(rows, rows_at_once(kind))
}

fn cut(rows: Range<usize>, at_once: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    /// A tile of fewer rows is hardly faster.
    const FEW: usize = 4;
    let mut start = rows.start;
    std::iter::from_fn(move || {
        let left = rows.end - start;
        let length = match at_once {
            ROWS => left / left.div_ceil(ROWS).max(1),
            _ if left > at_once && left - at_once < FEW => left.div_ceil(2),
            _ => left.min(at_once),
        };
        start += length;
        (length > 0).then_some(start - length..start)
    })
}

/// Calls [`PanelTile::multiply`] with the number of rows, and the number of vectors that goes with it, as constants.
macro_rules! by_constant {
    ($part:ident, $simd:ident; $(($($rows:literal)*) $vectors:literal),*) => {
        match $part.out.len() {
            $($($rows => $part.multiply::<S, $rows, $vectors>($simd),)*)*
            _ => unreachable!("no more rows than registers"),
        }
    };
}

/// Rows in f32 against a panel in f32, or one in bf16 that is widened on its way.
pub(crate) fn whole_tile<const INPUTS: usize>(tile: PanelTile<'_, INPUTS>) {
    pulp::Arch::new().dispatch(tile);
}

/// Rows in f32 against a panel whose words hold `INPUTS` inputs: one in f32, or two in bf16.
pub(crate) struct PanelTile<'a, const INPUTS: usize> {
    /// Rows, `stride` words apart.
    pub(crate) rows: &'a [u32],
    pub(crate) stride: usize,
    /// `[word][32]`
    pub(crate) panel: &'a [u32],
    /// Fetched on the way.
    pub(crate) ahead: Span<'a>,
    /// Whether `out` holds the sums of earlier inputs, which go on.
    pub(crate) goes_on: bool,
    /// `[row][32]`
    pub(crate) out: &'a mut [[f32; PANEL]],
}

impl<const INPUTS: usize> WithSimd for PanelTile<'_, INPUTS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (count, mut first, mut tile) = (self.out.len(), 0, self);
        while first < count {
            let rows = first..first + piece::<INPUTS, S>(count - first);
            first = rows.end;
            tile.part(rows).multiply_any(simd);
        }
    }
}

/// How many of so many rows are best taken first.
#[inline(always)]
fn piece<const INPUTS: usize, S: Simd>(count: usize) -> usize {
    // 12 rows by two vectors fill the 32 registers of a 512-bit unit, 6 the 16 of others. Where a panel is widened on
    // the way the compiler spills 12 rows even with 32. Few rows take four vectors of 256 bits, for a unit has more than
    // four sums under way: 3 then are as fast a row as 6, and 4 are not.
    match (S::F32_LANES, count) {
        (8, 7 | 8) => count - 3,
        (8, 10) => 5,
        (8, _) => count.min(6),
        (16, _) if INPUTS == 1 => even(count, 12),
        _ => even(count, 6),
    }
}

/// The first of the fewest pieces of at most so many, as even as can be.
#[inline(always)]
fn even(count: usize, most: usize) -> usize {
    count.div_ceil(count.div_ceil(most))
}

impl<const INPUTS: usize> PanelTile<'_, INPUTS> {
    /// The same for some of the rows.
    #[inline(always)]
    fn part(&mut self, rows: Range<usize>) -> PanelTile<'_, INPUTS> {
        PanelTile {
            rows: &self.rows[rows.start * self.stride..],
            stride: self.stride,
            panel: self.panel,
            ahead: self.ahead.part(rows.clone(), self.out.len()),
            goes_on: self.goes_on,
            out: &mut self.out[rows],
        }
    }

    #[inline(always)]
    fn multiply_any<S: Simd>(self, simd: S) {
        match S::F32_LANES {
            8 => by_constant!(self, simd; (1 2 3) 4, (4 5 6) 2),
            16 if INPUTS == 1 => by_constant!(self, simd; (1 2 3 4 5 6 7 8 9 10 11 12) 2),
            _ => by_constant!(self, simd; (1 2 3 4 5 6) 2),
        }
    }

    /// All rows, `VECTORS` vectors of outputs at a time.
    #[inline(always)]
    pub(crate) fn multiply<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S) {
        let inputs = self.panel.len() / PANEL * INPUTS;
        let rows: [&[f32]; ROWS] =
            std::array::from_fn(|row| &cast_slice(&self.rows[row * self.stride..])[..inputs]);
        let pairs: [&[[f32; 2]]; ROWS] = rows.map(|row| row.as_chunks().0);
        let (panel, _) = S::as_simd_u32s(self.panel);
        let widen = Widen::<S, INPUTS>::new(simd);
        let vectors = PANEL / S::F32_LANES;
        let lines = lines(INPUTS, VECTORS, S::F32_LANES);
        let mut ahead = self.ahead.steps(inputs / 2 * vectors / VECTORS * lines, self.panel);
        for first in (0..vectors).step_by(VECTORS) {
            let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
            if self.goes_on {
                for row in 0..ROWS {
                    let (out, _) = S::as_simd_f32s(&self.out[row]);
                    sums[row].copy_from_slice(&out[first..first + VECTORS]);
                }
            }
            // Two inputs at a time: one is hardly more work than moving on.
            let mut steps = panel.chunks_exact(2 * vectors / INPUTS);
            let sums = &mut sums;
            for (step, words) in steps.by_ref().take(inputs / 2).enumerate() {
                ahead.fetch(lines);
                for input in 0..2 {
                    let words = &words[first + input * (2 - INPUTS) * vectors..];
                    let x = |row: usize| simd.splat_f32s(pairs[row][step][input]);
                    multiply_input::<S, INPUTS, ROWS, VECTORS>(widen, x, words, input, sums);
                }
            }
            if inputs % 2 == 1 {
                let words = &steps.remainder()[first..];
                let x = |row: usize| simd.splat_f32s(rows[row][inputs - 1]);
                multiply_input::<S, INPUTS, ROWS, VECTORS>(widen, x, words, 0, sums);
            }
            for row in 0..ROWS {
                let (out, _) = S::as_mut_simd_f32s(&mut self.out[row]);
                out[first..first + VECTORS].copy_from_slice(&sums[row]);
            }
        }
    }
}

/// Lines of the cache that two inputs of some vectors take, whose words hold `inputs`; one at least.
const fn lines(inputs: usize, vectors: usize, lanes: usize) -> usize {
    match 2 / inputs * vectors * lanes * size_of::<u32>() / 64 {
        0 => 1,
        lines => lines,
    }
}

/// Adds the products of one input.
#[inline(always)]
fn multiply_input<S: Simd, const INPUTS: usize, const ROWS: usize, const VECTORS: usize>(
    widen: Widen<S, INPUTS>,
    x: impl Fn(usize) -> S::f32s,
    words: &[S::u32s],
    input: usize,
    sums: &mut [[S::f32s; VECTORS]; ROWS],
) {
    // Else the compiler loads or widens both inputs at once, and runs out of registers.
    compiler_fence(Ordering::SeqCst);
    let simd = widen.simd;
    let words = &words[..VECTORS];
    // What is used most often stays in registers: the vectors of the panel, or else the rows.
    match (ROWS, VECTORS) {
        // 12 sums, the rows and what a vector is widened with are one more than there are registers.
        (3, 4) if INPUTS == 2 => {
            multiply_vectors(widen, &x, words, input, 0..2, sums);
            compiler_fence(Ordering::SeqCst);
            multiply_vectors(widen, &x, words, input, 2..4, sums);
        }
        (rows, vectors) if vectors < rows => {
            multiply_vectors(widen, &x, words, input, 0..VECTORS, sums);
        }
        _ => {
            let mut own_x = [simd.splat_f32s(0.0); ROWS];
            for row in 0..ROWS {
                own_x[row] = x(row);
            }
            for vector in 0..VECTORS {
                let own = widen.vector(words[vector], input);
                for row in 0..ROWS {
                    sums[row][vector] = simd.mul_add_f32s(own_x[row], own, sums[row][vector]);
                }
            }
        }
    }
}

/// The same for some vectors, which stay in registers.
#[inline(always)]
fn multiply_vectors<S: Simd, const INPUTS: usize, const ROWS: usize, const VECTORS: usize>(
    widen: Widen<S, INPUTS>,
    x: &impl Fn(usize) -> S::f32s,
    words: &[S::u32s],
    input: usize,
    vectors: Range<usize>,
    sums: &mut [[S::f32s; VECTORS]; ROWS],
) {
    let simd = widen.simd;
    let mut own = [simd.splat_f32s(0.0); VECTORS];
    for vector in vectors.clone() {
        own[vector] = widen.vector(words[vector], input);
    }
    for row in 0..ROWS {
        let x = x(row);
        for vector in vectors.clone() {
            sums[row][vector] = simd.mul_add_f32s(x, own[vector], sums[row][vector]);
        }
    }
}

/// Brings words of a panel, each of `INPUTS` inputs, into f32.
#[derive(Clone, Copy)]
struct Widen<S: Simd, const INPUTS: usize> {
    simd: S,
    high: S::u32s,
}

impl<S: Simd, const INPUTS: usize> Widen<S, INPUTS> {
    #[inline(always)]
    fn new(simd: S) -> Self {
        // A compiler that knows what is kept of a word takes a blend with zeros for it, which is slower than all else
        // that widens (docs/engine.md).
        Widen { simd, high: black_box(simd.splat_u32s(0xffff_0000)) }
    }

    /// Input `input` of each word.
    #[inline(always)]
    fn vector(self, words: S::u32s, input: usize) -> S::f32s {
        let simd = self.simd;
        simd.transmute_f32s_u32s(match (INPUTS, input) {
            (1, _) => words,
            (_, 0) => simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(16)),
            _ => simd.and_u32s(words, self.high),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_into_the_fewest_pieces_of_which_none_is_tiny() {
        for at_once in [VECTOR_ROWS, ROWS] {
            for rows in 0..100 {
                let lengths: Vec<usize> =
                    cut(7..7 + rows, at_once).map(|rows| rows.len()).collect();
                assert_eq!(lengths.len(), rows.div_ceil(at_once), "{rows} rows at {at_once}");
                assert!(lengths.iter().all(|&length| length <= at_once && length >= rows.min(4)));
                assert!(cut(7..7 + rows, at_once).flatten().eq(7..7 + rows));
            }
        }
        let is = |rows, at_once, expected: &[usize]| {
            let lengths = cut(0..rows, at_once).map(|rows| rows.len());
            assert!(lengths.eq(expected.iter().copied()), "{rows} rows at {at_once}");
        };
        is(32, VECTOR_ROWS, &[12, 12, 8]);
        is(25, VECTOR_ROWS, &[12, 7, 6]);
        is(16, VECTOR_ROWS, &[12, 4]);
        is(65, ROWS, &[21, 22, 22]);
    }

    #[test]
    fn a_tile_is_a_chain_for_each_output_with_any_number_of_inputs() {
        let number = |index: usize| ((index * 37 + 11) % 101) as f32 / 64.0 - 0.7;
        for inputs in [1, 2, 3, 64, 129] {
            for rows in 1..=13 {
                let stride = inputs + 5;
                let x: Vec<u32> = (0..rows * stride).map(|i| number(i).to_bits()).collect();
                let panel: Vec<u32> =
                    (0..inputs * PANEL).map(|i| number(i + 3).to_bits()).collect();
                let mut twin = vec![[0.0f32; PANEL]; rows];
                for (row, twin) in twin.iter_mut().enumerate() {
                    for input in 0..inputs {
                        let x = f32::from_bits(x[row * stride + input]);
                        for (lane, sum) in twin.iter_mut().enumerate() {
                            *sum = x.mul_add(f32::from_bits(panel[input * PANEL + lane]), *sum);
                        }
                    }
                }
                let mut ours = vec![[f32::NAN; PANEL]; rows];
                let mut check = |cuts: &[usize]| {
                    let mut start = 0;
                    ours.fill([f32::NAN; PANEL]);
                    for &end in cuts.iter().chain([&inputs]) {
                        whole_tile::<1>(PanelTile {
                            rows: &x[start..],
                            stride,
                            panel: &panel[start * PANEL..end * PANEL],
                            ahead: Span::NOTHING,
                            goes_on: start > 0,
                            out: &mut ours,
                        });
                        start = end;
                    }
                    assert_eq!(ours, twin, "{rows} rows of {inputs}, cut at {cuts:?}");
                };
                check(&[]);
                if inputs > 3 {
                    check(&[1, inputs / 2]);
                }
            }
        }
    }
}
