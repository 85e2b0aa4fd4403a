//! Gradients by the names of their parameters.

use crate::kernels::cuda::training::is_emulated;
use crate::kernels::storage::clear;
use candle_core::{D, DType, Device, Result, Tensor, bail};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// Gradients by parameter name, in f32 or wider.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    by_name: BTreeMap<String, Tensor>,
}

impl Gradients {
    /// Adds the gradient of one parameter.
    pub fn add(&mut self, name: &str, gradient: Tensor) -> Result<()> {
        let gradient = match gradient.dtype() {
            DType::F32 | DType::F64 => gradient,
            _ => {
                let exact = gradient.to_dtype(DType::F32)?;
                drop(gradient); // it need not be there while a sum is made
                exact
            }
        };
        match self.by_name.get_mut(name) {
            Some(sum) => *sum = (&*sum + gradient)?,
            None => drop(self.by_name.insert(name.to_owned(), gradient)),
        }
        Ok(())
    }

    /// Zeros for every parameter, in f32 on the CPU.
    pub(crate) fn zeros(parameters: &[(String, Vec<usize>)]) -> Result<Self> {
        let zero = |(name, shape): &(String, Vec<usize>)| {
            Ok((name.clone(), Tensor::zeros(shape.as_slice(), DType::F32, &Device::Cpu)?))
        };
        Ok(Gradients { by_name: parameters.iter().map(zero).collect::<Result<_>>()? })
    }

    /// Zeros for those of `parameters` that have none, for a model with weights like `weight`.
    pub(super) fn complete(
        &mut self,
        parameters: Vec<(String, Vec<usize>)>,
        weight: &Tensor,
    ) -> Result<()> {
        let exact = if weight.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        for (name, shape) in parameters {
            if let Entry::Vacant(vacant) = self.by_name.entry(name) {
                vacant.insert(Tensor::zeros(shape, exact, weight.device())?);
            }
        }
        Ok(())
    }

    /// Sets all to zero, in their memory.
    pub(crate) fn clear(&mut self) -> Result<()> {
        self.by_name.values().try_for_each(clear)
    }

    /// The gradient of one parameter, which is there.
    pub(crate) fn of(&self, name: &str) -> Result<&Tensor> {
        match self.by_name.get(name) {
            Some(gradient) => Ok(gradient),
            None => bail!("parameter {name:?} has no gradient"),
        }
    }

    /// The gradient of each of `parameters` as a flat tensor in its memory: zeros on `device` where there is none.
    pub(crate) fn flat(
        &mut self,
        parameters: &[(String, Vec<usize>)],
        device: &Device,
    ) -> Result<Vec<Tensor>> {
        let flat = |(name, shape): &(String, Vec<usize>)| {
            let whole = match self.by_name.get(name) {
                Some(gradient) => gradient.contiguous()?,
                None => Tensor::zeros(shape.as_slice(), DType::F32, device)?,
            };
            let flat = whole.flatten_all()?;
            self.by_name.insert(name.clone(), whole);
            Ok(flat)
        };
        parameters.iter().map(flat).collect()
    }

    /// The gradients in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.by_name.iter().map(|(name, gradient)| (name.as_str(), gradient))
    }

    /// The gradient of one parameter.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name)
    }

    /// The Euclidean norm of all gradients together, summed in the order of names.
    pub fn norm(&self) -> Result<f64> {
        let mut total = 0.0;
        for gradient in self.by_name.values() {
            total += sum_of_squares(gradient)?;
        }
        Ok(total.sqrt())
    }
}

/// On a CPU in blocks of fixed size and in f64, elsewhere in f32.
pub(super) fn sum_of_squares(tensor: &Tensor) -> Result<f64> {
    if !tensor.device().is_cpu() || is_emulated() {
        // Rows first: the sum of all in one go would be that of one block of threads.
        let rows = tensor.sqr()?.sum(D::Minus1)?;
        // Of a vector that is a number already, which a GPU has no dimensions to sum over.
        let total = if rows.rank() == 0 { rows } else { rows.sum_all()? };
        return total.to_dtype(DType::F64)?.to_scalar();
    }
    let flat = tensor.flatten_all()?.contiguous()?;
    crate::kernels::sum_of_squares(&flat)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_gradient_is_the_gradient_itself_and_zero_where_there_is_none() {
        let row = Tensor::new(&[[1f32, 2.0, 3.0]], &Device::Cpu).unwrap();
        let mut gradients = Gradients::default();
        gradients.add("a", row.broadcast_as((2, 3)).unwrap()).unwrap(); // not contiguous
        let parameters = [("a".to_owned(), vec![2, 3]), ("b".to_owned(), vec![4])];
        let flat = gradients.flat(&parameters, &Device::Cpu).unwrap();
        flat[0].slice_set(&Tensor::new(&[9f32], &Device::Cpu).unwrap(), 0, 4).unwrap();
        let a: Vec<Vec<f32>> = gradients.of("a").unwrap().to_vec2().unwrap();
        assert_eq!(a, [[1.0, 2.0, 3.0], [1.0, 9.0, 3.0]]);
        assert_eq!(gradients.of("b").unwrap().to_vec1::<f32>().unwrap(), [0.0; 4]);
    }
}
