//! What one step did.

use super::guard::Fault;
use crate::record::Sequence;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;

/// What one step did: a line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Number of the step, from 1.
    pub step: u64,
    /// Mean loss of the learned tokens, in nats; null if it is not finite.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Norm of the gradients before clipping; null if it is not finite.
    #[serde(deserialize_with = "number")]
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens seen in this step.
    pub tokens: u64,
    /// Tokens learned in this step.
    pub learned: u64,
    /// Tokens seen in all steps so far.
    pub tokens_total: u64,
    /// First sequence of the next step.
    pub next_sequence: u64,
    /// Why the update was skipped, if it was.
    pub skipped: Option<Fault>,
    /// Updates skipped in all steps so far.
    pub skipped_total: u64,
    /// The loss of each source, by its index. Written by name, by whoever knows the names.
    #[serde(skip)]
    pub sources: Vec<SourceLoss>,
    /// The loss of each round that is known of some tokens.
    #[serde(skip)]
    pub rounds: Vec<RoundLoss>,
}

/// The loss of the tokens of one source in a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SourceLoss {
    /// Index of the source, as in [`crate::record::Segment::source`].
    pub source: u32,
    /// Mean loss of its learned tokens, in nats.
    pub loss: f64,
    /// Learned tokens.
    pub learned: u64,
}

/// The loss of the tokens of one round in a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoundLoss {
    /// The round, as in [`crate::record::Shot::round`].
    pub round: u32,
    /// Mean loss of its learned tokens, in nats.
    pub loss: f64,
    /// Learned tokens.
    pub learned: u64,
}

/// `losses` of the learned tokens of `sequences`, in their order, by source.
pub(super) fn by_source(sequences: &[Sequence], losses: &[f64]) -> Vec<SourceLoss> {
    let mut sums: BTreeMap<u32, (f64, u64)> = BTreeMap::new();
    let mut losses = losses.iter();
    for (source, learned) in sequences.iter().flat_map(learned) {
        let (sum, count) = sums.entry(source).or_default();
        *sum += losses.by_ref().take(learned).sum::<f64>();
        *count += learned as u64;
    }
    let mean = |(source, (sum, learned)): (u32, (f64, u64))| {
        (learned > 0).then(|| SourceLoss { source, loss: sum / learned as f64, learned })
    };
    sums.into_iter().filter_map(mean).collect()
}

/// `losses` of the learned tokens of `sequences`, in their order, by round; those without one are left out.
pub(super) fn by_round(sequences: &[Sequence], losses: &[f64]) -> Vec<RoundLoss> {
    let mut sums: BTreeMap<u32, (f64, u64)> = BTreeMap::new();
    let mut losses = losses.iter();
    for sequence in sequences {
        let mut shots = sequence.shots.iter().peekable();
        for (token, loss) in predicted(sequence).zip(losses.by_ref()) {
            while shots.next_if(|shot| shot.offset + shot.length <= token).is_some() {}
            if let Some(shot) = shots.peek().filter(|shot| shot.offset <= token) {
                let (sum, count) = sums.entry(shot.round).or_default();
                *sum += loss;
                *count += 1;
            }
        }
    }
    let mean = |(round, (sum, learned)): (u32, (f64, u64))| RoundLoss {
        round,
        loss: sum / learned as f64,
        learned,
    };
    sums.into_iter().map(mean).collect()
}

/// A segment that a step is stopped for.
#[derive(Debug, PartialEq)]
pub(super) struct Suspect<'a> {
    /// Its sequence, as an index into those of the step.
    pub(super) sequence: usize,
    /// Its item.
    pub(super) item: &'a str,
    /// Mean loss of its learned tokens, in nats.
    pub(super) loss: f64,
}

/// The segments of which a loss is not finite, or else those with the highest mean, worst first: so many at most.
pub(super) fn suspects<'a>(
    sequences: &'a [Sequence],
    losses: &[f64],
    most: usize,
) -> Vec<Suspect<'a>> {
    let mut losses = losses.iter();
    let mut all = Vec::new();
    for (sequence, held) in sequences.iter().enumerate() {
        for (segment, (_, count)) in held.segments.iter().zip(learned(held)) {
            let loss = losses.by_ref().take(count).sum::<f64>() / count as f64;
            if count > 0 {
                all.push(Suspect { sequence, item: &segment.item, loss });
            }
        }
    }
    if all.iter().any(|suspect| !suspect.loss.is_finite()) {
        all.retain(|suspect| !suspect.loss.is_finite());
    } else {
        all.sort_by(|left, right| right.loss.total_cmp(&left.loss));
    }
    all.truncate(most);
    all
}

/// The tokens that have a loss, in order: those that are learned, but for the first of each segment.
fn predicted(sequence: &Sequence) -> impl Iterator<Item = u32> {
    let rows = sequence.positions().zip(&sequence.learned).zip(0..);
    rows.filter(|((position, learned), _)| *position > 0 && **learned).map(|(_, token)| token)
}

/// The source of each segment, and how many of its tokens are learned: never the first.
pub(super) fn learned(sequence: &Sequence) -> impl Iterator<Item = (u32, usize)> {
    sequence.segments.iter().scan(0, |start, segment| {
        let own = *start..*start + segment.length as usize;
        *start = own.end;
        let learned = sequence.learned[own].iter().skip(1).filter(|&&learned| learned).count();
        Some((segment.source, learned))
    })
}

/// JSON has no number for what is not finite.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Segment, Shot};

    #[test]
    fn suspects_are_what_is_not_finite_or_else_the_highest_losses() {
        let segment =
            |item: &str, length| Segment { item: item.into(), source: 0, offset: 0, length };
        let sequence = |items: [&str; 2]| Sequence {
            tokens: vec![7; 6],
            learned: vec![true; 6],
            segments: vec![segment(items[0], 3), segment(items[1], 2), segment("one token", 1)],
            shots: Vec::new(),
        };
        let sequences = [sequence(["a", "b"]), sequence(["c", "d"])];
        let named = |losses: &[f64], most| -> Vec<(usize, &str)> {
            let suspects = suspects(&sequences, losses, most);
            suspects.iter().map(|suspect| (suspect.sequence, suspect.item)).collect()
        };
        let finite = [1.0, 2.0, 4.0, 8.0, 0.5, 3.0];
        assert_eq!(named(&finite, 9), [(1, "c"), (0, "b"), (1, "d"), (0, "a")]);
        assert_eq!(named(&finite, 2), [(1, "c"), (0, "b")]);
        let broken = [1.0, f64::NAN, 4.0, 8.0, 0.0, f64::INFINITY];
        assert_eq!(named(&broken, 9), [(0, "a"), (1, "d")]);
    }

    #[test]
    fn losses_are_told_apart_by_source_and_by_round() {
        let segment = |source, length| Segment { item: String::new(), source, offset: 0, length };
        let sequence = Sequence {
            tokens: vec![7; 9],
            learned: vec![true, true, false, true, true, true, true, true, true],
            segments: vec![segment(1, 4), segment(0, 3), segment(1, 2)],
            shots: [(2, 1, 2), (0, 5, 3)]
                .map(|(round, offset, length)| Shot { round, offset, length })
                .to_vec(),
        };
        let rounds = by_round(std::slice::from_ref(&sequence), &[1.0, 2.0, 3.0, 4.0, 9.0]);
        let of = |round, loss, learned| RoundLoss { round, loss, learned };
        assert_eq!(rounds, [of(0, 3.5, 2), of(2, 1.0, 1)]);
        let found = by_source(
            &[sequence.clone(), sequence],
            &[1.0, 2.0, 3.0, 4.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        );
        let of = |source, loss, learned| SourceLoss { source, loss, learned };
        assert_eq!(found, [of(0, 9.0 / 4.0, 4), of(1, 15.0 / 6.0, 6)]);
    }

    #[test]
    fn a_step_without_a_finite_loss_can_be_read_back() {
        let report = StepReport {
            step: 3,
            loss: f64::NAN,
            grad_norm: f64::INFINITY,
            lr: 0.1,
            tokens: 1,
            learned: 1,
            tokens_total: 3,
            next_sequence: 6,
            skipped: Some(Fault::Nonfinite),
            skipped_total: 1,
            sources: Vec::new(),
            rounds: Vec::new(),
        };
        let line = serde_json::to_value(&report).unwrap();
        assert_eq!(
            (&line["loss"], &line["skipped"]),
            (&serde_json::Value::Null, &"nonfinite".into())
        );
        let again: StepReport = serde_json::from_value(line).unwrap();
        assert!(again.loss.is_nan() && again.skipped == report.skipped);
    }
}
