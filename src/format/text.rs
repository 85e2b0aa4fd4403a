//! Plain text: one document a file.

use super::documents::Found;
use super::input::{self, Counter};
use super::lines::LINE_BYTES_MAX;
use crate::error::Result;
use crate::record::{Document, Place, Rejected};
use std::io::Read;
use std::path::Path;

/// The one document of a file.
///
/// # Errors
/// If the file cannot be opened.
pub fn read(
    path: &Path,
    source: String,
    counter: Counter,
) -> Result<impl Iterator<Item = Found> + use<>> {
    let file = path.display().to_string();
    let place = Place { file: file.clone(), record: 1, byte: 0 };
    let mut bytes = Vec::new();
    let limit = LINE_BYTES_MAX as u64;
    let outcome = input::open_counted(path, counter)?.take(limit + 1).read_to_end(&mut bytes);
    let reject = |reason: &str, detail: String, bytes: &[u8]| {
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(1000)]).into_owned();
        Found::Rejected(Box::new(Rejected::unread(reason, detail, place.clone(), &start)))
    };
    let found = match outcome {
        Err(error) => reject("unreadable_input", error.to_string(), &bytes),
        Ok(count) if count as u64 > limit => {
            reject("record_too_large", format!("longer than {limit} bytes"), &bytes)
        }
        Ok(_) => match String::from_utf8(bytes) {
            Ok(text) => Found::Document(Box::new(Document {
                id: file,
                source,
                text: text.strip_prefix('\u{feff}').unwrap_or(&text).to_owned(),
                place: place.clone(),
                ..Document::default()
            })),
            Err(error) => {
                let detail = format!("byte {}", error.utf8_error().valid_up_to());
                reject("invalid_utf8", detail, error.as_bytes())
            }
        },
    };
    Ok(std::iter::once(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8], expected: Result<&str, &str>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, bytes).unwrap();
        let found: Vec<Found> = read(&path, "s".into(), Counter::default()).unwrap().collect();
        let found: Vec<Result<&str, &str>> = found
            .iter()
            .map(|found| match found {
                Found::Document(document) => Ok(document.text.as_str()),
                Found::Rejected(rejected) => Err(rejected.reason.as_str()),
                Found::Withdrawn { .. } => unreachable!(),
            })
            .collect();
        assert_eq!(found, [expected]);
    }

    type Result<T, E> = std::result::Result<T, E>;

    #[test]
    fn a_file_is_a_document() {
        check(b"One.\n\nTwo.\n", Ok("One.\n\nTwo.\n"));
        check("\u{feff}One.".as_bytes(), Ok("One."));
        check(b"One \xff", Err("invalid_utf8"));
    }
}
