//! Sums over the GPUs of a machine by NCCL.
//!
//! One thread asks for all ranks, between `ncclGroupStart` and `ncclGroupEnd`, as NCCL wants it of a thread that has
//! several GPUs. So no rank waits for one that will never come: a sum is asked for of all of them, or of none.

// Reason: communicators and buffers are addresses.
#![expect(unsafe_code, reason = "calls of NCCL and of the CUDA driver")]

use super::opened;
use crate::kernels::all_reduce::AllReduce;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, sys as driver};
use candle_core::cuda_backend::cudarc::nccl::{result as nccl, sys};
use candle_core::{Device, Result, Storage, Tensor, bail};
use std::cell::Cell;
use std::ffi::{CStr, c_void};
use std::sync::Arc;
use std::time::Duration;

/// How often is looked whether sums are there.
const LOOK_EVERY: Duration = Duration::from_micros(50);

/// A communicator for each GPU of a group.
#[derive(Debug)]
pub(crate) struct Nccl {
    ranks: Vec<Rank>,
    is_aborted: Cell<bool>,
}

#[derive(Debug)]
struct Rank {
    communicator: sys::ncclComm_t,
    stream: Arc<CudaStream>,
}

// SAFETY: NCCL lets any thread use a communicator, one at a time. The group that owns it is not `Sync`.
unsafe impl Send for Rank {}

/// The elements of a part in the memory of its GPU.
struct Buffer {
    address: driver::CUdeviceptr,
    count: usize,
}

/// Whether the library can be opened, or why not.
pub(crate) fn find() -> std::result::Result<(), String> {
    let found = opened(|| check("open the library", nccl::get_nccl_version()).map(drop));
    found.map_err(|why| format!("NCCL is needed for several GPUs: {why}"))
}

impl Nccl {
    /// A group of GPUs, each of them once.
    ///
    /// # Errors
    /// If a device is no GPU, or NCCL is not there or refuses.
    pub(crate) fn new(devices: &[Device]) -> Result<Self> {
        let stream = |device: &Device| Ok(device.as_cuda_device()?.cuda_stream());
        let streams = devices.iter().map(stream).collect::<Result<Vec<_>>>()?;
        let ordinals: Vec<i32> = streams.iter().map(|s| s.context().ordinal() as i32).collect();
        let mut communicators = vec![std::ptr::null_mut(); streams.len()];
        let made = opened(|| {
            let count = ordinals.len() as i32;
            // SAFETY: both lists have so many elements.
            let made = unsafe {
                nccl::comm_init_all(communicators.as_mut_ptr(), count, ordinals.as_ptr())
            };
            check("connect the GPUs", made)
        });
        if let Err(why) = made {
            bail!("{why}")
        }
        let rank = |(communicator, stream)| Rank { communicator, stream };
        let ranks = communicators.into_iter().zip(streams).map(rank).collect();
        Ok(Nccl { ranks, is_aborted: Cell::new(false) })
    }

    /// Asks all ranks for one sum.
    fn ask(&self, buffers: &[Buffer]) -> Result<()> {
        check("begin a sum", nccl::group_start())?;
        let ask = |(rank, buffer): (&Rank, &Buffer)| {
            rank.stream.context().bind_to_thread().w()?;
            let (from, into) = (buffer.address as *const c_void, buffer.address as *mut c_void);
            // SAFETY: the buffer has so many numbers in f32, on the GPU of this rank, and is given back in the
            // order of its stream; NCCL adds in place where both addresses are the same.
            let asked = unsafe {
                nccl::all_reduce(
                    from,
                    into,
                    buffer.count,
                    sys::ncclDataType_t::ncclFloat32,
                    sys::ncclRedOp_t::ncclSum,
                    rank.communicator,
                    rank.stream.cu_stream().cast(),
                )
            };
            check("ask for a sum", asked).map(drop)
        };
        let asked = self.ranks.iter().zip(buffers).try_for_each(ask);
        let ended = check("begin a sum", nccl::group_end()).map(drop); // also where one could not be asked
        asked.and(ended)
    }

    /// Whether all ranks are done.
    fn is_done(&self) -> Result<bool> {
        let mut is_done = true;
        for rank in &self.ranks {
            let mut state = sys::ncclResult_t::ncclSuccess;
            // SAFETY: the communicator is there, and `state` takes the answer.
            let asked = unsafe { sys::ncclCommGetAsyncError(rank.communicator, &raw mut state) };
            check("look after a sum", asked.result())?;
            check("add up", state.result())?;
            rank.stream.context().bind_to_thread().w()?;
            // SAFETY: the stream is there for as long as this rank.
            match unsafe { driver::cuStreamQuery(rank.stream.cu_stream()) } {
                driver::CUresult::CUDA_SUCCESS => {}
                driver::CUresult::CUDA_ERROR_NOT_READY => is_done = false,
                other => bail!("GPU {} failed: {other:?}", rank.stream.context().ordinal()),
            }
        }
        Ok(is_done)
    }

    /// Has those that wait for others wait no more; there are no sums after this.
    fn abort(&self) {
        if self.is_aborted.replace(true) {
            return;
        }
        for rank in &self.ranks {
            // SAFETY: the communicator is there, and nothing is asked of it after this.
            let _ = unsafe { nccl::comm_abort(rank.communicator) }; // there is an earlier error to tell, or none
        }
    }

    fn or_abort<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.abort();
        }
        result
    }
}

impl AllReduce for Nccl {
    fn sum(&self, parts: &[Tensor]) -> Result<()> {
        if self.is_aborted.get() || parts.len() != self.ranks.len() {
            bail!("{} parts cannot be added up over {} GPUs", parts.len(), self.ranks.len())
        }
        let buffers = self.ranks.iter().zip(parts).map(|(rank, part)| buffer(rank, part));
        let buffers = buffers.collect::<Result<Vec<_>>>()?;
        if buffers.iter().any(|buffer| buffer.count != buffers[0].count) {
            bail!("parts of several lengths cannot be added up")
        }
        self.or_abort(self.ask(&buffers))
    }

    fn wait(&self) -> Result<()> {
        while !self.or_abort(self.is_done())? {
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }
}

/// A group is given up once nothing is under way in it.
impl Drop for Nccl {
    fn drop(&mut self) {
        self.abort();
    }
}

fn buffer(rank: &Rank, part: &Tensor) -> Result<Buffer> {
    let (storage, layout) = part.storage_and_layout();
    let (Storage::Cuda(cuda), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        bail!("what GPUs add up is contiguous, and on GPUs")
    };
    let slice = cuda.as_cuda_slice::<f32>()?;
    if slice.context().ordinal() != rank.stream.context().ordinal() {
        bail!("a part is on another GPU than that of its rank")
    }
    let address = slice.device_ptr(&rank.stream).0 + (start * size_of::<f32>()) as u64;
    Ok(Buffer { address, count: end - start })
}

fn check<T>(what: &str, answer: std::result::Result<T, nccl::NcclError>) -> Result<T> {
    match answer {
        Ok(answer) => Ok(answer),
        Err(nccl::NcclError(code)) => {
            // SAFETY: the answer to any code is a text that is never given back.
            let text = unsafe { CStr::from_ptr(sys::ncclGetErrorString(code)) };
            let text = text.to_string_lossy();
            bail!("NCCL could not {what}: {text}; NCCL_DEBUG=INFO says more")
        }
    }
}
