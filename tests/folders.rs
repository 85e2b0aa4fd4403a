//! Folders, to compare.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The files below a folder with their bytes.
///
/// # Panics
/// If the folder cannot be read.
pub fn tree(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).expect("the folder can be listed") {
            let path = entry.expect("the folder can be listed").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).expect("it is below").to_owned();
                files.insert(name, std::fs::read(&path).expect("the file can be read"));
            }
        }
    }
    files
}

/// Asserts that two folders hold the same files with the same bytes, but for those that `ignored` says.
///
/// # Panics
/// If they do not.
pub fn assert_same(left: &Path, right: &Path, ignored: impl Fn(&Path) -> bool) {
    let read = |folder: &Path| -> BTreeMap<PathBuf, Vec<u8>> {
        tree(folder).into_iter().filter(|(name, _)| !ignored(name)).collect()
    };
    let (left, right) = (read(left), read(right));
    let names = |files: &BTreeMap<PathBuf, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&left), names(&right));
    for (name, bytes) in &left {
        assert!(bytes == &right[name], "{name:?} differs");
    }
}
