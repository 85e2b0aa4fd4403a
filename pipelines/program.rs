//! The command line.

use crate::{bench, demo, finance, inspect, pubmed, scratch, shell, train, tune};
use clap::{Parser, Subcommand};
use std::process::ExitCode;

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
    Finance(Box<finance::Finance>),
    Scratch(Box<scratch::Scratch>),
    Tune(tune::Tune),
    Train(train::Train),
    Inspect(inspect::Inspect),
    Bench(bench::Bench),
}

/// Runs the program on the arguments it was started with.
pub fn run() -> ExitCode {
    let command = || -> anyhow::Result<ExitCode> {
        match Headwater::parse().command {
            Command::Demo(args) => demo::run(args),
            Command::Pubmed(args) => pubmed::run(*args),
            Command::Finance(args) => finance::run(*args),
            Command::Scratch(args) => scratch::run(*args),
            Command::Tune(args) => tune::run(&args),
            Command::Train(args) => train::run(&args),
            Command::Inspect(args) => inspect::run(&args),
            Command::Bench(args) => bench::run(args),
        }
    };
    command().unwrap_or_else(|error| shell::report(&error))
}
