//! Domain-adaptive pre-training on biomedicine: PubMed dumps and anything else that has abstracts.

use crate::adapt::{self, Adapt};
use anyhow::Result;
use clap::Args;
use headwater::gate::DocumentRules;
use std::process::ExitCode;

/// A baseline has each article once, and far too many to remember them all.
const RULES: DocumentRules = DocumentRules { words_min: 1, unique: false };

/// Augment biomedical abstracts, mix them with general instructions, pack and train
#[derive(Args, Clone, Debug)]
#[command(
    arg_required_else_help = true,
    after_help = "Example:\n  headwater pubmed --input pubmed26n0001.xml.gz --general \
                        instructions.jsonl --model 110m --out runs/pubmed"
)]
pub struct Pubmed {
    #[command(flatten)]
    adapt: Adapt,
}

/// Runs the pipeline.
///
/// # Errors
/// If the flags cannot work or the run cannot start.
pub fn run(args: Pubmed) -> Result<ExitCode> {
    adapt::run(adapt::preset("pubmed", RULES), args.adapt)
}
