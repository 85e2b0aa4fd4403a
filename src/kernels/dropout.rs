//! Dropout (Srivastava et al., 2014; jmlr.org/papers/v15/srivastava14a.html): while a model learns, each element is
//! zero with a probability `p`, and `1 / (1 - p)` times itself otherwise.
//!
//! ```text
//! (seed, step, site) ─▶ stream ─ number r ─▶ stream of row r ─ number i ─▶ 64 bits: of elements i and half + i
//! ```
//!
//! Nothing is drawn in turn and nothing is kept: what is dropped is a function of the seed, the step, the place in
//! the model, the number of the row in the step, and the element. So it is the same wherever, whenever, and with
//! whatever other rows a row is computed, and the backward pass asks again instead of remembering.

use super::ROWS_PER_TASK;
use super::real::simd;
use crate::seed::{Stream, stream};
use rayon::prelude::*;

/// The dropout of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    probability: f64,
    seed: u64,
    step: u64,
}

/// A place in a model where dropout acts. Layers count from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// The rows of the embedding, before the first layer.
    Embedding,
    /// What the attention of a layer adds to the stream.
    Attention(usize),
    /// What the feed-forward part of a layer adds to the stream.
    FeedForward(usize),
}

impl Site {
    /// What its stream is for: part of the bits of a run.
    fn purpose(self) -> String {
        match self {
            Site::Embedding => "dropout of the embedding".into(),
            Site::Attention(layer) => format!("dropout of attention {layer}"),
            Site::FeedForward(layer) => format!("dropout of feed-forward {layer}"),
        }
    }
}

impl Dropout {
    /// Drops with a probability in a step of a run with such a seed.
    ///
    /// # Panics
    /// If the probability is not above 0 and below 1.
    pub fn new(probability: f64, seed: u64, step: u64) -> Self {
        assert!(probability > 0.0 && probability < 1.0, "a part of the elements is dropped");
        Dropout { probability, seed, step }
    }

    /// What is dropped of rows of `width` elements, the first of which has such a number in the step.
    pub(crate) fn mask(&self, site: Site, first_row: u64, width: usize) -> Mask {
        let stream = stream(self.seed, &format!("step {}", self.step), &site.purpose());
        let threshold = (self.probability * 2f64.powi(32)) as u32;
        Mask { stream, first_row, width, threshold, scale: 1.0 / (1.0 - self.probability) }
    }
}

/// What is dropped of some rows.
#[derive(Clone, Debug)]
pub(crate) struct Mask {
    stream: Stream,
    first_row: u64,
    width: usize,
    /// Elements whose bits are below it are dropped.
    threshold: u32,
    scale: f64,
}

impl Mask {
    /// Drops from rows, in place.
    pub(crate) fn apply(&self, rows: &mut [f32]) {
        let scale = self.scale as f32;
        let tasks = rows.par_chunks_mut(self.width * ROWS_PER_TASK).enumerate();
        tasks.for_each(|(task, rows)| {
            simd(
                #[inline(always)]
                || {
                    for (row, x) in rows.chunks_exact_mut(self.width).enumerate() {
                        let (front, back) = x.split_at_mut(self.width.div_ceil(2));
                        let stream = self.row(task, row);
                        for i in 0..back.len() {
                            let [first, second] = halves(stream.at(i as u64));
                            front[i] = self.kept(first, front[i], scale);
                            back[i] = self.kept(second, back[i], scale);
                        }
                        if let Some(last) = front.get_mut(back.len()) {
                            *last = self.kept(self.last(&stream), *last, scale);
                        }
                    }
                },
            );
        });
    }

    /// Adds what is left of `rows` to as many others.
    pub(crate) fn add(&self, rows: &[f32], stream: &mut [f32]) {
        let scale = self.scale as f32;
        let task = self.width * ROWS_PER_TASK;
        let tasks = stream.par_chunks_mut(task).zip(rows.par_chunks(task)).enumerate();
        tasks.for_each(|(task, (sums, rows))| {
            simd(
                #[inline(always)]
                || {
                    let rows = rows.chunks_exact(self.width);
                    for (row, (sum, x)) in sums.chunks_exact_mut(self.width).zip(rows).enumerate() {
                        let half = self.width.div_ceil(2);
                        let (front, back) = x.split_at(half);
                        let (of_front, of_back) = sum.split_at_mut(half);
                        let stream = self.row(task, row);
                        for i in 0..back.len() {
                            let [first, second] = halves(stream.at(i as u64));
                            of_front[i] += self.kept(first, front[i], scale);
                            of_back[i] += self.kept(second, back[i], scale);
                        }
                        if let Some(last) = front.get(back.len()) {
                            of_front[back.len()] += self.kept(self.last(&stream), *last, scale);
                        }
                    }
                },
            );
        });
    }

    /// What each element of so many rows is multiplied by: the twin of the above, for tensors.
    pub(crate) fn factors(&self, rows: usize) -> Vec<f64> {
        let half = self.width.div_ceil(2);
        let factor = |index: usize| {
            let (row, element) = (index / self.width, index % self.width);
            let bits = self.stream.part(self.first_row + row as u64).at((element % half) as u64);
            let bits = halves(bits)[element / half];
            if bits < self.threshold { 0.0 } else { self.scale }
        };
        (0..rows * self.width).into_par_iter().with_min_len(1 << 14).map(factor).collect()
    }

    /// The stream of a row of a task.
    #[inline(always)]
    fn row(&self, task: usize, row: usize) -> Stream {
        self.stream.part(self.first_row + (task * ROWS_PER_TASK + row) as u64)
    }

    /// The bits of the middle element of rows of odd width.
    #[inline(always)]
    fn last(&self, stream: &Stream) -> u32 {
        halves(stream.at((self.width / 2) as u64))[0]
    }

    #[inline(always)]
    fn kept(&self, bits: u32, x: f32, scale: f32) -> f32 {
        if bits < self.threshold { 0.0 } else { x * scale }
    }
}

#[inline(always)]
fn halves(bits: u64) -> [u32; 2] {
    [bits as u32, (bits >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(probability: f64, step: u64, site: Site, first_row: u64, width: usize) -> Mask {
        Dropout::new(probability, 7, step).mask(site, first_row, width)
    }

    fn rows(count: usize, width: usize) -> Vec<f32> {
        (0..count * width).map(|i| i as f32 * 0.37 - 90.0).collect()
    }

    /// Both kernels compute what the factors say.
    fn check(count: usize, width: usize) {
        let mask = mask(0.3, 5, Site::Attention(1), 1000, width);
        let (x, factors) = (rows(count, width), mask.factors(count));
        let expected: Vec<f32> = x.iter().zip(&factors).map(|(x, f)| x * *f as f32).collect();
        let mut dropped = x.clone();
        mask.apply(&mut dropped);
        assert_eq!(dropped, expected, "{count} rows of {width}");
        let mut sums = vec![0.5; x.len()];
        mask.add(&x, &mut sums);
        let expected: Vec<f32> = expected.iter().map(|x| 0.5 + x).collect();
        assert_eq!(sums, expected, "{count} rows of {width}");
    }

    #[test]
    fn the_kernels_equal_their_composed_twin() {
        for (count, width) in [(1, 1), (1, 2), (3, 7), (70, 64), (200, 33), (130, 100)] {
            check(count, width);
        }
    }

    #[test]
    fn the_share_of_zeros_is_the_probability_and_the_mean_is_kept() {
        for probability in [0.02, 0.1, 0.5, 0.9] {
            let (count, width) = (400, 1001);
            let factors = mask(probability, 1, Site::Embedding, 0, width).factors(count);
            let all = factors.len() as f64;
            let zeros = factors.iter().filter(|factor| **factor == 0.0).count() as f64;
            let deviation = (probability * (1.0 - probability) / all).sqrt();
            assert!((zeros / all - probability).abs() < 5.0 * deviation, "{probability}: {zeros}");
            let mean = factors.iter().sum::<f64>() / all;
            assert!((mean - 1.0).abs() < 5.0 * deviation / (1.0 - probability), "{mean}");
            for element in [0, width / 2, width - 1] {
                let of_column = factors.iter().skip(element).step_by(width);
                let zeros = of_column.filter(|factor| **factor == 0.0).count() as f64;
                let deviation = (probability * (1.0 - probability) / count as f64).sqrt();
                assert!((zeros / count as f64 - probability).abs() < 5.0 * deviation);
            }
        }
    }

    #[test]
    fn a_row_has_its_mask_wherever_it_is_computed() {
        let (count, width) = (150, 48);
        let whole = mask(0.4, 2, Site::FeedForward(3), 10, width).factors(count);
        for first in [0, 1, 64, 149] {
            let part = mask(0.4, 2, Site::FeedForward(3), 10 + first as u64, width);
            assert_eq!(part.factors(count - first), whole[first * width..]);
        }
        let mut one_thread = rows(count, width);
        let mut many = one_thread.clone();
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mask = mask(0.4, 2, Site::FeedForward(3), 10, width);
        pool(1).install(|| mask.apply(&mut one_thread));
        pool(5).install(|| mask.apply(&mut many));
        assert_eq!(one_thread, many);
    }

    #[test]
    fn seeds_steps_sites_and_rows_drop_independently() {
        let width = 4000;
        let of =
            |seed, step, site, row| Dropout::new(0.5, seed, step).mask(site, row, width).factors(1);
        let all = [
            of(1, 1, Site::Embedding, 0),
            of(2, 1, Site::Embedding, 0),
            of(1, 2, Site::Embedding, 0),
            of(1, 1, Site::Attention(0), 0),
            of(1, 1, Site::FeedForward(0), 0),
            of(1, 1, Site::Attention(1), 0),
            of(1, 1, Site::Embedding, 1),
        ];
        for (index, one) in all.iter().enumerate() {
            for other in &all[..index] {
                let equal = one.iter().zip(other).filter(|(one, other)| one == other).count();
                // Mean 2000, deviation 32: five deviations.
                assert!((1840..2160).contains(&equal), "{equal} of {width}");
            }
        }
    }

    #[test]
    fn what_is_dropped_never_changes() {
        let factors = mask(0.5, 3, Site::Attention(2), 11, 9).factors(1);
        let kept: String = factors.iter().map(|f| if *f > 0.0 { '1' } else { '0' }).collect();
        assert_eq!(kept, "001100111");
    }
}
