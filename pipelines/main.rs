//! The program `headwater`.

use clap::{Parser, Subcommand};
use headwater_pipelines::{demo, inspect, pubmed, shell, train, tune};
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
    Demo(demo::Demo),
    Pubmed(Box<pubmed::Pubmed>),
    Tune(tune::Tune),
    Train(train::Train),
    Inspect(inspect::Inspect),
}

fn main() -> ExitCode {
    let run = || -> anyhow::Result<ExitCode> {
        shell::stop::listen()?;
        match Headwater::parse().command {
            Command::Demo(args) => demo::run(args),
            Command::Pubmed(args) => pubmed::run(*args),
            Command::Tune(args) => tune::run(&args),
            Command::Train(args) => train::run(&args),
            Command::Inspect(args) => inspect::run(&args),
        }
    };
    run().unwrap_or_else(|error| shell::report(&error))
}
