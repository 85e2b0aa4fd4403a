//! What a store does, for others to read at any time.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What a store has done since it was opened.
#[derive(Debug, Default)]
pub struct StoreCounters {
    /// Requests answered from the store.
    pub hits: AtomicU64,
    /// Requests that an engine had to answer.
    pub misses: AtomicU64,
    /// Requests that waited for the answer to an equal one.
    pub joined: AtomicU64,
    /// Damaged entries, which were dropped.
    pub corrupt: AtomicU64,
    /// Entries written.
    pub written: AtomicU64,
    /// Bytes written.
    pub written_bytes: AtomicU64,
    /// Bytes that the store holds now.
    pub held_bytes: AtomicU64,
}

impl StoreCounters {
    /// Name and value of each count, for whoever writes them down.
    pub fn figures(&self) -> [(&'static str, u64); 7] {
        [
            ("hits", &self.hits),
            ("misses", &self.misses),
            ("joined", &self.joined),
            ("corrupt", &self.corrupt),
            ("written", &self.written),
            ("written_bytes", &self.written_bytes),
            ("held_bytes", &self.held_bytes),
        ]
        .map(|(name, count)| (name, count.load(Relaxed)))
    }
}
