//! What stands between the pipelines and the person at the terminal.

pub mod args;
pub mod bundled;
pub mod evaluation;
mod gates;
pub(crate) mod held_out;
mod logs;
pub mod memory;
pub mod metrics;
pub mod models;
pub mod parts;
pub mod plan;
mod plot;
pub mod progress;
pub mod published;
pub mod ratio;
pub mod report;
pub mod running;
pub mod settings;
pub mod sources;
mod split;
pub mod stop;
pub mod summary;
mod tensorboard;
pub(crate) mod terminal;
pub mod train_args;
pub mod training;

use anyhow::Result;
use headwater::Error;
use headwater::run::RunFolder;
use running::Outcome;
use std::process::ExitCode;
use terminal::{show, tell};

/// Status of a run that failed: its state is safe.
const FAILED: u8 = 1;

/// Status of a command that cannot work as it was given.
const WRONG_USE: u8 = 2;

/// Status of a run that finished but rejected something under `--strict`.
const REJECTED: u8 = 3;

/// Prints what a run came to; returns the status of the process.
///
/// # Errors
/// If the run folder cannot be read, or nothing can be printed.
pub fn finish(outcome: &Outcome, json: bool, example: bool) -> Result<ExitCode> {
    let Outcome::Done(summary) = outcome else {
        return Ok(ExitCode::SUCCESS);
    };
    if json {
        show!("{:#}", summary.json())?;
    } else {
        if example && let Some(document) = summary.example(&RunFolder::existing(summary.run())?)? {
            show!("one augmented document, {} tokens:\n", document.tokens)?;
            show!("{}\n", document.text)?;
        }
        show!("what became of everything:\n{}", summary.describe())?;
        show!("where it lies:\n{}", summary.places())?;
    }
    Ok(has_rejected(summary.rejected() > 0, summary.is_strict()))
}

/// Status of a run in which something was rejected, if that was not to be.
pub fn has_rejected(rejected: bool, strict: bool) -> ExitCode {
    if rejected && strict { ExitCode::from(REJECTED) } else { ExitCode::SUCCESS }
}

/// A command that cannot work as it was given.
#[derive(Debug)]
struct WrongUse(anyhow::Error);

impl std::fmt::Display for WrongUse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl std::error::Error for WrongUse {}

/// Marks an error as the caller's, found before anything was spent.
pub fn wrong_use(error: anyhow::Error) -> anyhow::Error {
    anyhow::Error::new(WrongUse(error))
}

/// Says what went wrong; returns the status of the process.
pub fn report(error: &anyhow::Error) -> ExitCode {
    tell!("error: {error:#}");
    let is_setting = matches!(error.downcast_ref(), Some(Error::Setting(_)));
    ExitCode::from(if is_setting || error.is::<WrongUse>() { WRONG_USE } else { FAILED })
}
