//! Panels of a weight about to meet rows, a part of their inputs at a time.
//!
//! ```text
//! panel   [word][32 outputs]     part 0 │ part 1 │ …       of equal lengths, the last may be shorter
//! ```
//!
//! All rows of a block meet a part before the next one begins, so a part of a panel stays near until it has
//! met them, however long the rows are; of these, each part is read once for a panel. A sum goes on where the
//! part before left it: it is the same chain of multiply-adds, cut or not.

use super::groups::{GroupedPanel, GroupedRows};
use super::packed::{PackedWeight, WeightType};
use super::pairs::are_widened;
use super::rows::Rows;
use super::tiles::{Ahead, PANEL, PanelTile, ROWS, rows_at_once, whole_tile};
use super::{block_float, quads};

/// Inputs of a part at most: 128 KiB of a panel in f32 and as much of 32 rows (docs/engine.md has what was tried).
const PART_INPUTS: usize = 1024;

/// Rows that meet a panel at a time, at least: more of them read it again.
const ROWS_AT_ONCE: usize = 6;

/// One of the parts that inputs are cut into.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    index: usize,
    /// Words of a panel in each part but the last, for one output.
    words: usize,
    is_last: bool,
}

impl Part {
    /// Whether no other follows.
    pub(crate) fn is_last(self) -> bool {
        self.is_last
    }

    /// Whether sums begin with it.
    fn is_first(self) -> bool {
        self.index == 0
    }
}

/// The parts of a weight that so many rows meet, one after the other. Only vectors in f32 take several: their
/// rows are wide, and a sum may go on.
pub(crate) fn parts(weight: &PackedWeight, rows: usize) -> impl Iterator<Item = Part> + Clone {
    let (kind, depth) = (weight.kind(), weight.depth());
    let in_f32 = match kind {
        WeightType::F32 => true,
        WeightType::Bf16 => are_widened(),
        WeightType::Bf16x3 | WeightType::BlockFloat | WeightType::Int8 => false,
    };
    let pays = in_f32 && rows > ROWS_AT_ONCE;
    let count = if pays { weight.inputs().div_ceil(PART_INPUTS).max(1) } else { 1 };
    // Two inputs are multiplied at a time.
    let words = depth.div_ceil(count).next_multiple_of(2).max(1);
    let count = depth.div_ceil(words).max(1);
    (0..count).map(move |index| Part { index, words, is_last: index + 1 == count })
}

/// Words of a row, of so many, that a panel's part meets.
pub(crate) fn part_of_row(kind: WeightType, words: usize) -> usize {
    match kind {
        WeightType::F32 => words.min(PART_INPUTS),
        WeightType::Bf16 if are_widened() => words.min(PART_INPUTS),
        _ => words,
    }
}

/// A panel about to meet rows.
pub(crate) struct Panel<'a> {
    kind: WeightType,
    words: &'a [u32],
    /// `[group][32]`, where integers have scales.
    scales: &'a [f32],
}

impl Panel<'_> {
    /// Multiplies the inputs of a part with the rows from `first`, at most [`ROWS`]; `ahead` is fetched on the way.
    pub(crate) fn tile(
        &self,
        rows: &Rows,
        first: usize,
        part: Part,
        ahead: Ahead<'_>,
        out: &mut [[f32; PANEL]],
    ) {
        debug_assert!(out.len() <= ROWS);
        let (words, stride) = (rows.words_from(first), rows.stride());
        let whole = self.words.len() / PANEL;
        let own = part.index * part.words..((part.index + 1) * part.words).min(whole);
        let panel = &self.words[own.start * PANEL..own.end * PANEL];
        let goes_on = !part.is_first();
        match self.kind {
            WeightType::F32 => {
                let (rows, ahead) = (&words[own.start..], ahead.beside(own.len()));
                whole_tile::<1>(PanelTile { rows, stride, panel, ahead, goes_on, out });
            }
            WeightType::Bf16 if are_widened() => {
                let (rows, ahead) = (&words[2 * own.start..], ahead.beside(own.len()));
                whole_tile::<2>(PanelTile { rows, stride, panel, ahead, goes_on, out });
            }
            WeightType::Bf16 | WeightType::Bf16x3 => {
                debug_assert!(part.is_first() && part.is_last());
                self.kind.tile(words, stride, panel, ahead, out);
            }
            WeightType::BlockFloat | WeightType::Int8 => {
                debug_assert!(part.is_first() && part.is_last());
                let tile = match self.kind {
                    WeightType::Int8 => quads::tile,
                    _ => block_float::tile,
                };
                let rows = GroupedRows {
                    words,
                    stride,
                    groups: rows.groups_from(first),
                    group_stride: rows.group_stride(),
                };
                tile(rows, GroupedPanel { words: panel, scales: self.scales }, ahead, out);
            }
        }
    }
}

impl PackedWeight {
    /// Panel `panel`, about to meet rows.
    pub(crate) fn meeting(&self, panel: usize) -> Panel<'_> {
        Panel { kind: self.kind(), words: self.panel(panel), scales: self.scales(panel) }
    }

    /// What the tile at `tile` of `tiles` of a part of a panel, with so many rows, fetches: a share of what
    /// the tiles after this part multiply. A single tile on a matrix unit is faster than memory, and fetches
    /// what it is about to read itself; in two squares it does so anyway, and begins what comes after that.
    pub(crate) fn ahead(
        &self,
        (panel, part): (usize, Part),
        (tile, tiles): (usize, usize),
        rows: usize,
    ) -> Ahead<'_> {
        const STEP: usize = 16 * PANEL; // words
        let all = self.all_panels();
        let start = panel * self.depth() * PANEL;
        if tiles == 1 && rows_at_once(self.kind()) == ROWS {
            let steps = if rows > ROWS / 2 { 6 } else { 2 };
            return Ahead::new(all.get(start + steps * STEP..).unwrap_or(&[]), PANEL);
        }
        let own = self.depth().min((part.index + 1) * part.words) - part.index * part.words;
        let next = start + (part.index * part.words + own) * PANEL;
        let share = (own * PANEL).div_ceil(tiles);
        Ahead::new(all.get(next + tile * share..).unwrap_or(&[]), PANEL.div_ceil(tiles))
    }
}

#[cfg(test)]
mod tests {
    use super::super::twin::random;
    use super::*;
    use candle_core::DType;

    const INPUTS: usize = 2 * PART_INPUTS + 77;

    #[test]
    fn inputs_are_cut_where_rows_read_a_panel_more_than_once_and_nowhere_else() {
        let weight = random(&[40, INPUTS], DType::F32);
        let count = |kind, rows| {
            let weight = PackedWeight::of_type(&weight, kind).unwrap();
            let parts: Vec<Part> = parts(&weight, rows).collect();
            let words = parts[0].words * parts.len();
            assert!((weight.depth()..weight.depth() + 2 * parts.len()).contains(&words));
            assert!(parts.iter().rev().skip(1).all(|part| !part.is_last));
            assert!(parts[parts.len() - 1].is_last && parts[0].is_first());
            parts.len()
        };
        assert_eq!([1, 6, 7, 40].map(|rows| count(WeightType::F32, rows)), [1, 1, 3, 3]);
        let cut = if are_widened() { 3 } else { 1 };
        assert_eq!([1, 6, 7, 40].map(|rows| count(WeightType::Bf16, rows)), [1, 1, cut, cut]);
        assert_eq!((count(WeightType::Int8, 40), count(WeightType::Bf16x3, 40)), (1, 1));
    }
}
