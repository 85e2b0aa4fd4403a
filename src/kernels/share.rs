//! Work shared among the threads of the pool.

use rayon::prelude::*;

/// Runs `work` for each of the tasks, which are handed out in their order.
///
/// One task, or none, costs nothing.
pub(crate) fn each<T: Send>(tasks: impl Iterator<Item = T>, work: impl Fn(T) + Sync) {
    let mut tasks: Vec<T> = tasks.collect();
    match tasks.len() {
        1 => work(tasks.pop().expect("there is one")),
        _ => tasks.into_par_iter().with_max_len(1).for_each(|task| work(task)),
    }
}
