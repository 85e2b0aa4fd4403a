//! Reads a file of records from end to end, over whatever is damaged.

use super::key::RequestKey;
use super::record::{Found, MAGIC, RECORD_MAX, read};
use std::io::{self, Read};
use std::ops::Range;

/// Bytes that are held of the file at a time.
const WINDOW: usize = 4 * RECORD_MAX;

/// What a file holds besides records.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Scan {
    /// Stretches of the file that hold none, without those that are zero throughout.
    pub(super) damaged: Vec<Range<u64>>,
    /// Where the file ends, without a record that was cut off while it was written.
    pub(super) end: u64,
}

/// Reads a file from its beginning. `visit` gets the key of each record, and where it lies.
///
/// # Errors
/// If it cannot be read.
pub(super) fn scan(
    file: impl Read,
    mut visit: impl FnMut(RequestKey, Range<u64>),
) -> io::Result<Scan> {
    let mut window = Window { file, bytes: Vec::new(), start: 0, offset: 0, is_last: false };
    let mut scan = Scan::default();
    // A stretch without records: where it began, and whether it may be one that was cut off.
    let mut open: Option<(u64, bool)> = None;
    loop {
        let at = window.offset;
        let bytes = window.ahead()?;
        if bytes.is_empty() {
            break;
        }
        let found = read(bytes);
        let skipped = match (&found, open) {
            (Found::Whole(record), _) => record.length,
            (_, None) if bytes[0] == 0 => zeros(bytes),
            _ => 1 + memchr::memmem::find(&bytes[1..], &MAGIC).unwrap_or(to_the_end(bytes)),
        };
        match found {
            Found::Whole(record) => {
                scan.damaged.extend(open.take().map(|(start, _)| start..at));
                visit(record.key, at..at + skipped as u64);
            }
            _ if open.is_none() && bytes[0] == 0 => {}
            found => {
                open.get_or_insert((at, found == Found::Cut));
            }
        }
        window.advance(skipped);
    }
    scan.end = window.offset;
    match open {
        Some((start, true)) => scan.end = start,
        Some((start, false)) => scan.damaged.push(start..scan.end),
        None => {}
    }
    Ok(scan)
}

/// Zeros that some bytes begin with.
fn zeros(bytes: &[u8]) -> usize {
    bytes.iter().position(|&byte| byte != 0).unwrap_or(bytes.len())
}

/// Bytes behind the first in which no record begins, where the beginning of one may stand at the very end.
fn to_the_end(bytes: &[u8]) -> usize {
    let is_beginning = |length: &usize| bytes.len() > *length && bytes.ends_with(&MAGIC[..*length]);
    let kept = (1..MAGIC.len()).rev().find(is_beginning).unwrap_or(0);
    bytes.len() - 1 - kept
}

/// A part of a file that moves forward.
struct Window<R> {
    file: R,
    bytes: Vec<u8>,
    start: usize,
    /// Where in the file `start` is.
    offset: u64,
    is_last: bool,
}

impl<R: Read> Window<R> {
    /// The bytes ahead: as many as a record may have, or all that are left.
    fn ahead(&mut self) -> io::Result<&[u8]> {
        if !self.is_last && self.bytes.len() - self.start < RECORD_MAX {
            self.bytes.drain(..self.start);
            self.start = 0;
            let wanted = (WINDOW - self.bytes.len()) as u64;
            let read = (&mut self.file).take(wanted).read_to_end(&mut self.bytes)?;
            self.is_last = (read as u64) < wanted;
        }
        Ok(&self.bytes[self.start..])
    }

    fn advance(&mut self, bytes: usize) {
        self.start += bytes;
        self.offset += bytes as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::{Answer, Ending, encode};
    use super::*;
    use proptest::prelude::*;

    fn record(number: u64, length: usize) -> (RequestKey, Vec<u8>) {
        let key = RequestKey { key: u128::from(number) << 64, witness: number };
        let answer = Answer { tokens: vec![number as u32 % 100; length], ending: Ending::Stop };
        (key, encode(&key, &answer))
    }

    /// The numbers of the records in some bytes, and what else is there.
    fn scanned(bytes: &[u8]) -> (Vec<u64>, Scan) {
        let mut numbers = Vec::new();
        let found = scan(bytes, |key, place| {
            let record = &bytes[place.start as usize..place.end as usize];
            assert!(matches!(read(record), Found::Whole(record) if record.key == key));
            numbers.push(key.witness);
        });
        (numbers, found.unwrap())
    }

    proptest! {
        #[test]
        fn damage_costs_the_records_it_touches_and_no_others(
            lengths in prop::collection::vec(0usize..40, 1..20),
            place in any::<prop::sample::Index>(),
            width in 1usize..60,
            fill in 1u8..,
        ) {
            let mut bytes = Vec::new();
            let mut places = Vec::new();
            for (number, &length) in lengths.iter().enumerate() {
                let start = bytes.len();
                bytes.extend(record(number as u64, length).1);
                places.push(start..bytes.len());
            }
            let start = place.index(bytes.len());
            let end = (start + width).min(bytes.len());
            let before = bytes.clone();
            bytes[start..end].iter_mut().for_each(|byte| *byte ^= fill);
            let whole: Vec<u64> = (0u64..)
                .zip(&places)
                .filter(|(_, place)| bytes[place.start..place.end] == before[place.start..place.end])
                .map(|(number, _)| number)
                .collect();
            let (numbers, found) = scanned(&bytes);
            prop_assert_eq!(numbers, whole);
            prop_assert!(found.damaged.len() == 1 || found.end < bytes.len() as u64);
        }

        #[test]
        fn a_file_that_is_cut_ends_with_its_last_whole_record(
            lengths in prop::collection::vec(0usize..40, 1..20),
            place in any::<prop::sample::Index>(),
        ) {
            let mut bytes = Vec::new();
            let mut ends = Vec::new();
            for (number, &length) in lengths.iter().enumerate() {
                bytes.extend(record(number as u64, length).1);
                ends.push(bytes.len());
            }
            let kept = place.index(bytes.len());
            let whole = ends.iter().filter(|&&end| end <= kept).count();
            let (numbers, found) = scanned(&bytes[..kept]);
            prop_assert_eq!(numbers.len(), whole);
            prop_assert_eq!(found.end, ends[..whole].last().map_or(0, |&end| end as u64));
            prop_assert_eq!(found.damaged, []);
        }
    }

    #[test]
    fn records_are_found_across_windows_and_behind_long_damage() {
        let mut bytes = Vec::new();
        let mut expected = Vec::new();
        for number in 0..30 {
            let (_, record) = record(number, 300_000 + 1000 * number as usize);
            if number % 7 == 3 {
                bytes.extend(vec![b'h'; 3 * WINDOW / 2 + number as usize]);
            }
            bytes.extend(record);
            expected.push(number);
        }
        let (numbers, found) = scanned(&bytes);
        assert_eq!(numbers, expected);
        assert_eq!((found.damaged.len(), found.end), (4, bytes.len() as u64));
    }

    #[test]
    fn zeros_between_records_are_no_damage() {
        let (first, second) = (record(1, 5).1, record(2, 5).1);
        let bytes = [&first[..], &[0; 100], &second, &[0; 9]].concat();
        let (numbers, found) = scanned(&bytes);
        assert_eq!((numbers, &found.damaged[..]), (vec![1, 2], &[][..]));
        assert_eq!(found.end, bytes.len() as u64);
    }
}
