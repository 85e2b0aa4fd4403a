//! How synthesis and training share the threads of a CPU.
//!
//! ```text
//! both have work     synthesis ▓▓▓▓▓▓▓▓▓▓▓▓      training ░░░░     threads of their own, as they were split
//! one waits          synthesis ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓                 all threads for the other
//! ```
//!
//! Unsplit, both put their work into one pool, whose threads take what comes first. Either way results are the same:
//! no sum depends on threads.

use crate::error::{Error, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// A part of the threads, for the threads of a program that [enter](Share::enter) it.
#[derive(Clone, Debug)]
pub struct Share {
    parts: Arc<[Part; 2]>,
    index: usize,
}

#[derive(Debug)]
struct Part {
    pool: ThreadPool,
    /// Threads that have entered and have work.
    at_work: AtomicUsize,
}

/// What a thread has entered.
#[derive(Debug)]
struct Entered {
    share: Share,
    at_work: bool,
}

thread_local! {
    static ENTERED: RefCell<Option<Entered>> = const { RefCell::new(None) };
}

/// Threads of the pool that this one is in, or else of the common one: as many as cores, unless `RAYON_NUM_THREADS` says otherwise.
pub fn all() -> usize {
    rayon::current_num_threads()
}

/// Two shares with so many threads.
///
/// # Errors
/// If the threads cannot be started.
pub fn split(counts: [usize; 2]) -> Result<[Share; 2]> {
    let part = |index: usize| -> Result<Part> {
        let name = move |thread| format!("share-{index}-{thread}");
        let pool = ThreadPoolBuilder::new().num_threads(counts[index]).thread_name(name).build();
        let pool = pool.map_err(|error| Error::Stopped(format!("no threads: {error}")))?;
        Ok(Part { pool, at_work: AtomicUsize::new(0) })
    };
    let parts = Arc::new([part(0)?, part(1)?]);
    Ok([0, 1].map(|index| Share { parts: parts.clone(), index }))
}

/// The share that this thread has entered.
pub fn entered() -> Option<Share> {
    ENTERED.with_borrow(|entered| entered.as_ref().map(|entered| entered.share.clone()))
}

/// Says that this thread has work, or waits for some: while it waits, its share is lent to the other. Without a share,
/// nothing happens.
pub fn set_at_work(at_work: bool) {
    ENTERED.with_borrow_mut(|entered| {
        if let Some(entered) = entered {
            entered.set_at_work(at_work);
        }
    });
}

/// Runs `work`, and what it has done in parallel, on the threads that this thread's share has now; without a share on
/// those of the common pool.
pub fn run<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    match entered() {
        Some(share) if share.other().at_work.load(SeqCst) > 0 => share.own().pool.install(work),
        _ => rayon::scope(|_| work()),
    }
}

impl Share {
    /// Has [`run`] use the share on this thread. The thread has no work yet.
    pub fn enter(self) {
        ENTERED.set(Some(Entered { share: self, at_work: false }));
    }

    fn own(&self) -> &Part {
        &self.parts[self.index]
    }

    fn other(&self) -> &Part {
        &self.parts[1 - self.index]
    }
}

impl Entered {
    fn set_at_work(&mut self, at_work: bool) {
        let count = &self.share.own().at_work;
        match (self.at_work, at_work) {
            (false, true) => drop(count.fetch_add(1, SeqCst)),
            (true, false) => drop(count.fetch_sub(1, SeqCst)),
            _ => {}
        }
        self.at_work = at_work;
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.set_at_work(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::current_num_threads;

    /// What `work` returns on a thread that has entered `share`.
    fn on<R: Send>(share: &Share, work: impl FnOnce() -> R + Send) -> R {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                share.clone().enter();
                work()
            });
            thread.join().unwrap()
        })
    }

    #[test]
    fn a_share_has_its_threads_while_the_other_works_and_all_while_it_waits() {
        let all = current_num_threads();
        let [left, right] = split([3, 5]).unwrap();
        on(&left, || {
            set_at_work(true);
            assert_eq!(run(current_num_threads), all, "nobody else works");
            on(&right, || {
                set_at_work(true);
                set_at_work(true);
                assert_eq!(run(current_num_threads), 5);
                assert_eq!(on(&left, || run(current_num_threads)), 3);
                set_at_work(false);
                assert_eq!(on(&left, || run(current_num_threads)), all, "the other waits");
                set_at_work(true);
            });
            assert_eq!(run(current_num_threads), all, "a thread that has ended waits");
        });
    }

    #[test]
    fn without_a_share_all_threads_are_used() {
        set_at_work(true);
        assert!(entered().is_none());
        assert_eq!(run(current_num_threads), current_num_threads());
    }

    #[test]
    fn work_within_work_stays_on_its_threads() {
        let [left, right] = split([2, 3]).unwrap();
        on(&left, || {
            set_at_work(true);
            on(&right, || assert_eq!(run(|| run(current_num_threads)), 3));
        });
    }
}
