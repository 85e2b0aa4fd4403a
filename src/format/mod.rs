//! Files: what is read, and what is written.

pub mod census;
pub mod compressed;
pub mod documents;
pub mod durable;
pub mod events;
mod fragments;
pub mod input;
pub mod instructions;
pub mod jsonl;
pub mod lines;
pub mod newswire;
pub mod packed;
mod pages;
pub mod passes;
pub mod pubmed;
pub mod table;
pub mod tasks;
pub mod text;
