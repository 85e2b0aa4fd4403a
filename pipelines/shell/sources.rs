//! The sources of a mix, from their flags.

use super::args::MixArgs;
use super::plan::count;
use super::ratio::{Shares, ratio};
use super::settings::{Preset, digests};
use anyhow::{Context, Result, bail, ensure};
use headwater::format::census::census;
use headwater::format::documents::files;
use headwater::format::jsonl::Fields;
use headwater::format::{input, instructions, tasks};
use headwater::lane::{AtEnd, MixRules};
use headwater::side::{Content, SideSource};
use headwater::template::Templates;
use headwater::tokenizer::Tokenizer;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The name of what flows, in ids and ledgers.
pub const FLOW: &str = "augmented";

/// What is mixed with what.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Names, shares, and what happens at the end of a source.
    pub rules: MixRules,
    /// The side sources, in the order of their shares.
    pub sides: Vec<Side>,
}

/// A side source, as it was asked for.
#[derive(Clone, Debug)]
pub struct Side {
    /// Its name.
    pub name: String,
    /// Its files.
    pub files: Vec<PathBuf>,
    /// How often they are read.
    pub passes: Option<u64>,
    /// How they are written, for people.
    pub spelling: String,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Instructions,
    Tasks,
    Texts(Fields),
}

impl Sources {
    /// Looks at the files of all sources.
    ///
    /// # Errors
    /// Says which flag cannot work, and why.
    pub fn new(
        args: &MixArgs,
        preset: &Preset,
        inputs: &[PathBuf],
        fields: &Fields,
        limit: Option<u64>,
    ) -> Result<Self> {
        let mut sides = sides(args, preset, fields)?;
        set_passes(&mut sides, &args.passes)?;
        let mut names = vec![FLOW.to_owned()];
        names.extend(sides.iter().map(|side| side.name.clone()));
        let at_end = match args.at_end.as_str() {
            "renormalise" => AtEnd::Renormalise,
            "stop" => AtEnd::Stop,
            other => bail!("--at-end takes renormalise or stop, not {other:?}"),
        };
        let shares = match &args.ratio {
            Some(_) if sides.is_empty() => bail!(
                "--ratio wants something to mix in: name files with --general, --tasks or --also"
            ),
            Some(text) => ratio(text, &names)?,
            None => usual_shares(&sides, (inputs, limit), fields)?,
        };
        Ok(Sources { rules: MixRules { names, shares, at_end }, sides })
    }

    /// The side sources with the tokenizer of the model that is trained.
    pub fn open(
        &self,
        tokenizer: &Tokenizer,
        templates: &Arc<Templates>,
        seed: u64,
    ) -> Vec<SideSource> {
        let open = |(index, side): (usize, &Side)| SideSource {
            source: index as u32 + 1,
            name: side.name.clone(),
            files: side.files.clone(),
            content: match &side.kind {
                Kind::Instructions => Content::Instructions,
                Kind::Tasks => Content::Tasks(templates.clone(), seed),
                Kind::Texts(fields) => Content::Texts(fields.clone()),
            },
            passes: side.passes,
            tokenizer: tokenizer.clone(),
        };
        self.sides.iter().enumerate().map(open).collect()
    }

    /// The part of `run.json`.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn configuration(&self) -> Result<Value> {
        let side = |side: &Side| -> Result<Value> {
            let files = digests(&side.files)?;
            Ok(json!({ "name": side.name, "files": files, "passes": side.passes }))
        };
        let sides: Vec<Value> = self.sides.iter().map(side).collect::<Result<_>>()?;
        Ok(json!({ "shares": self.rules.shares, "at_end": self.rules.at_end, "sources": sides }))
    }

    /// The mix in words.
    pub fn describe(&self) -> String {
        let Some((_, first)) = self.rules.shares.first().filter(|_| !self.sides.is_empty()) else {
            return "augmented documents only (nothing to mix in)".into();
        };
        let ratio = |shares: &[u64]| {
            let parts: Vec<String> = shares.iter().map(|&share| count(share)).collect();
            parts.join(":")
        };
        let mut text = format!("{} = {} by tokens", self.rules.names.join(" : "), ratio(first));
        for (epoch, shares) in &self.rules.shares[1..] {
            text += &format!(", {} from epoch {epoch} on", ratio(shares));
        }
        for Side { name, files, passes, spelling, .. } in &self.sides {
            let passes = passes.map(|passes| format!(", read {passes} times")).unwrap_or_default();
            text += &format!("; {name}: {} files ({spelling}){passes}", files.len());
        }
        text
    }
}

fn sides(args: &MixArgs, preset: &Preset, fields: &Fields) -> Result<Vec<Side>> {
    let mut sides = Vec::new();
    let general = input::expand(&args.general)?;
    if !general.is_empty() {
        sides.push(Side {
            name: "general".into(),
            passes: None,
            spelling: spellings(&general)?.join(", "),
            files: general,
            kind: Kind::Instructions,
        });
    }
    let tasks = input::expand(&args.tasks)?;
    if !tasks.is_empty() {
        some_task(&tasks)?;
        sides.push(Side {
            name: "tasks".into(),
            passes: preset.task_passes,
            spelling: "task rows".into(),
            files: tasks,
            kind: Kind::Tasks,
        });
    }
    for also in &args.also {
        let Some((name, paths)) = also.split_once('=') else {
            bail!("--also takes a name and files such as web=a.jsonl,b.jsonl, not {also:?}");
        };
        let taken = name == FLOW || sides.iter().any(|side| side.name == name);
        let plain =
            !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "-_".contains(c));
        ensure!(plain && !taken, "--also {also:?}: {name:?} is taken, or no plain name");
        let paths: Vec<PathBuf> = paths.split(',').map(PathBuf::from).collect();
        let (files, _) = files(&paths)?;
        ensure!(!files.is_empty(), "--also {also:?} names no files of a known kind");
        sides.push(Side {
            name: name.into(),
            files,
            passes: None,
            spelling: "raw texts".into(),
            kind: Kind::Texts(fields.clone()),
        });
    }
    Ok(sides)
}

fn set_passes(sides: &mut [Side], passes: &[String]) -> Result<()> {
    for text in passes {
        let parsed = text.split_once('=').map(|(name, number)| (name, number.parse::<u64>()));
        let Some((name, Ok(number))) = parsed.filter(|(_, number)| *number != Ok(0)) else {
            bail!("--passes takes a name and a number such as tasks=4, not {text:?}");
        };
        let side = sides.iter_mut().find(|side| side.name == name);
        side.with_context(|| format!("--passes {text:?}: no source is called {name:?}"))?.passes =
            Some(number);
    }
    Ok(())
}

/// One to one with general instructions; what is read so many times is spread over all of the input, by
/// the bytes of both.
fn usual_shares(
    sides: &[Side],
    (inputs, limit): (&[PathBuf], Option<u64>),
    fields: &Fields,
) -> Result<Shares> {
    if sides.iter().all(|side| side.kind == Kind::Instructions) {
        return Ok(vec![(0, vec![1; sides.len() + 1])]);
    }
    let mut shares = vec![text_bytes(inputs, fields, limit)?.max(1)];
    for side in sides {
        shares.push(match (&side.kind, side.passes) {
            (Kind::Tasks, Some(passes)) => passes * task_bytes(&side.files)?,
            (Kind::Texts(fields), Some(passes)) => passes * text_bytes(&side.files, fields, None)?,
            _ => bail!(
                "say with --ratio how much {:?} is to give: it is read for ever, beside others",
                side.name
            ),
        });
    }
    // Parts of 100,000 say as much, and read better.
    let all: u64 = shares.iter().sum();
    let part = |share: u64| (u128::from(share) * 100_000 / u128::from(all)).max(1) as u64;
    Ok(vec![(0, shares.into_iter().map(part).collect())])
}

fn text_bytes(files: &[PathBuf], fields: &Fields, limit: Option<u64>) -> Result<u64> {
    Ok(census(files, fields, limit)?.text_bytes)
}

fn task_bytes(files: &[PathBuf]) -> Result<u64> {
    let mut bytes = 0;
    for file in files {
        for task in tasks::read(file)?.flatten() {
            bytes += task.text.len();
            bytes += task.pairs.iter().map(|p| p.question.len() + p.answer.len()).sum::<usize>();
        }
    }
    Ok(bytes as u64)
}

/// Some row must be there to mix in.
fn some_task(files: &[PathBuf]) -> Result<()> {
    let mut fault = None;
    for file in files {
        for read in tasks::read(file).context("--tasks")? {
            match read {
                Ok(_) => return Ok(()),
                Err(rejected) => drop(fault.get_or_insert(rejected)),
            }
        }
    }
    let fault = fault.map(|rejected| format!("; the first: {rejected}")).unwrap_or_default();
    bail!("--tasks: no record of its files can be used{fault}")
}

/// How general instructions are written, by the first of each file; some must be there to mix in.
fn spellings(files: &[PathBuf]) -> Result<Vec<&'static str>> {
    let (mut names, mut fault) = (Vec::new(), None);
    for file in files {
        match first_spelling(file)? {
            Ok(name) => names.push(name),
            Err(rejected) => fault = fault.or(rejected),
        }
    }
    let fault = fault.map(|rejected| format!("; the first: {rejected}")).unwrap_or_default();
    ensure!(!names.is_empty(), "--general: no record of its files can be used{fault}");
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

type Fault = Option<Box<headwater::record::Rejected>>;

fn first_spelling(file: &Path) -> Result<std::result::Result<&'static str, Fault>> {
    let mut fault = None;
    for read in instructions::read(file).context("--general")? {
        match read {
            Ok(instruction) => return Ok(Ok(instruction.spelling.name())),
            Err(rejected) => drop(fault.get_or_insert(rejected)),
        }
    }
    Ok(Err(fault))
}
