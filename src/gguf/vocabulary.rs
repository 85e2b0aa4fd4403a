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
const TOKEN_BYTES_MAX: usize = 1024;

/// How Llama 3 cuts text.
pub(super) const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How llama.cpp cuts text by default, one pattern after the other.
const DEFAULT: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

/// What helps where a vocabulary cannot be used.
const BESIDE: &str = "put the model's tokenizer.json beside the file";

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
pub(super) struct Tokens<'a> {
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
    format!("{key:?} is {name:?}, which is not supported; {BESIDE}")
}

impl<'a> Tokens<'a> {
    pub(super) fn read(keys: &Keys<'a>) -> Result<Self> {
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
                return Err(format!("token {id} has {} bytes; {BESIDE}", text.len()));
            }
            if let Some(first) = ids.insert(*text, id) {
                return Err(format!("tokens {first} and {id} are both {text:?}; {BESIDE}"));
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
        let added = self.of_kind(Kind::is_added).map(|(id, text)| {
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
    pub(super) fn mergeable(&self) -> HashMap<&'a str, usize> {
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
