//! What is said to the person at the terminal, who may be gone.
//!
//! ```text
//! tell!    beside the results, on standard error: lost if nobody is there, for a run goes on without a reader
//! show!    results, on standard output: a full disk is an error, a reader that has seen enough is none
//! ```

use anyhow::{Context, Result};
use std::fmt::Arguments;
use std::io::{ErrorKind, Write, stderr, stdout};

/// Says a line on standard error.
macro_rules! tell {
    ($($text:tt)*) => { $crate::shell::terminal::told(format_args!($($text)*)) };
}

/// Prints a line on standard output.
macro_rules! show {
    ($($text:tt)*) => { $crate::shell::terminal::shown(format_args!($($text)*)) };
}

pub(crate) use {show, tell};

/// See [`tell`].
pub(crate) fn told(text: Arguments<'_>) {
    let _ = writeln!(stderr(), "{text}"); // nobody is there to read it
}

/// See [`show`].
///
/// # Errors
/// If it cannot be written, though somebody is there.
pub(crate) fn shown(text: Arguments<'_>) -> Result<()> {
    written(&mut stdout().lock(), text)
}

fn written(out: &mut impl Write, text: Arguments<'_>) -> Result<()> {
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.context("could not write to standard output"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    /// What fails in this way.
    struct Failing(ErrorKind);

    impl Write for Failing {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_may_have_seen_enough_and_a_full_disk_is_an_error() {
        let mut text = Vec::new();
        written(&mut text, format_args!("{}", 7)).unwrap();
        assert_eq!(text, b"7\n");
        written(&mut Failing(ErrorKind::BrokenPipe), format_args!("7")).unwrap();
        let error = written(&mut Failing(ErrorKind::StorageFull), format_args!("7")).unwrap_err();
        assert!(format!("{error:#}").contains("standard output"), "{error:#}");
    }
}
