//! Looks at Headwater from outside.

#![allow(clippy::unwrap_used)] // a test that fails is a test that panics

mod bad_input;
mod crash;
mod dataflow;
mod parity;
mod program;
mod pubmed_xml;
mod rendering;
mod tidy;
