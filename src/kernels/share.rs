//! Work shared among the threads of the pool.

// Reason: threads write different columns of the same rows, which slices cannot express.
#![expect(unsafe_code, reason = "an output of rows is written by several threads")]

use super::fetch::fetch_to_write;
use rayon::prelude::*;
use std::marker::PhantomData;

/// Runs `work` for each of the tasks, which are handed out in their order.
///
/// One task, or none, costs nothing.
pub(crate) fn each<T: Send>(tasks: impl Iterator<Item = T>, work: impl Fn(T) + Send + Sync) {
    let mut tasks: Vec<T> = tasks.collect();
    match tasks.len() {
        1 => work(tasks.pop().expect("there is one")),
        _ => tasks.into_par_iter().with_max_len(1).for_each(work),
    }
}

/// A matrix that several threads write to.
pub(crate) struct Target<'a, T = f32> {
    start: *mut T,
    rows: usize,
    width: usize,
    output: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a mutable borrow of numbers; who writes where is up to `columns`.
unsafe impl<T: Copy + Send> Sync for Target<'_, T> {}

impl<'a, T> Target<'a, T> {
    pub(crate) fn new(out: &'a mut [T], width: usize, rows: usize) -> Self {
        assert_eq!(out.len(), width * rows, "the output has another size");
        Target { start: out.as_mut_ptr(), rows, width, output: PhantomData }
    }

    /// Has the CPU bring some columns of a row near, which are going to be written.
    #[inline(always)]
    pub(crate) fn fetch(&self, row: usize, at: usize, length: usize) {
        let start = self.start.wrapping_add(row * self.width + at);
        let line = 64 / size_of::<T>();
        for column in (0..length).step_by(line) {
            fetch_to_write(start.wrapping_add(column));
        }
    }

    /// Some columns of a row.
    ///
    /// # Safety
    /// No other borrow of the same columns may be alive.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that borrows do not overlap")]
    pub(crate) unsafe fn columns(&self, row: usize, at: usize, length: usize) -> &mut [T] {
        assert!(row < self.rows && at + length <= self.width);
        // SAFETY: within the output, as asserted; not borrowed elsewhere, as promised.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.width + at), length) }
    }
}
