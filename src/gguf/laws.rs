//! Tokenizers inside GGUF files give the ids of those they were made from.

use super::config::Keys;
use super::header::{Header, Value as Setting};
use super::vocabulary::{LLAMA_3, Tokens, tokenizer};
use crate::tokenizer::{Tokenizer, TokenizerFiles};
use serde_json::{Value, json};
use std::cmp::Reverse;
use std::collections::BTreeMap;

const BUNDLED: &str = include_str!("../../assets/synthesizer/tokenizer.json");

fn header(settings: &[(&str, Setting)]) -> Header {
    let named = |(key, value): &(&str, Setting)| (format!("tokenizer.ggml.{key}"), value.clone());
    Header { values: settings.iter().map(named).collect(), tensors: BTreeMap::new() }
}

fn texts() -> Vec<String> {
    let sample = std::fs::read_to_string("assets/samples/instructions.jsonl").unwrap();
    let more = [
        "",
        " ",
        "It's we'll THEY'RE  two  blanks\t\n\n and\r\nlines 1234567890 3.14 ½ ٣٤ a+b==c",
        "Überprüfung e\u{301} 漢字かな 한국어 العربية 🙂👩‍👩‍👧🏽 \u{0}\u{fffd} ▁ Ġ <0x0A>",
        "a <s> struck </s> through <pad>",
    ];
    sample.lines().take(40).chain(more).map(str::to_owned).collect()
}

/// The vocabulary of the bundled tokenizer, as a converter would write it.
fn byte_level_header(pre: &str) -> Header {
    let file: Value = serde_json::from_str(BUNDLED).unwrap();
    let vocabulary = file["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocabulary.len()];
    for (token, id) in vocabulary {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    let merges = file["model"]["merges"].as_array().unwrap().iter();
    let merges = merges.map(|merge| {
        let parts: Vec<&str> = merge.as_array().unwrap().iter().filter_map(Value::as_str).collect();
        parts.join(" ")
    });
    let kinds = (0..tokens.len()).map(|id| if id < 3 { 3.0 } else { 1.0 });
    header(&[
        ("model", Setting::Text("gpt2".into())),
        ("pre", Setting::Text(pre.into())),
        ("token_type", Setting::Numbers(kinds.collect())),
        ("tokens", Setting::Texts(tokens)),
        ("merges", Setting::Texts(merges.collect())),
        ("bos_token_id", Setting::Integer(1)),
        ("eos_token_id", Setting::Integer(2)),
    ])
}

fn check_byte_level(pre: &str, cut: Value, ignore_merges: bool) {
    let ours = tokenizer(&byte_level_header(pre)).unwrap();
    let mut file: Value = serde_json::from_str(BUNDLED).unwrap();
    file["pre_tokenizer"] = cut;
    file["model"]["ignore_merges"] = json!(ignore_merges);
    let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    let files = TokenizerFiles { tokenizer: file.to_string(), config: config.to_string() };
    let theirs = Tokenizer::from_files(files).unwrap();
    assert_eq!((ours.bos(), ours.eos()), (theirs.bos(), theirs.eos()));
    assert_eq!(ours.vocabulary(), theirs.vocabulary());
    for text in texts() {
        let ids = ours.encode(&text);
        assert_eq!(ids, theirs.encode(&text), "{pre}: {text:?}");
        assert_eq!(ours.decode(&ids), text, "{pre}");
        assert!(ids.iter().all(|id| *id > 2), "text became a control token: {text:?}");
    }
}

#[test]
fn byte_level_tokenizers_are_those_of_the_library() {
    let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    check_byte_level("gpt-2", bytes(true), false);
    let digits = json!({"type": "Digits", "individual_digits": true});
    let cut = json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]});
    check_byte_level("smollm", cut, false);
    let split = json!({"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": false});
    let cut = json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]});
    check_byte_level("llama-bpe", cut, true);
}

#[test]
fn the_default_cuts_of_llama_cpp_part_marks_and_groups_of_three_digits() {
    let ours = tokenizer(&byte_level_header("default")).unwrap();
    for (text, parts) in [
        ("rates, 12345 (up)", vec!["rates", ",", " ", "123", "45", " ", "(", "up", ")"]),
        ("a  b = c", vec!["a", " ", " b", " ", "=", " c"]),
    ] {
        let expected: Vec<u32> = parts.iter().flat_map(|part| ours.encode(part)).collect();
        assert_eq!(ours.encode(text), expected, "{text:?}");
        assert_eq!(ours.decode(&expected), text);
    }
}

/// A SentencePiece vocabulary: bytes, characters and the frequent pieces of some texts.
fn sentence_pieces() -> Header {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for text in texts().iter().take(40) {
        for word in text.split(' ') {
            let word: Vec<char> = format!("▁{word}").chars().collect();
            for first in 0..word.len() {
                for last in first..word.len().min(first + 7) {
                    *counts.entry(word[first..=last].iter().collect()).or_default() += 1;
                }
            }
        }
    }
    for piece in ["<", "/", "s", ">", "s>", "<s", "</s", "/s>"] {
        *counts.entry(piece.into()).or_default() += 1000;
    }
    let mut pieces: Vec<(String, usize)> =
        counts.into_iter().filter(|(_, count)| *count > 2).collect();
    pieces.sort_by_key(|(piece, count)| (piece.chars().count() == 1, Reverse(*count)));
    let bytes = (0..=255).map(|byte: u8| format!("<0x{byte:02X}>"));
    let special = ["<unk>", "<s>", "</s>"].map(str::to_owned);
    let pieces = pieces.into_iter().map(|(piece, _)| piece);
    let tokens: Vec<String> = special.into_iter().chain(bytes).chain(pieces).collect();
    let kinds = (0..tokens.len()).map(|id| match id {
        0 => 2.0,
        1 | 2 => 3.0,
        3..259 => 6.0,
        _ => 1.0,
    });
    let scores = (0..tokens.len()).map(|id| if id < 259 { 0.0 } else { -(id as f64) });
    header(&[
        ("model", Setting::Text("llama".into())),
        ("token_type", Setting::Numbers(kinds.collect())),
        ("scores", Setting::Numbers(scores.collect())),
        ("tokens", Setting::Texts(tokens)),
        ("bos_token_id", Setting::Integer(1)),
        ("eos_token_id", Setting::Integer(2)),
    ])
}

/// What llama.cpp does: joins the neighbours that make the best token, until none do.
fn join(header: &Header, text: &str) -> Vec<u32> {
    let keys = Keys(header);
    let tokens = Tokens::read(&keys).unwrap();
    let scores = keys.numbers("tokenizer.ggml.scores").unwrap().unwrap();
    let known = tokens.mergeable();
    let text =
        if text.is_empty() { String::new() } else { format!("▁{}", text.replace(' ', "▁")) };
    let mut parts: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let pairs = parts.windows(2).enumerate();
        let scored =
            pairs.filter_map(|(at, pair)| Some((scores[*known.get(pair.concat().as_str())?], at)));
        let best = scored.max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        let Some((_, at)) = best else { break };
        let right = parts.remove(at + 1);
        parts[at] += &right;
    }
    let ids = |part: &String| match known.get(part.as_str()) {
        Some(id) => vec![*id as u32],
        None => part.bytes().map(|byte| 3 + u32::from(byte)).collect(),
    };
    parts.iter().flat_map(ids).collect()
}

#[test]
fn sentence_piece_tokenizers_join_the_best_neighbours() {
    let mut header = sentence_pieces();
    let ours = tokenizer(&header).unwrap();
    assert_eq!((ours.bos(), ours.eos()), (Some(1), Some(2)));
    for text in texts() {
        let ids = ours.encode(&text);
        assert_eq!(ids, join(&header, &text), "{text:?}");
        assert_eq!(ours.decode(&ids), text.replace('▁', " "));
        assert!(ids.iter().all(|id| *id > 2), "text became a control token: {text:?}");
    }
    header.values.insert("tokenizer.ggml.add_space_prefix".into(), Setting::Truth(false));
    let ours = tokenizer(&header).unwrap();
    assert_eq!(ours.decode(&ours.encode("no blank before")), "no blank before");
    assert_eq!(ours.encode(" the"), join(&header, "the"));
}

fn check_refused(key: &str, value: Setting, reason: &str) {
    let mut header = byte_level_header("gpt-2");
    header.values.insert(format!("tokenizer.ggml.{key}"), value);
    let error = tokenizer(&header).map(|_| ()).unwrap_err();
    assert!(error.contains(reason), "{error}");
}

#[test]
fn vocabularies_that_make_no_sense_are_refused() {
    let twice = vec!["a".to_owned(); 6144];
    check_refused("tokens", Setting::Texts(twice), "tokens 0 and 1 are both \"a\"");
    check_refused("tokens", Setting::Texts(Vec::new()), "lists 6144 tokens, not 0");
    check_refused("token_type", Setting::Numbers(vec![9.0; 6144]), "there is no type 9 of tokens");
    check_refused("eos_token_id", Setting::Integer(6144), "is 6144, but there are 6144 tokens");
    check_refused("merges", Setting::Texts(vec!["a".into()]), "\"a\" is not a merge");
    check_refused("merges", Setting::Texts(vec!["a 漢".into()]), "\"a 漢\" is not of tokens");
    check_refused("merges", Setting::Numbers(Vec::new()), "is not a list of texts");
}
