//! Domain-adaptive pre-training: every text is augmented over three chained rounds and mixed, by tokens, with
//! general instructions (arXiv 2406.14491, section 4). What the commands `pubmed` and `finance` share.
//!
//! ```text
//! texts of the domain ─▶ read ─▶┌ rounds ───────────────────────┐─▶ templify ─▶ mix ─▶ pack ─▶ commit ─▶ train
//!                         ▲     │ prompt ─▶ synthesize ─▶ parse │                ▲                        │
//!                         │     │    ▲                      │   │    general instructions                │
//!                         │     │    └────── feedback ◀─────┘   │                                        │
//!                         │     └───────────────────────────────┘                                        │
//!                         └───────────────────────── credit ◀────────────────────────────────────────────┘
//! ```

use crate::shell::args::{AugmentArgs, EngineArgs, InputArgs, MachineArgs, TrainArgs};
use crate::shell::parts::Parts;
use crate::shell::running::run as run_dataflow;
use crate::shell::settings::{Preset, Settings};
use crate::shell::{finish, wrong_use};
use anyhow::Result;
use clap::Args;
use headwater::chain::Chain;
use headwater::gate::DocumentRules;
use headwater_operators::commit::Commit;
use headwater_operators::credit::ReturnCredit;
use headwater_operators::mix::Mix;
use headwater_operators::pack::Pack;
use headwater_operators::parse::Parse;
use headwater_operators::prompt::WritePrompt;
use headwater_operators::read::{Admitted, read};
use headwater_operators::synthesize::Synthesize;
use headwater_operators::templify::Templify;
use headwater_operators::train::Train;
use std::process::ExitCode;
use timely::dataflow::operators::{Concat, ConnectLoop, Enter, Leave, LoopVariable, OkErr};
use timely::worker::Worker;

/// The flags of a domain.
#[derive(Args, Clone, Debug)]
pub struct Adapt {
    #[command(flatten)]
    input: InputArgs,
    #[command(flatten)]
    augment: AugmentArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    train: TrainArgs,
    /// Write shards only
    #[arg(long)]
    no_train: bool,
    #[command(flatten)]
    machine: MachineArgs,
}

/// The recipe for a domain (arXiv 2406.14491, table 2).
pub const fn preset(command: &'static str, rules: DocumentRules) -> Preset {
    Preset { command, corpus: command, rounds: 3, ratio: [1, 1], epoch_documents: 240, rules }
}

/// Runs the pipeline.
///
/// # Errors
/// If the flags cannot work or the run cannot start.
pub fn run(preset: Preset, args: Adapt) -> Result<ExitCode> {
    let Adapt { input, augment, engine, train, no_train, machine } = args;
    let json = machine.json;
    let settings = Settings::new(preset, &input, (augment, engine), (train, no_train), machine)
        .map_err(wrong_use)?;
    finish(&run_dataflow(&settings, dataflow)?, json, false)
}

/// Wires the parts.
pub fn dataflow(worker: &mut Worker, parts: &Parts) {
    let index = worker.index();
    worker.dataflow::<u64, _, _>(|scope| {
        let credit = parts.credit();
        let blocks = if index == 0 { parts.blocks() } else { None };
        let (chains, accounts) = read(scope, blocks, credit.clone(), parts.reading()).ok_err(
            |admitted| match admitted {
                Admitted::Chain(chain) => Ok(chain),
                Admitted::Account(account) => Err(account),
            },
        );
        let finished = scope.iterative::<u32, _, _>(|rounds| {
            let (again, cycle) = rounds.loop_variable::<Vec<Chain>>(1);
            let chains = chains
                .enter(rounds)
                .concat(cycle)
                .prompt(parts.writer.clone(), parts.prompt_tokens_max)
                .synthesize(parts.synthesis.clone(), parts.synthesizer())
                .parse(parts.meters.clone());
            let (done, more) =
                chains.ok_err(|chain| if chain.is_done() { Ok(chain) } else { Err(chain) });
            more.connect_loop(again);
            done.leave(scope)
        });
        finished
            .templify(parts.augmenter.clone())
            .mix(parts.mixing.clone())
            .pack(parts.packing)
            .commit(accounts, parts.committing(), parts.committer())
            .train(parts.feed(index))
            .return_credit(credit);
    });
}
