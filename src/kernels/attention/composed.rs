//! Attention as plain tensor operations: the path of every device without a kernel, and the twin of the
//! CPU kernel in tests. Holds all scores of a span at once.

use super::{Attended, Heads};
use candle_core::{D, DType, Result, Tensor};
use std::ops::Range;

pub(super) fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spans: &[Range<usize>],
    heads: &Heads,
) -> Result<Attended> {
    let outputs = over_spans(q, spans, |span| {
        let part = Part::new(q, k, v, span, heads)?;
        part.merge(&part.weights()?.matmul(&part.v)?)
    })?;
    let log_sums = Tensor::zeros(1, DType::F32, q.device())?; // unused: the weights are computed again
    Ok(Attended { output: outputs, log_sums })
}

pub(super) fn backward(
    [q, k, v]: [&Tensor; 3],
    output: &Tensor,
    gradient: &Tensor,
    spans: &[Range<usize>],
    heads: &Heads,
) -> Result<[Tensor; 3]> {
    let mut gradients = [q, k, v].map(|_| Vec::new());
    for span in spans.iter().filter(|span| !span.is_empty()) {
        let part = Part::new(q, k, v, span, heads)?;
        let weights = part.weights()?;
        let gradient = part.split(&gradient.narrow(0, span.start, span.len())?, heads.query)?;
        let output = part.split(&output.narrow(0, span.start, span.len())?, heads.query)?;
        let along = (&gradient * &output)?.sum_keepdim(D::Minus1)?;
        let of_weights = gradient.matmul(&part.v.transpose(1, 2)?.contiguous()?)?;
        let of_scores = (of_weights.broadcast_sub(&along)? * &weights)?;
        let of_scores = (of_scores * heads.scale())?;
        let of_q = of_scores.matmul(&part.k)?;
        let of_k = of_scores.transpose(1, 2)?.contiguous()?.matmul(&part.q)?;
        let of_v = weights.transpose(1, 2)?.contiguous()?.matmul(&gradient)?;
        for (all, one) in
            gradients.iter_mut().zip([of_q, part.sum_groups(&of_k)?, part.sum_groups(&of_v)?])
        {
            all.push(part.merge(&one)?);
        }
    }
    let [of_q, of_k, of_v] = gradients;
    Ok([with_gaps(q, spans, of_q)?, with_gaps(k, spans, of_k)?, with_gaps(v, spans, of_v)?])
}

/// One span with heads as the first dimension, keys and values repeated for each query head.
struct Part {
    q: Tensor, // (query heads, rows, width)
    k: Tensor, // (query heads, rows, width)
    v: Tensor, // (query heads, rows, width)
    heads: Heads,
    rows: usize,
}

impl Part {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, span: &Range<usize>, heads: &Heads) -> Result<Self> {
        let rows = span.len();
        let mut part = Part { q: q.clone(), k: k.clone(), v: v.clone(), heads: *heads, rows };
        part.q = part.split(&q.narrow(0, span.start, rows)?, heads.query)?;
        for (to, from) in [(&mut part.k, k), (&mut part.v, v)] {
            let narrow = from.narrow(0, span.start, rows)?;
            let split = narrow.reshape((rows, heads.key_value, 1, heads.width))?;
            let repeated =
                split.broadcast_as((rows, heads.key_value, heads.group(), heads.width))?;
            let repeated = repeated.contiguous()?.reshape((rows, heads.query, heads.width))?;
            *to = repeated.transpose(0, 1)?.contiguous()?;
        }
        Ok(part)
    }

    /// `(rows, heads * width)` to `(heads, rows, width)`.
    fn split(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        x.reshape((self.rows, heads, self.heads.width))?.transpose(0, 1)?.contiguous()
    }

    /// `(heads, rows, width)` to `(rows, heads * width)`.
    fn merge(&self, x: &Tensor) -> Result<Tensor> {
        let heads = x.dim(0)?;
        x.transpose(0, 1)?.contiguous()?.reshape((self.rows, heads * self.heads.width))
    }

    /// `(query heads, rows, width)` to `(key-value heads, rows, width)`.
    fn sum_groups(&self, x: &Tensor) -> Result<Tensor> {
        let Heads { key_value, width, .. } = self.heads;
        x.reshape((key_value, self.heads.group(), self.rows, width))?.sum(1)
    }

    /// The softmax of the visible scores, `(query heads, rows, rows)`.
    fn weights(&self) -> Result<Tensor> {
        let scores = (self.q.matmul(&self.k.transpose(1, 2)?.contiguous()?)? * self.heads.scale())?;
        let hidden: Vec<f32> = (0..self.rows)
            .flat_map(|row| {
                let visible = self.heads.first_visible(row)..=row;
                (0..self.rows).map(move |column| match visible.contains(&column) {
                    true => 0.0,
                    false => f32::NEG_INFINITY,
                })
            })
            .collect();
        let hidden = Tensor::from_vec(hidden, (1, self.rows, self.rows), self.q.device())?;
        let wide = if scores.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let scores = scores.to_dtype(wide)?.broadcast_add(&hidden.to_dtype(wide)?)?;
        let shifted = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?;
        weights.to_dtype(self.q.dtype())
    }
}

fn over_spans(
    like: &Tensor,
    spans: &[Range<usize>],
    one: impl Fn(&Range<usize>) -> Result<Tensor>,
) -> Result<Tensor> {
    let parts = spans.iter().filter(|span| !span.is_empty()).map(one).collect::<Result<_>>()?;
    with_gaps(like, spans, parts)
}

/// Puts the parts at their spans and zeros between them.
fn with_gaps(like: &Tensor, spans: &[Range<usize>], parts: Vec<Tensor>) -> Result<Tensor> {
    let (rows, width) = like.dims2()?;
    let zeros = |rows| Tensor::zeros((rows, width), like.dtype(), like.device());
    let (mut all, mut end) = (Vec::new(), 0);
    for (span, part) in spans.iter().filter(|span| !span.is_empty()).zip(parts) {
        if span.start > end {
            all.push(zeros(span.start - end)?);
        }
        all.push(part);
        end = span.end;
    }
    if end < rows {
        all.push(zeros(rows - end)?);
    }
    Tensor::cat(&all, 0)
}
