//! Ctrl-C: the first asks the run to stop where it is safe, the second ends it at once.

use std::sync::atomic::{AtomicBool, Ordering};

/// Status of a run that was stopped: that of a shell after an interrupt.
pub const STOPPED: u8 = 130;

static ASKED: AtomicBool = AtomicBool::new(false);

/// Listens for interrupts and termination from now on.
///
/// # Errors
/// If the system refuses to.
pub fn listen() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if ASKED.swap(true, Ordering::SeqCst) {
            std::process::exit(STOPPED.into());
        }
        eprintln!("stopping at the next safe point; press Ctrl-C again to stop at once");
    })?;
    Ok(())
}

/// Whether the run has been asked to stop.
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}
