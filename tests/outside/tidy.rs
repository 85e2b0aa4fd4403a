//! The rules of the house, checked by reading the sources and `cargo metadata`.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

const LINES_MAX: usize = 500;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The Rust sources below some folders, with their text.
fn sources(folders: &[&str]) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut waiting: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).collect();
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            found.push((path.strip_prefix(root()).unwrap().to_owned(), text));
        }
    }
    assert!(!found.is_empty());
    found
}

fn all() -> Vec<(PathBuf, String)> {
    sources(&["src", "operators", "pipelines", "tests", "benches", "examples", "build.rs"])
}

/// The code of a file: lines without comments.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.trim_start().starts_with("//"))
}

fn dependencies() -> Vec<(String, Vec<String>)> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let name = |value: &Value| value["name"].as_str().unwrap().to_owned();
    let of = |package: &Value| {
        let all = package["dependencies"].as_array().unwrap().iter();
        (name(package), all.filter(|dependency| dependency["kind"] != "dev").map(name).collect())
    };
    metadata["packages"].as_array().unwrap().iter().map(of).collect()
}

#[test]
fn dependencies_point_one_way() {
    let packages = dependencies();
    assert_eq!(packages.len(), 6, "five packages and an example");
    for (package, dependencies) in packages {
        let forbidden: &[&str] = match package.as_str() {
            "headwater" => &["timely", "differential-dataflow", "headwater-", "clap", "anyhow"],
            "headwater-operators" => {
                &["candle", "headwater-pipelines", "headwater-tests", "anyhow"]
            }
            "headwater-pipelines" => &["headwater-tests", "headwater-benches"],
            "mailing-list" => &["candle", "headwater-tests", "headwater-benches"],
            _ => &[],
        };
        for dependency in dependencies {
            let is_allowed = !forbidden.iter().any(|name| dependency.starts_with(name));
            assert!(is_allowed, "{package} depends on {dependency}");
        }
    }
}

#[test]
fn unsafe_code_stands_in_the_kernels() {
    for (path, text) in all() {
        let is_kernel = path.starts_with("src/kernels");
        let is_this = path.ends_with("tidy.rs");
        let holds =
            code(&text).any(|line| line.contains("unsafe ") || line.contains("unsafe_code"));
        assert!(is_kernel || is_this || !holds, "{path:?} holds unsafe code");
    }
}

#[test]
fn cuda_is_chosen_in_one_place() {
    for (path, text) in all() {
        let is_place = path.starts_with("src/kernels") || path == Path::new("src/model/device.rs");
        let is_this = path.ends_with("tidy.rs");
        let features = ["feature = \"cuda\"", "feature = \"nccl\""];
        let holds = code(&text).any(|line| features.iter().any(|feature| line.contains(feature)));
        assert!(is_place || is_this || !holds, "{path:?} depends on the cuda feature");
    }
}

#[test]
fn only_the_pipelines_touch_arguments_environment_and_terminal() {
    for (path, text) in sources(&["src", "operators"]) {
        let library = code(&text).take_while(|line| !line.contains("#[cfg(test)]"));
        for line in library {
            let words = ["std::env", "println!(", "eprintln!(", "process::exit", "SystemTime"];
            assert!(!words.iter().any(|word| line.contains(word)), "{path:?}: {line}");
        }
    }
}

#[test]
fn files_are_short_and_well_named() {
    for (path, text) in all() {
        let lines = text.lines().count();
        assert!(lines <= LINES_MAX, "{path:?} has {lines} lines");
        let name = path.file_stem().unwrap().to_str().unwrap();
        let vague = ["util", "utils", "misc", "common", "helpers"];
        assert!(!vague.contains(&name), "{path:?} says nothing");
        assert!(text.starts_with("//!"), "{path:?} does not say what it is for");
        let to_do = ["TO", "DO"].concat();
        assert!(!text.contains(&to_do), "{path:?}: what is to be done is an issue");
    }
}

#[test]
fn the_readme_and_the_checks_name_the_same_test_command() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let checks = std::fs::read_to_string(root().join(".ci/run")).unwrap();
    let command = "cargo test --release";
    assert!(readme.lines().any(|line| line.trim() == command));
    assert!(checks.lines().any(|line| line.trim() == format!("step {command}")));
}

#[test]
fn every_folder_is_on_the_map() {
    let map = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let is_named = |path: &Path| {
        let path = path.to_str().unwrap();
        path.contains('/') && map.contains(path) || path == "operators" || path == "pipelines"
    };
    for (path, _) in sources(&["src", "operators", "pipelines"]) {
        let is_on_it = path.ancestors().any(is_named) || path == Path::new("src/lib.rs");
        assert!(is_on_it, "ARCHITECTURE.md does not mention {path:?}");
    }
}
