//! Has a model answer each new question again, and refuses pairs whose answers disagree.
//!
//! ```text
//! chains at t ──▶ one question a pair ──▶ submitted ──▶ all answers back: chain at t
//!                   [ capabilities of t until its last chain has left ]
//! ```
//!
//! A full queue leaves questions in the backlog, which the source's window bounds. A question that is too
//! long for the judge, or that it fails to answer, speaks for nothing: the pair stays, and is counted.

use crate::held::Held;
use crate::waker;
use headwater::chain::Chain;
use headwater::gate::agreement::ANSWER_TOKENS_MAX;
use headwater::gate::{Agreement, Refusal};
use headwater::record::Finish;
use headwater::synthesizer::{Completion, InFlight, Request, Synthesizer, Waker};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::Operator;
use timely::progress::Timestamp;

/// How long a question stays in the backlog before the queue is tried again.
const RETRY: Duration = Duration::from_millis(1);

/// Provides `judge`.
pub trait Judge<'scope, T: Timestamp> {
    /// Judges the pairs of the last entry of each chain; without a judge they are all let through. `open`
    /// gives this worker the model that answers.
    fn judge(
        self,
        agreement: Option<Agreement>,
        open: impl FnOnce(Waker) -> Box<dyn Synthesizer> + 'static,
    ) -> StreamVec<'scope, T, Chain>;
}

impl<'scope, T: Timestamp> Judge<'scope, T> for StreamVec<'scope, T, Chain> {
    fn judge(
        self,
        agreement: Option<Agreement>,
        open: impl FnOnce(Waker) -> Box<dyn Synthesizer> + 'static,
    ) -> StreamVec<'scope, T, Chain> {
        let Some(agreement) = agreement else { return self };
        let scope = self.scope();
        self.unary(Pipeline, "Judge", move |_capability, info| {
            let wake = waker(scope.worker().sync_activator_for(info.address.to_vec()));
            let again = scope.activator_for(info.address);
            let mut judge = open(wake);
            let mut bench = Bench::new(agreement);
            // Invariant: the capabilities of a stamp are held until its last chain has left.
            let mut held: Held<T> = Held::default();

            move |input, output| {
                input.for_each_stamp(|capability, batches| {
                    let stamp = capability.stamp().clone();
                    let port = output.output_index();
                    let slot = held.slot(stamp, || capability.retain_stamp(port));
                    for chain in batches.flat_map(|batch| batch.drain(..)) {
                        held.enter(slot);
                        bench.take(slot, chain);
                    }
                    held.release_if_idle(slot);
                });
                while let Some(completion) = judge.poll() {
                    bench.hear(&completion);
                }
                if !bench.ask(judge.as_mut()) {
                    again.activate_after(RETRY);
                }
                for (slot, chain) in bench.judged() {
                    output.session(held.capabilities(slot)).give(chain);
                    held.leave(slot);
                }
            }
        })
    }
}

/// Chains with questions that are open.
struct Bench {
    agreement: Agreement,
    cases: BTreeMap<u64, Case>,
    next: u64,
    /// Questions that are still to be asked: case, number of the pair, prompt.
    backlog: VecDeque<(Question, Vec<u32>)>,
    in_flight: InFlight,
    asked: BTreeMap<u64, Question>,
    /// Cases without open questions.
    closed: Vec<u64>,
}

/// A pair of a case.
#[derive(Clone, Copy)]
struct Question {
    case: u64,
    pair: usize,
}

struct Case {
    slot: usize,
    chain: Chain,
    refusals: Vec<Option<Refusal>>,
    not_judged: usize,
    open: usize,
}

impl Bench {
    fn new(agreement: Agreement) -> Self {
        Bench {
            agreement,
            cases: BTreeMap::new(),
            next: 0,
            backlog: VecDeque::new(),
            in_flight: InFlight::default(),
            asked: BTreeMap::new(),
            closed: Vec::new(),
        }
    }

    fn take(&mut self, slot: usize, chain: Chain) {
        self.next += 1;
        let case = self.next;
        let entry = chain.entries.last().expect("a chain comes from a round");
        let prompts = entry.pairs.iter().enumerate().filter_map(|(pair, written)| {
            let prompt = self.agreement.prompt(entry.document.seen(), written)?;
            Some((Question { case, pair }, prompt))
        });
        let before = self.backlog.len();
        self.backlog.extend(prompts);
        let open = self.backlog.len() - before;
        let not_judged = entry.pairs.len() - open;
        let refusals = vec![None; entry.pairs.len()];
        if open == 0 {
            self.closed.push(case);
        }
        self.cases.insert(case, Case { slot, chain, refusals, not_judged, open });
    }

    /// Submits what the queue takes; false if something is left.
    fn ask(&mut self, judge: &mut dyn Synthesizer) -> bool {
        while let Some((question, tokens)) = self.backlog.pop_front() {
            let key = self.in_flight.issue();
            match judge.submit(Request { key, tokens, new_tokens_max: ANSWER_TOKENS_MAX }) {
                Ok(()) => drop(self.asked.insert(key, question)),
                Err(request) => {
                    self.in_flight.settle(request.key);
                    self.backlog.push_front((question, request.tokens));
                    return false;
                }
            }
        }
        true
    }

    fn hear(&mut self, completion: &Completion) {
        self.in_flight.settle(completion.key);
        let Question { case: number, pair } =
            self.asked.remove(&completion.key).expect("settled once");
        let case = self.cases.get_mut(&number).expect("open while it has questions");
        let entry = case.chain.entries.last().expect("a chain comes from a round");
        if matches!(completion.finish, Finish::Failed(_)) {
            case.not_judged += 1;
        } else {
            let answer = self.agreement.writer.tokenizer().decode(&completion.tokens);
            case.refusals[pair] = self.agreement.judge(&entry.pairs[pair], &answer);
        }
        case.open -= 1;
        if case.open == 0 {
            self.closed.push(number);
        }
    }

    /// Chains whose questions are all answered, without the pairs that were refused.
    fn judged(&mut self) -> Vec<(usize, Chain)> {
        let cases = self.closed.drain(..).map(|case| self.cases.remove(&case));
        let judged = cases.flatten().map(|case| {
            let Case { slot, mut chain, refusals, not_judged, open: _ } = case;
            let mut refusals = refusals.into_iter();
            chain.refuse(|_, _, _| refusals.next().flatten());
            let entry = chain.entries.last_mut().expect("a chain comes from a round");
            entry.not_judged = not_judged as u64;
            (slot, chain)
        });
        judged.collect()
    }
}
