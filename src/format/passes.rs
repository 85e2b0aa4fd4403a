//! Files that are read over and over.

use crate::error::Result;
use crate::record::Rejected;
use std::path::{Path, PathBuf};

/// An id and a text, or why a record is unusable.
pub type Read = std::result::Result<(String, String), Box<Rejected>>;

/// Opens a file for its records, in a pass with the given number.
pub type Open = Box<dyn Fn(&Path, u64) -> Result<Box<dyn Iterator<Item = Read> + Send>> + Send>;

/// The records of all files in their order, from the beginning again after the last, so many times or for ever.
///
/// Each comes with the number of its pass, from 0. What cannot be used is said in the first pass only, so
/// that it is counted once. Files without anything usable end it: otherwise it would never yield again.
pub struct Passes {
    files: Vec<PathBuf>,
    open: Open,
    passes: Option<u64>,
    pass: u64,
    next: usize,
    current: Option<Box<dyn Iterator<Item = Read> + Send>>,
    usable: bool,
}

impl Passes {
    /// Reads `files` for so many `passes`, or for ever.
    pub fn new(files: Vec<PathBuf>, passes: Option<u64>, open: Open) -> Self {
        Passes { files, open, passes, pass: 0, next: 0, current: None, usable: false }
    }

    /// Opens the next file, after the last the first again; false if there is none to be read.
    fn advance(&mut self) -> std::result::Result<bool, Box<Rejected>> {
        if self.next == self.files.len() {
            self.pass += 1;
            self.next = 0;
            if !std::mem::take(&mut self.usable) {
                self.files.clear();
            }
        }
        let over = self.passes.is_some_and(|passes| self.pass >= passes);
        let Some(path) = self.files.get(self.next).filter(|_| !over) else {
            return Ok(false);
        };
        self.next += 1;
        match (self.open)(path, self.pass) {
            Ok(records) => self.current = Some(records),
            Err(error) if self.pass == 0 => {
                let place =
                    crate::record::Place { file: path.display().to_string(), ..Default::default() };
                let mut rejected = Rejected::unread("unreadable_input", error, place, "");
                rejected.stage = crate::record::Stage::Mix;
                return Err(Box::new(rejected));
            }
            Err(_) => {}
        }
        Ok(true)
    }
}

impl Iterator for Passes {
    type Item = (u64, Read);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.current.as_mut().and_then(Iterator::next) {
                Some(Err(_)) if self.pass > 0 => {}
                Some(read) => {
                    self.usable |= read.is_ok();
                    return Some((self.pass, read));
                }
                None => {
                    self.current = None;
                    match self.advance() {
                        Ok(true) => {}
                        Ok(false) => return None,
                        Err(rejected) => return Some((self.pass, Err(rejected))),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::instructions;

    fn check(files: &[&str], passes: Option<u64>, expected: &[&str]) {
        let folder = tempfile::tempdir().unwrap();
        let write = |(index, lines): (usize, &&str)| {
            let path = folder.path().join(index.to_string());
            std::fs::write(&path, lines.replace(' ', "\n")).unwrap();
            path
        };
        let mut files: Vec<PathBuf> = files.iter().enumerate().map(write).collect();
        files.push(folder.path().join("gone"));
        let open: Open = Box::new(|path, _| {
            let records = instructions::read(path)?;
            Ok(Box::new(records.map(|read| read.map(|read| (read.id, read.text)))))
        });
        let found: Vec<String> = Passes::new(files, passes, open)
            .take(8)
            .map(|(pass, read)| {
                read.map_or_else(|no| no.reason[..2].to_owned(), |(id, _)| format!("{pass}:{id}"))
            })
            .collect();
        assert_eq!(found, expected);
    }

    const ONE: &str = r#"{"id":"1","question":"q","answer":"a"}"#;
    const TWO: &str = r#"{"id":"2","question":"q","answer":"a"} {}"#;

    #[test]
    fn files_are_read_over_and_over() {
        check(&[ONE, TWO], None, &["0:1", "0:2", "no", "un", "1:1", "1:2", "2:1", "2:2"]);
    }

    #[test]
    fn a_number_of_passes_ends() {
        check(&[ONE, TWO], Some(2), &["0:1", "0:2", "no", "un", "1:1", "1:2"]);
        check(&[ONE], Some(0), &[]);
    }

    #[test]
    fn files_without_anything_usable_end_at_once() {
        check(&["{}"], None, &["no", "un"]);
        check(&[], None, &["un"]);
    }
}
