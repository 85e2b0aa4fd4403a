//! The learning rate of each step.
//!
//! ```text
//! cosine   /‾‾\__        wsd   /‾‾‾‾‾‾‾\_
//!         /      ‾‾‾‾         /          ‾‾‾‾
//!       warm-up, cosine     warm-up, peak, decay; then constant
//! ```

use serde::{Deserialize, Serialize};

/// Linear warm-up to a peak, a way down to a share of it, then constant.
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
    /// The way down.
    pub decay: Decay,
}

/// How a rate gets from its peak to its floor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Half a cosine over all steps behind the warm-up (Loshchilov and Hutter, 2017; arXiv 1608.03983).
    Cosine,
    /// Warm-up–stable–decay (Hu et al., 2024; arXiv 2404.06395): the peak is held until the last steps; in
    /// these the rate falls by one minus the root of the way gone, which ended lower than a straight line
    /// (Hägele et al., 2024; arXiv 2405.18392).
    Wsd {
        /// The last steps, in percent of all, rounded up. What the warm-up takes of them is taken off.
        decay_percent: u64,
    },
}

impl Schedule {
    /// The rate of step `step`, counted from 1.
    pub fn rate(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let start = self.decay_start();
        let length = self.total_steps.saturating_sub(start).max(1) as f64;
        let gone = (step.saturating_sub(start) as f64 / length).min(1.0);
        let left = match self.decay {
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * gone).cos()),
            Decay::Wsd { .. } => 1.0 - gone.sqrt(),
        };
        self.peak * (self.floor_share + (1.0 - self.floor_share) * left)
    }

    /// The last step at the peak.
    fn decay_start(&self) -> u64 {
        match self.decay {
            Decay::Cosine => self.warmup_steps,
            Decay::Wsd { decay_percent } => {
                let percent = u128::from(self.total_steps) * u128::from(decay_percent);
                let steps = u64::try_from(percent.div_ceil(100)).unwrap_or(u64::MAX);
                self.total_steps.saturating_sub(steps).max(self.warmup_steps)
            }
        }
    }
}

impl std::fmt::Display for Decay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Decay::Cosine => write!(f, "cosine"),
            Decay::Wsd { decay_percent } => {
                write!(f, "held, then falling in the last {decay_percent} %")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{Strategy, prop_oneof, proptest};
    use proptest::{prop_assert, prop_assert_eq};

    const WSD: Decay = Decay::Wsd { decay_percent: 20 };

    fn check(decay: Decay, step: u64, expected: f64) {
        let schedule =
            Schedule { peak: 2.0, warmup_steps: 10, total_steps: 110, floor_share: 0.1, decay };
        assert!((schedule.rate(step) - expected).abs() < 1e-12, "{decay:?} step {step}");
    }

    #[test]
    fn the_rate_rises_falls_and_stays() {
        for (step, expected) in [(1, 0.2), (10, 2.0), (60, 1.1), (110, 0.2), (1000, 0.2)] {
            check(Decay::Cosine, step, expected);
        }
    }

    #[test]
    fn the_peak_is_held_until_the_last_share_of_the_steps() {
        // 22 of 110 steps are 20 %; a quarter of them costs half of what is to be lost.
        for step in [10, 11, 50, 88] {
            check(WSD, step, 2.0);
        }
        check(WSD, 99, 0.2 + 1.8 * (1.0 - 0.5f64.sqrt()));
        for step in [110, 111, 5000] {
            check(WSD, step, 0.2);
        }
        check(Decay::Wsd { decay_percent: 0 }, 110, 2.0);
        check(Decay::Wsd { decay_percent: 100 }, 60, 0.2 + 1.8 * (1.0 - 0.5f64.sqrt()));
    }

    #[test]
    fn there_may_be_no_warm_up() {
        let schedule = Schedule {
            peak: 1.0,
            warmup_steps: 0,
            total_steps: 2,
            floor_share: 0.0,
            decay: Decay::Cosine,
        };
        assert_eq!(schedule.rate(1), 0.5);
    }

    fn schedules() -> impl Strategy<Value = Schedule> {
        let decay = prop_oneof![
            proptest::strategy::Just(Decay::Cosine),
            (1u64..=100).prop_map(|decay_percent| Decay::Wsd { decay_percent }),
        ];
        (1e-6..1.0f64, 0u64..300, 1u64..1000, 0.0..1.0f64, decay).prop_map(
            |(peak, warmup_steps, total_steps, floor_share, decay)| Schedule {
                peak,
                warmup_steps,
                total_steps,
                floor_share,
                decay,
            },
        )
    }

    proptest! {
        #[test]
        fn rates_rise_to_the_peak_then_never_again_and_end_at_the_floor(schedule in schedules()) {
            let Schedule { peak, warmup_steps, total_steps, floor_share, .. } = schedule;
            let floor = peak * floor_share;
            let rates: Vec<f64> = (1..=total_steps + 400).map(|step| schedule.rate(step)).collect();
            let rounding = peak * 1e-12;
            for (index, pair) in rates.windows(2).enumerate() {
                let step = index as u64 + 1; // of the first of both
                let is_right = match step < warmup_steps {
                    true => pair[0] < pair[1],
                    false => pair[0] >= pair[1] - rounding,
                };
                prop_assert!(is_right, "step {}", step);
            }
            prop_assert!(rates.iter().all(|&rate| rate > 0.0 || floor == 0.0));
            prop_assert!(rates.iter().all(|&rate| rate <= peak + rounding));
            let behind = &rates[warmup_steps as usize..];
            prop_assert!(behind.iter().all(|&rate| rate >= floor - rounding));
            prop_assert!((rates[rates.len() - 1] - floor).abs() <= rounding);
        }

        #[test]
        fn the_share_of_the_decay_says_how_long_the_peak_is_held(
            total_steps in 1u64..2000,
            decay_percent in 1u64..=100,
        ) {
            let decay = Decay::Wsd { decay_percent };
            let schedule = Schedule { peak: 1.0, warmup_steps: 0, total_steps, floor_share: 0.0, decay };
            let held = (1..=total_steps).filter(|&step| schedule.rate(step) == 1.0).count() as u64;
            prop_assert_eq!(held, total_steps - (total_steps * decay_percent).div_ceil(100));
        }
    }
}
