//! The wire format of the synthesizer: how prompts are written and generations read.
//!
//! ```text
//! block(text)    = SP "<CON>" SP text SP "</CON>"
//! pair(q, a)     = "<QUE>" SP q SP "<ANS>" SP a SP "</END>"
//! example(t, ps) = BOS block(t) LF LF pair LF LF pair … EOS
//! prompt(h, t)   = example(h₁) example(h₂) … BOS block(t) LF LF
//! ```
//!
//! Markers are ordinary text; `BOS` and `EOS` are ids that only this module places. The format is that of
//! the published synthesizer (arXiv 2406.14491); the outcomes of reading are our own rule: every piece of
//! a generation is a pair or is dropped for one counted reason.

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

const CONTEXT: &str = "<CON>";
const CONTEXT_END: &str = "</CON>";
const QUESTION: &str = "<QUE>";
const ANSWER: &str = "<ANS>";
const PAIR_END: &str = "</END>";

/// The markers of the wire format. Inside a document they are text like any other.
pub const MARKERS: [&str; 5] = [CONTEXT, CONTEXT_END, QUESTION, ANSWER, PAIR_END];

/// A question with its answer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Pair {
    /// What is asked; options and the step-by-step line are part of it.
    pub question: String,
    /// What is answered.
    pub answer: String,
}

/// Why a piece of a generation is no pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Nothing before the end mark.
    EmptyPiece,
    /// No `<ANS>`.
    NoAnswerMarker,
    /// Does not start with `<QUE>`.
    NoQuestionMarker,
    /// A further marker inside.
    StrayMarker,
    /// Nothing between `<QUE>` and `<ANS>`.
    EmptyQuestion,
    /// Nothing behind `<ANS>`.
    EmptyAnswer,
    /// The same question again, in whatever case.
    DuplicateQuestion,
    /// Text behind the last end mark: cut off by the token limit, or trailing off.
    Unfinished,
    /// A blank generation.
    NoOutput,
}

impl Reason {
    /// The name in ledgers and rejections.
    pub fn name(self) -> &'static str {
        match self {
            Reason::EmptyPiece => "empty_piece",
            Reason::NoAnswerMarker => "no_answer_marker",
            Reason::NoQuestionMarker => "no_question_marker",
            Reason::StrayMarker => "stray_marker",
            Reason::EmptyQuestion => "empty_question",
            Reason::EmptyAnswer => "empty_answer",
            Reason::DuplicateQuestion => "duplicate_question",
            Reason::Unfinished => "unfinished",
            Reason::NoOutput => "no_output",
        }
    }
}

/// What a generation says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// The pairs, in order.
    pub pairs: Vec<Pair>,
    /// Pieces that are no pairs, in order, with their text.
    pub dropped: Vec<(Reason, String)>,
}

/// Reads a generation: one outcome for each piece.
pub fn parse(generation: &str) -> Parsed {
    let mut parsed = Parsed::default();
    if generation.trim().is_empty() {
        parsed.dropped.push((Reason::NoOutput, String::new()));
        return parsed;
    }
    let mut questions = BTreeSet::new();
    let mut pieces: Vec<&str> = generation.split(PAIR_END).collect();
    let tail = pieces.pop().expect("splitting yields at least one piece");
    for piece in pieces {
        match parse_piece(piece) {
            Ok(pair) if !questions.insert(pair.question.to_lowercase()) => {
                parsed.dropped.push((Reason::DuplicateQuestion, piece.trim().to_owned()));
            }
            Ok(pair) => parsed.pairs.push(pair),
            Err(reason) => parsed.dropped.push((reason, piece.trim().to_owned())),
        }
    }
    if !tail.trim().is_empty() {
        parsed.dropped.push((Reason::Unfinished, tail.trim().to_owned()));
    }
    parsed
}

fn parse_piece(piece: &str) -> std::result::Result<Pair, Reason> {
    let piece = piece.trim();
    if piece.is_empty() {
        return Err(Reason::EmptyPiece);
    }
    let (left, answer) = piece.split_once(ANSWER).ok_or(Reason::NoAnswerMarker)?;
    let question = left.trim().strip_prefix(QUESTION).ok_or(Reason::NoQuestionMarker)?;
    if MARKERS.iter().any(|marker| question.contains(marker) || answer.contains(marker)) {
        return Err(Reason::StrayMarker);
    }
    let (question, answer) = (question.trim(), answer.trim());
    if question.is_empty() {
        return Err(Reason::EmptyQuestion);
    }
    if answer.is_empty() {
        return Err(Reason::EmptyAnswer);
    }
    Ok(Pair { question: question.to_owned(), answer: answer.to_owned() })
}

/// Whether a text holds something that looks like a marker. It is kept, and counted.
pub fn holds_marker(text: &str) -> bool {
    memchr::memchr_iter(b'<', text.as_bytes()).any(|at| {
        let rest = &text.as_bytes()[at..];
        MARKERS.iter().chain(&["<s>", "</s>"]).any(|marker| rest.starts_with(marker.as_bytes()))
    })
}

/// Writes prompts as token ids.
#[derive(Clone, Debug)]
pub struct PromptWriter {
    tokenizer: Tokenizer,
    bos: u32,
    eos: u32,
}

impl PromptWriter {
    /// A writer for the synthesizer that `tokenizer` belongs to.
    ///
    /// # Errors
    /// If the tokenizer does not say which ids open and end a text.
    pub fn new(tokenizer: Tokenizer) -> Result<Self> {
        let missing = |which| Error::Setting(format!("the synthesizer's tokenizer has no {which}"));
        let bos = tokenizer.bos().ok_or_else(|| missing("bos_token"))?;
        let eos = tokenizer.eos().ok_or_else(|| missing("eos_token"))?;
        Ok(PromptWriter { tokenizer, bos, eos })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The id that ends a generation.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The ids of a text whose pairs are known.
    pub fn example(&self, text: &str, pairs: &[Pair]) -> Vec<u32> {
        let (body, _) = body(text, pairs);
        [vec![self.bos], self.tokenizer.encode(&body), vec![self.eos]].concat()
    }

    /// The ids of a text whose pairs are asked for.
    pub fn question(&self, text: &str) -> Vec<u32> {
        [vec![self.bos], self.tokenizer.encode(&opening(text))].concat()
    }

    /// Whether [`Self::question`] has so many ids at most for a text.
    pub fn question_fits(&self, text: &str, tokens_max: usize) -> bool {
        tokens_max > 0 && self.tokenizer.has_at_most(&opening(text), tokens_max - 1)
    }

    /// The ids of a text and a question whose answer is asked for: what accuracy is measured with.
    pub fn answer(&self, text: &str, question: &str) -> Vec<u32> {
        let body = format!("{}{QUESTION} {question} {ANSWER}", opening(text));
        [vec![self.bos], self.tokenizer.encode(&body)].concat()
    }

    /// The ids of an example, and for each whether it is part of what the synthesizer must learn to
    /// write: from the first `<QUE>` to the closing id.
    pub fn lesson(&self, text: &str, pairs: &[Pair]) -> (Vec<u32>, Vec<bool>) {
        let (body, answers) = body(text, pairs);
        let (mut ids, starts) = self.tokenizer.encode_with_starts(&body);
        let mut learned: Vec<bool> = starts.iter().map(|&start| start >= answers).collect();
        ids.insert(0, self.bos);
        learned.insert(0, false);
        ids.push(self.eos);
        learned.push(true);
        (ids, learned)
    }
}

/// Everything up to the first pair.
fn opening(text: &str) -> String {
    [" ", CONTEXT, " ", text, " ", CONTEXT_END, "\n\n"].concat() // in one piece of memory
}

/// An example without its opening and closing ids, and the byte at which its pairs start.
fn body(text: &str, pairs: &[Pair]) -> (String, usize) {
    let mut body = opening(text);
    let answers = body.len();
    for (index, Pair { question, answer }) in pairs.iter().enumerate() {
        let joiner = if index > 0 { "\n\n" } else { "" };
        body += &format!("{joiner}{QUESTION} {question} {ANSWER} {answer} {PAIR_END}");
    }
    (body, answers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::small;

    fn pair(question: &str, answer: &str) -> Pair {
        Pair { question: question.into(), answer: answer.into() }
    }

    fn check(generation: &str, pairs: &[(&str, &str)], dropped: &[Reason]) {
        let parsed = parse(generation);
        let expected: Vec<Pair> = pairs.iter().map(|(q, a)| pair(q, a)).collect();
        assert_eq!(parsed.pairs, expected, "{generation:?}");
        let reasons: Vec<Reason> = parsed.dropped.iter().map(|(reason, _)| *reason).collect();
        assert_eq!(reasons, dropped, "{generation:?}");
    }

    // The numbers are the rows of the behaviour table in recipe (c).

    #[test]
    fn row_1_a_pair_is_kept() {
        check("<QUE> a <ANS> b </END>", &[("a", "b")], &[]);
    }

    #[test]
    fn row_2_an_unclosed_pair_is_unfinished() {
        check("<QUE> a <ANS> b </END>\n\n<QUE> c <ANS> d", &[("a", "b")], &[Reason::Unfinished]);
    }

    #[test]
    fn row_3_noise_before_a_question_costs_that_pair_only() {
        check(
            "noise <QUE> a <ANS> b </END>\n\n<QUE> c <ANS> d </END>",
            &[("c", "d")],
            &[Reason::NoQuestionMarker],
        );
    }

    #[test]
    fn row_4_an_empty_answer_is_dropped() {
        check("<QUE> a <ANS>  </END>", &[], &[Reason::EmptyAnswer]);
    }

    #[test]
    fn row_5_an_empty_question_is_dropped() {
        check("<QUE>  <ANS> b </END>", &[], &[Reason::EmptyQuestion]);
    }

    #[test]
    fn row_6_a_question_counts_once_in_whatever_case() {
        check(
            "<QUE> a <ANS> b </END>\n\n<QUE> A <ANS> c </END>",
            &[("a", "b")],
            &[Reason::DuplicateQuestion],
        );
    }

    #[test]
    fn row_7_a_blank_tail_is_no_piece() {
        check("<QUE> a <ANS> b </END> ", &[("a", "b")], &[]);
    }

    #[test]
    fn row_8_no_output_and_an_empty_piece_are_told_apart() {
        check("", &[], &[Reason::NoOutput]);
        check(" \n", &[], &[Reason::NoOutput]);
        check("</END>", &[], &[Reason::EmptyPiece]);
    }

    #[test]
    fn row_9_a_piece_without_an_answer_marker_is_dropped() {
        check("<QUE> a </END>", &[], &[Reason::NoAnswerMarker]);
    }

    #[test]
    fn row_10_two_answer_markers_are_stray() {
        check("<QUE> a <ANS> b <ANS> c </END>", &[], &[Reason::StrayMarker]);
    }

    #[test]
    fn row_11_two_question_markers_are_stray() {
        check("<QUE> x <QUE> a <ANS> b </END>", &[], &[Reason::StrayMarker]);
    }

    #[test]
    fn row_12_a_question_marker_in_an_answer_is_stray() {
        check("<QUE> a <ANS> b <QUE> c </END>", &[], &[Reason::StrayMarker]);
    }

    #[test]
    fn checks_run_in_the_order_of_the_rule() {
        check("x <QUE> a <CON> </END>", &[], &[Reason::NoAnswerMarker]);
        check("x <ANS> <ANS> </END>", &[], &[Reason::NoQuestionMarker]);
        check("<QUE> <ANS> <CON> </END>", &[], &[Reason::StrayMarker]);
        check("<QUE> <ANS> </END>", &[], &[Reason::EmptyQuestion]);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let pairs = [pair("What rose?", "Rates"), pair("Why?\nOptions:\n- a\n- b", "a")];
        let (body, answers) = body("Rates rose.", &pairs);
        assert_eq!(&body[..answers], " <CON> Rates rose. </CON>\n\n");
        assert_eq!(parse(&body[answers..]), Parsed { pairs: pairs.to_vec(), dropped: vec![] });
    }

    #[test]
    fn one_example_has_the_bytes_of_the_format() {
        let (body, _) = body("Rates rose.", &[pair("What rose?", "Rates")]);
        assert_eq!(body, " <CON> Rates rose. </CON>\n\n<QUE> What rose? <ANS> Rates </END>");
    }

    #[test]
    fn a_prompt_continues_as_the_example_it_asks_for() {
        let writer = PromptWriter::new(small()).unwrap();
        let pairs = [pair("What rose?", "Rates"), pair("Really?", "Yes")];
        let (question, example) =
            (writer.question("Rates rose."), writer.example("Rates rose.", &pairs));
        assert_eq!(example[..question.len()], question);
        assert_eq!((example[0], example.last()), (1, Some(&2)));
        let generated = writer.tokenizer().decode(&example[question.len()..]);
        assert_eq!(parse(&generated).pairs, pairs);
    }

    #[test]
    fn the_ids_of_a_prompt_are_those_on_record() {
        // Written down from the reference implementation of tokenizers in Python.
        let rates = [1, 223, 30, 37, 49, 48, 32, 223, 269, 265, 16, 223, 30, 17, 37, 49, 48, 32];
        let lines = [201, 201];
        let first = [
            30, 51, 55, 39, 32, 223, 281, 265, 33, 223, 30, 35, 48, 53, 32, 223, 269, 223, 30, 17,
            39, 48, 38, 32,
        ];
        let second = [
            30, 51, 55, 39, 32, 223, 270, 81, 33, 223, 30, 35, 48, 53, 32, 223, 48, 81, 68, 81, 70,
            91, 223, 30, 17, 39, 48, 38, 32,
        ];
        let writer = PromptWriter::new(small()).unwrap();
        let pairs = [pair("What rose?", "Rates"), pair("Who?", "Nobody")];
        let example = [&rates[..], &lines, &first, &lines, &second, &[2]].concat();
        assert_eq!(writer.example("Rates rose.", &pairs), example);
        assert_eq!(writer.question("Rates rose."), [&rates[..], &lines].concat());
        let empty = [1, 223, 30, 37, 49, 48, 32, 223, 223, 30, 17, 37, 49, 48, 32, 201, 201];
        assert_eq!(writer.question(""), empty);
    }

    #[test]
    fn blanks_of_all_alphabets_are_trimmed() {
        check("\u{feff}<QUE> a <ANS> b </END>", &[], &[Reason::NoQuestionMarker]); // no blank
        check("\u{3000}<QUE>\u{a0}a\u{2003}<ANS>\u{85}b\t</END>\u{a0}", &[("a", "b")], &[]);
    }

    #[test]
    fn a_lesson_starts_at_the_first_question() {
        let writer = PromptWriter::new(small()).unwrap();
        let (ids, learned) = writer.lesson("Rates <QUE> rose.", &[pair("What?", "Rates")]);
        let first = learned.iter().position(|&learned| learned).unwrap();
        assert_eq!(writer.question("Rates <QUE> rose."), ids[..first]);
        assert!(learned[first..].iter().all(|&learned| learned));
        assert_eq!(ids, writer.example("Rates <QUE> rose.", &[pair("What?", "Rates")]));
    }

    #[test]
    fn markers_inside_a_text_are_noticed() {
        assert!(holds_marker("if a </END> b") && holds_marker("<s>struck</s>"));
        assert!(!holds_marker("if a < b and b > c"));
    }
}
