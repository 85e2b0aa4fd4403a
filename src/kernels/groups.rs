//! Integers with a scale for each group of 128 inputs: what products in 8 bits and in block floating point share.

use super::tiles::PANEL;

/// Inputs of a group.
pub(crate) const INPUTS: usize = 128;

/// One group of a quantised row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Group {
    /// What a unit is worth.
    pub(crate) scale: f32,
    /// In 8 bits -128 times the sum of the bytes: takes back the offset of the weights.
    pub(crate) correction: i32,
}

/// Quantised rows.
#[derive(Clone, Copy)]
pub(crate) struct GroupedRows<'a> {
    pub(crate) words: &'a [u32],
    /// Words from one row to the next.
    pub(crate) stride: usize,
    pub(crate) groups: &'a [Group],
    /// Groups from one row to the next.
    pub(crate) group_stride: usize,
}

impl GroupedRows<'_> {
    /// Those from row `first` on.
    pub(crate) fn from(self, first: usize) -> Self {
        GroupedRows {
            words: &self.words[first * self.stride..],
            groups: &self.groups[first * self.group_stride..],
            ..self
        }
    }
}

/// A panel of quantised weights.
#[derive(Clone, Copy)]
pub(crate) struct GroupedPanel<'a> {
    /// `[word][32]`
    pub(crate) words: &'a [u32],
    /// `[group][32]`
    pub(crate) scales: &'a [f32],
}

impl<'a> GroupedPanel<'a> {
    /// Words and scales of each group, of which all but the last have `words` words.
    pub(crate) fn groups(
        self,
        words: usize,
    ) -> impl Iterator<Item = (&'a [[u32; PANEL]], &'a [f32; PANEL])> {
        let panels = self.words.as_chunks::<PANEL>().0;
        panels.chunks(words).zip(self.scales.as_chunks().0)
    }
}

/// Elements that are quantised side by side.
pub(super) const LANES: usize = 16;

/// 1.5 * 2^23: adding it rounds, ties to even, and leaves the integer in the low bits.
pub(super) const SHIFT: f32 = 12_582_912.0;

/// So many elements, with zeros behind those that are there.
#[inline(always)]
pub(super) fn chunk(x: &[f32]) -> [f32; LANES] {
    x.first_chunk().copied().unwrap_or_else(|| {
        let mut padded = [0.0; LANES];
        padded[..x.len()].copy_from_slice(x);
        padded
    })
}

/// The scale of a group, and its inverse, by the size of the largest element. A group that holds what is not finite is
/// worth nothing that is a number.
#[inline(always)]
pub(super) fn scales_by(x: &[f32], of: impl FnOnce(f32) -> (f32, f32)) -> (f32, f32) {
    const SIGN: u32 = 1 << 31;
    // Sizes are ordered as their bits are, with infinity and what is no number behind all others.
    let mut lanes = [0u32; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for lane in 0..LANES {
            lanes[lane] = lanes[lane].max(x[lane].to_bits() & !SIGN);
        }
    }
    let rest = rest.iter().map(|x| x.to_bits() & !SIGN);
    let top = f32::from_bits(rest.chain(lanes).fold(0, u32::max));
    if !top.is_finite() {
        return (f32::NAN, 0.0);
    }
    // Below this the inverse would be infinite.
    if top > 1e-30 { of(top) } else { (0.0, 0.0) }
}
