//! Shows where things in a run come from, and where they went.
//!
//! ```text
//! sequence N ─▶ its segments ─▶ items ─▶ rendered documents ─▶ texts, files, records
//! document ID ─▶ its texts and pairs ─▶ rendered documents ─▶ the sequences that hold them
//! ```

use crate::shell::models::{BUNDLED, Model};
use crate::shell::terminal::show;
use crate::shell::training::latest;
use crate::shell::wrong_use;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use headwater::augment::{AUGMENTED, Augmented};
use headwater::manifest::{EpochRecord, Manifest};
use headwater::record::{Rejected, Segment, Sequence, Shot};
use headwater::run::RunFolder;
use headwater::tokenizer::Tokenizer;
use headwater::train::checkpoint;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Show where a sequence comes from, or what became of a document
#[derive(Args, Clone, Debug)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:\n  headwater inspect runs/pubmed --sequence 0\n  headwater inspect \
                        runs/pubmed --document 18193"
)]
pub struct Inspect {
    /// The run folder
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Show this sequence, counted from 0 in the order of training
    #[arg(long, value_name = "N", conflicts_with = "document")]
    sequence: Option<u64>,
    /// Show what became of the document with this id
    #[arg(long, value_name = "ID")]
    document: Option<String>,
    /// The directory of the tokenizer, if the run does not lead to it
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Prints what was asked for.
///
/// # Errors
/// If there is no such run, sequence or document.
pub fn run(args: &Inspect) -> Result<ExitCode> {
    let folder = RunFolder::existing(&args.run).map_err(|error| wrong_use(error.into()))?;
    let manifest = folder.manifest()?;
    let (value, text) = match (args.sequence, &args.document) {
        (Some(number), _) => {
            let tokenizer = tokenizer(args, &folder)?;
            let shown = ShownSequence::find(&folder, &manifest, number)?;
            (shown.json(&tokenizer), shown.describe(&tokenizer))
        }
        (None, Some(id)) => {
            let shown = ShownDocument::find(&folder, &manifest, id)?;
            (shown.json(), shown.describe())
        }
        (None, None) => match folder.configuration()? {
            configuration if is_of_training(&configuration) => training(&folder, &configuration)?,
            configuration => overview(&folder, &manifest, &configuration)?,
        },
    };
    match args.json {
        true => show!("{value:#}")?,
        false => show!("{}", text.trim_end())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether a run has no sequences of its own: it trained on those of another, or on rows.
fn is_of_training(configuration: &Value) -> bool {
    ["train", "tune"].iter().any(|command| configuration["command"] == *command)
}

/// What a run came to that has no sequences of its own: the account it wrote at its end.
fn training(folder: &RunFolder, configuration: &Value) -> Result<(Value, String)> {
    let path = folder.path().join("ledger.json");
    let account: Option<Value> = match path.exists() {
        true => {
            let text = std::fs::read_to_string(&path).with_context(|| format!("{path:?}"))?;
            Some(serde_json::from_str(&text).with_context(|| format!("{path:?}"))?)
        }
        false => None,
    };
    let latest = latest(folder.path())?;
    let progress = latest.as_deref().map(checkpoint::progress).transpose()?;
    let (sequences, tokens) =
        progress.map_or((0, 0), |progress| (progress.next_sequence, progress.tokens));
    let mut text = format!(
        "{} {}: {sequences} sequences, {tokens} tokens trained on at the latest checkpoint; {}\n",
        configuration["command"].as_str().unwrap_or("run"),
        folder.path().display(),
        match &account {
            Some(account) => format!("unknown {}", account["unknown"]),
            None => "it has not ended".into(),
        },
    );
    if let Some(latest) = &latest {
        let _ = writeln!(text, "latest checkpoint {}", latest.display());
    }
    let counts = account.as_ref().and_then(|account| account["counts"].as_object());
    for (name, amount) in counts.into_iter().flatten() {
        let _ = writeln!(text, "  {amount:>12} {name}");
    }
    let value = json!({
        "configuration": configuration,
        "ledger": account.as_ref().map(|account| &account["counts"]),
        "unknown": account.as_ref().map(|account| &account["unknown"]),
        "checkpoint": latest,
        "trained": { "sequences": sequences, "tokens": tokens },
    });
    Ok((value, text))
}

fn overview(
    folder: &RunFolder,
    manifest: &Manifest,
    configuration: &Value,
) -> Result<(Value, String)> {
    let latest = latest(folder.path())?;
    let trained = latest.as_deref().map(checkpoint::progress).transpose()?;
    let (sequences, tokens) =
        trained.map_or((0, 0), |trained| (trained.next_sequence, trained.tokens));
    let ledger = manifest.account(sequences, tokens);
    let mut text = format!(
        "{} {}: {} epochs committed, {} sequences, unknown {}\n",
        configuration["command"].as_str().unwrap_or("run"),
        folder.path().display(),
        manifest.next_epoch(),
        manifest.sequences(),
        ledger.unknown(),
    );
    if let Some(latest) = &latest {
        let _ = writeln!(text, "latest checkpoint {}", latest.display());
    }
    for (name, amount) in ledger.iter() {
        let _ = writeln!(text, "  {amount:>12} {name}");
    }
    let value = json!({
        "configuration": configuration,
        "epochs": manifest.next_epoch(),
        "sequences": manifest.sequences(),
        "ledger": ledger,
        "unknown": ledger.unknown(),
        "checkpoint": latest,
    });
    Ok((value, text))
}

/// A sequence with the documents behind its items.
struct ShownSequence {
    number: u64,
    epoch: u64,
    sequence: Sequence,
    documents: BTreeMap<String, Augmented>,
}

impl ShownSequence {
    fn find(folder: &RunFolder, manifest: &Manifest, number: u64) -> Result<Self> {
        let count = manifest.sequences();
        let holds = |epoch: &&EpochRecord| {
            (epoch.first_sequence..epoch.first_sequence + epoch.sequences).contains(&number)
        };
        let Some(epoch) = manifest.epochs.iter().find(holds) else {
            ensure!(count > 0, "there is no sequence {number}: the run has none of its own");
            bail!("there is no sequence {number}: the run has {count}, counted from 0");
        };
        let index = (number - epoch.first_sequence) as usize;
        let sequence = folder.sequences(epoch)?.swap_remove(index);
        let mut documents: BTreeMap<String, Augmented> =
            folder.augmented(epoch)?.into_iter().map(|one| (one.id.clone(), one)).collect();
        documents.retain(|id, _| sequence.segments.iter().any(|segment| segment.item == *id));
        Ok(ShownSequence { number, epoch: epoch.epoch, sequence, documents })
    }

    /// The segments with the text of each, and where in its item each round wrote.
    fn segments(&self, tokenizer: &Tokenizer) -> Vec<(&Segment, String, Vec<Shot>)> {
        let Sequence { tokens, segments, shots, .. } = &self.sequence;
        let mut start = 0;
        let mut cut = |segment: &Segment| {
            let run = start..start + segment.length;
            start = run.end;
            let shots = shots.iter().filter_map(|shot| shot.within(&run, segment.offset)).collect();
            (tokenizer.decode(&tokens[run.start as usize..run.end as usize]), shots)
        };
        let shown = |segment| {
            let (text, shots) = cut(segment);
            (segment, text, shots)
        };
        segments.iter().map(shown).collect()
    }

    /// The document a segment was cut from; none for items of side sources.
    fn origin(&self, segment: &Segment) -> Option<&Augmented> {
        if segment.source == AUGMENTED { self.documents.get(&segment.item) } else { None }
    }

    fn json(&self, tokenizer: &Tokenizer) -> Value {
        let segments: Vec<Value> = self
            .segments(tokenizer)
            .into_iter()
            .map(|(segment, text, shots)| {
                let origin = self.origin(segment);
                json!({
                    "item": segment.item,
                    "source": segment.source,
                    "offset": segment.offset,
                    "length": segment.length,
                    "shots": shots,
                    "text": text,
                    "documents": origin.map(|document| &document.source_ids),
                    "places": origin.map(places),
                })
            })
            .collect();
        json!({ "sequence": self.number, "epoch": self.epoch, "segments": segments })
    }

    fn describe(&self, tokenizer: &Tokenizer) -> String {
        let mut text = format!(
            "sequence {}, epoch {}: {} tokens in {} segments\n",
            self.number,
            self.epoch,
            self.sequence.tokens.len(),
            self.sequence.segments.len()
        );
        for (segment, words, shots) in self.segments(tokenizer) {
            let Segment { item, source, offset, length } = segment;
            let end = offset + length;
            let _ = writeln!(text, "\n── {item} · source {source} · tokens {offset} to {end}");
            for Shot { round, offset, length } in shots {
                let _ = writeln!(text, "   round {round}: tokens {offset} to {}", offset + length);
            }
            if let Some(document) = self.origin(segment) {
                for place in places(document) {
                    let _ = writeln!(text, "   from {place}");
                }
            }
            let _ = writeln!(text, "{}", quoted(&words));
        }
        text
    }
}

/// A document with everything that became of it.
struct ShownDocument {
    id: String,
    rendered: Vec<Augmented>,
    /// Sequence, and the part of the item it holds.
    packed: Vec<(u64, Segment)>,
    rejected: Vec<Rejected>,
}

impl ShownDocument {
    fn find(folder: &RunFolder, manifest: &Manifest, id: &str) -> Result<Self> {
        let mut shown = ShownDocument {
            id: id.to_owned(),
            rendered: Vec::new(),
            packed: Vec::new(),
            rejected: Vec::new(),
        };
        for epoch in &manifest.epochs {
            let is_behind = |document: &Augmented| {
                document.source_ids.iter().any(|source| source == id)
                    || document.entries.iter().any(|entry| entry.id == id)
            };
            let rendered: Vec<Augmented> =
                folder.augmented(epoch)?.into_iter().filter(is_behind).collect();
            if !rendered.is_empty() {
                shown.packed.extend(packed(folder, epoch, &rendered)?);
            }
            shown.rendered.extend(rendered);
            let concerns = |record: &Rejected| record.ids.iter().any(|own| own == id);
            shown.rejected.extend(folder.rejected(epoch)?.into_iter().filter(concerns));
        }
        ensure!(
            !(shown.rendered.is_empty() && shown.rejected.is_empty()),
            "no document {id:?} in this run; ids are those of the input"
        );
        Ok(shown)
    }

    fn json(&self) -> Value {
        let packed: Vec<Value> = self
            .packed
            .iter()
            .map(|(sequence, segment)| json!({ "sequence": sequence, "segment": segment }))
            .collect();
        json!({
            "document": self.id,
            "rendered": self.rendered,
            "packed": packed,
            "rejected": self.rejected,
        })
    }

    fn describe(&self) -> String {
        let mut text = format!("document {}\n", self.id);
        for rendered in &self.rendered {
            self.describe_rendered(rendered, &mut text);
        }
        for rejected in &self.rejected {
            let Rejected { stage, reason, detail, excerpt, .. } = rejected;
            let stage = format!("{stage:?}").to_lowercase();
            let _ = writeln!(text, "\nrejected at {stage}: {reason} {detail}\n{}", quoted(excerpt));
        }
        text
    }

    fn describe_rendered(&self, rendered: &Augmented, text: &mut String) {
        for (entry, round) in rendered.entries.iter().zip(&rendered.rounds) {
            let mark = if entry.id.starts_with(&self.id) { "▶" } else { " " };
            let _ = writeln!(
                text,
                "\n{mark} round {round}: {} with {} pairs, from {}",
                entry.id,
                entry.pairs.len(),
                entry.place
            );
            for pair in &entry.pairs {
                let _ = writeln!(text, "    Q {}\n    A {}", pair.question, pair.answer);
            }
        }
        let layout = match &rendered.choices {
            Some(choices) => format!("{:?} layout", choices.layout).to_lowercase(),
            None => "raw".to_owned(),
        };
        let _ = writeln!(
            text,
            "\nrendered as {}, {layout}, {} tokens:\n{}",
            rendered.id,
            rendered.tokens,
            quoted(&rendered.text)
        );
        for (sequence, segment) in self.packed.iter().filter(|(_, own)| own.item == rendered.id) {
            let (from, to) = (segment.offset, segment.offset + segment.length);
            let _ = writeln!(text, "packed in sequence {sequence}: tokens {from} to {to}");
        }
    }
}

/// The sequences of an epoch that hold one of these documents.
fn packed(
    folder: &RunFolder,
    epoch: &EpochRecord,
    rendered: &[Augmented],
) -> Result<Vec<(u64, Segment)>> {
    let mut found = Vec::new();
    for (number, sequence) in (epoch.first_sequence..).zip(folder.sequences(epoch)?) {
        for segment in sequence.segments {
            let holds = |document: &Augmented| document.id == segment.item;
            if segment.source == AUGMENTED && rendered.iter().any(holds) {
                found.push((number, segment));
            }
        }
    }
    Ok(found)
}

fn places(document: &Augmented) -> Vec<String> {
    document.entries.iter().map(|entry| format!("{} ({})", entry.place, entry.id)).collect()
}

/// Foreign text, so that it cannot be taken for ours: a bar in front, and no control characters.
fn quoted(text: &str) -> String {
    let clean = |c: char| {
        if c.is_control() && c != '\t' { '\u{fffd}' } else { c }
    };
    let line = |line: &str| format!("  │ {}", line.chars().map(clean).collect::<String>());
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// The tokenizer that the items of a run were made with.
fn tokenizer(args: &Inspect, folder: &RunFolder) -> Result<Tokenizer> {
    let configuration = folder.configuration()?;
    let wanted = configuration["model"]["tokenizer"].as_str().context("run.json names none")?;
    let named = configuration["model"]["name"].as_str().unwrap_or_default();
    let latest = latest(&args.run)?;
    let directories = [args.tokenizer.clone(), latest, Some(named.into())];
    let read = |directory: PathBuf| Tokenizer::read(Path::new(&directory)).ok();
    let found = directories.into_iter().flatten().filter_map(read);
    let bundled = Model::trained(BUNDLED)?.tokenizer;
    found
        .chain([bundled])
        .find(|tokenizer| format!("{:032x}", tokenizer.digest()) == wanted)
        .context("this run's tokenizer is not where it was; name its directory with --tokenizer")
        .map_err(wrong_use)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_cannot_move_the_cursor() {
        assert_eq!(quoted("a\x1b[2Jb\nc"), "  │ a\u{fffd}[2Jb\n  │ c");
    }
}
