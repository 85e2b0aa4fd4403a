//! Random choices that depend on nothing but the run, a record and a purpose.
//!
//! Every choice draws from a stream of its own, keyed by `(run seed, record id, purpose)`. Streams
//! are independent, so no two choices are tied together, and none depends on arrival order, on the
//! worker that makes it, or on how many choices were made before (recipe (e), *Streams*).
//!
//! The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) started from an xxh3 hash. It is
//! written out here because its bits are part of the product's contract: the same seed must give the
//! same bytes in every later version, which no general-purpose crate promises.

use xxhash_rust::xxh3::Xxh3;

/// What the state grows by from one number to the next.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// A stream of random numbers for one purpose of one record.
#[derive(Clone, Debug)]
pub struct Stream {
    state: u64,
}

/// The stream for `purpose` of the record `id` under the run's seed.
///
/// ```
/// let mut one = headwater::seed::stream(7, "pmid:1", "template mode");
/// let mut same = headwater::seed::stream(7, "pmid:1", "template mode");
/// let mut other = headwater::seed::stream(7, "pmid:1", "option names");
/// let first = one.next_u64();
/// assert_eq!(first, same.next_u64());
/// assert_ne!(first, other.next_u64());
/// ```
pub fn stream(run: u64, id: &str, purpose: &str) -> Stream {
    let mut hash = Xxh3::new();
    hash.update(&run.to_le_bytes());
    hash.update(&(id.len() as u64).to_le_bytes()); // ("ab", "c") is not ("a", "bc")
    hash.update(id.as_bytes());
    hash.update(purpose.as_bytes());
    Stream { state: hash.digest() }
}

impl Stream {
    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let bits = self.at(0);
        self.state = self.state.wrapping_add(STEP);
        bits
    }

    /// The bits that [`Stream::next_u64`] gives behind so many others, without those: a stream is a counter.
    #[inline(always)]
    pub fn at(&self, index: u64) -> u64 {
        let mut bits = self.state.wrapping_add(index.wrapping_add(1).wrapping_mul(STEP));
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    }

    /// The stream of one of many like parts of what this one is for.
    #[inline(always)]
    pub fn part(&self, index: u64) -> Stream {
        Stream { state: self.at(index) }
    }

    /// A uniform number in `0..bound`, without bias (Lemire, ACM TOMACS 2019).
    ///
    /// # Panics
    /// If `bound` is zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "there is no number below zero");
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(bound);
            if wide as u64 >= threshold {
                return (wide >> 64) as u64;
            }
        }
    }

    /// A uniform index into a collection of `len` elements.
    ///
    /// # Panics
    /// If `len` is zero.
    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// A uniform number in `[0, 1)` with 53 random bits.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A normally distributed number with mean 0 and deviation 1 (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// The index of one of `weights`, chosen in proportion to them.
    ///
    /// # Panics
    /// If all weights are zero.
    pub fn weighted(&mut self, weights: impl Iterator<Item = u64> + Clone) -> usize {
        let mut left = self.below(weights.clone().sum());
        for (index, weight) in weights.enumerate() {
            if left < weight {
                return index;
            }
            left -= weight;
        }
        unreachable!("a number below the sum falls into one of the weights")
    }

    /// Brings `items` into a uniformly random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.index(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bits_of_a_stream_never_change() {
        let mut stream = stream(1, "pmid:7551119", "template mode");
        let bits: Vec<u64> = (0..3).map(|_| stream.next_u64()).collect();
        assert_eq!(bits, [1516814397157134736, 14334877883619412064, 8840628004797995568]);
    }

    #[test]
    fn a_number_of_a_stream_can_be_had_without_those_before_it() {
        let stream = stream(1, "x", "y");
        let mut drawn = stream.clone();
        for index in 0..100 {
            assert_eq!(stream.at(index), drawn.next_u64());
            assert_ne!(stream.part(index).at(0), stream.part(index + 1).at(0));
        }
    }

    #[test]
    fn ids_and_purposes_do_not_run_together() {
        assert_ne!(stream(1, "ab", "c").state, stream(1, "a", "bc").state);
    }

    #[test]
    fn every_permutation_of_four_is_equally_likely() {
        let mut counts = std::collections::BTreeMap::new();
        for run in 0..24_000 {
            let mut items = [0, 1, 2, 3];
            stream(run, "text", "options").shuffle(&mut items);
            *counts.entry(items).or_insert(0u32) += 1;
        }
        assert_eq!(counts.len(), 24);
        // Mean 1000, deviation 31: five deviations.
        assert!(counts.values().all(|count| (845..1155).contains(count)), "{counts:?}");
    }

    #[test]
    fn weights_are_met() {
        let mut counts = [0u32; 3];
        let mut stream = stream(3, "x", "y");
        for _ in 0..10_000 {
            counts[stream.weighted([1u64, 0, 3].into_iter())] += 1;
        }
        assert_eq!(counts[1], 0);
        assert!((2300..2700).contains(&counts[0]), "{counts:?}");
    }
}
