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
    #[cfg(target_arch = "x86_64")]
    if let Some(element) = elements.get(index) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every CPU of this kind has the instruction, which has no effect that can be seen.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(element).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (elements, index);
}
