//! Side sources of a mix, read ahead by threads of their own: general instructions, task rows, raw texts.

use crate::augment::item;
use crate::error::Result;
use crate::format::documents::{Documents, Found};
use crate::format::jsonl::Fields;
use crate::format::passes::{Open, Passes, Read};
use crate::format::tasks::Task;
use crate::format::{instructions, tasks};
use crate::record::{Document, Entry, Item, Rejected, Stage};
use crate::synthesizer::Waker;
use crate::template::Templates;
use crate::template::render::render;
use crate::tokenizer::Tokenizer;
use crossbeam_channel::{Receiver, TryRecvError, bounded};
use std::path::{Path, PathBuf};
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
    /// Its files.
    pub files: Vec<PathBuf>,
    /// What they hold.
    pub content: Content,
    /// How often they are read; for ever if it is not said.
    pub passes: Option<u64>,
    /// The tokenizer of the model that is trained.
    pub tokenizer: Tokenizer,
}

/// What the files of a side source hold.
#[derive(Clone, Debug)]
pub enum Content {
    /// Instructions: question, one space, response.
    Instructions,
    /// Texts with their pairs, rendered by the templates with this seed, anew in every pass.
    Tasks(Arc<Templates>, u64),
    /// Raw texts of any kind that can be read.
    Texts(Fields),
}

/// The next record of a side source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SideRecord {
    /// An item, or why there is none.
    pub item: std::result::Result<Item, Box<Rejected>>,
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
    /// Nothing, ever: it has been read as often as it may be, or holds no usable record.
    Exhausted,
}

impl Content {
    /// Opens a file in a pass with the given number.
    fn open(&self, path: &Path, pass: u64) -> Result<Box<dyn Iterator<Item = Read> + Send>> {
        Ok(match self.clone() {
            Content::Instructions => {
                let records = instructions::read(path)?;
                Box::new(records.map(|read| read.map(|read| (read.id, read.text))))
            }
            Content::Tasks(templates, seed) => {
                let rows = tasks::read(path)?;
                Box::new(rows.map(move |row| {
                    row.map(|row| rendered(row, pass, &templates, seed)).map_err(of_mix)
                }))
            }
            Content::Texts(fields) => {
                let documents = Documents::new(vec![path.to_owned()], "side", fields);
                Box::new(documents.filter_map(|found| match found {
                    Found::Document(document) => Some(Ok((document.id, document.text))),
                    Found::Rejected(rejected) => Some(Err(of_mix(rejected))),
                    Found::Withdrawn { .. } => None,
                }))
            }
        })
    }
}

fn of_mix(mut rejected: Box<Rejected>) -> Box<Rejected> {
    rejected.stage = Stage::Mix;
    rejected
}

/// A task row as a document; other templates are drawn for it in every pass.
fn rendered(row: Task, pass: u64, templates: &Templates, seed: u64) -> (String, String) {
    let Task { id, text, pairs, .. } = row;
    let drawn = format!("task {pass}:{id}");
    let document = Document { id: drawn, text, ..Document::default() };
    let mut documents = render(&[Entry { document, pairs, ..Entry::default() }], templates, seed);
    (id, documents.remove(0).text)
}

impl SideSource {
    /// The records of the source from `behind` on that belong to `lane` of `lanes`: every so many-th.
    pub fn records(
        &self,
        lane: u64,
        lanes: u64,
        behind: u64,
    ) -> impl Iterator<Item = SideRecord> + Send + use<> {
        let SideSource { source, name, files, content, passes, tokenizer } = self.clone();
        let open: Open = Box::new(move |path, pass| content.open(path, pass));
        Passes::new(files, passes, open)
            .enumerate()
            .skip(behind as usize)
            .filter(move |(index, _)| *index as u64 % lanes == lane)
            .map(move |(index, (pass, read))| SideRecord {
                item: read.map(|(id, text)| {
                    item(&format!("{name}:{pass}:{id}"), source, &text, &tokenizer)
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
        SideSource {
            source: 1,
            name: "general".into(),
            files: vec![file],
            content: Content::Instructions,
            passes: None,
            tokenizer: small(),
        }
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

    #[test]
    fn tasks_are_rendered_anew_in_every_pass() {
        let folder = tempfile::tempdir().unwrap();
        let row =
            r#"{"id":"1","context":"Rates rose.","QA_list":[{"Q":"What rose?","A":"Rates"}]}"#;
        let tasks = SideSource {
            name: "tasks".into(),
            content: Content::Tasks(Arc::new(Templates::built_in()), 1),
            passes: Some(4),
            ..source(&folder, &format!("{row}\n{{}}\n"))
        };
        let found: Vec<SideRecord> = tasks.records(0, 1, 0).collect();
        let items: Vec<&Item> = found.iter().filter_map(|found| found.item.as_ref().ok()).collect();
        let ids: Vec<&str> = items.iter().map(|item| item.id.as_str()).collect();
        assert_eq!(ids, ["tasks:0:1", "tasks:1:1", "tasks:2:1", "tasks:3:1"]);
        let texts: Vec<String> = items.iter().map(|item| small().decode(&item.tokens)).collect();
        assert!(texts.iter().all(|text| text.contains("Rates rose.")), "{texts:?}");
        assert!(texts.windows(2).any(|two| two[0] != two[1]), "{texts:?}");
        assert_eq!(found.len(), 5);
    }

    #[test]
    fn raw_texts_are_a_source_too() {
        let folder = tempfile::tempdir().unwrap();
        let texts = SideSource {
            content: Content::Texts(Fields::detected()),
            passes: Some(1),
            ..source(&folder, "{\"id\":\"1\",\"text\":\"Rates rose.\"}\n{}\n")
        };
        let found: Vec<SideRecord> = texts.records(0, 1, 0).collect();
        let text = |item: &Item| small().decode(&item.tokens);
        let texts: Vec<_> = found.iter().map(|found| found.item.as_ref().map(text).ok()).collect();
        assert_eq!(texts, [Some("Rates rose.".to_owned()), None]);
    }
}
