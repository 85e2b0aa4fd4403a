//! Ctrl-C: the first asks the run to stop where it is safe, the second ends it at once. So does a terminal that ends, but
//! only the first.

use super::terminal::tell;
use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// Status of a run that was stopped: that of a shell after an interrupt.
pub const STOPPED: u8 = 130;

static LISTENING: AtomicBool = AtomicBool::new(false);
static ASKED: AtomicBool = AtomicBool::new(false);

/// Listens for interrupts, termination and the end of the terminal from now on, when there is something to bring to a safe
/// point. Before, and in commands that leave nothing, a signal ends the program at once, as it does any other.
///
/// # Errors
/// If the system refuses to.
pub fn listen() -> Result<()> {
    if LISTENING.swap(true, SeqCst) {
        return Ok(());
    }
    let signals = [SIGINT, SIGTERM].into_iter().chain((!is_ignored(SIGHUP)).then_some(SIGHUP));
    let mut signals = Signals::new(signals).context("could not listen for signals")?;
    let wait = move || {
        for signal in signals.forever() {
            match (ASKED.swap(true, SeqCst), signal) {
                (false, _) => {
                    tell!("stopping at the next safe point; press Ctrl-C again to stop at once");
                }
                // Of a terminal that ends, both the system and the shell may tell.
                (true, SIGHUP) => {}
                (true, _) => std::process::exit(STOPPED.into()),
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait)?;
    Ok(())
}

/// Whether the run has been asked to stop.
pub fn asked() -> bool {
    ASKED.load(SeqCst)
}

/// Whether whoever started this program has it ignore a signal, as `nohup` does with the end of the terminal; false where
/// the system does not say.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ignores(&status, signal)
}

/// What `/proc/self/status` says of a signal.
fn ignores(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_is_ignored_stands_in_the_mask() {
        let status = "Name:\theadwater\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000004002\n";
        assert!(ignores(status, SIGHUP));
        assert!(!ignores(status, SIGINT) && !ignores(status, SIGTERM));
        assert!(!ignores("", SIGHUP));
    }
}
