//! Renders finished chains as documents, and documents as items.
//!
//! ```text
//! chains ─▶ documents with lineage, items, what was dropped, at the same time
//! ```
//!
//! Nothing is held: rendering is a function of the chain.

use headwater::augment::{Augmenter, ChainOutput};
use headwater::chain::Chain;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::Operator;
use timely::progress::Timestamp;

/// Provides `templify`.
pub trait Templify<'scope, T: Timestamp> {
    /// Renders each chain.
    fn templify(self, augmenter: Augmenter) -> StreamVec<'scope, T, ChainOutput>;
}

impl<'scope, T: Timestamp> Templify<'scope, T> for StreamVec<'scope, T, Chain> {
    fn templify(self, augmenter: Augmenter) -> StreamVec<'scope, T, ChainOutput> {
        self.unary(Pipeline, "Templify", move |_capability, _info| {
            move |input, output| {
                input.for_each(|capability, chains| {
                    let rendered = chains.drain(..).map(|chain| augmenter.augment(chain));
                    output.session(&capability).give_iterator(rendered);
                });
            }
        })
    }
}
