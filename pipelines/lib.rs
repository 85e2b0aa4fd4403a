//! The pipelines, and what they share.

pub mod pubmed;
pub mod shell;
pub mod tune;
