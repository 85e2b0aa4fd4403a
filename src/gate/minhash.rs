//! Near-duplicates by MinHash (Broder, 1997) and locality-sensitive hashing over bands (Indyk and Motwani, 1998).
//!
//! ```text
//! text ─▶ shingles of 5 words ─▶ smallest hash under each of 128 functions ─▶ bands of equal length
//! ```
//!
//! Two texts with Jaccard similarity `s` agree in each smallest hash with probability `s`, hence in some
//! whole band of `r` with probability `1 - (1 - s^r)^(128/r)`. Candidates that share a band are then
//! compared by their whole signatures, so that the threshold itself decides, not the bands.

use super::words;
use crate::seed;
use std::collections::HashMap;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Hash functions of a signature: an estimate of the similarity deviates by 0.044 at most (one sigma).
const FUNCTIONS: usize = 128;
/// Words of a shingle of documents; 5 is usual for web text (Lee et al., 2022; arXiv 2107.06499).
const SHINGLE: usize = 5;

/// The smallest hashes of a text's shingles.
pub type Signature = [u32; FUNCTIONS];

/// Remembers texts and recognises those that are nearly the same.
#[derive(Clone, Debug)]
pub struct NearDuplicates {
    /// Similarity from which on two texts are the same, in percent.
    percent: u32,
    rows: usize,
    multipliers: Vec<(u64, u64)>,
    signatures: Vec<Signature>,
    /// The newest text with a given content of a band.
    newest: HashMap<u64, u32>,
    /// For each band of each text, the text before it that has the same there.
    earlier: Vec<Option<u32>>,
}

impl NearDuplicates {
    /// Recognises texts whose shingles are equal to `percent`, by their Jaccard similarity.
    ///
    /// # Panics
    /// If the share is not between 1 and 100.
    pub fn new(percent: u32) -> Self {
        assert!((1..=100).contains(&percent), "a share in percent");
        let mut stream = seed::stream(0, "minhash", "functions");
        let multipliers = (0..FUNCTIONS).map(|_| (stream.next_u64() | 1, stream.next_u64()));
        NearDuplicates {
            percent,
            rows: rows(f64::from(percent) / 100.0),
            multipliers: multipliers.collect(),
            signatures: Vec::new(),
            newest: HashMap::new(),
            earlier: Vec::new(),
        }
    }

    /// Whether a text is nearly the same as one that was let through before; else it is remembered.
    pub fn is_repeated(&mut self, text: &str) -> bool {
        let Some(signature) = self.signature(text) else {
            return false; // without a single word there is nothing to compare
        };
        let bands: Vec<u64> = signature.chunks(self.rows).zip(0..).map(digest).collect();
        let is_found = |(band, key): (usize, &u64)| {
            let before = |&other: &u32| self.earlier[other as usize * bands.len() + band];
            std::iter::successors(self.newest.get(key).copied(), before)
                .any(|other| self.is_alike(&signature, other))
        };
        if bands.iter().enumerate().any(is_found) {
            return true;
        }
        let index = self.signatures.len() as u32;
        self.signatures.push(signature);
        self.earlier.extend(bands.into_iter().map(|key| self.newest.insert(key, index)));
        false
    }

    fn is_alike(&self, signature: &Signature, other: u32) -> bool {
        let other = &self.signatures[other as usize];
        let equal = signature.iter().zip(other).filter(|(a, b)| a == b).count();
        equal * 100 >= self.percent as usize * FUNCTIONS
    }

    /// The signature of a text; none if it has no words.
    fn signature(&self, text: &str) -> Option<Signature> {
        let words: Vec<String> = words(text).collect();
        if words.is_empty() {
            return None;
        }
        let mut signature = [u32::MAX; FUNCTIONS];
        for shingle in words.windows(SHINGLE.min(words.len())) {
            let hash = xxh3_64(shingle.join(" ").as_bytes());
            for (smallest, (multiplier, addend)) in signature.iter_mut().zip(&self.multipliers) {
                let value = (hash.wrapping_mul(*multiplier).wrapping_add(*addend) >> 32) as u32;
                *smallest = (*smallest).min(value);
            }
        }
        Some(signature)
    }
}

/// Rows of a band such that texts at the threshold are found with a probability of 0.95 at least.
fn rows(similarity: f64) -> usize {
    let found =
        |rows: usize| 1.0 - (1.0 - similarity.powi(rows as i32)).powi((FUNCTIONS / rows) as i32);
    (1..=32).rev().find(|&rows| found(rows) >= 0.95).unwrap_or(1)
}

/// A digest of a band and what it holds.
fn digest((rows, band): (&[u32], u64)) -> u64 {
    let bytes: Vec<u8> = rows.iter().flat_map(|row| row.to_le_bytes()).collect();
    xxh3_64_with_seed(&bytes, band)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A text of `count` words, of which those from `changed` on are other ones.
    fn text(seed: u64, count: usize, changed: usize) -> String {
        let word = |index: usize| {
            let seed = if index < changed { seed } else { seed + 1000 };
            format!("w{}", seed::stream(seed, &index.to_string(), "word").below(100_000))
        };
        (0..count).map(word).collect::<Vec<_>>().join(" ")
    }

    fn check(percent: u32, changed: usize, repeated: std::ops::RangeInclusive<usize>) {
        let found = (0..50).filter(|&seed| {
            let mut seen = NearDuplicates::new(percent);
            assert!(!seen.is_repeated(&text(seed, 300, 300)), "nothing was seen before");
            seen.is_repeated(&text(seed, 300, changed))
        });
        let count = found.count();
        assert!(repeated.contains(&count), "{count} of 50 with {changed} words of 300 kept");
    }

    #[test]
    fn texts_above_the_threshold_are_found_and_others_are_not() {
        check(80, 300, 50..=50);
        check(80, 285, 48..=50); // similarity 0.90
        check(80, 200, 0..=0); // similarity 0.49
        check(50, 230, 45..=50); // similarity 0.61
        check(50, 120, 0..=0); // similarity 0.25
    }

    #[test]
    fn case_and_punctuation_make_no_difference() {
        let mut seen = NearDuplicates::new(90);
        assert!(!seen.is_repeated("Rates rose, by 25 points; wages did not."));
        assert!(seen.is_repeated("RATES ROSE by 25 points. Wages did not"));
        assert!(!seen.is_repeated("..."));
        assert!(!seen.is_repeated("..."));
    }

    #[test]
    fn bands_are_as_long_as_the_threshold_allows() {
        assert_eq!([30, 50, 80, 90, 100].map(|p| rows(f64::from(p) / 100.0)), [2, 3, 7, 12, 32]);
    }
}
