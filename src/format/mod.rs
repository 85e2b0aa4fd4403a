//! Files: what is read, and what is written.

pub mod census;
pub mod compressed;
pub mod documents;
pub mod durable;
pub mod input;
pub mod instructions;
pub mod jsonl;
pub mod lines;
pub mod packed;
pub mod pubmed;
pub mod tasks;
pub mod text;
