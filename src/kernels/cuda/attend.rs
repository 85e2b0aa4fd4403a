//! Attention of the rows of a step to what the cache holds of their sequences.

// Reason: kernels take addresses. Shapes and types are checked here and when a step is laid out.
#![expect(unsafe_code, reason = "launches of kernels")]

use super::kernels::{DeviceStep, Kernels, Pages};
use super::machine::{Argument, Element, Function, Launch, Machine, Matrix};
use super::plan::Way;
use crate::kernels::attention::Heads;
use crate::kernels::cached::BLOCK;
use candle_core::{Result, bail};
use std::f64::consts::LOG2_E;

/// The widest heads of the kernel for any type.
const ROWS_WIDTH_MAX: usize = 256;

/// Warps of a block of threads of that kernel, each with a row and head.
const ROWS_WARPS: usize = 4;

/// Widths of heads that there are tiles for.
const TILE_WIDTHS: [usize; 3] = [32, 64, 128];

/// Warps of a whole tile.
const WHOLE_WARPS: u32 = 4;

/// The attention kernels of one model.
#[derive(Debug)]
pub(super) enum Attention {
    /// Tiles on tensor cores.
    Tiles { split: Function, whole: Function, merge: Function },
    /// A warp a row and head.
    Rows(Function),
}

impl Attention {
    /// Loads the kernels for heads of this width.
    ///
    /// # Errors
    /// If there are none.
    pub(super) fn new(machine: &dyn Machine, element: Element, heads: &Heads) -> Result<Self> {
        let width = heads.width;
        if element == Element::Bf16 && TILE_WIDTHS.contains(&width) {
            let tiles = |kind: &str, shared| {
                let name = format!("attention_tiles_{width}_{kind}");
                machine.function("attention_tiles", &name, shared)
            };
            return Ok(Attention::Tiles {
                split: tiles("split", split_shared(width))?,
                whole: tiles("whole", whole_shared(width))?,
                merge: machine.function("attention_merge", "attention_merge", 0)?,
            });
        }
        if width > ROWS_WIDTH_MAX || !width.is_multiple_of(4) {
            bail!(
                "a GPU takes heads of at most {ROWS_WIDTH_MAX} columns, a multiple of 4, not {width}"
            )
        }
        let name = format!("attention_rows_{}", element.name());
        Ok(Attention::Rows(machine.function("attention_rows", &name, 0)?))
    }

    /// What a step is to be laid out for.
    pub(super) fn way(&self) -> Way {
        match self {
            Attention::Tiles { .. } => Way::Tiles,
            Attention::Rows(_) => Way::Rows,
        }
    }
}

/// Bytes of shared memory of a split tile: a block of keys and one of values.
fn split_shared(width: usize) -> u32 {
    (2 * BLOCK * width * Element::Bf16.bytes()) as u32
}

/// And of a whole tile, with the f32 sums of its 16 pairs a warp.
fn whole_shared(width: usize) -> u32 {
    split_shared(width) + WHOLE_WARPS * 16 * width as u32 * 4
}

impl Kernels {
    /// Attends with the queries of `qkv`, which [`Kernels::rope_store`] has turned: `(rows, query heads * width)`.
    pub(crate) fn attend(&self, qkv: &Matrix, step: &DeviceStep, pages: &Pages) -> Result<Matrix> {
        self.expect_qkv(qkv, step, pages);
        let columns = self.heads.query * self.heads.width;
        let out = Matrix::new(&*self.machine, (qkv.rows, columns), self.element)?;
        match &self.attention {
            Attention::Rows(function) => self.attend_rows(function, qkv, step, pages, &out)?,
            Attention::Tiles { split, whole, merge } => {
                self.attend_tiles([split, whole], qkv, step, pages, &out)?;
                self.merge(merge, step, &out)?;
            }
        }
        Ok(out)
    }

    fn attend_rows(
        &self,
        function: &Function,
        qkv: &Matrix,
        step: &DeviceStep,
        pages: &Pages,
        out: &Matrix,
    ) -> Result<()> {
        let Heads { query, key_value, width, window } = self.heads;
        let arguments = [
            Argument::Address(qkv.all()),
            Argument::Address(pages.keys.address(0, 0)),
            Argument::Address(pages.values.address(0, 0)),
            Argument::Address(step.words.address(0, 4 * step.plan.words.len())),
            Argument::Address(out.all()),
            Argument::Word(step.plan.row_runs.start as u32),
            Argument::Word(step.plan.runs.start as u32),
            Argument::Word(qkv.rows as u32),
            Argument::Word(qkv.columns as u32),
            Argument::Word(query as u32),
            Argument::Word(key_value as u32),
            Argument::Word(width as u32),
            Argument::Word(window_word(window)),
            Argument::Float(self.heads.scale() as f32),
        ];
        let launch = Launch {
            function,
            grid: [(qkv.rows * query).div_ceil(ROWS_WARPS), 1, 1],
            threads: 32 * ROWS_WARPS as u32,
            shared: 0,
            arguments: &arguments,
        };
        // SAFETY: runs cover the rows, and their tables all positions with blocks of the pages: checked when
        // the step was laid out.
        unsafe { self.machine.launch(&launch) }
    }

    fn attend_tiles(
        &self,
        [split, whole]: [&Function; 2],
        qkv: &Matrix,
        step: &DeviceStep,
        pages: &Pages,
        out: &Matrix,
    ) -> Result<()> {
        let Heads { key_value, width, window, .. } = self.heads;
        let partials = step.partials.as_ref().map_or(0, |partials| partials.address(0, 0));
        let kinds = [
            (split, step.plan.split, 1, split_shared(width)),
            (whole, step.plan.whole, WHOLE_WARPS, whole_shared(width)),
        ];
        for (function, tiles, warps, shared) in kinds {
            if tiles.count == 0 {
                continue;
            }
            let arguments = [
                Argument::Address(qkv.all()),
                Argument::Address(pages.keys.address(0, 0)),
                Argument::Address(pages.values.address(0, 0)),
                Argument::Address(step.words.address(0, 4 * step.plan.words.len())),
                Argument::Address(step.section(tiles, 4)),
                Argument::Address(out.all()),
                Argument::Address(partials),
                Argument::Word(step.plan.runs.start as u32),
                Argument::Word(qkv.columns as u32),
                Argument::Word(self.heads.group() as u32),
                Argument::Word(window_word(window)),
                Argument::Float((self.heads.scale() * LOG2_E) as f32),
            ];
            let grid = [tiles.count, key_value, 1];
            let launch =
                Launch { function, grid, threads: 32 * warps, shared, arguments: &arguments };
            // SAFETY: tiles are of pairs of the runs, which cover the rows, and their tables all positions with
            // blocks of the pages; there is room for the partial results that tiles name.
            unsafe { self.machine.launch(&launch) }?;
        }
        Ok(())
    }

    fn merge(&self, function: &Function, step: &DeviceStep, out: &Matrix) -> Result<()> {
        let Some(partials) = &step.partials else { return Ok(()) };
        let arguments = [
            Argument::Address(partials.address(0, 0)),
            Argument::Address(step.words.address(0, 4 * step.plan.words.len())),
            Argument::Address(step.section(step.plan.merges, 4)),
            Argument::Address(out.all()),
            Argument::Word(step.plan.runs.start as u32),
            Argument::Word(self.heads.group() as u32),
            Argument::Word(self.heads.width as u32),
        ];
        let grid = [step.plan.merges.count, self.heads.key_value, step.plan.merge_pairs];
        let launch = Launch { function, grid, threads: 32, shared: 0, arguments: &arguments };
        // SAFETY: what is merged are partial results of the launch before, as the plan counts them.
        unsafe { self.machine.launch(&launch) }
    }
}

/// How kernels are told of a window: 0 is none.
fn window_word(window: Option<usize>) -> u32 {
    window.map_or(0, |window| window.min(u32::MAX as usize) as u32)
}
