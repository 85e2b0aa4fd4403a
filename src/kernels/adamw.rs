//! Adam with decoupled weight decay, in place (Loshchilov and Hutter, 2019; arXiv 1711.05101).

use super::cuda::training;
use super::real::simd;
use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;

const ELEMENTS_PER_TASK: usize = 1 << 15;

/// The rates of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Learning rate.
    pub rate: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub epsilon: f64,
    /// Decoupled weight decay; zero for parameters that take none.
    pub decay: f64,
    /// Updates done, this one included: 1 for the first.
    pub step: u64,
    /// Factor on the gradient: the clipping of its norm.
    pub gradient_scale: f64,
}

/// The rates of one update in f32, as kernels use them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factors {
    /// On the mean of gradients.
    pub(crate) beta1: f32,
    /// On the mean of squared gradients.
    pub(crate) beta2: f32,
    /// On a new gradient in its mean.
    pub(crate) new1: f32,
    /// On its square.
    pub(crate) new2: f32,
    /// What undoes the bias of the mean.
    pub(crate) correct1: f32,
    /// What undoes that of the mean square.
    pub(crate) correct2: f32,
    /// On the value: what decay leaves of it.
    pub(crate) keep: f32,
    /// On the change.
    pub(crate) rate: f32,
    /// Added to the root of the mean square.
    pub(crate) epsilon: f32,
    /// On the gradient.
    pub(crate) scale: f32,
}

/// One parameter with its optimizer state, in f32.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// `(3, elements)` of value, mean and mean square.
    state: Tensor,
    shape: candle_core::Shape,
    /// The value in the type of the computation, where that is another one.
    copy: Option<Tensor>,
}

impl Parameter {
    /// A parameter with the given initial value and no history.
    pub fn new(value: &Tensor) -> Result<Self> {
        let flat = value.to_dtype(DType::F32)?.flatten_all()?;
        let zeros = flat.zeros_like()?;
        let state = Tensor::stack(&[&flat, &zeros, &zeros], 0)?;
        Ok(Parameter { state, shape: value.shape().clone(), copy: None })
    }

    /// The value: shares its memory with the parameter, so that it follows every update.
    pub fn value(&self) -> Result<Tensor> {
        self.state.get(0)?.reshape(self.shape.clone())
    }

    /// The value in `dtype`, which follows every update: in f32 itself, otherwise a copy.
    ///
    /// # Errors
    /// If there is a copy in another type already, or the device fails.
    pub fn computed_in(&mut self, dtype: DType) -> Result<Tensor> {
        if dtype == DType::F32 {
            return self.value();
        }
        match &self.copy {
            Some(copy) if copy.dtype() == dtype => Ok(copy.clone()),
            Some(copy) => bail!("the parameter has a copy in {:?}", copy.dtype()),
            None => {
                let copy = self.value()?.to_dtype(dtype)?;
                self.copy = Some(copy.clone());
                Ok(copy)
            }
        }
    }

    /// Mean and mean square of past gradients, in the shape of the value.
    pub fn moments(&self) -> Result<(Tensor, Tensor)> {
        let moment = |i| self.state.get(i)?.reshape(self.shape.clone());
        Ok((moment(1)?, moment(2)?))
    }

    /// Restores mean and mean square.
    pub fn set_moments(&self, mean: &Tensor, mean_square: &Tensor) -> Result<()> {
        for (row, moment) in [(1, mean), (2, mean_square)] {
            let flat = moment.to_dtype(DType::F32)?.reshape((1, self.shape.elem_count()))?;
            self.state.slice_set(&flat.contiguous()?, 0, row)?;
        }
        Ok(())
    }

    /// Moves the value against `gradient`, which has its shape, and the copy with it.
    pub fn update(&self, gradient: &Tensor, update: &Update) -> Result<()> {
        let gradient = gradient.to_dtype(DType::F32)?.flatten_all()?.contiguous()?;
        let mut copy = self.copy.as_ref();
        match training::machine(&self.state)? {
            Some(machine) => {
                let written = copy.take_if(|copy| copy.dtype() == DType::BF16);
                training::adamw(&*machine, (&self.state, written), &gradient, update)?;
            }
            None if self.state.device().is_cpu() => self.state.inplace_op2(&gradient, update)?,
            None => self.update_composed(&gradient, update)?,
        }
        let Some(copy) = copy else { return Ok(()) };
        copy.slice_set(&self.value()?.to_dtype(copy.dtype())?, 0, 0)
    }

    fn update_composed(&self, gradient: &Tensor, update: &Update) -> Result<()> {
        let Update { rate, beta1, beta2, epsilon, decay, gradient_scale, .. } = *update;
        let row = |i| self.state.get(i)?.copy();
        let gradient = (gradient * gradient_scale)?;
        let mean = ((row(1)? * beta1)? + (&gradient * (1.0 - beta1))?)?;
        let mean_square = ((row(2)? * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
        let (correct1, correct2) = update.corrections();
        let change = ((&mean * correct1)? / ((&mean_square * correct2)?.sqrt()? + epsilon)?)?;
        let value = ((row(0)? * (1.0 - rate * decay))? - (change * rate)?)?;
        for (i, new) in [value, mean, mean_square].iter().enumerate() {
            self.state.slice_set(&new.unsqueeze(0)?, 0, i)?;
        }
        Ok(())
    }
}

impl Update {
    /// What undoes the bias of the two means towards their start at zero.
    fn corrections(&self) -> (f64, f64) {
        let step = self.step as f64;
        (1.0 / (1.0 - self.beta1.powf(step)), 1.0 / (1.0 - self.beta2.powf(step)))
    }

    /// What kernels compute with.
    pub(crate) fn factors(&self) -> Factors {
        let (correct1, correct2) = self.corrections();
        Factors {
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            new1: (1.0 - self.beta1) as f32,
            new2: (1.0 - self.beta2) as f32,
            correct1: correct1 as f32,
            correct2: correct2 as f32,
            keep: (1.0 - self.rate * self.decay) as f32,
            rate: self.rate as f32,
            epsilon: self.epsilon as f32,
            scale: self.gradient_scale as f32,
        }
    }
}

impl InplaceOp2 for Update {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        state: &mut CpuStorage,
        layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<()> {
        let (CpuStorage::F32(state), CpuStorage::F32(gradient)) = (state, gradient) else {
            bail!("the optimizer state is f32")
        };
        let (Some((start, end)), Some((from, to))) =
            (layout.contiguous_offsets(), gradient_layout.contiguous_offsets())
        else {
            bail!("the optimizer state is contiguous")
        };
        let (state, gradient) = (&mut state[start..end], &gradient[from..to]);
        let (value, moments) = state.split_at_mut(gradient.len());
        let (mean, mean_square) = moments.split_at_mut(gradient.len());
        value
            .par_chunks_mut(ELEMENTS_PER_TASK)
            .zip(mean.par_chunks_mut(ELEMENTS_PER_TASK))
            .zip(mean_square.par_chunks_mut(ELEMENTS_PER_TASK))
            .zip(gradient.par_chunks(ELEMENTS_PER_TASK))
            .for_each(|(((value, mean), mean_square), gradient)| {
                simd(
                    #[inline(always)]
                    || step(self, value, mean, mean_square, gradient),
                );
            });
        Ok(())
    }

    fn cuda_fwd(&self, _: &mut CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<()> {
        bail!("parameters on a GPU are updated by a kernel of it")
    }
}

#[inline(always)]
fn step(
    update: &Update,
    value: &mut [f32],
    mean: &mut [f32],
    mean_square: &mut [f32],
    gradient: &[f32],
) {
    let factors = update.factors();
    let Factors { beta1, beta2, new1, new2, correct1, correct2, keep, rate, epsilon, scale } =
        factors;
    for i in 0..value.len() {
        let gradient = gradient[i] * scale;
        mean[i] = mean[i] * beta1 + gradient * new1;
        mean_square[i] = mean_square[i] * beta2 + gradient * gradient * new2;
        let change = mean[i] * correct1 / ((mean_square[i] * correct2).sqrt() + epsilon);
        value[i] = value[i] * keep - change * rate;
    }
}

#[cfg(test)]
mod tests {
    use super::super::twin::{close, random};
    use super::*;
    use candle_core::Device;

    const UPDATE: Update = Update {
        rate: 1e-2,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        decay: 0.1,
        step: 1,
        gradient_scale: 0.5,
    };

    #[test]
    fn the_kernel_equals_its_composed_twin() {
        let start = random(&[70, 1000], DType::F32);
        let (ours, twin) = (Parameter::new(&start).unwrap(), Parameter::new(&start).unwrap());
        for step in 1..=5 {
            let gradient = random(&[70, 1000], DType::F32);
            let update = Update { step, ..UPDATE };
            ours.update(&gradient, &update).unwrap();
            twin.update_composed(&gradient.flatten_all().unwrap(), &update).unwrap();
        }
        close(&ours.value().unwrap(), &twin.value().unwrap(), "value");
        close(&ours.moments().unwrap().0, &twin.moments().unwrap().0, "mean");
        close(&ours.moments().unwrap().1, &twin.moments().unwrap().1, "mean square");
    }

    #[test]
    fn a_copy_follows_every_update() {
        let mut parameter = Parameter::new(&random(&[7, 5], DType::F32)).unwrap();
        let copy = parameter.computed_in(DType::BF16).unwrap();
        let again = parameter.computed_in(DType::BF16).unwrap();
        let values = |tensor: Tensor| {
            tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let before = values(copy.clone());
        for step in 1..=3 {
            let update = Update { step, ..UPDATE };
            parameter.update(&random(&[7, 5], DType::F32), &update).unwrap();
            let rounded = parameter.value().unwrap().to_dtype(DType::BF16).unwrap();
            let rounded = values(rounded);
            assert_eq!([&copy, &again].map(|of| values(of.clone())), [rounded.clone(), rounded]);
        }
        assert_ne!(values(copy), before);
    }

    #[test]
    fn a_value_follows_every_update() {
        let parameter =
            Parameter::new(&Tensor::ones(3, DType::F32, &Device::Cpu).unwrap()).unwrap();
        let value = parameter.value().unwrap();
        let gradient = Tensor::ones(3, DType::F32, &Device::Cpu).unwrap();
        for step in 1..=200 {
            let update = Update { rate: 1e-3, decay: 0.0, step, ..UPDATE };
            parameter.update(&gradient, &update).unwrap();
        }
        // A steady gradient moves a value by the rate at every step.
        let moved: Vec<f32> = value.to_vec1().unwrap();
        assert!(moved.iter().all(|x| (x - 0.8).abs() < 1e-4), "{moved:?}");
    }
}
