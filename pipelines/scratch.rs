//! Pre-training from scratch on web text, a fifth of it converted.
//!
//! Two chained rounds for one document in five, chosen by its content; the rest goes out raw, in the same
//! stream, and the rows the synthesizer was tuned on are read four times (arXiv 2406.14491, section 3).

use crate::instruct;
use crate::shell::args::RunArgs;
use crate::shell::published::SCRATCH;
use crate::shell::settings::Preset;
use anyhow::Result;
use clap::Args;
use headwater::block::Converted;
use std::process::ExitCode;

/// The web repeats itself, but a crawl has far too many pages to remember them all: duplicates are kept.
const PRESET: Preset = Preset {
    command: "scratch",
    corpus: "web",
    rounds: 2,
    converted: Converted { part: 1, of: 5 },
    task_passes: Some(4),
    epoch_documents: 240,
    words_min: 1,
    unique: false,
    published: &SCRATCH,
};

/// Augment a fifth of a web corpus, add tuning data, pack and train from scratch
#[derive(Args, Clone, Debug)]
#[command(
    arg_required_else_help = true,
    after_help = "Example:\n  headwater scratch --input web.jsonl.zst --tasks tasks.jsonl --model 110m \
                        --out runs/scratch"
)]
pub struct Scratch {
    #[command(flatten)]
    run: RunArgs,
}

/// Runs the pipeline.
///
/// # Errors
/// If the flags cannot work or the run cannot start.
pub fn run(args: Scratch) -> Result<ExitCode> {
    instruct::run(PRESET, args.run)
}
