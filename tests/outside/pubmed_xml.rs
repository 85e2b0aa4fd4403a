//! Genuine PubMed XML is read as an independent parser reads it. Skipped where the corpus is not at hand.

use crate::data;
use headwater::format::documents::{Documents, Found};
use headwater::format::jsonl::Fields;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::Path;

/// What the reader and the other parser say of one article, in the same words.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    documents: BTreeMap<String, String>,
    without_abstract: Vec<String>,
    withdrawn: Vec<String>,
}

fn squeezed(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn expected(rows: &[Value]) -> Seen {
    let mut seen = Seen::default();
    for row in rows {
        if row["kind"] == "DeleteCitation" {
            let pmids = row["pmids"].as_array().unwrap();
            seen.withdrawn
                .extend(pmids.iter().map(|pmid| format!("pmid:{}", pmid.as_str().unwrap())));
            continue;
        }
        let Some(pmid) = row["pmid"].as_str() else { continue };
        let id = format!("pmid:{pmid}");
        let sections = row["abstract"].as_array().unwrap().iter().filter_map(|section| {
            let text = section["text"].as_str().filter(|text| !text.is_empty())?;
            Some(match section["label"].as_str() {
                Some(label) if !label.is_empty() => format!("{label}: {text}"),
                _ => text.to_owned(),
            })
        });
        let sections: Vec<String> = sections.collect();
        if sections.is_empty() {
            seen.without_abstract.push(id);
        } else {
            let title = row["title"].as_str().unwrap_or_default();
            let text = format!("{title} {}", sections.join(" "));
            seen.documents.insert(id, squeezed(&text));
        }
    }
    seen
}

fn found(path: &Path) -> (Seen, Vec<String>) {
    let mut seen = Seen::default();
    let mut others = Vec::new();
    let fields = Fields { id: "id".into(), text: Vec::new() };
    for found in Documents::new(vec![path.to_owned()], "pubmed", fields) {
        match found {
            Found::Document(document) => {
                seen.documents.insert(document.id, squeezed(&document.text));
            }
            Found::Withdrawn { id, .. } => seen.withdrawn.push(id),
            Found::Rejected(rejected) if rejected.reason == "no_abstract" => {
                seen.without_abstract.extend(rejected.ids);
            }
            Found::Rejected(rejected) => others.push(format!("{rejected:?}")),
        }
    }
    (seen, others)
}

#[test]
fn genuine_files_are_read_as_an_independent_parser_reads_them() {
    let Some(data) = data() else {
        println!("skipped: no test corpora; set HEADWATER_DATA to their folder");
        return;
    };
    let folder = data.join("pubmed_xml");
    let rows = std::fs::File::open(folder.join("expected.jsonl.zst")).unwrap();
    let rows = std::io::BufReader::new(zstd::Decoder::new(rows).unwrap());
    let mut by_file: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for line in rows.lines() {
        let row: Value = serde_json::from_str(&line.unwrap()).unwrap();
        by_file.entry(row["file"].as_str().unwrap().to_owned()).or_default().push(row);
    }
    assert!(by_file.len() > 30);
    let mut articles = 0;
    for (file, rows) in &by_file {
        let (found, others) = found(&folder.join(file));
        let expected = expected(rows);
        articles += expected.documents.len();
        for (id, text) in &expected.documents {
            assert_eq!(found.documents.get(id), Some(text), "{file}: {id} {others:?}");
        }
        assert_eq!(found, expected, "{file}: {others:?}");
    }
    assert!(articles > 700, "{articles}");
}

#[test]
fn a_file_that_is_not_well_formed_gives_what_can_be_read() {
    let Some(data) = data() else {
        println!("skipped: no test corpora; set HEADWATER_DATA to their folder");
        return;
    };
    let (_, others) = found(&data.join("pubmed_xml/jmjamison__output.xml.gz"));
    assert!(!others.is_empty(), "it is damaged, and that is said");
}
