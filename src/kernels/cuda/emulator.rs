//! A GPU emulated by this CPU: the sources of the kernels compiled by a C++ compiler, a fiber a thread.
//!
//! It is for tests, and as strict as it can be: memory ends at a page that nobody may touch, memory that was not
//! set holds what is no number, and shared memory does too before each launch.

// Reason: compiled kernels are called, and memory is mapped.
#![expect(unsafe_code, reason = "calls of compiled kernels")]

use super::footprint::uncounted;
use super::kernels::with_bytes;
use super::machine::{
    Argument, Element, Function, Launch, Machine, Mark, Memory, Operand, Place, Product,
};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Result, Tensor, bail};
use std::ffi::{CString, c_char, c_int, c_void};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

/// The sources by name: what is carried to another machine needs no files but a compiler.
macro_rules! sources {
    ($($name:literal),+ $(,)?) => { [$(($name, include_str!($name))),+] };
}

const HEADERS: [(&str, &str); 6] = sources![
    "attention.cuh",
    "element.cuh",
    "emulation.h",
    "packed.cuh",
    "tensor_core.cuh",
    "tiles.cuh",
];

const SOURCES: [(&str, &str); 20] = sources![
    "adamw.cu",
    "argmax.cu",
    "attention_merge.cu",
    "attention_rows.cu",
    "attention_tiles.cu",
    "cross_entropy.cu",
    "embed.cu",
    "embedding_gradient.cu",
    "fill_ids.cu",
    "packed_along.cu",
    "packed_forward.cu",
    "packed_keys.cu",
    "packed_queries.cu",
    "packed_rows.cu",
    "rms_norm.cu",
    "rms_norm_backward.cu",
    "rope_store.cu",
    "rope_turn.cu",
    "swiglu.cu",
    "swiglu_backward.cu",
];

/// Shared memory of a block of threads at most, as on Hopper.
const SHARED_MAX: u32 = 227 << 10;

const PAGE: usize = 4096;

type Emulated = unsafe extern "C" fn(*const u32, *mut *mut c_void);

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn mmap(
        at: *mut c_void,
        length: usize,
        protection: c_int,
        flags: c_int,
        file: c_int,
        offset: i64,
    ) -> *mut c_void;
    fn mprotect(at: *mut c_void, length: usize, protection: c_int) -> c_int;
    fn munmap(at: *mut c_void, length: usize) -> c_int;
}

/// The compiled kernels.
#[derive(Debug)]
struct Library(*mut c_void);

// SAFETY: it is never closed, and looking names up in it is safe from all threads.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

/// A kernel, by the address of the function that calls it.
#[derive(Clone, Debug)]
pub(crate) struct EmulatedFunction {
    call: Emulated,
    shared: u32,
}

/// In which order the threads of a block run until they wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Ascending,
    Descending,
}

/// The emulated machine.
#[derive(Debug)]
pub(crate) struct Emulator {
    library: &'static Library,
    order: Order,
}

/// One kernel at a time: the emulation keeps its state in globals.
static RUNNING: Mutex<()> = Mutex::new(());

impl Emulator {
    /// A machine.
    ///
    /// # Errors
    /// Says why there is none.
    pub(crate) fn new(order: Order) -> std::result::Result<Self, String> {
        static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
        let library = LIBRARY.get_or_init(compile).as_ref().map_err(Clone::clone)?;
        Ok(Emulator { library, order })
    }

    /// Tensors are those of the CPU. Kernels work on copies of them, so that they end where nobody may touch; one
    /// that is to be set holds no number before.
    fn with_copies(
        &self,
        operands: &[Operand<'_>],
        work: &mut dyn FnMut(&[Argument]) -> Result<()>,
    ) -> Result<()> {
        let (mut arguments, mut written, mut copies) = (Vec::new(), Vec::new(), Vec::new());
        for operand in operands {
            let tensor = match operand.place()? {
                Place::Tensor(tensor) => tensor,
                Place::Argument(argument) => {
                    arguments.push(argument);
                    continue;
                }
            };
            let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
            let memory = self.allocate(bytes)?;
            if !matches!(operand, Operand::Set(_)) {
                with_bytes(tensor, |bytes| self.upload(bytes, &memory, 0))?;
            }
            arguments.push(Argument::Address(memory.address(0, bytes)));
            match operand {
                Operand::Read(_) => copies.push(memory),
                _ => written.push((tensor, memory, bytes)),
            }
        }
        work(&arguments)?;
        for (tensor, memory, length) in written {
            let mut bytes = vec![0; length];
            self.download(&memory, &mut bytes)?;
            tensor.inplace_op1(&Overwrite(bytes))?;
        }
        Ok(())
    }
}

fn compile() -> std::result::Result<Library, String> {
    let compiler = "g++";
    if Command::new(compiler).arg("--version").output().is_err() {
        return Err(format!("there is no {compiler} here"));
    }
    let folder = tempfile::tempdir().expect("tests can write to a temporary folder");
    for (name, text) in HEADERS.iter().chain(&SOURCES) {
        std::fs::write(folder.path().join(name), text).expect("it is writable");
    }
    let all: String = SOURCES.iter().map(|(name, _)| format!("#include \"{name}\"\n")).collect();
    let (from, to) = (folder.path().join("all.cpp"), folder.path().join("all.so"));
    std::fs::write(&from, all).expect("it is writable");
    let flags = "-O2 -std=c++17 -ffp-contract=off -DHEADWATER_EMULATED -shared -fPIC -w -o";
    let output = Command::new(compiler).args(flags.split(' ')).args([&to, &from]).output();
    let output = output.expect("the compiler was there just now");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let path = CString::new(to.to_str().expect("a plain path")).expect("a plain path");
    // SAFETY: the library has no initialisers but those of empty vectors.
    let library = unsafe { dlopen(path.as_ptr(), 2) };
    assert!(!library.is_null(), "{} cannot be opened", to.display());
    Ok(Library(library))
}

/// Memory that ends at a page nobody may touch.
#[derive(Debug)]
struct Mapping {
    start: usize,
    length: usize,
}

impl Mapping {
    fn new(bytes: usize, fill: u8) -> (u64, Self) {
        let room = bytes.next_multiple_of(16);
        let length = room.next_multiple_of(PAGE) + PAGE;
        // SAFETY: a private mapping of its own; its last page is the one that nobody may touch.
        let start = unsafe {
            let start = mmap(std::ptr::null_mut(), length, 3, 0x22, -1, 0);
            assert_ne!(start as isize, -1, "{length} bytes cannot be mapped");
            start.cast::<u8>().write_bytes(fill, length - PAGE);
            assert_eq!(mprotect(start.byte_add(length - PAGE), PAGE, 0), 0);
            start as usize
        };
        ((start + length - PAGE - room) as u64, Mapping { start, length })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped so, and nobody has a claim on it any more.
        unsafe { munmap(self.start as *mut c_void, self.length) };
    }
}

impl Machine for Emulator {
    fn allocate(&self, bytes: usize) -> Result<Memory> {
        let (pointer, mapping) = Mapping::new(bytes, 0xff);
        Ok(Memory::new(pointer, bytes, mapping))
    }

    fn allocate_zeros(&self, bytes: usize) -> Result<Memory> {
        let (pointer, mapping) = Mapping::new(bytes, 0);
        Ok(Memory::new(pointer, bytes, mapping))
    }

    fn upload(&self, bytes: &[u8], to: &Memory, offset: usize) -> Result<()> {
        let to = to.address(offset, bytes.len()) as *mut u8;
        // SAFETY: there are so many bytes.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn download(&self, from: &Memory, into: &mut [u8]) -> Result<()> {
        let from = from.address(0, into.len()) as *const u8;
        // SAFETY: there are so many bytes.
        unsafe { from.copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn mark(&self) -> Result<Mark> {
        Ok(Mark::Emulated)
    }

    fn download_at(&self, _: &Mark, from: &Memory, into: &mut [u8]) -> Result<()> {
        self.download(from, into)
    }

    fn function(&self, file: &str, name: &str, shared: u32) -> Result<Function> {
        assert!(SOURCES.iter().any(|(source, _)| *source == format!("{file}.cu")), "{file}");
        let symbol = CString::new(format!("emulate_{name}")).expect("a plain name");
        // SAFETY: the library is open.
        let found = unsafe { dlsym(self.library.0, symbol.as_ptr()) };
        if found.is_null() {
            bail!("there is no kernel {name:?}")
        }
        // SAFETY: all functions of such names are of this type.
        let call = unsafe { std::mem::transmute::<*mut c_void, Emulated>(found) };
        Ok(Function::Emulated(EmulatedFunction { call, shared }))
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        #[allow(irrefutable_let_patterns, reason = "there may be a second machine")]
        let Function::Emulated(function) = launch.function else {
            bail!("a kernel of another machine")
        };
        assert!(launch.shared <= function.shared.max(48 << 10), "more memory than was asked for");
        assert!(function.shared <= SHARED_MAX && launch.threads <= 1024, "more than there is");
        assert!(launch.grid[1] <= 65_535 && launch.grid[2] <= 65_535, "{:?}", launch.grid);
        let [across, down, depth] = launch.grid.map(|blocks| blocks as u32);
        let shape =
            [across, down, depth, launch.threads, u32::from(self.order == Order::Descending)];
        let mut arguments: Vec<*mut c_void> = launch
            .arguments
            .iter()
            .map(|argument| match argument {
                Argument::Address(address) => (&raw const *address).cast_mut().cast(),
                Argument::Word(word) => (&raw const *word).cast_mut().cast(),
                Argument::Float(float) => (&raw const *float).cast_mut().cast(),
            })
            .collect();
        let running = RUNNING.lock().expect("no kernel panics");
        // SAFETY: as the caller has promised; nothing else of the library runs.
        unsafe {
            let spoil = dlsym(self.library.0, c"spoil_shared".as_ptr());
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(u8)>(spoil)(0xff);
            (function.call)(shape.as_ptr(), arguments.as_mut_ptr());
        }
        drop(running);
        Ok(())
    }

    fn with_operands(
        &self,
        operands: &[Operand<'_>],
        work: &mut dyn FnMut(&[Argument]) -> Result<()>,
    ) -> Result<()> {
        uncounted(|| self.with_copies(operands, work))
    }

    unsafe fn product(&self, product: &Product) -> Result<()> {
        let Product { rows, inputs, outputs, element, out_element, adds, .. } = *product;
        // SAFETY: as the caller has promised.
        let (x, weight) = unsafe {
            (
                numbers(product.x, rows * inputs, element)?,
                numbers(product.weight, outputs * inputs, element)?,
            )
        };
        let mut out = match adds {
            // SAFETY: as the caller has promised.
            true => unsafe { numbers(product.out, rows * outputs, out_element)? },
            false => vec![0.0; rows * outputs],
        };
        for (row, out) in out.chunks_exact_mut(outputs).enumerate() {
            let x = &x[row * inputs..][..inputs];
            for (out, weight) in out.iter_mut().zip(weight.chunks_exact(inputs)) {
                *out += x.iter().zip(weight).map(|(x, weight)| x * weight).sum::<f32>();
            }
        }
        let out = Tensor::new(out, &Device::Cpu)?.to_dtype(out_element.dtype())?;
        with_bytes(&out, |bytes| {
            // SAFETY: as the caller has promised.
            unsafe {
                (product.out as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            }
            Ok(())
        })
    }

    fn free_bytes(&self) -> Result<usize> {
        Ok(1 << 30)
    }
}

/// Numbers of any type, as f32.
unsafe fn numbers(at: u64, count: usize, element: Element) -> Result<Vec<f32>> {
    // SAFETY: as the caller has promised.
    let bytes = unsafe { std::slice::from_raw_parts(at as *const u8, count * element.bytes()) };
    let tensor = Tensor::from_raw_buffer(bytes, element.dtype(), &[count], &Device::Cpu)?;
    tensor.to_dtype(candle_core::DType::F32)?.to_vec1()
}

/// Writes bytes over the elements of a contiguous tensor.
struct Overwrite(Vec<u8>);

impl InplaceOp1 for Overwrite {
    fn name(&self) -> &'static str {
        "overwrite"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (start, size) = (layout.start_offset(), storage.dtype().size_in_bytes());
        let all: *mut u8 = match storage {
            CpuStorage::F32(all) => all.as_mut_ptr().cast(),
            CpuStorage::BF16(all) => all.as_mut_ptr().cast(),
            _ => bail!("a kernel does not write to tensors of this type"),
        };
        assert_eq!(self.0.len(), layout.shape().elem_count() * size, "a tensor of another size");
        // SAFETY: a contiguous tensor has so many bytes from its start on.
        unsafe { all.add(start * size).copy_from_nonoverlapping(self.0.as_ptr(), self.0.len()) };
        Ok(())
    }
}
