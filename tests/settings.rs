//! Settings of small runs.

use headwater::gate::DocumentRules;
use headwater_pipelines::shell::args::{
    AugmentArgs, EngineArgs, InputArgs, MachineArgs, TrainArgs,
};
use headwater_pipelines::shell::settings::{Preset, Settings};
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
}

/// Settings of a run without training, with the tokenizer of the bundled synthesizer.
///
/// # Panics
/// If they cannot work.
pub fn small(small: Small<'_>) -> Settings {
    let Small { input, general, out, workers, lanes, rounds, epoch_documents, seed } = small;
    let rules = DocumentRules { words_min: 1, unique: false };
    let preset =
        Preset { command: "small", corpus: "small", rounds, ratio: [1, 1], epoch_documents, rules };
    let input = InputArgs {
        input,
        out: out.to_owned(),
        text_field: Vec::new(),
        id_field: "id".into(),
        limit: None,
        min_words: None,
        duplicates: None,
    };
    let augment = AugmentArgs {
        synthesizer: "bundled".into(),
        rounds: None,
        new_tokens: 160,
        context: 4096,
        general,
        ratio: None,
        length: 256,
        epoch_documents: None,
        epochs_in_flight: 2,
        lanes,
    };
    let engine = EngineArgs {
        workers,
        dtype: "auto".into(),
        sequences: 8,
        step_tokens: 128,
        cache_mib: 256,
    };
    let train = TrainArgs {
        model: "2m".into(),
        tokenizer: None,
        batch: 4,
        rate: None,
        warmup: None,
        steps: None,
        micro_batch_tokens: 1024,
        recompute: false,
        checkpoint_every: 10,
    };
    let machine = MachineArgs {
        device: "cpu".into(),
        progress: "none".into(),
        seed,
        dry_run: false,
        strict: false,
        json: false,
    };
    Settings::new(preset, &input, (augment, engine), (train, true), machine)
        .expect("small runs can work")
}
