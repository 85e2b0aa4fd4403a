//! Causal attention within the items of packed rows, forward and backward.
//!
//! ```text
//! rows   0 1 2 3 4 5 6 7 8 9      spans 0..4, 4..10: a row sees the rows of its own span up to
//! span   a a a a b b b b b b      itself, at most `window` of them. Nothing is computed for the rest.
//! ```
//!
//! Query heads come in groups that share a key-value head (Ainslie et al., 2023; arXiv 2305.13245).
//! Scores exist for one block of query rows at a time; the backward pass recomputes them from the saved
//! log-sum-exp (Dao et al., 2022; arXiv 2205.14135).

mod composed;
mod kernel;
pub(crate) mod tiled;

use super::cuda::training;
use super::dispatch;
use candle_core::{Result, Tensor};
use std::ops::Range;

/// How the columns of query, key and value rows divide into heads, and how far back a row sees.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key-value heads; divides `query`.
    pub key_value: usize,
    /// Columns of one head.
    pub width: usize,
    /// A row sees the last `window` rows, itself included. `None`: all.
    pub window: Option<usize>,
}

impl Heads {
    /// Query heads that share one key-value head.
    pub fn group(&self) -> usize {
        self.query / self.key_value
    }

    /// The factor on scores.
    pub fn scale(&self) -> f64 {
        1.0 / (self.width as f64).sqrt()
    }

    /// The first of the rows before `row` that it sees.
    pub fn first_visible(&self, row: usize) -> usize {
        self.window.map_or(0, |window| (row + 1).saturating_sub(window))
    }
}

/// The output of [`attention`], and what its backward pass needs of it.
#[derive(Clone, Debug)]
pub struct Attended {
    /// `(rows, query heads * width)`; zero for rows outside all spans.
    pub output: Tensor,
    /// Logarithm of the sum of exponentiated scores, in the layout of the kernel that made it.
    log_sums: Tensor,
}

/// Attends within each of `spans`, which are ordered and do not overlap.
///
/// `q (rows, query heads * width)`, `k` and `v (rows, key-value heads * width)`, already turned.
///
/// # Panics
/// If spans overlap or reach beyond the rows.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spans: &[Range<usize>],
    heads: &Heads,
) -> Result<Attended> {
    check(spans, q.dim(0)?);
    dispatch!(
        q,
        T => kernel::forward::<T>(q, k, v, spans, heads),
        machine if training::has_width(heads.width) => {
            let (output, log_sums) = training::attention(&*machine, [q, k, v], spans, heads)?;
            Ok(Attended { output, log_sums })
        },
        composed::forward(q, k, v, spans, heads)
    )
}

/// The gradients of `q`, `k` and `v` given that of the output.
pub fn attention_backward(
    [q, k, v]: [&Tensor; 3],
    attended: &Attended,
    gradient: &Tensor,
    spans: &[Range<usize>],
    heads: &Heads,
) -> Result<[Tensor; 3]> {
    check(spans, q.dim(0)?);
    dispatch!(
        q,
        T => kernel::backward::<T>([q, k, v], attended, gradient, spans, heads),
        machine if training::has_width(heads.width) => {
            let saved = [&attended.output, &attended.log_sums];
            training::attention_backward(&*machine, [q, k, v], saved, gradient, (spans, heads))
        },
        composed::backward([q, k, v], &attended.output, gradient, spans, heads)
    )
}

fn check(spans: &[Range<usize>], rows: usize) {
    let mut end = 0;
    for span in spans {
        assert!(end <= span.start && span.start <= span.end, "spans out of order: {spans:?}");
        end = span.end;
    }
    assert!(end <= rows, "a span reaches beyond the {rows} rows: {spans:?}");
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "one span is a case of its own")]
mod tests {
    use super::super::twin::{close, random};
    use super::*;
    use candle_core::DType;

    fn check(rows: usize, spans: &[Range<usize>], heads: Heads, dtype: DType) {
        let (wide, narrow) = (heads.query * heads.width, heads.key_value * heads.width);
        let [q, k, v] = [wide, narrow, narrow].map(|width| random(&[rows, width], dtype));
        let gradient = random(&[rows, wide], dtype);
        let ours = attention(&q, &k, &v, spans, &heads).unwrap();
        let twin = composed::forward(&q, &k, &v, spans, &heads).unwrap();
        close(&ours.output, &twin.output, "output");
        let ours = attention_backward([&q, &k, &v], &ours, &gradient, spans, &heads).unwrap();
        let twin =
            composed::backward([&q, &k, &v], &twin.output, &gradient, spans, &heads).unwrap();
        for (name, (ours, twin)) in ["q", "k", "v"].iter().zip(ours.iter().zip(&twin)) {
            close(ours, twin, &format!("gradient of {name}"));
        }
    }

    const HEADS: Heads = Heads { query: 4, key_value: 2, width: 8, window: None };

    #[test]
    fn the_kernel_equals_its_composed_twin() {
        for dtype in [DType::F32, DType::F64] {
            check(1, &[0..1], HEADS, dtype);
            check(150, &[0..150], HEADS, dtype);
            check(150, &[0..1, 1..70, 70..70, 75..150], HEADS, dtype);
            check(90, &[0..90], Heads { key_value: 4, ..HEADS }, dtype);
            check(90, &[0..90], Heads { key_value: 1, width: 5, ..HEADS }, dtype);
        }
    }

    #[test]
    fn a_window_hides_what_lies_further_back() {
        for window in [1, 3, 64, 100, 1000] {
            let heads = Heads { window: Some(window), ..HEADS };
            check(200, &[0..130, 130..200], heads, DType::F64);
        }
    }

    #[test]
    fn items_packed_together_attend_as_if_alone() {
        let [q, k, v] = [32, 16, 16].map(|width| random(&[50, width], DType::F32));
        let together = attention(&q, &k, &v, &[0..20, 20..50], &HEADS).unwrap().output;
        for span in [0..20, 20..50] {
            let part = |t: &Tensor| t.narrow(0, span.start, span.len()).unwrap();
            let alone =
                attention(&part(&q), &part(&k), &part(&v), &[0..span.len()], &HEADS).unwrap();
            close(&part(&together), &alone.output, "item");
        }
    }
}
