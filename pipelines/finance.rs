//! Domain-adaptive pre-training on finance: newswire in SGML, news in JSON Lines, CSV or TSV.
//!
//! Three chained rounds, one to one with general instructions (arXiv 2406.14491, section 4).

use crate::instruct;
use crate::shell::args::RunArgs;
use crate::shell::published::DOMAIN;
use crate::shell::settings::Preset;
use anyhow::Result;
use clap::Args;
use headwater::block::Converted;
use std::process::ExitCode;

/// Wires repeat stories, and much of what they carry is a headline: both are left out.
const PRESET: Preset = Preset {
    command: "finance",
    corpus: "finance",
    rounds: 3,
    converted: Converted::ALL,
    task_passes: None,
    epoch_documents: 480,
    words_min: 20,
    unique: true,
    published: &DOMAIN,
};

/// Augment financial news, mix them with general instructions, pack and train
#[derive(Args, Clone, Debug)]
#[command(
    arg_required_else_help = true,
    after_help = "Example:\n  headwater finance --input news.csv --text-field title,body --general \
                        instructions.jsonl --model 110m --out runs/finance"
)]
pub struct Finance {
    #[command(flatten)]
    run: RunArgs,
}

/// Runs the pipeline.
///
/// # Errors
/// If the flags cannot work or the run cannot start.
pub fn run(args: Finance) -> Result<ExitCode> {
    instruct::run(PRESET, args.run)
}
