//! The pipelines, and what they share.

pub mod bench;
pub mod demo;
pub mod finance;
pub mod inspect;
pub mod instruct;
pub mod program;
pub mod pubmed;
pub mod scratch;
pub mod shell;
pub mod train;
pub mod tune;
