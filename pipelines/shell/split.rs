//! How many threads of a CPU synthesize, and how many train.

use anyhow::{Result, ensure};
use headwater::threads::{Share, all, split};

/// Checks `--train-threads`; `sides` says of synthesis and training whether they are done, and on the CPU.
///
/// # Errors
/// If there is nothing to split, or one side would have no thread.
pub(super) fn check(train_threads: Option<usize>, sides: [bool; 2]) -> Result<()> {
    let Some(count) = train_threads else { return Ok(()) };
    ensure!(
        sides == [true; 2],
        "--train-threads splits a CPU that synthesizes and trains: here one of them is done elsewhere, or not at all"
    );
    let all = all();
    ensure!(
        (1..all).contains(&count),
        "--train-threads {count} of {all} threads leaves one side none"
    );
    Ok(())
}

/// The share of synthesis and that of training, if threads are split.
///
/// # Errors
/// If the threads cannot be started.
pub(super) fn shares(train_threads: Option<usize>) -> Result<[Option<Share>; 2]> {
    match train_threads {
        None => Ok([None, None]),
        Some(count) => Ok(split([all() - count, count])?.map(Some)),
    }
}

/// The split in words.
pub(super) fn describe(train_threads: Option<usize>) -> String {
    let all = all();
    match train_threads {
        None => format!("{all}, shared by synthesis and training"),
        Some(count) => {
            format!(
                "{} for synthesis, {count} for training; all for one where the other waits",
                all - count
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(count: usize, sides: [bool; 2]) -> String {
        check(Some(count), sides).expect_err("cannot work").to_string()
    }

    #[test]
    fn each_side_has_a_thread() {
        let all = all();
        assert!(refused(0, [true; 2]).contains("--train-threads 0"));
        assert!(refused(all, [true; 2]).contains("leaves one side none"));
        assert!(refused(1, [true, false]).contains("not at all"));
        assert!(refused(1, [false, true]).contains("not at all"));
        assert!(check(None, [false; 2]).is_ok());
        assert_eq!(check(Some(1), [true; 2]).is_ok(), all > 1);
    }

    #[test]
    fn threads_are_shared_unless_they_are_split() {
        assert!(shares(None).expect("none are started").iter().all(Option::is_none));
        assert!(shares(Some(1)).expect("threads").iter().all(Option::is_some) || all() == 1);
        assert!(describe(None).contains("shared"));
    }
}
