//! Looks at Headwater from outside.

mod bad_input;
mod crash;
mod dataflow;
mod parity;
mod program;
mod pubmed_xml;
mod rendering;
mod tidy;
