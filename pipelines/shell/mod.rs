//! What stands between the pipelines and the person at the terminal.

pub mod args;
pub mod bundled;
pub mod models;
pub mod parts;
pub mod plan;
pub mod progress;
pub mod running;
pub mod settings;
pub mod stop;
pub mod summary;
pub mod training;

use anyhow::Result;
use headwater::run::RunFolder;
use running::Outcome;
use std::process::ExitCode;

/// Status of a run that finished but rejected something under `--strict`.
const REJECTED: u8 = 3;

/// Prints what a run came to; returns the status of the process.
///
/// # Errors
/// If the run folder cannot be read.
pub fn finish(outcome: &Outcome, json: bool, example: bool) -> Result<ExitCode> {
    let Outcome::Done(summary) = outcome else { return Ok(ExitCode::SUCCESS) };
    if json {
        println!("{:#}", summary.json());
    } else {
        if example && let Some(document) = summary.example(&RunFolder::existing(summary.run())?)? {
            println!("one augmented document, {} tokens:\n", document.tokens);
            println!("{}\n", document.text);
        }
        println!("what became of everything:\n{}", summary.describe());
        println!("where it lies:\n{}", summary.places());
    }
    Ok(match summary.is_too_much_rejected() {
        true => ExitCode::from(REJECTED),
        false => ExitCode::SUCCESS,
    })
}
