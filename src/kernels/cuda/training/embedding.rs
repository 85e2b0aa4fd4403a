//! The gradient that flows back into the embedding table.

use super::{Kernel, blocks, laid_out, neighbours, typed};
use crate::kernels::cuda::machine::{Machine, Operand};
use candle_core::{DType, Result, Tensor, bail};

/// As [`crate::kernels::embedding::embed_backward`], in f32.
pub(crate) fn embed_backward(
    machine: &dyn Machine,
    gradient: &Tensor,
    ids: &[u32],
    vocabulary: usize,
) -> Result<Tensor> {
    let (rows, columns) = gradient.dims2()?;
    if ids.len() != rows || ids.iter().any(|&id| id as usize >= vocabulary) {
        bail!("{} ids below {vocabulary} for {rows} rows were wanted", ids.len())
    }
    let device = gradient.device();
    let out = Tensor::zeros((vocabulary, columns), DType::F32, device)?;
    if rows == 0 || columns == 0 {
        return Ok(out);
    }
    let Groups { order, ids, starts } = Groups::new(ids);
    let groups = ids.len();
    let [order, ids, starts] = [order, ids, starts].map(|words| Tensor::new(words, device));
    let (order, ids, starts) = (order?, ids?, starts?);
    let gradient = laid_out(gradient)?;
    let each = neighbours(columns);
    let name = format!("{}_{each}", typed("embedding_gradient", &gradient));
    let operands = [
        Operand::Read(&gradient),
        Operand::Read(&order),
        Operand::Read(&ids),
        Operand::Read(&starts),
        Operand::Change(&out),
        Operand::Word(columns),
    ];
    let kernel = Kernel::new("embedding_gradient", &name, [groups, blocks(columns, each)]);
    // SAFETY: `order` names each row once, `ids` each row of `out` at most once; there are threads for all columns.
    unsafe { kernel.launch(machine, &operands) }?;
    Ok(out)
}

/// Rows by token id.
#[derive(Debug, PartialEq)]
struct Groups {
    /// Rows, those of one id together and in their order.
    order: Vec<u32>,
    /// The id of each group, ascending.
    ids: Vec<u32>,
    /// Where each group begins, and the end of the last.
    starts: Vec<u32>,
}

impl Groups {
    fn new(of_rows: &[u32]) -> Self {
        let mut order: Vec<u32> = (0..of_rows.len() as u32).collect();
        order.sort_by_key(|&row| of_rows[row as usize]);
        let (mut ids, mut starts) = (Vec::new(), Vec::new());
        for (place, &row) in order.iter().enumerate() {
            let id = of_rows[row as usize];
            if ids.last() != Some(&id) {
                ids.push(id);
                starts.push(place as u32);
            }
        }
        starts.push(order.len() as u32);
        Groups { order, ids, starts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(ids: &[u32], order: &[u32], distinct: &[u32], starts: &[u32]) {
        let [order, ids_found, starts] = [order, distinct, starts].map(<[u32]>::to_vec);
        assert_eq!(Groups::new(ids), Groups { order, ids: ids_found, starts });
    }

    #[test]
    fn rows_of_an_id_stay_in_their_order() {
        check(&[], &[], &[], &[0]);
        check(&[4], &[0], &[4], &[0, 1]);
        check(&[7, 0, 7, 3, 0, 7], &[1, 4, 3, 0, 2, 5], &[0, 3, 7], &[0, 2, 3, 6]);
    }
}
