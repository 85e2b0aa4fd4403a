//! Laws of templating, over a hundred thousand documents.
//!
//! Seeds are fixed, so that a law holds or fails for ever. A bound is what a fair source crosses about
//! once in three million tries: five standard deviations for a count, and for a chi-square sum the value
//! that is as rare ([`ceiling`]).

use super::Templates;
use super::choice::{Choices, Layout};
use super::family::PairPattern;
use super::pattern::Slot;
use super::render::{Rendered, render};
use crate::prompt::Pair;
use crate::record::{Document, Entry};
use crate::seed;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

const DOCUMENTS: usize = 100_000;
const RUN: u64 = 1;

/// Groups that the entries of a family are put into before two families are compared: no cell of the
/// table then expects fewer than 250 documents.
const GROUPS: u64 = 6;

static TEMPLATES: LazyLock<Templates> = LazyLock::new(Templates::built_in);
static CHOICES: LazyLock<Vec<Choices>> = LazyLock::new(|| draw(3, 5));

/// The choices of all documents, whose texts have between `fewest` and `most` pairs.
fn draw(fewest: usize, most: usize) -> Vec<Choices> {
    let one = |number| Choices::draw(&TEMPLATES, RUN, &format!("document {number}"), fewest, most);
    (0..DOCUMENTS).map(one).collect()
}

/// One thing that documents draw.
struct Drawn {
    name: &'static str,
    weights: Vec<u64>,
    /// What each document drew.
    values: Vec<usize>,
}

impl Drawn {
    fn counts(&self) -> Vec<u64> {
        let mut counts = vec![0; self.weights.len()];
        self.values.iter().for_each(|&value| counts[value] += 1);
        counts
    }

    /// What each document drew, in neighbouring groups of about the same weight.
    fn groups(&self) -> Vec<usize> {
        let all: u64 = self.weights.iter().sum();
        let starts = self.weights.iter().scan(0, |start, weight| {
            let own = *start;
            *start += weight;
            Some((own * GROUPS / all) as usize)
        });
        let group: Vec<usize> = starts.collect();
        self.values.iter().map(|&value| group[value]).collect()
    }
}

/// Everything that documents of several pairs draw.
fn drawn() -> Vec<Drawn> {
    macro_rules! drawn {
        ($($family:ident),* $(,)?) => {{
            let names = ["layout", "inverted", "spaced", "joint", $(stringify!($family)),*];
            let joint = TEMPLATES.free_form.weights().to_vec();
            let weights = [
                vec![80, 5, 5, 5, 5],
                vec![19, 1],
                vec![1, 1],
                joint,
                $(TEMPLATES.$family.weights().to_vec()),*
            ];
            let values = CHOICES.iter().map(|choices| {
                // Without `..`: a new choice cannot be forgotten here.
                let Choices { layout, inverted, spaced, joint, $($family),* } = choices;
                let (layout, inverted) = (*layout as usize, usize::from(*inverted));
                [layout, inverted, usize::from(*spaced), *joint, $(*$family),*]
            });
            let values: Vec<_> = values.collect();
            let column = |index: usize| values.iter().map(|row| row[index]).collect();
            let named = names.into_iter().zip(weights).enumerate();
            named
                .map(|(index, (name, weights))| Drawn { name, weights, values: column(index) })
                .collect()
        }};
    }
    drawn![
        free_form,
        options,
        reasoning,
        options_reasoning,
        numbered,
        next_turn,
        inline_explained,
        inline_plain,
        before_text,
        text_glue,
        introduction,
        inverted_header,
        inverted_glue,
        inverted_text,
        options_opener,
        option_names,
        option_ending,
        none_of_these,
        question_names,
        dialog_opener,
        dialog_connector,
        dialog_speakers,
        dialog_ending,
    ]
}

/// The chi-square sum over `freedom` free cells that is exceeded as rarely as five standard deviations
/// are (Wilson and Hilferty, PNAS 1931).
fn ceiling(freedom: usize) -> f64 {
    let part = 2.0 / (9.0 * freedom as f64);
    freedom as f64 * (1.0 - part + 5.0 * part.sqrt()).powi(3)
}

/// Whether counts are as the weights say.
fn check_shares(name: &str, counts: &[u64], weights: &[u64]) {
    assert!(counts.iter().all(|&count| count > 0), "{name}: one never occurs: {counts:?}");
    let share = counts.iter().sum::<u64>() as f64 / weights.iter().sum::<u64>() as f64;
    let cells = counts.iter().zip(weights).map(|(&count, &weight)| {
        let expected = weight as f64 * share;
        (count as f64 - expected).powi(2) / expected
    });
    let (sum, ceiling) = (cells.sum::<f64>(), ceiling(counts.len() - 1));
    assert!(sum < ceiling, "{name}: {sum} is not below {ceiling}: {counts:?}");
}

/// Whether a count is that of `trials` with the given chance.
fn check_count(name: &str, count: u64, trials: u64, chance: f64) {
    let expected = trials as f64 * chance;
    let bound = 5.0 * (expected * (1.0 - chance)).sqrt();
    let distance = (count as f64 - expected).abs();
    assert!(distance <= bound, "{name}: {count} of {trials}, {expected} ± {bound} expected");
}

/// The chi-square sum for the independence of two columns, in units of its ceiling.
fn dependence(left: &[usize], right: &[usize]) -> f64 {
    let size = 1 + left.iter().chain(right).max().expect("there are documents");
    let (mut rows, mut columns) = (vec![0u64; size], vec![0u64; size]);
    let mut table = vec![vec![0u64; size]; size];
    for (&row, &column) in left.iter().zip(right) {
        table[row][column] += 1;
        rows[row] += 1;
        columns[column] += 1;
    }
    let used = |counts: &[u64]| (0..size).filter(|&i| counts[i] > 0).collect::<Vec<_>>();
    let (used_rows, used_columns) = (used(&rows), used(&columns));
    let mut sum = 0.0;
    for &row in &used_rows {
        for &column in &used_columns {
            let expected = rows[row] as f64 * columns[column] as f64 / left.len() as f64;
            sum += (table[row][column] as f64 - expected).powi(2) / expected;
        }
    }
    sum / ceiling((used_rows.len() - 1) * (used_columns.len() - 1))
}

#[test]
fn every_entry_of_every_family_occurs_as_often_as_its_weight_says() {
    for drawn in drawn() {
        check_shares(drawn.name, &drawn.counts(), &drawn.weights);
    }
}

#[test]
fn choices_are_pairwise_independent() {
    let groups: Vec<_> = drawn().iter().map(|drawn| (drawn.name, drawn.groups())).collect();
    for (index, (left_name, left)) in groups.iter().enumerate() {
        for (right_name, right) in &groups[..index] {
            let dependence = dependence(left, right);
            assert!(dependence < 1.0, "{left_name} and {right_name} are tied: {dependence}");
        }
    }
}

#[test]
fn one_seed_for_all_choices_would_be_found_out() {
    let tied = |weights: &[u64]| {
        let one = |number| seed::stream(RUN, &format!("document {number}"), "every choice");
        let values = (0..DOCUMENTS).map(|i| one(i).weighted(weights.iter().copied())).collect();
        Drawn { name: "tied", weights: weights.to_vec(), values }.groups()
    };
    let (left, right) = (TEMPLATES.free_form.weights(), TEMPLATES.introduction.weights());
    assert!(dependence(&tied(left), &tied(right)) > 100.0);
}

#[test]
fn prefix_and_introduction_come_and_go_independently() {
    let mut counts = BTreeMap::new();
    for choices in CHOICES.iter() {
        let text = TEMPLATES.before_text.get(choices.before_text).fill(&[(Slot::Context, "")]);
        let introduction = TEMPLATES.introduction.get(choices.introduction);
        *counts.entry((text.is_empty(), introduction.is_empty())).or_insert(0) += 1;
    }
    for (absent, count) in counts {
        check_count(&format!("absent: {absent:?}"), count, DOCUMENTS as u64, 0.25);
    }
}

#[test]
fn inverted_documents_use_every_header_and_every_pattern() {
    let mut used = [BTreeSet::new(), BTreeSet::new(), BTreeSet::new()];
    let mut dialogs = 0;
    for choices in CHOICES.iter().filter(|choices| choices.inverted) {
        dialogs += u64::from(choices.layout == Layout::Dialog);
        let drawn = [choices.inverted_header, choices.inverted_text, choices.free_form];
        used.iter_mut().zip(drawn).for_each(|(used, index)| used.extend([index]));
    }
    let Templates { inverted_header, inverted_text, free_form, .. } = &*TEMPLATES;
    let all = [inverted_header.len(), inverted_text.len(), free_form.len()];
    assert_eq!(used.map(|used| used.len()), all);
    check_count("inverted dialogs", dialogs, DOCUMENTS as u64, 0.05 * 0.05);
}

#[test]
fn combinations_are_as_many_as_independent_draws_give() {
    let Templates { free_form, before_text, introduction, .. } = &*TEMPLATES;
    let found: BTreeSet<_> =
        CHOICES.iter().map(|c| (c.free_form, c.before_text, c.introduction)).collect();
    let chances = |weights: &[u64]| -> Vec<f64> {
        let all = weights.iter().sum::<u64>() as f64;
        weights.iter().map(|&weight| weight as f64 / all).collect()
    };
    let mut expected = 0.0;
    for pattern in chances(free_form.weights()) {
        for prefix in chances(before_text.weights()) {
            for introduction in chances(introduction.weights()) {
                let chance = pattern * prefix * introduction;
                expected += 1.0 - (1.0 - chance).powi(DOCUMENTS as i32);
            }
        }
    }
    // The variance of such a count is below its mean.
    let distance = (found.len() as f64 - expected).abs();
    assert!(distance < 5.0 * expected.sqrt(), "{} and not {expected}", found.len());
}

#[test]
fn layouts_have_their_shares_below_and_from_two_pairs() {
    let count = |choices: &[Choices]| {
        let mut counts = [0; 5];
        choices.iter().for_each(|choices| counts[choices.layout as usize] += 1);
        counts
    };
    check_shares("from two pairs", &count(&draw(2, 26)), &[80, 5, 5, 5, 5]);
    let few = count(&draw(1, 5));
    check_shares("below two pairs", &few[..2], &[95, 5]);
    assert_eq!(few[2..], [0, 0, 0]);
    assert_eq!(count(&draw(2, 27)), [DOCUMENTS as u64, 0, 0, 0, 0], "classic beyond 26 pairs");
}

#[test]
fn questions_stand_before_the_text_in_five_of_a_hundred() {
    for layout in [Layout::Classic, Layout::Dialog] {
        let own = CHOICES.iter().filter(|choices| choices.layout == layout);
        let inverted = own.clone().filter(|choices| choices.inverted).count() as u64;
        check_count(&format!("{layout:?}"), inverted, own.count() as u64, 0.05);
    }
}

/// The kinds of pairs, and one that cannot be shown.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Plain,
    Options,
    Reasoning,
    OptionsReasoning,
    Unusable,
}

const USABLE: [Kind; 4] = [Kind::Plain, Kind::Options, Kind::Reasoning, Kind::OptionsReasoning];

/// The options of a pair; the first is right.
fn options(number: usize) -> [String; 4] {
    ["alpha", "beta", "gamma", "delta"].map(|option| format!("{option}-{number}"))
}

fn pair(kind: Kind, number: usize) -> Pair {
    let options = options(number);
    let list = format!("\nOptions:\n- {}", options.join("\n- "));
    let steps = "\nLet's think step by step.";
    let therefore = |answer: &str| format!("Reason {number}.\nTherefore, the answer is {answer}");
    let stem = format!("Question {number}?");
    let (question, answer) = match kind {
        Kind::Plain => (stem, format!("Answer-{number}")),
        Kind::Options => (stem + &list, options[0].clone()),
        Kind::Reasoning => (stem + steps, therefore(&format!("Answer-{number}"))),
        Kind::OptionsReasoning => (stem + &list + steps, therefore(&options[0])),
        Kind::Unusable => (stem + &list, format!("Answer-{number}")),
    };
    Pair { question, answer }
}

fn entry(id: &str, kinds: &[Kind]) -> Entry {
    let pairs = kinds.iter().enumerate().map(|(number, &kind)| pair(kind, number)).collect();
    let text = format!("The text of {id}.");
    Entry {
        document: Document { id: id.into(), text, ..Document::default() },
        pairs,
        ..Entry::default()
    }
}

fn one(entries: &[Entry]) -> Rendered {
    let mut documents = render(entries, &TEMPLATES, RUN);
    assert_eq!(documents.len(), 1);
    documents.remove(0)
}

#[test]
fn four_options_stand_in_every_order_equally_often() {
    let mut orders: [Vec<usize>; 2] = Default::default();
    let mut numbers = BTreeMap::new();
    for number in 0..DOCUMENTS {
        let rendered = one(&[entry(&number.to_string(), &[Kind::Options; 2])]);
        let choices = rendered.choices.unwrap();
        let pattern = TEMPLATES.options.get(choices.options);
        if choices.layout != Layout::Classic || !pattern.has(Slot::Options) {
            continue; // an answer may stand before its options, or there are none to be seen
        }
        for (pair, orders) in orders.iter_mut().enumerate() {
            let place = |option: &String| rendered.text.find(option.as_str()).unwrap();
            let mut order = [0, 1, 2, 3];
            let places = options(pair).each_ref().map(place);
            order.sort_unstable_by_key(|&option| places[option]);
            let next = numbers.len();
            orders.push(*numbers.entry(order).or_insert(next));
        }
    }
    for (pair, values) in orders.iter().enumerate() {
        let drawn = Drawn { name: "order", weights: vec![1; 24], values: values.clone() };
        check_shares(&format!("orders of pair {pair}"), &drawn.counts(), &drawn.weights);
    }
    let dependence = dependence(&orders[0], &orders[1]);
    assert!(dependence < 1.0, "the orders of two pairs are tied: {dependence}");
}

#[test]
fn no_answer_is_lost_but_by_patterns_that_only_ask() {
    let mut hidden = [0; USABLE.len()];
    for number in 0..DOCUMENTS {
        let kind = number % USABLE.len();
        let rendered = one(&[entry(&number.to_string(), &[USABLE[kind]])]);
        assert_eq!(rendered.shown + rendered.hidden, 1);
        hidden[kind] += rendered.hidden;
        if let Kind::Plain | Kind::Reasoning = USABLE[kind] {
            assert_eq!(rendered.text.contains("Answer-0"), rendered.shown == 1, "{rendered:?}");
        }
    }
    let Templates { free_form, options, reasoning, options_reasoning, .. } = &*TEMPLATES;
    let answers =
        |pattern: &PairPattern| pattern.has(Slot::Answer) || pattern.has(Slot::OptionAnswer);
    for (kind, family) in [free_form, options, reasoning, options_reasoning].iter().enumerate() {
        let weighted = family.iter().zip(family.weights());
        let only_ask = weighted.filter(|(pattern, _)| !answers(pattern)).map(|(_, weight)| weight);
        let share = only_ask.sum::<u64>() as f64 / family.weights().iter().sum::<u64>() as f64;
        // One pair is a conversation in 5 of 100 documents, which leaves out nothing.
        let trials = (DOCUMENTS / USABLE.len()) as u64;
        check_count(&format!("{:?}", USABLE[kind]), hidden[kind], trials, 0.95 * share);
    }
}

/// A group of up to four texts with up to five pairs of all kinds, some of them unusable.
fn group(number: usize) -> Vec<Entry> {
    let mut stream = seed::stream(RUN, &number.to_string(), "group");
    let texts = 1 + stream.index(4);
    let text = |text| {
        let kinds: Vec<Kind> = (0..stream.index(6))
            .map(|_| match stream.index(6) {
                4.. => Kind::Unusable,
                usable => USABLE[usable],
            })
            .collect();
        entry(&format!("{number}-{text}"), &kinds)
    };
    (0..texts).map(text).collect()
}

#[test]
fn every_text_is_in_one_document_and_every_pair_is_accounted_for() {
    for number in 0..20_000 {
        let group = group(number);
        let documents = render(&group, &TEMPLATES, RUN);
        let mut texts: Vec<usize> = documents.iter().flat_map(|d| d.entries.clone()).collect();
        texts.sort_unstable();
        assert_eq!(texts, (0..group.len()).collect::<Vec<_>>(), "{documents:?}");
        let dropped: usize = documents.iter().map(|document| document.dropped.len()).sum();
        let written: u64 = documents.iter().map(|document| document.shown + document.hidden).sum();
        let pairs: usize = group.iter().map(|entry| entry.pairs.len()).sum();
        assert_eq!(written as usize + dropped, pairs, "{documents:?}");
        for document in &documents {
            assert_eq!(document.id, group[document.entries[0]].document.id);
            for &text in &document.entries {
                assert!(document.text.contains(&group[text].document.text), "{document:?}");
            }
        }
    }
}

#[test]
fn documents_are_never_empty_and_in_the_order_of_their_first_texts() {
    for number in 0..20_000 {
        let documents = render(&group(number), &TEMPLATES, RUN);
        assert!(documents.iter().all(|document| !document.text.trim().is_empty()));
        assert!(documents.is_sorted_by_key(|document| document.entries[0]), "{documents:?}");
    }
}

#[test]
fn rendering_is_a_pure_function() {
    let templates = Templates::built_in();
    let groups: Vec<_> = (0..5_000).map(group).collect();
    let before = groups.clone();
    let render = |group: &Vec<Entry>| render(group, &templates, RUN);
    let forward: Vec<_> = groups.iter().map(render).collect();
    let mut backward: Vec<_> = groups.iter().rev().map(render).collect();
    backward.reverse();
    assert_eq!(forward, backward, "a document depends on what was rendered before it");
    assert_eq!(groups, before);
    assert_eq!(templates.digest(), Templates::built_in().digest());
}

#[test]
fn the_text_with_the_fewest_pairs_decides_the_layout() {
    for number in 0..2_000 {
        let many = entry(&format!("{number} many"), &[Kind::Plain; 5]);
        let few = entry(&format!("{number} few"), &[Kind::Plain]);
        let layout = one(&[many, few]).choices.unwrap().layout;
        assert!(matches!(layout, Layout::Classic | Layout::Dialog), "{layout:?}");
    }
}
