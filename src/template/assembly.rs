//! How a text and its pairs are put together, in each layout, with one short entry in every family.

use super::choice::{Choices, Layout};
use super::render::{Rendered, render};
use super::{BUILT_IN, Templates};
use crate::prompt::Pair;
use crate::record::{Document, Entry};

/// Every family that is to be seen, with a single entry.
const FILES: [(&str, &str); 21] = [
    (
        "free-form",
        "[[pattern]]\ninput_prefix = 'Q '\ninput = '{question}'\ndelimiter = '='\n\
         target_prefix = 'A '\ntarget = '{answer}'\nseparator = ' | '",
    ),
    (
        "options",
        "[[pattern]]\ninput = '{question} {options}'\ndelimiter = '='\n\
         target = '{option_answer}'\nseparator = ' unused '",
    ),
    (
        "reasoning",
        "[[pattern]]\ninput = '{question}'\ndelimiter = '='\n\
         target = '{reasoning}, so {answer}'\nseparator = ' unused '",
    ),
    (
        "numbered",
        "[[pattern]]\ninput = '{context} ({questions})'\ndelimiter = '='\ntarget = '({answers})'",
    ),
    ("next-turn", "[[pattern]]\ninput = '({dialog})'\ndelimiter = '='\ntarget = '{last_turn}'"),
    (
        "inline-explained",
        "[[inline]]\nheader = '<{context}>'\nexample = '({input} {output}: {explanation})'\n\
         test = '({input} ... {output})'\nseparator = '&'",
    ),
    (
        "inline-plain",
        "[[inline]]\nheader = '<{context}>'\nexample = '({input} {output})'\n\
         test = '({input} ... {output})'\nseparator = '&'",
    ),
    ("before-text", "[[phrase]]\ntext = 'read [{context}]'"),
    ("text-glue", "[[phrase]]\ntext = '+'"),
    ("introduction", "[[phrase]]\ntext = 'introduction'"),
    ("inverted-header", "[[phrase]]\ntext = 'header [{pairs}]'"),
    ("inverted-glue", "[[phrase]]\ntext = '+'"),
    ("inverted-text", "[[phrase]]\ntext = 'text [{context}]'"),
    ("options-opener", "[[phrase]]\ntext = 'of'"),
    ("option-names", "[[names]]\nstyle = 'upper'\nbefore = ' ('\nafter = ') '"),
    ("option-ending", "[[phrase]]\ntext = ';'"),
    ("none-of-these", "[[phrase]]\ntext = 'none at all'"),
    ("question-names", "[[names]]\nstyle = 'digit'\nbefore = ''\nafter = '. '"),
    ("dialog-opener", "[[phrase]]\ntext = 'opener'"),
    ("dialog-connector", "[[phrase]]\ntext = '+'"),
    ("dialog-ending", "[[phrase]]\ntext = ';'"),
];

const SPEAKERS: (&str, &str) =
    ("dialog-speakers", "[[speakers]]\nfirst = 'she: '\nsecond = 'he: '");

/// The short families, those of `others` in place of their own.
fn templates(others: &[(&str, &str)]) -> Templates {
    let files = BUILT_IN.map(|(name, text)| {
        let short = others.iter().chain(&[SPEAKERS]).chain(&FILES);
        let own = short.clone().find(|(family, _)| name.strip_suffix(".toml") == Some(family));
        (name, own.map_or(text, |(_, text)| text).to_owned())
    });
    Templates::load(&files).unwrap()
}

fn entry(id: &str, pairs: &[(&str, &str)]) -> Entry {
    let pair = |(question, answer): &(&str, &str)| Pair {
        question: (*question).into(),
        answer: (*answer).into(),
    };
    let document = Document { id: id.into(), text: format!("{id}."), ..Document::default() };
    Entry { document, pairs: pairs.iter().map(pair).collect(), ..Entry::default() }
}

/// The first rendering of the texts whose choices are as wanted.
fn find(entries: &[Entry], templates: &Templates, wanted: fn(&Choices) -> bool) -> Rendered {
    let rendered = (0..10_000).map(|run| render(entries, templates, run).remove(0));
    let mut fitting = rendered.filter(|one| wanted(one.choices.as_ref().unwrap()));
    fitting.next().expect("one of ten thousand is as wanted")
}

fn classic(choices: &Choices) -> bool {
    choices.layout == Layout::Classic && !choices.inverted
}

const TWO: [(&str, &str); 2] = [("q1?", "a1"), ("q2?", "a2")];
const REASONED: [(&str, &str); 2] = [
    ("q1?\nLet's think step by step.", "r1.\nTherefore, the answer is a1"),
    ("q2?\nLet's think step by step.", "r2.\nTherefore, the answer is a2"),
];

fn check(pairs: &[(&str, &str)], wanted: fn(&Choices) -> bool, expected: &str) {
    let rendered = find(&[entry("T", pairs)], &templates(&[]), wanted);
    assert_eq!(rendered.text, expected);
}

#[test]
fn classic_is_text_introduction_and_pairs() {
    check(&TWO, classic, "read [T.]+introduction | Q q1?=A a1 | Q q2?=A a2");
}

#[test]
fn without_an_introduction_nothing_is_glued() {
    let templates = templates(&[("introduction", "[[phrase]]\ntext = ''")]);
    let rendered = find(&[entry("T", &TWO)], &templates, classic);
    assert_eq!(rendered.text, "read [T.] | Q q1?=A a1 | Q q2?=A a2");
}

#[test]
fn inverted_is_pairs_and_text() {
    let inverted = |choices: &Choices| choices.layout == Layout::Classic && choices.inverted;
    check(&TWO, inverted, "header [Q q1?=A a1 | Q q2?=A a2]+text [T.]");
    let inverted =
        |choices: &Choices| choices.layout == Layout::Dialog && choices.inverted && !choices.spaced;
    check(&TWO, inverted, "header [she: q1?\nhe: a1;\nshe: q2?\nhe: a2;]+text [T.]");
}

#[test]
fn a_dialog_has_speakers_in_place_of_prefixes() {
    fn dialog(choices: &Choices) -> bool {
        choices.layout == Layout::Dialog && !choices.inverted
    }
    let close = "T.+opener\nshe: q1?\nhe: a1;\nshe: q2?\nhe: a2;";
    check(&TWO, |choices| dialog(choices) && !choices.spaced, close);
    let spaced = "T.+opener\n\nshe: q1?\nhe: a1;\n\nshe: q2?\nhe: a2;";
    check(&TWO, |choices| dialog(choices) && choices.spaced, spaced);
}

#[test]
fn the_next_turn_is_asked_for_after_all_others() {
    let next_turn = |choices: &Choices| choices.layout == Layout::NextTurn && !choices.spaced;
    check(&TWO, next_turn, "T. | (she: q1?\nhe: a1;\nshe: q2?)=he: a2;");
}

#[test]
fn numbered_answers_follow_all_numbered_questions() {
    let numbered = |choices: &Choices| choices.layout == Layout::Numbered;
    check(&TWO, numbered, "T. (1. q1?\n2. q2?)=(1. a1\n2. a2)");
}

#[test]
fn inline_examples_are_explained_only_if_all_pairs_reason() {
    let inline = |choices: &Choices| choices.layout == Layout::Inline;
    check(&TWO, inline, "<T.>&(q1? a1)&(q2? ... a2)");
    check(&REASONED, inline, "<T.>&(q1? a1: r1)&(q2? ... a2)");
    check(&[REASONED[0], TWO[1]], inline, "<T.>&(q1? a1)&(q2? ... a2)");
}

#[test]
fn one_separator_rules_pairs_of_all_kinds_and_the_texts_of_a_document() {
    let pairs = [REASONED[0], ("q2?\nOptions:\n- red", "red"), TWO[1]];
    let first = "read [T.]+introduction | q1?=r1, so a1 | q2? of (A) red;=(A) | Q q2?=A a2";
    check(&pairs, classic, first);
    let mut entries = [entry("T", &pairs), entry("U", &[TWO[0]])];
    entries[1].inherits = true;
    let rendered = find(&entries, &templates(&[]), classic);
    assert_eq!(rendered.text, format!("{first} | read [U.]+introduction | Q q1?=A a1"));
}

#[test]
fn row_15_an_answer_that_none_is_right_is_the_phrase_of_the_document() {
    let pairs = [("q1?\nOptions:\n- red", "None"), ("q2?\nOptions:\n- blue", "None at all.")];
    let head = "read [T.]+introduction |";
    check(
        &pairs,
        classic,
        &format!("{head} q1? of (A) red;=none at all | q2? of (A) blue;=none at all"),
    );
    let by_text = "[[pattern]]\ninput = '{question}'\ndelimiter = '='\ntarget = '{answer}'";
    let templates = templates(&[("options", by_text)]);
    let rendered = find(&[entry("T", &pairs)], &templates, classic);
    assert_eq!(rendered.text, format!("{head} q1?=none at all | q2?=none at all"));
}

#[test]
fn row_19_options_beyond_the_alphabet_are_shown_and_numbered() {
    let options: Vec<String> = (0..30).map(|number| format!("[{number}]")).collect();
    let question = format!("q1?\nOptions:\n- {}", options.join("\n- "));
    let rendered = find(&[entry("T", &[(&question, "[29]")])], &templates(&[]), classic);
    for option in &options {
        assert_eq!(rendered.text.matches(option.as_str()).count(), 1, "{}", rendered.text);
    }
    assert!(rendered.text.contains(" (AD) ["), "{}", rendered.text);
    let (list, answer) = rendered.text.rsplit_once('=').unwrap();
    assert!(list.contains(&format!(" {answer} [29];")), "{}", rendered.text);
}

#[test]
fn an_enumerated_answer_is_its_name_and_one_behind_a_bullet_its_text() {
    let pairs = [("q1?\nOptions:\n- red", "red")];
    let named = find(&[entry("T", &pairs)], &templates(&[]), classic);
    assert!(named.text.ends_with("q1? of (A) red;=(A)"), "{}", named.text);
    let bullets = [("option-names", "[[names]]\nstyle = 'bullet'\nbefore = ' - '\nafter = ''")];
    let bulleted = find(&[entry("T", &pairs)], &templates(&bullets), classic);
    assert!(bulleted.text.ends_with("q1? of - red;=red"), "{}", bulleted.text);
}
