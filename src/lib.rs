//! Records, kernels and models of Headwater. Knows no dataflow.

pub mod augment;
pub mod block;
pub mod chain;
pub mod commit;
pub mod engine;
pub mod error;
pub mod eval;
pub mod format;
pub mod gate;
pub mod gguf;
pub mod kernels;
pub mod lane;
pub mod ledger;
pub mod manifest;
pub mod meter;
pub mod mix;
pub mod model;
pub mod pack;
pub mod prompt;
pub mod record;
pub mod request_store;
pub mod run;
pub mod seed;
pub mod side;
pub mod split;
pub mod synthesizer;
pub mod template;
pub mod threads;
pub mod tokenizer;
pub mod train;

pub use error::{Error, Result};
