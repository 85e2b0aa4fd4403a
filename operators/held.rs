//! What an operator holds while it waits for answers from outside.

use std::collections::BTreeMap;
use timely::dataflow::operators::CapabilitySet;
use timely::progress::{Stamp, Timestamp};

/// The capabilities of stamps that still have something under way.
pub(crate) struct Held<T: Timestamp> {
    slots: BTreeMap<Stamp<T>, usize>,
    under_way: BTreeMap<usize, (CapabilitySet<T>, usize)>,
    next: usize,
}

impl<T: Timestamp> Default for Held<T> {
    fn default() -> Self {
        Held { slots: BTreeMap::new(), under_way: BTreeMap::new(), next: 0 }
    }
}

impl<T: Timestamp> Held<T> {
    /// The slot of a stamp, whose capabilities are retained if it is new.
    pub(crate) fn slot(
        &mut self,
        stamp: Stamp<T>,
        retain: impl FnOnce() -> CapabilitySet<T>,
    ) -> usize {
        *self.slots.entry(stamp).or_insert_with(|| {
            self.next += 1;
            self.under_way.insert(self.next, (retain(), 0));
            self.next
        })
    }

    pub(crate) fn enter(&mut self, slot: usize) {
        self.under_way.get_mut(&slot).expect("entered while held").1 += 1;
    }

    pub(crate) fn capabilities(&self, slot: usize) -> &CapabilitySet<T> {
        &self.under_way[&slot].0
    }

    /// Drops the capabilities of a slot with the last that is under way.
    pub(crate) fn leave(&mut self, slot: usize) {
        self.under_way.get_mut(&slot).expect("left while held").1 -= 1;
        self.release_if_idle(slot);
    }

    pub(crate) fn release_if_idle(&mut self, slot: usize) {
        if self.under_way[&slot].1 == 0 {
            self.under_way.remove(&slot);
            self.slots.retain(|_, own| *own != slot);
        }
    }
}
