//! Moves records in time: one timely operator a file. Knows no tensors.
//!
//! ```text
//! read ─▶┌ rounds ──────────────────────┐─▶ templify ─▶ mix ─▶ pack ─▶ commit ─▶ train
//!   ▲    │ prompt ─▶ synthesize ─▶ parse│                                          │
//!   │    │   ▲                       │  │                                          │
//!   │    │   └─────── feedback ◀─────┘  │                                          │
//!   │    └──────────────────────────────┘                                          │
//!   └──────────────────────────────── credit ◀─────────────────────────────────────┘
//! ```
//!
//! The outer time is the epoch: a block of consecutive texts, committed together. The inner time is the
//! round. An operator never blocks its worker: what takes time is handed to a thread, the capability is
//! kept, and the operator is woken when the answer is there.

pub mod commit;
pub mod credit;
pub mod gate;
mod held;
pub mod judge;
pub mod mix;
pub mod pack;
pub mod parse;
pub mod prompt;
pub mod read;
pub mod synthesize;
pub mod templify;
pub mod train;

use headwater::synthesizer::Waker;
use std::sync::{Arc, Mutex};
use timely::scheduling::SyncActivator;

/// A waker that schedules an operator from any thread.
fn waker(activator: SyncActivator) -> Waker {
    let activator = Mutex::new(activator);
    Arc::new(move || {
        if let Ok(activator) = activator.lock() {
            let _ = activator.activate(); // a worker that is gone needs no waking
        }
    })
}
