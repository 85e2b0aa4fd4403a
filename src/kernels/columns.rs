//! Columns of a matrix as the outputs of panels, written by several threads, each with a part of the rows.
//!
//! ```text
//! rows  0..64    ─▶  [panel 0][inputs  0..64]    [panel 1][inputs  0..64]    …
//! rows 64..128   ─▶  [panel 0][inputs 64..128]   [panel 1][inputs 64..128]   …
//! ```
//!
//! So a matrix is read as it stands in memory, and whatever else its rows are wanted for finds them in the cache.

// Reason: threads write different words of the same panels, which slices cannot express.
#![expect(unsafe_code, reason = "panels of one matrix are written by several threads")]

use super::ROWS_PER_TASK;
use super::layout::{self, INPUTS};
use super::matmul::View;
use super::packed::{PackedWeight, WeightType};
use super::real::simd;
use super::share::{Target, each};
use super::tiles::PANEL;

/// The rows of a matrix, so many for each task, with the index of the first: whole steps of inputs, but for the last.
pub(crate) fn parts(x: View<'_, f32>) -> impl Iterator<Item = (usize, View<'_, f32>)> {
    const { assert!(ROWS_PER_TASK.is_multiple_of(INPUTS)) };
    (0..x.rows).step_by(ROWS_PER_TASK).map(move |first| {
        let rows = ROWS_PER_TASK.min(x.rows - first);
        (first, View { data: &x.data[first * x.row_stride..], rows, ..x })
    })
}

/// Lays out the columns of `x` as outputs of `panels`; rows are the inputs, with zeros behind them up to whole steps.
///
/// `also` is called for each part of the rows first, with what `owned` has for it, in a vectorised loop.
pub(crate) fn set<T: Send>(
    panels: &mut PackedWeight,
    kind: WeightType,
    x: View<'_, f32>,
    owned: impl Iterator<Item = T>,
    also: impl Fn(View<'_, f32>, T) + Send + Sync,
) {
    let inputs = x.rows.next_multiple_of(INPUTS);
    let words = panels.reshape(kind, x.columns, inputs);
    let (count, length) = (x.columns.div_ceil(PANEL), kind.words(inputs) * PANEL);
    let target = Target::new(words, length, count);
    each(parts(x).zip(owned), |((first, x), own)| {
        let inputs = x.rows.next_multiple_of(INPUTS);
        let (at, length) = (kind.words(first) * PANEL, kind.words(inputs) * PANEL);
        simd(
            #[inline(always)]
            || {
                also(x, own);
                for panel in 0..count {
                    // SAFETY: a part of the rows of `x` has words of its own.
                    let words = unsafe { target.columns(panel, at, length) };
                    layout::panel_of_columns(kind.in_panels(), x, panel * PANEL, words);
                }
            },
        );
    });
}
