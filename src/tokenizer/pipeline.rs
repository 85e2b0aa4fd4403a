//! The encoder of the library's next version, which is many times as fast as that of this one.
//!
//! It is a release candidate, so it is not believed: a tokenizer takes this path only if it gave the ids of
//! this version for every probe when it was loaded. Places of ids are always those of this version.

use std::sync::Arc;
use tokenizers_next::pipeline::{EncodeOptions, Override, PipelineToken, PipelineTokenizer};

/// Texts that tokenizers are known to disagree about: blanks, digits, scripts, marks, and what looks like
/// control tokens.
const PROBES: [&str; 16] = [
    "",
    " ",
    "The rates rose by 25 points, to 3.75 %.",
    "  two  blanks   and\ttabs\t\n\n\n and\r\nlines \n ",
    "trailing blanks   ",
    "It's we'll THEY'RE don't I'D o'clock 'quoted'",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 ½ ٣٤ Ⅷ",
    "x\u{a0}y\u{2003}z\u{200b}w\u{feff}v",
    "Überprüfung naïve façade e\u{301} Ångström ﬁne",
    "漢字かな交じり文と한국어 ไทย हिन्दी العربية עברית",
    "🙂👩‍👩‍👧🏽🇩🇪 ∑∫√ → ≤",
    "<s> </s> <pad> <unk> <|begin_of_text|> <|end_of_text|> <|eot_id|> [INST] [/INST] <0x0A>",
    " <CON> text </CON>\n\n<QUE> q <ANS> a </END>",
    "fn main() { let x: u32 = a[0] + b->c; } // ==== !!!! ....",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\path\\to",
    "\u{0}\u{1}\u{7f}\u{fffd}\u{e000} ▁ Ġ Ċ",
];

/// The encoder of a tokenizer.
#[derive(Clone)]
pub(super) struct Pipeline {
    inner: Arc<PipelineTokenizer>,
}

impl Pipeline {
    /// For the text of a `tokenizer.json` that `library` was made of; none if the two are not the same.
    pub(super) fn of(file: &str, library: &tokenizers::Tokenizer) -> Option<Self> {
        let file = tokenizers_next::canonicalize_str(file).ok()?;
        let pipeline = Pipeline { inner: Arc::new(tokenizers_next::from_json(&file).ok()?) };
        let is_equal = |text: &&str| {
            let expected = library.encode_fast(*text, false).ok()?;
            (pipeline.try_encode(text)? == expected.get_ids()).then_some(())
        };
        PROBES.iter().all(|text| is_equal(text).is_some()).then_some(pipeline)
    }

    /// The ids of `text`.
    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        self.try_encode(text).expect("a loaded tokenizer encodes every string")
    }

    fn try_encode(&self, text: &str) -> Option<Vec<u32>> {
        let options = EncodeOptions {
            add_special_tokens: false,
            encode_special_tokens: true, // as text, that is: never as the token
            padding: Override::Off,
            truncation: Override::Off,
        };
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.inner.encode_into(text, &options, &mut ids).ok()?;
        Some(ids.into_iter().map(PipelineToken::id).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Tokenizer, TokenizerFiles};
    use serde_json::{Value, json};
    use tokenizers::models::bpe::{BPE, BpeTrainer};
    use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper};
    use tokenizers::{PreTokenizerWrapper, TokenizerBuilder};

    /// The pattern of Llama 3, as its `tokenizer.json` has it.
    const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    fn texts() -> Vec<String> {
        let samples = ["assets/samples/biomedicine.xml", "assets/samples/instructions.jsonl"];
        let start = |sample: &&str| {
            let mut text = std::fs::read_to_string(sample).unwrap();
            text.truncate(text.floor_char_boundary(40_000)); // merging a text in one piece takes long
            text
        };
        samples.iter().map(start).collect()
    }

    /// Trains a tokenizer that prepares text in some way.
    fn trained(normalizer: Value, cutter: Value, model: BPE, decoder: Value) -> Tokenizer {
        let normalizer: Option<NormalizerWrapper> = serde_json::from_value(normalizer).unwrap();
        let cutter: Option<PreTokenizerWrapper> = serde_json::from_value(cutter).unwrap();
        let decoder: Option<DecoderWrapper> = serde_json::from_value(decoder).unwrap();
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let special = ["<unk>", "<s>", "</s>"].map(|token| AddedToken::from(token, true));
        let mut bytes: Vec<AddedToken> = special.to_vec();
        if model.byte_fallback {
            bytes.extend((0..=255).map(|byte| AddedToken::from(format!("<0x{byte:02X}>"), false)));
        }
        let mut trainer = BpeTrainer::builder()
            .vocab_size(2000)
            .show_progress(false)
            .initial_alphabet(alphabet.into_iter().collect())
            .special_tokens(bytes)
            .build();
        let mut tokenizer =
            TokenizerBuilder::<BPE, _, _, PostProcessorWrapper, DecoderWrapper>::new()
                .with_model(model)
                .with_normalizer(normalizer)
                .with_pre_tokenizer(cutter)
                .with_decoder(decoder)
                .build()
                .unwrap();
        tokenizer.train(&mut trainer, texts().into_iter()).unwrap();
        let mut file: Value = serde_json::from_str(&tokenizer.to_string(false).unwrap()).unwrap();
        let added = file["added_tokens"].as_array_mut().unwrap();
        added.retain(|token| token["special"] == true); // bytes are tokens like any other
        let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
        let files = TokenizerFiles { tokenizer: file.to_string(), config: config.to_string() };
        Tokenizer::from_files(files).unwrap()
    }

    fn check(tokenizer: &Tokenizer) {
        assert!(tokenizer.words.is_none());
        assert!(tokenizer.pipeline.is_some(), "the fast path is not taken");
        let mut texts = texts();
        texts.extend(super::PROBES.map(str::to_owned));
        texts.push("a <s> struck </s> through".into());
        for text in texts {
            let expected = tokenizer.inner.encode_fast(text.as_str(), false).unwrap();
            let ids = tokenizer.encode(&text);
            assert!(ids == expected.get_ids(), "{:?}", &text[..text.floor_char_boundary(80)]);
            assert!(!ids.contains(&1) && !ids.contains(&2), "text became a special token");
        }
    }

    #[test]
    fn ids_of_a_tokenizer_like_that_of_gpt_2_are_those_of_the_library() {
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        check(&trained(Value::Null, bytes.clone(), BPE::default(), bytes));
    }

    #[test]
    fn ids_of_a_tokenizer_like_that_of_llama_3_are_those_of_the_library() {
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let split = json!({"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": false});
        let cutter = json!({"type": "Sequence", "pretokenizers": [split, bytes]});
        check(&trained(Value::Null, cutter, BPE::default(), bytes));
    }

    #[test]
    fn ids_of_a_tokenizer_like_that_of_mistral_are_those_of_the_library() {
        let normalizer = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
        let model = BPE::builder()
            .byte_fallback(true)
            .fuse_unk(true)
            .unk_token("<unk>".into())
            .build()
            .unwrap();
        check(&trained(normalizer, Value::Null, model, Value::Null));
    }
}
