//! One update of AdamW, in place.

use super::{Kernel, blocks, laid_out, neighbours};
use crate::kernels::adamw::Update;
use crate::kernels::cuda::machine::{Machine, Operand};
use candle_core::{DType, Result, Tensor, bail};

/// Moves `state`, value, mean and mean square of a parameter in f32, against `gradient`, which is flat. `copy` is then the
/// new value in bf16.
pub(crate) fn adamw(
    machine: &dyn Machine,
    (state, copy): (&Tensor, Option<&Tensor>),
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
    let is_copy = |copy: &Tensor| {
        copy.elem_count() == count
            && copy.layout().start_offset() == 0
            && copy.dtype() == DType::BF16
    };
    if let Some(copy) = copy.filter(|copy| !is_copy(copy)) {
        bail!("{count} elements are not copied to {:?} in {:?}", copy.layout(), copy.dtype())
    }
    let gradient = &laid_out(gradient)?;
    let each = neighbours(count);
    let to = if copy.is_some() { "_to_bf16" } else { "" };
    let name = format!("adamw{to}_{each}");
    let kernel = Kernel::new("adamw", &name, [blocks(count, each), 1]);
    let mut operands = vec![Operand::Change(state), Operand::Read(gradient)];
    operands.extend(copy.map(Operand::Set));
    operands.push(Operand::Word(count));
    operands.extend(factors(update));
    // SAFETY: shapes and types were checked; the state stands where its memory begins, and so does the copy.
    unsafe { kernel.launch(machine, &operands) }
}

/// The rates of an update, in the order of the kernel.
fn factors(update: &Update) -> [Operand<'static>; 10] {
    let factors = update.factors();
    [
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
    ]
}
