//! The gated activation, forward and backward.

use super::{Kernel, blocks, expect_alike, laid_out, neighbours, typed, unset};
use crate::kernels::cuda::machine::{Machine, Operand};
use candle_core::{Result, Tensor, bail};

/// As [`crate::kernels::swiglu::swiglu`].
pub(crate) fn swiglu(machine: &dyn Machine, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    expect_shape(&[gate, up])?;
    let (gate, up) = (laid_out(gate)?, laid_out(up)?);
    let (out, count) = (unset(gate.shape(), &gate)?, gate.elem_count());
    let each = neighbours(count);
    let name = format!("{}_{each}", typed("swiglu_forward", &gate));
    let operands =
        [Operand::Read(&gate), Operand::Read(&up), Operand::Set(&out), Operand::Word(count)];
    let kernel = Kernel::new("swiglu", &name, [blocks(count, each), 1]);
    // SAFETY: all have so many elements of one type.
    unsafe { kernel.launch(machine, &operands) }?;
    Ok(out)
}

/// As [`crate::kernels::swiglu::swiglu_backward`].
pub(crate) fn swiglu_backward(
    machine: &dyn Machine,
    gate: &Tensor,
    up: &Tensor,
    gradient: &Tensor,
) -> Result<(Tensor, Tensor)> {
    expect_shape(&[gate, up, gradient])?;
    let (gate, up, gradient) = (laid_out(gate)?, laid_out(up)?, laid_out(gradient)?);
    let (of_gate, of_up) = (unset(gate.shape(), &gate)?, unset(gate.shape(), &gate)?);
    let count = gate.elem_count();
    let each = neighbours(count);
    let name = format!("{}_{each}", typed("swiglu_backward", &gate));
    let operands = [
        Operand::Read(&gate),
        Operand::Read(&up),
        Operand::Read(&gradient),
        Operand::Set(&of_gate),
        Operand::Set(&of_up),
        Operand::Word(count),
    ];
    let kernel = Kernel::new("swiglu_backward", &name, [blocks(count, each), 1]);
    // SAFETY: all have so many elements of one type.
    unsafe { kernel.launch(machine, &operands) }?;
    Ok((of_gate, of_up))
}

fn expect_shape(tensors: &[&Tensor]) -> Result<()> {
    expect_alike(tensors)?;
    match tensors.iter().find(|tensor| tensor.dims() != tensors[0].dims()) {
        Some(other) => bail!("a gate of {:?} for {:?}", tensors[0].dims(), other.dims()),
        None => Ok(()),
    }
}
