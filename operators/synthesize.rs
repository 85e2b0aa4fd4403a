//! Has the synthesizer answer each prompt, without waiting for it.
//!
//! ```text
//! turns at t ──▶ backlog ──▶ submitted ──▶ completion: turn at t
//!                  [ capabilities of t until its last completion is back ]
//! ```
//!
//! A full queue leaves turns in the backlog, which the source's window bounds. Chains that are under way go
//! before chains that begin: what the engine holds of them is still there, and epochs are done sooner.
//! Answers leave in whatever order they come.

use crate::held::Held;
use crate::prompt::Turn;
use crate::waker;
use headwater::chain::Generation;
use headwater::meter::Meters;
use headwater::synthesizer::{InFlight, Request, Synthesizer, Waker};
use headwater::tokenizer::Tokenizer;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::Operator;
use timely::progress::Timestamp;

/// How long a turn stays in the backlog before the queue is tried again.
const RETRY: Duration = Duration::from_millis(1);

/// Turns that may be handed back before the queue counts as full: it may be several, one for each engine.
const REFUSED_MAX: usize = 16;

/// What is asked of the synthesizer, and how its answers become text.
#[derive(Clone, Debug)]
pub struct Synthesis {
    /// Turns generated tokens into text.
    pub tokenizer: Tokenizer,
    /// Tokens to generate at most.
    pub new_tokens_max: usize,
    /// Where progress is noted.
    pub meters: Arc<Meters>,
}

/// Provides `synthesize`.
pub trait Synthesize<'scope, T: Timestamp> {
    /// Fills in the generation of each turn. `open` gives this worker its synthesizer.
    fn synthesize(
        self,
        synthesis: Synthesis,
        open: impl FnOnce(Waker) -> Box<dyn Synthesizer> + 'static,
    ) -> StreamVec<'scope, T, Turn>;
}

impl<'scope, T: Timestamp> Synthesize<'scope, T> for StreamVec<'scope, T, Turn> {
    fn synthesize(
        self,
        synthesis: Synthesis,
        open: impl FnOnce(Waker) -> Box<dyn Synthesizer> + 'static,
    ) -> StreamVec<'scope, T, Turn> {
        let scope = self.scope();
        self.unary(Pipeline, "Synthesize", move |_capability, info| {
            let wake = waker(scope.worker().sync_activator_for(info.address.to_vec()));
            let again = scope.activator_for(info.address);
            let mut synthesizer = open(wake);
            let mut backlog: VecDeque<(usize, Turn)> = VecDeque::new();
            let mut in_flight = InFlight::default();
            let mut submitted: BTreeMap<u64, (usize, Turn)> = BTreeMap::new();
            // Invariant: the capabilities of a stamp are held until its last turn has left.
            let mut held: Held<T> = Held::default();

            move |input, output| {
                input.for_each_stamp(|capability, batches| {
                    let stamp = capability.stamp().clone();
                    let port = output.output_index();
                    let slot = held.slot(stamp, || capability.retain_stamp(port));
                    for turn in batches.flat_map(|batch| batch.drain(..)) {
                        held.enter(slot);
                        match turn.chain.entries.is_empty() {
                            true => backlog.push_back((slot, turn)),
                            false => backlog.push_front((slot, turn)),
                        }
                    }
                    held.release_if_idle(slot);
                });
                while let Some(completion) = synthesizer.poll() {
                    in_flight.settle(completion.key);
                    let (slot, mut turn) = submitted.remove(&completion.key).expect("settled once");
                    synthesis.meters.generations.add(1);
                    turn.generation = Generation {
                        text: synthesis.tokenizer.decode(&completion.tokens),
                        finish: completion.finish,
                        tokens: completion.tokens.len() as u64,
                    };
                    output.session(held.capabilities(slot)).give(turn);
                    held.leave(slot);
                }
                let mut refused = Vec::new();
                while refused.len() < REFUSED_MAX
                    && let Some((slot, turn)) = backlog.pop_front()
                {
                    let key = in_flight.issue();
                    let tokens = turn.prompt.tokens.clone();
                    let new_tokens_max = synthesis.new_tokens_max;
                    match synthesizer.submit(Request { key, tokens, new_tokens_max }) {
                        Ok(()) => drop(submitted.insert(key, (slot, turn))),
                        Err(request) => {
                            in_flight.settle(request.key);
                            refused.push((slot, turn));
                        }
                    }
                }
                for turn in refused.into_iter().rev() {
                    backlog.push_front(turn);
                    again.activate_after(RETRY);
                }
            }
        })
    }
}
