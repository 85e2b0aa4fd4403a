//! Small matrix products on strided slices, for the kernels that are made of them.

// Reason: the `gemm` crate takes raw pointers. Every call below first checks that the last element
// each pointer can reach lies inside its slice, and the output slice is borrowed exclusively.
#![expect(unsafe_code, reason = "gemm takes raw pointers; bounds are asserted before the call")]

use super::real::Real;
use gemm::Parallelism;

/// A matrix inside a slice.
#[derive(Clone, Copy)]
pub(crate) struct View<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
}

impl<'a, T> View<'a, T> {
    /// A matrix whose rows lie one after another, `stride` elements apart.
    pub(crate) fn rows(data: &'a [T], rows: usize, columns: usize, stride: usize) -> Self {
        View { data, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// The same matrix with rows and columns exchanged.
    pub(crate) fn transposed(self) -> Self {
        View {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    fn holds_its_elements(&self) -> bool {
        let empty = self.rows == 0 || self.columns == 0;
        empty
            || (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride
                < self.data.len()
    }
}

/// What to do with what is already in the output.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Into {
    /// Overwrite it.
    Set,
    /// Add to it.
    Add,
}

/// `out (rows x columns, rows `stride` apart) = left x right`, on this thread.
///
/// # Panics
/// If the inner dimensions differ, or a matrix reaches beyond its slice.
pub(crate) fn multiply<T: Real>(
    out: &mut [T],
    stride: usize,
    left: View<'_, T>,
    right: View<'_, T>,
    into: Into,
) {
    product(out, stride, left, right, into, Parallelism::None);
}

/// [`multiply`] on all threads.
pub(crate) fn multiply_parallel<T: Real>(
    out: &mut [T],
    stride: usize,
    left: View<'_, T>,
    right: View<'_, T>,
    into: Into,
) {
    let threads = rayon::current_num_threads();
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    product(out, stride, left, right, into, parallelism);
}

fn product<T: Real>(
    out: &mut [T],
    stride: usize,
    left: View<'_, T>,
    right: View<'_, T>,
    into: Into,
    parallelism: Parallelism,
) {
    let (m, n, k) = (left.rows, right.columns, left.columns);
    assert_eq!(right.rows, k, "inner dimensions differ");
    assert!(left.holds_its_elements() && right.holds_its_elements(), "matrix beyond its slice");
    if m == 0 || n == 0 {
        return;
    }
    assert!(stride >= n && (m - 1) * stride + n <= out.len(), "output beyond its slice");
    // SAFETY: all three matrices lie inside their slices, as asserted above; `out` is exclusive.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride as isize,
            into == Into::Add,
            left.data.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.data.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(m: usize, n: usize, k: usize) {
        let value = |i: usize| ((i * 7 + 3) % 11) as f64 - 5.0;
        let left: Vec<f64> = (0..m * k).map(value).collect();
        let right: Vec<f64> = (0..n * k).map(value).collect();
        let (a, b) = (View::rows(&left, m, k, k), View::rows(&right, n, k, k).transposed());
        let stride = n + 3;
        let mut out = vec![1.0; m * stride];
        multiply(&mut out, stride, a, b, Into::Add);
        multiply_parallel(&mut out, stride, a, b, Into::Add);
        for row in 0..m {
            for column in 0..n {
                let exact: f64 = (0..k).map(|i| left[row * k + i] * right[column * k + i]).sum();
                assert_eq!(out[row * stride + column], 1.0 + 2.0 * exact);
            }
            let gap = &out[row * stride + n..(row + 1) * stride];
            assert!(gap.iter().all(|&x| x == 1.0), "wrote between the rows");
        }
    }

    #[test]
    fn strided_products_equal_the_plain_sum() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (17, 2, 33), (64, 64, 32), (5, 100, 1)] {
            check(m, n, k);
        }
    }

    #[test]
    #[should_panic(expected = "matrix beyond its slice")]
    fn a_matrix_beyond_its_slice_is_refused() {
        let data = [0.0f32; 5];
        let view = View::rows(&data, 2, 3, 3);
        multiply(&mut [0.0; 4], 2, view, view.transposed(), Into::Set);
    }
}
