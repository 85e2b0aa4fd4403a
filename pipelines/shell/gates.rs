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

/// The gates that are on, in words.
pub(super) fn describe(documents: &DocumentRules, pairs: &PairRules) -> Vec<String> {
    let mut on = Vec::new();
    let mut add = |is_on: bool, text: String| {
        if is_on {
            on.push(text);
        }
    };
    let percent = |of: Option<u32>| of.unwrap_or_default();
    let most = |of: Option<usize>| of.map_or("no end".into(), |most| most.to_string());
    let bounds =
        |of: Option<(usize, usize)>| of.map_or("".into(), |(min, max)| format!("{min} to {max}"));
    let sized = documents.words_min > 1 || documents.words_max.is_some();
    add(
        sized,
        format!("documents of {} words to {}", documents.words_min, most(documents.words_max)),
    );
    add(documents.unique, "no equal documents".into());
    let similar = documents.similar_percent;
    add(similar.is_some(), format!("no documents {} % similar", percent(similar)));
    add(!documents.languages.is_empty(), format!("languages {}", documents.languages.join(", ")));
    let contamination = documents.contamination.as_ref();
    let words = contamination.map_or(0, |rules| rules.words);
    add(contamination.is_some(), format!("no {words} words in a row of an evaluation set"));
    add(
        pairs.question_words.is_some(),
        format!("questions of {} words", bounds(pairs.question_words)),
    );
    add(pairs.answer_words.is_some(), format!("answers of {} words", bounds(pairs.answer_words)));
    let similar = pairs.similar_percent;
    add(similar.is_some(), format!("no questions {} % similar", percent(similar)));
    let grounded = [
        ("answers", pairs.grounded.plain),
        ("answers among options", pairs.grounded.options),
        ("reasoning", pairs.grounded.reasoning),
    ];
    for (what, share) in grounded {
        add(
            share.is_some(),
            format!("{what} with {} % of their words in the text", percent(share)),
        );
    }
    let agreement = pairs.agreement_percent;
    add(agreement.is_some(), format!("a second answer that agrees by {} %", percent(agreement)));
    on
}
