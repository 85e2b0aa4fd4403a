//! How much there is to read, estimated from the start of it.

use super::documents::{Documents, Found};
use super::input;
use super::jsonl::Fields;
use crate::error::{Error, Result};
use std::path::PathBuf;

/// Records that are read at most.
const RECORDS_MAX: u64 = 20_000;
/// Bytes on disk that are read at most.
const BYTES_MAX: u64 = 64 << 20;

/// What an input holds, as far as its start says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Census {
    /// Files.
    pub files: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// Documents.
    pub documents: u64,
    /// Bytes of text in them.
    pub text_bytes: u64,
    /// Whether everything was read, so that nothing is estimated.
    pub exact: bool,
    /// The first texts, to try a tokenizer on.
    pub sample: Vec<String>,
}

/// Texts that are kept as a sample.
const SAMPLE: usize = 200;

/// Counts the documents of `files`, at most `limit` records of them.
///
/// # Errors
/// If a file cannot be opened.
pub fn census(files: &[PathBuf], fields: &Fields, limit: Option<u64>) -> Result<Census> {
    let mut census = Census { files: files.len() as u64, exact: true, ..Census::default() };
    for file in files {
        census.bytes += std::fs::metadata(file).map_err(Error::file("open", file))?.len();
    }
    let (mut read, mut records) = (0, 0);
    for file in files {
        let counter = input::Counter::default();
        let before = read;
        let mut documents =
            Documents::counted(vec![file.clone()], "census", fields.clone(), counter.clone());
        let wanted = limit.unwrap_or(u64::MAX);
        while records < wanted {
            if records >= RECORDS_MAX || read >= BYTES_MAX {
                census.exact = false;
                break;
            }
            let Some(found) = documents.next() else { break };
            records += 1;
            read = before + counter.get();
            if let Found::Document(document) = found {
                census.documents += 1;
                census.text_bytes += document.text.len() as u64;
                if census.sample.len() < SAMPLE {
                    census.sample.push(document.text);
                }
            }
        }
        if !census.exact || records >= wanted {
            break;
        }
    }
    if !census.exact {
        let mut factor = census.bytes as f64 / read.max(1) as f64;
        if let Some(limit) = limit {
            factor = factor.min(limit as f64 / records.max(1) as f64);
        }
        census.documents = (census.documents as f64 * factor) as u64;
        census.text_bytes = (census.text_bytes as f64 * factor) as u64;
    }
    Ok(census)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(lines: u64, limit: Option<u64>, expected: std::ops::RangeInclusive<u64>, exact: bool) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let text: String =
            (0..lines).map(|i| format!("{{\"id\":{i},\"text\":\"text\"}}\n")).collect();
        std::fs::write(&path, text).unwrap();
        let census = census(&[path], &Fields::detected(), limit).unwrap();
        assert!(expected.contains(&census.documents), "{} documents", census.documents);
        assert_eq!(census.exact, exact);
    }

    #[test]
    fn a_small_input_is_counted_and_a_large_one_estimated() {
        check(10, None, 10..=10, true);
        check(10, Some(4), 4..=4, true);
        check(50_000, None, 30_000..=65_000, false);
        check(50_000, Some(30_000), 25_000..=30_000, false);
    }
}
