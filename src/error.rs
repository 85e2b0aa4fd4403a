//! The one error type of the library.

use std::path::{Path, PathBuf};

/// What can go wrong outside the data itself.
///
/// Bad *records* are no errors: they leave as [`crate::record::Rejected`]. An `Error` means that the
/// run cannot go on, or that it was set up wrongly.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("could not {action} {path:?}: {reason}")]
    File {
        /// What was tried, as a verb: `read`, `create`, `rename`.
        action: &'static str,
        /// The file it was tried on.
        path: PathBuf,
        /// What the system said.
        reason: std::io::Error,
    },
    /// A file was read but does not hold what it should.
    #[error("{path:?}: {reason}")]
    Malformed {
        /// The file at fault.
        path: PathBuf,
        /// What is wrong with it, and where.
        reason: String,
    },
    /// A setting, or a combination of settings, cannot work.
    #[error("{0}")]
    Setting(String),
    /// A model, tokenizer or device failed.
    #[error("{context}: {reason}")]
    Tensor {
        /// What was being computed.
        context: String,
        /// What the tensor library said.
        reason: candle_core::Error,
    },
    /// A thread that the run depends on is gone.
    #[error("{0}")]
    Stopped(String),
}

/// The result of everything in this library that can fail.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::File`] for `path`, to be used in `map_err`.
    pub fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |reason| Error::File { action, path, reason }
    }

    /// An [`Error::Malformed`] for `path`.
    pub fn malformed(path: &Path, reason: impl ToString) -> Error {
        Error::Malformed { path: path.to_owned(), reason: reason.to_string() }
    }
}

impl From<candle_core::Error> for Error {
    fn from(reason: candle_core::Error) -> Self {
        Error::Tensor { context: "tensor operation".into(), reason }
    }
}

/// Says what was being computed when a tensor operation failed.
pub trait Context<T> {
    /// Attaches `context` to the error.
    fn context(self, context: &str) -> Result<T>;
}

impl<T> Context<T> for candle_core::Result<T> {
    fn context(self, context: &str) -> Result<T> {
        self.map_err(|reason| Error::Tensor { context: context.into(), reason })
    }
}
