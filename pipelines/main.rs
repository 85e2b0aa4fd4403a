//! The program `headwater`.

use clap::{Parser, Subcommand};
use headwater_pipelines::{pubmed, shell, tune};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Raw corpora in, instruction-augmented pre-training data and trained models out
#[derive(Parser)]
#[command(name = "headwater", version, arg_required_else_help = true)]
struct Headwater {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Pubmed(pubmed::Pubmed),
    Tune(tune::Tune),
}

fn main() -> ExitCode {
    let run = || -> anyhow::Result<ExitCode> {
        shell::stop::listen()?;
        match Headwater::parse().command {
            Command::Pubmed(args) => pubmed::run(args),
            Command::Tune(args) => tune::run(&args).map(|()| ExitCode::SUCCESS),
        }
    };
    run().unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
