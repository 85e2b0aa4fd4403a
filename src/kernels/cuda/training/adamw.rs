//! One update of AdamW, in place.

use super::{Kernel, blocks, laid_out, neighbours};
use crate::kernels::adamw::Update;
use crate::kernels::cuda::machine::{Machine, Operand};
use candle_core::{DType, Result, Tensor, bail};

/// Moves `state`, value, mean and mean square of a parameter in f32, against `gradient`, which is flat.
pub(crate) fn adamw(
    machine: &dyn Machine,
    state: &Tensor,
    gradient: &Tensor,
    update: &Update,
) -> Result<()> {
    let count = gradient.elem_count();
    if state.dims() != [3, count]
        || state.layout().start_offset() != 0
        || [state, gradient].iter().any(|t| t.dtype() != DType::F32)
    {
        bail!("a gradient of {count} elements for a state of {:?}", state.dims())
    }
    let gradient = &laid_out(gradient)?;
    let each = neighbours(count);
    let factors = update.factors();
    let operands = [
        Operand::Change(state),
        Operand::Read(gradient),
        Operand::Word(count),
        Operand::Float(factors.beta1.into()),
        Operand::Float(factors.beta2.into()),
        Operand::Float(factors.new1.into()),
        Operand::Float(factors.new2.into()),
        Operand::Float(factors.correct1.into()),
        Operand::Float(factors.correct2.into()),
        Operand::Float(factors.keep.into()),
        Operand::Float(factors.rate.into()),
        Operand::Float(factors.epsilon.into()),
        Operand::Float(factors.scale.into()),
    ];
    let name = format!("adamw_{each}");
    let kernel = Kernel::new("adamw", &name, [blocks(count, each), 1]);
    // SAFETY: shapes and types were checked; the state stands where its memory begins.
    unsafe { kernel.launch(machine, &operands) }
}
