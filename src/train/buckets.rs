//! The gradients of several devices, added up in pieces of one size.
//!
//! ```text
//! gradients, in the order of their names   │ a │ b        │ c │ d  …
//! buckets                                  │ 0       │ 1       │ 2  …
//! ```
//!
//! They are laid out one behind the other and cut every [`BYTES`], whatever the borders of parameters, so that
//! what is summed at a time depends on the model alone. A bucket is copied together, summed, and copied back.

use crate::kernels::all_reduce::AllReduce;
use candle_core::{DType, Device, Result, Tensor};

/// Bytes of a bucket: as many as in PyTorch's DistributedDataParallel (Li et al., 2020; arXiv 2006.15704).
pub(super) const BYTES: usize = 25 << 20;

/// A run of a parameter's elements in a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    parameter: usize,
    /// Its first element in the parameter, and in the bucket.
    start: usize,
    offset: usize,
    length: usize,
}

/// What gradients of some lengths are summed in.
#[derive(Debug)]
pub(super) struct Buckets {
    pieces: Vec<Vec<Piece>>,
    /// The memory of a bucket on each device.
    memory: Vec<Tensor>,
}

impl Buckets {
    /// For parameters of so many elements, on each of some devices.
    ///
    /// # Errors
    /// If a device has no room.
    pub(super) fn new(lengths: &[usize], bytes: usize, devices: &[Device]) -> Result<Self> {
        let size = (bytes / size_of::<f32>()).min(lengths.iter().sum()).max(1);
        let memory = devices.iter().map(|device| Tensor::zeros(size, DType::F32, device));
        Ok(Buckets { pieces: cut(lengths, size), memory: memory.collect::<Result<_>>()? })
    }

    /// Replaces the gradients of each rank by their sums over all ranks, and waits for them. They are flat, in f32.
    ///
    /// # Errors
    /// If a device fails.
    pub(super) fn sum(&self, ranks: &[Vec<Tensor>], over: &dyn AllReduce) -> Result<()> {
        for bucket in &self.pieces {
            let length = bucket.iter().map(|piece| piece.length).sum();
            let part = |memory: &Tensor| memory.narrow(0, 0, length);
            let parts = self.memory.iter().map(part).collect::<Result<Vec<_>>>()?;
            for (part, gradients) in parts.iter().zip(ranks) {
                bucket.iter().try_for_each(|piece| {
                    let own = gradients[piece.parameter].narrow(0, piece.start, piece.length)?;
                    part.slice_set(&own, 0, piece.offset)
                })?;
            }
            over.sum(&parts)?;
            for (part, gradients) in parts.iter().zip(ranks) {
                bucket.iter().try_for_each(|piece| {
                    let summed = part.narrow(0, piece.offset, piece.length)?;
                    gradients[piece.parameter].slice_set(&summed, 0, piece.start)
                })?;
            }
        }
        over.wait()
    }
}

/// Buckets of `size` elements, but for the last.
fn cut(lengths: &[usize], size: usize) -> Vec<Vec<Piece>> {
    let (mut buckets, mut open, mut filled) = (Vec::new(), Vec::new(), 0);
    for (parameter, &length) in lengths.iter().enumerate() {
        let mut start = 0;
        while start < length {
            let taken = (length - start).min(size - filled);
            open.push(Piece { parameter, start, offset: filled, length: taken });
            (start, filled) = (start + taken, filled + taken);
            if filled == size {
                buckets.push(std::mem::take(&mut open));
                filled = 0;
            }
        }
    }
    if !open.is_empty() {
        buckets.push(open);
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::all_reduce::HostSum;

    fn check(lengths: &[usize], size: usize, expected: &[&[[usize; 4]]]) {
        let piece = |piece: &Piece| [piece.parameter, piece.start, piece.offset, piece.length];
        let found: Vec<Vec<[usize; 4]>> =
            cut(lengths, size).iter().map(|bucket| bucket.iter().map(piece).collect()).collect();
        assert_eq!(found, expected, "{lengths:?} by {size}");
    }

    #[test]
    fn gradients_are_cut_every_so_many_elements_whatever_their_borders() {
        check(&[3, 7], 4, &[&[[0, 0, 0, 3], [1, 0, 3, 1]], &[[1, 1, 0, 4]], &[[1, 5, 0, 2]]]);
        check(&[2, 2], 4, &[&[[0, 0, 0, 2], [1, 0, 2, 2]]]);
        check(&[5], 9, &[&[[0, 0, 0, 5]]]);
        check(&[], 9, &[]);
    }

    #[test]
    fn sums_do_not_depend_on_the_size_of_buckets() {
        let lengths = [3, 7, 1, 12];
        for bytes in [4, 20, 64, BYTES] {
            let gradient = |rank: usize, parameter: usize| {
                let element = |i| (1000 * rank + 100 * parameter + i) as f32;
                let values: Vec<f32> = (0..lengths[parameter]).map(element).collect();
                Tensor::new(values, &Device::Cpu).unwrap()
            };
            let of_rank = |rank| (0..4).map(|parameter| gradient(rank, parameter)).collect();
            let ranks: Vec<Vec<Tensor>> = (0..3).map(of_rank).collect();
            let buckets = Buckets::new(&lengths, bytes, &vec![Device::Cpu; 3]).unwrap();
            buckets.sum(&ranks, &HostSum).unwrap();
            for gradients in &ranks {
                for (parameter, gradient) in gradients.iter().enumerate() {
                    let element = |i| (3000 + 3 * (100 * parameter + i)) as f32;
                    let expected: Vec<f32> = (0..lengths[parameter]).map(element).collect();
                    assert_eq!(gradient.to_vec1::<f32>().unwrap(), expected, "{bytes} bytes");
                }
            }
        }
    }
}
