//! With the `cuda` feature only: gives the linker the CUDA runtime (static) and empty stand-ins for the
//! CUDA libraries that are opened at run time, so that the program starts on machines without them.

use std::path::PathBuf;
use std::{env, fs};

const EMPTY_ARCHIVE: &[u8] = b"!<arch>\n";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for library in ["cuda", "nvrtc", "curand", "cublas", "cublasLt"] {
        let path = out.join(format!("lib{library}.a"));
        fs::write(path, EMPTY_ARCHIVE).expect("OUT_DIR can be written");
    }
    let home = env::var_os("CUDA_HOME").map(PathBuf::from);
    let real = home.map(|home| home.join("lib/libcudart_static.a")).filter(|path| path.exists());
    let runtime = real.map_or_else(
        || EMPTY_ARCHIVE.to_vec(),
        |path| fs::read(path).expect("CUDA_HOME can be read"),
    );
    fs::write(out.join("libcudart.a"), runtime).expect("OUT_DIR can be written");
    println!("cargo:rustc-link-search=native={}", out.display());
}
