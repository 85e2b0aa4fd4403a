//! Products with a weight that was laid out once for the CPU.
//!
//! ```text
//! weight (out, in)   ─▶  panels of 32 outputs:  [panel][in][32]
//! y[row][o] = sum over i, in order, of x[row][i] * weight[o][i]
//! ```
//!
//! Each output is one chain of fused multiply-adds over the inputs in their order. It depends on its own
//! row and nothing else: not on how many rows there are, how they are cut into tiles, or how many threads
//! share the work. This is what makes generation independent of its batch.

use super::real::simd;
use super::storage::{elements, tensor};
use super::tiles::{PANEL, PanelTile};
use candle_core::{CpuStorage, DType, Result, Storage, Tensor, bail};
use rayon::prelude::*;
use std::cell::RefCell;
use std::sync::Arc;

/// Rows of one task where there are many rows: threads share the rows.
const ROWS_PER_TASK: usize = 48;
/// Panels of one task where there are few rows: threads share the panels.
const PANELS_PER_TASK: usize = 4;

/// A weight `(out, in)` in panels; f32, or bf16 widened as it is read.
#[derive(Clone, Debug)]
pub struct PackedWeight {
    panels: Panels,
    outputs: usize,
    inputs: usize,
}

#[derive(Clone, Debug)]
enum Panels {
    F32(Arc<[f32]>),
    Bf16(Arc<[Bf16]>),
}

/// The upper half of an f32.
#[derive(Clone, Copy, Debug, Default)]
struct Bf16(u16);

/// What a panel is made of.
trait Element: Copy + Default + Send + Sync {
    /// Hands the panel out in f32.
    fn with_wide(panel: &[Self], work: impl FnOnce(&[f32]));
}

impl Element for f32 {
    fn with_wide(panel: &[f32], work: impl FnOnce(&[f32])) {
        work(panel);
    }
}

impl Element for Bf16 {
    fn with_wide(panel: &[Bf16], work: impl FnOnce(&[f32])) {
        thread_local! {
            static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
        }
        WIDE.with_borrow_mut(|wide| {
            wide.resize(panel.len(), 0.0);
            simd(
                #[inline(always)]
                || {
                    for (wide, narrow) in wide.iter_mut().zip(panel) {
                        *wide = f32::from_bits(u32::from(narrow.0) << 16);
                    }
                },
            );
            work(wide);
        });
    }
}

impl PackedWeight {
    /// Lays out `weight (out, in)`, a CPU tensor of f32, f16 (widened to f32) or bf16 (kept).
    pub fn new(weight: &Tensor) -> Result<Self> {
        let (outputs, inputs) = weight.dims2()?;
        let weight = match weight.dtype() {
            DType::BF16 => weight.contiguous()?,
            _ => weight.to_dtype(DType::F32)?.contiguous()?,
        };
        let (storage, layout) = weight.storage_and_layout();
        let (start, end) = layout.contiguous_offsets().expect("made contiguous above");
        let panels = match &*storage {
            Storage::Cpu(CpuStorage::F32(all)) => {
                Panels::F32(panels(inputs, outputs, |i| all[start..end][i]))
            }
            Storage::Cpu(CpuStorage::BF16(all)) => {
                Panels::Bf16(panels(inputs, outputs, |i| Bf16(all[start..end][i].to_bits())))
            }
            _ => bail!("weights are packed on the CPU"),
        };
        Ok(PackedWeight { panels, outputs, inputs })
    }

    /// `x (rows, in)` in f32 to `(rows, out)` in f32.
    pub fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, inputs) = x.dims2()?;
        if inputs != self.inputs {
            bail!("rows of {inputs} elements cannot meet a weight of {} inputs", self.inputs)
        }
        let x = elements::<f32>(x)?;
        let out = match &self.panels {
            Panels::F32(panels) => self.product(panels, &x, rows),
            Panels::Bf16(panels) => self.product(panels, &x, rows),
        };
        tensor(out, (rows, self.outputs))
    }

    fn product<E: Element>(&self, panels: &[E], x: &[f32], rows: usize) -> Vec<f32> {
        let mut out = vec![0.0; rows * self.outputs];
        let panel_len = PANEL * self.inputs;
        if rows >= 2 * ROWS_PER_TASK {
            out.par_chunks_mut(ROWS_PER_TASK * self.outputs)
                .zip(x.par_chunks(ROWS_PER_TASK * self.inputs))
                .for_each(|(out, x)| {
                    let mut column = [[0.0; PANEL]; ROWS_PER_TASK];
                    let column = &mut column[..out.len() / self.outputs];
                    for (index, panel) in panels.chunks_exact(panel_len).enumerate() {
                        fill_column(column, x, panel);
                        for (out, values) in out.chunks_exact_mut(self.outputs).zip(&*column) {
                            let out = &mut out[index * PANEL..];
                            let width = out.len().min(PANEL);
                            out[..width].copy_from_slice(&values[..width]);
                        }
                    }
                });
            return out;
        }
        let columns: Vec<Vec<[f32; PANEL]>> = panels
            .par_chunks(panel_len)
            .with_min_len(PANELS_PER_TASK)
            .map(|panel| {
                let mut column = vec![[0.0; PANEL]; rows];
                fill_column(&mut column, x, panel);
                column
            })
            .collect();
        for (row, out) in out.chunks_exact_mut(self.outputs).enumerate() {
            for (out, column) in out.chunks_mut(PANEL).zip(&columns) {
                out.copy_from_slice(&column[row][..out.len()]);
            }
        }
        out
    }
}

fn panels<E: Element>(inputs: usize, outputs: usize, weight: impl Fn(usize) -> E) -> Arc<[E]> {
    let mut all = Vec::with_capacity(outputs.div_ceil(PANEL) * PANEL * inputs);
    for first in (0..outputs).step_by(PANEL) {
        for input in 0..inputs {
            all.extend((first..first + PANEL).map(|output| match output < outputs {
                true => weight(output * inputs + input),
                false => E::default(),
            }));
        }
    }
    all.into()
}

/// Computes the 32 outputs of one panel for each row of `x`. bf16 panels are widened first, once for all
/// rows.
fn fill_column<E: Element>(column: &mut [[f32; PANEL]], x: &[f32], panel: &[E]) {
    E::with_wide(panel, |panel| {
        pulp::Arch::new().dispatch(PanelTile { x, panel, out: column });
    });
}

#[cfg(test)]
mod tests {
    use super::super::twin::{close, random};
    use super::*;

    fn check(rows: usize, outputs: usize, inputs: usize) {
        let (x, weight) =
            (random(&[rows, inputs], DType::F32), random(&[outputs, inputs], DType::F32));
        let ours = PackedWeight::new(&weight).unwrap().multiply(&x).unwrap();
        close(&ours, &x.matmul(&weight.t().unwrap()).unwrap(), "product");

        let weight = weight.to_dtype(DType::BF16).unwrap();
        let ours = PackedWeight::new(&weight).unwrap().multiply(&x).unwrap();
        let wide = weight.to_dtype(DType::F32).unwrap();
        close(&ours, &x.matmul(&wide.t().unwrap()).unwrap(), "product with bf16 weights");
    }

    #[test]
    fn the_kernel_equals_a_plain_product() {
        for (rows, outputs, inputs) in
            [(1, 1, 1), (2, 33, 5), (5, 64, 40), (31, 100, 64), (64, 31, 7), (201, 96, 50)]
        {
            check(rows, outputs, inputs);
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_every_batch() {
        let (x, weight) = (random(&[150, 70], DType::F32), random(&[90, 70], DType::F32));
        let weight = PackedWeight::new(&weight).unwrap();
        let all: Vec<Vec<f32>> = weight.multiply(&x).unwrap().to_vec2().unwrap();
        for (first, rows) in [(0, 1), (3, 2), (10, 13), (40, 63), (1, 64), (50, 100)] {
            let part = x.narrow(0, first, rows).unwrap();
            let part: Vec<Vec<f32>> = weight.multiply(&part).unwrap().to_vec2().unwrap();
            assert_eq!(part, all[first..first + rows], "rows {first}..{}", first + rows);
        }
    }
}
