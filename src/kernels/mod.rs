//! Fused operations with forward and backward passes.
//!
//! Each file holds one operation: the function the models call, a CPU kernel for f32 and f64, the same
//! operation *composed* of plain tensor operations (used for every other device and type, and as the
//! twin that kernels are tested against), and its gradient. Kernels for GPUs, in f32 and bf16, stand in
//! [`cuda`]. None of them records a graph: a layer calls the forward and, later, the backward function
//! itself.
//!
//! Sums are taken in an order that is written down, so results do not depend on the number of threads
//! or on other rows of a batch.

pub mod adamw;
mod aligned;
pub(crate) mod all_reduce;
#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
pub(crate) mod bf16x3;
mod block_float;
pub mod cached;
mod columns;
pub mod cross_entropy;
pub mod cuda;
pub mod dropout;
pub mod embedding;
pub(crate) mod fetch;
mod groups;
pub(crate) mod layout;
pub(crate) mod linear;
pub(crate) mod mapped;
pub(crate) mod matmul;
pub mod packed;
mod pairs;
mod panel;
pub mod peak;
pub(crate) mod product;
mod quads;
mod real;
pub mod rms_norm;
pub mod rope;
mod rounding;
pub(crate) mod rows;
pub(crate) mod share;
pub(crate) mod storage;
pub mod swiglu;
pub(crate) mod tiles;
#[cfg(test)]
mod twin;

/// Runs the kernel of a GPU or of the CPU for the element type of a tensor, or the composed operation where there
/// is none. Kernels of a GPU are tried where the condition behind `if` holds.
macro_rules! dispatch {
    (
        $tensor:expr,
        $Element:ident => $kernel:expr,
        $machine:ident $(if $has_kernel:expr)? => $launch:expr,
        $composed:expr $(,)?
    ) => {
        match $crate::kernels::cuda::training::machine($tensor)? {
            Some($machine) $(if $has_kernel)? => $launch,
            _ => match ($tensor.device(), $tensor.dtype()) {
                (candle_core::Device::Cpu, candle_core::DType::F32) => {
                    type $Element = f32;
                    $kernel
                }
                (candle_core::Device::Cpu, candle_core::DType::F64) => {
                    type $Element = f64;
                    $kernel
                }
                _ => $composed,
            },
        }
    };
}
use dispatch;

/// The vector units that kernels use on this CPU. Others compute the same up to rounding.
pub fn instruction_set() -> String {
    let all = format!("{:?}", pulp::Arch::new());
    let widest = all.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
    format!("{widest}, {}", pairs::unit())
}

/// What products of bf16 run on. In f32 all CPUs generate the same bits; in bf16, and in 8 bits, whose keys and
/// values are bf16, CPUs with the same unit do.
pub fn bf16_unit() -> &'static str {
    pairs::unit()
}

/// Rows that one task of a parallel loop works on. Fixed, so that partial sums always cover the same
/// rows whatever the number of threads.
const ROWS_PER_TASK: usize = 64;

/// The sum of the squares of a contiguous CPU tensor, block by block in f64.
pub fn sum_of_squares(tensor: &candle_core::Tensor) -> candle_core::Result<f64> {
    use rayon::prelude::*;
    fn blocks<T: real::Real>(values: &[T]) -> f64 {
        let sums: Vec<f64> = values
            .par_chunks(1 << 14)
            .map(|block| {
                real::simd(
                    #[inline(always)]
                    || real::dot(block, block).to_f64(),
                )
            })
            .collect();
        sums.iter().sum()
    }
    match tensor.dtype() {
        candle_core::DType::F64 => Ok(blocks::<f64>(&storage::elements(tensor)?)),
        _ => Ok(blocks::<f32>(&storage::elements(tensor)?)),
    }
}

/// The index of the largest element, the first of several.
pub(crate) fn first_of_largest(values: &[f32]) -> usize {
    let top = real::simd(
        #[inline(always)]
        || real::max(values),
    );
    values.iter().position(|&value| value == top).unwrap_or(0)
}
