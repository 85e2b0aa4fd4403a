//! Kernels for NVIDIA GPUs: one operation of a step of generation or of training each, and what launches them.
//!
//! ```text
//! embed ─┬─ rms_norm ─ product ─ rope_store ─ attention ─ product ─(+)─┬─ rms_norm ─ product ─ swiglu ─ product ─(+)─ …
//!        └─────────────────────────────────────────────────────────────┘
//! ```
//!
//! That is a block in generation; training (`training`) takes kernels of its own, on tensors.
//!
//! The sources (`*.cu`) are compiled to PTX by build.rs. Products are those of cuBLAS; they add to the f32 stream
//! themselves. Everything is launched through `machine::Machine`, which is a GPU, or, in tests, an emulation that
//! runs the same sources on a CPU: what is not tested by it is tensor cores and cuBLAS.

mod attend;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(test)]
pub(crate) mod emulator;
#[cfg(test)]
pub(crate) mod footprint;
pub(crate) mod kernels;
pub(crate) mod machine;
#[cfg(feature = "nccl")]
pub(crate) mod nccl;
#[cfg(test)]
mod parity;
pub(crate) mod plan;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod training;

/// Makes a device cheap to use, once, before anything is on it.
#[cfg(feature = "cuda")]
pub(crate) use driver::prepare;

/// What a library of CUDA answers that is opened when it is first used. Its absence is a panic inside the driver
/// crate, which is taken here as an answer, too.
#[cfg(feature = "cuda")]
pub(crate) fn opened<T>(
    ask: impl FnOnce() -> candle_core::Result<T>,
) -> std::result::Result<T, String> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let answer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(ask));
    std::panic::set_hook(hook);
    match answer {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(panic) => Err(panic
            .downcast_ref::<String>()
            .cloned()
            .unwrap_or_else(|| "the CUDA libraries could not be opened".into())),
    }
}

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

/// The most bytes that were in use on each of some devices at a time, added up; none where one does not count them, as a CPU.
///
/// # Errors
/// If a device fails.
pub fn peak_bytes(devices: &[candle_core::Device]) -> candle_core::Result<Option<u64>> {
    let one = |device: &candle_core::Device| match device {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => driver::peak_bytes(device),
        _ => Ok(None),
    };
    let all = devices.iter().map(one).collect::<candle_core::Result<Option<Vec<u64>>>>();
    Ok(all?.map(|all| all.iter().sum()))
}

/// Has [`peak_bytes`] begin anew with what is in use now.
///
/// # Errors
/// If a device fails.
pub fn forget_peak(devices: &[candle_core::Device]) -> candle_core::Result<()> {
    devices.iter().try_for_each(|device| match device {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => driver::forget_peak(device),
        _ => Ok(()),
    })
}
