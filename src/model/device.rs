//! Where tensors live.

use crate::error::{Error, Result};
use candle_core::Device;

/// The device called `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// If the name is unknown, this build has no such devices, or the machine has none that works. There is
/// no silent fallback to another device.
pub fn device(name: &str) -> Result<Device> {
    match name.split_once(':').unwrap_or((name, "0")) {
        ("cpu", "0") => Ok(Device::Cpu),
        ("cuda", ordinal) => {
            let ordinal = ordinal.parse().map_err(|_| unknown(name))?;
            cuda(ordinal).map_err(|why| Error::Setting(format!("cannot use {name:?}: {why}")))
        }
        _ => Err(unknown(name)),
    }
}

/// What the maker calls a GPU; none for a CPU, or if its driver does not say.
pub fn gpu_name(device: &Device) -> Option<String> {
    #[cfg(feature = "cuda")]
    if let Ok(device) = device.as_cuda_device() {
        return device.cuda_stream().context().name().ok();
    }
    let _ = device;
    None
}

fn unknown(name: &str) -> Error {
    Error::Setting(format!("unknown device {name:?}; use cpu or cuda:0"))
}

#[cfg(not(feature = "cuda"))]
fn cuda(_ordinal: usize) -> std::result::Result<Device, String> {
    Err("this program was built without the cuda feature".into())
}

/// The CUDA driver is opened when it is first used, and its absence is a panic inside the driver crate:
/// it is taken here as the answer to the question whether there is one.
#[cfg(feature = "cuda")]
fn cuda(ordinal: usize) -> std::result::Result<Device, String> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let answer = std::panic::catch_unwind(|| {
        let device = Device::new_cuda_with_stream(ordinal)?;
        crate::kernels::cuda::prepare(device.as_cuda_device()?)?;
        Ok(device)
    });
    std::panic::set_hook(hook);
    match answer {
        Ok(device) => device.map_err(|error: candle_core::Error| error.to_string()),
        Err(panic) => Err(panic
            .downcast_ref::<String>()
            .cloned()
            .unwrap_or_else(|| "the CUDA libraries could not be opened".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, expected: std::result::Result<(), &str>) {
        let found = device(name).map(|_| ()).map_err(|error| error.to_string());
        assert_eq!(found, expected.map_err(str::to_owned));
    }

    #[test]
    fn names_are_checked() {
        check("cpu", Ok(()));
        check("gpu", Err("unknown device \"gpu\"; use cpu or cuda:0"));
        check("cpu:1", Err("unknown device \"cpu:1\"; use cpu or cuda:0"));
        check("cuda:x", Err("unknown device \"cuda:x\"; use cpu or cuda:0"));
    }

    #[test]
    fn a_missing_gpu_is_an_error_and_not_a_fallback() {
        let error = device("cuda:99").map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("cannot use \"cuda:99\": "), "{error}");
    }
}
