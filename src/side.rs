//! Side sources of a mix: general instructions, read ahead by a thread of their own.

use crate::augment::item;
use crate::format::instructions::Endless;
use crate::record::{Item, Rejected};
use crate::synthesizer::Waker;
use crate::tokenizer::Tokenizer;
use crossbeam_channel::{Receiver, TryRecvError, bounded};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, fence};

/// Items that a side source has ready at most.
const READY_MAX: usize = 256;

/// What a side source is made of.
#[derive(Clone, Debug)]
pub struct SideSource {
    /// Its index among the sources of the mix, from 1.
    pub source: u32,
    /// Its name in ids and ledgers.
    pub name: String,
    /// Its files, read over and over.
    pub files: Vec<PathBuf>,
    /// The tokenizer of the model that is trained.
    pub tokenizer: Tokenizer,
}

/// The next record of a side source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SideRecord {
    /// An item, or why there is none.
    pub item: Result<Item, Box<Rejected>>,
    /// Records of the source that are behind this one, itself included.
    pub records: u64,
}

/// The records of a side source that belong to one lane.
#[derive(Debug)]
pub struct SideFeed {
    records: Receiver<SideRecord>,
    /// Set by a reader that found nothing, and is to be woken by the next record.
    starving: Arc<AtomicBool>,
}

/// What a feed has to offer right now.
#[derive(Debug, PartialEq, Eq)]
pub enum Offer {
    /// A record.
    Record(SideRecord),
    /// Nothing yet; the waker will say.
    NotYet,
    /// Nothing, ever: the files hold no usable record.
    Exhausted,
}

impl SideSource {
    /// The records of the source from `behind` on that belong to `lane` of `lanes`: every so many-th.
    pub fn records(
        &self,
        lane: u64,
        lanes: u64,
        behind: u64,
    ) -> impl Iterator<Item = SideRecord> + Send + use<> {
        let SideSource { source, name, files, tokenizer } = self.clone();
        Endless::new(files)
            .enumerate()
            .skip(behind as usize)
            .filter(move |(index, _)| *index as u64 % lanes == lane)
            .map(move |(index, (pass, read))| SideRecord {
                item: read.map(|read| {
                    item(&format!("{name}:{pass}:{}", read.id), source, &read.text, &tokenizer)
                }),
                records: index as u64 + 1,
            })
    }

    /// Starts reading; `waker` is called when there is something new after there was nothing.
    pub fn open(&self, lane: u64, lanes: u64, behind: u64, waker: Waker) -> SideFeed {
        let records = self.records(lane, lanes, behind);
        let (send, receive) = bounded(READY_MAX);
        let starving = Arc::new(AtomicBool::new(false));
        let told = starving.clone();
        std::thread::Builder::new()
            .name(format!("{} lane {lane}", self.name))
            .spawn(move || {
                for record in records {
                    if send.send(record).is_err() {
                        return; // the run is over
                    }
                    fence(SeqCst); // behind the record, before the look: see `SideFeed::poll`
                    if told.swap(false, SeqCst) {
                        waker();
                    }
                }
                drop(send);
                waker();
            })
            .expect("the system gives a run its few threads");
        SideFeed { records: receive, starving }
    }
}

impl SideFeed {
    /// The next record, if it is there.
    pub fn poll(&self) -> Offer {
        match self.take() {
            Offer::NotYet => {
                // Either the thread sees the flag behind its record, or we see the record behind the flag.
                self.starving.store(true, SeqCst);
                fence(SeqCst);
                self.take()
            }
            offer => offer,
        }
    }

    fn take(&self) -> Offer {
        match self.records.try_recv() {
            Ok(record) => Offer::Record(record),
            Err(TryRecvError::Empty) => Offer::NotYet,
            Err(TryRecvError::Disconnected) => Offer::Exhausted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::small;

    fn source(folder: &tempfile::TempDir, lines: &str) -> SideSource {
        let file = folder.path().join("general.jsonl");
        std::fs::write(&file, lines).unwrap();
        SideSource { source: 1, name: "general".into(), files: vec![file], tokenizer: small() }
    }

    fn lines(count: usize) -> String {
        (0..count)
            .map(|i| format!("{{\"id\":\"{i}\",\"question\":\"q\",\"answer\":\"{i}\"}}\n"))
            .collect()
    }

    #[test]
    fn lanes_share_the_records_and_go_on_anywhere() {
        let folder = tempfile::tempdir().unwrap();
        let source = source(&folder, &(lines(3) + "{}\n"));
        let ids = |lane, behind| -> Vec<String> {
            let records = source.records(lane, 2, behind).take(4);
            records.map(|record| record.item.map_or("!".into(), |item| item.id)).collect()
        };
        assert_eq!(ids(0, 0), ["general:0:0", "general:0:2", "general:1:0", "general:1:2"]);
        assert_eq!(ids(1, 0), ["general:0:1", "!", "general:1:1", "general:2:0"]);
        assert_eq!(ids(0, 3)[0], "general:1:0");
        let behind = source.records(1, 2, 0).nth(2).unwrap().records;
        assert_eq!(ids(1, behind)[0], "general:2:0");
    }

    #[test]
    fn a_feed_gives_the_same_as_reading() {
        let folder = tempfile::tempdir().unwrap();
        let source = source(&folder, &lines(5));
        let expected: Vec<SideRecord> = source.records(0, 1, 2).take(700).collect();
        let (woken, wakes) = crossbeam_channel::unbounded();
        let waker = Arc::new(move || {
            let _ = woken.send(());
        });
        let feed = source.open(0, 1, 2, waker);
        let mut found = Vec::new();
        while found.len() < 700 {
            match feed.poll() {
                Offer::Record(record) => found.push(record),
                Offer::NotYet => wakes.recv().unwrap(),
                Offer::Exhausted => panic!("an endless source ended"),
            }
        }
        assert_eq!(found, expected);
    }
}
