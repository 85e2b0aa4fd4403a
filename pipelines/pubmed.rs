//! Domain-adaptive pre-training on biomedicine: PubMed dumps and anything else that has abstracts.
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

/// A baseline has each article once, and far too many to remember them all: duplicates are kept.
const PRESET: Preset = Preset {
    command: "pubmed",
    corpus: "pubmed",
    rounds: 3,
    converted: Converted::ALL,
    task_passes: None,
    epoch_documents: 240,
    words_min: 1,
    unique: false,
    published: &DOMAIN,
};

/// Augment biomedical abstracts, mix them with general instructions, pack and train
#[derive(Args, Clone, Debug)]
#[command(
    arg_required_else_help = true,
    after_help = "Example:\n  headwater pubmed --input pubmed26n0001.xml.gz --general \
                        instructions.jsonl --model 110m --out runs/pubmed"
)]
pub struct Pubmed {
    #[command(flatten)]
    run: RunArgs,
}

/// Runs the pipeline.
///
/// # Errors
/// If the flags cannot work or the run cannot start.
pub fn run(args: Pubmed) -> Result<ExitCode> {
    instruct::run(PRESET, args.run)
}
