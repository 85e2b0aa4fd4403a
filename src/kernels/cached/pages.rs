//! The memory of keys and values of one head: blocks that several threads use, each other ones.

// Reason: a slice of all blocks would be borrowed whole by whoever writes to one of them.
#![expect(unsafe_code, reason = "blocks of one memory are written and read by several threads")]

use super::{BLOCK, Block, Layout};
use crate::kernels::aligned::Aligned;
use crate::kernels::packed::WeightType;
use crate::kernels::rounding;
use crate::kernels::tiles::PANEL;
use pulp::bytemuck::cast_slice;

/// Keys and values of one head.
#[derive(Debug)]
pub(super) struct Pages {
    keys: PageMemory,
    values: PageMemory,
}

/// Pages of the same size.
#[derive(Debug)]
struct PageMemory {
    /// Where the first page begins.
    start: *mut u32,
    /// Words of a page.
    page: usize,
    pages: usize,
    /// Holds the memory, which is only ever used from `start`.
    _owner: Aligned<u32>,
}

// SAFETY: it owns plain numbers; who uses which page is up to `page` and `page_mut`.
unsafe impl Send for PageMemory {}
// SAFETY: as above.
unsafe impl Sync for PageMemory {}

impl PageMemory {
    fn zeros(pages: usize, page: usize) -> Self {
        let mut owner = Aligned::zeros(pages * page);
        PageMemory { start: owner.as_mut_ptr(), page, pages, _owner: owner }
    }

    /// # Safety
    /// Nobody writes to the page meanwhile.
    unsafe fn page(&self, index: usize) -> &[u32] {
        assert!(index < self.pages, "block {index} of {}", self.pages);
        // SAFETY: within the memory, as asserted; not written to, as promised.
        unsafe { std::slice::from_raw_parts(self.start.add(index * self.page), self.page) }
    }

    /// # Safety
    /// Nobody else uses the page meanwhile.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that nobody else uses it")]
    unsafe fn page_mut(&self, index: usize) -> &mut [u32] {
        assert!(index < self.pages, "block {index} of {}", self.pages);
        // SAFETY: within the memory, as asserted; not used elsewhere, as promised.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(index * self.page), self.page) }
    }
}

impl Pages {
    pub(super) fn new(blocks: usize, layout: Layout) -> Self {
        Pages {
            keys: PageMemory::zeros(blocks, layout.key_page()),
            values: PageMemory::zeros(blocks, layout.value_page()),
        }
    }

    /// # Panics
    /// If there is no such block.
    ///
    /// # Safety
    /// Nobody writes to the block meanwhile.
    pub(super) unsafe fn block(&self, at: usize) -> Block<'_> {
        // SAFETY: as promised.
        unsafe { Block { keys: self.keys.page(at), values: self.values.page(at) } }
    }

    /// Stores the key and the value of a position of a block.
    ///
    /// # Panics
    /// If there is no such block.
    ///
    /// # Safety
    /// Nobody else uses the block meanwhile.
    pub(super) unsafe fn store(
        &self,
        layout: Layout,
        (block, lane): (usize, usize),
        k: &[f32],
        v: &[f32],
    ) {
        // SAFETY: as promised.
        let (keys, values) = unsafe { (self.keys.page_mut(block), self.values.page_mut(block)) };
        if lane == 0 {
            // Nothing is left of whoever had the block before.
            keys.fill(0);
            values.fill(0);
        }
        let half = &mut keys[lane / PANEL * PANEL * layout.key_words()..];
        let words = half.iter_mut().skip(lane % PANEL).step_by(PANEL);
        let stripes =
            values.chunks_exact_mut(layout.kind.words(BLOCK) * PANEL).zip(v.chunks(PANEL));
        match layout.kind {
            WeightType::F32 => {
                words.zip(k).for_each(|(word, key)| *word = key.to_bits());
                for (stripe, v) in stripes {
                    stripe[lane * PANEL..][..v.len()].copy_from_slice(cast_slice(v));
                }
            }
            _ => {
                let key = |k: &[f32]| rounding::pair(k[0], k.get(1).copied().unwrap_or(0.0));
                words.zip(k.chunks(2)).for_each(|(word, k)| *word = key(k));
                let shift = 16 * (lane % 2);
                for (stripe, v) in stripes {
                    for (word, &v) in stripe[lane / 2 * PANEL..].iter_mut().zip(v) {
                        *word = *word & !(0xffff << shift) | rounding::round(v) << shift;
                    }
                }
            }
        }
    }
}
