//! What kind of pair a pair is: plain or with a chain of thought, free or with options (recipe (c)).

use crate::prompt::Pair;

const STEP_BY_STEP: &str = "Let's think step by step.";
const THEREFORE: &str = "\nTherefore, the answer is ";
const OPTIONS: &str = "Options:\n- ";

/// A pair taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Form {
    /// The question without options and step-by-step line.
    pub stem: String,
    /// The options, if there are any.
    pub options: Option<Choice>,
    /// The reasoning that leads to the answer, if there is one.
    pub reasoning: Option<String>,
    /// The answer; with options, the full text of the right one.
    pub answer: String,
}

/// Options and which of them is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// All options, as given.
    pub options: Vec<String>,
    /// The right one; none if the answer says that none is.
    pub right: Option<usize>,
}

/// Why a pair cannot be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unshown {
    /// One of the marks of a chain of thought without the other, or text where none belongs.
    ChainMalformed,
    /// No question before the options, or two lists of them.
    OptionsMalformed,
    /// The answer is none of the options.
    AnswerNotAnOption,
}

impl Unshown {
    /// The name in ledgers and rejections.
    pub fn name(self) -> &'static str {
        match self {
            Unshown::ChainMalformed => "chain_malformed",
            Unshown::OptionsMalformed => "options_malformed",
            Unshown::AnswerNotAnOption => "answer_not_an_option",
        }
    }
}

/// Takes a pair apart. `is_none` says whether an answer means that no option is right.
pub fn form(pair: &Pair, is_none: impl Fn(&str) -> bool) -> Result<Form, Unshown> {
    let (question, reasoning, answer) = chain(&pair.question, &pair.answer)?;
    let (stem, options) = options(&question)?;
    let Some(options) = options else {
        return Ok(Form { stem, options: None, reasoning, answer });
    };
    let right = right_option(&options, &answer);
    if right.is_none() && !is_none(&answer) {
        return Err(Unshown::AnswerNotAnOption);
    }
    let answer = right.map_or(answer, |right| options[right].clone());
    Ok(Form { stem, options: Some(Choice { options, right }), reasoning, answer })
}

/// Question without the step-by-step line, reasoning, final answer.
fn chain(question: &str, answer: &str) -> Result<(String, Option<String>, String), Unshown> {
    if !question.contains(STEP_BY_STEP) && !answer.contains(THEREFORE) {
        return Ok((question.trim().to_owned(), None, answer.trim().to_owned()));
    }
    let malformed = Err(Unshown::ChainMalformed);
    let Some(stem) = question.trim_end().strip_suffix(STEP_BY_STEP) else {
        return malformed;
    };
    let Some(stem) = stem.strip_suffix('\n') else {
        return malformed;
    };
    let parts: Vec<&str> = answer.split(THEREFORE).map(str::trim).collect();
    let &[reasoning, answer] = parts.as_slice() else {
        return malformed;
    };
    let stem = stem.trim();
    if stem.is_empty() || stem.contains(STEP_BY_STEP) || reasoning.is_empty() || answer.is_empty() {
        return malformed;
    }
    let reasoning = reasoning.strip_suffix('.').unwrap_or(reasoning);
    Ok((stem.to_owned(), Some(reasoning.to_owned()), answer.to_owned()))
}

/// Question without options, and the options.
fn options(question: &str) -> Result<(String, Option<Vec<String>>), Unshown> {
    let lists = question.match_indices(OPTIONS).filter(|&(at, _)| {
        at == 0 || question[..at].ends_with('\n') // at the start of a line
    });
    let places: Vec<usize> = lists.map(|(at, _)| at).collect();
    match places.as_slice() {
        [] => Ok((question.to_owned(), None)),
        &[at] if !question[..at].trim().is_empty() => {
            let list = &question[at + OPTIONS.len()..];
            let options = list.split("\n- ").map(|option| option.trim().to_owned()).collect();
            Ok((question[..at].trim().to_owned(), Some(options)))
        }
        _ => Err(Unshown::OptionsMalformed),
    }
}

/// The option that the answer names: to the letter, or else, if only one does, but for case and one
/// final full stop.
fn right_option(options: &[String], answer: &str) -> Option<usize> {
    if let Some(exact) = options.iter().position(|option| option == answer) {
        return Some(exact);
    }
    let loose = |text: &str| {
        let text = text.trim();
        text.strip_suffix('.').unwrap_or(text).to_lowercase()
    };
    let answer = loose(answer);
    let mut alike = (0..options.len()).filter(|&index| loose(&options[index]) == answer);
    alike.next().filter(|_| alike.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(question: &str, answer: &str, expected: Result<Form, Unshown>) {
        let pair = Pair { question: question.into(), answer: answer.into() };
        assert_eq!(form(&pair, |answer| answer == "None"), expected, "{question:?} {answer:?}");
    }

    fn plain(stem: &str, answer: &str) -> Form {
        Form { stem: stem.into(), options: None, reasoning: None, answer: answer.into() }
    }

    fn choice(stem: &str, options: &[&str], right: Option<usize>, answer: &str) -> Form {
        let options = options.iter().map(|&option| option.to_owned()).collect();
        Form { options: Some(Choice { options, right }), ..plain(stem, answer) }
    }

    #[test]
    fn the_four_pair_types_are_told_apart() {
        check("What rose?", "Rates", Ok(plain("What rose?", "Rates")));
        let options = "What rose?\nOptions:\n- Rates\n- Wages";
        let form = choice("What rose?", &["Rates", "Wages"], Some(0), "Rates");
        check(options, "Rates", Ok(form.clone()));
        check(
            "How far in all?\nLet's think step by step.",
            "25, then 50 points.\nTherefore, the answer is 75",
            Ok(Form {
                reasoning: Some("25, then 50 points".into()),
                ..plain("How far in all?", "75")
            }),
        );
        check(
            &format!("{options}\nLet's think step by step."),
            "It says so.\nTherefore, the answer is Rates",
            Ok(Form { reasoning: Some("It says so".into()), ..form }),
        );
    }

    // The numbers are the rows of the behaviour table in recipe (c).

    #[test]
    fn row_13_case_and_a_full_stop_do_not_matter() {
        for answer in ["rates", "Rates.", "RATES."] {
            let form = choice("What?", &["Rates", "Wages"], Some(0), "Rates");
            check("What?\nOptions:\n- Rates\n- Wages", answer, Ok(form));
        }
        // Not if that makes two options alike.
        check("What?\nOptions:\n- Rates\n- rates.", "RATES", Err(Unshown::AnswerNotAnOption));
    }

    #[test]
    fn row_14_two_options_at_once_are_no_option() {
        check("What?\nOptions:\n- red\n- blue", "red, blue", Err(Unshown::AnswerNotAnOption));
    }

    #[test]
    fn row_15_none_is_an_answer_to_any_options() {
        let form = choice("What?", &["red", "blue"], None, "None");
        check("What?\nOptions:\n- red\n- blue", "None", Ok(form));
    }

    #[test]
    fn row_16_one_option_is_enough() {
        check("What?\nOptions:\n- red", "red", Ok(choice("What?", &["red"], Some(0), "red")));
    }

    #[test]
    fn row_17_a_list_without_a_question_and_two_lists_are_malformed() {
        check("Options:\n- red\n- blue", "red", Err(Unshown::OptionsMalformed));
        check("What?\nOptions:\n- red\nOptions:\n- blue", "red", Err(Unshown::OptionsMalformed));
    }

    #[test]
    fn row_18_half_a_chain_is_malformed() {
        let line = "\nLet's think step by step.";
        for (question, answer) in [
            (format!("What?{line}"), "Rates"),
            ("What?".into(), "So.\nTherefore, the answer is Rates"),
            (format!("What?{line} Please."), "So.\nTherefore, the answer is Rates"),
            (format!("What?{line}"), "\nTherefore, the answer is Rates"),
            (format!("What?{line}"), "So.\nTherefore, the answer is "),
            (format!("What?{line}"), "So.\nTherefore, the answer is a\nTherefore, the answer is b"),
            (line.into(), "So.\nTherefore, the answer is Rates"),
        ] {
            check(&question, answer, Err(Unshown::ChainMalformed));
        }
    }

    #[test]
    fn row_19_thirty_options_are_thirty_options() {
        let options: Vec<String> = (0..30).map(|i| format!("option {i}")).collect();
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let question = format!("Which?\nOptions:\n- {}", options.join("\n- "));
        check(&question, "option 29", Ok(choice("Which?", &options, Some(29), "option 29")));
    }
}
