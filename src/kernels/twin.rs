//! What the tests of all kernels share: random tensors, and a comparison that scales with its values.

use crate::seed::{self, Stream};
use candle_core::{DType, Device, Tensor};
use std::cell::RefCell;

thread_local! {
    static STREAM: RefCell<Stream> = RefCell::new(seed::stream(0, "kernels", "test"));
}

/// A tensor of normally distributed numbers.
pub(crate) fn random(shape: &[usize], dtype: DType) -> Tensor {
    let count = shape.iter().product();
    let values: Vec<f64> =
        STREAM.with_borrow_mut(|stream| (0..count).map(|_| stream.normal()).collect());
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// Asserts that two tensors agree to the precision of their type.
pub(crate) fn close(ours: &Tensor, twin: &Tensor, what: &str) {
    assert_eq!(ours.dims(), twin.dims(), "{what}: shapes differ");
    let tolerance = if ours.dtype() == DType::F64 { 1e-12 } else { 1e-5 };
    let values = |t: &Tensor| -> Vec<f64> {
        t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    let (ours, twin) = (values(ours), values(twin));
    let scale = twin.iter().fold(1.0f64, |top, x| top.max(x.abs()));
    let worst = ours.iter().zip(&twin).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst <= tolerance * scale, "{what}: off by {worst:e} at a scale of {scale:e}");
}
