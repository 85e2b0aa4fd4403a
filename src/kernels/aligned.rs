//! Memory that begins with a line of the cache, whatever the allocator gives.

use super::fetch::LINE;
use std::ops::{Deref, DerefMut};

/// Numbers that begin with a line of the cache, so that no vector of them lies in two: with half of them in two, as memory of
/// glibc has it, the loops of products run 4 to 10 % slower (docs/engine.md). A cache of keys and values is gigabytes of zeros that
/// nobody touches before they are wanted: the crate for such memory, `aligned-vec`, writes them all.
#[derive(Debug, Default)]
pub(crate) struct Aligned<T> {
    memory: Vec<T>,
    start: usize,
    length: usize,
}

impl<T: Copy + Default> Aligned<T> {
    /// None.
    pub(crate) const fn empty() -> Self {
        Aligned { memory: Vec::new(), start: 0, length: 0 }
    }

    /// So many zeros. Their memory is asked for, not touched.
    pub(crate) fn zeros(length: usize) -> Self {
        let spare = LINE / size_of::<T>() - 1;
        let memory = vec![T::default(); length + spare];
        let start = memory.as_ptr().align_offset(LINE).min(spare);
        Aligned { memory, start, length }
    }

    /// Makes room for so many. If it was too small, it is another one, of zeros.
    pub(crate) fn make_room(&mut self, length: usize) {
        if self.length < length {
            *self = Aligned::empty();
            *self = Aligned::zeros(length);
        }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl<T> DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

impl<T: Copy + Default> Clone for Aligned<T> {
    fn clone(&self) -> Self {
        let mut clone = Aligned::zeros(self.length);
        clone.copy_from_slice(self);
        clone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_begin_with_a_line_of_the_cache_and_so_does_a_clone() {
        let mut all: Vec<Aligned<u32>> = (0..50).map(Aligned::zeros).collect();
        for (length, own) in all.iter_mut().enumerate() {
            assert!(own.len() == length && own.iter().all(|&word| word == 0));
            own.fill(7);
            let clone = own.clone();
            assert_eq!(**own, *clone);
            for words in [&*own, &clone] {
                assert!(words.as_ptr().addr().is_multiple_of(LINE));
            }
        }
    }

    #[test]
    fn room_that_is_there_stays_and_more_is_new() {
        let mut room = Aligned::<f32>::default();
        room.make_room(3);
        room.fill(1.5);
        room.make_room(2);
        assert_eq!(*room, [1.5; 3]);
        room.make_room(4);
        assert_eq!(*room, [0.0; 4]);
        assert!(room.as_ptr().addr().is_multiple_of(LINE));
    }
}
