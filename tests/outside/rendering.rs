//! Rendered documents look different from each other, and say what their texts and pairs say.

use headwater::chain::Chain;
use headwater::prompt::Pair;
use headwater::record::{Document, Entry};
use headwater::template::Templates;
use headwater::template::render::{Rendered, render};
use std::collections::{BTreeMap, BTreeSet};

fn chain(number: usize) -> Chain {
    let entry = |text: usize| Entry {
        document: Document {
            id: format!("{number}-{text}"),
            text: format!("The text {text} of {number}."),
            ..Document::default()
        },
        pairs: (0..3)
            .map(|pair| Pair {
                question: format!("Which question {pair} is this of {number}-{text}?"),
                answer: format!("Answer {pair} of {number}-{text}."),
            })
            .collect(),
        inherits: text > 0,
        ..Entry::default()
    };
    Chain { index: number as u64, entries: (0..2).map(entry).collect(), ..Chain::default() }
}

/// The rendered document with its own words taken out: what the templates have added.
fn frame(text: &str, number: usize) -> String {
    let mut frame = text.to_owned();
    for entry in &chain(number).entries {
        frame = frame.replace(&entry.document.text, "T");
        for pair in &entry.pairs {
            frame = frame.replace(&pair.question, "Q").replace(&pair.answer, "A");
        }
    }
    frame
}

fn whole(number: usize, seed: u64) -> Rendered {
    let mut documents = render(&chain(number).entries, &Templates::built_in(), seed);
    assert_eq!(documents.len(), 1);
    documents.remove(0)
}

fn rendered(number: usize, seed: u64) -> String {
    whole(number, seed).text
}

#[test]
fn no_two_documents_in_ten_look_alike() {
    for seed in 0..20 {
        let frames: BTreeSet<String> =
            (0..10).map(|number| frame(&rendered(number, seed), number)).collect();
        assert_eq!(frames.len(), 10, "seed {seed}");
    }
}

#[test]
fn texts_and_pairs_are_shown_word_by_word_and_once() {
    for number in 0..300 {
        let Rendered { text, shown, hidden, .. } = whole(number, 1);
        let mut answers = 0;
        for entry in &chain(number).entries {
            assert_eq!(text.matches(&entry.document.text).count(), 1, "{text}");
            for pair in &entry.pairs {
                assert_eq!(text.matches(&pair.question).count(), 1, "{text}");
                answers += text.matches(&pair.answer).count() as u64;
            }
        }
        assert_eq!((answers, shown + hidden), (shown, 6), "{text}"); // some patterns only ask
        assert!(!text.contains("{"), "a placeholder is left: {text}");
    }
}

#[test]
fn a_seed_always_draws_the_same_and_another_draws_anew() {
    for number in 0..20 {
        assert_eq!(rendered(number, 5), rendered(number, 5));
    }
    assert!((0..20).any(|number| rendered(number, 5) != rendered(number, 6)));
}

#[test]
fn row_20_placeholders_inside_texts_are_text() {
    let mut chain = chain(1);
    chain.entries.truncate(1);
    let words = ["{question}", "{answer} {text}", "{0} {{}} {options}"];
    chain.entries[0].document.text = words[0].into();
    chain.entries[0].pairs.truncate(1);
    chain.entries[0].pairs[0] = Pair { question: words[1].into(), answer: words[2].into() };
    for seed in 0..100 {
        let rendered = &render(&chain.entries, &Templates::built_in(), seed)[0];
        let text = &rendered.text;
        for (words, times) in words.into_iter().zip([1, 1, rendered.shown as usize]) {
            assert_eq!(text.matches(words).count(), times, "{text}");
        }
    }
}

#[test]
fn all_five_layouts_come_up_about_as_often_as_they_should() {
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for number in 0..2000 {
        let documents = render(&chain(number).entries, &Templates::built_in(), 3);
        let choices = documents[0].choices.as_ref().unwrap();
        *counts.entry(format!("{:?}", choices.layout)).or_default() += 1;
    }
    assert_eq!(counts.len(), 5, "{counts:?}");
    assert!((1500..1700).contains(&counts["Classic"]), "{counts:?}");
    for (name, count) in counts.iter().filter(|(name, _)| *name != "Classic") {
        assert!((60..150).contains(count), "{name}: {counts:?}");
    }
}
