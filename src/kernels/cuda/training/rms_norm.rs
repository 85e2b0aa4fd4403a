//! Root mean square normalisation, forward and backward.

use super::{Kernel, THREADS, expect_alike, laid_out, neighbours, typed, unset, unset_of};
use crate::kernels::cuda::machine::{Machine, Operand};
use candle_core::{D, DType, Result, Tensor, bail};

/// Rows whose part of the gradient of the weight is summed by itself: `ROWS_PER_PART` in rms_norm_backward.cu.
const ROWS_PER_PART: usize = 64;

/// As [`crate::kernels::rms_norm::rms_norm`].
pub(crate) fn rms_norm(
    machine: &dyn Machine,
    x: &Tensor,
    weight: &Tensor,
    epsilon: f64,
) -> Result<Tensor> {
    let [rows, columns] = shape(x, weight)?;
    let (x, weight) = (laid_out(x)?, laid_out(weight)?);
    let out = unset(x.shape(), &x)?;
    let name = format!("{}_{}", typed("rms_norm_forward", &x), neighbours(columns));
    let operands = [
        Operand::Read(&x),
        Operand::Read(&weight),
        Operand::Set(&out),
        Operand::Word(columns),
        Operand::Float(epsilon),
    ];
    // SAFETY: shapes and types were checked; there is a block of threads for each row.
    unsafe { Kernel::new("rms_norm", &name, [rows, 1]).launch(machine, &operands) }?;
    Ok(out)
}

/// As [`crate::kernels::rms_norm::rms_norm_backward`]; the gradient of the weight is f32.
pub(crate) fn rms_norm_backward(
    machine: &dyn Machine,
    x: &Tensor,
    weight: &Tensor,
    epsilon: f64,
    gradient: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let [rows, columns] = shape(x, weight)?;
    expect_alike(&[x, gradient])?;
    if x.dims() != gradient.dims() {
        bail!("a gradient of {:?} for rows of {:?}", gradient.dims(), x.dims())
    }
    let (x, weight, gradient) = (laid_out(x)?, laid_out(weight)?, laid_out(gradient)?);
    let (of_x, scales) = (unset(x.shape(), &x)?, unset_of(DType::F32, rows, x.device())?);
    let name = format!("{}_{}", typed("rms_norm_backward", &x), neighbours(columns));
    let operands = [
        Operand::Read(&x),
        Operand::Read(&weight),
        Operand::Read(&gradient),
        Operand::Set(&of_x),
        Operand::Set(&scales),
        Operand::Word(columns),
        Operand::Float(epsilon),
    ];
    // SAFETY: shapes and types were checked; there is a block of threads for each row.
    unsafe { Kernel::new("rms_norm_backward", &name, [rows, 1]).launch(machine, &operands) }?;
    Ok((of_x, of_weight(machine, &x, &gradient, &scales)?))
}

/// Sums `gradient * x * scale` over the rows, part by part.
fn of_weight(
    machine: &dyn Machine,
    x: &Tensor,
    gradient: &Tensor,
    scales: &Tensor,
) -> Result<Tensor> {
    let (rows, columns) = (scales.elem_count(), x.dim(D::Minus1)?);
    let count = rows.div_ceil(ROWS_PER_PART);
    let parts = unset_of(DType::F32, (count, columns), x.device())?;
    let across = columns.div_ceil(THREADS as usize);
    let operands = [
        Operand::Read(x),
        Operand::Read(gradient),
        Operand::Read(scales),
        Operand::Set(&parts),
        Operand::Word(rows),
        Operand::Word(columns),
    ];
    let name = typed("rms_norm_parts", x);
    let kernel = Kernel::new("rms_norm_backward", &name, [across, count]);
    // SAFETY: `x` and `gradient` have a row for each of `scales`; there are threads for each column of each part.
    unsafe { kernel.launch(machine, &operands) }?;
    let out = unset_of(DType::F32, columns, x.device())?;
    let operands =
        [Operand::Read(&parts), Operand::Set(&out), Operand::Word(count), Operand::Word(columns)];
    let kernel = Kernel::new("rms_norm_backward", "rms_norm_weight", [across, 1]);
    // SAFETY: there are threads for each column.
    unsafe { kernel.launch(machine, &operands) }?;
    Ok(out)
}

/// Rows and columns.
fn shape(x: &Tensor, weight: &Tensor) -> Result<[usize; 2]> {
    expect_alike(&[x, weight])?;
    let columns = x.dim(D::Minus1)?;
    if weight.dims() != [columns] || columns == 0 {
        bail!("a weight of {:?} for rows of {columns} columns", weight.dims())
    }
    Ok([x.elem_count() / columns, columns])
}
