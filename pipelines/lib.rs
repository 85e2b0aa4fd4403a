//! The pipelines, and what they share.

pub mod shell;
pub mod tune;
