//! Matrices of f32 in the words that tiles take, by rows or by columns.
//!
//! ```text
//! row                as it is: the words of a row side by side
//! rows of columns    a row of words for each column; rows of the matrix are the inputs
//! panel of columns   [word][32 columns]; rows of the matrix are the inputs
//! panel of rows      [word][32 rows]; columns of the matrix are the inputs
//! ```
//!
//! Training multiplies every matrix both ways round. What is not there is zero. To be inlined into vectorised
//! loops.

use super::bf16x3::{self, PARTS};
use super::matmul::View;
use super::pairs;
use super::rounding;
use super::tiles::PANEL;
use pulp::bytemuck::cast_slice;

/// How numbers stand in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Words {
    /// One in f32.
    F32,
    /// Two of bf16.
    Pairs,
    /// One that was rounded to bf16, in f32.
    Rounded,
    /// Two of bf16 whose parts stand in three words.
    Parts,
}

impl Words {
    /// Words of `inputs` numbers.
    pub(crate) fn count(self, inputs: usize) -> usize {
        match self {
            Words::F32 => inputs,
            Words::Pairs => pairs::words(inputs),
            // As many numbers as the pairs that they meet.
            Words::Rounded => 2 * pairs::words(inputs),
            Words::Parts => bf16x3::words(inputs),
        }
    }
}

/// Columns or rows, and words, that are turned round at a time.
pub(crate) const SQUARE: usize = 16;

/// Words, 16 of each of 16 rows.
type Square = [[u32; SQUARE]; SQUARE];

/// Inputs that words are padded to: whole steps of a matrix unit.
pub(crate) const INPUTS: usize = 32;

/// The words of a row; those behind it are zeros.
#[inline(always)]
pub(crate) fn row(kind: Words, x: &[f32], words: &mut [u32]) {
    let own = kind.count(x.len());
    match kind {
        Words::F32 => words[..own].copy_from_slice(cast_slice(x)),
        Words::Pairs => rounding::round_row(x, &mut words[..own]),
        Words::Rounded => {
            words.iter_mut().zip(x).for_each(|(word, &x)| *word = rounding::rounded(x));
            words[x.len()..own].fill(0);
        }
        Words::Parts => bf16x3::split_row(x, &mut words[..own]),
    }
    words[own..].fill(0);
}

/// The words of rows of a panel, `stride` words from one to the next.
#[inline(always)]
pub(crate) fn rows(kind: Words, x: &[[f32; PANEL]], words: &mut [u32], stride: usize) {
    match kind {
        Words::Pairs => rounding::round_rows(x, words, stride),
        _ => {
            for (x, words) in x.iter().zip(words.chunks_mut(stride)) {
                row(kind, x, &mut words[..kind.count(PANEL)]);
            }
        }
    }
}

/// The panel of 32 columns of `x` from `first`.
#[inline(always)]
pub(crate) fn panel_of_columns(kind: Words, x: View<'_, f32>, first: usize, panel: &mut [u32]) {
    let words = panel.as_chunks_mut::<PANEL>().0;
    if kind == Words::Parts {
        let steps = words.as_chunks_mut::<{ PARTS * SQUARE }>().0;
        for (step, words) in steps.iter_mut().enumerate() {
            for word in 0..SQUARE {
                let out = words.get_disjoint_mut([word, SQUARE + word, 2 * SQUARE + word]);
                split_columns(x, step * SQUARE + word, first, out.expect("three places"));
            }
        }
        return;
    }
    for (word, out) in words.iter_mut().enumerate() {
        *out = word_of_columns(kind, x, word, first);
    }
}

/// Rows of words for the columns of `x` from `first`, as many as there are rows of `stride` words.
#[inline(always)]
pub(crate) fn rows_of_columns(
    kind: Words,
    x: View<'_, f32>,
    first: usize,
    words: &mut [u32],
    stride: usize,
) {
    let (count, depth) = (words.len() / stride, kind.count(x.rows.next_multiple_of(INPUTS)));
    for column in (0..count).step_by(SQUARE) {
        let words = &mut words[column * stride..];
        squares_of_columns(
            kind,
            x,
            depth,
            first + column,
            #[inline(always)]
            |at, square| {
                for (row, turned) in words.chunks_mut(stride).take(SQUARE).zip(square) {
                    let own = depth.min(at + SQUARE) - at;
                    row[at..at + own].copy_from_slice(&turned[..own]);
                }
            },
        );
    }
}

/// Hands out the first `depth` words of each of 16 columns from `first`, 16 words at a time with the index of the first.
#[inline(always)]
pub(crate) fn squares_of_columns(
    kind: Words,
    x: View<'_, f32>,
    depth: usize,
    first: usize,
    mut put: impl FnMut(usize, &Square),
) {
    let mut square = [[0; SQUARE]; SQUARE];
    if kind != Words::Parts {
        for at in (0..depth).step_by(SQUARE) {
            for row in 0..SQUARE {
                square[row] = word_of_columns(kind, x, at + row, first);
            }
            put(at, &turned(&square));
        }
        return;
    }
    let mut parts = [square; PARTS];
    for (step, at) in (0..depth).step_by(PARTS * SQUARE).enumerate() {
        for row in 0..SQUARE {
            let out = parts.each_mut().map(|part| &mut part[row]);
            split_columns(x, step * SQUARE + row, first, out);
        }
        for part in 0..PARTS {
            put(at + part * SQUARE, &turned(&parts[part]));
        }
    }
}

/// The panel of 32 rows of `x` from `first`.
#[inline(always)]
pub(crate) fn panel_of_rows(kind: Words, x: View<'_, f32>, first: usize, panel: &mut [u32]) {
    for half in [0, SQUARE] {
        squares_of_rows(
            kind,
            x,
            panel.len() / PANEL,
            first + half,
            #[inline(always)]
            |at, square| {
                let words = panel[at * PANEL..].chunks_exact_mut(PANEL);
                for (word, turned) in words.zip(square) {
                    word[half..half + SQUARE].copy_from_slice(turned);
                }
            },
        );
    }
}

/// Hands out the first `depth` words of each of 16 rows from `first`, turned, 16 words at a time with the index of the
/// first.
#[inline(always)]
fn squares_of_rows(
    kind: Words,
    x: View<'_, f32>,
    depth: usize,
    first: usize,
    mut put: impl FnMut(usize, &Square),
) {
    let mut square = [[0; SQUARE]; SQUARE];
    if kind != Words::Parts {
        for at in (0..depth).step_by(SQUARE) {
            for row in 0..SQUARE {
                square[row] = words_of_row(kind, x, first + row, at);
            }
            put(at, &turned(&square));
        }
        return;
    }
    let mut parts = [square; PARTS];
    for (step, at) in (0..depth).step_by(PARTS * SQUARE).enumerate() {
        for row in 0..SQUARE {
            let mut own = [0; PARTS * SQUARE];
            bf16x3::split_row(&columns::<INPUTS>(x, first + row, step * INPUTS), &mut own);
            for part in 0..PARTS {
                parts[part][row].copy_from_slice(&own[part * SQUARE..][..SQUARE]);
            }
        }
        for part in 0..PARTS {
            put(at + part * SQUARE, &turned(&parts[part]));
        }
    }
}

/// Rows exchanged with columns. A square fits the registers of a 512-bit unit.
#[inline(always)]
pub(crate) fn turned<T: Copy + Default>(square: &[[T; SQUARE]; SQUARE]) -> [[T; SQUARE]; SQUARE] {
    let mut out = [[T::default(); SQUARE]; SQUARE];
    for row in 0..SQUARE {
        for column in 0..SQUARE {
            out[column][row] = square[row][column];
        }
    }
    out
}

/// One word of `COUNT` columns from `first`.
#[inline(always)]
fn word_of_columns<const COUNT: usize>(
    kind: Words,
    x: View<'_, f32>,
    word: usize,
    first: usize,
) -> [u32; COUNT] {
    match kind {
        Words::F32 => bits(columns(x, word, first)),
        Words::Rounded => rounded_bits(columns(x, word, first)),
        Words::Pairs | Words::Parts => {
            let low = columns::<COUNT>(x, 2 * word, first);
            let high = columns::<COUNT>(x, 2 * word + 1, first);
            if let (Some(low), Some(high)) = (low.as_array(), high.as_array()) {
                return *rounding::pair_rows(low, high).as_array().expect("as many");
            }
            let mut out = [0; COUNT];
            for lane in 0..COUNT {
                out[lane] = rounding::pair(low[lane], high[lane]);
            }
            out
        }
    }
}

/// Writes the parts of two rows from `2 * word` in `COUNT` columns from `first`.
#[inline(always)]
fn split_columns<const COUNT: usize>(
    x: View<'_, f32>,
    word: usize,
    first: usize,
    out: [&mut [u32; COUNT]; PARTS],
) {
    debug_assert_eq!(x.column_stride, 1);
    let row = 2 * word;
    if row + 1 < x.rows && first + COUNT <= x.columns {
        let rows = &x.data[row * x.row_stride + first..];
        let low = rows.first_chunk().expect("a row holds its columns");
        let high = rows[x.row_stride..].first_chunk().expect("a row holds its columns");
        return bf16x3::split_rows(low, high, out);
    }
    bf16x3::split_rows(&columns(x, row, first), &columns(x, row + 1, first), out);
}

/// 16 words of a row.
#[inline(always)]
fn words_of_row(kind: Words, x: View<'_, f32>, row: usize, word: usize) -> [u32; SQUARE] {
    match kind {
        Words::F32 => bits(columns(x, row, word)),
        Words::Rounded => rounded_bits(columns(x, row, word)),
        Words::Pairs | Words::Parts => {
            let mut out = [0; SQUARE];
            rounding::round_row(&columns::<{ 2 * SQUARE }>(x, row, 2 * word), &mut out);
            out
        }
    }
}

#[inline(always)]
fn bits<const COUNT: usize>(x: [f32; COUNT]) -> [u32; COUNT] {
    let mut out = [0; COUNT];
    for lane in 0..COUNT {
        out[lane] = x[lane].to_bits();
    }
    out
}

#[inline(always)]
fn rounded_bits<const COUNT: usize>(x: [f32; COUNT]) -> [u32; COUNT] {
    let mut out = [0; COUNT];
    for lane in 0..COUNT {
        out[lane] = rounding::rounded(x[lane]);
    }
    out
}

/// `COUNT` columns of a row.
#[inline(always)]
fn columns<const COUNT: usize>(x: View<'_, f32>, row: usize, first: usize) -> [f32; COUNT] {
    debug_assert_eq!(x.column_stride, 1);
    if row >= x.rows || first >= x.columns {
        return [0.0; COUNT];
    }
    let own = &x.data[row * x.row_stride + first..];
    if first + COUNT <= x.columns {
        return *own.first_chunk().expect("a row holds its columns");
    }
    let mut out = [0.0; COUNT];
    let there = x.columns - first;
    out[..there].copy_from_slice(&own[..there]);
    out
}

#[cfg(test)]
mod tests {
    use super::super::twin::random;
    use super::*;
    use candle_core::DType;

    const KINDS: [Words; 4] = [Words::F32, Words::Pairs, Words::Rounded, Words::Parts];

    /// Element `input` of a chain of words `[word][lane]`.
    fn element(kind: Words, input: usize, word: &dyn Fn(usize) -> u32) -> f32 {
        match kind {
            Words::F32 | Words::Rounded => f32::from_bits(word(input)),
            Words::Parts => {
                let (step, input) = (input / INPUTS, input % INPUTS);
                let part = |part| {
                    let word = |own| word((step * PARTS + part) * SQUARE + own);
                    element(Words::Pairs, input, &word)
                };
                part(0) + (part(1) + part(2))
            }
            _ if input.is_multiple_of(2) => f32::from_bits(word(input / 2) << 16),
            _ => f32::from_bits(word(input / 2) & 0xffff_0000),
        }
    }

    fn rounded(kind: Words, x: f32) -> f32 {
        match kind {
            Words::F32 | Words::Parts => x,
            _ => f32::from_bits(rounding::round(x) << 16),
        }
    }

    fn check(rows: usize, columns: usize) {
        let stride = columns + 3;
        let data: Vec<f32> = random(&[rows * stride], DType::F32).to_vec1().unwrap();
        let x = View::rows(&data, rows, columns, stride);
        let at = |row: usize, column: usize| match row < rows && column < columns {
            true => data[row * stride + column],
            false => 0.0,
        };
        for kind in KINDS {
            let depth = kind.count(rows.next_multiple_of(INPUTS));
            let (mut panel, mut turned) = (vec![7; depth * PANEL], vec![7; 20 * (depth + 1)]);
            panel_of_columns(kind, x, 5, &mut panel);
            rows_of_columns(kind, x, 5, &mut turned, depth + 1);
            for input in 0..rows.next_multiple_of(INPUTS) {
                for lane in 0..20 {
                    let exact = rounded(kind, at(input, 5 + lane));
                    let ours = element(kind, input, &|word| panel[word * PANEL + lane]);
                    assert_eq!(ours, exact, "panel of columns: {input}, {lane}");
                    let ours = element(kind, input, &|word| turned[lane * (depth + 1) + word]);
                    assert_eq!(ours, exact, "rows of columns: {input}, {lane}");
                }
            }
            let inputs = columns.next_multiple_of(INPUTS);
            let depth = kind.count(inputs);
            let (mut panel, mut own) = (vec![7; depth * PANEL], vec![7; depth]);
            panel_of_rows(kind, x, 3, &mut panel);
            row(kind, &data[..columns], &mut own);
            for input in 0..inputs {
                for lane in 0..PANEL {
                    let ours = element(kind, input, &|word| panel[word * PANEL + lane]);
                    assert_eq!(ours, rounded(kind, at(3 + lane, input)), "panel of rows");
                }
                assert_eq!(element(kind, input, &|word| own[word]), rounded(kind, at(0, input)));
            }
        }
    }

    #[test]
    fn every_element_stands_in_its_place_and_zeros_behind_them() {
        for (rows, columns) in [(1, 1), (5, 33), (32, 32), (64, 25), (70, 100), (33, 64)] {
            check(rows, columns);
        }
    }
}
