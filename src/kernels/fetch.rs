//! Memory that is asked for before it is read.

// Reason: the instruction takes a raw pointer. It reads nothing and changes nothing.
#![expect(unsafe_code, reason = "a prefetch takes a raw pointer")]

use std::marker::PhantomData;
use std::ops::Range;

/// Bytes of a line of the cache.
pub(crate) const LINE: usize = 64;

/// Has the CPU bring the memory at an address near, to be written, if there is any.
#[inline(always)]
pub(crate) fn fetch_to_write<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        // SAFETY: every CPU of this kind has the instruction, which has no effect that can be seen at any address.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(address.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Has the CPU bring an element near, if there is one at `index`.
#[inline(always)]
pub(crate) fn fetch<T>(elements: &[T], index: usize) {
    if let Some(element) = elements.get(index) {
        fetch_one(element);
    }
}

#[inline(always)]
fn fetch_one<T>(element: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every CPU of this kind has the instruction, which has no effect that can be seen.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(element).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = element;
}

/// Has the CPU bring elements near.
#[inline(always)]
pub(crate) fn fetch_all<T>(elements: &[T]) {
    elements.iter().step_by(LINE / size_of::<T>()).for_each(fetch_one);
}

/// Has the CPU bring elements into its second cache.
#[inline(always)]
pub(crate) fn fetch_lines<T>(elements: &[T]) {
    Steps { next: elements.as_ptr().cast(), step: LINE }
        .fetch(size_of_val(elements).div_ceil(LINE));
}

/// Memory that a loop fetches on its way into the second cache.
#[derive(Clone, Copy)]
pub(crate) struct Span<'a> {
    start: *const u8,
    bytes: usize,
    memory: PhantomData<&'a [u8]>,
}

impl Span<'_> {
    pub(crate) const NOTHING: Span<'static> =
        Span { start: std::ptr::null(), bytes: 0, memory: PhantomData };

    /// The address is one of a slice of the lifetime, or of nothing; what is fetched may end behind it.
    pub(crate) fn new<T>(start: *const T, bytes: usize) -> Self {
        Span { start: start.cast(), bytes, memory: PhantomData }
    }

    /// All of some elements.
    #[inline(always)]
    pub(crate) fn of<T>(elements: &[T]) -> Span<'_> {
        Span::new(elements.as_ptr(), size_of_val(elements))
    }

    /// The share of some of `count` rows.
    #[inline(always)]
    pub(crate) fn part(self, rows: Range<usize>, count: usize) -> Self {
        let cut = |row: usize| row * self.bytes / count;
        let start = self.start.wrapping_add(cut(rows.start));
        Span { start, bytes: cut(rows.end) - cut(rows.start), memory: PhantomData }
    }

    /// Cut into so many steps. Nothing becomes something that is near anyhow: an address that does not exist is looked up
    /// each time.
    #[inline(always)]
    pub(crate) fn steps<T>(self, steps: usize, near: &[T]) -> Steps {
        let next = if self.bytes == 0 { near.as_ptr().cast() } else { self.start };
        // Mostly it is a line a step, which needs no division.
        let is_lines = self.bytes == steps * LINE;
        Steps { next, step: if is_lines { LINE } else { self.bytes.div_ceil(steps.max(1)) } }
    }
}

/// Steps through memory that is fetched.
pub(crate) struct Steps {
    next: *const u8,
    step: usize,
}

impl Steps {
    /// Fetches the next ones.
    #[inline(always)]
    pub(crate) fn fetch(&mut self, count: usize) {
        for _ in 0..count {
            #[cfg(target_arch = "x86_64")]
            {
                use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                // SAFETY: every CPU of this kind has the instruction, which has no effect that can be seen at any address.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(self.next.cast()) }
            }
            self.next = self.next.wrapping_add(self.step);
        }
    }
}

/// Has the CPU begin to bring elements into its second cache: two lines of every 4 KiB, which its own prefetcher goes on
/// from. That one stops at the end of every page.
#[inline(always)]
pub(crate) fn begin_to_fetch<T>(elements: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for piece in elements.chunks(4096 / size_of::<T>()) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let start: *const i8 = piece.as_ptr().cast();
        // SAFETY: every CPU of this kind has the instruction, which has no effect that can be seen at any address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(start);
            _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(LINE));
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = elements;
}
