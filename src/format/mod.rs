//! Files: what is read, and what is written.

pub mod durable;
pub mod input;
pub mod lines;
pub mod tasks;
