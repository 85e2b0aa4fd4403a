//! Memory that is asked for before it is read.

// Reason: the instruction takes a raw pointer. It reads nothing and changes nothing.
#![expect(unsafe_code, reason = "a prefetch takes a raw pointer")]

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
    elements.iter().step_by(64 / size_of::<T>()).for_each(fetch_one);
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
            _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(64));
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = elements;
}
