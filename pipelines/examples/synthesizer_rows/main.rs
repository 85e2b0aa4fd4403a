//! Makes the rows that the bundled synthesizer is tuned on, from public task data and abstracts.
//!
//! ```text
//! task rows  ── licence, options ─────────┬─▶ OUT/tune.jsonl       19 of 20 rows
//! abstracts  ── questions from patterns ──┤   OUT/held_out.jsonl   1 of 20 rows, by the hash of the id
//! articles   ── questions from patterns ──┘
//! everything ── text alone ───────────────▶   OUT/texts.jsonl      for the base model
//! ```
//!
//! Usage: `cargo run --release --example synthesizer_rows -- OUT FILE…`, each file a JSON Lines file with
//! rows `{id, context, pairs, licence}`, `{id, title, abstract}` or `{id, title, text}`, plain or
//! compressed. Rows that may not be redistributed (`research`, `NC`, `ND`, unknown `PMC OA`) and those in
//! other languages than English are left out.

mod questions;

use anyhow::{Context, Result};
use headwater::format::lines::Lines;
use headwater::seed;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Words of the longest text a row may have; longer ones are cut at a paragraph or sentence.
const WORDS_MAX: usize = 700;
/// Pairs of a row made from patterns.
const PAIRS_MAX: usize = 6;

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let out = arguments.next().context("usage: synthesizer_rows OUT FILE…")?;
    std::fs::create_dir_all(&out)?;
    let create =
        |name: &str| -> Result<_> { Ok(BufWriter::new(std::fs::File::create(out.join(name))?)) };
    let (mut tune, mut held_out) = (create("tune.jsonl")?, create("held_out.jsonl")?);
    let mut texts = create("texts.jsonl")?;
    let mut counts: BTreeMap<String, [u64; 3]> = BTreeMap::new();
    for path in arguments {
        for row in rows(&path)? {
            let row = row?;
            if !is_usable(&row) {
                continue;
            }
            let id = row["id"].as_str().context("a row has no id")?.to_owned();
            let kept_back = seed::stream(0, &id, "held out").below(20) == 0;
            for lesson in lessons(&row, &id) {
                let count = counts.entry(lesson["dataset"].as_str().unwrap_or("").to_owned());
                let count = count.or_default();
                count[0] += 1;
                count[1] += lesson["pairs"].as_array().map_or(0, |pairs| pairs.len() as u64);
                count[2] += u64::from(kept_back);
                let with_pairs = lesson["pairs"].as_array().is_some_and(|pairs| !pairs.is_empty());
                match (kept_back, with_pairs) {
                    (true, true) => writeln!(held_out, "{lesson}")?,
                    (true, false) => {}
                    (false, true) => writeln!(tune, "{lesson}")?,
                    (false, false) => writeln!(texts, "{lesson}")?,
                }
            }
        }
    }
    for (dataset, [rows, pairs, held_out]) in counts {
        println!("{dataset}: {rows} rows, {pairs} pairs, {held_out} held out");
    }
    Ok(())
}

fn rows(path: &Path) -> Result<impl Iterator<Item = Result<Value>>> {
    let name = path.display().to_string();
    Ok(Lines::open(path)?.map(move |line| {
        let (text, place) = line.map_err(|bad| anyhow::anyhow!("{name}: {}", bad.reason))?;
        serde_json::from_str(&text).with_context(|| place.to_string())
    }))
}

fn is_usable(row: &Value) -> bool {
    let licence = row["licence"].as_str().unwrap_or("");
    let english = !row["dataset"].as_str().unwrap_or("").starts_with("xquad-");
    english && !["research", "NC", "-ND", "PMC OA"].iter().any(|word| licence.contains(word))
}

/// The lessons in one row: with pairs where there are some, else the text alone.
fn lessons(row: &Value, id: &str) -> Vec<Value> {
    if let Some(context) = row["context"].as_str() {
        return vec![task(row, id, context)];
    }
    let title = row["title"].as_str().unwrap_or("").trim();
    let (kind, body) = match (row["abstract"].as_str(), row["text"].as_str()) {
        (Some(text), _) => ("abstract", text),
        (None, Some(text)) => ("article", text),
        (None, None) => return Vec::new(),
    };
    // As the readers write it: title, blank line, text.
    let whole = if title.is_empty() { body.to_owned() } else { format!("{title}\n\n{body}") };
    pieces(&whole)
        .into_iter()
        .enumerate()
        .map(|(index, text)| {
            let id = format!("{id}#{index}");
            let pairs = questions::ask(&text, kind, &id, PAIRS_MAX);
            lesson(&id, &format!("{kind}-patterns"), &text, &pairs)
        })
        .collect()
}

fn task(row: &Value, id: &str, context: &str) -> Value {
    let pairs = row["pairs"].as_array().into_iter().flatten();
    let pairs: Vec<(String, String)> = pairs
        .filter_map(|pair| {
            let (question, answer) = (pair["instruction"].as_str()?, pair["response"].as_str()?);
            questions::with_options(question.trim(), answer.trim())
        })
        .collect();
    lesson(id, row["dataset"].as_str().unwrap_or("tasks"), context.trim(), &pairs)
}

fn lesson(id: &str, dataset: &str, text: &str, pairs: &[(String, String)]) -> Value {
    let pairs: Vec<Value> = pairs
        .iter()
        .map(|(question, answer)| json!({ "question": question, "answer": answer }))
        .collect();
    json!({ "id": id, "dataset": dataset, "text": text, "pairs": pairs })
}

/// The text in pieces of at most [`WORDS_MAX`] words, cut between paragraphs.
fn pieces(text: &str) -> Vec<String> {
    let (mut pieces, mut piece, mut words) = (Vec::new(), String::new(), 0);
    for paragraph in text.split_inclusive('\n') {
        let count = paragraph.split_whitespace().count();
        if words > 0 && words + count > WORDS_MAX {
            pieces.push(std::mem::take(&mut piece));
            words = 0;
        }
        piece.push_str(paragraph);
        words += count;
    }
    pieces.push(piece);
    pieces.retain_mut(|piece| {
        *piece = piece.trim().to_owned();
        (10..=2 * WORDS_MAX).contains(&piece.split_whitespace().count())
    });
    pieces
}
