//! The Reuters-21578 newswire is read as an independent parser reads it. Skipped where the corpus is not at
//! hand.

use crate::data;
use headwater::format::documents::{Documents, Found, files};
use headwater::format::jsonl::Fields;
use std::collections::BTreeMap;
use std::path::Path;

/// The words of a story's body, without the sign-off: parsers differ in what they do about spaces.
fn words(text: &str) -> String {
    let mut words: Vec<&str> = text.split_whitespace().collect();
    words.pop_if(|word| word.eq_ignore_ascii_case("reuter"));
    words.join(" ")
}

fn documents(path: &Path) -> (BTreeMap<String, String>, BTreeMap<String, u64>) {
    let (files, _) = files(&[path.to_owned()]).unwrap();
    let (mut documents, mut rejected) = (BTreeMap::new(), BTreeMap::new());
    for found in Documents::new(files, "s", Fields::detected()) {
        match found {
            Found::Document(document) => drop(documents.insert(document.id, document.text)),
            Found::Rejected(reason) => *rejected.entry(reason.reason).or_default() += 1,
            Found::Withdrawn { .. } => unreachable!("newswire withdraws nothing"),
        }
    }
    (documents, rejected)
}

#[test]
fn every_story_of_the_reuters_collection_is_read() {
    let Some(data) = data().map(|data| data.join("financial")).filter(|path| path.is_dir()) else {
        return eprintln!("skipped: no test corpora");
    };
    let (mut found, rejected) = documents(&data.join("reuters21578"));
    found.retain(|id, _| id != data.to_str().unwrap()); // the README beside it
    let (expected, _) = documents(&data.join("reuters21578.jsonl.zst"));
    assert!(expected.len() > 16_000, "{} stories expected", expected.len());
    let mut missing = Vec::new();
    for (id, body) in &expected {
        let id = id.replace("reuters21578:", "reuters:");
        let story = found.remove(&id).map(|story| words(&story)).unwrap_or_default();
        if !story.ends_with(&words(body)) {
            missing.push((id, story, words(body)));
        }
    }
    assert!(missing.is_empty(), "{} stories differ: {:#?}", missing.len(), &missing[..1]);
    // What is left has no body of its own: unprocessed wire. Mere headlines are rejected.
    assert!(found.len() > 600, "{} unprocessed stories", found.len());
    let rejected: Vec<_> = rejected.into_iter().collect();
    assert!(
        matches!(rejected.as_slice(), [(reason, 1300..)] if reason == "no_text"),
        "{rejected:?}"
    );
}
