//! Writes the next prompt of each chain.
//!
//! ```text
//! chains ─▶ dealt out by number ─▶ turns at the same time
//! ```
//!
//! Nothing is held. A chain stays on the worker it is dealt to for all its rounds.

use headwater::chain::{Chain, Generation, Prompt};
use headwater::prompt::PromptWriter;
use serde::{Deserialize, Serialize};
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Exchange;
use timely::dataflow::operators::Operator;
use timely::progress::Timestamp;

/// A chain with what is asked for it, and what came back.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Turn {
    /// The chain.
    pub chain: Chain,
    /// What is asked.
    pub prompt: Prompt,
    /// What came back.
    pub generation: Generation,
}

/// Provides `prompt`.
pub trait WritePrompt<'scope, T: Timestamp> {
    /// Writes prompts of at most `tokens_max` tokens for chains that have texts waiting.
    fn prompt(self, writer: PromptWriter, tokens_max: usize) -> StreamVec<'scope, T, Turn>;
}

impl<'scope, T: Timestamp> WritePrompt<'scope, T> for StreamVec<'scope, T, Chain> {
    fn prompt(self, writer: PromptWriter, tokens_max: usize) -> StreamVec<'scope, T, Turn> {
        let by_number = Exchange::new(|chain: &Chain| chain.index);
        self.unary(by_number, "Prompt", move |_capability, _info| {
            move |input, output| {
                input.for_each(|capability, chains| {
                    let turns = chains.drain(..).map(|chain| {
                        let prompt = chain.prompt(&writer, tokens_max);
                        let prompt = prompt.expect("only chains with waiting texts go round");
                        Turn { chain, prompt, generation: Generation::default() }
                    });
                    output.session(&capability).give_iterator(turns);
                });
            }
        })
    }
}
