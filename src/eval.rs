//! Scores of a synthesizer on rows it has not seen (recipe (i)).

use crate::format::tasks::Task;
use crate::prompt::{Parsed, PromptWriter, parse};
use crate::record::Finish;
use crate::synthesizer::{Completion, Request};
use crate::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How well a synthesizer does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Texts that pairs were asked for.
    pub texts: u64,
    /// Texts whose generation has a pair at least.
    pub texts_with_pairs: u64,
    /// Pairs of all texts.
    pub pairs: u64,
    /// Generations that the synthesizer closed itself.
    pub closed: u64,
    /// Questions whose answer was asked for.
    pub questions: u64,
    /// Mean F1 of the answers, given the question of the row.
    pub answer_f1: f64,
    /// Mean F1 of the pairs generated for a text against the pairs of its row, all words together.
    pub pairs_f1: f64,
}

/// What is asked of the synthesizer, and what the rows say.
#[derive(Debug)]
pub struct Exam {
    requests: Vec<Request>,
    expected: BTreeMap<u64, Expected>,
}

#[derive(Debug)]
enum Expected {
    /// Pairs for a text: all words of the row's own pairs.
    Pairs(String),
    Answer(String),
}

/// Bounds of an exam.
#[derive(Clone, Copy, Debug)]
pub struct ExamBounds {
    /// Rows that are asked for, evenly spread over all.
    pub rows_max: usize,
    /// Tokens to generate for a text.
    pub new_tokens_max: usize,
    /// Tokens of the model's context.
    pub context: usize,
}

/// Tokens of an answer: the longest of the tuning data fit.
const ANSWER_TOKENS_MAX: usize = 64;

impl Exam {
    /// Asks for the pairs of each text, and for the answer to the first question of each row.
    pub fn new(rows: &[Task], writer: &PromptWriter, bounds: ExamBounds) -> Self {
        let mut exam = Exam { requests: Vec::new(), expected: BTreeMap::new() };
        let step = rows.len().div_ceil(bounds.rows_max.max(1)).max(1);
        for row in rows.iter().filter(|row| !row.pairs.is_empty()).step_by(step) {
            let all: Vec<&str> =
                row.pairs.iter().flat_map(|pair| [&*pair.question, &*pair.answer]).collect();
            let expected = Expected::Pairs(all.join(" "));
            exam.ask(writer.question(&row.text), bounds.new_tokens_max, bounds, expected);
            let first = &row.pairs[0];
            let prompt = writer.answer(&row.text, &first.question);
            let expected = Expected::Answer(first.answer.clone());
            exam.ask(prompt, ANSWER_TOKENS_MAX, bounds, expected);
        }
        exam
    }

    fn ask(&mut self, tokens: Vec<u32>, new: usize, bounds: ExamBounds, expected: Expected) {
        if tokens.len() + new <= bounds.context {
            let key = self.requests.len() as u64;
            self.requests.push(Request { key, tokens, new_tokens_max: new });
            self.expected.insert(key, expected);
        }
    }

    /// What is to be generated.
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// Marks the answers.
    pub fn mark(&self, answers: &[Completion], tokenizer: &Tokenizer) -> Scores {
        let mut scores = Scores::default();
        let (mut answer_f1, mut pairs_f1) = (0.0, 0.0);
        for answer in answers {
            let text = tokenizer.decode(&answer.tokens);
            match &self.expected[&answer.key] {
                Expected::Pairs(expected) => {
                    let Parsed { pairs, dropped: _ } = parse(&text);
                    let words: Vec<&str> =
                        pairs.iter().flat_map(|pair| [&*pair.question, &*pair.answer]).collect();
                    scores.texts += 1;
                    scores.texts_with_pairs += u64::from(!pairs.is_empty());
                    scores.pairs += pairs.len() as u64;
                    scores.closed += u64::from(answer.finish == Finish::Stop);
                    pairs_f1 += f1(&words.join(" "), expected);
                }
                Expected::Answer(expected) => {
                    let answer = text.split("</END>").next().unwrap_or_default();
                    scores.questions += 1;
                    answer_f1 += f1(answer, expected);
                }
            }
        }
        scores.answer_f1 = answer_f1 / scores.questions.max(1) as f64;
        scores.pairs_f1 = pairs_f1 / scores.texts.max(1) as f64;
        scores
    }
}

/// F1 of two texts as bags of words: lower case, without punctuation and articles (SQuAD's evaluation
/// script, arXiv 1606.05250).
pub fn f1(predicted: &str, expected: &str) -> f64 {
    let (predicted, expected) = (words(predicted), words(expected));
    if predicted.is_empty() || expected.is_empty() {
        return f64::from(predicted == expected);
    }
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for word in &expected {
        *counts.entry(word).or_default() += 1;
    }
    let mut common = 0.0;
    for word in &predicted {
        if let Some(count) = counts.get_mut(word.as_str()).filter(|count| **count > 0) {
            *count -= 1;
            common += 1.0;
        }
    }
    2.0 * common / (predicted.len() + expected.len()) as f64
}

fn words(text: &str) -> Vec<String> {
    let kept: String =
        text.chars().filter(|c| !c.is_ascii_punctuation()).flat_map(char::to_lowercase).collect();
    let is_article = |word: &&str| !["a", "an", "the"].contains(word);
    kept.split_whitespace().filter(is_article).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::Pair;
    use crate::record::Place;
    use crate::tokenizer::tests::small;

    #[test]
    fn f1_is_that_of_squad() {
        assert_eq!(f1("The cat.", "cat"), 1.0);
        assert_eq!(f1("dog", "cat"), 0.0);
        assert_eq!(f1("", ""), 1.0);
        assert_eq!(f1("", "cat"), 0.0);
        assert_eq!(f1("Paris, France", "paris"), 2.0 / 3.0);
        assert_eq!(f1("a b b", "b b b c"), 2.0 * 2.0 / 6.0);
    }

    #[test]
    fn an_exam_asks_for_pairs_and_for_an_answer() {
        let tokenizer = small();
        let writer = PromptWriter::new(tokenizer.clone()).unwrap();
        let pair = Pair { question: "Who?".into(), answer: "Ann Lee".into() };
        let row = Task {
            id: "1".into(),
            dataset: "d".into(),
            text: "Ann Lee came.".into(),
            pairs: vec![pair],
            place: Place::default(),
        };
        let bounds = ExamBounds { rows_max: 10, new_tokens_max: 50, context: 1000 };
        let exam = Exam::new(std::slice::from_ref(&row), &writer, bounds);
        assert_eq!(exam.requests().len(), 2);
        let say = |key: u64, text: &str| Completion {
            key,
            tokens: tokenizer.encode(text),
            finish: Finish::Stop,
        };
        let answers = [say(0, "<QUE> Who? <ANS> Ann Lee </END>"), say(1, " Ann </END> more")];
        let scores = exam.mark(&answers, &tokenizer);
        assert_eq!((scores.texts, scores.texts_with_pairs, scores.pairs), (1, 1, 1));
        assert_eq!((scores.pairs_f1, scores.answer_f1), (1.0, 2.0 / 3.0));
        let too_small = ExamBounds { context: 20, ..bounds };
        assert!(Exam::new(&[row], &writer, too_small).requests().is_empty());
    }
}
