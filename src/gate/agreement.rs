//! A model-based judge: the question is asked again, and the pair kept if both answers agree.
//!
//! ```text
//! pair ─▶ prompt: text, question, "<ANS>" ─▶ the judge's answer ─▶ token F1 with the pair's answer
//! ```
//!
//! The judge is the synthesizer or another model of the same wire format. It sees the text alone, without
//! the chain that led the synthesizer to its answer.

use super::Refusal;
use crate::eval::f1;
use crate::prompt::{Pair, PromptWriter};

/// Tokens of an answer that the judge may write: longer answers are compared by their beginning.
pub const ANSWER_TOKENS_MAX: usize = 64;

/// Compares answers.
#[derive(Clone, Debug)]
pub struct Agreement {
    /// Writes the judge's prompts.
    pub writer: PromptWriter,
    /// Tokens of the judge's longest prompt.
    pub prompt_tokens_max: usize,
    /// Token F1 of the two answers at least, in percent.
    pub percent: u32,
}

impl Agreement {
    /// What the judge is asked about a pair; none if that is too long for it.
    pub fn prompt(&self, text: &str, pair: &Pair) -> Option<Vec<u32>> {
        let prompt = self.writer.answer(text, &pair.question);
        (prompt.len() <= self.prompt_tokens_max).then_some(prompt)
    }

    /// Whether the judge's generation agrees with the pair. An answer that ran out of tokens is compared
    /// with as many words of the pair's.
    pub fn judge(&self, pair: &Pair, generation: &str) -> Option<Refusal> {
        let (answer, whole) = match generation.split_once("</END>") {
            Some((answer, _)) => (answer, true),
            None => (generation, false),
        };
        let words = if whole { usize::MAX } else { answer.split_whitespace().count() };
        let expected: Vec<&str> = pair.answer.split_whitespace().take(words).collect();
        let percent = 100.0 * f1(answer, &expected.join(" "));
        (percent < f64::from(self.percent)).then_some(Refusal::Disagreement)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::small;

    fn agreement(percent: u32) -> Agreement {
        let writer = PromptWriter::new(small()).unwrap();
        Agreement { writer, prompt_tokens_max: 100, percent }
    }

    fn check(percent: u32, answer: &str, generation: &str, kept: bool) {
        let pair = Pair { question: "What rose?".into(), answer: answer.into() };
        let judged = agreement(percent).judge(&pair, generation);
        assert_eq!(judged.is_none(), kept, "{answer:?} and {generation:?}");
    }

    #[test]
    fn answers_that_agree_are_kept() {
        check(100, "The rates", " rates </END> <QUE> more", true);
        check(60, "Rates rose", " Rates </END>", true);
        check(70, "Rates rose", " Rates </END>", false);
        check(1, "Rates", " Wages </END>", false);
        check(0, "Rates", " Wages </END>", true);
    }

    #[test]
    fn an_answer_that_ran_out_of_tokens_is_compared_as_far_as_it_goes() {
        check(100, "Rates rose by 25 points", " Rates rose by", true);
    }

    #[test]
    fn a_text_that_is_too_long_for_the_judge_is_not_asked_about() {
        let pair = Pair { question: "What?".into(), answer: "x".into() };
        assert!(agreement(50).prompt("Rates rose.", &pair).is_some());
        assert!(agreement(50).prompt(&"Rates rose. ".repeat(60), &pair).is_none());
    }
}
