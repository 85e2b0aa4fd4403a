//! The closing account: what came in is what went out, by destination and reason.
//!
//! Every stage counts what it took and what became of it. Counts of all workers and epochs are added up;
//! the balances below then say whether anything is unaccounted for.

use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Bound;

/// Counts by name. A name is a path: `read/rejected/invalid_utf8`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ledger {
    counts: BTreeMap<Cow<'static, str>, u64>,
}

/// What must equal what: the count on the left is the sum of all counts that start with one of the
/// names on the right.
const BALANCES: [(&str, &[&str]); 11] = [
    ("read/records", &["read/documents", "read/rejected/", "read/withdrawn"]),
    (
        "read/documents",
        &["admit/whole", "admit/split", "admit/windowed", "admit/raw", "admit/rejected/"],
    ),
    ("admit/texts", &["synthesize/finished/", "synthesize/not_asked"]),
    ("parse/pieces", &["parse/pairs", "parse/rejected/"]),
    ("admit/texts", &["templify/texts/"]),
    ("parse/pairs", &["gate/pairs", "gate/rejected/"]),
    ("gate/pairs", &["templify/pairs/", "templify/rejected/"]),
    ("templify/documents", &["mix/items/augmented", "mix/left_out/augmented"]),
    ("mix/tokens", &["pack/tokens"]),
    ("pack/room", &["pack/tokens", "pack/padding"]),
    ("pack/sequences", &["train/sequences", "train/waiting"]),
];

/// A balance that was struck.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balance {
    /// What came in.
    pub taken: String,
    /// How much.
    pub amount: u64,
    /// What became of it.
    pub given: BTreeMap<String, u64>,
    /// What is not accounted for.
    pub unknown: u64,
}

impl Ledger {
    /// Counts `amount` more of `name`.
    pub fn add(&mut self, name: impl Into<Cow<'static, str>>, amount: u64) {
        if amount > 0 {
            *self.counts.entry(name.into()).or_default() += amount;
        }
    }

    /// Adds all counts of another ledger.
    pub fn merge(&mut self, other: &Ledger) {
        for (name, amount) in &other.counts {
            match self.counts.get_mut(name) {
                Some(count) => *count += amount,
                None => self.add(name.clone(), *amount),
            }
        }
    }

    /// The count of a name; zero if it was never counted.
    pub fn get(&self, name: &str) -> u64 {
        self.counts.get(name).copied().unwrap_or(0)
    }

    /// Counts whose names start with `prefix`, by the rest of their names.
    pub fn under<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, u64)> {
        let from = self.counts.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        let own = from.take_while(move |(name, _)| name.starts_with(prefix));
        own.map(move |(name, amount)| (&name[prefix.len()..], *amount))
    }

    /// The sum of all counts whose names start with `prefix`.
    pub fn sum(&self, prefix: &str) -> u64 {
        self.under(prefix).map(|(_, amount)| amount).sum()
    }

    /// All counts.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.counts.iter().map(|(name, amount)| (name.as_ref(), *amount))
    }

    /// All balances that this ledger has anything to say to.
    pub fn balances(&self) -> Vec<Balance> {
        let strike = |(taken, given): &(&str, &[&str])| {
            let mut by_name = BTreeMap::new();
            for name in *given {
                match name.strip_suffix('/') {
                    Some(_) => by_name.extend(
                        self.under(name).map(|(rest, amount)| (format!("{name}{rest}"), amount)),
                    ),
                    None => drop(by_name.insert((*name).to_owned(), self.get(name))),
                }
            }
            let amount = self.get(taken);
            let unknown = amount.abs_diff(by_name.values().sum());
            Balance { taken: (*taken).to_owned(), amount, given: by_name, unknown }
        };
        BALANCES.iter().map(strike).collect()
    }

    /// What is not accounted for, over all balances.
    pub fn unknown(&self) -> u64 {
        self.balances().iter().map(|balance| balance.unknown).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(counts: &[(&str, u64)]) -> Ledger {
        let mut ledger = Ledger::default();
        for &(name, amount) in counts {
            ledger.add(name.to_owned(), amount);
        }
        ledger
    }

    fn check(counts: &[(&str, u64)], unknown: u64) {
        assert_eq!(ledger(counts).unknown(), unknown, "{counts:?}");
    }

    #[test]
    fn a_ledger_that_adds_up_has_nothing_unknown() {
        check(&[], 0);
        check(
            &[
                ("parse/pieces", 10),
                ("parse/pairs", 7),
                ("parse/rejected/empty_answer", 1),
                ("parse/rejected/unfinished", 2),
                ("gate/pairs", 7),
                ("templify/pairs/shown", 5),
                ("templify/pairs/hidden", 1),
                ("templify/rejected/chain_malformed", 1),
            ],
            0,
        );
    }

    #[test]
    fn what_does_not_add_up_is_unknown_in_both_directions() {
        check(&[("parse/pieces", 3)], 3);
        check(&[("parse/rejected/unfinished", 2)], 2);
        check(&[("pack/room", 100), ("pack/tokens", 90), ("mix/tokens", 90)], 10);
    }

    #[test]
    fn ledgers_add_up_in_any_order() {
        let (a, b) = (ledger(&[("x", 1), ("y", 2)]), ledger(&[("y", 3), ("z", 0)]));
        let (mut ab, mut ba) = (a.clone(), b.clone());
        ab.merge(&b);
        ba.merge(&a);
        assert_eq!(ab, ba);
        assert_eq!(ab, ledger(&[("x", 1), ("y", 5)]));
    }

    #[test]
    fn counts_are_found_by_prefix() {
        let ledger = ledger(&[("a/b", 1), ("a/c", 2), ("ab", 4)]);
        assert_eq!(ledger.under("a/").collect::<Vec<_>>(), [("b", 1), ("c", 2)]);
        assert_eq!((ledger.sum("a/"), ledger.sum("a")), (3, 7));
    }
}
