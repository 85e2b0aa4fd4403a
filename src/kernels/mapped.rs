//! Checkpoints that are mapped into memory.

// Reason: a model that is larger than the free memory can be loaded one parameter at a time. The files must not change
// while they are read, as with any mapped file.
#![expect(unsafe_code, reason = "memory-mapped checkpoints")]

use candle_core::Result;
use candle_core::safetensors::MmapedSafetensors;
use std::path::PathBuf;

/// Files of safetensors, as one checkpoint.
///
/// # Errors
/// If one is not there, or not a checkpoint.
pub(crate) fn mapped(paths: &[PathBuf]) -> Result<MmapedSafetensors> {
    // SAFETY: the mapping owns its files, and nobody here writes to a checkpoint in its place: each is written under
    // another name and renamed.
    unsafe { MmapedSafetensors::multi(paths) }
}
