//! An answer as bytes, with what is needed to find it and to trust it.
//!
//! ```text
//! "hwa1" │ checksum 8 │ length of the body 4 │ key 16 │ witness 8 │ body: ending 1, tokens (LEB128)
//!                     └──────────────── the checksum is over all this ───────────────────────────┘
//! ```
//!
//! Numbers are little-endian. Nothing outside a record is needed to read it, so that a damaged one costs
//! itself only: the next one begins at the next "hwa1".

use super::key::RequestKey;
use crate::record::Finish;
use xxhash_rust::xxh3::xxh3_64;

/// What each record begins with.
pub(super) const MAGIC: [u8; 4] = *b"hwa1";

/// Bytes before the body.
const HEADER: usize = 40;

/// Bytes of a record: longer ones are not kept.
pub(super) const RECORD_MAX: usize = 1 << 20;

/// An answer worth keeping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The generated tokens, without the one that ended the generation.
    pub tokens: Vec<u32>,
    /// What ended it.
    pub ending: Ending,
}

/// How a generation ends that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The synthesizer closed it.
    Stop,
    /// It reached the limit of new tokens.
    Length,
}

impl Answer {
    /// A generation as an answer, if it is one: failures are not.
    pub fn new(tokens: &[u32], finish: &Finish) -> Option<Self> {
        let ending = match finish {
            Finish::Stop => Ending::Stop,
            Finish::Length => Ending::Length,
            Finish::Failed(_) | Finish::NotAsked => return None,
        };
        Some(Answer { tokens: tokens.to_vec(), ending })
    }

    /// How it ended, as the synthesizer said it.
    pub fn finish(&self) -> Finish {
        match self.ending {
            Ending::Stop => Finish::Stop,
            Ending::Length => Finish::Length,
        }
    }
}

/// The bytes of a record.
pub(super) fn encode(key: &RequestKey, answer: &Answer) -> Vec<u8> {
    let Answer { tokens, ending } = answer;
    let mut bytes = vec![0; HEADER];
    bytes.push(match ending {
        Ending::Stop => 0,
        Ending::Length => 1,
    });
    for &token in tokens {
        let mut rest = token;
        while rest >= 0x80 {
            bytes.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        bytes.push(rest as u8);
    }
    let length = (bytes.len() - HEADER) as u32;
    bytes[12..16].copy_from_slice(&length.to_le_bytes());
    bytes[16..32].copy_from_slice(&key.key.to_le_bytes());
    bytes[32..40].copy_from_slice(&key.witness.to_le_bytes());
    let checksum = xxh3_64(&bytes[12..]);
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..12].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// What stands at the beginning of some bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found<'a> {
    /// A whole record.
    Whole(Record<'a>),
    /// What may be the beginning of a record.
    Cut,
    /// No record.
    Nothing,
}

/// A record whose checksum holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Record<'a> {
    /// What it answers.
    pub(super) key: RequestKey,
    /// Bytes from its beginning to its end.
    pub(super) length: usize,
    body: &'a [u8],
}

/// Looks at the beginning of some bytes.
pub(super) fn read(bytes: &[u8]) -> Found<'_> {
    let seen = bytes.len().min(MAGIC.len());
    if bytes[..seen] != MAGIC[..seen] {
        return Found::Nothing;
    }
    let Some((head, rest)) = bytes.split_first_chunk::<HEADER>() else { return Found::Cut };
    let body_length = u32::from_le_bytes(part(head, 12)) as usize;
    let length = HEADER + body_length;
    if length > RECORD_MAX {
        return Found::Nothing;
    }
    let Some(body) = rest.get(..body_length) else { return Found::Cut };
    if xxh3_64(&bytes[12..length]) != u64::from_le_bytes(part(head, 4)) {
        return Found::Nothing;
    }
    let key = u128::from_le_bytes(part(head, 16));
    let witness = u64::from_le_bytes(part(head, 32));
    Found::Whole(Record { key: RequestKey { key, witness }, length, body })
}

fn part<const N: usize>(head: &[u8; HEADER], offset: usize) -> [u8; N] {
    *head[offset..].first_chunk().expect("the header holds it")
}

impl Record<'_> {
    /// Bytes that most records have room in.
    pub(super) const USUAL: usize = 4096;

    /// The answer; none if the bytes are not those of one.
    pub(super) fn answer(&self) -> Option<Answer> {
        let (&ending, mut rest) = self.body.split_first()?;
        let ending = match ending {
            0 => Ending::Stop,
            1 => Ending::Length,
            _ => return None,
        };
        let mut tokens = Vec::new();
        while !rest.is_empty() {
            let (token, behind) = token(rest)?;
            tokens.push(token);
            rest = behind;
        }
        Some(Answer { tokens, ending })
    }
}

/// The first token of some bytes, and what follows it.
fn token(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let mut token = 0u64;
    for (place, &byte) in bytes.iter().enumerate().take(5) {
        token |= u64::from(byte & 0x7f) << (7 * place);
        if byte < 0x80 {
            return Some((u32::try_from(token).ok()?, &bytes[place + 1..]));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(bytes: &[u8]) -> Option<(RequestKey, usize, Option<Answer>)> {
        match read(bytes) {
            Found::Whole(record) => Some((record.key, record.length, record.answer())),
            Found::Cut | Found::Nothing => None,
        }
    }

    fn keys() -> impl Strategy<Value = RequestKey> {
        (any::<u128>(), any::<u64>()).prop_map(|(key, witness)| RequestKey { key, witness })
    }

    fn answers() -> impl Strategy<Value = Answer> {
        let token = prop_oneof![0u32..300, 0u32..70_000, any::<u32>()];
        let ending = prop_oneof![Just(Ending::Stop), Just(Ending::Length)];
        (prop::collection::vec(token, 0..50), ending)
            .prop_map(|(tokens, ending)| Answer { tokens, ending })
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_whatever_follows(
            key in keys(),
            answer in answers(),
            behind in prop::collection::vec(any::<u8>(), 0..50),
        ) {
            let bytes = encode(&key, &answer);
            let found = whole(&[&bytes[..], &behind].concat());
            prop_assert_eq!(found, Some((key, bytes.len(), Some(answer))));
        }

        #[test]
        fn a_part_of_a_record_is_none(key in keys(), answer in answers(), part in 0.0..1.0) {
            let bytes = encode(&key, &answer);
            let kept = (bytes.len() as f64 * part) as usize;
            prop_assert_eq!(read(&bytes[..kept]), Found::Cut);
        }

        #[test]
        fn a_changed_bit_is_noticed(
            key in keys(),
            answer in answers(),
            place in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let mut bytes = encode(&key, &answer);
            let place = place.index(bytes.len());
            bytes[place] ^= 1 << bit;
            prop_assert_eq!(whole(&bytes), None);
        }
    }

    #[test]
    fn a_body_that_is_no_answer_is_none() {
        let key = RequestKey { key: 1, witness: 2 };
        for body in [
            &[][..],
            &[2],
            &[0, 0x80],
            &[0, 0xff, 0xff, 0xff, 0xff, 0x7f],
            &[1, 0x80, 0x80, 0x80, 0x80, 0x80, 0],
        ] {
            let mut bytes = encode(&key, &Answer { tokens: Vec::new(), ending: Ending::Stop });
            bytes.truncate(HEADER);
            bytes.extend(body);
            bytes[12..16].copy_from_slice(&(body.len() as u32).to_le_bytes());
            let checksum = xxh3_64(&bytes[12..]);
            bytes[4..12].copy_from_slice(&checksum.to_le_bytes());
            assert_eq!(whole(&bytes), Some((key, bytes.len(), None)), "{body:?}");
        }
    }

    #[test]
    fn failures_are_not_kept() {
        assert_eq!(Answer::new(&[1], &Finish::Failed("no".into())), None);
        assert_eq!(Answer::new(&[], &Finish::NotAsked), None);
        for finish in [Finish::Stop, Finish::Length] {
            assert_eq!(Answer::new(&[1], &finish).map(|answer| answer.finish()), Some(finish));
        }
    }
}
