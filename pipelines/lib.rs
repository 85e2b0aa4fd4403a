//! The pipelines, and what they share.

pub mod adapt;
pub mod demo;
pub mod finance;
pub mod inspect;
pub mod program;
pub mod pubmed;
pub mod shell;
pub mod train;
pub mod tune;
