//! What kernels run on: a GPU, or, in tests, a CPU that emulates one.

// Reason: whoever launches a kernel promises that its arguments are right.
#![expect(unsafe_code, reason = "kernels take addresses")]
#![cfg_attr(not(any(feature = "cuda", test)), expect(dead_code, reason = "there is no machine"))]

use candle_core::{DType, Result, Tensor, bail};
use std::fmt::Debug;
use std::sync::Arc;

/// The type that weights, keys and values are kept in. The stream that blocks add to is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    F32,
    Bf16,
    F16,
}

impl Element {
    /// The element type of tensors of type `dtype`.
    pub(crate) fn of(dtype: DType) -> Result<Self> {
        match dtype {
            DType::F32 => Ok(Element::F32),
            DType::BF16 => Ok(Element::Bf16),
            DType::F16 => Ok(Element::F16),
            other => bail!("models on a GPU are in f32, bf16 or f16, not {}", other.as_str()),
        }
    }

    /// The tensor type.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Element::F32 => DType::F32,
            Element::Bf16 => DType::BF16,
            Element::F16 => DType::F16,
        }
    }

    /// What the names of its kernels end in.
    pub(crate) fn name(self) -> &'static str {
        self.dtype().as_str()
    }

    /// Bytes of an element.
    pub(crate) fn bytes(self) -> usize {
        self.dtype().size_in_bytes()
    }
}

/// Memory of a machine. It is given back when this is dropped, after all that was launched before.
#[derive(Debug)]
pub(crate) struct Memory {
    pointer: u64,
    bytes: usize,
    _owner: Box<dyn Owner>,
}

/// Whatever gives memory back when it is dropped.
pub(crate) trait Owner: Debug + Send + Sync {}

impl<T: Debug + Send + Sync> Owner for T {}

impl Memory {
    /// Memory of `bytes` bytes at `pointer`, which lives as long as `owner`.
    pub(crate) fn new(pointer: u64, bytes: usize, owner: impl Owner + 'static) -> Self {
        Memory { pointer, bytes, _owner: Box::new(owner) }
    }

    /// The address of byte `offset`, of which there are `bytes` at least.
    ///
    /// # Panics
    /// If there are not.
    pub(crate) fn address(&self, offset: usize, bytes: usize) -> u64 {
        assert!(
            offset.checked_add(bytes).is_some_and(|end| end <= self.bytes),
            "{bytes} bytes at {offset} reach beyond memory of {} bytes",
            self.bytes
        );
        self.pointer + offset as u64
    }
}

/// Rows of elements of one type, one after the other.
#[derive(Debug)]
pub(crate) struct Matrix {
    pub(crate) memory: Memory,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) element: Element,
}

impl Matrix {
    /// A matrix whose elements are not set.
    pub(crate) fn new(
        machine: &dyn Machine,
        (rows, columns): (usize, usize),
        element: Element,
    ) -> Result<Self> {
        let memory = machine.allocate(rows * columns * element.bytes())?;
        Ok(Matrix { memory, rows, columns, element })
    }

    /// The address of `rows` rows of it from row `first`.
    ///
    /// # Panics
    /// If there are not so many.
    pub(crate) fn rows_at(&self, first: usize, rows: usize) -> u64 {
        let row = self.columns * self.element.bytes();
        self.memory.address(first * row, rows * row)
    }

    /// The address of all.
    pub(crate) fn all(&self) -> u64 {
        self.rows_at(0, self.rows)
    }
}

/// A kernel that a machine has loaded.
#[derive(Clone, Debug)]
pub(crate) enum Function {
    #[cfg(feature = "cuda")]
    Driver(super::driver::DriverFunction),
    #[cfg(test)]
    Emulated(super::emulator::EmulatedFunction),
}

/// A place in the order of what a machine was asked for.
#[derive(Debug)]
pub(crate) enum Mark {
    #[cfg(feature = "cuda")]
    Event(super::driver::Event),
    #[cfg(test)]
    Emulated,
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Argument {
    /// An address of the machine, or 0 for none.
    Address(u64),
    /// A number.
    Word(u32),
    /// A number.
    Float(f32),
}

/// What stands for an argument of a kernel that works on tensors.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operand<'a> {
    /// A tensor that is read.
    Read(&'a Tensor),
    /// A tensor of which every element is set.
    Set(&'a Tensor),
    /// A tensor that is read, and changed in places.
    Change(&'a Tensor),
    /// A number.
    Word(usize),
    /// A number.
    Float(f64),
}

/// Where the memory of an operand stands.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place<'a> {
    /// In a tensor.
    Tensor(&'a Tensor),
    /// Nowhere: it is a number.
    Argument(Argument),
}

impl<'a> Operand<'a> {
    /// Where it stands.
    ///
    /// # Errors
    /// If a tensor has gaps, or a number is beyond 32 bits.
    pub(crate) fn place(self) -> Result<Place<'a>> {
        match self {
            Operand::Read(tensor) | Operand::Set(tensor) | Operand::Change(tensor) => {
                match tensor.is_contiguous() {
                    true => Ok(Place::Tensor(tensor)),
                    false => bail!("a kernel wants contiguous tensors, not {:?}", tensor.layout()),
                }
            }
            Operand::Word(word) => {
                let word = u32::try_from(word).map_err(candle_core::Error::wrap)?;
                Ok(Place::Argument(Argument::Word(word)))
            }
            Operand::Float(float) => Ok(Place::Argument(Argument::Float(float as f32))),
        }
    }
}

/// A kernel with its arguments and how many run it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) function: &'a Function,
    /// Blocks of threads, across, down and in depth.
    pub(crate) grid: [usize; 3],
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Bytes of shared memory that the kernel does not name itself.
    pub(crate) shared: u32,
    pub(crate) arguments: &'a [Argument],
}

/// `out (rows, outputs) = x (rows, inputs) weight^T (inputs, outputs)`, with f32 sums.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub(crate) x: u64,
    pub(crate) weight: u64,
    pub(crate) out: u64,
    pub(crate) rows: usize,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    /// Type of `x` and `weight`.
    pub(crate) element: Element,
    /// Type of `out`: f32, or that of `x`.
    pub(crate) out_element: Element,
    /// Whether `out` is added to instead of set.
    pub(crate) adds: bool,
}

/// A device with memory of its own. What is asked of it happens in the order in which it was asked.
pub(crate) trait Machine: Debug + Send + Sync {
    /// Memory that holds anything.
    fn allocate(&self, bytes: usize) -> Result<Memory>;

    /// Memory that holds zeros.
    fn allocate_zeros(&self, bytes: usize) -> Result<Memory>;

    /// Copies `bytes` to byte `offset` of `to`.
    fn upload(&self, bytes: &[u8], to: &Memory, offset: usize) -> Result<()>;

    /// Copies the first bytes of `from`, when all that was asked before is done.
    fn download(&self, from: &Memory, into: &mut [u8]) -> Result<()>;

    /// The place behind all that was asked so far.
    fn mark(&self) -> Result<Mark>;

    /// Copies the first bytes of `from`, when all that was asked before `mark` is done, and not what was asked since.
    fn download_at(&self, mark: &Mark, from: &Memory, into: &mut [u8]) -> Result<()>;

    /// Loads the kernel `name` of the source file `file`, for so much [`Launch::shared`] at most.
    fn function(&self, file: &str, name: &str, shared: u32) -> Result<Function>;

    /// Runs a kernel.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and what it reads and writes through them lies in memory of
    /// this machine that lives, and that nothing else has a claim on.
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()>;

    /// Calls `work` with the arguments that stand for `operands`, whose tensors are those of this machine.
    fn with_operands(
        &self,
        operands: &[Operand<'_>],
        work: &mut dyn FnMut(&[Argument]) -> Result<()>,
    ) -> Result<()>;

    /// Computes a product.
    ///
    /// # Safety
    /// The addresses are those of matrices of these shapes and types in memory of this machine that lives.
    unsafe fn product(&self, product: &Product) -> Result<()>;

    /// Bytes that are free.
    fn free_bytes(&self) -> Result<usize>;
}

/// The machine behind a device.
///
/// # Errors
/// If there is none.
pub(crate) fn machine(device: &candle_core::Device) -> Result<Arc<dyn Machine>> {
    match device {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => Ok(Arc::new(super::driver::Gpu::new(device)?)),
        other => bail!("kernels for GPUs were asked for on {:?}", other.location()),
    }
}
