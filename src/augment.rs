//! From a finished chain to rendered documents, items, and the account of what became of everything.

use crate::chain::Chain;
use crate::ledger::Ledger;
use crate::prompt::Pair;
use crate::record::{Entry, Finish, Item, Rejected, Shot, Stage, excerpt};
use crate::template::Templates;
use crate::template::choice::Choices;
use crate::template::render::{Rendered, render};
use crate::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;

/// Index of the augmented documents among the sources of a mix.
pub const AUGMENTED: u32 = 0;

/// A rendered document with its lineage: one line of `augmented/*.jsonl.zst`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Augmented {
    /// The id of its first text.
    pub id: String,
    /// The ids of the documents its texts belong to.
    pub source_ids: Vec<String>,
    /// The round each text was synthesized in, from 0.
    pub rounds: Vec<u32>,
    /// The texts with their pairs.
    pub entries: Vec<AugmentedEntry>,
    /// What was drawn for it; none for a raw text.
    pub choices: Option<Choices>,
    /// The document as the language model reads it.
    pub text: String,
    /// Its tokens, opening and closing ids included.
    pub tokens: u64,
    /// The synthesizer that wrote the pairs.
    pub synthesizer: String,
    /// The seed of the run.
    pub seed: u64,
}

/// One text of a rendered document.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AugmentedEntry {
    /// Id of the text.
    pub id: String,
    /// The file it was read from, with record and byte.
    pub place: String,
    /// The text.
    pub text: String,
    /// The pairs that were read out of the generation.
    pub pairs: Vec<Pair>,
}

impl Augmented {
    /// Appends the document as JSON. A text that goes out as it is stands in its record twice, and is
    /// escaped once.
    pub(crate) fn write_line(&self, line: &mut Vec<u8>) {
        let Augmented { id, source_ids, rounds, entries, choices, text, tokens, synthesizer, seed } =
            self;
        put(line, "{\"id\":", id);
        put(line, ",\"source_ids\":", source_ids);
        put(line, ",\"rounds\":", rounds);
        line.extend_from_slice(b",\"entries\":[");
        let mut whole = None;
        for (index, entry) in entries.iter().enumerate() {
            let AugmentedEntry { id, place, text: own, pairs } = entry;
            put(line, if index == 0 { "{\"id\":" } else { ",{\"id\":" }, id);
            put(line, ",\"place\":", place);
            let written = put(line, ",\"text\":", own);
            whole = whole.or_else(|| (own == text).then_some(written));
            put(line, ",\"pairs\":", pairs);
            line.push(b'}');
        }
        put(line, "],\"choices\":", choices);
        match whole {
            Some(written) => {
                line.extend_from_slice(b",\"text\":");
                line.extend_from_within(written);
            }
            None => drop(put(line, ",\"text\":", text)),
        }
        put(line, ",\"tokens\":", tokens);
        put(line, ",\"synthesizer\":", synthesizer);
        put(line, ",\"seed\":", seed);
        line.push(b'}');
    }
}

/// Appends a value behind its name; returns where it stands.
fn put(line: &mut Vec<u8>, name: &str, value: &impl Serialize) -> Range<usize> {
    line.extend_from_slice(name.as_bytes());
    let start = line.len();
    serde_json::to_writer(&mut *line, value).expect("records are plain values");
    start..line.len()
}

/// What a chain became.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ChainOutput {
    /// Number of the chain in its block.
    pub index: u64,
    /// Rendered documents and the items made of them, in order.
    pub documents: Vec<(Augmented, Item)>,
    /// What was dropped on the way.
    pub rejected: Vec<Rejected>,
    /// What was counted.
    pub ledger: Ledger,
}

/// Renders chains.
#[derive(Clone, Debug)]
pub struct Augmenter {
    /// The templates.
    pub templates: Arc<Templates>,
    /// The tokenizer of the model that is trained.
    pub tokenizer: Tokenizer,
    /// The name of the synthesizer.
    pub synthesizer: String,
    /// The seed of the run.
    pub seed: u64,
}

impl Augmenter {
    /// Renders a finished chain.
    pub fn augment(&self, chain: Chain) -> ChainOutput {
        let mut output = ChainOutput { index: chain.index, ..ChainOutput::default() };
        for entry in &chain.entries {
            count_generation(entry, &mut output);
        }
        let mut round = 0;
        for mut group in chain.into_groups() {
            for rendered in render(&group, &self.templates, self.seed) {
                count_rendering(&rendered, &group, &mut output);
                let item = self.item(&rendered, round);
                output.documents.push((self.lineage(rendered, &mut group, round, &item), item));
            }
            round += group.len() as u32;
        }
        output
    }

    /// The item of a document whose group began in `round`.
    fn item(&self, rendered: &Rendered, round: u32) -> Item {
        let Rendered { id, text, entries, starts, choices, .. } = rendered;
        if choices.is_none() {
            return item(id, AUGMENTED, text, &self.tokenizer);
        }
        let (mut item, firsts) = match starts.as_slice() {
            [_] => (item(id, AUGMENTED, text, &self.tokenizer), vec![0]),
            starts => item_with_starts(id, text, starts, &self.tokenizer),
        };
        let ends = firsts[1..].iter().copied().chain([item.tokens.len()]);
        let shot = |((&entry, &first), end): ((&usize, &usize), usize)| Shot {
            round: round + entry as u32,
            offset: first as u32,
            length: (end - first) as u32,
        };
        item.shots = entries.iter().zip(&firsts).zip(ends).map(shot).collect();
        item
    }

    /// The lineage of a rendered document; its texts and pairs are taken out of their group.
    fn lineage(
        &self,
        rendered: Rendered,
        group: &mut [Entry],
        round: u32,
        item: &Item,
    ) -> Augmented {
        let mut source_ids = Vec::new();
        let mut entries = Vec::new();
        for &index in &rendered.entries {
            let Entry { document, pairs, .. } = &mut group[index];
            source_ids.push(document.part.as_ref().map_or(&document.id, |part| &part.of).clone());
            entries.push(AugmentedEntry {
                id: document.id.clone(),
                place: document.place.to_string(),
                text: std::mem::take(&mut document.text),
                pairs: std::mem::take(pairs),
            });
        }
        source_ids.dedup();
        Augmented {
            id: rendered.id,
            source_ids,
            rounds: rendered.entries.iter().map(|&index| round + index as u32).collect(),
            entries,
            choices: rendered.choices,
            text: rendered.text,
            tokens: item.tokens.len() as u64,
            synthesizer: self.synthesizer.clone(),
            seed: self.seed,
        }
    }
}

/// A text as an item: between the opening and closing ids of the trained model.
pub fn item(id: &str, source: u32, text: &str, tokenizer: &Tokenizer) -> Item {
    let mut tokens = Vec::with_capacity(text.len() / 3);
    tokens.extend(tokenizer.bos());
    tokenizer.encode_onto(text, &mut tokens);
    tokens.extend(tokenizer.eos());
    Item { id: id.to_owned(), source, tokens, ..Item::default() }
}

/// An augmented text as an item, with the first token of each of its parts, which start at these bytes: the
/// first token that starts there or behind, and the opening id for the first part.
fn item_with_starts(
    id: &str,
    text: &str,
    starts: &[usize],
    tokenizer: &Tokenizer,
) -> (Item, Vec<usize>) {
    let (ids, places) = tokenizer.encode_with_starts(text);
    let mut tokens: Vec<u32> = tokenizer.bos().into_iter().collect();
    let opening = tokens.len();
    tokens.extend(ids);
    tokens.extend(tokenizer.eos());
    let first = |&start: &usize| match start {
        0 => 0,
        start => opening + places.partition_point(|&place| place < start),
    };
    let firsts = starts.iter().map(first).collect();
    (Item { id: id.to_owned(), source: AUGMENTED, tokens, ..Item::default() }, firsts)
}

fn count_generation(entry: &Entry, output: &mut ChainOutput) {
    let ledger = &mut output.ledger;
    match entry.finish {
        Finish::NotAsked => ledger.add("synthesize/not_asked", 1),
        _ => ledger.add(format!("synthesize/finished/{}", entry.finish.name()), 1),
    }
    ledger.add("synthesize/prompt_tokens", entry.prompt_tokens);
    ledger.add("synthesize/generated_tokens", entry.generated_tokens);
    let parsed = entry.pairs.len() + entry.refused.len();
    ledger.add("parse/pieces", (parsed + entry.dropped.len()) as u64);
    ledger.add("parse/pairs", parsed as u64);
    ledger.add("parse/texts_with_pairs", u64::from(parsed > 0));
    ledger.add("gate/pairs", entry.pairs.len() as u64);
    ledger.add("gate/not_judged", entry.not_judged);
    let reject = |stage, reason: &str, detail: &str, text: &str| Rejected {
        stage,
        reason: reason.into(),
        detail: detail.into(),
        ids: vec![entry.document.id.clone()],
        place: entry.document.place.clone(),
        excerpt: excerpt(text),
    };
    if let Finish::Failed(detail) = &entry.finish {
        let text = &entry.document.text;
        output.rejected.push(reject(Stage::Synthesize, "request_failed", detail, text));
    }
    for (reason, piece) in &entry.dropped {
        ledger.add(format!("parse/rejected/{}", reason.name()), 1);
        output.rejected.push(reject(Stage::Parse, reason.name(), "", piece));
    }
    for (refusal, Pair { question, answer }) in &entry.refused {
        ledger.add(format!("gate/rejected/{}", refusal.name()), 1);
        let pair = format!("{question} {answer}");
        output.rejected.push(reject(Stage::Gate, refusal.name(), "", &pair));
    }
}

fn count_rendering(rendered: &Rendered, group: &[Entry], output: &mut ChainOutput) {
    let ledger = &mut output.ledger;
    ledger.add("templify/documents", 1);
    let texts = rendered.entries.len() as u64;
    let kind = if rendered.choices.is_some() { "augmented" } else { "raw" };
    ledger.add(format!("templify/texts/{kind}"), texts);
    ledger.add("templify/pairs/shown", rendered.shown);
    ledger.add("templify/pairs/answer_hidden", rendered.hidden);
    for (index, pair, reason) in &rendered.dropped {
        ledger.add(format!("templify/rejected/{}", reason.name()), 1);
        let document = &group[*index].document;
        output.rejected.push(Rejected {
            stage: Stage::Templify,
            reason: reason.name().into(),
            detail: String::new(),
            ids: vec![document.id.clone()],
            place: document.place.clone(),
            excerpt: excerpt(&format!("{} {}", pair.question, pair.answer)),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::{Generation, Prompt, chains};
    use crate::record::Document;
    use crate::template::choice::Layout;
    use crate::tokenizer::tests::small;

    /// Texts that saw nothing of each other, with what was generated for them.
    fn chain(generations: &[(&str, Finish)]) -> Chain {
        let document = |number: usize| Document {
            id: number.to_string(),
            text: format!("Text {number}."),
            ..Document::default()
        };
        let documents = (0..generations.len()).map(document).collect();
        let mut chain = chains(documents, generations.len()).remove(0);
        for (text, finish) in generations {
            let (text, finish) = ((*text).to_owned(), finish.clone());
            chain.accept(&Prompt::default(), &Generation { text, finish, tokens: 1 });
        }
        chain
    }

    fn augmenter(templates: Templates, seed: u64) -> Augmenter {
        let templates = Arc::new(templates);
        Augmenter { templates, tokenizer: small(), synthesizer: "script".into(), seed }
    }

    fn augment(generations: &[(&str, Finish)]) -> ChainOutput {
        augmenter(Templates::built_in(), 1).augment(chain(generations))
    }

    /// Checks counts, and that every piece and pair is accounted for.
    fn check(output: &ChainOutput, counts: &[(&str, u64)]) {
        for &(name, count) in counts {
            assert_eq!(output.ledger.get(name), count, "{name}: {:?}", output.ledger);
        }
        for balance in output.ledger.balances() {
            if balance.taken.starts_with("parse/") {
                assert_eq!(balance.unknown, 0, "{balance:?}");
            }
        }
    }

    #[test]
    fn every_piece_is_a_pair_or_leaves_with_its_reason() {
        let text = "<QUE> a <ANS> b </END> <QUE> <ANS> b </END> </END> <QUE> c <ANS> d <ANS> e \
                    </END> <QUE> Which?\nOptions:\n- red <ANS> blue </END> <QUE> f";
        let output = augment(&[(text, Finish::Length)]);
        check(
            &output,
            &[
                ("parse/pieces", 6),
                ("parse/pairs", 2),
                ("parse/rejected/empty_question", 1),
                ("parse/rejected/empty_piece", 1),
                ("parse/rejected/stray_marker", 1),
                ("parse/rejected/unfinished", 1),
                ("templify/rejected/answer_not_an_option", 1),
            ],
        );
        let reasons: Vec<(Stage, &str)> =
            output.rejected.iter().map(|one| (one.stage, one.reason.as_str())).collect();
        let parse = ["empty_question", "empty_piece", "stray_marker", "unfinished"];
        let mut expected: Vec<_> = parse.map(|reason| (Stage::Parse, reason)).to_vec();
        expected.push((Stage::Templify, "answer_not_an_option"));
        assert_eq!(reasons, expected);
        assert!(output.rejected.iter().all(|one| one.ids == ["0"]), "{:?}", output.rejected);
    }

    #[test]
    fn a_line_is_what_the_record_says() {
        let text = "<QUE> \"a\"\n <ANS> b </END>";
        let output = augment(&[(text, Finish::Stop), ("", Finish::Stop), (text, Finish::Stop)]);
        for (document, _) in &output.documents {
            let mut line = Vec::new();
            document.write_line(&mut line);
            assert_eq!(String::from_utf8(line).unwrap(), serde_json::to_string(document).unwrap());
        }
    }

    #[test]
    fn how_each_generation_ended_is_counted() {
        let pair = "<QUE> a <ANS> b </END>";
        let failed = Finish::Failed("no room".into());
        let ends =
            [(pair, Finish::Stop), (pair, Finish::Length), (pair, Finish::Stop), ("", failed)];
        let finished = |name: &str| format!("synthesize/finished/{name}");
        let (stop, length, failed) = (finished("stop"), finished("length"), finished("failed"));
        check(&augment(&ends), &[(&stop, 2), (&length, 1), (&failed, 1), ("parse/pairs", 3)]);
    }

    #[test]
    fn a_failed_request_is_one_rejection_and_its_text_goes_out_raw() {
        let output = augment(&[("", Finish::Failed("no room".into()))]);
        check(&output, &[("parse/pieces", 0), ("templify/texts/raw", 1)]);
        let [rejected] = output.rejected.as_slice() else { panic!("{:?}", output.rejected) };
        assert_eq!(
            (rejected.reason.as_str(), rejected.detail.as_str()),
            ("request_failed", "no room")
        );
        let [(document, _)] = output.documents.as_slice() else { panic!("{:?}", output.documents) };
        assert_eq!((document.text.as_str(), &document.choices), ("Text 0.", &None));
    }

    #[test]
    fn an_answer_that_is_not_shown_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        let only_ask = "[[pattern]]\ninput = '{question}'\ndelimiter = ''\ntarget = ''";
        std::fs::write(folder.path().join("free-form.toml"), only_ask).unwrap();
        let mut hidden = 0;
        for seed in 0..100 {
            let templates = Templates::with_files_of(folder.path()).unwrap();
            let chain = chain(&[("<QUE> Who? <ANS> Nobody </END>", Finish::Stop)]);
            let output = augmenter(templates, seed).augment(chain);
            let document = &output.documents[0].0;
            let is_hidden = document.choices.as_ref().unwrap().layout == Layout::Classic;
            let (own, other) = if is_hidden { (1, 0) } else { (0, 1) };
            let counts = [("templify/pairs/answer_hidden", own), ("templify/pairs/shown", other)];
            check(&output, &counts);
            assert_eq!(document.text.contains("Nobody"), !is_hidden, "{}", document.text);
            hidden += own;
        }
        assert!((80..100).contains(&hidden), "{hidden} of 100"); // 95 are expected
    }

    /// A chain whose texts saw each other.
    fn linked(texts: usize) -> Chain {
        let mut chain = chain(&vec![("<QUE> Who? <ANS> Nobody </END>", Finish::Stop); texts]);
        chain.entries.iter_mut().skip(1).for_each(|entry| entry.inherits = true);
        chain
    }

    #[test]
    fn a_shot_is_a_text_with_the_pairs_of_its_round() {
        for seed in 0..20 {
            let output = augmenter(Templates::built_in(), seed).augment(linked(3));
            let [(document, item)] = output.documents.as_slice() else { panic!("one document") };
            let rounds: Vec<u32> = item.shots.iter().map(|shot| shot.round).collect();
            assert_eq!((rounds, &document.rounds), (vec![0, 1, 2], &vec![0, 1, 2]));
            let mut next = 0;
            for shot in &item.shots {
                assert_eq!(shot.offset, next);
                next += shot.length;
                let text = small().decode(&item.tokens[shot.offset as usize..next as usize]);
                for round in 0..3 {
                    let own = format!("Text {round}.");
                    assert_eq!(text.contains(&own), round == shot.round, "{own:?} in {text:?}");
                }
                assert!(text.contains("Who?"), "{text:?}");
            }
            assert_eq!(next as usize, item.tokens.len());
        }
    }

    #[test]
    fn a_text_without_pairs_is_of_no_round() {
        let pair = "<QUE> a <ANS> b </END>";
        let output = augment(&[("", Finish::Stop), (pair, Finish::Stop)]);
        let shots: Vec<&[Shot]> = output.documents.iter().map(|(_, item)| &*item.shots).collect();
        let length = output.documents[1].1.tokens.len() as u32;
        assert_eq!(shots, [&[][..], &[Shot { round: 1, offset: 0, length }][..]]);
    }

    #[test]
    fn a_document_is_opened_and_ended_by_the_ids_of_the_trained_model() {
        let text = "<QUE> a <ANS> b </END>";
        let output = augment(&[(text, Finish::Stop), ("", Finish::Stop), (text, Finish::Stop)]);
        assert_eq!(output.documents.len(), 3);
        for (document, item) in &output.documents {
            let body = small().encode(&document.text);
            assert_eq!(item.tokens, [vec![1], body, vec![2]].concat());
            assert!(item.learned.is_empty(), "all tokens are learned");
        }
    }
}
