//! Rotary position embedding (Su et al., 2021; arXiv 2104.09864), half-split layout as in Hugging Face.
//!
//! In each head of width `d`, elements `i` and `i + d/2` are one plane, turned by the angle
//! `position * frequency(i)`. The gradient is the turn back.

use super::{
    ROWS_PER_TASK,
    cuda::training,
    dispatch,
    real::{Real, simd},
    share::each,
    storage::{elements, tensor},
};
use candle_core::{D, DType, Device, Result, Tensor};
use rayon::prelude::*;

/// Cosines and sines for every position up to a maximum.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// `(positions, head width / 2)`
    cosines: Tensor,
    /// `(positions, head width / 2)`
    sines: Tensor,
}

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Turn {
    /// By the angle of the position: the forward pass.
    Forward,
    /// Back by the same angle: the gradient.
    Back,
}

impl RopeTable {
    /// The table of `positions` rows for the given frequencies (radians a position).
    ///
    /// Angles are products of f32, as in the reference implementation, so that logits agree at far
    /// positions too.
    pub fn new(
        frequencies: &[f32],
        positions: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let angles = (0..positions)
            .flat_map(|position| frequencies.iter().map(move |f| f64::from(position as f32 * f)));
        let (sines, cosines): (Vec<f64>, Vec<f64>) = angles.map(f64::sin_cos).unzip();
        let shape = (positions, frequencies.len());
        let table = |values| Tensor::from_vec(values, shape, device)?.to_dtype(dtype);
        Ok(RopeTable { cosines: table(cosines)?, sines: table(sines)? })
    }

    /// `(positions, head width / 2)`
    pub(crate) fn cosines(&self) -> &Tensor {
        &self.cosines
    }

    /// `(positions, head width / 2)`
    pub(crate) fn sines(&self) -> &Tensor {
        &self.sines
    }

    /// The same table in another type and place.
    #[cfg(test)]
    pub(crate) fn moved(&self, dtype: DType, device: &Device) -> Result<Self> {
        let moved = |table: &Tensor| table.to_dtype(dtype)?.to_device(device);
        Ok(RopeTable { cosines: moved(&self.cosines)?, sines: moved(&self.sines)? })
    }

    /// The number of positions the table covers.
    pub fn positions(&self) -> usize {
        self.cosines.dims()[0]
    }
}

/// Turns the heads of `x (rows, heads * width)`; row `i` is at `positions[i]`.
///
/// # Panics
/// If a position lies beyond the table.
pub fn rope(x: &Tensor, table: &RopeTable, positions: &[u32], turn: Turn) -> Result<Tensor> {
    let furthest = positions.iter().max().map_or(0, |&p| p as usize);
    assert!(furthest < table.positions(), "position {furthest} is beyond the rotary table");
    dispatch!(
        x,
        T => kernel::<T>(x, table, positions, turn),
        machine => training::rope(&*machine, x, table, positions, turn),
        composed(x, table, positions, turn)
    )
}

fn kernel<T: Real>(x: &Tensor, table: &RopeTable, positions: &[u32], turn: Turn) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    assert_eq!(rows, positions.len(), "one position a row");
    let (input, cosines, sines) =
        (elements::<T>(x)?, elements::<T>(&table.cosines)?, elements::<T>(&table.sines)?);
    let (cosines, sines) = (&*cosines, &*sines);
    let half = table.cosines.dim(1)?;
    let sign = if turn == Turn::Forward { T::ONE } else { -T::ONE };
    let mut out = vec![T::ZERO; input.len()];
    out.par_chunks_mut(ROWS_PER_TASK * width)
        .zip(input.par_chunks(ROWS_PER_TASK * width).zip(positions.par_chunks(ROWS_PER_TASK)))
        .for_each(|(out, (x, positions))| {
            simd(
                #[inline(always)]
                || {
                    let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
                    for ((out, x), &position) in rows.zip(positions) {
                        let at = position as usize * half;
                        let (cos, sin) = (&cosines[at..at + half], &sines[at..at + half]);
                        let heads = out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half));
                        for (out, x) in heads {
                            turn_head(out, x, cos, sin, sign);
                        }
                    }
                },
            );
        });
    tensor(out, x.shape())
}

/// Turns rows of queries, of keys, or of both, in place.
///
/// # Panics
/// If a position lies beyond the table.
pub(crate) fn turn_rows<const PARTS: usize>(
    parts: [&mut [f32]; PARTS],
    table: &RopeTable,
    positions: &[u32],
    turn: Turn,
) -> Result<()> {
    let sign = if turn == Turn::Forward { 1.0 } else { -1.0 };
    let (cosines, sines) = (elements::<f32>(&table.cosines)?, elements::<f32>(&table.sines)?);
    let (cosines, sines) = (&*cosines, &*sines);
    let half = table.cosines.dim(1)?;
    let tasks = parts.into_iter().flat_map(|part| {
        let width = part.len() / positions.len();
        part.chunks_mut(ROWS_PER_TASK * width).zip(positions.chunks(ROWS_PER_TASK))
    });
    let turn = |(rows, positions): (&mut [f32], &[u32])| {
        let width = rows.len() / positions.len();
        simd(
            #[inline(always)]
            || {
                for (row, &position) in rows.chunks_exact_mut(width).zip(positions) {
                    let at = position as usize * half;
                    let (cos, sin) = (&cosines[at..at + half], &sines[at..at + half]);
                    for head in row.chunks_exact_mut(2 * half) {
                        let (left, right) = head.split_at_mut(half);
                        for i in 0..half {
                            let (x, y, sin) = (left[i], right[i], sin[i] * sign);
                            left[i] = x * cos[i] - y * sin;
                            right[i] = y * cos[i] + x * sin;
                        }
                    }
                }
            },
        );
    };
    match positions.len() > ROWS_PER_TASK {
        true => each(tasks, turn),
        false => tasks.for_each(turn),
    }
    Ok(())
}

#[inline(always)]
fn turn_head<T: Real>(out: &mut [T], x: &[T], cos: &[T], sin: &[T], sign: T) {
    let half = cos.len();
    let (left, right) = x.split_at(half);
    let (out_left, out_right) = out.split_at_mut(half);
    for i in 0..half {
        let sin = sin[i] * sign;
        out_left[i] = left[i] * cos[i] - right[i] * sin;
        out_right[i] = right[i] * cos[i] + left[i] * sin;
    }
}

fn composed(x: &Tensor, table: &RopeTable, positions: &[u32], turn: Turn) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let half = table.cosines.dim(1)?;
    let positions = Tensor::new(positions, x.device())?;
    let cos = table.cosines.index_select(&positions, 0)?.unsqueeze(1)?;
    let sin = table.sines.index_select(&positions, 0)?.unsqueeze(1)?;
    let sin = if turn == Turn::Forward { sin } else { sin.neg()? };
    let x = x.reshape((rows, width / (2 * half), 2 * half))?;
    let (left, right) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let out_left = (left.broadcast_mul(&cos)? - right.broadcast_mul(&sin)?)?;
    let out_right = (right.broadcast_mul(&cos)? + left.broadcast_mul(&sin)?)?;
    Tensor::cat(&[out_left, out_right], D::Minus1)?.reshape((rows, width))
}

#[cfg(test)]
mod tests {
    use super::super::twin::{close, random};
    use super::*;

    fn check(heads: usize, half: usize, dtype: DType) {
        let frequencies: Vec<f32> = (0..half).map(|i| 1.0 / 10f32.powi(i as i32)).collect();
        let table = RopeTable::new(&frequencies, 40, dtype, &Device::Cpu).unwrap();
        let positions: Vec<u32> = (0..130).map(|row| row % 40).collect();
        let x = random(&[130, heads * 2 * half], dtype);
        for turn in [Turn::Forward, Turn::Back] {
            let ours = rope(&x, &table, &positions, turn).unwrap();
            close(&ours, &composed(&x, &table, &positions, turn).unwrap(), "output");
        }
        let there = rope(&x, &table, &positions, Turn::Forward).unwrap();
        close(&rope(&there, &table, &positions, Turn::Back).unwrap(), &x, "there and back");
    }

    #[test]
    fn the_kernel_equals_its_composed_twin() {
        for dtype in [DType::F32, DType::F64] {
            for (heads, half) in [(1, 1), (3, 4), (2, 32)] {
                check(heads, half, dtype);
            }
        }
    }
}
