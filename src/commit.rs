//! Commits epochs on a thread of its own, so that no worker waits for a disk.

use crate::error::Error;
use crate::manifest::{EpochOutput, EpochRecord};
use crate::record::Sequence;
use crate::run::RunFolder;
use crate::synthesizer::Waker;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, unbounded};

/// Epochs that may wait to be written.
const WAITING_MAX: usize = 2;

/// An epoch that is there for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Its line in the manifest.
    pub record: EpochRecord,
    /// Its sequences, in order.
    pub sequences: Vec<Sequence>,
}

/// Hands epochs to the thread that writes them.
#[derive(Debug)]
pub struct Committer {
    waiting: Sender<Box<EpochOutput>>,
    committed: Receiver<Committed>,
}

impl Committer {
    /// Starts the thread; epochs follow so many sequences. `failed` is called if the disk refuses.
    pub fn start(
        folder: RunFolder,
        mut sequences_before: u64,
        waker: Waker,
        failed: impl FnOnce(Error) + Send + 'static,
    ) -> Self {
        let (waiting, outputs) = bounded::<Box<EpochOutput>>(WAITING_MAX);
        let (done, committed) = unbounded(); // bounded by the epochs under way
        std::thread::Builder::new()
            .name("commit".into())
            .spawn(move || {
                for output in outputs {
                    let record = match folder.commit(&output, sequences_before) {
                        Ok(record) => record,
                        Err(error) => return failed(error),
                    };
                    sequences_before += record.sequences;
                    let sequences =
                        output.lanes.into_iter().flat_map(|(_, sequences)| sequences).collect();
                    let _ = done.send(Committed { record, sequences });
                    waker();
                }
            })
            .expect("the system gives a run its few threads");
        Committer { waiting, committed }
    }

    /// Takes an epoch, or hands it back if too many wait.
    ///
    /// # Panics
    /// If the thread is gone: the disk has refused.
    pub fn offer(&self, output: Box<EpochOutput>) -> Result<(), Box<EpochOutput>> {
        match self.waiting.try_send(output) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(output)) => Err(output),
            Err(TrySendError::Disconnected(_)) => panic!("the commit thread is gone"),
        }
    }

    /// An epoch that has been committed.
    pub fn poll(&self) -> Option<Committed> {
        self.committed.try_recv().ok()
    }
}
