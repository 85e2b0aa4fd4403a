//! Text to token ids and back.
//!
//! Text is data: nothing inside it can become a special token. The ids that open and end a text are
//! placed by us alone.

mod cut;
mod pipeline;
mod words;

use crate::error::{Error, Result};
use pipeline::Pipeline;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, SplitDelimiterBehavior, TokenizerBuilder};
use words::Words;
use xxhash_rust::xxh3::xxh3_128;

/// The special tokens of tokenizers made here, in the order of their ids.
const SPECIAL: [&str; 3] = ["<pad>", "<s>", "</s>"];

/// Where tokenizers made here cut text before merging: line feeds and digits stand alone, so that numbers
/// are copied digit by digit and a prompt that ends in line feeds has the same ids as the same text with
/// something behind it.
const PATTERN: &str = r"\n| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[^\S\n]+";

/// A tokenizer with the ids that open and end a text.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// The fast path of tokenizers that were made here.
    words: Option<Words>,
    /// That of others.
    pipeline: Option<Pipeline>,
    bos: Option<u32>,
    eos: Option<u32>,
    files: TokenizerFiles,
}

/// The files a tokenizer was made from: written beside every exported model, and part of its digest.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizerFiles {
    /// `tokenizer.json`
    pub tokenizer: String,
    /// `tokenizer_config.json`
    pub config: String,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and `tokenizer_config.json` of a model directory.
    ///
    /// # Errors
    /// Names the file that is missing or malformed.
    pub fn read(directory: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = directory.join(name);
            std::fs::read_to_string(&path).map_err(Error::file("read", &path))
        };
        let tokenizer = read("tokenizer.json")?;
        let config = match directory.join("tokenizer_config.json").exists() {
            true => read("tokenizer_config.json")?,
            false => "{}".into(),
        };
        Self::from_files(TokenizerFiles { tokenizer, config })
            .map_err(|reason| Error::malformed(&directory.join("tokenizer.json"), reason))
    }

    /// A tokenizer from the text of its files.
    ///
    /// # Errors
    /// Says what is malformed.
    pub fn from_files(files: TokenizerFiles) -> std::result::Result<Self, String> {
        let mut inner = tokenizers::Tokenizer::from_bytes(&files.tokenizer)
            .map_err(|error| error.to_string())?;
        inner.set_encode_special_tokens(true); // as text, that is: never as the token
        inner.with_truncation(None).map_err(|error| error.to_string())?;
        inner.with_padding(None);
        let config: Value =
            serde_json::from_str(&files.config).map_err(|error| error.to_string())?;
        let id = |key: &str| {
            let entry = &config[key];
            let text = entry.as_str().or_else(|| entry["content"].as_str());
            text.and_then(|text| inner.token_to_id(text))
        };
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        let inner = Arc::new(inner);
        let words = is_ours(&files.tokenizer).then(|| Words::new(inner.clone()));
        let pipeline = match words {
            Some(_) => None,
            None => Pipeline::of(&files.tokenizer, &inner),
        };
        Ok(Tokenizer { inner, words, pipeline, bos, eos, files })
    }

    /// Trains a byte-level BPE tokenizer (Sennrich et al., 2016; arXiv 1508.07909) of `vocabulary` tokens.
    ///
    /// The same texts in the same order give the same tokenizer.
    ///
    /// # Errors
    /// If the vocabulary cannot hold all bytes and special tokens.
    pub fn train(texts: impl Iterator<Item = String> + Send, vocabulary: usize) -> Result<Self> {
        let smallest = 256 + SPECIAL.len();
        if vocabulary < smallest {
            let reason =
                format!("a vocabulary of {vocabulary} is below the {smallest} bytes and marks");
            return Err(Error::Setting(reason));
        }
        let failed = |error: tokenizers::Error| Error::Setting(format!("tokenizer: {error}"));
        let split = Split::new(
            SplitPattern::Regex(PATTERN.into()),
            SplitDelimiterBehavior::Isolated,
            false,
        );
        let bytes = ByteLevel::new(false, true, false);
        let cut = Sequence::new(vec![split.map_err(failed)?.into(), bytes.into()]);
        let mut bpe = TokenizerBuilder::<_, NormalizerWrapper, _, PostProcessorWrapper, _>::new()
            .with_model(BPE::default())
            .with_pre_tokenizer(Some(cut))
            .with_decoder(Some(ByteLevel::new(false, true, false)))
            .build()
            .map_err(failed)?;
        let mut trainer = BpeTrainer::builder()
            .vocab_size(vocabulary)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(SPECIAL.map(|token| AddedToken::from(token, true)).to_vec())
            .build();
        bpe.train(&mut trainer, texts).map_err(failed)?;
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "clean_up_tokenization_spaces": false,
        });
        let files = TokenizerFiles {
            tokenizer: bpe.to_string(false).map_err(failed)?,
            config: format!("{config:#}"),
        };
        Self::from_files(files).map_err(Error::Setting)
    }

    /// The ids of `text`, nothing added.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.encode_onto(text, &mut ids);
        ids
    }

    /// Appends the ids of `text`, nothing added.
    pub fn encode_onto(&self, text: &str, ids: &mut Vec<u32>) {
        if let Some(words) = &self.words {
            return words.encode(text, ids);
        }
        if let Some(pipeline) = &self.pipeline {
            return ids.extend(pipeline.encode(text));
        }
        let encoding = self.inner.encode_fast(text, false);
        ids.extend_from_slice(encoding.expect("a loaded tokenizer encodes every string").get_ids());
    }

    /// Whether `text` has so many ids at most; cheaper than counting them all.
    pub fn has_at_most(&self, text: &str, most: usize) -> bool {
        match &self.words {
            Some(words) => words.has_at_most(text, most),
            None => self.encode(text).len() <= most,
        }
    }

    /// The ids of `text`, each with the byte it starts at.
    pub fn encode_with_starts(&self, text: &str) -> (Vec<u32>, Vec<usize>) {
        if let Some(words) = &self.words {
            let ids = self.encode(text);
            let starts = words.starts(text, &ids);
            return (ids, starts);
        }
        let encoding = self.inner.encode(text, false);
        let encoding = encoding.expect("a loaded tokenizer encodes every string");
        let starts = encoding.get_offsets().iter().map(|&(start, _)| start).collect();
        (encoding.get_ids().to_vec(), starts)
    }

    /// The text of `ids`, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, true).expect("a loaded tokenizer decodes every id")
    }

    /// The id that opens a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The id that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// One more than the largest id.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
    }

    /// The files to write beside a model that uses this tokenizer.
    pub fn files(&self) -> &TokenizerFiles {
        &self.files
    }

    /// A digest of what decides the ids.
    pub fn digest(&self) -> u128 {
        xxh3_128(format!("{}\0{:?}\0{:?}", self.files.tokenizer, self.bos, self.eos).as_bytes())
    }
}

/// Whether a `tokenizer.json` cuts and merges as those that are made here: by [`PATTERN`], over bytes.
fn is_ours(tokenizer: &str) -> bool {
    let Ok(json) = serde_json::from_str::<Value>(tokenizer) else { return false };
    let (cuts, model) = (&json["pre_tokenizer"]["pretokenizers"], &json["model"]);
    let cuts_ours = json["pre_tokenizer"]["type"] == "Sequence"
        && cuts.as_array().is_some_and(|cuts| cuts.len() == 2)
        && cuts[0]["type"] == "Split"
        && cuts[0]["pattern"]["Regex"] == PATTERN
        && cuts[0]["behavior"] == "Isolated"
        && cuts[0]["invert"] == false
        && cuts[1]["type"] == "ByteLevel"
        && cuts[1]["add_prefix_space"] == false
        && cuts[1]["use_regex"] == false;
    let merges_ours = model["type"] == "BPE" && model["dropout"].is_null();
    let added = json["added_tokens"].as_array();
    let only_special = added.is_none_or(|all| all.iter().all(|token| token["special"] == true));
    let plain = ["normalizer", "truncation", "padding"].iter().all(|part| json[part].is_null());
    cuts_ours && merges_ours && only_special && plain
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} tokens, {:032x})", self.vocabulary(), self.digest())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A small tokenizer over English prose.
    pub(crate) fn small() -> Tokenizer {
        let texts = ["The rates rose by 25 points.", "What rose? The rates, to 75.\n\nRates rose."];
        let texts = texts.iter().cycle().take(40).map(|&text| text.to_owned());
        Tokenizer::train(texts, 300).unwrap()
    }

    fn check(text: &str) {
        let tokenizer = small();
        let (ids, starts) = tokenizer.encode_with_starts(text);
        assert_eq!(ids, tokenizer.encode(text));
        assert_eq!(tokenizer.decode(&ids), text);
        assert!(starts.is_sorted() && starts.iter().all(|&start| start < text.len()));
        assert!(!ids.contains(&tokenizer.bos().unwrap()), "text became a special token");
        assert!(!ids.contains(&tokenizer.eos().unwrap()), "text became a special token");
    }

    #[test]
    fn every_text_comes_back() {
        for text in ["", "Rates rose.", "\n\n  a\t b \r\n", "é漢字 🙂 ½", "\u{0}\u{fffd}"] {
            check(text);
        }
    }

    #[test]
    fn special_tokens_inside_text_stay_text() {
        check("a <s> struck </s> through <pad> text</s>");
    }

    #[test]
    fn ids_do_not_change_when_text_follows_line_feeds() {
        let tokenizer = small();
        let [prompt, rest] =
            [" <CON> Rates rose. </CON>\n\n", "<QUE> What rose? <ANS> Rates </END>"];
        let joined = [tokenizer.encode(prompt), tokenizer.encode(rest)].concat();
        assert_eq!(tokenizer.encode(&format!("{prompt}{rest}")), joined);
    }

    #[test]
    fn training_is_repeatable() {
        assert_eq!(small().digest(), small().digest());
        assert_eq!((small().bos(), small().eos()), (Some(1), Some(2)));
    }
}
