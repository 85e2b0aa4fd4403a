//! Documents as rows of a table, CSV or TSV, whose first row names the columns.

use super::documents::Found;
use super::input::{self, Counter};
use super::jsonl::{self, Fields};
use super::lines::LINE_BYTES_MAX;
use crate::error::Result;
use crate::record::{Place, Rejected};
use csv::{ByteRecord, ErrorKind, Position, ReaderBuilder, StringRecord};
use serde_json::{Map, Value};
use std::io::{BufRead, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// What stands between the cells of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delimiter {
    /// A comma.
    Comma,
    /// A tab.
    Tab,
}

/// The documents of a file. Columns are to a row what fields are to a JSON object.
///
/// # Errors
/// If the file cannot be opened.
pub fn read(
    path: &Path,
    delimiter: Delimiter,
    source: String,
    fields: Fields,
    counter: Counter,
) -> Result<impl Iterator<Item = Found> + use<>> {
    let since_row = Arc::new(AtomicUsize::new(0));
    let reader = input::open_counted(path, counter)?;
    let reader = Bounded { reader, since_row: since_row.clone() };
    let rows = ReaderBuilder::new()
        .delimiter(match delimiter {
            Delimiter::Comma => b',',
            Delimiter::Tab => b'\t',
        })
        .flexible(true) // rows of another length are rejected by us, one by one
        .from_reader(reader);
    let file = path.display().to_string();
    Ok(Rows { rows, since_row, file, source, fields, ended: false })
}

struct Rows {
    rows: csv::Reader<Bounded>,
    since_row: Arc<AtomicUsize>,
    file: String,
    source: String,
    fields: Fields,
    ended: bool,
}

impl Iterator for Rows {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        if self.ended {
            return None;
        }
        let mut row = ByteRecord::new();
        self.since_row.store(0, Relaxed);
        let before = self.rows.position().clone();
        match self.rows.read_byte_record(&mut row) {
            Ok(false) => None,
            Ok(true) => Some(self.found(&row)),
            Err(error) => {
                self.ended = true;
                let cause = match error.kind() {
                    ErrorKind::Io(error) => error.get_ref(),
                    _ => None,
                };
                let too_long =
                    cause.is_some_and(<dyn std::error::Error + Send + Sync>::is::<TooLong>);
                let reason = if too_long { "record_too_large" } else { "unreadable_input" };
                let detail = format!("the rest of the file cannot be read: {error}");
                let place = self.place(&before);
                Some(Found::Rejected(Box::new(Rejected::unread(reason, detail, place, ""))))
            }
        }
    }
}

impl Rows {
    fn found(&mut self, row: &ByteRecord) -> Found {
        let place = row.position().map_or_else(Place::default, |at| self.place(at));
        match self.document(row, &place) {
            Ok(document) => Found::Document(Box::new(document)),
            Err((reason, detail)) => {
                let text = String::from_utf8_lossy(row.as_slice()).into_owned();
                Found::Rejected(Box::new(Rejected::unread(reason, detail, place, &text)))
            }
        }
    }

    fn document(
        &mut self,
        row: &ByteRecord,
        place: &Place,
    ) -> std::result::Result<crate::record::Document, (&'static str, String)> {
        let row = StringRecord::from_byte_record(row.clone())
            .map_err(|error| ("invalid_utf8", error.utf8_error().to_string()))?;
        let names = self.rows.headers().map_err(|error| ("invalid_utf8", error.to_string()))?;
        if names.len() != row.len() {
            let detail = format!("{} cells below {} names", row.len(), names.len());
            return Err(("malformed_row", detail));
        }
        let cell = |(name, cell): (&str, &str)| {
            (name.trim().trim_start_matches('\u{feff}').to_owned(), Value::String(cell.to_owned()))
        };
        let mut cells: Map<String, Value> = names.iter().zip(row.iter()).map(cell).collect();
        if cells.get(&self.fields.id).and_then(Value::as_str) == Some("") {
            cells.remove(&self.fields.id);
        }
        jsonl::document(cells, &self.source, &self.fields, place)
    }

    fn place(&self, at: &Position) -> Place {
        Place { file: self.file.clone(), record: at.line(), byte: at.byte() }
    }
}

/// A reader that refuses to read on when a row does not end: a quote that is never closed.
struct Bounded {
    reader: Box<dyn BufRead + Send>,
    since_row: Arc<AtomicUsize>,
}

/// A row is longer than a record may be.
#[derive(Debug, thiserror::Error)]
#[error("a row of more than {LINE_BYTES_MAX} bytes")]
struct TooLong;

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.since_row.load(Relaxed) > LINE_BYTES_MAX {
            return Err(std::io::Error::other(TooLong));
        }
        let count = self.reader.read(buffer)?;
        self.since_row.fetch_add(count, Relaxed);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Documents as `id text`, rejections as `reason at line`.
    fn check(name: &str, table: &[u8], fields: Fields, expected: &[&str]) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, table).unwrap();
        let delimiter = if name.ends_with("tsv") { Delimiter::Tab } else { Delimiter::Comma };
        let found: Vec<String> = read(&path, delimiter, "s".into(), fields, Counter::default())
            .unwrap()
            .map(|found| match found {
                Found::Document(document) => format!("{} {}", document.id, document.text),
                Found::Rejected(rejected) => {
                    format!("{} at {}", rejected.reason, rejected.place.record)
                }
                Found::Withdrawn { .. } => unreachable!(),
            })
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn columns_are_found_by_name() {
        let table = "\u{feff}id,title,text\n7,T,\"One, two\nand \"\"three\"\"\"\n8,U,Four\n";
        check(
            "a.csv",
            table.as_bytes(),
            Fields::detected(),
            &["7 One, two\nand \"three\"", "8 Four"],
        );
        let fields = Fields { id: "url".into(), text: vec!["head".into(), "body".into()] };
        check("a.tsv", b"url\thead\tbody\nu\tH\tB, c\n", fields, &["u H\n\nB, c"]);
    }

    #[test]
    fn a_row_that_is_wrong_costs_that_row() {
        check(
            "a.csv",
            b"id,text\n1,a\n2\n3,\xff\n4,d\n",
            Fields::detected(),
            &["1 a", "malformed_row at 3", "invalid_utf8 at 4", "4 d"],
        );
        check("a.csv", b"id,body\n1,a\n", Fields::detected(), &["no_text at 2"]);
        check("a.csv", b"", Fields::detected(), &[]);
    }

    #[test]
    fn a_quote_that_is_never_closed_ends_the_file_but_not_the_memory() {
        let mut table = b"id,text\n1,a\n2,\"b".to_vec();
        table.resize(LINE_BYTES_MAX + (4 << 20), b'x');
        check("a.csv", &table, Fields::detected(), &["1 a", "record_too_large at 3"]);
    }
}
