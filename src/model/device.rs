//! Where tensors live.

use crate::error::{Error, Result};
use crate::kernels::all_reduce::find_nccl;
use candle_core::Device;

/// The device called `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// If the name is unknown, this build has no such devices, or the machine has none that works. There is
/// no silent fallback to another device.
pub fn device(name: &str) -> Result<Device> {
    match place(name)? {
        Place::Cpu => Ok(Device::Cpu),
        Place::Gpu(ordinal) => cuda(ordinal).map_err(|why| unusable(name, &why)),
    }
}

/// The devices that train one model together: one of any kind, or several GPUs, as `cuda:0,cuda:1`.
///
/// # Errors
/// If a device cannot be used, is no GPU beside others, or is named twice, or if this build or machine has no
/// NCCL for several.
pub fn group(names: &str) -> Result<Vec<Device>> {
    let several: Vec<&str> = names.split(',').map(str::trim).collect();
    if let [name] = several[..] {
        return Ok(vec![device(name)?]);
    }
    let mut seen = Vec::with_capacity(several.len());
    for name in &several {
        match place(name)? {
            Place::Cpu => {
                let why = "all cores of a CPU work on one model; only GPUs are used side by side";
                return Err(unusable(names, why));
            }
            Place::Gpu(ordinal) if seen.contains(&ordinal) => {
                return Err(unusable(names, &format!("GPU {ordinal} is named twice")));
            }
            Place::Gpu(ordinal) => seen.push(ordinal),
        }
    }
    find_nccl().map_err(|why| unusable(names, &why))?;
    several.into_iter().map(device).collect()
}

enum Place {
    Cpu,
    Gpu(usize),
}

fn place(name: &str) -> Result<Place> {
    if name.contains(',') {
        let what = format!("one device is wanted here, not several: {name:?}");
        return Err(Error::Setting(what));
    }
    match name.split_once(':').unwrap_or((name, "0")) {
        ("cpu", "0") => Ok(Place::Cpu),
        ("cuda", ordinal) => Ok(Place::Gpu(ordinal.parse().map_err(|_| unknown(name))?)),
        _ => Err(unknown(name)),
    }
}

fn unusable(names: &str, why: &str) -> Error {
    Error::Setting(format!("cannot use {names:?}: {why}"))
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

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize) -> std::result::Result<Device, String> {
    crate::kernels::cuda::opened(|| {
        let device = Device::new_cuda_with_stream(ordinal)?;
        crate::kernels::cuda::prepare(device.as_cuda_device()?)?;
        Ok(device)
    })
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
        check("cpu,cpu", Err("one device is wanted here, not several: \"cpu,cpu\""));
    }

    fn check_group(names: &str, expected: std::result::Result<usize, &str>) {
        let found = group(names).map(|devices| devices.len()).map_err(|error| error.to_string());
        match (found, expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected),
            (Err(found), Err(said)) => assert!(found.contains(said), "{said:?} in {found}"),
            (found, _) => panic!("{names}: {found:?}"),
        }
    }

    #[test]
    fn a_group_is_of_gpus_each_of_them_once() {
        check_group("cpu", Ok(1));
        check_group("cpu,cpu", Err("cannot use \"cpu,cpu\": all cores of a CPU work on one model"));
        check_group("cuda:0,cpu", Err("all cores of a CPU"));
        check_group("cuda:98,cuda:98", Err("\"cuda:98,cuda:98\": GPU 98 is named twice"));
        check_group("cuda:0, cuda", Err("GPU 0 is named twice"));
        check_group("cuda:98,gpu:1", Err("unknown device \"gpu:1\""));
        check_group("cuda:98,", Err("unknown device \"\""));
        check_group("cuda:98,cuda:99", Err("cannot use \"cuda:98"));
    }

    #[test]
    fn a_missing_gpu_is_an_error_and_not_a_fallback() {
        let error = device("cuda:99").map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("cannot use \"cuda:99\": "), "{error}");
    }
}
