//! The whole of it on what comes inside the program, in a couple of minutes on two cores.
//!
//! ```text
//! bundled abstracts ─▶ bundled synthesizer, 3 rounds ─▶ mix 1:1 with bundled instructions ─▶ pack ─▶ train 2M
//! ```
//!
//! The input is written beside the output, so that everything can be looked at.

use crate::instruct;
use crate::shell::args::{EngineArgs, MachineArgs, RunArgs};
use crate::shell::bundled::unpack;
use crate::shell::running::run as run_dataflow;
use crate::shell::settings::{Preset, Settings};
use crate::shell::{finish, wrong_use};
use anyhow::Result;
use clap::Args;
use headwater::block::Converted;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

const PRESET: Preset = Preset {
    command: "demo",
    corpus: "biomedicine",
    rounds: 3,
    converted: Converted::ALL,
    task_passes: None,
    epoch_documents: 30,
    words_min: 1,
    unique: false,
    published: &[],
};

/// What is asked for, beside the files.
const FLAGS: &str = "--new-tokens 160 --length 512 --model 2m --batch 4 --rate 3e-3 --warmup 5 \
                     --micro-batch-tokens 2048 --checkpoint-every 20";

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
    let input = unpack("biomedicine.xml", &samples)?;
    let general = unpack("instructions.jsonl", &samples)?;
    let files = [("--input", input), ("--general", general), ("--out", out)];
    let files = files.into_iter().flat_map(|(flag, path)| [flag.into(), path.into()]);
    let flags: Vec<OsString> = files.chain(FLAGS.split_whitespace().map(OsString::from)).collect();
    let run = RunArgs { no_train, engine, machine, ..RunArgs::of(flags)? };
    let json = run.machine.json;
    let settings = Settings::new(PRESET, run).map_err(wrong_use)?;
    finish(&run_dataflow(&settings, instruct::dataflow)?, json, true)
}
