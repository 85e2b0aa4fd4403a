//! Files that are there whole or not at all, whatever happens while they are written.

use crate::error::{Error, Result};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;

/// Writes a file: to a temporary name, to the disk, then to its place.
///
/// # Errors
/// If the disk refuses; the file is then as it was before.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary).map_err(Error::file("create", &temporary))?;
    file.write_all(bytes).map_err(Error::file("write", &temporary))?;
    file.sync_all().map_err(Error::file("write", &temporary))?;
    drop(file);
    fs::rename(&temporary, path).map_err(Error::file("rename", &temporary))?;
    sync_directory(path.parent().unwrap_or(Path::new(".")))
}

/// Appends a line to a file and brings it to the disk.
///
/// # Errors
/// If the disk refuses.
pub fn append_line(path: &Path, line: &str) -> Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(Error::file("open", path))?;
    file.write_all(format!("{line}\n").as_bytes()).map_err(Error::file("write", path))?;
    file.sync_all().map_err(Error::file("write", path))
}

/// Brings the files of a directory to the disk and gives the directory its name.
///
/// # Errors
/// If the disk refuses; the final name then does not exist.
pub fn publish_directory(temporary: &Path, path: &Path) -> Result<()> {
    for entry in fs::read_dir(temporary).map_err(Error::file("list", temporary))? {
        let file = entry.map_err(Error::file("list", temporary))?.path();
        let handle = File::open(&file).map_err(Error::file("open", &file))?;
        handle.sync_all().map_err(Error::file("write", &file))?;
    }
    sync_directory(temporary)?;
    fs::rename(temporary, path).map_err(Error::file("rename", temporary))?;
    sync_directory(path.parent().unwrap_or(Path::new(".")))
}

/// Brings the names of a directory to the disk.
///
/// # Errors
/// If the disk refuses.
pub fn sync_directory(path: &Path) -> Result<()> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let directory = File::open(path).map_err(Error::file("open", path))?;
    directory.sync_all().map_err(Error::file("write", path))
}
