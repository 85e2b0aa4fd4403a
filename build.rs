//! With the `cuda` feature only: compiles the kernels to PTX, and gives the linker the CUDA runtime (static) and
//! empty stand-ins for the CUDA libraries that are opened at run time, so that the program starts on machines
//! without them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const EMPTY_ARCHIVE: &[u8] = b"!<arch>\n";
const KERNELS: &str = "src/kernels/cuda";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={KERNELS}");
    for variable in ["CUDA_HOME", "NVCC", "CUDA_COMPUTE_CAP"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let home = env::var_os("CUDA_HOME").map(PathBuf::from);
    compile_kernels(&out, home.as_deref());
    for library in ["cuda", "nvrtc", "curand", "cublas", "cublasLt", "nccl"] {
        let path = out.join(format!("lib{library}.a"));
        fs::write(path, EMPTY_ARCHIVE).expect("OUT_DIR can be written");
    }
    let real = home.map(|home| home.join("lib/libcudart_static.a")).filter(|path| path.exists());
    let runtime = real.map_or_else(
        || EMPTY_ARCHIVE.to_vec(),
        |path| fs::read(path).expect("CUDA_HOME can be read"),
    );
    fs::write(out.join("libcudart.a"), runtime).expect("OUT_DIR can be written");
    println!("cargo:rustc-link-search=native={}", out.display());
}

/// Compiles each source to PTX, which the driver compiles for the GPU it finds.
fn compile_kernels(out: &Path, home: Option<&Path>) {
    let nvcc = env::var_os("NVCC").map(PathBuf::from);
    let nvcc = nvcc.or_else(|| home.map(|home| home.join("bin/nvcc")));
    let nvcc = nvcc.unwrap_or_else(|| "nvcc".into());
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "90".into());
    let files = fs::read_dir(KERNELS).expect("the kernels are there");
    for file in files {
        let source = file.expect("their folder can be read").path();
        if source.extension().is_none_or(|extension| extension != "cu") {
            continue;
        }
        let name = source.file_stem().expect("it has a name").to_owned();
        let status = Command::new(&nvcc)
            .args(["--ptx", "-O3", "-std=c++17"])
            .arg("--fmad=false") // products and sums are fused where the sources say so, and nowhere else
            .arg(format!("-arch=compute_{capability}"))
            .arg("-o")
            .arg(out.join(name).with_extension("ptx"))
            .arg(&source)
            .status();
        let status = status.unwrap_or_else(|error| {
            panic!("{} cannot be run ({error}): set NVCC or CUDA_HOME", nvcc.display())
        });
        assert!(status.success(), "{} failed on {}", nvcc.display(), source.display());
    }
}
