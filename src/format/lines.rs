//! Lines of a text file, each with its place, never more than one in memory.

use super::input::{self, Counter};
use crate::error::Result;
use crate::record::{Place, Rejected};
use std::io::{BufRead, ErrorKind};
use std::path::Path;

/// Bytes of the longest line that is read; longer ones are rejected without being held.
pub const LINE_BYTES_MAX: usize = 64 << 20;

/// Iterates over the lines of a file that are not blank.
pub struct Lines {
    reader: Box<dyn BufRead + Send>,
    file: String,
    line: u64,
    byte: u64,
    limit: usize,
    ended: bool,
}

/// A line with its place, or why it cannot be used.
pub type Line = std::result::Result<(String, Place), Box<Rejected>>;

/// How reading a line ended.
enum End {
    Line,
    File,
    TooLong,
    Failed(std::io::Error),
}

impl Lines {
    /// Opens a file, plain or compressed.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_counted(path, Counter::default())
    }

    /// [`Lines::open`], counting the bytes that are read from disk.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn open_counted(path: &Path, counter: Counter) -> Result<Self> {
        let reader = input::open_counted(path, counter)?;
        Ok(Self::new(reader, path.display().to_string(), LINE_BYTES_MAX))
    }

    /// Reads lines of at most `limit` bytes.
    pub fn new(reader: Box<dyn BufRead + Send>, file: String, limit: usize) -> Self {
        Lines { reader, file, line: 0, byte: 0, limit, ended: false }
    }

    /// Collects one line without its line feed. Beyond the limit, bytes are counted and let go.
    fn read(&mut self, line: &mut Vec<u8>) -> End {
        let mut too_long = false;
        loop {
            let buffer = match self.reader.fill_buf() {
                Ok(buffer) => buffer,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return End::Failed(error),
            };
            let feed = memchr::memchr(b'\n', buffer);
            let taken = feed.unwrap_or(buffer.len());
            let room = self.limit.saturating_sub(line.len());
            too_long |= taken > room;
            if line.is_empty() {
                line.reserve_exact(taken.min(room)); // most lines are in the buffer as a whole
            }
            line.extend_from_slice(&buffer[..taken.min(room)]);
            let at_end = buffer.is_empty();
            let used = taken + usize::from(feed.is_some());
            self.reader.consume(used);
            self.byte += used as u64;
            match (feed, at_end, too_long) {
                (None, false, _) => {}
                (Some(_), _, true) | (None, true, true) => return End::TooLong,
                (Some(_), _, false) => return End::Line,
                (None, true, false) => return End::File,
            }
        }
    }

    fn finish(&mut self, mut bytes: Vec<u8>, end: End, place: Place) -> Option<Line> {
        let reject = |reason: &str, detail: String, bytes: &[u8], place| {
            let start = &bytes[..bytes.len().min(1000)];
            let text = String::from_utf8_lossy(start);
            Some(Err(Box::new(Rejected::unread(reason, detail, place, &text))))
        };
        match end {
            End::TooLong => {
                let detail = format!("longer than {} bytes", self.limit);
                return reject("record_too_large", detail, &bytes, place);
            }
            End::Failed(error) => {
                self.ended = true;
                let detail = format!("the rest of the file cannot be read: {error}");
                return reject("unreadable_input", detail, &bytes, place);
            }
            End::Line | End::File => self.ended = matches!(end, End::File),
        }
        if place.byte == 0 && bytes.starts_with("\u{feff}".as_bytes()) {
            bytes.drain(..3);
        }
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
        match String::from_utf8(bytes) {
            Ok(text) if text.trim().is_empty() => None,
            Ok(text) => Some(Ok((text, place))),
            Err(error) => {
                let detail = format!("byte {} of the record", error.utf8_error().valid_up_to());
                reject("invalid_utf8", detail, error.as_bytes(), place)
            }
        }
    }
}

impl Iterator for Lines {
    type Item = Line;

    fn next(&mut self) -> Option<Line> {
        while !self.ended {
            self.line += 1;
            let place = Place { file: self.file.clone(), record: self.line, byte: self.byte };
            let mut bytes = Vec::new();
            let end = self.read(&mut bytes);
            if let Some(line) = self.finish(bytes, end, place) {
                return Some(line);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufReader, Cursor, Read};

    /// Lines as text, rejections as `reason at byte`.
    fn check(bytes: &[u8], expected: &[&str]) {
        for capacity in [1, 3, 1000] {
            let reader = BufReader::with_capacity(capacity, Cursor::new(bytes.to_vec()));
            let lines = Lines::new(Box::new(reader), "f".into(), 10);
            let found: Vec<String> = lines
                .map(|line| match line {
                    Ok((text, place)) => format!("{}:{} {text}", place.record, place.byte),
                    Err(bad) => format!("{}:{} {}!", bad.place.record, bad.place.byte, bad.reason),
                })
                .collect();
            assert_eq!(found, expected, "with a buffer of {capacity}");
        }
    }

    #[test]
    fn blank_lines_are_no_records() {
        check(b"a\n\n \r\nb\r\nc", &["1:0 a", "4:6 b", "5:9 c"]);
        check(b"", &[]);
    }

    #[test]
    fn a_line_that_is_too_long_is_rejected_and_the_next_one_read() {
        check(
            b"0123456789\n01234567890\nb\n",
            &["1:0 0123456789", "2:11 record_too_large!", "3:23 b"],
        );
        check(b"01234567890", &["1:0 record_too_large!"]);
    }

    #[test]
    fn bytes_that_are_no_text_are_rejected() {
        check(b"a\n\xff\xfe\nb\n", &["1:0 a", "2:2 invalid_utf8!", "3:5 b"]);
    }

    #[test]
    fn a_byte_order_mark_is_no_text() {
        check("\u{feff}a\n\u{feff}b\n".as_bytes(), &["1:0 a", "2:5 \u{feff}b"]);
    }

    #[test]
    fn a_broken_stream_gives_what_came_before_it() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                Err(ErrorKind::UnexpectedEof.into())
            }
        }
        let reader = BufReader::new(Cursor::new(b"one\ntw").chain(Broken));
        let mut lines = Lines::new(Box::new(reader), "f".into(), 100);
        assert_eq!(lines.next().unwrap().unwrap().0, "one");
        let bad = lines.next().unwrap().unwrap_err();
        assert_eq!((bad.reason.as_str(), bad.excerpt.as_str()), ("unreadable_input", "tw"));
        assert_eq!((bad.place.record, bad.place.byte), (2, 4));
        assert!(lines.next().is_none());
    }
}
