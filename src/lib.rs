//! Records, kernels and models of Headwater. Knows no dataflow.

pub mod error;
pub mod format;
pub mod kernels;
pub mod model;
pub mod pack;
pub mod prompt;
pub mod record;
pub mod seed;
pub mod tokenizer;
pub mod train;

pub use error::{Error, Result};
