//! Kernels for NVIDIA GPUs: one operation of a step of generation each, and what launches them.
//!
//! ```text
//! embed ─┬─ rms_norm ─ product ─ rope_store ─ attention ─ product ─(+)─┬─ rms_norm ─ product ─ swiglu ─ product ─(+)─ …
//!        └─────────────────────────────────────────────────────────────┘
//! ```
//!
//! The sources (`*.cu`) are compiled to PTX by build.rs. Products are those of cuBLAS; they add to the f32 stream
//! themselves. Everything is launched through `machine::Machine`, which is a GPU, or, in tests, an emulation that
//! runs the same sources on a CPU: what is not tested by it is tensor cores and cuBLAS.

mod attend;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(test)]
pub(crate) mod emulator;
pub(crate) mod kernels;
pub(crate) mod machine;
#[cfg(test)]
mod parity;
pub(crate) mod plan;
#[cfg(test)]
pub(crate) mod testing;

/// Makes a device cheap to use, once, before anything is on it.
#[cfg(feature = "cuda")]
pub(crate) use driver::prepare;

/// Bytes that are free on a device; none if it is not one of those that say so.
///
/// # Errors
/// If the device fails.
pub fn free_bytes(device: &candle_core::Device) -> candle_core::Result<Option<usize>> {
    match device {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => driver::free_bytes(device).map(Some),
        _ => Ok(None),
    }
}
