//! JSON Lines in zstd frames: what a run writes for people and other programs to read.

use crate::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::cell::RefCell;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// zstd level: 1 compresses text to two fifths at 340 MB/s a core; 3 to a third at half the rate.
const LEVEL: i32 = 1;

/// Bytes of memory that a thread keeps for the next file: the lines of a usual epoch.
const KEPT: usize = 32 << 20;

/// The bytes of a file with one record a line. The same records give the same bytes.
///
/// # Panics
/// If a record is not representable in JSON.
pub fn write<T: Serialize>(records: &[T]) -> Vec<u8> {
    write_lines(records, |record, lines| {
        serde_json::to_writer(lines, record).expect("records are plain values");
    })
}

/// [`write`], by a function that writes a record at the end of the lines so far.
pub(crate) fn write_lines<T>(records: &[T], line: impl Fn(&T, &mut Vec<u8>)) -> Vec<u8> {
    thread_local! {
        /// Kept, since fresh memory costs as much as what is written to it.
        static LINES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    LINES.with_borrow_mut(|lines| {
        lines.clear();
        for record in records {
            line(record, lines);
            lines.push(b'\n');
        }
        // In one piece: a stream would be copied, and searched in two parts.
        let bytes = zstd::bulk::compress(lines, LEVEL).expect("memory takes every byte");
        lines.shrink_to(KEPT);
        bytes
    })
}

/// The records in the bytes of the file `path`.
///
/// # Errors
/// If they do not hold such records.
pub fn read<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<Vec<T>> {
    let decoder = zstd::Decoder::new(bytes).map_err(Error::file("read", path))?;
    let record = |line: std::io::Result<String>| {
        let line = line.map_err(Error::file("read", path))?;
        serde_json::from_str(&line).map_err(|error| Error::malformed(path, error))
    };
    BufReader::new(decoder).lines().map(record).collect()
}
