//! A GPU behind the CUDA driver: kernels as PTX that the driver compiles, products by cuBLAS.

// Reason: kernels and products take addresses.
#![expect(unsafe_code, reason = "calls of the CUDA driver and of cuBLAS")]

use super::machine::{
    Argument, Element, Function, Launch, Machine, Mark, Memory, Operand, Place, Product,
};
use candle_core::cuda_backend::cudarc::cublas::{CudaBlas, result::gemm_ex, sys as blas};
use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaFunction, CudaSlice, CudaStream, DevicePtr, LaunchConfig, PushKernelArg, result,
    sys,
};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, Layout, Result, Storage, bail};
use std::ffi::c_void;
use std::sync::Arc;

/// The PTX of a source file, compiled by build.rs.
macro_rules! ptx {
    ($($file:literal),+ $(,)?) => {
        [$(($file, include_str!(concat!(env!("OUT_DIR"), "/", $file, ".ptx")))),+]
    };
}

const SOURCES: [(&str, &str); 20] = ptx![
    "adamw",
    "argmax",
    "attention_merge",
    "attention_rows",
    "attention_tiles",
    "cross_entropy",
    "embed",
    "embedding_gradient",
    "fill_ids",
    "packed_along",
    "packed_forward",
    "packed_keys",
    "packed_queries",
    "packed_rows",
    "rms_norm",
    "rms_norm_backward",
    "rope_store",
    "rope_turn",
    "swiglu",
    "swiglu_backward",
];

/// Bytes of shared memory that a kernel may use unless it asks for more.
const SHARED_UNASKED: u32 = 48 << 10;

/// A GPU, the one stream that all work is on, and one for what comes back while that is at more.
#[derive(Debug)]
pub(crate) struct Gpu {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    back: Arc<CudaStream>,
    blas: Blas,
}

struct Blas(Arc<CudaBlas>);

impl std::fmt::Debug for Blas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("cuBLAS")
    }
}

/// A loaded kernel.
#[derive(Clone, Debug)]
pub(crate) struct DriverFunction(CudaFunction);

/// A place on the main stream.
pub(crate) type Event = CudaEvent;

impl Gpu {
    /// The machine of a device of the tensor library.
    pub(crate) fn new(device: &CudaDevice) -> Result<Self> {
        let blas = Blas(device.cublas_handle());
        let stream = device.cuda_stream();
        let back = stream.context().new_stream().w()?;
        Ok(Gpu { stream, back, device: device.clone(), blas })
    }

    /// Where the first element of a tensor stands.
    fn address(&self, storage: &Storage, layout: &Layout) -> Result<u64> {
        fn start<T>(slice: &CudaSlice<T>) -> u64 {
            slice.device_ptr(slice.stream()).0
        }
        let Storage::Cuda(storage) = storage else {
            bail!("a kernel of a GPU was called with a tensor elsewhere")
        };
        if storage.device.id() != self.device.id() {
            bail!("a kernel was called with tensors of several devices")
        }
        let (start, size) = match &storage.slice {
            CudaStorageSlice::F32(slice) => (start(slice), 4),
            CudaStorageSlice::U32(slice) => (start(slice), 4),
            CudaStorageSlice::BF16(slice) => (start(slice), 2),
            _ => bail!("a kernel was called with a tensor of a type that it does not have"),
        };
        Ok(start + (size * layout.start_offset()) as u64)
    }

    fn owned(slice: CudaSlice<u8>, bytes: usize) -> Memory {
        let pointer = slice.device_ptr(slice.stream()).0;
        Memory::new(pointer, bytes, slice)
    }
}

/// Makes a device cheap to use, once, before anything is on it.
///
/// All that a device does is on its one stream, in order, so uses of memory need not be recorded: what is read on another is
/// there before, and the reader waits for it before it gives the memory back. Memory that is
/// given back is kept for the next that is asked for, and not handed to the system at every wait.
pub(crate) fn prepare(device: &CudaDevice) -> Result<()> {
    // SAFETY: the tensor library puts all work of a device on one stream, and we move no memory between devices.
    unsafe { device.disable_event_tracking() };
    let mut threshold = u64::MAX;
    let threshold: *mut c_void = (&raw mut threshold).cast();
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    with_pool(device, |pool| {
        // SAFETY: the pool is that of a device that exists; the attribute is a number of 64 bits.
        unsafe { result::mem_pool::set_attribute(pool, attribute, threshold) }.w()
    })
    .map(drop)
}

/// Bytes that are free on a device, with what it keeps for later.
pub(crate) fn free_bytes(device: &CudaDevice) -> Result<usize> {
    let stream = device.cuda_stream();
    stream.synchronize().w()?;
    // SAFETY: the pool is that of a device that exists; what is in use stays.
    with_pool(device, |pool| unsafe { result::mem_pool::trim_to(pool, 0) }.w())?;
    let context = stream.context();
    context.bind_to_thread().w()?;
    Ok(context.mem_get_info().w()?.0)
}

/// The most bytes that were in use on a device at a time; none if it does not count them.
pub(crate) fn peak_bytes(device: &CudaDevice) -> Result<Option<u64>> {
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    with_pool(device, |pool| {
        let mut bytes = 0u64;
        // SAFETY: the pool is that of a device that exists; the attribute is a number of 64 bits.
        unsafe { result::mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast()) }.w()?;
        Ok(bytes)
    })
}

/// Has [`peak_bytes`] begin anew with what is in use now.
pub(crate) fn forget_peak(device: &CudaDevice) -> Result<()> {
    let mut zero = 0u64; // the one value that can be set
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    with_pool(device, |pool| {
        // SAFETY: as above.
        unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut zero).cast()) }.w()
    })
    .map(drop)
}

/// Does something with the memory pool of a device, if it has one.
fn with_pool<T>(
    device: &CudaDevice,
    work: impl FnOnce(sys::CUmemoryPool) -> Result<T>,
) -> Result<Option<T>> {
    let stream = device.cuda_stream();
    let context = stream.context();
    if !context.has_async_alloc() {
        return Ok(None);
    }
    context.bind_to_thread().w()?;
    // SAFETY: the device exists.
    let pool = unsafe { result::device::get_default_mem_pool(context.cu_device()) }.w()?;
    work(pool).map(Some)
}

impl Machine for Gpu {
    fn allocate(&self, bytes: usize) -> Result<Memory> {
        // SAFETY: whoever asks for memory that is not set sets it before it is read.
        let slice = unsafe { self.device.alloc::<u8>(bytes.max(1))? };
        Ok(Self::owned(slice, bytes))
    }

    fn allocate_zeros(&self, bytes: usize) -> Result<Memory> {
        Ok(Self::owned(self.device.alloc_zeros::<u8>(bytes.max(1))?, bytes))
    }

    fn upload(&self, bytes: &[u8], to: &Memory, offset: usize) -> Result<()> {
        let to = to.address(offset, bytes.len());
        if bytes.is_empty() {
            return Ok(());
        }
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: `to` has room. From memory that is not pinned the driver copies before it returns, or, if
        // there is much of it, waits until all is there: `bytes` need not live on.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) }.w()
    }

    fn download(&self, from: &Memory, into: &mut [u8]) -> Result<()> {
        let from = from.address(0, into.len());
        if into.is_empty() {
            return Ok(());
        }
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: `from` has so many bytes, and `into` is borrowed until the copy is there.
        unsafe { result::memcpy_dtoh_async(into, from, self.stream.cu_stream()) }.w()?;
        self.stream.synchronize().w()
    }

    fn mark(&self) -> Result<Mark> {
        Ok(Mark::Event(self.stream.record_event(None).w()?))
    }

    fn download_at(&self, mark: &Mark, from: &Memory, into: &mut [u8]) -> Result<()> {
        #[allow(irrefutable_let_patterns, reason = "tests have a second machine")]
        let Mark::Event(event) = mark else { bail!("a mark of another machine") };
        let from = from.address(0, into.len());
        event.synchronize().w()?;
        if into.is_empty() {
            return Ok(());
        }
        // SAFETY: `from` has so many bytes, which the main stream has written; `into` is borrowed until the copy is there.
        unsafe { result::memcpy_dtoh_async(into, from, self.back.cu_stream()) }.w()?;
        self.back.synchronize().w()
    }

    fn function(&self, file: &str, name: &str, shared: u32) -> Result<Function> {
        let Some((_, ptx)) = SOURCES.iter().find(|(source, _)| *source == file) else {
            bail!("there are no kernels called {file:?}")
        };
        let module = format!("headwater {file}");
        let function = self.device.get_or_load_custom_func(name, &module, ptx);
        let function = function.map_err(|error| error.context(format!("kernel {name}")))?;
        let function = function.into_cuda_function();
        if shared > SHARED_UNASKED {
            let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(most, shared as i32).w()?;
        }
        Ok(Function::Driver(DriverFunction(function)))
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        #[allow(irrefutable_let_patterns, reason = "tests have a second machine")]
        let Function::Driver(DriverFunction(function)) = launch.function else {
            bail!("a kernel of another machine")
        };
        let [across, down, depth] = launch.grid;
        if across == 0 || down == 0 || depth == 0 {
            return Ok(());
        }
        if across > i32::MAX as usize || down > 65_535 || depth > 65_535 {
            bail!("a launch of {:?} blocks is beyond what a GPU takes", launch.grid)
        }
        let mut builder = self.stream.launch_builder(function);
        for argument in launch.arguments {
            match argument {
                Argument::Address(address) => builder.arg(address),
                Argument::Word(word) => builder.arg(word),
                Argument::Float(float) => builder.arg(float),
            };
        }
        let shape = LaunchConfig {
            grid_dim: (across as u32, down as u32, depth as u32),
            block_dim: (launch.threads, 1, 1),
            shared_mem_bytes: launch.shared,
        };
        // SAFETY: as the caller has promised.
        unsafe { builder.launch(shape) }.w()?;
        Ok(())
    }

    fn with_operands(
        &self,
        operands: &[Operand<'_>],
        work: &mut dyn FnMut(&[Argument]) -> Result<()>,
    ) -> Result<()> {
        let mut borrowed = Vec::with_capacity(operands.len());
        let mut arguments = Vec::with_capacity(operands.len());
        for operand in operands {
            arguments.push(match operand.place()? {
                Place::Argument(argument) => argument,
                Place::Tensor(tensor) => {
                    let (storage, layout) = tensor.storage_and_layout();
                    let address = self.address(&storage, layout)?;
                    borrowed.push(storage);
                    Argument::Address(address)
                }
            });
        }
        work(&arguments)
    }

    unsafe fn product(&self, product: &Product) -> Result<()> {
        let Product { rows, inputs, outputs, element, out_element, .. } = *product;
        if rows == 0 {
            return Ok(());
        }
        self.stream.context().bind_to_thread().w()?;
        let size = |n: usize| i32::try_from(n).map_err(candle_core::Error::wrap);
        let (rows, inputs, outputs) = (size(rows)?, size(inputs)?, size(outputs)?);
        let (one, beta) = (1.0f32, if product.adds { 1.0f32 } else { 0.0 });
        // cuBLAS has columns one after the other: to it, our rows are columns, and
        // out^T (outputs, rows) = weight (outputs, inputs) x^T (inputs, rows).
        // SAFETY: as the caller has promised; the factors are f32, as sums in f32 ask for.
        unsafe {
            gemm_ex(
                *self.blas.0.handle(),
                blas::cublasOperation_t::CUBLAS_OP_T,
                blas::cublasOperation_t::CUBLAS_OP_N,
                outputs,
                rows,
                inputs,
                (&raw const one).cast(),
                product.weight as *const c_void,
                kind(element),
                inputs,
                product.x as *const c_void,
                kind(element),
                inputs,
                (&raw const beta).cast(),
                product.out as *mut c_void,
                kind(out_element),
                outputs,
                blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .w()
    }

    fn free_bytes(&self) -> Result<usize> {
        free_bytes(&self.device)
    }
}

fn kind(element: Element) -> blas::cudaDataType_t {
    match element {
        Element::F32 => blas::cudaDataType_t::CUDA_R_32F,
        Element::Bf16 => blas::cudaDataType_t::CUDA_R_16BF,
        Element::F16 => blas::cudaDataType_t::CUDA_R_16F,
    }
}
