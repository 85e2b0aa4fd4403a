//! Attention within the items of packed rows, forward and backward, in tiles on tensor cores or row by row.

use super::{Kernel, expect_alike, laid_out, typed, unset_of};
use crate::kernels::attention::Heads;
use crate::kernels::cuda::machine::{Machine, Operand};
use candle_core::{DType, Device, Result, Tensor, bail};
use std::f64::consts::LOG2_E;
use std::ops::Range;

/// Rows of a tile: `TILE` in packed.cuh.
const TILE: usize = 64;

/// Rows that a tile meets at a time on the way back: `STEP` in packed.cuh.
const STEP: usize = 32;

/// Threads of a tile.
const TILE_THREADS: u32 = 128;

/// Widths of heads that there are tiles for.
const TILE_WIDTHS: [usize; 3] = [32, 64, 128];

/// Warps of a block of threads of the kernels without tiles, each with a row and head.
const ROW_WARPS: usize = 4;

/// The widest heads of those.
const WIDTH_MAX: usize = 256;

/// Whether there are kernels for heads of this width.
pub(crate) fn has_width(width: usize) -> bool {
    (1..=WIDTH_MAX).contains(&width)
}

/// The output as [`crate::kernels::attention::attention`] has it, and the logarithms, to the base of 2, of the sums of
/// weights: `(rows, query heads)`.
pub(crate) fn attention(
    machine: &dyn Machine,
    qkv: [&Tensor; 3],
    spans: &[Range<usize>],
    heads: &Heads,
) -> Result<(Tensor, Tensor)> {
    let packed = Packed::new(qkv, spans, heads)?;
    let out = zeros_like(&packed.q)?;
    let log_sums = Tensor::zeros((packed.rows, heads.query), DType::F32, packed.q.device())?;
    let mut operands = packed.inputs().to_vec();
    operands.extend([
        Operand::Read(&packed.words),
        Operand::Change(&out),
        Operand::Change(&log_sums),
    ]);
    let shared = 2 * TILE * heads.width * 2;
    // SAFETY: `Packed` checks shapes, types and spans.
    unsafe { packed.launch(machine, Way::Forward, operands, shared) }?;
    Ok((out, log_sums))
}

/// As [`crate::kernels::attention::attention_backward`], given what [`attention`] returned.
pub(crate) fn attention_backward(
    machine: &dyn Machine,
    qkv: [&Tensor; 3],
    [output, log_sums]: [&Tensor; 2],
    gradient: &Tensor,
    (spans, heads): (&[Range<usize>], &Heads),
) -> Result<[Tensor; 3]> {
    let packed = Packed::new(qkv, spans, heads)?;
    expect_alike(&[&packed.q, output, gradient])?;
    if output.dims() != packed.q.dims() || gradient.dims() != packed.q.dims() {
        bail!("a gradient of {:?} for queries of {:?}", gradient.dims(), packed.q.dims())
    }
    if log_sums.dims() != [packed.rows, heads.query] || log_sums.dtype() != DType::F32 {
        bail!("sums of weights of {:?} for {} rows", log_sums.dims(), packed.rows)
    }
    let (output, gradient) = (laid_out(output)?, laid_out(gradient)?);
    let along = packed.along(machine, &output, &gradient)?;
    let [of_q, of_k, of_v] =
        [zeros_like(&packed.q)?, zeros_like(&packed.k)?, zeros_like(&packed.v)?];
    let mut inputs = packed.inputs().to_vec();
    inputs.extend([
        Operand::Read(&gradient),
        Operand::Read(log_sums),
        Operand::Read(&along),
        Operand::Read(&packed.words),
    ]);
    let mut queries = inputs.clone();
    queries.push(Operand::Change(&of_q));
    // SAFETY: `Packed` checks shapes, types and spans; the rest was checked here.
    unsafe { packed.launch(machine, Way::Queries, queries, 4 * STEP * heads.width * 2) }?;
    inputs.extend([Operand::Change(&of_k), Operand::Change(&of_v)]);
    // SAFETY: as above.
    unsafe { packed.launch(machine, Way::Keys, inputs, keys_shared(heads.width)) }?;
    Ok([of_q, of_k, of_v])
}

/// Bytes of `SharedKeys` in packed_keys.cu.
fn keys_shared(width: usize) -> usize {
    2 * TILE * width * 2 + 2 * (2 * STEP * width * 2 + 2 * STEP * 4)
}

/// Rows outside all spans are zero.
fn zeros_like(tensor: &Tensor) -> Result<Tensor> {
    Tensor::zeros(tensor.shape(), tensor.dtype(), tensor.device())
}

/// What a launch computes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Forward,
    Queries,
    Keys,
}

/// Queries, keys and values, checked, and where their items are.
struct Packed {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: usize,
    heads: Heads,
    /// How many tiles there are; none if rows are taken one by one.
    tiles: Option<usize>,
    /// Tiles, or the items of all rows.
    words: Tensor,
}

impl Packed {
    fn new([q, k, v]: [&Tensor; 3], spans: &[Range<usize>], heads: &Heads) -> Result<Self> {
        let Heads { query, key_value, width, window } = *heads;
        expect_alike(&[q, k, v])?;
        let rows = q.dim(0)?;
        let (wide, narrow) = ([rows, query * width], [rows, key_value * width]);
        if q.dims() != wide || k.dims() != narrow || v.dims() != narrow {
            bail!("{:?}, {:?} and {:?} are not of {heads:?}", q.dims(), k.dims(), v.dims())
        }
        if key_value == 0 || !query.is_multiple_of(key_value) || !has_width(width) {
            bail!("there is no kernel for {heads:?}")
        }
        if window == Some(0) {
            bail!("a sliding window of no rows")
        }
        let has_tiles = q.dtype() == DType::BF16 && TILE_WIDTHS.contains(&width);
        let (words, tiles) = match has_tiles {
            true => {
                let words = tiles(spans);
                let count = words.len() / 4;
                (words, Some(count))
            }
            false => (items(spans, rows), None),
        };
        let words = upload(words, q.device())?;
        let (q, k, v) = (laid_out(q)?, laid_out(k)?, laid_out(v)?);
        Ok(Packed { q, k, v, rows, heads: *heads, tiles, words })
    }

    fn inputs(&self) -> [Operand<'_>; 3] {
        [Operand::Read(&self.q), Operand::Read(&self.k), Operand::Read(&self.v)]
    }

    /// For each row and query head, the gradient of the output times the output.
    fn along(&self, machine: &dyn Machine, output: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let Heads { query, width, .. } = self.heads;
        let along = unset_of(DType::F32, (self.rows, query), output.device())?;
        let items = self.rows * query;
        let operands = [
            Operand::Read(output),
            Operand::Read(gradient),
            Operand::Set(&along),
            Operand::Word(items),
            Operand::Word(width),
        ];
        let name = typed("packed_along", output);
        let kernel = Kernel::new("packed_along", &name, [items.div_ceil(8), 1]);
        // SAFETY: there is a warp for each row and head.
        unsafe { kernel.launch(machine, &operands) }?;
        Ok(along)
    }

    /// Runs the kernel for tensors of this type and width, with `tensors` and what tells how rows lie.
    ///
    /// # Safety
    /// The tensors are those of the kernel, of the shapes that go with the queries.
    unsafe fn launch(
        &self,
        machine: &dyn Machine,
        way: Way,
        mut operands: Vec<Operand<'_>>,
        shared: usize,
    ) -> Result<()> {
        let Heads { query, key_value, width, window } = self.heads;
        let window = Operand::Word(window.map_or(0, |window| window.min(u32::MAX as usize)));
        let scale = Operand::Float(self.heads.scale() * LOG2_E);
        let factor = (way != Way::Forward).then_some(Operand::Float(self.heads.scale()));
        let (down, other) = if way == Way::Keys { (key_value, query) } else { (query, key_value) };
        let (file, name, grid, shared) = match self.tiles {
            Some(tiles) => {
                operands.extend([Operand::Word(other), window, scale]);
                let file = match way {
                    Way::Forward => "packed_forward",
                    Way::Queries => "packed_queries",
                    Way::Keys => "packed_keys",
                };
                (file, format!("{file}_{width}"), [tiles, down, 1], shared)
            }
            None => {
                let words = [self.rows, query, key_value, width].map(Operand::Word);
                operands.extend(words);
                operands.extend([window, scale]);
                let kind = match way {
                    Way::Forward => "packed_rows",
                    Way::Queries => "packed_rows_queries",
                    Way::Keys => "packed_rows_keys",
                };
                let across = (self.rows * down).div_ceil(ROW_WARPS);
                ("packed_rows", typed(kind, &self.q), [across, 1, 1], 0)
            }
        };
        operands.extend(factor);
        let kernel = Kernel { file, name: &name, grid, threads: TILE_THREADS, shared };
        // SAFETY: as the caller has promised; tiles and items lie within the rows, as spans do.
        unsafe { kernel.launch(machine, &operands) }
    }
}

/// Four words a tile: its first row and its end, the first row and the end of its item.
fn tiles(spans: &[Range<usize>]) -> Vec<u32> {
    let of_span = |span: &Range<usize>| {
        let Range { start, end } = *span;
        (start..end)
            .step_by(TILE)
            .flat_map(move |first| [first, end.min(first + TILE), start, end].map(|row| row as u32))
    };
    spans.iter().flat_map(of_span).collect()
}

/// Two words a row: the first row and the end of its item, zeros for rows of none.
fn items(spans: &[Range<usize>], rows: usize) -> Vec<u32> {
    let mut words = vec![0; 2 * rows];
    for span in spans {
        for row in span.clone() {
            words[2 * row] = span.start as u32;
            words[2 * row + 1] = span.end as u32;
        }
    }
    words
}

/// Words on a device; one at least, for there is no tensor of none.
fn upload(mut words: Vec<u32>, device: &Device) -> Result<Tensor> {
    if words.is_empty() {
        words.push(0);
    }
    Tensor::new(words, device)
}
