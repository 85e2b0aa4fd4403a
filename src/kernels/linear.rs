//! Linear operations of a model in training on a CPU: `y = x W^T`, and both of its gradients.
//!
//! ```text
//! of x  =  sum over outputs of (of y) W          of W  +=  (of y)^T x
//! ```
//!
//! In f32 these are products of the matrices as they stand. In bf16 both sides are rounded when they meet and
//! sums stay in f32, as in mixed-precision training (Micikevicius et al., 2018; arXiv 1710.03740); weights are
//! laid out for both directions whenever they have moved.

use super::matmul::{Into, View, multiply_parallel};
use super::packed::{PackedWeight, WeightType};
use super::product;
use super::rows::Rows;
use super::storage::{change, elements};
use candle_core::{Result, Tensor};

/// A weight `(out, in)`.
#[derive(Debug)]
pub(crate) struct Weight {
    /// In f32; its memory is that of the parameter.
    value: Tensor,
    outputs: usize,
    inputs: usize,
    rounded: Option<Box<Rounded>>,
}

/// A weight in bf16.
#[derive(Debug, Default)]
struct Rounded {
    /// `(out, in)`: from inputs to outputs.
    forward: PackedWeight,
    /// `(in, out)`: back.
    back: PackedWeight,
}

/// Memory that operations use one after the other.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    rows: Rows,
    /// Columns of inputs.
    turned: Rows,
    /// Columns of gradients of outputs.
    panels: PackedWeight,
}

/// An output of an operation on its way back.
pub(crate) struct Branch<'a> {
    pub(crate) weight: &'a Weight,
    /// Gradient of the output, `(rows, out)`.
    pub(crate) of_output: &'a [f32],
    /// What the gradient of the weight is added to, `(out, in)`.
    pub(crate) of_weight: &'a Tensor,
}

/// So much of a buffer that is used again and again, and grows to what is wanted at most.
pub(crate) fn sized(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    buffer.reserve_exact(length.saturating_sub(buffer.len()));
    buffer.resize(length, 0.0);
    buffer
}

impl Weight {
    /// A weight whose products are computed in `kind`: f32 or bf16.
    pub(crate) fn new(value: Tensor, kind: WeightType) -> Result<Self> {
        let (outputs, inputs) = value.dims2()?;
        let rounded = (kind == WeightType::Bf16).then(Box::default);
        let mut weight = Weight { value, outputs, inputs, rounded };
        weight.follow()?;
        Ok(weight)
    }

    /// Follows the parameter, which has moved.
    pub(crate) fn follow(&mut self) -> Result<()> {
        if let Some(rounded) = &mut self.rounded {
            let value = elements::<f32>(&self.value)?;
            let value = View::rows(&value, self.outputs, self.inputs, self.inputs);
            rounded.forward.set_rows(WeightType::Bf16, value);
            rounded.back.set_columns(WeightType::Bf16, value);
        }
        Ok(())
    }

    /// Number of outputs.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Number of inputs.
    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    fn rounded(&self) -> &Rounded {
        self.rounded.as_ref().expect("weights that meet are of one type")
    }
}

/// `out = x W^T` for some weights with the same inputs.
pub(crate) fn forward<const COUNT: usize>(
    parts: [(&Weight, &mut [f32]); COUNT],
    x: &[f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let inputs = parts[0].0.inputs;
    let count = x.len() / inputs;
    if parts[0].0.rounded.is_some() {
        scratch.rows.set(WeightType::Bf16, x, count, inputs);
        let parts = parts.map(|(weight, out)| (&weight.rounded().forward, out));
        product::set(parts, &scratch.rows);
        return Ok(());
    }
    for (weight, out) in parts {
        plain_forward(weight, x, out, Into::Set)?;
    }
    Ok(())
}

/// `out += x W^T`.
pub(crate) fn forward_add(
    weight: &Weight,
    x: &[f32],
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    if let Some(rounded) = &weight.rounded {
        scratch.rows.set(WeightType::Bf16, x, x.len() / weight.inputs, weight.inputs);
        product::add(&rounded.forward, &scratch.rows, out);
        return Ok(());
    }
    plain_forward(weight, x, out, Into::Add)
}

fn plain_forward(weight: &Weight, x: &[f32], out: &mut [f32], into: Into) -> Result<()> {
    let value = elements::<f32>(&weight.value)?;
    let value = View::rows(&value, weight.outputs, weight.inputs, weight.inputs);
    let x = View::rows(x, x.len() / weight.inputs, weight.inputs, weight.inputs);
    multiply_parallel(out, weight.outputs, x, value.transposed(), into);
    Ok(())
}

/// The gradient of `x (rows, in)`, which all branches had as their input, and those of their weights.
pub(crate) fn backward(
    branches: &[Branch<'_>],
    x: &[f32],
    of_x: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let inputs = branches[0].weight.inputs;
    let x = View::rows(x, x.len() / inputs, inputs, inputs);
    match branches[0].weight.rounded {
        Some(_) => rounded_backward(branches, x, of_x, scratch),
        None => plain_backward(branches, x, of_x),
    }
}

fn plain_backward(branches: &[Branch<'_>], x: View<'_, f32>, of_x: &mut [f32]) -> Result<()> {
    let (count, inputs) = (x.rows, x.columns);
    for (index, Branch { weight, of_output, of_weight }) in branches.iter().enumerate() {
        let outputs = weight.outputs;
        let of_output = View::rows(of_output, count, outputs, outputs);
        let value = elements::<f32>(&weight.value)?;
        let value = View::rows(&value, outputs, inputs, inputs);
        let into = if index == 0 { Into::Set } else { Into::Add };
        multiply_parallel(of_x, inputs, of_output, value, into);
        change(of_weight, |sum| {
            multiply_parallel(sum, inputs, of_output.transposed(), x, Into::Add);
        })?;
    }
    Ok(())
}

fn rounded_backward(
    branches: &[Branch<'_>],
    x: View<'_, f32>,
    of_x: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let Scratch { rows, turned, panels } = scratch;
    turned.set_columns(WeightType::Bf16, x);
    for (index, Branch { weight, of_output, of_weight }) in branches.iter().enumerate() {
        let of_output = View::rows(of_output, x.rows, weight.outputs, weight.outputs);
        rows.set_with_panels(WeightType::Bf16, of_output, panels);
        let back = &weight.rounded().back;
        match index {
            0 => product::set([(back, &mut *of_x)], rows),
            _ => product::add(back, rows, of_x),
        }
        change(of_weight, |sum| product::add_turned(panels, turned, sum))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::storage::tensor;
    use super::super::twin::{close, random};
    use super::*;
    use candle_core::DType;

    fn check(count: usize, inputs: usize, outputs: [usize; 2], kind: WeightType) {
        let round = |t: &Tensor| match kind {
            WeightType::F32 => t.clone(),
            _ => t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap(),
        };
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let x = random(&[count, inputs], DType::F32);
        let values = outputs.map(|outputs| random(&[outputs, inputs], DType::F32));
        let weights = values.each_ref().map(|value| Weight::new(value.clone(), kind).unwrap());
        let mut scratch = Scratch::default();

        let [mut left, mut right] = outputs.map(|outputs| vec![0.0; count * outputs]);
        let parts = [(&weights[0], left.as_mut_slice()), (&weights[1], right.as_mut_slice())];
        forward(parts, &flat(&x), &mut scratch).unwrap();
        forward_add(&weights[1], &flat(&x), &mut right, &mut scratch).unwrap();
        let exact = |i: usize| round(&x).matmul(&round(&values[i]).t().unwrap()).unwrap();
        close(&tensor(left, (count, outputs[0])).unwrap(), &exact(0), "output");
        let twice = (exact(1) * 2.0).unwrap();
        close(&tensor(right, (count, outputs[1])).unwrap(), &twice, "output added");

        let of_outputs = outputs.map(|outputs| random(&[count, outputs], DType::F32));
        let sums = values.each_ref().map(|value| value.ones_like().unwrap());
        let slices = of_outputs.each_ref().map(flat);
        let branches: [Branch<'_>; 2] = std::array::from_fn(|i| Branch {
            weight: &weights[i],
            of_output: &slices[i],
            of_weight: &sums[i],
        });
        let mut of_x = vec![0.0; count * inputs];
        backward(&branches, &flat(&x), &mut of_x, &mut scratch).unwrap();
        let part = |i: usize| round(&of_outputs[i]).matmul(&round(&values[i])).unwrap();
        let of_x = tensor(of_x, (count, inputs)).unwrap();
        close(&of_x, &(part(0) + part(1)).unwrap(), "gradient of the input");
        for (sum, of_output) in sums.iter().zip(&of_outputs) {
            let exact = round(of_output).t().unwrap().matmul(&round(&x)).unwrap();
            close(sum, &(exact + 1.0).unwrap(), "gradient of a weight");
        }
    }

    #[test]
    fn outputs_and_gradients_are_those_of_plain_products() {
        for kind in [WeightType::F32, WeightType::Bf16] {
            check(1, 1, [1, 2], kind);
            check(7, 33, [5, 40], kind);
            check(96, 64, [64, 32], kind);
            check(417, 40, [70, 8], kind);
        }
    }

    #[test]
    fn a_weight_follows_its_parameter() {
        let value = random(&[40, 24], DType::F32);
        let mut weight = Weight::new(value.clone(), WeightType::Bf16).unwrap();
        change(&value, |value| value.fill(0.5)).unwrap();
        weight.follow().unwrap();
        let mut out = vec![0.0; 40];
        forward([(&weight, out.as_mut_slice())], &[1.0; 24], &mut Scratch::default()).unwrap();
        assert_eq!(out, [12.0; 40]);
    }
}
