//! Linear operations of a model in training on a CPU: `y = x W^T`, and both of its gradients.
//!
//! ```text
//! of x  =  sum over outputs of (of y) W          of W  +=  (of y)^T x
//! ```
//!
//! In f32 these are products of the matrices as they stand, or, where that is faster, of three parts of bf16 each (`bf16x3`). In
//! bf16 both sides are rounded when they meet and sums stay in f32, as in mixed-precision training (Micikevicius et
//! al., 2018; arXiv 1710.03740). Weights that are rounded or split are laid out for both directions whenever they have moved,
//! and kept, or laid out whenever they are used, for memory.

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
    /// What products are computed in.
    kind: WeightType,
    kept: Option<Box<LaidOut>>,
}

/// When a weight is laid out, if it has to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Layout {
    /// Whenever it has moved. It takes its memory once more in each direction.
    Kept,
    /// Whenever it is used.
    AtUse,
}

/// A weight in the words of its products.
#[derive(Debug, Default)]
struct LaidOut {
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
    /// A weight that is laid out at use.
    weight: PackedWeight,
}

/// An output of an operation on its way back.
pub(crate) struct Branch<'a> {
    pub(crate) weight: &'a Weight,
    /// Gradient of the output, `(rows, out)`.
    pub(crate) of_output: &'a [f32],
    /// Where the gradient of the weight goes, `(out, in)`.
    pub(crate) of_weight: &'a Tensor,
    /// What becomes of what is there.
    pub(crate) into: Into,
}

/// So much of a buffer that is used again and again, and grows to what is wanted at most.
pub(crate) fn sized(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    buffer.reserve_exact(length.saturating_sub(buffer.len()));
    buffer.resize(length, 0.0);
    buffer
}

impl Weight {
    /// A weight whose products are computed in `kind`.
    pub(crate) fn new(value: Tensor, kind: WeightType, layout: Layout) -> Result<Self> {
        let (outputs, inputs) = value.dims2()?;
        let is_kept = kind != WeightType::F32 && layout == Layout::Kept;
        let kept = is_kept.then(Box::default);
        let mut weight = Weight { value, outputs, inputs, kind, kept };
        weight.follow()?;
        Ok(weight)
    }

    /// Follows the parameter, which has moved.
    pub(crate) fn follow(&mut self) -> Result<()> {
        let Some(kept) = &mut self.kept else { return Ok(()) };
        let value = elements::<f32>(&self.value)?;
        let value = View::rows(&value, self.outputs, self.inputs, self.inputs);
        kept.forward.set_both(&mut kept.back, self.kind, value);
        Ok(())
    }

    /// The weight in `memory`, where `lay_out` puts it.
    fn at_use<'a>(
        &self,
        memory: &'a mut PackedWeight,
        lay_out: impl FnOnce(&mut PackedWeight, WeightType, View<'_, f32>),
    ) -> Result<&'a PackedWeight> {
        let value = elements::<f32>(&self.value)?;
        lay_out(memory, self.kind, View::rows(&value, self.outputs, self.inputs, self.inputs));
        Ok(memory)
    }

    /// What rows of inputs are multiplied with.
    fn forward<'a>(&'a self, memory: &'a mut PackedWeight) -> Result<&'a PackedWeight> {
        match &self.kept {
            Some(kept) => Ok(&kept.forward),
            None => self.at_use(memory, PackedWeight::set_rows),
        }
    }

    /// What gradients of outputs are multiplied with.
    fn back<'a>(&'a self, memory: &'a mut PackedWeight) -> Result<&'a PackedWeight> {
        match &self.kept {
            Some(kept) => Ok(&kept.back),
            None => self.at_use(memory, PackedWeight::set_columns),
        }
    }

    /// Number of outputs.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Number of inputs.
    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }
}

/// `out = x W^T` for some weights with the same inputs.
pub(crate) fn forward<const COUNT: usize>(
    parts: [(&Weight, &mut [f32]); COUNT],
    x: &[f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let Weight { inputs, kind, .. } = *parts[0].0;
    if kind == WeightType::F32 {
        return parts.into_iter().try_for_each(|(w, out)| plain_forward(w, x, out, Into::Set));
    }
    let Scratch { rows, weight: memory, .. } = scratch;
    rows.set(kind, x, x.len() / inputs, inputs);
    if parts.iter().all(|(weight, _)| weight.kept.is_some()) {
        let parts = parts.map(|(weight, out)| {
            let kept = weight.kept.as_ref().expect("as was asked");
            (&kept.forward, out)
        });
        product::set(parts, rows);
        return Ok(());
    }
    for (weight, out) in parts {
        product::set([(weight.forward(memory)?, out)], rows);
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
    if weight.kind == WeightType::F32 {
        return plain_forward(weight, x, out, Into::Add);
    }
    let Scratch { rows, weight: memory, .. } = scratch;
    rows.set(weight.kind, x, x.len() / weight.inputs, weight.inputs);
    product::add(weight.forward(memory)?, rows, out);
    Ok(())
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
    match branches[0].weight.kind {
        WeightType::F32 => plain_backward(branches, x, of_x),
        kind => laid_out_backward(kind, branches, x, of_x, scratch),
    }
}

fn plain_backward(branches: &[Branch<'_>], x: View<'_, f32>, of_x: &mut [f32]) -> Result<()> {
    let (count, inputs) = (x.rows, x.columns);
    for (index, Branch { weight, of_output, of_weight, into: own }) in branches.iter().enumerate() {
        let outputs = weight.outputs;
        let of_output = View::rows(of_output, count, outputs, outputs);
        let value = elements::<f32>(&weight.value)?;
        let value = View::rows(&value, outputs, inputs, inputs);
        let into = if index == 0 { Into::Set } else { Into::Add };
        multiply_parallel(of_x, inputs, of_output, value, into);
        change(of_weight, |sum| {
            multiply_parallel(sum, inputs, of_output.transposed(), x, *own);
        })?;
    }
    Ok(())
}

fn laid_out_backward(
    kind: WeightType,
    branches: &[Branch<'_>],
    x: View<'_, f32>,
    of_x: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let Scratch { rows, turned, panels, weight: memory } = scratch;
    turned.set_columns(kind, x);
    for (index, Branch { weight, of_output, of_weight, into }) in branches.iter().enumerate() {
        let of_output = View::rows(of_output, x.rows, weight.outputs, weight.outputs);
        rows.set_with_panels(kind, of_output, panels);
        let back = weight.back(memory)?;
        match index {
            0 => product::set([(back, &mut *of_x)], rows),
            _ => product::add(back, rows, of_x),
        }
        change(of_weight, |sum| match into {
            Into::Set => product::set_turned(panels, turned, sum),
            Into::Add => product::add_turned(panels, turned, sum),
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::storage::tensor;
    use super::super::twin::{close, random};
    use super::*;
    use candle_core::DType;

    const KINDS: [(WeightType, Layout); 4] = [
        (WeightType::F32, Layout::Kept),
        (WeightType::Bf16, Layout::Kept),
        (WeightType::Bf16x3, Layout::Kept),
        (WeightType::Bf16x3, Layout::AtUse),
    ];

    fn check(
        count: usize,
        inputs: usize,
        outputs: [usize; 2],
        (kind, layout): (WeightType, Layout),
    ) {
        let round = |t: &Tensor| match kind {
            WeightType::F32 | WeightType::Bf16x3 => t.clone(),
            _ => t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap(),
        };
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let x = random(&[count, inputs], DType::F32);
        let values = outputs.map(|outputs| random(&[outputs, inputs], DType::F32));
        let weights =
            values.each_ref().map(|value| Weight::new(value.clone(), kind, layout).unwrap());
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
            into: [Into::Add, Into::Set][i],
        });
        let mut of_x = vec![0.0; count * inputs];
        backward(&branches, &flat(&x), &mut of_x, &mut scratch).unwrap();
        let part = |i: usize| round(&of_outputs[i]).matmul(&round(&values[i])).unwrap();
        let of_x = tensor(of_x, (count, inputs)).unwrap();
        close(&of_x, &(part(0) + part(1)).unwrap(), "gradient of the input");
        for ((sum, of_output), before) in sums.iter().zip(&of_outputs).zip([1.0, 0.0]) {
            let exact = round(of_output).t().unwrap().matmul(&round(&x)).unwrap();
            close(sum, &(exact + before).unwrap(), "gradient of a weight");
        }
    }

    #[test]
    fn outputs_and_gradients_are_those_of_plain_products() {
        for kind in KINDS {
            check(1, 1, [1, 2], kind);
            check(7, 33, [5, 40], kind);
            check(96, 64, [64, 32], kind);
            check(417, 40, [70, 8], kind);
        }
    }

    /// Bits of outputs and gradients of a product with `outputs` outputs, where memory held `held` before.
    fn bits(kind: (WeightType, Layout), held: f32, threads: usize) -> Vec<u32> {
        let (count, inputs, outputs) = (150, 72, 100);
        let values = |seed: usize, count: usize| -> Vec<f32> {
            (0..count).map(|i| ((i * 37 + seed) % 101) as f32 / 50.5 - 1.0).collect()
        };
        let value = tensor(values(1, outputs * inputs), (outputs, inputs)).unwrap();
        let sum = value.ones_like().unwrap();
        let (x, of_output) = (values(2, count * inputs), values(3, count * outputs));
        let (mut out, mut of_x) = (vec![0.0; count * outputs], vec![0.0; count * inputs]);
        let mut scratch = Scratch::default();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let weight = Weight::new(value, kind.0, kind.1).unwrap();
            let branch =
                |of_output| Branch { weight: &weight, of_output, of_weight: &sum, into: Into::Set };
            let (before, before_x) = (vec![held; 2 * out.len()], vec![held; 2 * x.len()]);
            let (mut of_before, mut out_before) = (before_x.clone(), before.clone());
            backward(&[branch(&before)], &before_x, &mut of_before, &mut scratch).unwrap();
            forward([(&weight, &mut out_before[..])], &before_x, &mut scratch).unwrap();
            backward(&[branch(&of_output)], &x, &mut of_x, &mut scratch).unwrap();
            forward([(&weight, &mut out[..])], &x, &mut scratch).unwrap();
        });
        let sum = sum.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        out.iter().chain(&of_x).chain(&sum).map(|x| x.to_bits()).collect()
    }

    #[test]
    fn results_depend_neither_on_threads_nor_on_what_memory_held() {
        for kind in KINDS {
            let once = bits(kind, 0.0, 1);
            for (held, threads) in [(f32::NAN, 1), (f32::INFINITY, 2), (1.0, 3), (f32::NAN, 7)] {
                assert!(bits(kind, held, threads) == once, "{kind:?}, {held}, {threads} threads");
            }
        }
    }

    #[test]
    fn a_weight_follows_its_parameter() {
        let value = random(&[40, 24], DType::F32);
        let mut weight = Weight::new(value.clone(), WeightType::Bf16, Layout::Kept).unwrap();
        change(&value, |value| value.fill(0.5)).unwrap();
        weight.follow().unwrap();
        let mut out = vec![0.0; 40];
        forward([(&weight, out.as_mut_slice())], &[1.0; 24], &mut Scratch::default()).unwrap();
        assert_eq!(out, [12.0; 40]);
    }
}
