//! Answers that were given before: durable, found by all that decides them, shared by rounds and runs.
//!
//! ```text
//! callers ─▶ front ─┬─ known: answered at once
//!              │    └─ new ─▶ engine ─▶ written and synced, many at a time ─▶ answered
//!              ▼
//!  answers-00000007.hwlog │ …08 │ …09 ◀─ appended     each a sixteenth of the bound; the oldest goes first,
//!      └─ what is asked for in the older half is copied to the newest ─┘     what is used stays
//! ```
//!
//! The store is a log: records that stand for themselves, one behind the other. An index in memory, 8 bytes an
//! entry, is made from it when it is opened. A byte that changed costs the record it is in: that is answered
//! anew. What was written last stands before what was written earlier under the same key.

pub mod front;
pub mod key;
pub mod metrics;
pub mod record;
mod scan;
mod segment;

use crate::error::{Error, Result};
use crate::format::durable;
use key::RequestKey;
use metrics::StoreCounters;
use record::{Answer, RECORD_MAX, encode};
use segment::{Lookup, Segment, cost};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// Files that the bound is divided into.
const SEGMENTS: u64 = 16;

/// The least bound that makes sense, in bytes.
pub const BYTES_MIN: u64 = 1 << 20;

/// Answers on disk, in a folder that nobody else uses at the time.
#[derive(Debug)]
pub struct RequestStore {
    folder: PathBuf,
    bytes_max: u64,
    /// The oldest first. The last takes what comes; the others are sealed.
    segments: VecDeque<Segment>,
    next_segment: u64,
    /// Answers of the older half that were asked for: they are written again with the next ones.
    used: Vec<(RequestKey, Vec<u8>)>,
    counters: Arc<StoreCounters>,
    _lock: File,
}

impl RequestStore {
    /// Opens the store in a folder, which is made if it is not there. It will hold `bytes_max` bytes at most,
    /// [`BYTES_MIN`] at least. Damaged entries are dropped, and counted.
    ///
    /// # Errors
    /// If another process uses the folder, or the disk refuses.
    pub fn open(folder: &Path, bytes_max: u64) -> Result<Self> {
        if !folder.is_dir() {
            fs::create_dir_all(folder).map_err(Error::file("create", folder))?;
            durable::sync_directory(folder.parent().unwrap_or(Path::new(".")))?;
        }
        let lock = lock(folder)?;
        let mut store = RequestStore {
            folder: folder.to_owned(),
            bytes_max: bytes_max.max(BYTES_MIN),
            segments: VecDeque::new(),
            next_segment: 1,
            used: Vec::new(),
            counters: Arc::default(),
            _lock: lock,
        };
        for (number, path) in segment_files(folder)? {
            let (segment, damaged) = Segment::open(&path)?;
            store.counters.corrupt.fetch_add(damaged, Relaxed);
            store.newest_is_sealed();
            store.segments.push_back(segment);
            store.next_segment = number + 1;
        }
        store.make_room(0)?;
        Ok(store)
    }

    /// What it has done, for as long as anybody looks.
    pub fn counters(&self) -> Arc<StoreCounters> {
        self.counters.clone()
    }

    /// The answer to a request; none if it is not there, or was damaged.
    pub fn get(&mut self, key: &RequestKey) -> Option<Answer> {
        let mut newer = 0;
        for segment in self.segments.iter_mut().rev() {
            newer += segment.cost();
            match segment.get(key) {
                Lookup::Missing { corrupt } => {
                    self.counters.corrupt.fetch_add(corrupt, Relaxed);
                }
                Lookup::Answer(answer) => {
                    if newer > self.bytes_max / 2 {
                        self.used.push((*key, encode(key, &answer)));
                    }
                    return Some(answer);
                }
            }
        }
        None
    }

    /// Keeps answers. When this returns they are on the disk: a crash does not lose them.
    ///
    /// Answers of a mebibyte and more, or of more than a sixteenth of the bound, are not kept.
    ///
    /// # Errors
    /// If the disk refuses. Nothing more can be put then.
    pub fn put(&mut self, answers: &[(RequestKey, Answer)]) -> Result<()> {
        let used = std::mem::take(&mut self.used);
        let new = answers.iter().map(|(key, answer)| (*key, encode(key, answer)));
        let (mut batch, mut batch_cost) = (Vec::new(), 0);
        for (key, record) in used.into_iter().chain(new) {
            let record_cost = cost(record.len() as u64);
            if record.len() > RECORD_MAX || record_cost > self.segment_max() {
                continue;
            }
            let newest = self.segments.back().map(Segment::cost);
            if newest.is_none_or(|cost| cost + batch_cost + record_cost > self.segment_max()) {
                self.append(&mut batch)?;
                self.begin_segment()?;
                batch_cost = 0;
            }
            batch.push((key, record));
            batch_cost += record_cost;
        }
        self.append(&mut batch)
    }

    /// Whether something waits to be written again: putting no answers does it.
    pub fn is_behind(&self) -> bool {
        !self.used.is_empty()
    }

    /// Entries in it, with those that were written more than once.
    pub fn len(&self) -> usize {
        self.segments.iter().map(Segment::len).sum()
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of its files.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(Segment::bytes).sum()
    }

    /// What one file may count. Places in it are 32-bit numbers.
    fn segment_max(&self) -> u64 {
        (self.bytes_max / SEGMENTS).min(u32::MAX.into())
    }

    fn append(&mut self, batch: &mut Vec<(RequestKey, Vec<u8>)>) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let bytes = batch.iter().map(|(_, record)| record.len() as u64).sum();
        self.make_room(batch.iter().map(|(_, record)| cost(record.len() as u64)).sum())?;
        let newest = self.segments.back_mut().expect("records go to a file that was begun");
        newest.append(batch)?;
        self.counters.written.fetch_add(batch.len() as u64, Relaxed);
        self.counters.written_bytes.fetch_add(bytes, Relaxed);
        self.counters.held_bytes.store(self.bytes(), Relaxed);
        batch.clear();
        Ok(())
    }

    fn begin_segment(&mut self) -> Result<()> {
        self.newest_is_sealed();
        let path = self.folder.join(file_name(self.next_segment));
        self.segments.push_back(Segment::create(&path)?);
        self.next_segment += 1;
        Ok(())
    }

    fn newest_is_sealed(&mut self) {
        if let Some(newest) = self.segments.back_mut() {
            newest.seal();
        }
    }

    /// Removes the oldest files until so much more fits. The newest stays, if it is to take what comes.
    fn make_room(&mut self, wanted: u64) -> Result<()> {
        let held = |segments: &VecDeque<Segment>| segments.iter().map(Segment::cost).sum::<u64>();
        while held(&self.segments) + wanted > self.bytes_max
            && (wanted == 0 || self.segments.len() > 1)
            && let Some(oldest) = self.segments.pop_front()
        {
            oldest.remove()?;
        }
        self.counters.held_bytes.store(self.bytes(), Relaxed);
        Ok(())
    }
}

/// Keeps other processes from using the folder.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(Error::file("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(Error::Setting(format!(
            "the request store {folder:?} is in use by another process; use another --request-store"
        ))),
        Err(fs::TryLockError::Error(error)) => Err(Error::file("lock", &path)(error)),
    }
}

fn file_name(number: u64) -> String {
    format!("answers-{number:08}.hwlog")
}

/// The files of a store with their numbers, the oldest first. Other files are let be.
fn segment_files(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::file("list", folder))? {
        let path = entry.map_err(Error::file("list", folder))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let number = name.and_then(|name| name.strip_prefix("answers-")?.strip_suffix(".hwlog"));
        if let Some(number) = number.and_then(|number| number.parse().ok()) {
            files.push((number, path));
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use key::Identity;
    use proptest::prelude::*;
    use record::Ending;
    use std::collections::BTreeMap;

    use crate::synthesizer::Request;

    fn key(number: u32) -> RequestKey {
        let request = Request { key: 0, tokens: vec![number], new_tokens_max: 9 };
        RequestKey::new(Identity::new("test"), &request)
    }

    fn answer(number: u32, length: usize) -> Answer {
        let ending = if number.is_multiple_of(2) { Ending::Stop } else { Ending::Length };
        Answer { tokens: vec![number; length], ending }
    }

    fn put(store: &mut RequestStore, numbers: impl IntoIterator<Item = u32>, length: usize) {
        let answers: Vec<_> =
            numbers.into_iter().map(|number| (key(number), answer(number, length))).collect();
        store.put(&answers).unwrap();
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        segment_files(folder).unwrap().into_iter().map(|(_, path)| path).collect()
    }

    fn on_disk(folder: &Path) -> u64 {
        files(folder).iter().map(|path| fs::metadata(path).unwrap().len()).sum()
    }

    fn corrupt(store: &RequestStore) -> u64 {
        store.counters.corrupt.load(Relaxed)
    }

    /// A copy of the files as they are now: what a process that is killed leaves.
    fn copied(folder: &Path) -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        for path in files(folder) {
            fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
        }
        copy
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn what_was_put_is_got_also_after_opening_again(
            batches in prop::collection::vec(prop::collection::vec((0u32..50, 0usize..300), 0..20), 1..8),
            reopened in any::<u8>(),
        ) {
            let place = tempfile::tempdir().unwrap();
            let mut store = RequestStore::open(place.path(), BYTES_MIN).unwrap();
            let mut expected = BTreeMap::new();
            for (round, batch) in batches.iter().enumerate() {
                let answers: Vec<_> = batch
                    .iter()
                    .map(|&(number, length)| (key(number), answer(number + 1000, length)))
                    .collect();
                store.put(&answers).unwrap();
                expected.extend(answers);
                if reopened >> (round % 8) & 1 == 1 {
                    drop(store);
                    store = RequestStore::open(place.path(), BYTES_MIN).unwrap();
                }
                for number in 0..51 {
                    prop_assert_eq!(store.get(&key(number)), expected.get(&key(number)).cloned());
                }
            }
            prop_assert_eq!(corrupt(&store), 0);
        }
    }

    #[test]
    fn what_was_put_is_there_when_the_process_is_killed() {
        let place = tempfile::tempdir().unwrap();
        let mut store = RequestStore::open(place.path(), BYTES_MIN).unwrap();
        for number in 0..30 {
            put(&mut store, [number], 50);
            let copy = copied(place.path());
            let mut after = RequestStore::open(copy.path(), BYTES_MIN).unwrap();
            assert_eq!(after.get(&key(number)), Some(answer(number, 50)));
            assert_eq!(after.len() as u32, number + 1);
        }
    }

    #[test]
    fn an_interrupted_write_is_removed_and_written_over() {
        let place = tempfile::tempdir().unwrap();
        let mut store = RequestStore::open(place.path(), BYTES_MIN).unwrap();
        put(&mut store, [1, 2], 50);
        let file = files(place.path()).remove(0);
        let whole = fs::read(&file).unwrap();
        for kept in [whole.len() - 1, whole.len() - 60, whole.len() / 2 + 3] {
            let copy = tempfile::tempdir().unwrap();
            fs::write(copy.path().join(file.file_name().unwrap()), &whole[..kept]).unwrap();
            let mut after = RequestStore::open(copy.path(), BYTES_MIN).unwrap();
            let found = [1, 2].map(|number| after.get(&key(number)));
            assert_eq!(found, [Some(answer(1, 50)), None]);
            put(&mut after, [2, 3], 50);
            drop(after);
            let mut after = RequestStore::open(copy.path(), BYTES_MIN).unwrap();
            for number in 1..4 {
                assert_eq!(after.get(&key(number)), Some(answer(number, 50)));
            }
            assert_eq!(corrupt(&after), 0);
        }
    }

    #[test]
    fn a_changed_byte_costs_its_entry_which_is_written_again() {
        let place = tempfile::tempdir().unwrap();
        let mut store = RequestStore::open(place.path(), BYTES_MIN).unwrap();
        put(&mut store, 0..10, 50);
        drop(store);
        let file = files(place.path()).remove(0);
        let whole = fs::read(&file).unwrap();
        let length = whole.len() / 10;
        for place in 0..length {
            let copy = tempfile::tempdir().unwrap();
            let mut bytes = whole.clone();
            bytes[4 * length + place] ^= 0x10;
            fs::write(copy.path().join(file.file_name().unwrap()), bytes).unwrap();
            let mut store = RequestStore::open(copy.path(), BYTES_MIN).unwrap();
            for number in 0..10 {
                let expected = (number != 4).then(|| answer(number, 50));
                assert_eq!(store.get(&key(number)), expected, "byte {place}");
            }
            assert_eq!(corrupt(&store), 1);
            put(&mut store, [4], 50);
            assert_eq!(store.get(&key(4)), Some(answer(4, 50)));
            drop(store);
            let mut store = RequestStore::open(copy.path(), BYTES_MIN).unwrap();
            assert_eq!(store.get(&key(4)), Some(answer(4, 50)));
            assert_eq!(corrupt(&store), 0, "it is reported once");
        }
    }

    #[test]
    fn a_byte_that_changes_under_an_open_store_is_noticed() {
        let place = tempfile::tempdir().unwrap();
        let mut store = RequestStore::open(place.path(), BYTES_MIN).unwrap();
        put(&mut store, 0..3, 50);
        let file = files(place.path()).remove(0);
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&file, bytes).unwrap();
        assert_eq!(store.get(&key(1)), None);
        assert_eq!((store.get(&key(1)), corrupt(&store)), (None, 1));
        put(&mut store, [1], 50);
        for number in 0..3 {
            assert_eq!(store.get(&key(number)), Some(answer(number, 50)));
        }
    }

    #[test]
    fn the_bound_holds_and_what_is_used_stays() {
        let place = tempfile::tempdir().unwrap();
        let mut store = RequestStore::open(place.path(), BYTES_MIN).unwrap();
        put(&mut store, 0..2, 600);
        for number in (2..6000).step_by(20) {
            put(&mut store, number..number + 20, 600);
            if number % 100 == 2 {
                assert_eq!(store.get(&key(0)), Some(answer(0, 600)), "{number}");
            }
            if number % 1000 == 982 {
                drop(store);
                store = RequestStore::open(place.path(), BYTES_MIN).unwrap();
            }
            assert!(store.bytes() <= BYTES_MIN);
        }
        assert_eq!(on_disk(place.path()), store.bytes());
        assert!(store.bytes() > BYTES_MIN * 7 / 8, "{}", store.bytes());
        assert_eq!(store.get(&key(1)), None, "it was not used");
        assert_eq!(store.get(&key(5999)), Some(answer(5999, 600)));
        assert_eq!(corrupt(&store), 0);
    }

    #[test]
    fn small_entries_are_bounded_by_their_number() {
        let place = tempfile::tempdir().unwrap();
        let mut store = RequestStore::open(place.path(), BYTES_MIN).unwrap();
        for first in 0..100 {
            put(&mut store, first * 100..(first + 1) * 100, 1);
        }
        assert!((3500..=4096).contains(&store.len()), "{}", store.len());
    }

    #[test]
    fn a_smaller_bound_holds_when_a_store_is_opened() {
        let place = tempfile::tempdir().unwrap();
        let mut store = RequestStore::open(place.path(), 8 * BYTES_MIN).unwrap();
        for first in 0..60 {
            put(&mut store, first * 100..(first + 1) * 100, 600);
        }
        assert!(store.bytes() > 2 * BYTES_MIN);
        drop(store);
        let mut store = RequestStore::open(place.path(), BYTES_MIN).unwrap();
        assert!(store.bytes() <= BYTES_MIN && on_disk(place.path()) == store.bytes());
        assert_eq!(store.get(&key(5999)), Some(answer(5999, 600)));
        put(&mut store, 6000..6100, 600);
        assert!(store.bytes() <= BYTES_MIN);
    }

    #[test]
    fn an_answer_that_is_too_long_is_not_kept() {
        let place = tempfile::tempdir().unwrap();
        let mut store = RequestStore::open(place.path(), BYTES_MIN).unwrap();
        put(&mut store, [1], 70_000);
        put(&mut store, [2], 60_000);
        assert_eq!([1, 2].map(|number| store.get(&key(number)).is_some()), [false, true]);
    }

    #[test]
    fn one_process_at_a_time_has_the_store_and_others_are_told_which() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("shared");
        let store = RequestStore::open(&folder, BYTES_MIN).unwrap();
        let error = RequestStore::open(&folder, BYTES_MIN).unwrap_err().to_string();
        assert!(error.contains("shared") && error.contains("in use"), "{error}");
        drop(store);
        RequestStore::open(&folder, BYTES_MIN).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_is_named() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("file");
        fs::write(&file, "").unwrap();
        let error = RequestStore::open(&file, BYTES_MIN).unwrap_err().to_string();
        assert!(error.contains("file"), "{error}");
        fs::write(place.path().join("answers-x.hwlog"), "not ours").unwrap();
        let store = RequestStore::open(place.path(), BYTES_MIN).unwrap();
        assert!(store.is_empty() && corrupt(&store) == 0);
    }
}
