//! How many entries each family has at least, and what share of them has which shape.
//!
//! Counts and shares are those of the method's first implementation (arXiv 2406.14491); the entries are
//! our own.

use super::BUILT_IN;
use toml::{Table, Value};

/// How far a share may be from the one that is asked for: two entries of about eighty.
const TOLERANCE: f64 = 0.03;

fn entries(name: &str) -> Vec<Table> {
    let (_, text) = BUILT_IN.iter().find(|(file, _)| *file == format!("{name}.toml")).unwrap();
    let file: Table = text.parse().unwrap();
    let families: Vec<&Value> = file.values().collect();
    assert_eq!(families.len(), 1, "{name}");
    let entries = families[0].as_array().unwrap().iter();
    entries.map(|entry| entry.as_table().unwrap().clone()).collect()
}

fn text<'a>(entry: &'a Table, field: &str, default: &'a str) -> &'a str {
    entry.get(field).map_or(default, |value| value.as_str().unwrap())
}

/// Whether the family has `floor` different entries, and its shapes the shares of the stated counts.
fn check(name: &str, floor: usize, shape: impl Fn(&Table) -> &'static str, stated: &[(&str, u32)]) {
    let entries = entries(name);
    assert!(entries.len() >= floor, "{name} has {} entries", entries.len()); // all different
    let weight = |entry: &Table| entry.get("weight").map_or(1, |w| w.as_integer().unwrap()) as f64;
    let weigh = |own: &dyn Fn(&Table) -> bool| -> f64 {
        entries.iter().filter(|&entry| own(entry)).map(weight).sum()
    };
    let all = weigh(&|entry| stated.iter().any(|(known, _)| shape(entry) == *known));
    assert_eq!(all, weigh(&|_| true), "{name} has an entry of another shape");
    let stated_all: u32 = stated.iter().map(|(_, count)| count).sum();
    for &(one, count) in stated {
        let share = weigh(&|entry| shape(entry) == one) / all;
        let expected = f64::from(count) / f64::from(stated_all);
        let near = (share - expected).abs() <= TOLERANCE && share > 0.0;
        assert!(near, "{name}: {one} has {share:.3} and not {expected:.3}");
    }
}

/// Which slots stand in the input and in the target of a pair pattern.
struct Sides<'a> {
    input: &'a str,
    target: &'a str,
}

impl Sides<'_> {
    fn of(entry: &Table) -> Sides<'_> {
        Sides { input: text(entry, "input", ""), target: text(entry, "target", "") }
    }

    fn gives(&self, slot: &str) -> bool {
        self.input.contains(&format!("{{{slot}}}"))
    }

    fn asks(&self, slot: &str) -> bool {
        self.target.contains(&format!("{{{slot}}}"))
    }

    fn gives_answer(&self) -> bool {
        self.gives("answer") || self.gives("option_answer")
    }

    fn asks_answer(&self) -> bool {
        self.asks("answer") || self.asks("option_answer")
    }

    /// Whether the answer stands before the reasoning in the target.
    fn answer_first(&self) -> bool {
        let answer = self.target.find("answer}");
        answer.is_some() && answer < self.target.find("{reasoning}")
    }

    /// What is asked for, given what, where there is reasoning.
    fn reasoning_shape(&self) -> &'static str {
        let given = (self.gives("question"), self.gives("reasoning"), self.gives_answer());
        match given {
            (true, false, false) if !self.asks_answer() => "question → reasoning",
            (true, false, false) if self.answer_first() => "question → answer, reasoning",
            (true, false, false) => "question → reasoning, answer",
            (true, false, true) => "question, answer → reasoning",
            (false, true, false) => "reasoning → question, answer",
            (false, false, true) => "answer → question, reasoning",
            (false, true, true) => "reasoning, answer → question",
            (true, true, true) if self.asks("options") => "all → options",
            _ => "other",
        }
    }
}

#[test]
fn free_form_patterns_have_their_shapes() {
    let order = |entry: &Table| {
        let sides = Sides::of(entry);
        match (sides.gives("question"), sides.asks("answer")) {
            (true, true) => "question first",
            (true, false) => "question only",
            (false, _) => "answer first",
        }
    };
    let stated = [("question first", 64), ("answer first", 10), ("question only", 5)];
    check("free-form", 73, order, &stated);
}

#[test]
fn free_form_patterns_have_their_delimiters_and_separators() {
    let delimiter = |entry: &Table| match text(entry, "delimiter", "\n\n") {
        "\n" => "line",
        "\n\n" | "" => "blank line", // where only the question stands, nothing is to be seen of it
        " " => "space",
        _ => "ruled",
    };
    let stated = [("line", 33), ("blank line", 27), ("space", 6), ("ruled", 13)];
    check("free-form", 73, delimiter, &stated);
    let separator = |entry: &Table| match text(entry, "separator", "\n\n\n") {
        "\n\n\n" => "two blank lines",
        "\n\n" => "blank line",
        "\n" => "line",
        _ => "dashed",
    };
    let stated = [("two blank lines", 36), ("blank line", 34), ("line", 7), ("dashed", 2)];
    check("free-form", 73, separator, &stated);
}

#[test]
fn half_of_the_option_patterns_show_the_options() {
    let shown = |entry: &Table| match Sides::of(entry).gives("options") {
        true if Sides::of(entry).asks("option_answer") => "shown",
        false if Sides::of(entry).asks("answer") => "hidden, answered by text",
        _ => "other",
    };
    check("options", 47, shown, &[("shown", 24), ("hidden, answered by text", 24)]);
}

#[test]
fn reasoning_patterns_ask_for_every_part() {
    let shape = |entry: &Table| Sides::of(entry).reasoning_shape();
    let stated = [
        ("question → reasoning, answer", 104),
        ("question → answer, reasoning", 15),
        ("question, answer → reasoning", 23),
        ("reasoning → question, answer", 23),
        ("answer → question, reasoning", 22),
        ("reasoning, answer → question", 22),
        ("question → reasoning", 1),
    ];
    check("reasoning", 208, shape, &stated);
    let stated = [
        ("question → reasoning, answer", 132),
        ("question → answer, reasoning", 15),
        ("question, answer → reasoning", 23),
        ("reasoning → question, answer", 23),
        ("answer → question, reasoning", 22),
        ("reasoning, answer → question", 22),
        ("question → reasoning", 2),
        ("all → options", 1),
    ];
    check("options-reasoning", 240, shape, &stated);
}

#[test]
fn numbered_and_dialog_patterns_are_forward_and_reversed() {
    let numbered = |entry: &Table| match Sides::of(entry).asks("answers") {
        true => "forward",
        false => "reversed",
    };
    check("numbered", 11, numbered, &[("forward", 10), ("reversed", 1)]);
    let next_turn = |entry: &Table| match Sides::of(entry).asks("last_turn") {
        true => "forward",
        false => "reversed",
    };
    check("next-turn", 15, next_turn, &[("forward", 9), ("reversed", 6)]);
}

#[test]
fn inline_patterns_come_with_an_explanation_and_without() {
    let explained = |entry: &Table| match text(entry, "example", "") {
        example if example.find("{explanation}") > example.find("{output}") => "after the output",
        example if example.contains("{explanation}") => "before the output",
        _ => "none",
    };
    check("inline-explained", 10, explained, &[("after the output", 1)]);
    check("inline-plain", 10, explained, &[("none", 1)]);
}

#[test]
fn half_of_the_texts_and_questions_have_nothing_before_them() {
    let bare = |entry: &Table| match text(entry, "text", "") {
        "" | "{context}" => "bare",
        _ => "worded",
    };
    check("before-text", 51, bare, &[("bare", 50), ("worded", 50)]);
    check("introduction", 85, bare, &[("bare", 84), ("worded", 84)]);
    let glue = |entry: &Table| match text(entry, "text", "") {
        " " => "space",
        "\n" => "line",
        "\n\n" => "blank line",
        _ => "other",
    };
    check("text-glue", 3, glue, &[("space", 1), ("line", 1), ("blank line", 1)]);
}

#[test]
fn inverted_headers_are_bare_once() {
    let bare = |entry: &Table| match text(entry, "text", "") {
        "{pairs}" | "{context}" => "bare",
        _ => "worded",
    };
    check("inverted-header", 42, bare, &[("bare", 1), ("worded", 41)]);
    check("inverted-glue", 4, |_| "any", &[("any", 8)]);
    check("inverted-text", 60, bare, &[("bare", 1), ("worded", 59)]);
}

#[test]
fn options_are_bullets_and_enumerations() {
    let empty = |entry: &Table| match text(entry, "text", "") {
        "" => "empty",
        ";" => "semicolon",
        _ => "worded",
    };
    check("options-opener", 16, empty, &[("empty", 1), ("worded", 15)]);
    check("option-ending", 2, empty, &[("empty", 2), ("semicolon", 1)]);
    let style = |entry: &Table| match text(entry, "style", "") {
        "bullet" => "bullet",
        _ => "enumeration",
    };
    check("option-names", 63, style, &[("bullet", 23), ("enumeration", 64)]);
    check("question-names", 40, style, &[("enumeration", 64)]);
    let start = |entry: &Table| match text(entry, "before", "").starts_with('\n') {
        true => "line",
        false if text(entry, "before", "").starts_with(' ') => "space",
        false => "other",
    };
    check("option-names", 63, start, &[("line", 51), ("space", 36)]);
}

#[test]
fn half_of_the_phrases_for_none_of_these_are_lower_case() {
    let case = |entry: &Table| match text(entry, "text", "").starts_with(char::is_lowercase) {
        true => "lower",
        false => "upper",
    };
    check("none-of-these", 82, case, &[("lower", 41), ("upper", 41)]);
}

#[test]
fn conversations_have_two_speakers_or_one_bullet() {
    let empty = |entry: &Table| match text(entry, "text", "") {
        "" => "empty",
        _ => "worded",
    };
    check("dialog-opener", 15, empty, &[("empty", 1), ("worded", 14)]);
    check("dialog-connector", 4, |_| "any", &[("any", 4)]);
    let speakers = |entry: &Table| match text(entry, "first", "") == text(entry, "second", "") {
        true => "one bullet",
        false => "two speakers",
    };
    check("dialog-speakers", 49, speakers, &[("two speakers", 27), ("one bullet", 23)]);
    check("dialog-ending", 3, |_| "any", &[("any", 3)]);
}
