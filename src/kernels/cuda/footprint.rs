//! How much memory tensors take: bytes that a thread of the tests holds.
//!
//! Tensors that a GPU would keep are those of the CPU where a machine is emulated, and take the same there. What the
//! emulation itself needs is not counted.

// Reason: allocators are unsafe to write and to call.
#![expect(unsafe_code, reason = "an allocator that counts")]

use candle_core::{Result, Tensor};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static COUNTED: Cell<Counted> = const { Cell::new(Counted { held: 0, most: 0, is_paused: false }) };
}

#[derive(Clone, Copy)]
struct Counted {
    held: isize,
    most: isize,
    is_paused: bool,
}

/// The system's allocator, which counts what each thread takes and gives back.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: isize) {
    let _ = COUNTED.try_with(|counted| {
        let mut now = counted.get();
        if !now.is_paused {
            now.held += bytes;
            now.most = now.most.max(now.held);
            counted.set(now);
        }
    });
}

// SAFETY: everything is asked of the system's allocator as it was asked here; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller has promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller has promised.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: as the caller has promised.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller has promised.
        unsafe { System.dealloc(at, layout) }
    }
}

/// What `work` returns, and the most bytes that this thread held at a time while it was done, beyond those before.
pub(crate) fn most_of<R>(work: impl FnOnce() -> R) -> (R, usize) {
    let before = COUNTED.get();
    COUNTED.set(Counted { most: before.held, ..before });
    let result = work();
    (result, (COUNTED.get().most - before.held) as usize)
}

/// A tensor of which only what it holds itself is counted, and not what it took to compute it: products of a CPU copy what
/// stands in other ways than they like, those of a GPU do not.
pub(crate) fn only_result(work: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
    let result = uncounted(work)?;
    count((result.elem_count() * result.dtype().size_in_bytes()) as isize);
    Ok(result)
}

/// Does work that is not counted, and gives back all that it takes.
pub(crate) fn uncounted<R>(work: impl FnOnce() -> R) -> R {
    let before = COUNTED.get();
    COUNTED.set(Counted { is_paused: true, ..before });
    let result = work();
    COUNTED.set(before);
    result
}

#[test]
fn what_is_held_at_a_time_is_counted() {
    let (kept, most) = most_of(|| {
        drop(vec![0u8; 3000]);
        uncounted(|| drop(vec![0u8; 9000]));
        let kept = vec![1u8; 1000];
        drop(vec![0u8; 1500]);
        kept
    });
    assert!((3000..3100).contains(&most), "{most}");
    assert_eq!(kept.len(), 1000);
}
