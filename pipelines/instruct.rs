//! Instruction pre-training (arXiv 2406.14491): texts are augmented over chained rounds, mixed by tokens with
//! other sources, packed and learned. What the commands `pubmed`, `finance` and `scratch` share.
//!
//! ```text
//! texts ─▶ read ─▶┌ rounds ───────────────────────────────────────┐─▶ templify ─▶ mix ─▶ pack ─▶ commit ─▶ train
//!           ▲ │   │ prompt ─▶ synthesize ─▶ parse ─▶ gate ─▶ judge │      ▲        ▲                       │
//!           │ │   │    ▲                                      │    │      │   side sources                 │
//!           │ │   │    └─────────────── feedback ◀────────────┘    │      │                                │
//!           │ │   └────────────────────────────────────────────────┘      │                                │
//!           │ └──────────────────────── raw texts ───────────────────────┘                                │
//!           └─────────────────────────────────── credit ◀──────────────────────────────────────────────────┘
//! ```

use crate::shell::args::RunArgs;
use crate::shell::parts::Parts;
use crate::shell::running::run as run_dataflow;
use crate::shell::settings::{Preset, Settings};
use crate::shell::{finish, wrong_use};
use anyhow::Result;
use headwater::chain::Chain;
use headwater_operators::commit::Commit;
use headwater_operators::credit::ReturnCredit;
use headwater_operators::gate::Gate;
use headwater_operators::judge::Judge;
use headwater_operators::mix::Mix;
use headwater_operators::pack::Pack;
use headwater_operators::parse::Parse;
use headwater_operators::prompt::WritePrompt;
use headwater_operators::read::{Account, Admitted, read};
use headwater_operators::synthesize::Synthesize;
use headwater_operators::templify::Templify;
use headwater_operators::train::Train;
use std::process::ExitCode;
use timely::dataflow::StreamVec;
use timely::dataflow::operators::{Concat, ConnectLoop, Enter, Leave, LoopVariable, OkErr};
use timely::worker::Worker;

/// Runs the pipeline.
///
/// # Errors
/// If the flags cannot work or the run cannot start.
pub fn run(preset: Preset, args: RunArgs) -> Result<ExitCode> {
    let json = args.machine.json;
    let settings = Settings::new(preset, args).map_err(wrong_use)?;
    finish(&run_dataflow(&settings, dataflow)?, json, false)
}

/// Wires the parts.
pub fn dataflow(worker: &mut Worker, parts: &Parts) {
    let index = worker.index();
    worker.dataflow::<u64, _, _>(|scope| {
        let credit = parts.credit();
        let blocks = if index == 0 { parts.blocks() } else { None };
        let admitted = read(scope, blocks, credit.clone(), parts.reading());
        let (chains, accounts) = chains_and_accounts(admitted);
        synthesized(chains, parts)
            .templify(parts.augmenter.clone())
            .mix(parts.mixing.clone())
            .pack(parts.packing)
            .commit(accounts, parts.committing(), parts.committer())
            .train(parts.feed(index))
            .return_credit(credit);
    });
}

/// What the source sends, by its kind.
pub fn chains_and_accounts(
    admitted: StreamVec<'_, u64, Admitted>,
) -> (StreamVec<'_, u64, Chain>, StreamVec<'_, u64, Account>) {
    admitted.ok_err(|admitted| match admitted {
        Admitted::Chain(chain) => Ok(chain),
        Admitted::Account(account) => Err(account),
    })
}

/// Takes chains through their rounds: a text a round, which sees the texts before it with their pairs. Raw
/// texts pass by.
pub fn synthesized<'scope>(
    chains: StreamVec<'scope, u64, Chain>,
    parts: &Parts,
) -> StreamVec<'scope, u64, Chain> {
    let scope = chains.scope();
    let (raw, asked): (StreamVec<'_, u64, Chain>, _) = chains.ok_err(done_or_not);
    let synthesized = scope.iterative::<u32, _, _>(|rounds| {
        let (again, cycle) = rounds.loop_variable::<Vec<Chain>>(1);
        let (done, more): (StreamVec<'_, _, Chain>, _) = asked
            .enter(rounds)
            .concat(cycle)
            .prompt(parts.writer.clone(), parts.prompt_tokens_max)
            .synthesize(parts.synthesis.clone(), parts.synthesizer())
            .parse(parts.meters.clone())
            .gate(parts.gates.clone())
            .judge(parts.agreement.clone(), parts.judge())
            .ok_err(done_or_not);
        more.connect_loop(again);
        done.leave(scope)
    });
    synthesized.concat(raw)
}

fn done_or_not(chain: Chain) -> std::result::Result<Chain, Chain> {
    if chain.is_done() { Ok(chain) } else { Err(chain) }
}
