//! What the tests look at Headwater with: a plain loop to compare the dataflow to, a synthesizer that
//! follows a script, GGUF files, and folders to compare.

pub mod folders;
pub mod gguf;
pub mod reference;
pub mod script;
pub mod settings;
