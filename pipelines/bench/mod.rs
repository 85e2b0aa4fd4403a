//! Measures on the machine at hand.
//!
//! Standard output gets one line of JSON, standard error what people read.

mod ceiling;
mod synth;
mod text;
mod train;
mod workload;

use anyhow::Result;
use clap::{Args, Subcommand};
use std::process::ExitCode;

/// Measure what this machine makes of a pipeline's parts
#[derive(Args, Clone, Debug)]
#[command(arg_required_else_help = true)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Clone, Debug)]
enum What {
    Text(Box<text::Text>),
    Synth(Box<synth::Synth>),
    Train(Box<train::Train>),
}

/// Measures.
///
/// # Errors
/// If the flags cannot work, or the disk or the device refuses.
pub fn run(args: Bench) -> Result<ExitCode> {
    match args.what {
        What::Text(text) => text::run(*text),
        What::Synth(synth) => synth::run(&synth),
        What::Train(train) => train::run(&train),
    }
}
