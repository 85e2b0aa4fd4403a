//! What a pair must be like to be kept.
//!
//! Every rule is a function of the pair, the other pairs of its text, and the text: nothing depends on what
//! other texts say, so that a question may be asked of many texts.

use super::contamination::Contamination;
use super::documents::ContaminationRules;
use super::words;
use crate::error::{Error, Result};
use crate::prompt::Pair;
use crate::template::mode::form;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Why a gate refuses a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The question has too few or too many words.
    QuestionLength,
    /// The answer has too few or too many words.
    AnswerLength,
    /// The question is nearly that of an earlier pair of the text.
    SimilarQuestion,
    /// Too few words of the answer stand in the text.
    Ungrounded,
    /// It shares a run of words with an evaluation set.
    Contaminated,
    /// Asked again, the answer was another one.
    Disagreement,
}

impl Refusal {
    /// The name in ledgers and rejections.
    pub fn name(self) -> &'static str {
        match self {
            Refusal::QuestionLength => "question_length",
            Refusal::AnswerLength => "answer_length",
            Refusal::SimilarQuestion => "similar_question",
            Refusal::Ungrounded => "ungrounded",
            Refusal::Contaminated => "contaminated",
            Refusal::Disagreement => "disagreement",
        }
    }
}

/// What is asked of pairs: part of a run's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairRules {
    /// Words of a question: at least, at most.
    pub question_words: Option<(usize, usize)>,
    /// Words of an answer, its reasoning included: at least, at most.
    pub answer_words: Option<(usize, usize)>,
    /// Similarity in percent of the words of two questions from which on only the first is kept.
    pub similar_percent: Option<u32>,
    /// Words of an answer that must stand in the text, in percent.
    pub grounded: Grounded,
    /// Texts that must not be trained on.
    pub contamination: Option<ContaminationRules>,
    /// How well a second answer must agree.
    pub agreement_percent: Option<u32>,
}

/// How much of an answer must stand in its text, in percent, by the type of the pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grounded {
    /// Free-form answers.
    pub plain: Option<u32>,
    /// Answers among options: any of the options may be quoted, so this says less.
    pub options: Option<u32>,
    /// Reasoning that leads to an answer, the answer itself not included.
    pub reasoning: Option<u32>,
}

/// Judges pairs.
#[derive(Clone, Debug, Default)]
pub struct PairGates {
    rules: PairRules,
    contamination: Option<Contamination>,
}

impl PairGates {
    /// Gates by these rules.
    ///
    /// # Errors
    /// If a share is none, a bound is empty, or an evaluation set cannot be read.
    pub fn new(rules: PairRules) -> Result<Self> {
        let Grounded { plain, options, reasoning } = rules.grounded;
        let shares = [rules.similar_percent, rules.agreement_percent, plain, options, reasoning];
        if shares.into_iter().flatten().any(|share| share > 100) {
            return Err(Error::Setting("a share is 0 to 100 percent".into()));
        }
        let bounds = [rules.question_words, rules.answer_words];
        if bounds.into_iter().flatten().any(|(least, most)| least > most) {
            return Err(Error::Setting("no number of words is within the bounds".into()));
        }
        let contamination =
            rules.contamination.as_ref().map(ContaminationRules::read).transpose()?;
        Ok(PairGates { rules, contamination })
    }

    /// Why a pair of `text` is not to be kept behind the `earlier` pairs; none if it is.
    pub fn judge(&self, text: &str, earlier: &[Pair], pair: &Pair) -> Option<Refusal> {
        let outside = |bounds: Option<(usize, usize)>, text: &str| {
            let count = text.split_whitespace().count();
            bounds.is_some_and(|(least, most)| count < least || count > most)
        };
        if outside(self.rules.question_words, &pair.question) {
            return Some(Refusal::QuestionLength);
        }
        if outside(self.rules.answer_words, &pair.answer) {
            return Some(Refusal::AnswerLength);
        }
        let similar = |percent: u32| {
            earlier.iter().any(|other| similarity(&other.question, &pair.question) >= percent)
        };
        if self.rules.similar_percent.is_some_and(similar) {
            return Some(Refusal::SimilarQuestion);
        }
        if !self.is_grounded(text, pair) {
            return Some(Refusal::Ungrounded);
        }
        let Pair { question, answer } = pair;
        let held = |contamination: &Contamination| {
            contamination.holds(question) || contamination.holds(answer)
        };
        self.contamination.as_ref().is_some_and(held).then_some(Refusal::Contaminated)
    }

    fn is_grounded(&self, text: &str, pair: &Pair) -> bool {
        let Grounded { plain, options, reasoning } = self.rules.grounded;
        if (plain, options, reasoning) == (None, None, None) {
            return true;
        }
        // What is no question of any form is dropped when it is rendered, with a reason of its own.
        let Ok(form) = form(pair, |_| true) else { return true };
        let of_answer = if form.options.is_some() { options } else { plain };
        let enough = |share: Option<u32>, part: &str| {
            share.is_none_or(|share| grounded_percent(part, text) >= share)
        };
        enough(of_answer, &form.answer)
            && form.reasoning.as_ref().is_none_or(|steps| enough(reasoning, steps))
    }
}

/// Words of `answer` that stand in `text`, in percent; 100 if it has none.
pub fn grounded_percent(answer: &str, text: &str) -> u32 {
    let known: BTreeSet<String> = words(text).collect();
    let (mut all, mut found) = (0u32, 0u32);
    for word in words(answer) {
        all += 1;
        found += u32::from(known.contains(&word));
    }
    (100 * found).checked_div(all).unwrap_or(100)
}

/// Jaccard similarity of the words of two questions, in percent.
fn similarity(a: &str, b: &str) -> u32 {
    let (a, b): (BTreeSet<String>, BTreeSet<String>) = (words(a).collect(), words(b).collect());
    let both = a.intersection(&b).count() as u32;
    (100 * both).checked_div(a.union(&b).count() as u32).unwrap_or(100)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Rates rose by 25 points in May. Wages did not.";

    fn check(rules: PairRules, pairs: &[(&str, &str)], expected: &[Option<Refusal>]) {
        let gates = PairGates::new(rules).unwrap();
        let (mut kept, mut judged) = (Vec::new(), Vec::new());
        for (question, answer) in pairs {
            let pair = Pair { question: (*question).into(), answer: (*answer).into() };
            let refusal = gates.judge(TEXT, &kept, &pair);
            if refusal.is_none() {
                kept.push(pair);
            }
            judged.push(refusal);
        }
        assert_eq!(judged, expected);
    }

    #[test]
    fn without_rules_every_pair_is_kept() {
        check(PairRules::default(), &[("", ""), ("What?", "Nonsense")], &[None, None]);
    }

    #[test]
    fn questions_and_answers_have_bounds() {
        let rules = PairRules {
            question_words: Some((2, 4)),
            answer_words: Some((1, 2)),
            ..PairRules::default()
        };
        let pairs = [("Why?", "So"), ("What rose then?", "Rates"), ("What rose?", "It was rates")];
        let long = Some(Refusal::AnswerLength);
        check(rules, &pairs, &[Some(Refusal::QuestionLength), None, long]);
    }

    #[test]
    fn of_similar_questions_the_first_is_kept() {
        let rules = PairRules { similar_percent: Some(70), ..PairRules::default() };
        let pairs = [("What rose in May?", "Rates"), ("In May, what rose?", "It"), ("Who?", "We")];
        check(rules, &pairs, &[None, Some(Refusal::SimilarQuestion), None]);
    }

    #[test]
    fn answers_are_grounded_by_the_type_of_the_pair() {
        let grounded = Grounded { plain: Some(80), options: None, reasoning: Some(50) };
        let rules = PairRules { grounded, ..PairRules::default() };
        let step = "How far?\\nLet's think step by step.".replace("\\n", "\n");
        let so = |steps: &str| format!("{steps}\nTherefore, the answer is 25");
        let (good, bad) = (so("Rates rose by 25 points."), so("Because inflation was high."));
        let options = "What rose?\nOptions:\n- Gold\n- Oil";
        let pairs = [
            ("What rose?", "Rates rose, by 25"),
            ("What rose?", "Gold prices"),
            (options, "Gold"),
            (&step, &good),
            (&step, &bad),
        ];
        let no = Some(Refusal::Ungrounded);
        check(rules, &pairs, &[None, no, None, None, no]);
        assert_eq!(grounded_percent("Rates fell", TEXT), 50);
        assert_eq!(grounded_percent("...", TEXT), 100);
    }

    #[test]
    fn rules_that_cannot_be_met_are_refused() {
        let share = PairRules { similar_percent: Some(101), ..PairRules::default() };
        let bounds = PairRules { answer_words: Some((3, 2)), ..PairRules::default() };
        assert!(PairGates::new(share).is_err() && PairGates::new(bounds).is_err());
    }
}
