//! Reads the pairs out of each generation and puts them into the chain.
//!
//! ```text
//! turns ─▶ chains, one text further, at the same time
//! ```
//!
//! Nothing is held. Pieces that are no pairs stay with the chain, each with its reason, until it is
//! accounted for.

use crate::prompt::Turn;
use headwater::chain::Chain;
use headwater::meter::Meters;
use std::sync::Arc;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::Operator;
use timely::progress::Timestamp;

/// Provides `parse`.
pub trait Parse<'scope, T: Timestamp> {
    /// Takes generations into their chains.
    fn parse(self, meters: Arc<Meters>) -> StreamVec<'scope, T, Chain>;
}

impl<'scope, T: Timestamp> Parse<'scope, T> for StreamVec<'scope, T, Turn> {
    fn parse(self, meters: Arc<Meters>) -> StreamVec<'scope, T, Chain> {
        self.unary(Pipeline, "Parse", move |_capability, _info| {
            move |input, output| {
                input.for_each(|capability, turns| {
                    let chains = turns.drain(..).map(|turn| {
                        let Turn { mut chain, prompt, generation } = turn;
                        chain.accept(&prompt, &generation);
                        let pairs = chain.entries.last().map_or(0, |entry| entry.pairs.len());
                        meters.pairs.add(pairs as u64);
                        chain
                    });
                    output.session(&capability).give_iterator(chains);
                });
            }
        })
    }
}
