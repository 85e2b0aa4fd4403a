//! From entries to natural text: which patterns there are, which one a document gets, how it is written.
//!
//! ```text
//! entries of a group ─▶ forms (plain, options, reasoning) ─▶ choices, one stream each ─▶ text
//! ```
//!
//! The patterns are data files, one for each family (recipe (e)). A document makes each choice once, so
//! that all its texts share one style; every choice draws from its own stream. Rendering is a pure function
//! of entries, templates and seed.

#[cfg(test)]
mod assembly;
pub mod choice;
pub mod family;
#[cfg(test)]
mod laws;
pub mod mode;
pub mod names;
pub mod pattern;
pub mod render;
#[cfg(test)]
mod shapes;

use crate::error::{Error, Result};
use family::{Family, InlinePattern, Names, PairPattern, Source, Speakers};
use pattern::{Pattern, Slot};
use std::path::Path;
use xxhash_rust::xxh3::Xxh3;

/// All families.
#[derive(Clone, Debug)]
pub struct Templates {
    pub(crate) free_form: Family<PairPattern>,
    pub(crate) options: Family<PairPattern>,
    pub(crate) reasoning: Family<PairPattern>,
    pub(crate) options_reasoning: Family<PairPattern>,
    pub(crate) numbered: Family<PairPattern>,
    pub(crate) next_turn: Family<PairPattern>,
    pub(crate) inline_explained: Family<InlinePattern>,
    pub(crate) inline_plain: Family<InlinePattern>,
    pub(crate) before_text: Family<Pattern>,
    pub(crate) text_glue: Family<Pattern>,
    pub(crate) introduction: Family<Pattern>,
    pub(crate) inverted_header: Family<Pattern>,
    pub(crate) inverted_glue: Family<Pattern>,
    pub(crate) inverted_text: Family<Pattern>,
    pub(crate) options_opener: Family<Pattern>,
    pub(crate) option_names: Family<Names>,
    pub(crate) option_ending: Family<Pattern>,
    pub(crate) none_of_these: Family<Pattern>,
    pub(crate) question_names: Family<Names>,
    pub(crate) dialog_opener: Family<Pattern>,
    pub(crate) dialog_connector: Family<Pattern>,
    pub(crate) dialog_speakers: Family<Speakers>,
    pub(crate) dialog_ending: Family<Pattern>,
    digest: u128,
}

/// Name and text of the data files that come with the program.
const BUILT_IN: [(&str, &str); 23] = [
    ("free-form.toml", include_str!("data/free-form.toml")),
    ("options.toml", include_str!("data/options.toml")),
    ("reasoning.toml", include_str!("data/reasoning.toml")),
    ("options-reasoning.toml", include_str!("data/options-reasoning.toml")),
    ("numbered.toml", include_str!("data/numbered.toml")),
    ("next-turn.toml", include_str!("data/next-turn.toml")),
    ("inline-explained.toml", include_str!("data/inline-explained.toml")),
    ("inline-plain.toml", include_str!("data/inline-plain.toml")),
    ("before-text.toml", include_str!("data/before-text.toml")),
    ("text-glue.toml", include_str!("data/text-glue.toml")),
    ("introduction.toml", include_str!("data/introduction.toml")),
    ("inverted-header.toml", include_str!("data/inverted-header.toml")),
    ("inverted-glue.toml", include_str!("data/inverted-glue.toml")),
    ("inverted-text.toml", include_str!("data/inverted-text.toml")),
    ("options-opener.toml", include_str!("data/options-opener.toml")),
    ("option-names.toml", include_str!("data/option-names.toml")),
    ("option-ending.toml", include_str!("data/option-ending.toml")),
    ("none-of-these.toml", include_str!("data/none-of-these.toml")),
    ("question-names.toml", include_str!("data/question-names.toml")),
    ("dialog-opener.toml", include_str!("data/dialog-opener.toml")),
    ("dialog-connector.toml", include_str!("data/dialog-connector.toml")),
    ("dialog-speakers.toml", include_str!("data/dialog-speakers.toml")),
    ("dialog-ending.toml", include_str!("data/dialog-ending.toml")),
];

impl Templates {
    /// The templates that come with the program.
    ///
    /// # Panics
    /// Never: a test loads them.
    pub fn built_in() -> Self {
        let files = BUILT_IN.map(|(name, text)| (name, text.to_owned()));
        Self::load(&files).expect("a test loads the built-in templates")
    }

    /// The built-in templates with the files of `directory` in place of those of the same name.
    ///
    /// # Errors
    /// If the directory holds a file that is no family, or a mistake: file and line are named.
    pub fn with_files_of(directory: &Path) -> Result<Self> {
        let mut files = BUILT_IN.map(|(name, text)| (name, text.to_owned()));
        for path in crate::format::input::expand(&[directory.to_owned()])? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let own = files.iter_mut().find(|(known, _)| *known == name);
            let own = own.ok_or_else(|| Error::malformed(&path, "is no template family"))?;
            own.1 = std::fs::read_to_string(&path).map_err(Error::file("read", &path))?;
        }
        Self::load(&files).map_err(|reason| Error::malformed(directory, reason))
    }

    /// A digest of all files, part of every run's configuration.
    pub fn digest(&self) -> u128 {
        self.digest
    }

    fn load(files: &[(&str, String)]) -> std::result::Result<Self, String> {
        use Slot::{
            Answer, Answers, Context, Dialog, LastTurn, OptionAnswer, Options, Pairs, Question,
            Questions, Reasoning,
        };
        let mut digest = Xxh3::new();
        for (name, text) in files {
            digest.update(format!("{name}\0{}\0{text}", text.len()).as_bytes());
        }
        let file = |name: &str| {
            let (name, text) = files
                .iter()
                .find(|(known, _)| known.strip_suffix(".toml") == Some(name))
                .expect("every family has a file");
            Source { name, text }
        };
        let all = [Question, Options, OptionAnswer, Answer, Reasoning];
        Ok(Templates {
            free_form: file("free-form").pairs(&[Question], &[Question, Answer])?,
            options: file("options")
                .pairs(&[Question], &[Question, Options, OptionAnswer, Answer])?,
            reasoning: file("reasoning")
                .pairs(&[Question, Reasoning], &[Question, Reasoning, Answer])?,
            options_reasoning: file("options-reasoning").pairs(&[Question, Reasoning], &all)?,
            numbered: file("numbered")
                .pairs(&[Context, Questions, Answers], &[Context, Questions, Answers])?,
            next_turn: file("next-turn").pairs(&[Dialog, LastTurn], &[Dialog, LastTurn])?,
            inline_explained: file("inline-explained").inlines(true)?,
            inline_plain: file("inline-plain").inlines(false)?,
            before_text: file("before-text").phrases(&[Context])?,
            text_glue: file("text-glue").phrases(&[])?,
            introduction: file("introduction").phrases(&[])?,
            inverted_header: file("inverted-header").phrases(&[Pairs])?,
            inverted_glue: file("inverted-glue").phrases(&[])?,
            inverted_text: file("inverted-text").phrases(&[Context])?,
            options_opener: file("options-opener").phrases(&[])?,
            option_names: file("option-names").names(true)?,
            option_ending: file("option-ending").phrases(&[])?,
            none_of_these: file("none-of-these").phrases(&[])?,
            question_names: file("question-names").names(false)?,
            dialog_opener: file("dialog-opener").phrases(&[])?,
            dialog_connector: file("dialog-connector").phrases(&[])?,
            dialog_speakers: file("dialog-speakers").speakers()?,
            dialog_ending: file("dialog-ending").phrases(&[])?,
            digest: digest.digest128(),
        })
    }
}
