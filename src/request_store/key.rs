//! What an answer is found by: all that decides it.

use crate::synthesizer::Request;
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128};

/// Changed whenever the bytes that are digested mean something else.
const VERSION: u32 = 1;

/// Makes the witness a function of its own.
const WITNESS_SEED: u64 = 0x7769_746e_6573_7321;

/// What decides all answers of a synthesizer, besides the request: its weights, its shape, the ids that end
/// a generation, and how it computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity(u128);

impl Identity {
    /// The identity of a synthesizer of which `description` says everything.
    pub fn new(description: &str) -> Self {
        Identity(xxh3_128(description.as_bytes()))
    }
}

/// Two digests of a synthesizer and a request: one to find the answer by, one to know that it is the right one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RequestKey {
    /// Finds the answer.
    pub key: u128,
    /// Tells requests apart whose keys are equal.
    pub witness: u64,
}

impl RequestKey {
    /// The key of a request to the synthesizer of that identity. Who asks does not matter.
    pub fn new(identity: Identity, request: &Request) -> Self {
        let Request { key: _, tokens, new_tokens_max } = request;
        let mut bytes = Vec::with_capacity(36 + 4 * tokens.len());
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(identity.0.to_le_bytes());
        bytes.extend((*new_tokens_max as u64).to_le_bytes());
        bytes.extend((tokens.len() as u64).to_le_bytes());
        bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        let witness = xxh3_64_with_seed(&bytes, WITNESS_SEED);
        RequestKey { key: xxh3_128(&bytes), witness }
    }

    /// The part of the key that an index holds.
    pub(super) fn print(&self) -> u32 {
        (self.key >> 96) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(description: &str, tokens: &[u32], new_tokens_max: usize) -> RequestKey {
        let request = Request { key: 1, tokens: tokens.to_vec(), new_tokens_max };
        RequestKey::new(Identity::new(description), &request)
    }

    proptest! {
        #[test]
        fn keys_differ_when_anything_differs(
            tokens in prop::collection::vec(0u32..70_000, 1..60),
            limit in 0usize..1000,
            place in any::<prop::sample::Index>(),
            change in 1u32..1000,
        ) {
            let all = key("a", &tokens, limit);
            let mut other = tokens.clone();
            other[place.index(tokens.len())] ^= change;
            let shorter = &tokens[1..];
            let padded = [&tokens[..], &[0]].concat();
            for other in [
                key("b", &tokens, limit),
                key("a", &tokens, limit + 1),
                key("a", &other, limit),
                key("a", shorter, limit),
                key("a", &padded, limit),
            ] {
                prop_assert_ne!(other.key, all.key);
                prop_assert_ne!(other.witness, all.witness);
            }
            let asked_by_another = Request { key: 2, tokens, new_tokens_max: limit };
            prop_assert_eq!(RequestKey::new(Identity::new("a"), &asked_by_another), all);
        }
    }
}
