//! The tokenizer inside a GGUF file, as a `tokenizer.json`.
//!
//! | `tokenizer.ggml.model` | |
//! |---|---|
//! | `gpt2` | byte-level BPE; `tokenizer.ggml.pre` names how text is cut before merging |
//! | `llama` | SentencePiece BPE with bytes for unknown characters; merges follow from tokens and scores |
//!
//! Control tokens are tokens of their own: no text becomes one.

use super::config::Keys;
use super::header::Header;
use crate::tokenizer::{Tokenizer, TokenizerFiles};
use serde_json::{Map, Value, json};
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

/// Bytes of a token at most.
const TOKEN_BYTES_MAX: usize = 512;

/// How Llama 3 cuts text.
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How llama.cpp cuts text by default, one pattern after the other.
const DEFAULT: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

type Result<T> = std::result::Result<T, String>;

/// What a token is, as `tokenizer.ggml.token_type` has it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Text that merges make.
    Normal,
    /// What stands for text that no token is for.
    Unknown,
    /// Never text.
    Control,
    /// Text that is never cut.
    UserDefined,
    /// Nothing.
    Unused,
    /// One byte.
    Byte,
}

/// The tokens of a file.
struct Tokens<'a> {
    texts: Vec<&'a str>,
    kinds: Vec<Kind>,
}

/// The `tokenizer_config.json`: the tokens that open and end a text.
///
/// # Errors
/// If a key is missing or malformed.
pub(super) fn settings(header: &Header) -> Result<String> {
    let keys = Keys(header);
    let tokens = keys.texts("tokenizer.ggml.tokens")?;
    let mut settings = Map::new();
    settings.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    settings.insert("clean_up_tokenization_spaces".into(), false.into());
    for (name, key) in
        [("bos_token", "tokenizer.ggml.bos_token_id"), ("eos_token", "tokenizer.ggml.eos_token_id")]
    {
        if let Some(id) = keys.count(key, i128::from(u32::MAX))? {
            let token = tokens
                .get(id)
                .ok_or_else(|| format!("{key:?} is {id}, but there are {} tokens", tokens.len()))?;
            settings.insert(name.into(), token.as_str().into());
        }
    }
    match settings.contains_key("eos_token") {
        true => Ok(format!("{:#}", Value::Object(settings))),
        false => Err("the key \"tokenizer.ggml.eos_token_id\" is missing".into()),
    }
}

/// The tokenizer.
///
/// # Errors
/// If a key is missing or malformed, or stands for a tokenizer that we do not have.
pub(super) fn tokenizer(header: &Header) -> Result<Tokenizer> {
    let keys = Keys(header);
    let tokens = Tokens::read(&keys)?;
    let mut file = match keys.text("tokenizer.ggml.model")? {
        "gpt2" => byte_level(&keys, &tokens)?,
        "llama" => sentence_piece(&keys, &tokens)?,
        other => return Err(not_supported("tokenizer.ggml.model", other)),
    };
    file["version"] = json!("1.0");
    file["added_tokens"] = tokens.added();
    let files = TokenizerFiles { tokenizer: file.to_string(), config: settings(header)? };
    let tokenizer = Tokenizer::from_files(files)?;
    for (id, text) in tokens.of_kind(|kind| matches!(kind, Kind::Control | Kind::Unknown)) {
        if tokenizer.encode(text).contains(&(id as u32)) {
            return Err(format!("text would become the control token {text:?}"));
        }
    }
    Ok(tokenizer)
}

fn not_supported(key: &str, name: &str) -> String {
    format!(
        "{key:?} is {name:?}, which is not supported; put the model's tokenizer.json beside the file"
    )
}

impl<'a> Tokens<'a> {
    fn read(keys: &Keys<'a>) -> Result<Self> {
        let texts: Vec<&str> =
            keys.texts("tokenizer.ggml.tokens")?.iter().map(String::as_str).collect();
        let kinds = match keys.numbers("tokenizer.ggml.token_type")? {
            None => vec![Kind::Normal; texts.len()],
            Some(numbers) => numbers.iter().map(|&number| kind(number)).collect::<Result<_>>()?,
        };
        if kinds.len() != texts.len() {
            return Err(format!(
                "\"tokenizer.ggml.token_type\" lists {} tokens, not {}",
                kinds.len(),
                texts.len()
            ));
        }
        let mut tokens = Tokens { texts, kinds };
        for name in ["bos", "eos", "eot", "padding"] {
            let key = format!("tokenizer.ggml.{name}_token_id");
            if let Some(id) = keys.count(&key, i128::from(u32::MAX))? {
                let count = tokens.kinds.len();
                let kind = tokens.kinds.get_mut(id);
                let kind = kind.ok_or(format!("{key:?} is {id}, but there are {count} tokens"))?;
                if *kind != Kind::Unknown {
                    *kind = Kind::Control;
                }
            }
        }
        let mut ids = HashMap::new();
        for (id, text) in tokens.texts.iter().enumerate() {
            if text.is_empty() || text.len() > TOKEN_BYTES_MAX {
                return Err(format!("token {id} has {} bytes", text.len()));
            }
            if let Some(first) = ids.insert(*text, id) {
                return Err(format!("tokens {first} and {id} are both {text:?}"));
            }
        }
        Ok(tokens)
    }

    fn of_kind(&self, is: impl Fn(Kind) -> bool) -> impl Iterator<Item = (usize, &'a str)> {
        let all = self.texts.iter().zip(&self.kinds).enumerate();
        all.filter(move |(_, (_, kind))| is(**kind)).map(|(id, (text, _))| (id, *text))
    }

    /// Tokens that are found before text is cut, or never.
    fn added(&self) -> Value {
        let added = self.of_kind(|kind| kind.is_added()).map(|(id, text)| {
            let special = self.kinds[id] != Kind::UserDefined;
            json!({"id": id, "content": text, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": special})
        });
        added.collect()
    }

    /// Tokens that the model knows: all but the added ones at the end, whose ids follow by themselves.
    fn vocabulary(&self) -> Map<String, Value> {
        let behind =
            self.kinds.iter().rposition(|kind| !kind.is_added()).map_or(0, |last| last + 1);
        let known = self.texts[..behind].iter().enumerate();
        known.map(|(id, text)| ((*text).to_owned(), json!(id))).collect()
    }

    /// Ids of tokens that merges may make.
    fn mergeable(&self) -> HashMap<&'a str, usize> {
        let kinds = |kind| matches!(kind, Kind::Normal | Kind::UserDefined);
        self.of_kind(kinds).map(|(id, text)| (text, id)).collect()
    }
}

impl Kind {
    fn is_added(self) -> bool {
        matches!(self, Kind::Control | Kind::Unknown | Kind::UserDefined)
    }
}

fn kind(number: f64) -> Result<Kind> {
    Ok(match number {
        1.0 => Kind::Normal,
        2.0 => Kind::Unknown,
        3.0 => Kind::Control,
        4.0 => Kind::UserDefined,
        5.0 => Kind::Unused,
        6.0 => Kind::Byte,
        _ => return Err(format!("there is no type {number} of tokens")),
    })
}

/// Byte-level BPE (`gpt2`).
fn byte_level(keys: &Keys<'_>, tokens: &Tokens<'_>) -> Result<Value> {
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let (cuts, whole_words) = match keys.text("tokenizer.ggml.pre")? {
        "gpt-2" => (vec![bytes(true)], false),
        "llama-bpe" | "llama3" | "llama-v3" => (vec![split(LLAMA_3), bytes(false)], true),
        "smollm" => (vec![split(r"\p{N}"), bytes(true)], false),
        "default" => (DEFAULT.map(split).into_iter().chain([bytes(false)]).collect(), false),
        other => return Err(not_supported("tokenizer.ggml.pre", other)),
    };
    let known = tokens.mergeable();
    let mut merges = Vec::new();
    for merge in keys.texts("tokenizer.ggml.merges")? {
        let (left, right) =
            merge.split_once(' ').ok_or_else(|| format!("{merge:?} is not a merge"))?;
        let parts = [left, right, &[left, right].concat()];
        if !parts.iter().all(|part| known.contains_key(part)) {
            return Err(format!("the merge {merge:?} is not of tokens"));
        }
        merges.push([left, right]);
    }
    Ok(json!({
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "decoder": bytes(true),
        "model": model(tokens, json!(merges), json!({"ignore_merges": whole_words})),
    }))
}

/// SentencePiece BPE (`llama`).
fn sentence_piece(keys: &Keys<'_>, tokens: &Tokens<'_>) -> Result<Value> {
    let scores = keys.numbers("tokenizer.ggml.scores")?;
    let scores = scores.ok_or("the key \"tokenizer.ggml.scores\" is missing")?;
    if scores.len() != tokens.texts.len() {
        return Err(format!(
            "\"tokenizer.ggml.scores\" lists {} tokens, not {}",
            scores.len(),
            tokens.texts.len()
        ));
    }
    let bytes = (0..=255).map(|byte: u8| format!("<0x{byte:02X}>"));
    let has_bytes = bytes.into_iter().all(|byte| tokens.texts.contains(&byte.as_str()));
    let unknown = tokens.of_kind(|kind| kind == Kind::Unknown).next().map(|(_, text)| text);
    let prefix = keys.truth("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers =
        vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let settings = json!({"byte_fallback": has_bytes, "fuse_unk": true, "unk_token": unknown});
    Ok(json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model(tokens, json!(merges(tokens, scores)), settings),
    }))
}

fn model(tokens: &Tokens<'_>, merges: Value, settings: Value) -> Value {
    let mut model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": tokens.vocabulary(), "merges": merges,
    });
    if let Value::Object(settings) = settings {
        for (key, value) in settings {
            model[key] = value;
        }
    }
    model
}

/// The merges that make each token of two others, best token first, as Hugging Face's converter of
/// SentencePiece models lists them.
fn merges<'a>(tokens: &Tokens<'a>, scores: &[f64]) -> Vec<[&'a str; 2]> {
    let known = tokens.mergeable();
    let ordered: BTreeMap<usize, &str> = known.iter().map(|(text, id)| (*id, *text)).collect();
    let mut merges = Vec::new();
    for (id, token) in ordered {
        let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let mut own: Vec<_> = cuts
            .filter_map(|(left, right)| Some((known.get(left)?, known.get(right)?, [left, right])))
            .collect();
        own.sort();
        merges.extend(own.into_iter().map(|(_, _, pair)| (scores[id], pair)));
    }
    // Equal ones stay in the order of their ids.
    merges.sort_by(|(left, a), (right, b)| {
        let lengths = |pair: &[&str; 2]| pair.map(|part| Reverse(part.chars().count()));
        right.total_cmp(left).then_with(|| lengths(a).cmp(&lengths(b)))
    });
    merges.into_iter().map(|(_, pair)| pair).collect()
}

#[cfg(test)]
mod tests {
    use super::super::header::Value as Setting;
    use super::*;

    const BUNDLED: &str = include_str!("../../assets/synthesizer/tokenizer.json");

    fn header(settings: &[(&str, Setting)]) -> Header {
        let named =
            |(key, value): &(&str, Setting)| (format!("tokenizer.ggml.{key}"), value.clone());
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
            let parts: Vec<&str> =
                merge.as_array().unwrap().iter().filter_map(Value::as_str).collect();
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
        let text = if text.is_empty() {
            String::new()
        } else {
            format!("▁{}", text.replace(' ', "▁"))
        };
        let mut parts: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let pairs = parts.windows(2).enumerate();
            let scored = pairs
                .filter_map(|(at, pair)| Some((scores[*known.get(pair.concat().as_str())?], at)));
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
        check_refused(
            "token_type",
            Setting::Numbers(vec![9.0; 6144]),
            "there is no type 9 of tokens",
        );
        check_refused("eos_token_id", Setting::Integer(6144), "is 6144, but there are 6144 tokens");
        check_refused("merges", Setting::Texts(vec!["a".into()]), "\"a\" is not a merge");
        check_refused("merges", Setting::Texts(vec!["a 漢".into()]), "\"a 漢\" is not of tokens");
        check_refused("merges", Setting::Numbers(Vec::new()), "is not a list of texts");
    }
}
