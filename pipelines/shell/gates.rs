//! Rules of the quality gates, from their flags.

use super::args::GateArgs;
use super::ratio::bounds;
use anyhow::{Context, Result, bail, ensure};
use headwater::format::input;
use headwater::gate::documents::ContaminationRules;
use headwater::gate::pairs::Grounded;
use headwater::gate::{DocumentGates, DocumentRules, PairGates, PairRules};

impl GateArgs {
    /// What is asked of documents, by a pipeline that asks for so many words, and perhaps for unique texts.
    ///
    /// # Errors
    /// If a flag has no meaning.
    pub fn document_rules(&self, words_min: usize, unique: bool) -> Result<DocumentRules> {
        let unique = match self.duplicates.as_deref() {
            None => unique,
            Some("keep") => false,
            Some("drop") => true,
            Some(other) => bail!("--duplicates takes keep or drop, not {other:?}"),
        };
        let rules = DocumentRules {
            words_min: self.min_words.unwrap_or(words_min),
            words_max: self.max_words,
            unique,
            similar_percent: self.near_duplicates,
            languages: self.language.clone(),
            contamination: self.contamination()?,
        };
        if let Some(most) = rules.words_max {
            ensure!(most >= rules.words_min, "--max-words {most} is below --min-words");
        }
        DocumentGates::new(rules.clone()).context("quality gates")?;
        Ok(rules)
    }

    /// What is asked of pairs.
    ///
    /// # Errors
    /// If a flag has no meaning.
    pub fn pair_rules(&self) -> Result<PairRules> {
        let words = |flag: &str, text: &Option<String>| {
            text.as_deref().map(|text| bounds(flag, text)).transpose()
        };
        let rules = PairRules {
            question_words: words("--question-words", &self.question_words)?,
            answer_words: words("--answer-words", &self.answer_words)?,
            similar_percent: self.similar_questions,
            grounded: Grounded {
                plain: self.grounded,
                options: self.grounded_options,
                reasoning: self.grounded_reasoning,
            },
            contamination: self.contamination()?,
            agreement_percent: self.agreement,
        };
        PairGates::new(rules.clone()).context("quality gates")?;
        Ok(rules)
    }

    fn contamination(&self) -> Result<Option<ContaminationRules>> {
        ensure!(self.decontaminate_words > 0, "--decontaminate-words must be 1 at least");
        if self.decontaminate.is_empty() {
            return Ok(None);
        }
        let files = input::expand(&self.decontaminate)?;
        Ok(Some(ContaminationRules { files, words: self.decontaminate_words }))
    }
}
