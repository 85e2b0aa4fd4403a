//! Refuses pairs by rules that are a matter of the pair and its text.
//!
//! ```text
//! chains ─▶ chains, whose last entry has lost what the gates refuse, at the same time
//! ```
//!
//! Nothing is held. It stands inside the rounds, so that a later prompt of the chain shows good pairs only.
//! What is refused stays with the chain until it is accounted for.

use headwater::chain::Chain;
use headwater::gate::PairGates;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::Operator;
use timely::progress::Timestamp;

/// Provides `gate`.
pub trait Gate<'scope, T: Timestamp> {
    /// Refuses pairs of the last entry of each chain.
    fn gate(self, gates: PairGates) -> StreamVec<'scope, T, Chain>;
}

impl<'scope, T: Timestamp> Gate<'scope, T> for StreamVec<'scope, T, Chain> {
    fn gate(self, gates: PairGates) -> StreamVec<'scope, T, Chain> {
        self.unary(Pipeline, "Gate", move |_capability, _info| {
            move |input, output| {
                input.for_each(|capability, chains| {
                    let judged = chains.drain(..).map(|mut chain| {
                        chain.refuse(|text, earlier, pair| gates.judge(text, earlier, pair));
                        chain
                    });
                    output.session(&capability).give_iterator(judged);
                });
            }
        })
    }
}
