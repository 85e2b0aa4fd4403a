//! What keeps a bad step from spoiling a model: the loss and the gradient are looked at before anything
//! moves.
//!
//! ```text
//! loss, gradient norm ─▶ finite? ─▶ a spike, by the steps before? ─▶ update
//!                          └──────────────┴── stop, or skip the update and count it
//! ```
//!
//! A spike is a loss or a gradient norm more than [`DEVIATIONS`] standard deviations above the mean of the
//! last [`WINDOW`] steps, once half as many are known: the rule and the constants of `SkipStepOptimizer` in
//! OLMo-core (`olmo_core/optim/skip_step_optimizer.py`). Skipped steps count among those before, so that a
//! loss which has moved for good, as after a change of the mix, is accepted in time; what is not finite
//! does not.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::VecDeque;

/// Steps that a spike is measured against.
pub const WINDOW: usize = 128;

/// Standard deviations above the mean that make a spike.
pub const DEVIATIONS: f64 = 6.0;

/// Steps that may be skipped in a row: after so many that were none, spikes would have become the rule.
pub const SKIPPED_IN_A_ROW_MAX: u64 = WINDOW as u64 / 2;

/// A smaller deviation is that of rounding: values that are all but equal are no spikes.
const DEVIATION_MIN: f64 = 1e-6;

/// What to do about a step that is bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFault {
    /// Stop with an error; the state is that before the step.
    Stop,
    /// Leave parameters and moments as they are, count the step, and go on behind its sequences.
    Skip,
}

/// What to look at. May differ when a run is resumed: until a fault, the run is the same with any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guards {
    /// A loss or gradient norm that is not finite.
    pub nonfinite: OnFault,
    /// A spike; not looked for if none.
    pub spike: Option<OnFault>,
}

impl Guards {
    /// Stops at what is not finite, looks for no spikes.
    pub const USUAL: Self = Guards { nonfinite: OnFault::Stop, spike: None };

    /// What to do about a fault; nothing if none.
    pub fn against(&self, fault: Fault) -> Option<OnFault> {
        match fault {
            Fault::Nonfinite => Some(self.nonfinite),
            Fault::Spike => self.spike,
        }
    }
}

/// What can be wrong with a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// Its loss or gradient norm is no number, or infinite.
    Nonfinite,
    /// Its loss or gradient norm is far above those before.
    Spike,
}

/// The steps that a step is judged by: part of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Recent {
    losses: Values,
    grad_norms: Values,
    /// Steps skipped since the last update.
    skipped_in_a_row: u64,
}

impl Recent {
    /// What is wrong with a step of this loss and gradient norm.
    pub fn fault(&self, loss: f64, grad_norm: f64) -> Option<Fault> {
        if !(loss.is_finite() && grad_norm.is_finite()) {
            return Some(Fault::Nonfinite);
        }
        let is_known = self.losses.0.len() >= WINDOW / 2;
        let is_spike = self.losses.are_below(loss) || self.grad_norms.are_below(grad_norm);
        (is_known && is_spike).then_some(Fault::Spike)
    }

    /// Notes a step behind these, and whether it was skipped.
    pub fn note(&mut self, loss: f64, grad_norm: f64, skipped: bool) {
        self.skipped_in_a_row = if skipped { self.skipped_in_a_row + 1 } else { 0 };
        if loss.is_finite() && grad_norm.is_finite() {
            self.losses.push(loss);
            self.grad_norms.push(grad_norm);
        }
    }

    /// Whether one more step may be skipped.
    pub fn may_skip(&self) -> bool {
        self.skipped_in_a_row < SKIPPED_IN_A_ROW_MAX
    }
}

impl std::fmt::Display for Recent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (loss, loss_deviation) = self.losses.mean_and_deviation();
        let (norm, norm_deviation) = self.grad_norms.mean_and_deviation();
        write!(
            f,
            "the {} steps before had loss {loss:.4} ± {loss_deviation:.4}, gradient norm {norm:.4} ± \
             {norm_deviation:.4}",
            self.losses.0.len()
        )
    }
}

/// The last values of something, oldest first.
#[derive(Clone, Debug, Default, PartialEq)]
struct Values(VecDeque<f64>);

impl Values {
    fn push(&mut self, value: f64) {
        if self.0.len() == WINDOW {
            self.0.pop_front();
        }
        self.0.push_back(value);
    }

    fn are_below(&self, value: f64) -> bool {
        let (mean, deviation) = self.mean_and_deviation();
        value - mean > DEVIATIONS * deviation.max(DEVIATION_MIN)
    }

    /// Mean and standard deviation of the sample.
    fn mean_and_deviation(&self) -> (f64, f64) {
        let count = self.0.len() as f64;
        let mean = self.0.iter().sum::<f64>() / count.max(1.0);
        let squares: f64 = self.0.iter().map(|value| (value - mean).powi(2)).sum();
        (mean, (squares / (count - 1.0).max(1.0)).sqrt())
    }
}

// As bits: decimals would not come back the same from every reader.
impl Serialize for Values {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|value| value.to_bits()))
    }
}

impl<'de> Deserialize<'de> for Values {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bits = Vec::<u64>::deserialize(deserializer)?;
        Ok(Values(bits.into_iter().map(f64::from_bits).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Losses between 2.9 and 3.1 and norms between 0.9 and 1.1: deviations of about 0.07.
    fn recent(steps: usize) -> Recent {
        let mut recent = Recent::default();
        for step in 0..steps {
            let noise = (step as f64 * 1.7).sin() / 10.0;
            recent.note(3.0 + noise, 1.0 - noise, false);
        }
        recent
    }

    fn check(steps: usize, loss: f64, grad_norm: f64, expected: Option<Fault>) {
        assert_eq!(recent(steps).fault(loss, grad_norm), expected, "{loss} {grad_norm}");
    }

    #[test]
    fn a_spike_is_six_deviations_above_the_steps_before() {
        check(200, 3.3, 1.3, None);
        check(200, 3.6, 1.0, Some(Fault::Spike));
        check(200, 3.0, 1.6, Some(Fault::Spike));
        check(200, 0.5, 0.1, None); // better is no spike
        check(WINDOW / 2, 9.0, 1.0, Some(Fault::Spike));
        check(WINDOW / 2 - 1, 9.0, 1.0, None);
    }

    #[test]
    fn what_is_not_finite_is_a_fault_from_the_first_step_on_and_measures_nothing() {
        for (loss, norm) in [(f64::NAN, 1.0), (1.0, f64::INFINITY), (f64::NAN, f64::NAN)] {
            check(0, loss, norm, Some(Fault::Nonfinite));
            let mut after = recent(100);
            after.note(loss, norm, true);
            assert_eq!(after.losses, recent(100).losses);
        }
    }

    #[test]
    fn equal_values_are_no_spikes() {
        let mut equal = Recent::default();
        (0..WINDOW).for_each(|_| equal.note(0.1, 0.3, false));
        assert_eq!(equal.fault(0.1, 0.3), None);
    }

    #[test]
    fn a_loss_that_has_moved_for_good_is_accepted_before_the_run_is_stopped() {
        let mut moved = recent(WINDOW);
        let mut skipped = 0;
        while moved.fault(4.0, 1.0) == Some(Fault::Spike) {
            assert!(moved.may_skip());
            moved.note(4.0, 1.0, true);
            skipped += 1;
        }
        assert!((1..SKIPPED_IN_A_ROW_MAX).contains(&skipped), "{skipped}");
    }

    #[test]
    fn skips_in_a_row_are_bounded() {
        let mut recent = Recent::default();
        (0..SKIPPED_IN_A_ROW_MAX).for_each(|_| recent.note(f64::NAN, f64::NAN, true));
        assert!(!recent.may_skip());
        recent.note(1.0, 1.0, false);
        assert!(recent.may_skip());
    }

    #[test]
    fn the_steps_before_come_back_bit_by_bit() {
        let recent = recent(150);
        let text = serde_json::to_string(&recent).unwrap();
        assert_eq!(serde_json::from_str::<Recent>(&text).unwrap(), recent);
        assert_eq!(recent.losses.0.len(), WINDOW);
    }
}
