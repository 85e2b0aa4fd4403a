//! Looks at Headwater from outside.

#![allow(clippy::unwrap_used)] // a test that fails is a test that panics

mod bad_input;
mod crash;
mod dataflow;
mod gguf;
mod invariance;
mod newswire;
mod parity;
mod program;
mod pubmed_xml;
mod rendering;
mod requests;
mod rounds;
mod rules;
mod terminal;
mod tidy;
mod training;
mod watched;

use std::path::{Path, PathBuf};

/// The folder of test corpora: `HEADWATER_DATA`, or `shared/data` beside the project.
fn data() -> Option<PathBuf> {
    let named = std::env::var_os("HEADWATER_DATA").map(PathBuf::from);
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2)?.join("shared/data");
    named.or(Some(beside)).filter(|path| path.is_dir())
}
