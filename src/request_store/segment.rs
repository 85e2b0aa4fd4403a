//! One file of records, with an index of what is in it.

use super::key::RequestKey;
use super::record::{Answer, Found, RECORD_MAX, Record, read};
use super::scan::scan;
use crate::error::{Error, Result};
use crate::format::durable;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// What a record counts at least, so that the index is bounded by the bytes too.
const COST_MIN: u64 = 256;

/// What a record of so many bytes counts.
pub(super) fn cost(length: u64) -> u64 {
    length.max(COST_MIN)
}

/// A file of records.
#[derive(Debug)]
pub(super) struct Segment {
    path: PathBuf,
    file: File,
    places: Places,
    /// Bytes of the file.
    bytes: u64,
    /// What its records count, and what lies between them.
    cost: u64,
}

/// What was found under a key.
pub(super) enum Lookup {
    /// The answer.
    Answer(Answer),
    /// Nothing, and so many records that could not be read.
    Missing { corrupt: u64 },
}

impl Segment {
    /// A new file. Its name is on the disk when this returns.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let file = file.map_err(Error::file("create", path))?;
        durable::sync_directory(path.parent().unwrap_or(Path::new(".")))?;
        let places = Places::Open(BTreeSet::new());
        Ok(Segment { path: path.to_owned(), file, places, bytes: 0, cost: 0 })
    }

    /// Reads a file that is there, and how many stretches of it were damaged: these are overwritten with
    /// zeros, and a record that was cut off while it was written is removed.
    ///
    /// # Errors
    /// If it cannot be read, or not be mended.
    pub(super) fn open(path: &Path) -> Result<(Self, u64)> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let mut file = file.map_err(Error::file("open", path))?;
        let mut total = 0;
        let mut places = BTreeSet::new();
        let found = scan(&file, |key, range| {
            places.insert(place(&key, range.start));
            total += cost(range.end - range.start);
        });
        let found = found.map_err(Error::file("read", path))?;
        let size = file.metadata().map_err(Error::file("read", path))?.len();
        if size > found.end || !found.damaged.is_empty() {
            let mut mend = || -> io::Result<()> {
                file.set_len(found.end)?;
                for stretch in &found.damaged {
                    file.seek(SeekFrom::Start(stretch.start))?;
                    let length = stretch.end - stretch.start;
                    io::copy(&mut io::repeat(0).take(length), &mut file)?;
                }
                file.sync_all()
            };
            mend().map_err(Error::file("mend", path))?;
        }
        let cost = total.max(found.end);
        let places = Places::Open(places);
        let segment = Segment { path: path.to_owned(), file, places, bytes: found.end, cost };
        Ok((segment, found.damaged.len() as u64))
    }

    /// Takes no more records.
    pub(super) fn seal(&mut self) {
        self.places.seal();
    }

    /// What it counts.
    pub(super) fn cost(&self) -> u64 {
        self.cost
    }

    /// Bytes of its file.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Entries in it, with those that were overwritten.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Appends records; when this returns they are on the disk.
    ///
    /// # Errors
    /// If the disk refuses: they are then not there.
    pub(super) fn append(&mut self, records: &[(RequestKey, Vec<u8>)]) -> Result<()> {
        let bytes: Vec<u8> = records.iter().flat_map(|(_, record)| record).copied().collect();
        let mut write = || -> io::Result<()> {
            self.file.seek(SeekFrom::Start(self.bytes))?;
            self.file.write_all(&bytes)?;
            self.file.sync_data()
        };
        write().map_err(Error::file("write", &self.path))?;
        for (key, record) in records {
            self.places.insert(place(key, self.bytes));
            self.bytes += record.len() as u64;
            self.cost += cost(record.len() as u64);
        }
        Ok(())
    }

    /// The answer under a key. What cannot be read is forgotten.
    pub(super) fn get(&mut self, key: &RequestKey) -> Lookup {
        let mut corrupt = 0;
        for offset in self.places.find(key.print()) {
            let bytes = self.read(offset).unwrap_or_default();
            let record = match read(&bytes) {
                Found::Whole(record) => Some(record),
                Found::Cut | Found::Nothing => None,
            };
            match record.as_ref().map(|record| (record.key == *key, record)) {
                Some((false, _)) => {} // of another request, whose key begins the same
                Some((true, record)) if let Some(answer) = record.answer() => {
                    return Lookup::Answer(answer);
                }
                _ => {
                    corrupt += 1;
                    self.places.remove(place(key, u64::from(offset)));
                }
            }
        }
        Lookup::Missing { corrupt }
    }

    /// The bytes of the record at an offset.
    fn read(&mut self, offset: u32) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(Record::USUAL);
        self.file.seek(SeekFrom::Start(offset.into()))?;
        let mut ahead = (&self.file).take(RECORD_MAX as u64);
        (&mut ahead).take(Record::USUAL as u64).read_to_end(&mut bytes)?;
        if read(&bytes) == Found::Cut {
            ahead.read_to_end(&mut bytes)?;
        }
        Ok(bytes)
    }

    /// Removes the file.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(super) fn remove(self) -> Result<()> {
        fs::remove_file(&self.path).map_err(Error::file("remove", &self.path))
    }
}

/// The beginning of a key, and behind it where the record is: 32 bits each.
fn place(key: &RequestKey, offset: u64) -> u64 {
    debug_assert!(offset <= u64::from(u32::MAX), "files are shorter");
    u64::from(key.print()) << 32 | offset
}

/// Where the records of a file lie, in the order of their keys.
#[derive(Debug)]
enum Places {
    /// More may come.
    Open(BTreeSet<u64>),
    /// No more come: 8 bytes each.
    Sealed(Vec<u64>),
}

impl Places {
    fn insert(&mut self, place: u64) {
        match self {
            Places::Open(places) => drop(places.insert(place)),
            Places::Sealed(_) => unreachable!("only the newest file takes records"),
        }
    }

    fn remove(&mut self, place: u64) {
        match self {
            Places::Open(places) => drop(places.remove(&place)),
            Places::Sealed(places) => places.retain(|&other| other != place),
        }
    }

    /// Offsets of the records whose keys begin so, the last first.
    fn find(&self, print: u32) -> Vec<u32> {
        let first = u64::from(print) << 32;
        let range = first..=first | u64::from(u32::MAX);
        match self {
            Places::Open(places) => places.range(range).rev().map(|&place| place as u32).collect(),
            Places::Sealed(places) => {
                let start = places.partition_point(|place| place < range.start());
                let found = places[start..].iter().take_while(|place| range.contains(place));
                let mut offsets: Vec<u32> = found.map(|&place| place as u32).collect();
                offsets.reverse();
                offsets
            }
        }
    }

    fn len(&self) -> usize {
        match self {
            Places::Open(places) => places.len(),
            Places::Sealed(places) => places.len(),
        }
    }

    fn seal(&mut self) {
        if let Places::Open(places) = self {
            *self = Places::Sealed(std::mem::take(places).into_iter().collect());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn places_are_found_open_and_sealed(
            prints in prop::collection::vec(0u32..5, 0..40),
            asked in 0u32..6,
        ) {
            let mut places = Places::Open(BTreeSet::new());
            for (offset, &print) in (0u64..).zip(&prints) {
                places.insert(u64::from(print) << 32 | offset);
            }
            let of_it = |offset: &u32| prints[*offset as usize] == asked;
            let expected: Vec<u32> = (0..prints.len() as u32).rev().filter(of_it).collect();
            prop_assert_eq!(places.find(asked), expected.clone());
            places.seal();
            prop_assert_eq!((places.find(asked), places.len()), (expected.clone(), prints.len()));
            if let Some(&offset) = expected.first() {
                places.remove(u64::from(asked) << 32 | u64::from(offset));
                prop_assert_eq!(places.find(asked), &expected[1..]);
            }
        }
    }
}
