//! Where the pattern of tokenizers made here cuts a text, found by the classes of its characters.
//!
//! ```text
//! 64 bytes ─▶ one bit a byte for each class ─▶ one bit for each byte that starts a word ─▶ words
//! ```
//!
//! A word starts where the class changes, at each line feed and number and behind them. A single space
//! belongs to the letters or other characters behind it. All of it is arithmetic on bits: there is no
//! branch for the length of a word, which nothing can predict.

use std::ops::Range;
use std::sync::OnceLock;

/// What a character is to the pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    LineFeed,
    Space,
    Letter,
    Number,
    Other,
}

/// Bytes that are looked at together.
const BLOCK: usize = u64::BITS as usize;

/// The words of a text.
pub(super) struct Cut<'a> {
    text: &'a str,
    /// Bytes of the block at hand that start a word, as far as they have not been come to.
    starts: u64,
    /// First byte of the block at hand.
    base: usize,
    /// First byte of the next word.
    from: usize,
    /// The last byte of the block at hand.
    before: Before,
    /// The classes of the block behind.
    next: Classes,
}

/// What the last byte of a block was: the lowest bits say so.
#[derive(Clone, Copy, Default)]
struct Before {
    classes: Classes,
    joined: u64,
}

/// The classes of 64 bytes, a bit each. The bytes of one character have one class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Classes {
    letter: u64,
    other: u64,
    /// All that is blank but the line feed.
    space: u64,
    /// The space character itself.
    plain_space: u64,
    /// Line feeds and numbers: each is a word of its own.
    alone: u64,
    /// Bytes of a character behind its first.
    inner: u64,
}

impl<'a> Cut<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        let mut cut = Cut {
            text,
            starts: 0,
            base: 0,
            from: 0,
            before: Before::default(),
            next: Classes::of(text, 0),
        };
        cut.look();
        cut.starts &= !1; // the first word starts without being told
        cut
    }

    /// Finds the starts of words in the next block.
    #[inline]
    fn look(&mut self) {
        let own = self.next;
        self.next = match self.base + BLOCK < self.text.len() {
            true => Classes::of(self.text, self.base + BLOCK),
            false => Classes::default(),
        };
        let behind = |bits: u64, before: u64| bits << 1 | before;
        let ahead = |bits: u64, next: u64| bits >> 1 | next << (BLOCK - 1);
        let before = self.before.classes;
        let after_space = behind(own.space, before.space);
        let joins = ahead(own.letter | own.other, self.next.letter | self.next.other);
        let joined = own.plain_space & !after_space & joins;
        let after_joined = behind(joined, self.before.joined);
        let starts = own.alone
            | behind(own.alone, before.alone)
            | (own.letter & !behind(own.letter, before.letter) & !after_joined)
            | (own.other & !behind(own.other, before.other) & !after_joined)
            | (own.space & !after_space);
        self.starts = starts & !own.inner;
        self.before = Before { classes: own.last(), joined: joined >> (BLOCK - 1) };
    }
}

impl Iterator for Cut<'_> {
    type Item = Range<usize>;

    #[inline]
    fn next(&mut self) -> Option<Range<usize>> {
        while self.starts == 0 {
            if self.base + BLOCK >= self.text.len() {
                let end = self.text.len();
                let last = self.from..end;
                self.from = end;
                return (!last.is_empty()).then_some(last);
            }
            self.base += BLOCK;
            self.look();
        }
        let start = self.base + self.starts.trailing_zeros() as usize;
        self.starts &= self.starts - 1;
        Some(std::mem::replace(&mut self.from, start)..start)
    }
}

impl Classes {
    /// The classes of the bytes from `base` on. Behind the end of the text there are none.
    #[inline]
    fn of(text: &str, base: usize) -> Self {
        match text.as_bytes()[base..].first_chunk() {
            Some(block) => {
                let (classes, beyond_ascii) = Self::of_ascii(block);
                match beyond_ascii {
                    0 => classes,
                    _ => classes.with_characters(text, base, beyond_ascii),
                }
            }
            None => Self::of_tail(text, base),
        }
    }

    #[cold]
    fn of_tail(text: &str, base: usize) -> Self {
        let tail = &text.as_bytes()[base..];
        let mut block = [0; BLOCK];
        block[..tail.len()].copy_from_slice(tail);
        let (mut classes, beyond_ascii) = Self::of_ascii(&block);
        classes.other &= (1 << tail.len()) - 1; // zeros are padding here
        match beyond_ascii {
            0 => classes,
            _ => classes.with_characters(text, base, beyond_ascii),
        }
    }

    /// The classes of the bytes that are ASCII, and which are not.
    #[inline]
    fn of_ascii(block: &[u8; BLOCK]) -> (Self, u64) {
        let [letter, number, blank, line_feed, plain_space, beyond_ascii] = marks(block);
        let other = !(letter | number | blank | plain_space | beyond_ascii);
        let space = plain_space | (blank & !line_feed);
        let alone = number | line_feed;
        (Classes { letter, other, space, plain_space, alone, inner: 0 }, beyond_ascii)
    }

    /// Adds the characters that are not ASCII.
    #[cold]
    fn with_characters(mut self, text: &str, base: usize, beyond_ascii: u64) -> Self {
        let mut left = beyond_ascii;
        while left != 0 {
            let at = base + left.trailing_zeros() as usize;
            let first = text.floor_char_boundary(at); // a character may have begun in the block before
            let character = text[first..].chars().next().expect("a byte is part of a character");
            let end = (first + character.len_utf8() - base).min(BLOCK);
            let bytes = ones(end) & !ones(at - base);
            match class(character) {
                Class::Letter => self.letter |= bytes,
                Class::Other => self.other |= bytes,
                Class::Space => self.space |= bytes,
                Class::Number | Class::LineFeed => self.alone |= bytes,
            }
            let begins = if first == at { 1 << (at - base) } else { 0 };
            self.inner |= bytes & !begins;
            left &= !bytes;
        }
        self
    }

    /// The last byte's classes, in the lowest bits.
    fn last(self) -> Self {
        let Classes { letter, other, space, plain_space, alone, inner } = self;
        let [letter, other, space, plain_space, alone, inner] =
            [letter, other, space, plain_space, alone, inner].map(|bits| bits >> (BLOCK - 1));
        Classes { letter, other, space, plain_space, alone, inner }
    }
}

/// The lowest `count` bits.
fn ones(count: usize) -> u64 {
    match count {
        BLOCK.. => u64::MAX,
        _ => (1 << count) - 1,
    }
}

/// A bit for each byte, the first one lowest: letters, numbers, blanks from tab to carriage return, line
/// feeds, spaces, and what is not ASCII.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn marks(block: &[u8; BLOCK]) -> [u64; 6] {
    use std::arch::x86_64::__m128i;
    let unit = pulp::core_arch::x86::Sse2::try_new().expect("every such CPU has it");
    let each = |byte: u8| unit._mm_set1_epi8(byte.cast_signed());
    let among = |bytes: __m128i, first: u8, count: u8| {
        let above = unit._mm_sub_epi8(bytes, each(first));
        unit._mm_cmpeq_epi8(unit._mm_min_epu8(above, each(count - 1)), above)
    };
    let mut found = [0; 6];
    for (index, half) in block.as_chunks::<16>().0.iter().enumerate() {
        let bytes: __m128i = pulp::cast(*half);
        let own = [
            among(unit._mm_or_si128(bytes, each(0x20)), b'a', 26),
            among(bytes, b'0', 10),
            among(bytes, b'\t', 5),
            unit._mm_cmpeq_epi8(bytes, each(b'\n')),
            unit._mm_cmpeq_epi8(bytes, each(b' ')),
            bytes,
        ];
        for (found, own) in found.iter_mut().zip(own) {
            *found |= u64::from(unit._mm_movemask_epi8(own).cast_unsigned()) << (16 * index);
        }
    }
    found
}

/// A bit for each byte, as on other machines.
#[cfg(any(test, not(target_arch = "x86_64")))]
fn plain_marks(block: &[u8; BLOCK]) -> [u64; 6] {
    let mut found = [0; 6];
    for (index, &byte) in block.iter().enumerate() {
        let own = [
            byte.is_ascii_alphabetic(),
            byte.is_ascii_digit(),
            (b'\t'..=b'\r').contains(&byte),
            byte == b'\n',
            byte == b' ',
            !byte.is_ascii(),
        ];
        for (found, own) in found.iter_mut().zip(own) {
            *found |= u64::from(own) << index;
        }
    }
    found
}

#[cfg(not(target_arch = "x86_64"))]
use plain_marks as marks;

/// Characters whose classes are looked up together.
const PAGE: usize = 256;

/// The class of any character, as the library's regular expressions see it.
fn class(character: char) -> Class {
    static PAGES: [OnceLock<[Class; PAGE]>; 0x11_0000 / PAGE] =
        [const { OnceLock::new() }; 0x11_0000 / PAGE];
    let (page, index) = (character as usize / PAGE, character as usize % PAGE);
    PAGES[page].get_or_init(|| classes(page))[index]
}

fn classes(page: usize) -> [Class; PAGE] {
    let expression = |class| onig::Regex::new(class).expect("a class of the pattern");
    let [letter, number, space] = [r"\p{L}", r"\p{N}", r"\s"].map(expression);
    std::array::from_fn(|index| {
        let Some(character) = char::from_u32((page * PAGE + index) as u32) else {
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

    /// The words of a text one character at a time, as the pattern reads.
    fn plain(text: &str) -> Vec<&str> {
        let characters: Vec<(usize, char)> = text.char_indices().collect();
        let class_of = |index: usize| characters.get(index).map(|&(_, character)| class(character));
        let run = |mut index: usize, own: Class| {
            while class_of(index) == Some(own) {
                index += 1;
            }
            index
        };
        let (mut words, mut index) = (Vec::new(), 0);
        while let Some(own) = class_of(index) {
            let end = match (own, class_of(index + 1)) {
                (Class::LineFeed | Class::Number, _) => index + 1,
                (Class::Space, Some(next @ (Class::Letter | Class::Other)))
                    if characters[index].1 == ' ' =>
                {
                    run(index + 1, next)
                }
                _ => run(index, own),
            };
            let byte = |index: usize| characters.get(index).map_or(text.len(), |&(at, _)| at);
            words.push(&text[byte(index)..byte(end)]);
            index = end;
        }
        words
    }

    fn check(text: &str) {
        for from in (0..text.len().min(130)).filter(|&from| text.is_char_boundary(from)) {
            let text = &text[from..];
            let words: Vec<&str> = Cut::new(text).map(|word| &text[word]).collect();
            assert_eq!(words, plain(text), "{text:?}");
        }
    }

    #[test]
    fn words_are_cut_where_the_pattern_cuts() {
        let text = "  The rates,\n\n to 75%\t x\u{a0}é!? 漢字½";
        let words: Vec<&str> = Cut::new(text).map(|word| &text[word]).collect();
        let expected = ["  ", "The", " rates", ",", "\n", "\n", " to", " ", "7", "5", "%", "\t "];
        assert_eq!(words[..12], expected);
        assert_eq!(words[12..], ["x", "\u{a0}", "é", "!?", " 漢字", "½"]);
        check(text);
        assert_eq!(Cut::new("").count(), 0);
    }

    #[test]
    fn borders_of_blocks_cut_nothing() {
        let long = "word ".repeat(30)
            + &"x".repeat(200)
            + &" ".repeat(70)
            + "12 \n漢字 ".repeat(40).as_str();
        check(&long);
        check(&"é½\u{a0}漢".repeat(60));
        check(&" a. \u{2028}\u{3000}٣🙂".repeat(40));
        for length in 60..70 {
            check(&("x".repeat(length) + " y"));
            check(&(" ".repeat(length) + "y"));
        }
    }

    #[test]
    fn vector_units_mark_what_plain_code_marks() {
        for first in 0..=255u8 {
            let block = std::array::from_fn(|index| first.wrapping_add(7 * index as u8));
            assert_eq!(marks(&block), plain_marks(&block));
        }
    }

    #[test]
    fn every_ascii_character_has_its_class() {
        for byte in 0..128u8 {
            let (found, beyond_ascii) = Classes::of_ascii(&[byte; BLOCK]);
            let expected = match class(char::from(byte)) {
                Class::Letter => Classes { letter: u64::MAX, ..Classes::default() },
                Class::Other => Classes { other: u64::MAX, ..Classes::default() },
                Class::Number | Class::LineFeed => {
                    Classes { alone: u64::MAX, ..Classes::default() }
                }
                Class::Space => {
                    let plain_space = if byte == b' ' { u64::MAX } else { 0 };
                    Classes { space: u64::MAX, plain_space, ..Classes::default() }
                }
            };
            assert_eq!((found, beyond_ascii), (expected, 0), "{byte}");
        }
    }
}
