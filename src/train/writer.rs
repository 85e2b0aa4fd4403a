//! Writes checkpoints while training goes on.
//!
//! ```text
//! step ─▶ [ is the one before there? ] ─▶ snapshot ─▶ next step
//!                                            └─▶ thread: logs synced ─▶ written ─▶ published ─▶ older ones removed
//! ```
//!
//! One checkpoint is under way at most, so that there is one copy of the state at most: whoever is faster
//! than the disk waits. What a checkpoint counts as done is in the logs on the disk before it is published.

use super::Trainer;
use super::checkpoint::{Retention, Snapshot, prune, sweep};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Writes the checkpoints of one run.
#[derive(Debug)]
pub struct Writer {
    target: Arc<Target>,
    under_way: Option<JoinHandle<Result<()>>>,
}

/// Where checkpoints go, and what goes with them.
#[derive(Debug)]
pub struct Target {
    /// The folder of all checkpoints.
    pub folder: PathBuf,
    /// Written into each of them.
    pub tokenizer: Tokenizer,
    /// Which of them stay.
    pub retention: Retention,
    /// Files that are brought to the disk before a checkpoint is there.
    pub logs: Vec<PathBuf>,
}

impl Target {
    fn save(&self, snapshot: &Snapshot) -> Result<()> {
        for log in &self.logs {
            let file = File::open(log).map_err(Error::file("open", log))?;
            file.sync_all().map_err(Error::file("write", log))?;
        }
        snapshot.save(&self.folder, &self.tokenizer)?;
        prune(&self.folder, self.retention)
    }
}

impl Writer {
    /// A writer for a folder, made if it is not there; what an interrupted one left in it is removed.
    ///
    /// # Errors
    /// If the folder cannot be made or written.
    pub fn new(target: Target) -> Result<Self> {
        let folder = &target.folder;
        std::fs::create_dir_all(folder).map_err(Error::file("create", folder))?;
        sweep(folder)?;
        Ok(Writer { target: Arc::new(target), under_way: None })
    }

    /// Has a checkpoint of the trainer's current step written. Waits for the one before.
    ///
    /// # Errors
    /// If the one before could not be written, the device fails, or the system has no thread left.
    pub fn write(&mut self, trainer: &Trainer) -> Result<()> {
        self.wait()?;
        let (snapshot, target) = (trainer.snapshot()?, self.target.clone());
        let thread = std::thread::Builder::new().name("checkpoint".into());
        let spawned = thread.spawn(move || target.save(&snapshot));
        let refused = |error| Error::Stopped(format!("could not start a thread to write: {error}"));
        self.under_way = Some(spawned.map_err(refused)?);
        Ok(())
    }

    /// Waits until what is under way is there for good.
    ///
    /// # Errors
    /// If it could not be written.
    pub fn wait(&mut self) -> Result<()> {
        let Some(thread) = self.under_way.take() else { return Ok(()) };
        let failed = |_| Error::Stopped("the thread that writes checkpoints failed".into());
        thread.join().map_err(failed)?
    }

    /// Looks, without waiting, whether what was under way could be written.
    ///
    /// # Errors
    /// If it could not.
    pub fn check(&mut self) -> Result<()> {
        let is_done = self.under_way.as_ref().is_some_and(JoinHandle::is_finished);
        if is_done { self.wait() } else { Ok(()) }
    }
}

/// Whoever ends without having waited has another error to tell; what is under way is still brought to an end.
impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.wait();
    }
}
