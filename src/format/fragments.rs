//! Cuts a stream of markup into its records, before anything is parsed.
//!
//! A malformed record then costs that record, and memory stays flat on a file of any size.

use crate::record::{Place, Rejected};
use std::io::{BufRead, ErrorKind};

/// What the records of a stream are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Records {
    /// The elements that are records.
    pub(super) elements: &'static [&'static str],
    /// Whether a record that is not UTF-8 is read as ISO 8859-1, in which all bytes are characters.
    pub(super) latin: bool,
}

/// Bytes of the largest record that is read.
const RECORD_BYTES_MAX: usize = 32 << 20;

/// One record, from its start tag to its end tag.
pub(super) struct Fragment {
    pub(super) text: String,
    pub(super) place: Place,
}

/// Iterates over the records of a stream.
pub(super) struct Fragments {
    records: Records,
    reader: Box<dyn BufRead + Send>,
    file: String,
    /// Bytes that have been read; those before `front` have been given out.
    buffer: Vec<u8>,
    front: usize,
    /// Position of the front in the stream.
    byte: u64,
    record: u64,
    /// Why there is nothing more: the end, or an error.
    end: Option<Option<std::io::Error>>,
}

/// A start tag in the buffer.
struct Start {
    at: usize,
    name: &'static str,
}

type Rejection = Box<Rejected>;

impl Fragments {
    pub(super) fn new(records: Records, reader: Box<dyn BufRead + Send>, file: String) -> Self {
        let buffer = Vec::new();
        Fragments { records, reader, file, buffer, front: 0, byte: 0, record: 0, end: None }
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer[self.front..]
    }

    /// Reads more; false if there is nothing more.
    fn fill(&mut self) -> bool {
        while self.end.is_none() {
            match self.reader.fill_buf() {
                Ok([]) => self.end = Some(None),
                Ok(bytes) => {
                    let count = bytes.len();
                    self.buffer.drain(..self.front);
                    self.front = 0;
                    self.buffer.extend_from_slice(bytes);
                    self.reader.consume(count);
                    return true;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => self.end = Some(Some(error)),
            }
        }
        false
    }

    /// Leaves the first `count` bytes behind.
    fn skip(&mut self, count: usize) {
        self.front += count;
        self.byte += count as u64;
    }

    /// Brings the next record's start tag to the front of the buffer.
    fn seek(&mut self) -> Option<&'static str> {
        loop {
            if let Some(Start { at, name }) = self.start(self.bytes(), 0) {
                self.skip(at);
                return Some(name);
            }
            let longest = self.records.elements.iter().map(|name| name.len() + 2).max();
            let longest = longest.unwrap_or(0);
            self.skip(self.bytes().len().saturating_sub(longest)); // a tag may be cut in two
            if !self.fill() {
                return None;
            }
        }
    }

    /// The length of the record at the front of the buffer, or why it has none.
    fn measure(&mut self, name: &'static str) -> Result<usize, (&'static str, usize)> {
        let close = format!("</{name}>");
        let mut seen = 0;
        loop {
            let from = seen.max(1);
            let bytes = self.bytes();
            let rest = bytes.get(from..).unwrap_or_default();
            let end = find(rest, close.as_bytes()).map(|at| from + at + close.len());
            let limit = end.unwrap_or(bytes.len());
            // Another record's start before the end: this one broke off.
            if let Some(next) = self.start(&bytes[..limit], from) {
                return Err(("truncated_record", next.at));
            }
            if let Some(end) = end {
                return Ok(end);
            }
            let length = bytes.len();
            if length > RECORD_BYTES_MAX {
                return Err(("record_too_large", length));
            }
            seen = length.saturating_sub(close.len() + 20);
            if !self.fill() {
                return Err(("truncated_record", length));
            }
        }
    }

    /// The first start tag of a record in `bytes`, at or behind `from`.
    fn start(&self, bytes: &[u8], from: usize) -> Option<Start> {
        let mut at = from;
        while let Some(found) = find(&bytes[at.min(bytes.len())..], b"<") {
            at += found;
            let tag = &bytes[at + 1..];
            let name = self.records.elements.iter().find(|name| {
                let end = tag.strip_prefix(name.as_bytes()).and_then(|rest| rest.first());
                end.is_some_and(|end| b"> \t\r\n".contains(end))
            });
            match name {
                Some(name) => return Some(Start { at, name }),
                None => at += 1,
            }
        }
        None
    }

    fn reject(&mut self, reason: &str, detail: String, length: usize, place: Place) -> Rejection {
        let start = &self.bytes()[..length.min(1000)];
        let text = String::from_utf8_lossy(start).into_owned();
        self.skip(length);
        Box::new(Rejected::unread(reason, detail, place, &text))
    }
}

impl Iterator for Fragments {
    type Item = Result<Fragment, Rejection>;

    fn next(&mut self) -> Option<Self::Item> {
        let name = self.seek();
        self.record += 1;
        let place = Place { file: self.file.clone(), record: self.record, byte: self.byte };
        let Some(name) = name else {
            let error = self.end.as_mut()?.take()?;
            let detail = format!("the rest of the file cannot be read: {error}");
            return Some(Err(Box::new(Rejected::unread("unreadable_input", detail, place, ""))));
        };
        match self.measure(name) {
            Ok(length) => {
                let bytes = &self.bytes()[..length];
                let text = match std::str::from_utf8(bytes) {
                    Ok(text) => text.to_owned(),
                    Err(_) if self.records.latin => bytes.iter().map(|&b| char::from(b)).collect(),
                    Err(error) => {
                        let detail = format!("byte {} of the record", error.valid_up_to());
                        return Some(Err(self.reject("invalid_utf8", detail, length, place)));
                    }
                };
                self.skip(length);
                Some(Ok(Fragment { text, place }))
            }
            Err((reason, length)) => {
                let detail = match self.end.as_mut().and_then(Option::take) {
                    Some(error) => format!("{length} bytes without its end tag: {error}"),
                    None => format!("{length} bytes without its end tag"),
                };
                Some(Err(self.reject(reason, detail, length, place)))
            }
        }
    }
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, needle)
}
