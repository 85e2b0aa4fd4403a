//! What the processors and the memory of this machine can do at best: the ceilings that shares are taken of.
//!
//! ```text
//! products   registers only, no loads: one multiply-add behind another in independent chains, on all threads
//! memory     a buffer far larger than the caches, read from its beginning to its end, on all threads
//! ```
//!
//! No program can be faster, and none reaches both at once. Each is the best of several turns: a machine
//! that is shared with others has bad moments, and a ceiling is no average.

// Reason: functions compiled for an instruction set may only be called where the CPU has it, which is asked.
#![expect(unsafe_code, reason = "instruction sets are asked for before they are used")]

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::bf16x3;
use super::packed::WeightType;
use super::tiles::PANEL;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

/// Turns, of which the best counts.
pub const TURNS: usize = 8;

/// Multiply-adds in each chain of a turn: some tens of milliseconds.
const LENGTH: usize = 1 << 23;

/// Chains side by side: more than any CPU has such operations under way.
const CHAINS: usize = 16;

/// The same on units of 256 bits, where 16 would not fit the registers: two of a latency of five at most.
const CHAINS_OF_256_BITS: usize = 12;

/// Bytes of the buffer that is read.
const BUFFER: usize = 512 << 20;

/// Multiplications and additions a second in registers, on all threads, for weights of this type, in the best of so many
/// turns of some tens of milliseconds. A CPU without instructions for the type has the rate of f32.
pub fn operations_per_second(kind: WeightType, turns: usize) -> f64 {
    let chains = match kind {
        WeightType::F32 => floats,
        WeightType::Bf16 => pairs,
        WeightType::Bf16x3 => parts,
        WeightType::BlockFloat => integers,
        WeightType::Int8 => quads,
    };
    best(turns, || {
        let start = Instant::now();
        let operations: usize = rayon::broadcast(|_| chains()).into_iter().sum();
        operations as f64 / start.elapsed().as_secs_f64()
    })
}

/// What the tensor cores of a GPU do with dense matrices in bf16, operations a second, by what its maker calls
/// it: data sheets of NVIDIA's A100 (2020), H100 (2022) and H200 (2024), without sparsity. None for others.
pub fn of_gpu(name: &str) -> Option<f64> {
    let known = [
        ("H200", 989e12),
        ("H100 80GB HBM3", 989e12),
        ("H100 PCIe", 756e12),
        ("A100-", 312e12),
        ("A100 ", 312e12),
    ];
    known.iter().find(|(part, _)| name.contains(part)).map(|(_, peak)| *peak)
}

/// Threads that kernels share their work among.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Bytes a second that all threads together read from memory.
pub fn bytes_per_second() -> f64 {
    let buffer = vec![1.0f32; BUFFER / size_of::<f32>()];
    let share = buffer.len().div_ceil(rayon::current_num_threads());
    best(TURNS, || {
        let start = Instant::now();
        let sum: f32 =
            buffer.par_chunks(share).map(|part| pulp::Arch::new().dispatch(Sum(part))).sum();
        black_box(sum);
        BUFFER as f64 / start.elapsed().as_secs_f64()
    })
}

fn best(turns: usize, mut turn: impl FnMut() -> f64) -> f64 {
    (0..turns).map(|_| turn()).fold(0.0, f64::max)
}

struct Sum<'a>(&'a [f32]);

impl WithSimd for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (vectors, rest) = S::as_simd_f32s(self.0);
        let mut sums = [simd.splat_f32s(0.0); 8];
        for vectors in vectors.chunks_exact(8) {
            for (sum, &vector) in sums.iter_mut().zip(vectors) {
                *sum = simd.add_f32s(*sum, vector);
            }
        }
        let sums = sums.map(|sum| simd.reduce_sum_f32s(sum));
        sums.iter().chain(rest).sum()
    }
}

/// Runs chains of three parts; returns how many operations on whole numbers that were.
fn parts() -> usize {
    match bf16x3::pays() {
        true => pairs() / bf16x3::PRODUCTS,
        false => floats(),
    }
}

/// Runs chains in f32; returns how many operations that were.
fn floats() -> usize {
    pulp::Arch::new().dispatch(Floats)
}

struct Floats;

impl WithSimd for Floats {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> usize {
        match S::F32_LANES {
            8 => chains_of::<CHAINS_OF_256_BITS, S>(simd),
            _ => chains_of::<CHAINS, S>(simd),
        }
    }
}

#[inline(always)]
fn chains_of<const COUNT: usize, S: Simd>(simd: S) -> usize {
    let factor = simd.splat_f32s(black_box(0.999));
    let mut sums: [S::f32s; COUNT] = std::array::from_fn(|chain| simd.splat_f32s(chain as f32));
    for _ in 0..LENGTH {
        for sum in &mut sums {
            *sum = simd.mul_add_f32s(factor, factor, *sum);
        }
    }
    black_box(sums.map(|sum| simd.reduce_sum_f32s(sum)));
    2 * S::F32_LANES * COUNT * LENGTH
}

/// The same in bf16.
fn pairs() -> usize {
    #[cfg(target_arch = "x86_64")]
    if amx::is_there() {
        return amx::chains::<false>(LENGTH / 4);
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the CPU has the instructions.
        return unsafe { avx512::pairs() };
    }
    floats()
}

/// The same in block floating point.
fn integers() -> usize {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the CPU has the instructions.
        return unsafe { avx2::integers() };
    }
    floats()
}

/// The same in 8 bits.
fn quads() -> usize {
    #[cfg(target_arch = "x86_64")]
    if amx::is_there() {
        return amx::chains::<true>(LENGTH / 4);
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the CPU has the instructions.
        return unsafe { avx512::quads() };
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the CPU has the instructions.
        return unsafe { avx2::quads() };
    }
    floats()
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{CHAINS_OF_256_BITS, LENGTH, black_box};
    use std::arch::x86_64::{
        __m256i, _mm256_add_epi32, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8,
        _mm256_set1_epi16, _mm256_setzero_si256, _mm256_sign_epi8, _mm256_storeu_si256,
    };

    /// Bytes of a vector: four products are added up in each of its numbers.
    const BYTES: usize = 32;

    /// What a product takes: sums of pairs, and the sum with what came before.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn integers() -> usize {
        let factor = _mm256_set1_epi16(black_box(1));
        let mut sums = [_mm256_setzero_si256(); CHAINS_OF_256_BITS];
        for _ in 0..LENGTH {
            for sum in &mut sums {
                // What came before takes part, so that nothing is computed once for all.
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(factor, *sum));
            }
        }
        used(sums);
        BYTES * CHAINS_OF_256_BITS * LENGTH
    }

    /// What a product takes: a sign, products of bytes, sums of pairs, and the sum with what came before.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn quads() -> usize {
        let (factor, ones) = (_mm256_set1_epi8(black_box(1)), _mm256_set1_epi16(black_box(1)));
        let mut sums = [_mm256_setzero_si256(); CHAINS_OF_256_BITS];
        for _ in 0..LENGTH {
            for sum in &mut sums {
                // What came before takes part in the sign, so that nothing is computed once for all.
                let pairs = _mm256_maddubs_epi16(factor, _mm256_sign_epi8(factor, *sum));
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
        used(sums);
        2 * BYTES * CHAINS_OF_256_BITS * LENGTH
    }

    #[target_feature(enable = "avx2,fma")]
    fn used(sums: [__m256i; CHAINS_OF_256_BITS]) {
        let mut out = [[0u8; BYTES]; CHAINS_OF_256_BITS];
        for (sum, out) in sums.into_iter().zip(&mut out) {
            // SAFETY: an array of 32 bytes is a vector.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), sum) };
        }
        black_box(out);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{CHAINS, LENGTH, PANEL, black_box};
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_dpbusd_epi32, _mm512_reduce_add_epi32,
        _mm512_reduce_add_ps, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_setzero_si512,
    };

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn pairs() -> usize {
        let factor = _mm512_set1_epi32(black_box(0x3f7f_3f7f));
        // SAFETY: both types are 512 bits without invalid values.
        let factor: __m512bh = unsafe { std::mem::transmute::<__m512i, __m512bh>(factor) };
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..LENGTH {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, factor, factor);
            }
        }
        black_box(sums.map(|sum| _mm512_reduce_add_ps(sum)));
        2 * PANEL * CHAINS * LENGTH
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn quads() -> usize {
        let factor = _mm512_set1_epi32(black_box(0x0101_0101));
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..LENGTH {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, factor, factor);
            }
        }
        black_box(sums.map(|sum| _mm512_reduce_add_epi32(sum)));
        4 * PANEL * CHAINS * LENGTH
    }
}

#[cfg(test)]
mod tests {
    use super::super::block_float;
    use super::*;

    #[test]
    fn peaks_of_gpus_are_found_by_name() {
        assert_eq!(of_gpu("NVIDIA H200"), Some(989e12));
        assert_eq!(of_gpu("NVIDIA A100-SXM4-80GB"), Some(312e12));
        assert_eq!(of_gpu("NVIDIA RTX A1000"), None);
    }

    #[test]
    fn chains_count_what_they_compute() {
        let sums = floats() / (2 * LENGTH);
        let known = [CHAINS, 4 * CHAINS, 8 * CHAINS_OF_256_BITS, 16 * CHAINS];
        assert!(known.contains(&sums), "{sums} sums");
        for wider in [pairs(), quads()] {
            assert!(wider >= floats());
        }
        // Vectors of 512 bits have more lanes of floats than those of 256 have of integers.
        assert!(!block_float::pays() || integers() == 2 * floats());
        // Six products of parts are one of whole numbers.
        let whole = if bf16x3::pays() { pairs() / 6 } else { floats() };
        assert_eq!(parts(), whole);
    }
}
