//! Sums over several devices: each of them ends up with the same one.
//!
//! ```text
//! part of rank 0 ─┐                ┌─▶ sum
//! part of rank 1 ─┼─▶ AllReduce ─┼─▶ sum      each in the place of its part
//! part of rank 2 ─┘                └─▶ sum
//! ```

use candle_core::{Device, Result, Tensor, bail};
use std::fmt::Debug;

/// Whatever adds up over devices. A device's place in the group is its rank.
pub(crate) trait AllReduce: Debug + Send {
    /// Replaces each of `parts`, one a rank, by their sum: flat and contiguous tensors in f32 of one length, which
    /// share no memory. What is done next on a device sees the sum, though it may not be there when this returns.
    ///
    /// # Errors
    /// If the parts are not such, or a device fails.
    fn sum(&self, parts: &[Tensor]) -> Result<()>;

    /// Returns when all sums that were asked for are there.
    ///
    /// # Errors
    /// If a device has failed. The others do not wait for it.
    fn wait(&self) -> Result<()>;
}

/// Adds on the host, in the order of ranks: `((0 + 1) + 2) + …`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostSum;

impl AllReduce for HostSum {
    fn sum(&self, parts: &[Tensor]) -> Result<()> {
        let Some((first, rest)) = parts.split_first() else { bail!("there is nothing to add up") };
        let mut sum = first.to_device(&Device::Cpu)?.copy()?;
        for part in rest {
            sum = (sum + part.to_device(&Device::Cpu)?)?;
        }
        parts.iter().try_for_each(|part| part.slice_set(&sum.to_device(part.device())?, 0, 0))
    }

    fn wait(&self) -> Result<()> {
        Ok(())
    }
}

/// Sums by NCCL, over GPUs of this machine, each of them once.
///
/// # Errors
/// If this build has no NCCL, or the library refuses.
#[cfg(feature = "nccl")]
pub(crate) fn nccl(devices: &[Device]) -> Result<Box<dyn AllReduce>> {
    Ok(Box::new(super::cuda::nccl::Nccl::new(devices)?))
}

/// Whether NCCL can be used, or why not.
#[cfg(feature = "nccl")]
pub(crate) fn find_nccl() -> std::result::Result<(), String> {
    super::cuda::nccl::find()
}

#[cfg(not(feature = "nccl"))]
pub(crate) fn nccl(_devices: &[Device]) -> Result<Box<dyn AllReduce>> {
    match find_nccl() {
        Ok(()) => unreachable!("it is not in this program"),
        Err(why) => bail!("{why}"),
    }
}

#[cfg(not(feature = "nccl"))]
pub(crate) fn find_nccl() -> std::result::Result<(), String> {
    Err("this program was built without the nccl feature, which training on several GPUs needs"
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_gets_the_sum_in_the_order_of_ranks() {
        let values = [[1e8f32, 1.0], [1.0, 2.0], [-1e8, 4.0]];
        let parts = values.map(|part| Tensor::new(&part, &Device::Cpu).unwrap());
        HostSum.sum(&parts).unwrap();
        HostSum.wait().unwrap();
        for part in &parts {
            // 1e8 + 1 is 1e8 in f32: from another end the first sum would be 1.
            assert_eq!(part.to_vec1::<f32>().unwrap(), [0.0, 7.0]);
        }
    }

    #[test]
    fn parts_of_other_lengths_are_refused() {
        let part = |length: usize| Tensor::zeros(length, candle_core::DType::F32, &Device::Cpu);
        assert!(HostSum.sum(&[part(2).unwrap(), part(3).unwrap()]).is_err());
        assert!(HostSum.sum(&[]).is_err());
    }
}
