//! Losses of a chunk of logits, and their gradient in its place.

use super::{Kernel, neighbours, typed, unset_of};
use crate::kernels::cross_entropy::{Gradients, Objective};
use crate::kernels::cuda::machine::{Machine, Operand};
use candle_core::{DType, Result, Tensor, bail};

/// Threads of a block, which has a row: `LOSS_THREADS` in cross_entropy.cu.
const LOSS_THREADS: u32 = 1024;

/// The losses of `targets` under `logits (rows, vocabulary)`, which nothing else refers to, and, if they are wanted,
/// the gradients of the logits in their place.
pub(crate) fn cross_entropy(
    machine: &dyn Machine,
    logits: Tensor,
    targets: &[u32],
    gradients: Gradients,
) -> Result<(Tensor, Option<Tensor>)> {
    let (rows, vocabulary) = logits.dims2()?;
    if targets.len() != rows {
        bail!("{} targets for {rows} rows", targets.len())
    }
    if logits.layout().start_offset() != 0 {
        bail!("logits stand where their memory begins")
    }
    assert!(targets.iter().all(|&t| (t as usize) < vocabulary), "target outside the vocabulary");
    let targets = Tensor::new(targets, logits.device())?;
    let losses = unset_of(DType::F32, rows, logits.device())?;
    let (kind, objective) = match gradients {
        Gradients::Skip => ("cross_entropy_losses", Objective::scaled(0.0)),
        Gradients::Of(objective) => ("cross_entropy_learn", objective),
    };
    let name = format!("{}_{}", typed(kind, &logits), neighbours(vocabulary));
    let operands = [
        Operand::Change(&logits),
        Operand::Read(&targets),
        Operand::Set(&losses),
        Operand::Word(vocabulary),
        Operand::Float(objective.scale),
        Operand::Float(objective.z_loss),
    ];
    let kernel = Kernel { threads: LOSS_THREADS, ..Kernel::new("cross_entropy", &name, [rows, 1]) };
    // SAFETY: shapes, types and targets were checked; there is a block of threads for each row.
    unsafe { kernel.launch(machine, &operands) }?;
    Ok((losses, (gradients != Gradients::Skip).then_some(logits)))
}
