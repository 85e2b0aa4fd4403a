//! The learning rate of each step.

use serde::{Deserialize, Serialize};

/// Linear warm-up, then half a cosine down to a share of the peak, then constant.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// The highest rate.
    pub peak: f64,
    /// Steps from nothing to the peak.
    pub warmup_steps: u64,
    /// Steps until the rate has reached its floor.
    pub total_steps: u64,
    /// The floor, as a share of the peak.
    pub floor_share: f64,
}

impl Schedule {
    /// The rate of step `step`, counted from 1.
    pub fn rate(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let length = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / length).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.peak * (self.floor_share + (1.0 - self.floor_share) * cosine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(step: u64, expected: f64) {
        let schedule = Schedule { peak: 2.0, warmup_steps: 10, total_steps: 110, floor_share: 0.1 };
        assert!((schedule.rate(step) - expected).abs() < 1e-12, "step {step}");
    }

    #[test]
    fn the_rate_rises_falls_and_stays() {
        check(1, 0.2);
        check(10, 2.0);
        check(60, 1.1);
        check(110, 0.2);
        check(1000, 0.2);
    }

    #[test]
    fn there_may_be_no_warm_up() {
        let schedule = Schedule { peak: 1.0, warmup_steps: 0, total_steps: 2, floor_share: 0.0 };
        assert_eq!(schedule.rate(1), 0.5);
    }
}
