//! Files as streams of bytes, decompressed on the way.

use crate::error::{Error, Result};
use flate2::bufread::MultiGzDecoder;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const BUFFER_BYTES: usize = 1 << 18;
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Bytes that have been read from disk.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// How many so far.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

struct Counted<R> {
    inner: R,
    counter: Counter,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.counter.0.fetch_add(count as u64, Relaxed);
        Ok(count)
    }
}

/// Opens a file, plain or compressed with gzip or zstd. The first bytes decide, not the name.
///
/// # Errors
/// If the file cannot be opened or read.
pub fn open(path: &Path) -> Result<Box<dyn BufRead + Send>> {
    open_counted(path, Counter::default())
}

/// [`open`], counting the bytes that are read from disk.
///
/// # Errors
/// If the file cannot be opened or read.
pub fn open_counted(path: &Path, counter: Counter) -> Result<Box<dyn BufRead + Send>> {
    let file = File::open(path).map_err(Error::file("open", path))?;
    let mut raw = BufReader::with_capacity(BUFFER_BYTES, Counted { inner: file, counter });
    let start = raw.fill_buf().map_err(Error::file("read", path))?;
    Ok(if start.starts_with(&GZIP) {
        Box::new(BufReader::with_capacity(BUFFER_BYTES, MultiGzDecoder::new(raw)))
    } else if start.starts_with(&ZSTD) {
        let decoder = zstd::Decoder::with_buffer(raw).map_err(Error::file("read", path))?;
        Box::new(BufReader::with_capacity(BUFFER_BYTES, decoder))
    } else {
        Box::new(raw)
    })
}

/// The files of `paths`, directories replaced by all files below them in the order of their names.
/// Hidden files are left out.
///
/// # Errors
/// If a path does not exist or a directory cannot be listed.
pub fn expand(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        list(path, &mut files)?;
    }
    Ok(files)
}

fn list(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let metadata = std::fs::metadata(path).map_err(Error::file("open", path))?;
    if !metadata.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::file("list", path))? {
        names.push(entry.map_err(Error::file("list", path))?.path());
    }
    names.sort();
    let hidden = |path: &Path| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
    };
    names.iter().filter(|name| !hidden(name)).try_for_each(|name| list(name, files))
}

/// The extension of a file under its compression: `xml` for `a.xml.gz`.
pub fn kind(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let name = [".gz", ".zst"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
    name.rsplit_once('.').map_or(String::new(), |(_, extension)| extension.to_owned())
}

/// A digest of the bytes of a file, as they lie on disk.
///
/// # Errors
/// If the file cannot be read.
pub fn digest(path: &Path) -> Result<u128> {
    let mut file = File::open(path).map_err(Error::file("open", path))?;
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match file.read(&mut buffer).map_err(Error::file("read", path))? {
            0 => return Ok(hash.digest128()),
            count => hash.update(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn check(name: &str, bytes: &[u8]) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let mut text = String::new();
        open(&path).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "one\ntwo\n", "{name}");
    }

    fn gzip(text: &str) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn the_first_bytes_decide_how_a_file_is_read() {
        check("plain.gz", b"one\ntwo\n");
        check("gzip", &gzip("one\ntwo\n"));
        check("zstd.txt", &zstd::encode_all(&b"one\ntwo\n"[..], 1).unwrap());
    }

    #[test]
    fn files_of_several_members_are_read_to_their_end() {
        check("gzip", &[gzip("one\n"), gzip("two\n")].concat());
        let frame = |text: &str| zstd::encode_all(text.as_bytes(), 1).unwrap();
        check("zstd", &[frame("one\n"), frame("two\n")].concat());
    }

    #[test]
    fn directories_are_read_in_the_order_of_names() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.txt", ".hidden", "a/z.txt", "a/y.txt"] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let files = expand(&[folder.path().to_owned()]).unwrap();
        let names: Vec<_> = files
            .iter()
            .map(|f| f.strip_prefix(folder.path()).unwrap().to_str().unwrap())
            .collect();
        assert_eq!(names, ["a/y.txt", "a/z.txt", "b.txt"]);
    }

    #[test]
    fn compression_hides_no_extension() {
        for (name, expected) in [
            ("a.xml.gz", "xml"),
            ("b.JSONL.zst", "jsonl"),
            ("c.txt", "txt"),
            ("d", ""),
            ("e.gz", ""),
        ] {
            assert_eq!(kind(Path::new(name)), expected);
        }
    }
}
