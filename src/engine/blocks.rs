//! Which blocks of the cache hold what: a plain data structure without tensors.
//!
//! ```text
//! free ── take ─▶ held by one ── file, when it is full ─▶ held by many, found by content
//!  ▲ ▲               │ release                              │ released by the last     ▲
//!  │ └───────────────┘                                      ▼                          │ hold
//!  └── take: of idle blocks the least recently used ◀── idle, still found by content ──┘
//! ```
//!
//! A filed block is known by its tokens and by the filed block that holds everything before them. Both are
//! compared whole: no hash stands for them, so a block is never taken for another. Whoever holds a block
//! holds all before it, and lets go of the last first: of two idle blocks of one text the later one is
//! older, and is evicted first. A block can therefore be named by its number for as long as anything
//! refers to it.

use crate::kernels::cached::BLOCK;
use std::collections::BTreeMap;

/// What a full block holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Content {
    /// The block that holds what is before; none for the beginning of a text.
    before: Option<u32>,
    tokens: [u32; BLOCK],
}

#[derive(Clone, Debug, Default)]
struct Block {
    holders: usize,
    /// Set while the block is filed.
    content: Option<Content>,
    /// Its key in `idle`, while it is idle.
    idle_since: u64,
}

/// The blocks of a cache.
#[derive(Debug)]
pub struct Blocks {
    blocks: Vec<Block>,
    free: Vec<u32>,
    /// Filed blocks that nobody holds, the least recently used first.
    idle: BTreeMap<u64, u32>,
    filed: BTreeMap<Content, u32>,
    clock: u64,
    evictions: u64,
}

impl Blocks {
    /// So many free blocks.
    pub fn new(count: usize) -> Self {
        Blocks {
            blocks: vec![Block::default(); count],
            free: (0..count as u32).rev().collect(),
            idle: BTreeMap::new(),
            filed: BTreeMap::new(),
            clock: 0,
            evictions: 0,
        }
    }

    /// Blocks that can be taken.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks that somebody holds.
    pub fn held(&self) -> usize {
        self.blocks.len() - self.available()
    }

    /// Filed blocks that were given to somebody else, so far.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Whether nobody holds a block, though it can be found.
    pub fn is_idle(&self, block: u32) -> bool {
        let block = &self.blocks[block as usize];
        block.holders == 0 && block.content.is_some()
    }

    /// A block for its taker alone: a free one, or of the idle ones the least recently used.
    pub fn take(&mut self) -> Option<u32> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let (_, block) = self.idle.pop_first()?;
                let content = self.blocks[block as usize].content.take();
                self.filed.remove(&content.expect("idle blocks are filed"));
                self.evictions += 1;
                block
            }
        };
        self.blocks[block as usize].holders = 1;
        Some(block)
    }

    /// The filed blocks that a text begins with, in order.
    pub fn find(&self, tokens: &[u32]) -> Vec<u32> {
        let mut found: Vec<u32> = Vec::new();
        for tokens in tokens.as_chunks::<BLOCK>().0 {
            let content = Content { before: found.last().copied(), tokens: *tokens };
            match self.filed.get(&content) {
                Some(&block) => found.push(block),
                None => break,
            }
        }
        found
    }

    /// Holds a block that was found.
    ///
    /// # Panics
    /// If it is not filed.
    pub fn hold(&mut self, block: u32) {
        let own = &mut self.blocks[block as usize];
        assert!(own.content.is_some(), "block {block} is found before it is held");
        if own.holders == 0 {
            self.idle.remove(&own.idle_since);
        }
        own.holders += 1;
    }

    /// Files a full block behind `before`, for others to find. Returns the block to go on with: an equal
    /// one that was filed earlier, or the block itself.
    ///
    /// # Panics
    /// If the caller does not hold it alone, or `before` is not filed.
    pub fn file(&mut self, before: Option<u32>, tokens: [u32; BLOCK], block: u32) -> u32 {
        let is_filed = |&block: &u32| self.blocks[block as usize].content.is_some();
        assert!(before.as_ref().is_none_or(is_filed), "what is before block {block} is not filed");
        let content = Content { before, tokens };
        if let Some(&equal) = self.filed.get(&content) {
            self.hold(equal);
            self.let_go(block);
            return equal;
        }
        let own = &mut self.blocks[block as usize];
        assert!(own.holders == 1 && own.content.is_none(), "block {block} is filed once, by one");
        own.content = Some(content.clone());
        self.filed.insert(content, block);
        block
    }

    /// Takes back all blocks of a text.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        while let Some(block) = table.pop() {
            self.let_go(block);
        }
    }

    fn let_go(&mut self, block: u32) {
        let own = &mut self.blocks[block as usize];
        own.holders = own.holders.checked_sub(1).expect("a block is let go of by who holds it");
        match (own.holders, &own.content) {
            (0, Some(_)) => {
                self.clock += 1;
                own.idle_since = self.clock;
                self.idle.insert(self.clock, block);
            }
            (0, None) => self.free.push(block),
            _ => {}
        }
    }
}

#[cfg(test)]
impl Blocks {
    /// Checks what must hold at any time, for the tables of all holders.
    pub(super) fn check(&self, tables: &[&[u32]]) {
        let mut holders = vec![0; self.blocks.len()];
        for &block in tables.iter().copied().flatten() {
            holders[block as usize] += 1;
        }
        for (number, block) in (0u32..).zip(&self.blocks) {
            assert_eq!(block.holders, holders[number as usize], "holders of block {number}");
            let is_free = self.free.contains(&number);
            let is_idle = self.idle.get(&block.idle_since) == Some(&number);
            assert_eq!(is_free, block.holders == 0 && block.content.is_none(), "{number}");
            assert_eq!(is_idle, self.is_idle(number), "{number}");
            let Some(content) = &block.content else { continue };
            assert_eq!(self.filed.get(content), Some(&number), "{number} is found");
            let Some(before) = content.before else { continue };
            let before = &self.blocks[before as usize];
            assert!(before.content.is_some(), "what is before {number} was evicted");
            assert!(before.holders >= block.holders.min(1), "{number} is held alone");
            assert!(!is_idle || before.holders > 0 || before.idle_since > block.idle_since);
        }
        assert_eq!(self.filed.len(), self.blocks.iter().filter(|b| b.content.is_some()).count());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A text that is written into blocks, and filed.
    struct Text {
        tokens: Vec<u32>,
        table: Vec<u32>,
    }

    /// Writes a text whose blocks are named by letters; returns it with how many blocks were there.
    fn write(blocks: &mut Blocks, letters: &str) -> Option<(Text, usize)> {
        let tokens: Vec<u32> =
            letters.bytes().flat_map(|letter| [u32::from(letter); BLOCK]).collect();
        let mut table = blocks.find(&tokens);
        table.iter().for_each(|&block| blocks.hold(block));
        let found = table.len();
        while table.len() * BLOCK < tokens.len() {
            let Some(block) = blocks.take() else {
                blocks.release(&mut table);
                return None;
            };
            let own = tokens.as_chunks::<BLOCK>().0[table.len()];
            let block = blocks.file(table.last().copied(), own, block);
            table.push(block);
        }
        Some((Text { tokens, table }, found))
    }

    /// Writes texts one after the other, each released before the next; how many blocks were found.
    fn check(count: usize, texts: &[&str], expected: &[usize]) {
        let mut blocks = Blocks::new(count);
        let mut found = Vec::new();
        for letters in texts {
            let (mut text, reused) = write(&mut blocks, letters).unwrap();
            found.push(reused);
            blocks.check(&[&text.table]);
            blocks.release(&mut text.table);
            blocks.check(&[]);
        }
        assert_eq!(found, expected, "{texts:?}");
    }

    #[test]
    fn a_text_finds_the_blocks_it_begins_with() {
        check(9, &["abc", "abd", "abc", "bcd", ""], &[0, 2, 3, 0, 0]);
    }

    #[test]
    fn equal_blocks_behind_different_ones_are_not_equal() {
        check(9, &["ab", "cb", "bb", "cb"], &[0, 0, 0, 2]);
    }

    #[test]
    fn the_least_recently_used_goes_first_and_ends_before_beginnings() {
        check(4, &["ab", "cd", "ab", "e", "ab", "cd"], &[0, 0, 2, 0, 2, 1]);
    }

    #[test]
    fn what_is_written_twice_at_a_time_is_kept_once() {
        let mut blocks = Blocks::new(4);
        let (one, other) = (blocks.take().unwrap(), blocks.take().unwrap());
        assert_eq!(blocks.file(None, [7; BLOCK], one), one);
        assert_eq!(blocks.file(None, [7; BLOCK], other), one);
        assert_eq!((blocks.held(), blocks.available()), (1, 3));
        blocks.check(&[&[one], &[one]]);
    }

    #[test]
    fn what_is_held_is_never_given_away() {
        let mut blocks = Blocks::new(3);
        let (text, _) = write(&mut blocks, "ab").unwrap();
        assert!(write(&mut blocks, "cd").is_none());
        assert_eq!(blocks.find(&text.tokens), text.table);
    }

    proptest! {
        #[test]
        fn tables_stay_true_whoever_comes_and_goes(
            count in 1usize..12,
            moves in prop::collection::vec(("[ab]{0,5}", any::<prop::sample::Index>()), 1..60),
        ) {
            let mut blocks = Blocks::new(count);
            let mut held: Vec<Text> = Vec::new();
            for (letters, leaver) in moves {
                match write(&mut blocks, &letters) {
                    Some((text, _)) => held.push(text),
                    None if held.is_empty() => prop_assert!(letters.len() > count),
                    None => blocks.release(&mut held.swap_remove(leaver.index(held.len())).table),
                }
                let tables: Vec<&[u32]> = held.iter().map(|text| &text.table[..]).collect();
                blocks.check(&tables);
                for text in &held {
                    prop_assert_eq!(&blocks.find(&text.tokens), &text.table);
                }
            }
        }
    }
}
