//! The ids of text by its words, remembered: the fast path of tokenizers made here.
//!
//! ```text
//! text ─▶ cut into words (class of each character) ─▶ table of words ─▶ ids
//!                                                      └─ not there: merges of the BPE model
//! ```
//!
//! Words are what the pattern of the tokenizer matches; merges never cross them. A table has a fixed size:
//! a word that is new takes the place of another. Cutting by classes is ten times as fast as a regular
//! expression, and the table ten times as fast as merging. That both give what the library gives is a law
//! under test.

use super::cut::Cut;
use crate::kernels::fetch::fetch;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use tokenizers::{Model, Tokenizer};
use xxhash_rust::xxh3::Xxh3DefaultBuilder;

/// Pairs of places of a table for short words, 64 bytes each: 4 MiB. Frequent words stay in a core's cache.
const PAIRS: usize = 1 << 16;

/// Words beside those in places that a table remembers: all it has met, until it starts anew.
const REST_MAX: usize = 1 << 18;

/// Bytes of a word that is remembered at most: blobs do not come again.
const REMEMBERED: usize = 64;

/// Bytes of a short word at most.
const SHORT: usize = 15;

/// Words that are cut before the first of them is looked up, so that the table's memory is waited for once.
const BATCH: usize = 64;

/// Ids of a word that a place holds.
const IDS: usize = 7;

/// Encodes by words.
#[derive(Clone)]
pub(super) struct Words {
    tokenizer: Arc<Tokenizer>,
    /// The character of each byte.
    characters: [char; 256],
    /// Bytes of each id.
    bytes: Arc<[u32]>,
    /// Tables nobody uses right now: as many as there ever were callers at a time.
    tables: Arc<Mutex<Vec<Table>>>,
}

impl Words {
    /// For a tokenizer that cuts by [`super::PATTERN`] and maps bytes to characters, and does nothing else.
    pub(super) fn new(tokenizer: Arc<Tokenizer>) -> Self {
        let vocabulary = tokenizer.get_vocab(false);
        let mut bytes = vec![0; vocabulary.values().max().map_or(0, |&id| id as usize + 1)];
        for (token, id) in vocabulary {
            bytes[id as usize] = token.chars().count() as u32; // a character stands for a byte
        }
        Words { tokenizer, characters: characters(), bytes: bytes.into(), tables: Arc::default() }
    }

    /// The bytes of `text` that its `ids` start at; where a character has several ids, its own.
    pub(super) fn starts(&self, text: &str, ids: &[u32]) -> Vec<usize> {
        let mut at = 0;
        let start = |&id: &u32| {
            let start = text.floor_char_boundary(at);
            at += self.bytes[id as usize] as usize;
            start
        };
        ids.iter().map(start).collect()
    }

    /// Appends the ids of `text`.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        self.encode_while(text, ids, |_, _| true);
    }

    /// Whether `text` has so many ids at most. What is left has no more ids than bytes, so that most texts
    /// need not be read to their end.
    pub(super) fn has_at_most(&self, text: &str, most: usize) -> bool {
        let mut ids = Vec::with_capacity(most.min(text.len()) + BATCH * REMEMBERED);
        let is_open = |count: usize, left: usize| count <= most && count + left > most;
        self.encode_while(text, &mut ids, is_open) <= most
    }

    /// Appends the ids of `text` for as long as `goes_on(ids so far, bytes left)`; returns how many they are.
    fn encode_while(
        &self,
        text: &str,
        ids: &mut Vec<u32>,
        goes_on: impl Fn(usize, usize) -> bool,
    ) -> usize {
        let idle = self.tables.lock().ok().and_then(|mut tables| tables.pop());
        let mut table = idle.unwrap_or_default();
        let mut words = Cut::new(text);
        let mut batch = [const { Word { bytes: 0..0, key: 0, pair: 0 } }; BATCH];
        loop {
            let mut count = 0;
            for (word, bytes) in batch.iter_mut().zip(&mut words) {
                let key = short(text.as_bytes(), &bytes);
                let pair = pair(key);
                fetch(&table.pairs, pair);
                *word = Word { bytes, key, pair };
                count += 1;
            }
            for word in &batch[..count] {
                table.encode(text, word, ids, |word| self.merge(word));
            }
            let read = batch[..count].last().map_or(text.len(), |word| word.bytes.end);
            if count < BATCH || !goes_on(ids.len(), text.len() - read) {
                break;
            }
        }
        if let Ok(mut tables) = self.tables.lock() {
            tables.push(table);
        }
        ids.len()
    }

    /// The ids of a word by the library.
    fn merge(&self, word: &str) -> Vec<u32> {
        let mapped: String = word.bytes().map(|byte| self.characters[byte as usize]).collect();
        let tokens = self.tokenizer.get_model().tokenize(&mapped);
        let tokens = tokens.expect("a loaded tokenizer encodes every string");
        tokens.iter().map(|token| token.id).collect()
    }
}

/// The character that stands for each byte: itself where it can be seen, else one from U+0100 on, as the
/// byte-level alphabet of GPT-2 has it.
fn characters() -> [char; 256] {
    let is_visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..);
    let mut others = '\u{100}'..;
    std::array::from_fn(|byte| match byte as u8 {
        byte if is_visible(byte) => byte.into(),
        _ => others.next().expect("there are more characters than bytes"),
    })
}

/// A word about to be looked up.
struct Word {
    bytes: Range<usize>,
    key: u128,
    pair: usize,
}

/// What is remembered of words.
struct Table {
    pairs: Vec<Pair>,
    /// All words that were met, by the number of their ids.
    rest: HashMap<Box<str>, usize, Xxh3DefaultBuilder>,
    ids: Vec<Box<[u32]>>,
    /// The ids of the last word that was too long to be remembered.
    long: Vec<u32>,
}

/// The places where a short word may be: a line of a core's cache.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Pair([Place; 2]);

/// A short word and its ids.
#[derive(Clone, Copy, Default)]
struct Place {
    /// Its bytes, zeros, and their number; zero if there is none.
    word: u128,
    /// Ids of a vocabulary below 65,536; other words have no place.
    ids: [u16; IDS],
    count: u16,
}

impl Default for Table {
    fn default() -> Self {
        Table {
            pairs: vec![Pair::default(); PAIRS],
            rest: HashMap::default(),
            ids: Vec::new(),
            long: Vec::new(),
        }
    }
}

impl Table {
    #[inline]
    fn encode(
        &mut self,
        text: &str,
        word: &Word,
        ids: &mut Vec<u32>,
        merge: impl Fn(&str) -> Vec<u32>,
    ) {
        let Word { ref bytes, key, pair } = *word;
        let Pair([first, second]) = &self.pairs[pair];
        let place = if second.word == key { second } else { first };
        if place.word == key && key != 0 {
            ids.extend_from_slice(&place.ids.map(u32::from));
            return ids.truncate(ids.len() - IDS + usize::from(place.count));
        }
        let known = self.recall(&text[bytes.clone()], merge);
        ids.extend_from_slice(known);
        let count = known.len();
        let has_place = (1..=IDS).contains(&count) && known.iter().all(|&id| id <= u16::MAX.into());
        if has_place && key != 0 {
            let mut own = [0; IDS];
            own.iter_mut().zip(known).for_each(|(own, &id)| *own = id as u16);
            let Pair([first, second]) = &mut self.pairs[pair];
            *second = std::mem::replace(first, Place { word: key, ids: own, count: count as u16 });
        }
    }

    /// The ids of a word that has no place.
    #[cold]
    fn recall(&mut self, word: &str, merge: impl Fn(&str) -> Vec<u32>) -> &[u32] {
        if word.len() > REMEMBERED {
            self.long = merge(word);
            return &self.long;
        }
        let index = match self.rest.get(word) {
            Some(&index) => index,
            None => {
                if self.rest.len() == REST_MAX {
                    self.rest.clear();
                    self.ids.clear();
                }
                self.ids.push(merge(word).into());
                self.rest.insert(word.into(), self.ids.len() - 1);
                self.ids.len() - 1
            }
        };
        &self.ids[index]
    }
}

/// A short word as a number; zero for others.
#[inline]
fn short(text: &[u8], word: &Range<usize>) -> u128 {
    let length = word.len();
    if length > SHORT {
        return 0;
    }
    let bytes = match text.get(word.start..word.start + 16) {
        Some(bytes) => bytes.try_into().expect("16 bytes"),
        None => {
            let mut bytes = [0; 16];
            bytes[..length].copy_from_slice(&text[word.clone()]);
            bytes
        }
    };
    let own = u128::from_le_bytes(bytes) & ((1 << (8 * length)) - 1);
    own | (length as u128) << (8 * SHORT)
}

/// The pair of places where a word is looked for.
#[inline]
fn pair(key: u128) -> usize {
    let folded = (key as u64) ^ ((key >> 64) as u64).rotate_left(32);
    let hash = folded.wrapping_mul(0x9e37_79b9_7f4a_7c15); // 2^64 over the golden ratio
    (hash >> (u64::BITS - PAIRS.ilog2())) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::small;
    use proptest::prelude::{ProptestConfig, any, proptest};

    fn check(text: &str) {
        let tokenizer = small();
        assert!(tokenizer.words.is_some());
        let expected = tokenizer.inner.encode_fast(text, false).unwrap().get_ids().to_vec();
        assert_eq!(tokenizer.encode(text), expected, "{text:?}");
        assert_eq!(tokenizer.encode(text), expected, "{text:?}, remembered");
        let encoding = tokenizer.inner.encode(text, false).unwrap();
        let starts: Vec<usize> = encoding.get_offsets().iter().map(|&(start, _)| start).collect();
        for most in [expected.len().saturating_sub(1), expected.len(), expected.len() + 1] {
            let fits = tokenizer.has_at_most(text, most);
            assert_eq!(fits, expected.len() <= most, "{text:?} in {most}");
        }
        assert_eq!(tokenizer.encode_with_starts(text), (expected, starts), "{text:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn ids_are_those_of_the_library(text in any::<String>()) {
            check(&text);
        }

        #[test]
        fn ids_of_prose_are_those_of_the_library(text in "[ \n\ta-zA-Z0-9.,'<>s/éß½漢٣\u{a0}\u{2028}]{0,200}") {
            check(&text);
        }
    }

    #[test]
    fn ids_of_real_text_are_those_of_the_library() {
        for sample in ["assets/samples/biomedicine.xml", "assets/samples/instructions.jsonl"] {
            check(&std::fs::read_to_string(sample).unwrap());
        }
    }

    #[test]
    fn a_table_forgets_and_still_knows() {
        let tokenizer = small();
        let words: Vec<String> =
            (0..REST_MAX as u32 + 9).map(|n| format!(" w{}", letters(n))).collect();
        let text = words.concat();
        let expected =
            tokenizer.inner.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
        assert!(tokenizer.encode(&text) == expected && tokenizer.encode(&text) == expected);
    }

    #[test]
    fn blobs_are_not_remembered() {
        let mut table = Table::default();
        let blob = "x".repeat(REMEMBERED + 1);
        assert_eq!(table.recall(&blob, |word| vec![word.len() as u32]), [REMEMBERED as u32 + 1]);
        assert!(table.rest.is_empty() && table.ids.is_empty());
        check(&format!("{blob} {} {blob}", "y".repeat(5000)));
    }

    fn letters(number: u32) -> String {
        number.to_string().bytes().map(|digit| char::from(digit + 49)).collect()
    }
}
