//! Carries committed sequences to the trainer's thread.

use crate::record::Sequence;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

/// Epochs that may wait for the trainer.
const EPOCHS_MAX: usize = 2;

/// The end that sequences are put in.
#[derive(Clone, Debug)]
pub struct Feed {
    epochs: Sender<Vec<Sequence>>,
}

impl Feed {
    /// A feed, and the end that the trainer takes sequences from. It ends when the feed is dropped.
    pub fn new() -> (Self, Receiver<Vec<Sequence>>) {
        let (epochs, receiver) = bounded(EPOCHS_MAX);
        (Feed { epochs }, receiver)
    }

    /// Takes the sequences of an epoch, or hands them back if the trainer is behind.
    ///
    /// # Panics
    /// If the trainer is gone.
    pub fn offer(&self, sequences: Vec<Sequence>) -> Result<(), Vec<Sequence>> {
        match self.epochs.try_send(sequences) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(sequences)) => Err(sequences),
            Err(TrySendError::Disconnected(_)) => panic!("the trainer is gone"),
        }
    }
}
