//! Texts to measure a model on, never learned from.
//!
//! ```text
//! files ─▶ documents ─▶ items ─▶ packed, source by source ─▶ loss of each source
//! ```
//!
//! A source is named by its files: `valid` for `valid.jsonl.zst`. Files of one name are one source. All of
//! it is held in memory, five bytes a token, and is read once: it costs a forward pass at every evaluation.

use super::{Trainer, report};
use crate::augment::item;
use crate::error::{Error, Result};
use crate::format::documents::{Documents, Found};
use crate::format::jsonl::Fields;
use crate::ledger::Ledger;
use crate::pack::{PackMode, Packer};
use crate::record::{Rejected, Sequence};
use crate::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Held-out texts, as sequences of the length that is trained on.
#[derive(Clone, Debug, Default)]
pub struct HeldOut {
    sources: Vec<Source>,
    rejected: Vec<Rejected>,
    withdrawn: u64,
}

#[derive(Clone, Debug)]
struct Source {
    name: String,
    documents: u64,
    /// Tokens that are predicted: all but the first of each segment.
    tokens: u64,
    sequences: Vec<Sequence>,
}

/// How well a model predicts one source: a line of `eval.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps done: 0 before the first.
    pub step: u64,
    /// The source.
    pub source: String,
    /// Mean loss of its tokens, in nats; null if it is not finite.
    pub loss: Option<f64>,
    /// The exponential of the loss; null if it is not finite.
    pub perplexity: Option<f64>,
    /// Tokens predicted.
    pub tokens: u64,
}

impl HeldOut {
    /// Reads files of any known kind.
    ///
    /// # Errors
    /// If a source holds nothing that can be predicted: says why its first record cannot be used.
    pub fn read(
        files: &[PathBuf],
        fields: &Fields,
        tokenizer: &Tokenizer,
        length: usize,
    ) -> Result<Self> {
        let mut names: Vec<String> = Vec::new();
        for name in files.iter().map(|file| name(file)) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let mut held_out = HeldOut::default();
        for own in names {
            let files = files.iter().filter(|file| name(file) == own).cloned().collect();
            held_out.read_source(
                own,
                Documents::new(files, "held out", fields.clone()),
                tokenizer,
                length,
            )?;
        }
        Ok(held_out)
    }

    fn read_source(
        &mut self,
        name: String,
        found: Documents,
        tokenizer: &Tokenizer,
        length: usize,
    ) -> Result<()> {
        let mut packer = Packer::new(length, PackMode::default());
        let (mut documents, mut sequences, before) = (0, Vec::new(), self.rejected.len());
        for found in found {
            match found {
                Found::Document(document) => {
                    documents += 1;
                    let id = format!("{name}:{}", document.id);
                    sequences.extend(packer.push(&item(&id, 0, &document.text, tokenizer)));
                }
                Found::Rejected(rejected) => self.rejected.push(*rejected),
                Found::Withdrawn { .. } => self.withdrawn += 1,
            }
        }
        sequences.extend(packer.finish());
        let tokens = sequences.iter().flat_map(report::learned).map(|(_, n)| n as u64).sum();
        if tokens == 0 {
            let fault =
                self.rejected.get(before).map(|rejected| format!("; the first: {rejected}"));
            return Err(Error::Setting(format!(
                "no record of the held-out source {name:?} can be used{}",
                fault.unwrap_or_default()
            )));
        }
        self.sources.push(Source { name, documents, tokens, sequences });
        Ok(())
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    /// The number of sources.
    pub fn sources(&self) -> usize {
        self.sources.len()
    }

    /// Records that cannot be used, and why.
    pub fn rejected(&self) -> &[Rejected] {
        &self.rejected
    }

    /// What was read, by name: documents and tokens of each source, what was rejected and withdrawn.
    pub fn ledger(&self) -> Ledger {
        let mut ledger = Ledger::default();
        for source in &self.sources {
            ledger.add(format!("held_out/documents/{}", source.name), source.documents);
            ledger.add(format!("held_out/tokens/{}", source.name), source.tokens);
        }
        for rejected in &self.rejected {
            ledger.add(format!("held_out/rejected/{}", rejected.reason), 1);
        }
        ledger.add("held_out/withdrawn", self.withdrawn);
        ledger
    }
}

impl Trainer {
    /// The loss of each held-out source, in their order; none if `goes_on`, which is asked now and then, says no. Changes
    /// nothing.
    ///
    /// # Errors
    /// If the device fails.
    pub fn evaluate_held_out(
        &mut self,
        held_out: &HeldOut,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<Option<Vec<Evaluation>>> {
        let mut evaluate = |source: &Source| {
            let Some(loss) = self.evaluate_while(&source.sequences, goes_on)? else {
                return Ok(None);
            };
            let finite = |value: f64| Some(value).filter(|value| value.is_finite());
            Ok(Some(Evaluation {
                step: self.progress().step,
                source: source.name.clone(),
                loss: finite(loss),
                perplexity: finite(loss.exp()),
                tokens: source.tokens,
            }))
        };
        held_out
            .sources
            .iter()
            .map(|source| evaluate(source).transpose())
            .collect::<Option<_>>()
            .transpose()
    }
}

/// The name of a file without its extensions.
fn name(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let plain = [".gz", ".zst"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
    plain.rsplit_once('.').map_or(plain, |(stem, _)| stem).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::small;

    fn write(folder: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    fn read(files: &[PathBuf]) -> Result<HeldOut> {
        HeldOut::read(files, &Fields::detected(), &small(), 16)
    }

    #[test]
    fn files_of_one_name_are_a_source_and_bad_records_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let line = |text: &str| format!("{{\"text\":\"{text}\"}}\n");
        let files = [
            write(&folder, "web.jsonl", &(line("The rate rose again.") + "no json\n{}\n")),
            write(&folder, "books.txt", "It was the best of times, it was the worst of times."),
            write(&folder, "more/web.jsonl", &line("And then it fell.")),
        ];
        let held_out = read(&files).unwrap();
        let counts = held_out.ledger();
        assert_eq!(counts.get("held_out/documents/web"), 2);
        assert_eq!(counts.get("held_out/documents/books"), 1);
        assert_eq!(counts.get("held_out/rejected/malformed_json"), 1);
        assert_eq!(counts.sum("held_out/rejected/"), held_out.rejected().len() as u64);
        assert_eq!(held_out.rejected().len(), 2);
        let names: Vec<&str> = held_out.sources.iter().map(|source| source.name.as_str()).collect();
        assert_eq!(names, ["web", "books"]);
        for source in &held_out.sources {
            assert!(source.sequences.iter().all(|sequence| sequence.tokens.len() <= 16));
        }
    }

    #[test]
    fn a_source_without_anything_to_predict_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = read(&[write(&folder, "bad.jsonl", "no json\n")]).unwrap_err().to_string();
        assert!(error.contains("\"bad\"") && error.contains("malformed_json"), "{error}");
        assert!(read(&[write(&folder, "empty.jsonl", "")]).is_err());
    }

    #[test]
    fn a_source_has_the_name_of_its_file() {
        let names = ["a/valid.jsonl", "valid.jsonl.zst", "pubmed26n0001.xml.gz", "plain"];
        let found = names.map(|path| name(Path::new(path)));
        assert_eq!(found, ["valid", "valid", "pubmed26n0001", "plain"]);
    }
}
