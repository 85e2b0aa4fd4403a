//! What the tests look at Headwater with: a plain loop to compare the dataflow to, a synthesizer that
//! follows a script, and helpers to read folders.

pub mod folders;
pub mod reference;
pub mod script;
pub mod settings;
