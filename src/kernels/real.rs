//! Floating-point types the CPU kernels are written for, and the vector loops they share.
//!
//! Loops are written over a fixed number of lanes with explicit fused multiply-adds, and the compiler
//! turns them into the vector instructions of the CPU that [`simd`] finds at run time. Because the
//! order of every sum is written down, its result does not depend on the instruction set, on the
//! number of threads, or on what else is in the batch.

use candle_core::WithDType;
use pulp::Simd;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

/// Accumulators of a reduction. Four 512-bit registers of f32.
pub(crate) const LANES: usize = 64;

/// What the argument of an exponential is clamped to.
const EXP_RANGE: (f32, f32) = (-87.0, 88.0);

/// 1.5 * 2^23: a number that it is added to is rounded to an integer, which stands in the low bits.
const EXP_SHIFT: f32 = 12_582_912.0;

/// The logarithm of 2 in two parts, of which the first has few bits.
const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);

/// Of Cephes' `expf`, for `(exp(r) - 1 - r) / r^2`.
const EXP_POLYNOMIAL: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5];

/// Runs `work` compiled for the widest vector unit of this CPU.
///
/// Only what is inlined into `work` gains from it, so everything below is `#[inline(always)]`.
#[inline(always)]
pub(crate) fn simd<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// `f32` and `f64`: the first to run with, the second to check gradients with.
pub(crate) trait Real:
    WithDType
    + Default
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
    + PartialOrd
{
    const ZERO: Self;
    const ONE: Self;
    const MINUS_INFINITY: Self;
    fn real(value: f64) -> Self;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn sqrt(self) -> Self;
    /// `self * factor + term` with one rounding.
    fn mul_add(self, factor: Self, term: Self) -> Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const MINUS_INFINITY: Self = f32::NEG_INFINITY;

    #[inline(always)]
    fn real(value: f64) -> Self {
        value as f32
    }

    /// Cody-Waite reduction and the degree-6 polynomial of Cephes' `expf`: relative error below 2e-7
    /// on [-87, 88], clamped outside.
    ///
    /// The exponent is rounded, and moved into place, by adding 1.5 * 2^23: its integer then stands in
    /// the low bits. A conversion with `as` would keep the loop from being vectorised.
    #[inline(always)]
    fn exp(self) -> Self {
        let x = self.clamp(EXP_RANGE.0, EXP_RANGE.1);
        let shifted = x.mul_add(std::f32::consts::LOG2_E, EXP_SHIFT);
        let n = shifted - EXP_SHIFT;
        let r = n.mul_add(-LN_2.0, x);
        let r = n.mul_add(-LN_2.1, r);
        let p = EXP_POLYNOMIAL[0].mul_add(r, EXP_POLYNOMIAL[1]);
        let p = p.mul_add(r, EXP_POLYNOMIAL[2]);
        let p = p.mul_add(r, EXP_POLYNOMIAL[3]);
        let p = p.mul_add(r, EXP_POLYNOMIAL[4]);
        let p = p.mul_add(r, EXP_POLYNOMIAL[5]);
        let p = p.mul_add(r * r, r) + 1.0;
        let exponent = shifted.to_bits().wrapping_sub(EXP_SHIFT.to_bits()).wrapping_add(127);
        p * f32::from_bits(exponent << 23)
    }

    #[inline(always)]
    fn ln(self) -> Self {
        f32::ln(self)
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        f32::mul_add(self, factor, term)
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const MINUS_INFINITY: Self = f64::NEG_INFINITY;

    #[inline(always)]
    fn real(value: f64) -> Self {
        value
    }

    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }

    #[inline(always)]
    fn ln(self) -> Self {
        f64::ln(self)
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        f64::mul_add(self, factor, term)
    }
}

/// [`Real::exp`] of each lane of vectors, side by side: one alone is a chain of twenty operations that wait for each
/// other. Of a lane above 88 the result is of no meaning.
#[inline(always)]
pub(crate) fn exp_vectors<S: Simd, const COUNT: usize>(
    simd: S,
    mut x: [S::f32s; COUNT],
) -> [S::f32s; COUNT] {
    let lowest = simd.splat_f32s(EXP_RANGE.0);
    let (log2_e, shift) = (simd.splat_f32s(std::f32::consts::LOG2_E), simd.splat_f32s(EXP_SHIFT));
    let (mut shifted, mut p) = (x, [simd.splat_f32s(EXP_POLYNOMIAL[0]); COUNT]);
    for at in 0..COUNT {
        // Not the larger of both: what is no number stays none.
        x[at] = simd.select_f32s(simd.less_than_f32s(x[at], lowest), lowest, x[at]);
        shifted[at] = simd.mul_add_f32s(x[at], log2_e, shift);
    }
    let (high, low) = (simd.splat_f32s(-LN_2.0), simd.splat_f32s(-LN_2.1));
    for at in 0..COUNT {
        let n = simd.sub_f32s(shifted[at], shift);
        x[at] = simd.mul_add_f32s(n, high, x[at]);
        x[at] = simd.mul_add_f32s(n, low, x[at]);
    }
    for factor in &EXP_POLYNOMIAL[1..] {
        let factor = simd.splat_f32s(*factor);
        for at in 0..COUNT {
            p[at] = simd.mul_add_f32s(p[at], x[at], factor);
        }
    }
    let one = simd.splat_f32s(1.0);
    let (bias, place) =
        (simd.splat_u32s(127u32.wrapping_sub(EXP_SHIFT.to_bits())), simd.splat_u32s(23));
    for at in 0..COUNT {
        let r = x[at];
        let p = simd.add_f32s(simd.mul_add_f32s(p[at], simd.mul_f32s(r, r), r), one);
        let exponent = simd.add_u32s(simd.transmute_u32s_f32s(shifted[at]), bias);
        let exponent = simd.wrapping_dyn_shl_u32s(exponent, place);
        x[at] = simd.mul_f32s(p, simd.transmute_f32s_u32s(exponent));
    }
    x
}

/// The sum of products, in [`LANES`] interleaved partial sums that are then added pairwise.
#[inline(always)]
pub(crate) fn dot<T: Real>(left: &[T], right: &[T]) -> T {
    debug_assert_eq!(left.len(), right.len());
    let mut lanes = [T::ZERO; LANES];
    let (left_blocks, left_rest) = left.as_chunks::<LANES>();
    let (right_blocks, right_rest) = right.as_chunks::<LANES>();
    for (left, right) in left_blocks.iter().zip(right_blocks) {
        for lane in 0..LANES {
            lanes[lane] = left[lane].mul_add(right[lane], lanes[lane]);
        }
    }
    let mut total = fold(
        lanes,
        #[inline(always)]
        |a, b| a + b,
    );
    for (&left, &right) in left_rest.iter().zip(right_rest) {
        total = left.mul_add(right, total);
    }
    total
}

/// The sum of all elements, in the order of [`dot`].
#[inline(always)]
pub(crate) fn sum<T: Real>(values: &[T]) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] += block[lane];
        }
    }
    let mut total = fold(
        lanes,
        #[inline(always)]
        |a, b| a + b,
    );
    for &value in rest {
        total += value;
    }
    total
}

/// The largest element, minus infinity for none.
#[inline(always)]
pub(crate) fn max<T: Real>(values: &[T]) -> T {
    let mut lanes = [T::MINUS_INFINITY; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] = larger(block[lane], lanes[lane]);
        }
    }
    rest.iter().fold(fold(lanes, larger), |top, &x| larger(x, top))
}

#[inline(always)]
fn larger<T: Real>(left: T, right: T) -> T {
    if left > right { left } else { right }
}

/// Halves the lanes until one is left: a fixed order that needs six steps, not sixty-four.
#[inline(always)]
fn fold<T: Real>(mut lanes: [T; LANES], join: impl Fn(T, T) -> T) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::WithSimd;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for step in -8_700..8_700 {
            let x = step as f32 / 100.0;
            let (ours, exact) = (Real::exp(x), f64::from(x).exp());
            assert!((f64::from(ours) / exact - 1.0).abs() < 3e-7, "exp({x}) = {ours}, not {exact}");
        }
        assert_eq!(Real::exp(f32::NEG_INFINITY), Real::exp(-87.0f32));
    }

    #[test]
    fn a_vector_of_exponents_is_that_of_each_lane() {
        struct Vectors<'a>(&'a mut [f32]);
        impl WithSimd for Vectors<'_> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, simd: S) {
                let (vectors, rest) = S::as_mut_simd_f32s(self.0);
                assert!(rest.is_empty());
                for x in vectors.as_chunks_mut::<2>().0 {
                    *x = exp_vectors(simd, *x);
                }
            }
        }
        let special = [f32::NEG_INFINITY, f32::NAN, 0.0, -0.0, -1e-40, 88.0];
        let x = (-6_400..5_632).map(|step| step as f32 / 64.0);
        let mut x: Vec<f32> = special.into_iter().chain(x).collect();
        x.resize(x.len().next_multiple_of(2 * LANES), 1.0);
        let exact: Vec<u32> = x.iter().map(|&x| Real::exp(x).to_bits()).collect();
        let check = |work: &dyn Fn(Vectors<'_>)| {
            let mut x = x.clone();
            work(Vectors(&mut x));
            assert!(x.iter().map(|x| x.to_bits()).eq(exact.iter().copied()));
        };
        check(&|vectors| pulp::Arch::new().dispatch(vectors));
        check(&|vectors| vectors.with_simd(pulp::Scalar));
        check(&|vectors| vectors.with_simd(pulp::Scalar512b));
    }

    #[test]
    fn reductions_are_the_same_in_every_instruction_set() {
        let left: Vec<f32> = (0..1000).map(|i| (i as f32).sin()).collect();
        let right: Vec<f32> = (0..1000).map(|i| (i as f32).cos()).collect();
        assert_eq!(simd(|| dot(&left, &right)).to_bits(), dot(&left, &right).to_bits());
        assert_eq!(simd(|| sum(&left)).to_bits(), sum(&left).to_bits());
        assert_eq!(simd(|| max(&left)), max(&left));
    }
}
