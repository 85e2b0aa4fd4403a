//! Settings of small runs.

use headwater::block::Converted;
use headwater_pipelines::shell::args::RunArgs;
use headwater_pipelines::shell::settings::{Preset, Settings};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// What differs from one small run to the other.
#[derive(Clone, Debug)]
pub struct Small<'a> {
    /// Files to read.
    pub input: Vec<PathBuf>,
    /// Files of general instructions.
    pub general: Vec<PathBuf>,
    /// The run folder.
    pub out: &'a Path,
    /// Threads of the dataflow.
    pub workers: usize,
    /// Independent mix-and-pack streams.
    pub lanes: usize,
    /// Rounds.
    pub rounds: usize,
    /// Texts that are committed together.
    pub epoch_documents: usize,
    /// The seed.
    pub seed: u64,
    /// Further flags.
    pub flags: &'a [String],
}

/// Flags of every small run.
const FLAGS: &str = "--no-train --synthesizer bundled --new-tokens 160 --length 256 --epochs-in-flight 2 \
                     --sequences 8 --step-tokens 128 --cache-mib 256 --model 2m --progress none";

/// Settings of a run without training, with the tokenizer of the bundled synthesizer.
///
/// # Panics
/// If they cannot work.
pub fn small(small: Small<'_>) -> Settings {
    let Small { input, general, out, workers, lanes, rounds, epoch_documents, seed, flags } = small;
    let preset = Preset {
        command: "small",
        corpus: "small",
        rounds,
        converted: Converted::ALL,
        task_passes: None,
        epoch_documents,
        words_min: 1,
        unique: false,
        published: &[],
    };
    let mut all: Vec<OsString> = FLAGS.split_whitespace().map(OsString::from).collect();
    let mut add = |flag: &str, values: Vec<OsString>| {
        if !values.is_empty() {
            all.push(flag.into());
            all.extend(values);
        }
    };
    let paths = |paths: Vec<PathBuf>| paths.into_iter().map(OsString::from).collect();
    let number = |number: u64| vec![number.to_string().into()];
    add("--input", paths(input));
    add("--general", paths(general));
    add("--out", vec![out.into()]);
    add("--workers", number(workers as u64));
    add("--lanes", number(lanes as u64));
    add("--seed", number(seed));
    all.extend(flags.iter().map(OsString::from));
    let args = RunArgs::of(all).expect("flags that exist");
    Settings::new(preset, args).expect("small runs can work")
}
