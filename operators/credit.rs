//! Returns credit to the source: what is durable lets it read on.
//!
//! ```text
//! epochs that are done ─▶ frontier ─▶ Credit ─▶ source: at most `window` epochs ahead of it
//! ```
//!
//! This must be an operator of its own behind the last one that holds an epoch: that one runs before its
//! own progress has propagated, and a source woken from there could miss the last wake-up.

use crate::train::Learned;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::Operator;
use timely::scheduling::Activator;

/// Flow control from the end of the dataflow back to its source; both live on one worker.
#[derive(Debug)]
pub struct Credit {
    /// The first epoch that is not done.
    open: Cell<u64>,
    /// Epochs that may be under way.
    window: u64,
    /// Whether the run ends with the epochs that are done.
    closed: Cell<bool>,
    source: RefCell<Option<Activator>>,
}

impl Credit {
    /// Lets `window` epochs be under way from `first` on.
    ///
    /// # Panics
    /// If the window is empty: nothing would ever start.
    pub fn new(first: u64, window: u64) -> Rc<Self> {
        assert!(window > 0, "an empty window lets nothing through");
        let closed = Cell::new(false);
        Rc::new(Credit { open: Cell::new(first), window, closed, source: RefCell::new(None) })
    }

    /// Whether the source may send this epoch.
    pub fn allows(&self, epoch: u64) -> bool {
        epoch < self.open.get().saturating_add(self.window)
    }

    /// Whether the source is to send nothing any more.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Wakes this source when credit returns.
    pub fn wake(&self, source: Activator) {
        *self.source.borrow_mut() = Some(source);
    }
}

/// Provides `return_credit`.
pub trait ReturnCredit {
    /// Gives credit for every epoch that the stream is done with, and closes it behind one that the run
    /// ends with.
    fn return_credit(self, credit: Rc<Credit>);
}

impl ReturnCredit for StreamVec<'_, u64, Learned> {
    fn return_credit(self, credit: Rc<Credit>) {
        self.sink(Pipeline, "ReturnCredit", move |(input, frontier)| {
            input.for_each(|_, done| {
                if done.drain(..).any(|learned| learned.stopped) {
                    credit.closed.set(true);
                }
            });
            let open = frontier.frontier().first().copied().unwrap_or(u64::MAX);
            credit.open.set(open);
            if let Some(source) = &*credit.source.borrow() {
                source.activate();
            }
        });
    }
}
