//! The program `headwater`.

use clap::{Parser, Subcommand};
use headwater_pipelines::{shell, tune};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Raw corpora in, instruction-augmented pre-training data and trained models out.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Headwater {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Tune(tune::Tune),
}

fn main() -> anyhow::Result<()> {
    shell::stop::listen()?;
    match Headwater::parse().command {
        Command::Tune(args) => tune::run(&args),
    }
}
