//! The documents of files of all kinds, in the order of the files.

use super::input::{self, Counter, kind};
use super::jsonl::{self, Fields};
use super::{newswire, pubmed, table, text};
use crate::error::{Error, Result};
use crate::record::{Document, Place, Rejected};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

/// What a reader finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A document.
    Document(Box<Document>),
    /// A record that cannot be used.
    Rejected(Box<Rejected>),
    /// A document that an update file takes back.
    Withdrawn {
        /// Its id.
        id: String,
        /// Where the file says so.
        place: Place,
    },
}

/// The records of a file, one after another.
pub type Records = Box<dyn Iterator<Item = Found> + Send>;

/// A kind of file that a program adds to those we know.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// What names of such files end in, without the dot; `.gz` and `.zst` may follow.
    pub extension: &'static str,
    /// Its name in plans.
    pub name: &'static str,
    /// Reads a file as members of the corpus it is given. What cannot be used is found rejected; the same
    /// file gives the same records in the same order.
    pub read: fn(&Path, &str, Counter) -> Result<Records>,
}

static FORMATS: RwLock<Vec<&'static Format>> = RwLock::new(Vec::new());

impl Format {
    /// Has all readers of this process know the format. To be called before anything is read; an
    /// extension we know is then read by it.
    pub fn register(&'static self) {
        FORMATS.write().unwrap_or_else(PoisonError::into_inner).push(self);
    }

    fn of(path: &Path) -> Option<&'static Self> {
        let formats = FORMATS.read().unwrap_or_else(PoisonError::into_inner);
        formats.iter().rev().find(|format| kind(path) == format.extension).copied()
    }
}

/// What a file holds.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// PubMed XML, baseline or update.
    Pubmed,
    /// One JSON object a line.
    Jsonl,
    /// One document.
    Text,
    /// Newswire stories in SGML.
    Newswire,
    /// One row a record, below a row of names.
    Table(table::Delimiter),
    /// What a program has registered.
    Own(&'static Format),
}

impl Kind {
    /// What the name of a file says about its content.
    ///
    /// # Errors
    /// If it says nothing we know.
    pub fn of(path: &Path) -> Result<Self> {
        if let Some(format) = Format::of(path) {
            return Ok(Kind::Own(format));
        }
        match kind(path).as_str() {
            "xml" => Ok(Kind::Pubmed),
            "jsonl" | "ndjson" | "json" => Ok(Kind::Jsonl),
            "txt" | "md" | "text" => Ok(Kind::Text),
            "sgm" | "sgml" => Ok(Kind::Newswire),
            "csv" => Ok(Kind::Table(table::Delimiter::Comma)),
            "tsv" => Ok(Kind::Table(table::Delimiter::Tab)),
            _ => Err(Error::Setting(format!(
                "cannot tell from its name what {path:?} holds; known are .xml, .jsonl, .ndjson, \
                 .json (one object a line), .sgm, .csv, .tsv, .txt and .md, each also with .gz or \
                 .zst behind"
            ))),
        }
    }

    /// The name in plans.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Pubmed => "PubMed XML",
            Kind::Jsonl => "JSON Lines",
            Kind::Text => "text",
            Kind::Newswire => "newswire SGML",
            Kind::Table(table::Delimiter::Comma) => "CSV",
            Kind::Table(table::Delimiter::Tab) => "TSV",
            Kind::Own(format) => format.name,
        }
    }
}

/// How far a reader has come: part of a run's manifest.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct InputPosition {
    /// Files behind it.
    pub file: usize,
    /// Records of the next file behind it.
    pub records: u64,
    /// Pieces of the next record behind it, where that is split.
    pub pieces: u64,
}

/// Reads the documents of files one after another.
pub struct Documents {
    files: Vec<PathBuf>,
    source: String,
    fields: Fields,
    open: Option<Records>,
    position: InputPosition,
    counter: Counter,
}

impl Documents {
    /// The documents of `files`, in their order, as members of the corpus `source`.
    pub fn new(files: Vec<PathBuf>, source: &str, fields: Fields) -> Self {
        Self::counted(files, source, fields, Counter::default())
    }

    /// [`Documents::new`], counting the bytes that are read from disk.
    pub fn counted(files: Vec<PathBuf>, source: &str, fields: Fields, counter: Counter) -> Self {
        let position = InputPosition::default();
        Documents { files, source: source.to_owned(), fields, open: None, position, counter }
    }

    /// Goes on behind an earlier position. Pieces of a record are the caller's business.
    pub fn resume(
        files: Vec<PathBuf>,
        source: &str,
        fields: Fields,
        position: InputPosition,
    ) -> Self {
        let mut documents = Self::new(files, source, fields);
        documents.position.file = position.file;
        while documents.position.records < position.records && documents.next_of_file().is_some() {}
        documents
    }

    /// How far it has come.
    pub fn position(&self) -> InputPosition {
        self.position
    }

    /// The next record of the current file, which is opened if it is not.
    fn next_of_file(&mut self) -> Option<Found> {
        if self.open.is_none() {
            let path = self.files.get(self.position.file)?.clone();
            match self.open(&path) {
                Ok(open) => self.open = Some(open),
                // A file that vanished or cannot be read costs that file, not the run.
                Err(error) => {
                    let place = Place { file: path.display().to_string(), record: 0, byte: 0 };
                    let rejected = Rejected::unread("unreadable_input", error, place, "");
                    self.open = Some(Box::new(std::iter::empty()));
                    self.position.records += 1;
                    return Some(Found::Rejected(Box::new(rejected)));
                }
            }
        }
        let found = self.open.as_mut()?.next()?;
        self.position.records += 1;
        Some(found)
    }

    fn open(&self, path: &Path) -> Result<Records> {
        let (source, counter) = (self.source.clone(), self.counter.clone());
        Ok(match Kind::of(path)? {
            Kind::Pubmed => Box::new(pubmed::read(path, source, counter)?),
            Kind::Jsonl => Box::new(jsonl::read(path, source, self.fields.clone(), counter)?),
            Kind::Text => Box::new(text::read(path, source, counter)?),
            Kind::Newswire => Box::new(newswire::read(path, source, counter)?),
            Kind::Table(delimiter) => {
                Box::new(table::read(path, delimiter, source, self.fields.clone(), counter)?)
            }
            Kind::Own(format) => (format.read)(path, &source, counter)?,
        })
    }
}

impl Iterator for Documents {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        while self.position.file < self.files.len() {
            if let Some(found) = self.next_of_file() {
                return Some(found);
            }
            self.open = None;
            self.position = InputPosition { file: self.position.file + 1, ..Default::default() };
        }
        None
    }
}

/// The files of `paths`, directories replaced by the files of a known kind below them; and the others
/// below them, such as the checksums that come with a dump.
///
/// # Errors
/// If a path does not exist, or names a file of which nothing is known.
pub fn files(paths: &[PathBuf]) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    for path in paths.iter().filter(|path| !path.is_dir()) {
        Kind::of(path)?;
    }
    let known = |file: &PathBuf| Kind::of(file).is_ok();
    Ok(input::expand(paths)?.into_iter().partition(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_goes_on_where_another_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let line = |id: u32| format!("{{\"id\":{id},\"text\":\"t\"}}\n");
        let files = vec![
            file("a.jsonl", &(line(1) + "?\n" + &line(2))),
            file("b.jsonl", ""),
            folder.path().join("gone.jsonl"),
            file("c.jsonl", &line(3)),
        ];
        let read = |documents: Documents| -> Vec<String> {
            documents
                .map(|found| match found {
                    Found::Document(document) => document.id,
                    Found::Rejected(rejected) => format!("{}!", rejected.reason),
                    Found::Withdrawn { id, .. } => id,
                })
                .collect()
        };
        let all = read(Documents::new(files.clone(), "s", Fields::detected()));
        assert_eq!(all, ["1", "malformed_json!", "2", "unreadable_input!", "3"]);
        for count in 0..=all.len() {
            let mut first = Documents::new(files.clone(), "s", Fields::detected());
            assert_eq!(first.by_ref().take(count).count(), count);
            let position = first.position();
            let rest = Documents::resume(files.clone(), "s", Fields::detected(), position);
            assert_eq!(read(rest), all[count..], "behind {count} at {position:?}");
        }
    }

    #[test]
    fn checksums_in_a_dump_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let names = ["a.xml.gz", "a.xml.gz.md5", "b.xml.gz"];
        let paths = names.map(|name| folder.path().join(name));
        paths.iter().for_each(|path| std::fs::write(path, "").unwrap());
        let [a, sum, b] = paths;
        let (used, others) = files(&[folder.path().to_owned(), a.clone()]).unwrap();
        assert_eq!((used, others), (vec![a.clone(), b, a], vec![sum.clone()]));
        assert!(files(&[sum]).is_err());
        assert!(files(&["/dev/null".into()]).is_err());
    }

    #[test]
    fn names_say_what_a_file_holds() {
        let kind = |name: &str| Kind::of(Path::new(name)).ok().map(Kind::name);
        assert_eq!(kind("pubmed26n0001.xml.gz"), Some(Kind::Pubmed.name()));
        assert_eq!(kind("a.jsonl.zst"), Some(Kind::Jsonl.name()));
        assert_eq!(kind("a.md"), Some(Kind::Text.name()));
        assert_eq!(kind("reut2-000.sgm.zst"), Some(Kind::Newswire.name()));
        assert_eq!(kind("news.TSV.gz"), Some(Kind::Table(table::Delimiter::Tab).name()));
        assert_eq!(kind("a.pdf"), None);
    }
}
