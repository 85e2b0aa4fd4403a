//! Rotary position embedding, there and back.

use super::{Kernel, expect_alike, laid_out, neighbours, typed, unset};
use crate::kernels::cuda::machine::{Machine, Operand};
use crate::kernels::rope::{RopeTable, Turn};
use candle_core::{Result, Tensor, bail};

/// As [`crate::kernels::rope::rope`]: positions are within the table.
pub(crate) fn rope(
    machine: &dyn Machine,
    x: &Tensor,
    table: &RopeTable,
    positions: &[u32],
    turn: Turn,
) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    let (cosines, sines) = (laid_out(table.cosines())?, laid_out(table.sines())?);
    expect_alike(&[x, &cosines, &sines])?;
    let half = cosines.dim(1)?;
    if positions.len() != rows || cosines.dims() != sines.dims() {
        bail!("{} positions for {rows} rows", positions.len())
    }
    if half == 0 || !columns.is_multiple_of(2 * half) {
        bail!("{columns} columns are no heads of {} columns", 2 * half)
    }
    assert!(positions.iter().all(|&p| (p as usize) < table.positions()), "a position too far");
    let x = laid_out(x)?;
    let out = unset(x.shape(), &x)?;
    let positions = Tensor::new(positions, x.device())?;
    let name = format!("{}_{}", typed("rope_turn", &x), neighbours(half));
    let operands = [
        Operand::Read(&x),
        Operand::Read(&cosines),
        Operand::Read(&sines),
        Operand::Read(&positions),
        Operand::Set(&out),
        Operand::Word(columns),
        Operand::Word(half),
        Operand::Float(if turn == Turn::Forward { 1.0 } else { -1.0 }),
    ];
    // SAFETY: shapes, types and positions were checked; there is a block of threads for each row.
    unsafe { Kernel::new("rope_turn", &name, [rows, 1]).launch(machine, &operands) }?;
    Ok(out)
}
