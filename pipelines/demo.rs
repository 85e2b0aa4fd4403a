//! The whole of it on what comes inside the program, in a couple of minutes on two cores.
//!
//! ```text
//! bundled abstracts ─▶ bundled synthesizer, 3 rounds ─▶ mix 1:1 with bundled instructions ─▶ pack ─▶ train 2M
//! ```
//!
//! The input is written beside the output, so that everything can be looked at.

use crate::adapt;
use crate::shell::args::{AugmentArgs, EngineArgs, InputArgs, MachineArgs, TrainArgs};
use crate::shell::bundled::unpack;
use crate::shell::models::BUNDLED;
use crate::shell::running::run as run_dataflow;
use crate::shell::settings::{Preset, Settings};
use crate::shell::{finish, wrong_use};
use anyhow::Result;
use clap::Args;
use headwater::gate::DocumentRules;
use std::path::PathBuf;
use std::process::ExitCode;

const PRESET: Preset = Preset {
    command: "demo",
    corpus: "biomedicine",
    rounds: 3,
    ratio: [1, 1],
    epoch_documents: 30,
    rules: DocumentRules { words_min: 1, unique: false },
};

/// Run everything on bundled data: augment, mix, pack and train in a couple of minutes
#[derive(Args, Clone, Debug)]
#[command(after_help = "Example:\n  headwater demo --out demo-run")]
pub struct Demo {
    /// The run folder; an existing one is continued
    #[arg(long, default_value = "headwater-demo", value_name = "DIR")]
    out: PathBuf,
    /// Write shards only
    #[arg(long)]
    no_train: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

/// Runs the pipeline.
///
/// # Errors
/// If the disk refuses or the run cannot start.
pub fn run(args: Demo) -> Result<ExitCode> {
    let Demo { out, no_train, engine, machine } = args;
    let samples = out.join("input");
    let input = InputArgs {
        input: vec![unpack("biomedicine.xml", &samples)?],
        out,
        text_field: Vec::new(),
        id_field: "id".into(),
        limit: None,
        min_words: None,
        duplicates: None,
    };
    let augment = AugmentArgs {
        synthesizer: BUNDLED.into(),
        rounds: None,
        new_tokens: 160,
        context: 4096,
        general: vec![unpack("instructions.jsonl", &samples)?],
        ratio: None,
        length: 512,
        epoch_documents: None,
        epochs_in_flight: 3,
        lanes: 1,
    };
    let train = TrainArgs {
        model: "2m".into(),
        tokenizer: None,
        batch: 4,
        rate: Some(3e-3),
        warmup: Some(5),
        steps: None,
        micro_batch_tokens: 2048,
        recompute: false,
        checkpoint_every: 20,
    };
    let json = machine.json;
    let settings = Settings::new(PRESET, &input, (augment, engine), (train, no_train), machine)
        .map_err(wrong_use)?;
    finish(&run_dataflow(&settings, adapt::dataflow)?, json, true)
}
