//! All parameters of a model with their optimizer state, updated together.

use crate::kernels::adamw::{Parameter, Update};
use crate::model::backward::Gradients;
use candle_core::{Result, Tensor, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The constants of AdamW.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub epsilon: f64,
    /// Decoupled decay of matrices. Vectors, that is the weights of normalisations, have none.
    pub weight_decay: f64,
    /// The largest norm of all gradients together.
    pub clip_norm: f64,
}

/// Parameters by name, in f32.
#[derive(Debug)]
pub struct Parameters {
    by_name: BTreeMap<String, Parameter>,
}

impl Parameters {
    /// Parameters with initial values and no history.
    pub fn new(values: impl IntoIterator<Item = (String, Tensor)>) -> Result<Self> {
        let by_name = values
            .into_iter()
            .map(|(name, value)| Ok((name, Parameter::new(&value)?)))
            .collect::<Result<_>>()?;
        Ok(Parameters { by_name })
    }

    /// The parameter called `name`.
    pub fn get(&self, name: &str) -> Option<&Parameter> {
        self.by_name.get(name)
    }

    /// The parameter called `name`, to be changed.
    pub(super) fn get_mut(&mut self, name: &str) -> Option<&mut Parameter> {
        self.by_name.get_mut(name)
    }

    /// All parameters, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Parameter)> {
        self.by_name.iter().map(|(name, parameter)| (name.as_str(), parameter))
    }

    /// Moves every parameter against its gradient, clipped to the largest norm; `norm` is that of all
    /// gradients together. `updates` counts those done, this one included.
    ///
    /// # Errors
    /// If a parameter has no gradient, or the device fails.
    pub fn update(
        &self,
        gradients: &Gradients,
        norm: f64,
        settings: &AdamW,
        rate: f64,
        updates: u64,
    ) -> Result<()> {
        let gradient_scale =
            if norm > settings.clip_norm { settings.clip_norm / norm } else { 1.0 };
        for (name, parameter) in &self.by_name {
            let Some(gradient) = gradients.get(name) else {
                bail!("parameter {name:?} has no gradient")
            };
            let AdamW { beta1, beta2, epsilon, weight_decay, clip_norm: _ } = *settings;
            let decay = if gradient.rank() > 1 { weight_decay } else { 0.0 };
            let update =
                Update { rate, beta1, beta2, epsilon, decay, step: updates, gradient_scale };
            parameter.update(gradient, &update)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    const SETTINGS: AdamW =
        AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1, clip_norm: 1.0 };

    fn parameters() -> Parameters {
        let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
        let named = [("matrix".to_owned(), ones(&[2, 3])), ("vector".to_owned(), ones(&[3]))];
        Parameters::new(named).unwrap()
    }

    /// The values after one update with a gradient of some size everywhere, said to have that norm.
    fn updated(slope: f64, norm: f64) -> BTreeMap<String, Vec<f32>> {
        let parameters = parameters();
        let mut gradients = Gradients::default();
        for (name, parameter) in parameters.iter() {
            let ones = parameter.value().unwrap().ones_like().unwrap();
            gradients.add(name, (ones * slope).unwrap()).unwrap();
        }
        parameters.update(&gradients, norm, &SETTINGS, 1e-2, 1).unwrap();
        let values = |(name, parameter): (&str, &Parameter)| {
            let value = parameter.value().unwrap().flatten_all().unwrap();
            (name.to_owned(), value.to_vec1().unwrap())
        };
        parameters.iter().map(values).collect()
    }

    #[test]
    fn matrices_decay_and_vectors_do_not() {
        let values = updated(0.0, 0.0);
        assert_eq!(values["matrix"], [1.0 - 1e-2 * 0.1; 6]);
        assert_eq!(values["vector"], [1.0; 3]);
    }

    #[test]
    fn gradients_beyond_the_largest_norm_count_as_if_they_had_it() {
        // Adam divides a first gradient by itself, all but the epsilon: only where that counts can a scale be seen.
        let at = |slope, norm| updated(slope, norm)["vector"].clone();
        assert_eq!(at(2e-8, 2.0), at(1e-8, 1.0));
        assert_eq!(at(1e-8, 0.5), at(1e-8, 1.0));
        assert_ne!(at(2e-8, 2.0), at(2e-8, 1.0));
    }
}
