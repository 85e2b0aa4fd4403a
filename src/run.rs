//! The run folder: what is in it, how an epoch is committed, how a run goes on.
//!
//! ```text
//! commit:    files of the epoch (written, synced, renamed) ─▶ one line of the manifest (synced)
//! recovery:  last whole line of the manifest ─▶ unreferenced files are deleted ─▶ next epoch
//! ```
//!
//! The manifest is the state: everything behind it is redone, nothing before it is done twice.

use crate::augment::Augmented;
use crate::error::{Error, Result};
use crate::format::{compressed, durable, packed};
use crate::ledger::Ledger;
use crate::manifest::{EpochOutput, EpochRecord, FileRecord, Manifest};
use crate::record::{Rejected, Sequence};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use xxhash_rust::xxh3::xxh3_128;

const DATA_FOLDERS: [&str; 3] = ["augmented", "packed", "rejected"];

/// A run folder that no other process runs in; the system lets go of it when the process ends.
#[derive(Debug)]
pub struct RunLock {
    _file: fs::File,
}

/// The folder of a run.
#[derive(Clone, Debug)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// Opens the folder for a run of this configuration: creates it, or goes on in it.
    ///
    /// # Errors
    /// If the folder holds a run of another configuration: the differences are shown.
    pub fn open(path: &Path, configuration: &Value) -> Result<Self> {
        let folder = Self::claim(path, configuration)?;
        for name in DATA_FOLDERS {
            let path = path.join(name);
            fs::create_dir_all(&path).map_err(Error::file("create", &path))?;
        }
        Ok(folder)
    }

    /// Opens the folder for a run that writes no shards: only `run.json` is there, or is to be the same.
    ///
    /// # Errors
    /// If the folder holds a run of another configuration: the differences are shown.
    pub fn claim(path: &Path, configuration: &Value) -> Result<Self> {
        if path.exists() && !path.is_dir() {
            return Err(Error::Setting(format!("{path:?} is no folder; use another --out")));
        }
        fs::create_dir_all(path).map_err(Error::file("create", path))?;
        let file = path.join("run.json");
        if file.exists() {
            let text = fs::read_to_string(&file).map_err(Error::file("read", &file))?;
            let found: Value =
                serde_json::from_str(&text).map_err(|error| Error::malformed(&file, error))?;
            let differences = differences("", &found, configuration);
            if !differences.is_empty() {
                return Err(Error::Setting(format!(
                    "{path:?} holds a run of another configuration; use another --out, or the same \
                     settings:\n  {}",
                    differences.join("\n  ")
                )));
            }
        } else {
            durable::write(&file, format!("{configuration:#}\n").as_bytes())?;
        }
        Ok(RunFolder { path: path.to_owned() })
    }

    /// Keeps other processes from running in the folder, for as long as the lock is held.
    ///
    /// # Errors
    /// If another process has it, or the system cannot lock files.
    pub fn lock(&self) -> Result<RunLock> {
        let path = self.path.join("run.json");
        let file = fs::File::open(&path).map_err(Error::file("open", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(RunLock { _file: file }),
            Err(fs::TryLockError::WouldBlock) => {
                let reason = format!("{:?} is in use: another process runs in it", self.path);
                Err(Error::Setting(reason))
            }
            Err(fs::TryLockError::Error(error)) => Err(Error::file("lock", &path)(error)),
        }
    }

    /// Looks at an existing run.
    ///
    /// # Errors
    /// If there is none.
    pub fn existing(path: &Path) -> Result<Self> {
        match path.join("run.json").is_file() {
            true => Ok(RunFolder { path: path.to_owned() }),
            false => Err(Error::malformed(path, "is no run folder: it has no run.json")),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration of the run.
    ///
    /// # Errors
    /// If `run.json` cannot be read.
    pub fn configuration(&self) -> Result<Value> {
        let file = self.path.join("run.json");
        let text = fs::read_to_string(&file).map_err(Error::file("read", &file))?;
        serde_json::from_str(&text).map_err(|error| Error::malformed(&file, error))
    }

    /// What has been committed, as it can be read without changing anything.
    ///
    /// # Errors
    /// If the manifest is damaged elsewhere than at its end.
    pub fn manifest(&self) -> Result<Manifest> {
        Ok(self.read_manifest()?.0)
    }

    /// What has been committed; removes what an interrupted commit left behind.
    ///
    /// # Errors
    /// If the manifest is damaged elsewhere than at its end, or a file it names is missing or has another
    /// size.
    pub fn recover(&self) -> Result<Manifest> {
        let (manifest, whole) = self.read_manifest()?;
        let file = self.path.join("manifest.jsonl");
        if file.exists() {
            let text = fs::read(&file).map_err(Error::file("read", &file))?;
            if text.len() > whole {
                durable::write(&file, &text[..whole])?;
            }
        }
        let mut known = BTreeSet::new();
        for record in manifest.epochs.iter().flat_map(|epoch| &epoch.files) {
            let path = self.path.join(&record.name);
            let size = fs::metadata(&path).map(|metadata| metadata.len());
            if size.as_ref().ok() != Some(&record.bytes) {
                let found = size.map_or_else(|e| e.to_string(), |size| format!("{size} bytes"));
                let wanted = record.bytes;
                let reason = format!("{found}, where the manifest says {wanted} bytes");
                return Err(Error::malformed(&path, reason));
            }
            known.insert(path);
        }
        for folder in DATA_FOLDERS {
            let folder = self.path.join(folder);
            for entry in fs::read_dir(&folder).map_err(Error::file("list", &folder))? {
                let path = entry.map_err(Error::file("list", &folder))?.path();
                if !known.contains(&path) {
                    fs::remove_file(&path).map_err(Error::file("remove", &path))?;
                }
            }
        }
        Ok(manifest)
    }

    /// Writes an epoch behind so many sequences; when this returns, it is there for good.
    ///
    /// # Errors
    /// If the disk refuses: the run is then as it was before.
    pub fn commit(&self, output: &EpochOutput, sequences_before: u64) -> Result<EpochRecord> {
        let epoch = output.epoch;
        let files = thread::scope(|scope| -> Result<Vec<FileRecord>> {
            // The disk takes a file while the next one is encoded.
            let mut writes = Vec::new();
            let mut put = |name: String, bytes: Vec<u8>| {
                writes.push(scope.spawn(move || self.write(name, &bytes)));
            };
            if !output.augmented.is_empty() {
                let bytes = compressed::write_lines(&output.augmented, Augmented::write_line);
                put(format!("augmented/epoch-{epoch:06}.jsonl.zst"), bytes);
            }
            for (lane, (_, sequences)) in output.lanes.iter().enumerate() {
                if !sequences.is_empty() {
                    let name = format!("packed/epoch-{epoch:06}-lane-{lane:02}.parquet");
                    put(name, packed::write(sequences)?);
                }
            }
            if !output.rejected.is_empty() {
                let mut rejected: Vec<&Rejected> = output.rejected.iter().collect();
                rejected.sort();
                put(format!("rejected/epoch-{epoch:06}.jsonl.zst"), compressed::write(&rejected));
            }
            writes.into_iter().map(|write| write.join().expect("writing does not panic")).collect()
        })?;
        let record = EpochRecord {
            epoch,
            files,
            first_sequence: sequences_before,
            sequences: output.lanes.iter().map(|(_, sequences)| sequences.len() as u64).sum(),
            mix_ppm: shares(&output.ledger),
            lanes: output.lanes.iter().map(|(state, _)| state.clone()).collect(),
            input: output.input,
            ledger: output.ledger.clone(),
        };
        let line = serde_json::to_string(&record).expect("records are plain values");
        durable::append_line(&self.path.join("manifest.jsonl"), &line)?;
        Ok(record)
    }

    fn write(&self, name: String, bytes: &[u8]) -> Result<FileRecord> {
        durable::write(&self.path.join(&name), bytes)?;
        Ok(FileRecord { name, bytes: bytes.len() as u64, digest: digest(bytes) })
    }

    /// The sequences of a committed epoch, in order.
    ///
    /// # Errors
    /// If a shard cannot be read, or is not what was written.
    pub fn sequences(&self, epoch: &EpochRecord) -> Result<Vec<Sequence>> {
        self.read(epoch, "packed/", packed::read)
    }

    /// The rendered documents of a committed epoch, in order.
    ///
    /// # Errors
    /// If the file cannot be read, or is not what was written.
    pub fn augmented(&self, epoch: &EpochRecord) -> Result<Vec<Augmented>> {
        self.read(epoch, "augmented/", |path, bytes| compressed::read(path, &bytes))
    }

    /// What was rejected in a committed epoch.
    ///
    /// # Errors
    /// If the file cannot be read, or is not what was written.
    pub fn rejected(&self, epoch: &EpochRecord) -> Result<Vec<Rejected>> {
        self.read(epoch, "rejected/", |path, bytes| compressed::read(path, &bytes))
    }

    /// The records in an epoch's files of one kind. Their bytes must be those that were committed.
    fn read<T>(
        &self,
        epoch: &EpochRecord,
        kind: &str,
        records: impl Fn(&Path, Vec<u8>) -> Result<Vec<T>>,
    ) -> Result<Vec<T>> {
        let mut all = Vec::new();
        for file in epoch.files.iter().filter(|file| file.name.starts_with(kind)) {
            let path = self.path.join(&file.name);
            let bytes = fs::read(&path).map_err(Error::file("read", &path))?;
            if digest(&bytes) != file.digest {
                return Err(Error::malformed(&path, "is not what was committed: it has changed"));
            }
            all.extend(records(&path, bytes)?);
        }
        Ok(all)
    }

    /// The manifest, and how many bytes of its file are whole lines.
    fn read_manifest(&self) -> Result<(Manifest, usize)> {
        let file = self.path.join("manifest.jsonl");
        if !file.exists() {
            return Ok((Manifest::default(), 0));
        }
        let text = fs::read_to_string(&file).map_err(Error::file("read", &file))?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut manifest = Manifest::default();
        for (number, line) in text[..whole].lines().enumerate() {
            let record: EpochRecord = serde_json::from_str(line).map_err(|error| {
                Error::malformed(&file, format!("line {}: {error}", number + 1))
            })?;
            if record.epoch != number as u64 {
                let reason = format!("line {} is epoch {}", number + 1, record.epoch);
                return Err(Error::malformed(&file, reason));
            }
            manifest.epochs.push(record);
        }
        Ok((manifest, whole))
    }
}

/// What each source gave to an epoch, in millionths of its tokens.
fn shares(ledger: &Ledger) -> BTreeMap<String, u64> {
    let all = u128::from(ledger.get("mix/tokens").max(1));
    let share = |(name, tokens): (&str, u64)| {
        (name.to_owned(), (u128::from(tokens) * 1_000_000 / all) as u64)
    };
    ledger.under("mix/tokens_of/").map(share).collect()
}

/// The digest of a file's bytes, as it stands in the manifest.
fn digest(bytes: &[u8]) -> String {
    format!("{:032x}", xxh3_128(bytes))
}

/// What differs between two configurations, a line each.
fn differences(path: &str, found: &Value, wanted: &Value) -> Vec<String> {
    match (found, wanted) {
        (Value::Object(found), Value::Object(wanted)) => {
            let keys: BTreeSet<&String> = found.keys().chain(wanted.keys()).collect();
            let value = |object: &serde_json::Map<String, Value>, key: &String| {
                object.get(key).cloned().unwrap_or(Value::Null)
            };
            keys.into_iter()
                .flat_map(|key| {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    differences(&path, &value(found, key), &value(wanted, key))
                })
                .collect()
        }
        (found, wanted) if found == wanted => Vec::new(),
        (found, wanted) => vec![format!("{path}: {found} in the folder, {wanted} now")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::LaneState;
    use crate::record::Segment;
    use serde_json::json;

    fn output(epoch: u64) -> EpochOutput {
        let mut ledger = Ledger::default();
        ledger.add("read/records", epoch + 1);
        let segment = Segment { item: "a".into(), source: 0, offset: 0, length: 2 };
        let (tokens, learned) = (vec![1, 2], vec![true; 2]);
        let segments = vec![segment];
        let sequence = Sequence { tokens, learned, segments, ..Sequence::default() };
        let rejected = Rejected::unread("no_text", "", crate::record::Place::default(), "x");
        EpochOutput {
            epoch,
            lanes: vec![(LaneState::default(), vec![sequence; epoch as usize])],
            rejected: vec![rejected; epoch as usize],
            ledger,
            ..EpochOutput::default()
        }
    }

    fn commit(folder: &RunFolder, manifest: &mut Manifest, epoch: u64) {
        let record = folder.commit(&output(epoch), manifest.sequences()).unwrap();
        manifest.epochs.push(record);
    }

    #[test]
    fn what_is_committed_is_found_again() {
        let place = tempfile::tempdir().unwrap();
        let folder = RunFolder::open(place.path(), &json!({"seed": 1})).unwrap();
        let mut manifest = folder.recover().unwrap();
        for epoch in 0..4 {
            commit(&folder, &mut manifest, epoch);
        }
        assert_eq!(folder.recover().unwrap(), manifest);
        assert_eq!((manifest.sequences(), manifest.next_epoch()), (6, 4));
        assert_eq!(manifest.ledger().get("read/records"), 10);
        let sequences = folder.sequences(&manifest.epochs[3]).unwrap();
        assert_eq!(sequences, output(3).lanes[0].1);
    }

    #[test]
    fn one_process_at_a_time_has_the_folder() {
        let place = tempfile::tempdir().unwrap();
        let folder = RunFolder::open(place.path(), &json!({})).unwrap();
        let lock = folder.lock().unwrap();
        assert!(folder.lock().unwrap_err().to_string().contains("in use"));
        drop(lock);
        folder.lock().unwrap();
    }

    #[test]
    fn what_an_interrupted_commit_left_is_removed() {
        let place = tempfile::tempdir().unwrap();
        let folder = RunFolder::open(place.path(), &json!({})).unwrap();
        let mut manifest = Manifest::default();
        commit(&folder, &mut manifest, 0);
        commit(&folder, &mut manifest, 1);
        let file = place.path().join("manifest.jsonl");
        let whole = fs::read_to_string(&file).unwrap();
        fs::write(&file, whole.clone() + "{\"epoch\":2,\"fil").unwrap();
        fs::write(place.path().join("packed/epoch-000002-lane-00.parquet"), "torn").unwrap();
        fs::write(place.path().join("packed/epoch-000003-lane-00.tmp"), "torn").unwrap();
        assert_eq!(folder.manifest().unwrap(), manifest);
        assert_eq!(folder.recover().unwrap(), manifest);
        assert_eq!(fs::read_to_string(&file).unwrap(), whole);
        assert_eq!(fs::read_dir(place.path().join("packed")).unwrap().count(), 1);
    }

    #[test]
    fn a_shard_of_another_size_is_an_error() {
        let place = tempfile::tempdir().unwrap();
        let folder = RunFolder::open(place.path(), &json!({})).unwrap();
        let mut manifest = Manifest::default();
        commit(&folder, &mut manifest, 0);
        commit(&folder, &mut manifest, 1);
        fs::write(place.path().join("packed/epoch-000001-lane-00.parquet"), "short").unwrap();
        let error = folder.recover().unwrap_err().to_string();
        assert!(error.contains("5 bytes, where the manifest says"), "{error}");
    }

    #[test]
    fn a_shard_with_other_bytes_is_an_error() {
        let place = tempfile::tempdir().unwrap();
        let folder = RunFolder::open(place.path(), &json!({})).unwrap();
        let mut manifest = Manifest::default();
        commit(&folder, &mut manifest, 0);
        commit(&folder, &mut manifest, 1);
        let file = place.path().join("packed/epoch-000001-lane-00.parquet");
        let mut bytes = fs::read(&file).unwrap();
        bytes[9] ^= 1;
        fs::write(&file, bytes).unwrap();
        folder.recover().unwrap();
        let error = folder.sequences(&manifest.epochs[1]).unwrap_err().to_string();
        assert!(error.contains("has changed"), "{error}");
    }

    #[test]
    fn another_configuration_is_refused_with_the_difference() {
        let place = tempfile::tempdir().unwrap();
        let configuration = json!({"seed": 1, "mix": {"ratio": [1, 1]}, "rounds": 3});
        RunFolder::open(place.path(), &configuration).unwrap();
        RunFolder::open(place.path(), &configuration).unwrap();
        let other = json!({"seed": 1, "mix": {"ratio": [1, 4]}, "length": 2048, "rounds": 3});
        let error = RunFolder::open(place.path(), &other).unwrap_err().to_string();
        assert!(error.contains("mix.ratio: [1,1] in the folder, [1,4] now"), "{error}");
        assert!(error.contains("length: null in the folder, 2048 now"), "{error}");
        assert!(!error.contains("seed"), "{error}");
    }
}
