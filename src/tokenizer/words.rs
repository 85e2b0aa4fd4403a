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

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};
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
const IDS: usize = 3;

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
        let idle = self.tables.lock().ok().and_then(|mut tables| tables.pop());
        let mut table = idle.unwrap_or_default();
        let mut words = cut(text);
        let mut batch: [(Range<usize>, u128); BATCH] = [const { (0..0, 0) }; BATCH];
        loop {
            let mut count = 0;
            for (slot, word) in batch.iter_mut().zip(&mut words) {
                let key = short(text.as_bytes(), &word);
                *slot = (word, key);
                count += 1;
            }
            for (word, key) in &batch[..count] {
                table.encode(&text[word.clone()], *key, ids, |word| self.merge(word));
            }
            if count < BATCH {
                break;
            }
        }
        if let Ok(mut tables) = self.tables.lock() {
            tables.push(table);
        }
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
    ids: [u32; IDS],
    count: u32,
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
        word: &str,
        key: u128,
        ids: &mut Vec<u32>,
        merge: impl Fn(&str) -> Vec<u32>,
    ) {
        let pair = pair(key);
        let Pair([first, second]) = &self.pairs[pair];
        let place = if second.word == key { second } else { first };
        if place.word == key && key != 0 {
            ids.extend_from_slice(&place.ids);
            return ids.truncate(ids.len() - IDS + place.count as usize);
        }
        let known = self.recall(word, merge);
        ids.extend_from_slice(known);
        let count = known.len();
        if (1..=IDS).contains(&count) && key != 0 {
            let mut own = [0; IDS];
            own[..count].copy_from_slice(known);
            let Pair([first, second]) = &mut self.pairs[pair];
            *second = std::mem::replace(first, Place { word: key, ids: own, count: count as u32 });
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

/// What a character is to the pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    LineFeed,
    Space,
    Letter,
    Number,
    Other,
}

/// The words of a text.
fn cut(text: &str) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let bytes = text.as_bytes();
        // Most words are ASCII letters, perhaps behind a space.
        let letters = start + usize::from(bytes.get(start) == Some(&b' '));
        let end = ascii_letters(bytes, letters);
        if end > letters && bytes.get(end).is_some_and(u8::is_ascii) {
            return Some(std::mem::replace(&mut start, end)..end);
        }
        let (class, length) = class_at(text, start)?;
        let behind = start + length;
        let end = match class {
            Class::LineFeed | Class::Number => behind,
            Class::Letter | Class::Other => run(text, behind, class),
            Class::Space => match class_at(text, behind) {
                Some((next @ (Class::Letter | Class::Other), length))
                    if text.as_bytes()[start] == b' ' =>
                {
                    run(text, behind + length, next)
                }
                _ => run(text, behind, class),
            },
        };
        Some(std::mem::replace(&mut start, end)..end)
    })
}

/// The end of a run of characters of one class.
#[inline]
fn run(text: &str, mut at: usize, class: Class) -> usize {
    if class == Class::Letter {
        at = ascii_letters(text.as_bytes(), at);
    }
    while let Some((own, length)) = class_at(text, at)
        && own == class
    {
        at += length;
    }
    at
}

/// The end of a run of ASCII letters.
#[inline]
fn ascii_letters(text: &[u8], mut at: usize) -> usize {
    const EACH: u64 = 0x0101_0101_0101_0101;
    while let Some(eight) = text.get(at..at + 8) {
        let bytes = u64::from_le_bytes(eight.try_into().expect("eight bytes"));
        let lower = (bytes | (EACH * 0x20)) & (EACH * 0x7f);
        // The high bit of a byte says: at least an `a`; beyond a `z`; not ASCII.
        let from_a = lower + EACH * (0x80 - b'a' as u64);
        let beyond_z = lower + EACH * (0x80 - b'z' as u64 - 1);
        let others = !(from_a & !beyond_z & !bytes) & (EACH * 0x80);
        if others != 0 {
            return at + others.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    while text.get(at).is_some_and(u8::is_ascii_alphabetic) {
        at += 1;
    }
    at
}

/// The class of the character at a byte, and its length.
#[inline]
fn class_at(text: &str, at: usize) -> Option<(Class, usize)> {
    let byte = *text.as_bytes().get(at)?;
    if byte < 0x80 {
        return Some((ASCII[byte as usize], 1));
    }
    let character = text[at..].chars().next()?;
    Some((class(character), character.len_utf8()))
}

const ASCII: [Class; 128] = {
    let mut classes = [Class::Other; 128];
    let mut byte = 0;
    while byte < 128 {
        classes[byte] = match byte as u8 {
            b'\n' => Class::LineFeed,
            b' ' | b'\t' | 0x0b | 0x0c | b'\r' => Class::Space,
            b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
            b'0'..=b'9' => Class::Number,
            _ => Class::Other,
        };
        byte += 1;
    }
    classes
};

/// Characters whose classes are looked up together.
const BLOCK: usize = 256;

/// The class of any character, as the library's regular expressions see it.
fn class(character: char) -> Class {
    static BLOCKS: [OnceLock<[Class; BLOCK]>; 0x11_0000 / BLOCK] =
        [const { OnceLock::new() }; 0x11_0000 / BLOCK];
    let (block, index) = (character as usize / BLOCK, character as usize % BLOCK);
    BLOCKS[block].get_or_init(|| classes(block))[index]
}

fn classes(block: usize) -> [Class; BLOCK] {
    let expression = |class| onig::Regex::new(class).expect("a class of the pattern");
    let [letter, number, space] = [r"\p{L}", r"\p{N}", r"\s"].map(expression);
    std::array::from_fn(|index| {
        let Some(character) = char::from_u32((block * BLOCK + index) as u32) else {
            return Class::Other; // a surrogate, which no text holds
        };
        let text = character.to_string();
        match () {
            () if character == '\n' => Class::LineFeed,
            () if letter.is_match(&text) => Class::Letter,
            () if number.is_match(&text) => Class::Number,
            () if space.is_match(&text) => Class::Space,
            () => Class::Other,
        }
    })
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
        assert_eq!(tokenizer.encode_with_starts(text), (expected, starts), "{text:?}");
    }

    #[test]
    fn words_are_cut_where_the_pattern_cuts() {
        let text = "  The rates,\n\n to 75%\t x\u{a0}é!? 漢字½";
        let words: Vec<&str> = cut(text).map(|word| &text[word]).collect();
        let expected = ["  ", "The", " rates", ",", "\n", "\n", " to", " ", "7", "5", "%", "\t "];
        assert_eq!(words[..12], expected);
        assert_eq!(words[12..], ["x", "\u{a0}", "é", "!?", " 漢字", "½"]);
    }

    #[test]
    fn every_ascii_character_has_its_class() {
        let found = classes(0);
        assert!((0..128).all(|byte| found[byte] == ASCII[byte]));
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
