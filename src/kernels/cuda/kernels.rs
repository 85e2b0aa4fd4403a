//! The operations of a step but for attention, as safe functions on matrices of a machine.

// Reason: kernels take addresses. Shapes and types are checked here, so that callers cannot get them wrong.
#![expect(unsafe_code, reason = "launches of kernels")]

use super::attend::Attention;
use super::machine::{Argument, Element, Function, Launch, Machine, Mark, Matrix, Memory, Product};
use super::plan::{Limits, Plan, Section};
use crate::kernels::attention::Heads;
use crate::kernels::cached::{BLOCK, Expected, StepRows};
use candle_core::{CpuStorage, Device, Result, Storage, Tensor, bail};
use std::sync::Arc;

/// Columns that kernels load at once: all rows are of a multiple of it.
pub(crate) const VECTOR: usize = 4;

/// Threads of a block that has a row of its own.
const ROW_THREADS: u32 = 256;

/// Threads of a block that have a row each.
const FILL_THREADS: u32 = 128;

/// Threads of a block that finds the largest of a row.
const ARGMAX_THREADS: u32 = 1024;

/// The kernels of one model, loaded.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(super) machine: Arc<dyn Machine>,
    pub(super) element: Element,
    pub(super) heads: Heads,
    pub(super) attention: Attention,
    embed: Function,
    take: Function,
    rms_norm: Function,
    rope_store: Function,
    swiglu: Function,
    argmax: Function,
    fill_ids: Function,
}

/// Cosines and sines of all positions, in f32.
#[derive(Debug)]
pub(crate) struct Angles {
    /// `(positions, width / 2)`
    pub(crate) cosines: Matrix,
    /// `(positions, width / 2)`
    pub(crate) sines: Matrix,
}

/// Keys and values of one layer: `[block][key-value head][64][width]` each.
#[derive(Debug)]
pub(crate) struct Pages {
    pub(super) keys: Memory,
    pub(super) values: Memory,
    blocks: usize,
}

/// A step whose words are on the machine.
#[derive(Debug)]
pub(crate) struct DeviceStep {
    pub(super) plan: Plan,
    pub(super) words: Memory,
    pub(super) partials: Option<Memory>,
    rows: usize,
    limits: Limits,
}

impl DeviceStep {
    /// The address of `count` entries of `size` words from entry `first` of a section.
    pub(super) fn entries(&self, section: Section, size: usize, first: usize, count: usize) -> u64 {
        assert!(first + count <= section.count, "entries beyond those of a step");
        self.words.address(4 * (section.start + size * first), 4 * size * count)
    }

    /// The address of a section of entries of `size` words.
    pub(super) fn section(&self, section: Section, size: usize) -> u64 {
        self.entries(section, size, 0, section.count)
    }

    /// Rows whose next token is wanted.
    pub(crate) fn samples(&self) -> usize {
        self.plan.samples.count
    }
}

/// The column of the largest element of each of some rows, in the memory of the machine.
#[derive(Debug)]
pub(crate) struct Columns {
    memory: Memory,
    rows: usize,
}

impl Kernels {
    /// Loads what a model needs whose weights are `element`s.
    ///
    /// # Errors
    /// If there is no kernel for heads of this width, or the machine cannot load one.
    pub(crate) fn new(machine: Arc<dyn Machine>, element: Element, heads: Heads) -> Result<Self> {
        if heads.window == Some(0) {
            bail!("a sliding window of no positions")
        }
        let typed = |file: &str| machine.function(file, &format!("{file}_{}", element.name()), 0);
        Ok(Kernels {
            attention: Attention::new(&*machine, element, &heads)?,
            embed: typed("embed")?,
            take: machine.function("embed", "embed_f32", 0)?,
            rms_norm: typed("rms_norm")?,
            rope_store: typed("rope_store")?,
            swiglu: typed("swiglu")?,
            argmax: machine.function("argmax", "argmax", 0)?,
            fill_ids: machine.function("fill_ids", "fill_ids", 0)?,
            machine,
            element,
            heads,
        })
    }

    /// The type of weights, keys and values.
    pub(crate) fn element(&self) -> Element {
        self.element
    }

    /// Bytes that are free.
    pub(crate) fn free_bytes(&self) -> Result<usize> {
        self.machine.free_bytes()
    }

    /// Brings tensors in host memory, whose rows have the same columns, onto the machine, one below the other.
    ///
    /// # Errors
    /// If they are not contiguous, or of different types or columns.
    pub(crate) fn upload(&self, tensors: &[Tensor]) -> Result<Matrix> {
        let first = tensors.first().map(|tensor| (tensor.dtype(), columns(tensor)));
        let Some((dtype, columns)) = first else { bail!("nothing to upload") };
        let rows: usize = tensors.iter().map(|tensor| tensor.elem_count() / columns.max(1)).sum();
        let matrix = Matrix::new(&*self.machine, (rows, columns), Element::of(dtype)?)?;
        let mut offset = 0;
        for tensor in tensors {
            if tensor.dtype() != dtype || self::columns(tensor) != columns {
                bail!("tensors of different types or columns cannot be put below each other")
            }
            with_bytes(tensor, |bytes| {
                self.machine.upload(bytes, &matrix.memory, offset)?;
                offset += bytes.len();
                Ok(())
            })?;
        }
        Ok(matrix)
    }

    /// Copies an f32 matrix to host memory.
    pub(crate) fn download(&self, matrix: &Matrix) -> Result<Tensor> {
        let dtype = matrix.element.dtype();
        let mut bytes = vec![0; matrix.rows * matrix.columns * matrix.element.bytes()];
        self.machine.download(&matrix.memory, &mut bytes)?;
        Tensor::from_raw_buffer(&bytes, dtype, &[matrix.rows, matrix.columns], &Device::Cpu)
    }

    /// Room for keys and values of one layer; all zero, so that nothing in it is no number.
    pub(crate) fn pages(&self, blocks: usize) -> Result<Pages> {
        if blocks > u32::MAX as usize / BLOCK {
            bail!("{blocks} blocks are more than 32 bits can number")
        }
        let block = self.heads.key_value * BLOCK * self.heads.width * self.element.bytes();
        let memory = || self.machine.allocate_zeros(blocks * block);
        Ok(Pages { keys: memory()?, values: memory()?, blocks })
    }

    /// Lays out a step and brings it onto the machine.
    ///
    /// # Errors
    /// If it does not stay within the limits.
    pub(crate) fn begin(&self, rows: &StepRows<'_>, limits: Limits) -> Result<DeviceStep> {
        let plan = Plan::new(rows, &self.heads, limits, self.attention.way())?;
        let words = self.machine.allocate(4 * plan.words.len())?;
        let bytes: Vec<u8> = plan.words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.machine.upload(&bytes, &words, 0)?;
        let partials = match plan.partials * self.heads.key_value * (self.heads.width + 2) {
            0 => None,
            floats => Some(self.machine.allocate(4 * floats)?),
        };
        Ok(DeviceStep { plan, words, partials, rows: rows.ids.len(), limits })
    }

    /// Puts tokens of the step before where they are ids of a step.
    ///
    /// # Errors
    /// If there is no such row or token.
    pub(crate) fn fill_ids(
        &self,
        step: &DeviceStep,
        tokens: &Columns,
        expected: &[Expected],
    ) -> Result<()> {
        let beyond =
            |one: &&Expected| one.row as usize >= step.rows || one.sample as usize >= tokens.rows;
        if let Some(Expected { row, sample }) = expected.iter().find(beyond) {
            bail!("row {row} of {} is to be token {sample} of {}", step.rows, tokens.rows)
        }
        let pairs = expected.iter().flat_map(|one| [one.row, one.sample]);
        let bytes: Vec<u8> = pairs.flat_map(u32::to_ne_bytes).collect();
        let pairs = self.machine.allocate(bytes.len())?;
        self.machine.upload(&bytes, &pairs, 0)?;
        let arguments = [
            Argument::Address(tokens.memory.address(0, 4 * tokens.rows)),
            Argument::Address(pairs.address(0, bytes.len())),
            Argument::Address(step.section(step.plan.ids, 1)),
            Argument::Word(expected.len() as u32),
        ];
        let blocks = expected.len().div_ceil(FILL_THREADS as usize);
        // SAFETY: rows and tokens are there, as found above, and each row is filled by one thread. Tokens are columns of
        // logits, of which there are as many as the table of embeddings has rows.
        unsafe { self.launch(&self.fill_ids, [blocks, 1, 1], FILL_THREADS, &arguments) }
    }

    /// The rows of `table (vocabulary, width)` for the ids of a step, as a new stream: `(rows, width)`, f32.
    pub(crate) fn embed(&self, table: &Matrix, step: &DeviceStep) -> Result<Matrix> {
        self.expect(table, self.element);
        self.rows_of(&self.embed, table, step)
    }

    /// The rows of a stream that the ids of a step name, as a new stream.
    pub(crate) fn take(&self, stream: &Matrix, step: &DeviceStep) -> Result<Matrix> {
        self.expect(stream, Element::F32);
        self.rows_of(&self.take, stream, step)
    }

    fn rows_of(&self, function: &Function, table: &Matrix, step: &DeviceStep) -> Result<Matrix> {
        assert!(step.limits.ids <= table.rows, "ids were checked against another table");
        assert!(table.columns.is_multiple_of(VECTOR), "{} columns", table.columns);
        let out = Matrix::new(&*self.machine, (step.rows, table.columns), Element::F32)?;
        let arguments = [
            Argument::Address(table.all()),
            Argument::Address(step.section(step.plan.ids, 1)),
            Argument::Address(out.all()),
            Argument::Word(table.columns as u32),
        ];
        // SAFETY: each id is a row of the table, and `out` has a row for each.
        unsafe { self.launch(function, [step.rows, 1, 1], ROW_THREADS, &arguments) }?;
        Ok(out)
    }

    /// Normalises all rows of the stream for a product.
    pub(crate) fn rms_norm(&self, x: &Matrix, weight: &Matrix, epsilon: f64) -> Result<Matrix> {
        self.normalise(x, (0, x.rows), weight, epsilon)
    }

    /// Normalises the rows of the stream whose next token is wanted, from wanted row `first` on so many.
    pub(crate) fn rms_norm_samples(
        &self,
        x: &Matrix,
        (step, first, count): (&DeviceStep, usize, usize),
        weight: &Matrix,
        epsilon: f64,
    ) -> Result<Matrix> {
        assert_eq!(x.rows, step.rows, "a stream of another step");
        let rows = step.entries(step.plan.samples, 1, first, count);
        self.normalise(x, (rows, count), weight, epsilon)
    }

    fn normalise(
        &self,
        x: &Matrix,
        (rows, count): (u64, usize),
        weight: &Matrix,
        epsilon: f64,
    ) -> Result<Matrix> {
        self.expect(weight, self.element);
        self.expect(x, Element::F32);
        assert_eq!((weight.rows, weight.columns), (1, x.columns), "a weight a column");
        assert!(x.columns.is_multiple_of(VECTOR), "{} columns", x.columns);
        let out = Matrix::new(&*self.machine, (count, x.columns), self.element)?;
        let arguments = [
            Argument::Address(x.all()),
            Argument::Address(rows),
            Argument::Address(weight.all()),
            Argument::Address(out.all()),
            Argument::Word(x.columns as u32),
            Argument::Float(epsilon as f32),
        ];
        // SAFETY: `rows` are `count` rows of `x`, checked when the step was laid out; or none are named, and
        // there are `count` in it.
        unsafe { self.launch(&self.rms_norm, [count, 1, 1], ROW_THREADS, &arguments) }?;
        Ok(out)
    }

    /// `x weight^T` in elements of type `out`: that of the weights, or f32.
    pub(crate) fn project(&self, x: &Matrix, weight: &Matrix, out: Element) -> Result<Matrix> {
        let out = Matrix::new(&*self.machine, (x.rows, weight.rows), out)?;
        self.product(x, weight, &out, false)?;
        Ok(out)
    }

    /// Adds `x weight^T` to the stream.
    pub(crate) fn project_onto(
        &self,
        x: &Matrix,
        weight: &Matrix,
        stream: &mut Matrix,
    ) -> Result<()> {
        self.expect(stream, Element::F32);
        self.product(x, weight, stream, true)
    }

    fn product(&self, x: &Matrix, weight: &Matrix, out: &Matrix, adds: bool) -> Result<()> {
        self.expect(x, self.element);
        self.expect(weight, self.element);
        assert!(out.element == Element::F32 || out.element == self.element, "a product in between");
        assert_eq!(x.columns, weight.columns, "a product of other shapes");
        assert_eq!((out.rows, out.columns), (x.rows, weight.rows), "a product of other shapes");
        let product = Product {
            x: x.all(),
            weight: weight.all(),
            out: out.all(),
            rows: x.rows,
            inputs: x.columns,
            outputs: weight.rows,
            element: self.element,
            out_element: out.element,
            adds,
        };
        // SAFETY: shapes and types were checked.
        unsafe { self.machine.product(&product) }
    }

    /// Turns the queries of `qkv (rows, (query + 2 key-value heads) * width)` in place, and puts turned keys and
    /// values into the cache.
    pub(crate) fn rope_store(
        &self,
        qkv: &mut Matrix,
        angles: &Angles,
        step: &DeviceStep,
        pages: &mut Pages,
    ) -> Result<()> {
        let Heads { query, key_value, width, .. } = self.heads;
        self.expect_qkv(qkv, step, pages);
        for table in [&angles.cosines, &angles.sines] {
            self.expect(table, Element::F32);
            assert_eq!(table.columns, width / 2, "angles of other heads");
            assert!(step.limits.positions <= table.rows, "positions beyond the rotary table");
        }
        let arguments = [
            Argument::Address(qkv.all()),
            Argument::Address(angles.cosines.all()),
            Argument::Address(angles.sines.all()),
            Argument::Address(step.section(step.plan.positions, 1)),
            Argument::Address(step.section(step.plan.slots, 1)),
            Argument::Address(pages.keys.address(0, 0)),
            Argument::Address(pages.values.address(0, 0)),
            Argument::Word(query as u32),
            Argument::Word(key_value as u32),
            Argument::Word(width as u32),
        ];
        // SAFETY: positions are within the tables and slots within the pages, checked when the step was laid
        // out; sequences own the blocks they write to.
        unsafe { self.launch(&self.rope_store, [step.rows, 1, 1], ROW_THREADS, &arguments) }
    }

    /// That `qkv` are the rows of `step`, whose blocks are of `pages`.
    pub(super) fn expect_qkv(&self, qkv: &Matrix, step: &DeviceStep, pages: &Pages) {
        let Heads { query, key_value, width, .. } = self.heads;
        self.expect(qkv, self.element);
        let shape = (step.rows, (query + 2 * key_value) * width);
        assert_eq!((qkv.rows, qkv.columns), shape, "queries, keys and values of other shapes");
        assert!(step.limits.blocks <= pages.blocks, "blocks were checked against another cache");
    }

    /// The gated activation of `gate_up (rows, 2 * middle)`: `(rows, middle)`.
    pub(crate) fn swiglu(&self, gate_up: &Matrix) -> Result<Matrix> {
        self.expect(gate_up, self.element);
        let columns = gate_up.columns / 2;
        assert!(columns.is_multiple_of(VECTOR), "{columns} columns");
        let out = Matrix::new(&*self.machine, (gate_up.rows, columns), self.element)?;
        let arguments = [
            Argument::Address(gate_up.all()),
            Argument::Address(out.all()),
            Argument::Word(columns as u32),
        ];
        let down = columns.div_ceil(VECTOR * ROW_THREADS as usize);
        // SAFETY: both have a row for each block of threads across.
        unsafe { self.launch(&self.swiglu, [gate_up.rows, down, 1], ROW_THREADS, &arguments) }?;
        Ok(out)
    }

    /// A place for the columns that [`Kernels::argmax`] finds of so many rows.
    pub(crate) fn columns_of(&self, rows: usize) -> Result<Columns> {
        Ok(Columns { memory: self.machine.allocate(4 * rows)?, rows })
    }

    /// Finds the column of the largest element of each row, the first of several: the first row's is put at `first`.
    pub(crate) fn argmax(&self, logits: &Matrix, found: &Columns, first: usize) -> Result<()> {
        self.expect(logits, Element::F32);
        let arguments = [
            Argument::Address(logits.all()),
            Argument::Address(found.memory.address(4 * first, 4 * logits.rows)),
            Argument::Word(logits.columns as u32),
        ];
        // SAFETY: there is a word for each row, as `address` has found.
        unsafe { self.launch(&self.argmax, [logits.rows, 1, 1], ARGMAX_THREADS, &arguments) }
    }

    /// The place behind all that was launched so far.
    pub(crate) fn mark(&self) -> Result<Mark> {
        self.machine.mark()
    }

    /// The columns that were found before `mark`, in host memory.
    pub(crate) fn download_columns(&self, found: &Columns, mark: &Mark) -> Result<Vec<u32>> {
        let mut bytes = vec![0; 4 * found.rows];
        self.machine.download_at(mark, &found.memory, &mut bytes)?;
        Ok(bytes.as_chunks().0.iter().map(|&word| u32::from_ne_bytes(word)).collect())
    }

    fn expect(&self, matrix: &Matrix, element: Element) {
        assert_eq!(matrix.element, element, "a matrix of another type");
    }

    /// Runs a kernel that names its own shared memory.
    ///
    /// # Safety
    /// As [`Machine::launch`].
    unsafe fn launch(
        &self,
        function: &Function,
        grid: [usize; 3],
        threads: u32,
        arguments: &[Argument],
    ) -> Result<()> {
        let launch = Launch { function, grid, threads, shared: 0, arguments };
        // SAFETY: as the caller has promised.
        unsafe { self.machine.launch(&launch) }
    }
}

fn columns(tensor: &Tensor) -> usize {
    tensor.dims().last().copied().unwrap_or(1)
}

/// Calls `use_them` with the bytes of a contiguous tensor in host memory.
pub(super) fn with_bytes<R>(
    tensor: &Tensor,
    use_them: impl FnOnce(&[u8]) -> Result<R>,
) -> Result<R> {
    fn bytes<T>(elements: &[T]) -> &[u8] {
        // SAFETY: numbers without padding, seen as so many bytes.
        unsafe {
            std::slice::from_raw_parts(elements.as_ptr().cast(), std::mem::size_of_val(elements))
        }
    }
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("only contiguous tensors can be uploaded, not {layout:?}")
    };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(all)) => use_them(bytes(&all[start..end])),
        Storage::Cpu(CpuStorage::BF16(all)) => use_them(bytes(&all[start..end])),
        Storage::Cpu(CpuStorage::F16(all)) => use_them(bytes(&all[start..end])),
        Storage::Cpu(CpuStorage::U32(all)) => use_them(bytes(&all[start..end])),
        _ => bail!("only tensors in host memory can be uploaded, not {:?}", tensor.dtype()),
    }
}
