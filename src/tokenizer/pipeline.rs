//! The encoder of the library's next version, which is many times as fast as that of this one.
//!
//! It is a release candidate, so it is not believed: a tokenizer takes this path only if it gave the ids of
//! this version for every probe when it was loaded. Places of ids are always those of this version.

use std::sync::Arc;
use tokenizers_next::pipeline::{EncodeOptions, Override, PipelineTokenizer};

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
        Some(ids.into_iter().map(|token| token.id()).collect())
    }
}
