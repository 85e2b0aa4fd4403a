//! Domain-adaptive pre-training on finance: newswire in SGML, news in JSON Lines, CSV or TSV.

use crate::adapt::{self, Adapt};
use anyhow::Result;
use clap::Args;
use headwater::gate::DocumentRules;
use std::process::ExitCode;

/// Wires repeat stories, and much of what they carry is a headline.
const RULES: DocumentRules = DocumentRules { words_min: 20, unique: true };

/// Augment financial news, mix them with general instructions, pack and train
#[derive(Args, Clone, Debug)]
#[command(
    arg_required_else_help = true,
    after_help = "Example:\n  headwater finance --input news.csv --text-field title,body --general \
                        instructions.jsonl --model 110m --out runs/finance"
)]
pub struct Finance {
    #[command(flatten)]
    adapt: Adapt,
}

/// Runs the pipeline.
///
/// # Errors
/// If the flags cannot work or the run cannot start.
pub fn run(args: Finance) -> Result<ExitCode> {
    adapt::run(adapt::preset("finance", RULES), args.adapt)
}
