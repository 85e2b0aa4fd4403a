//! Bad input: the run goes on, everything is accounted for, and what is rejected says where and why.

use crossbeam_channel::Receiver;
use flate2::Compression;
use flate2::write::GzEncoder;
use headwater::augment::Augmented;
use headwater::manifest::Manifest;
use headwater::record::{Finish, Rejected};
use headwater::run::RunFolder;
use headwater::synthesizer::{Job, Queue, scripted};
use headwater_pipelines::instruct;
use headwater_pipelines::shell::parts::Parts;
use headwater_pipelines::shell::plan::Plan;
use headwater_pipelines::shell::running::execute;
use headwater_pipelines::shell::settings::Settings;
use headwater_tests::settings::{Small, small};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

const ONE_PAIR: &str = "<QUE> What? <ANS> That. </END>";

/// A run over some files; every text gets one pair.
struct Ran {
    folder: RunFolder,
    manifest: Manifest,
    documents: Vec<Augmented>,
    rejected: Vec<Rejected>,
}

fn run(place: &Path, files: &[(&str, Vec<u8>)]) -> Ran {
    let input = place.join("input");
    std::fs::create_dir_all(&input).unwrap();
    for (name, bytes) in files {
        std::fs::write(input.join(name), bytes).unwrap();
    }
    let settings = small(Small {
        input: vec![input],
        general: Vec::new(),
        out: &place.join("run"),
        workers: 2,
        lanes: 1,
        rounds: 2,
        epoch_documents: 4,
        seed: 1,
        flags: &[],
    });
    let plan = Plan::new(&settings).unwrap();
    let (queue, jobs) = Queue::new(8);
    say_one_pair(jobs, &settings);
    let parts = Arc::new(Parts::around(&settings, &plan, queue, None).unwrap());
    execute(settings.engine.workers, parts, instruct::dataflow).unwrap();
    let folder = RunFolder::existing(&settings.out).unwrap();
    let manifest = folder.manifest().unwrap();
    let (mut documents, mut rejected) = (Vec::new(), Vec::new());
    for epoch in &manifest.epochs {
        documents.extend(folder.augmented(epoch).unwrap());
        rejected.extend(folder.rejected(epoch).unwrap());
    }
    Ran { folder, manifest, documents, rejected }
}

fn say_one_pair(jobs: Receiver<Job>, settings: &Settings) {
    let tokens = settings.synthesizer.tokenizer.encode(ONE_PAIR);
    scripted(jobs, 1, move |_| (tokens.clone(), Finish::Stop));
}

impl Ran {
    fn get(&self, name: &str) -> u64 {
        self.manifest.ledger().get(name)
    }

    /// Everything adds up, and this many records became documents or were rejected.
    fn check(&self, documents: u64, rejected: &[(&str, &str)]) {
        let ledger = self.manifest.account(0, 0);
        assert_eq!(ledger.unknown(), 0, "{ledger:?}");
        assert_eq!(self.get("read/documents"), documents, "{ledger:?}");
        let reasons: Vec<(&str, &str)> = self
            .rejected
            .iter()
            .map(|one| (one.reason.as_str(), one.place.file.rsplit('/').next().unwrap()))
            .collect();
        let mut expected = rejected.to_vec();
        expected.sort_unstable();
        let mut found = reasons;
        found.sort_unstable();
        assert_eq!(found, expected, "{:#?}", self.rejected);
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn lines(range: std::ops::Range<usize>) -> String {
    range.map(|i| format!("{{\"id\":\"d{i}\",\"text\":\"Text number {i} is here.\"}}\n")).collect()
}

#[test]
fn a_truncated_gzip_file_gives_what_can_be_read() {
    let place = tempfile::tempdir().unwrap();
    let noise: String = (0..20_000)
        .map(|i| format!("{{\"id\":\"n{i}\",\"text\":\"{:x}\"}}\n", i * 2_654_435_761_usize))
        .collect();
    let mut bytes = gzip(noise.as_bytes());
    bytes.truncate(bytes.len() / 50);
    let ran = run(place.path(), &[("a.jsonl.gz", bytes), ("b.jsonl", lines(0..3).into_bytes())]);
    let documents = ran.get("read/documents");
    assert!(documents > 100 && documents < 2000, "{documents}");
    assert_eq!(ran.rejected.len(), 1, "{:#?}", ran.rejected);
    let rejected = &ran.rejected[0];
    assert!(rejected.place.file.ends_with("a.jsonl.gz"), "{rejected:?}");
    assert_eq!(rejected.place.record, documents - 3 + 1);
    assert!(rejected.place.byte > 0 && !rejected.detail.is_empty(), "{rejected:?}");
    assert_eq!(ran.manifest.account(0, 0).unknown(), 0);
}

#[test]
fn invalid_utf8_costs_its_own_record_only() {
    let place = tempfile::tempdir().unwrap();
    let mut bytes = lines(0..2).into_bytes();
    let byte = bytes.len() as u64;
    bytes.extend(b"{\"id\":\"x\",\"text\":\"caf\xe9\"}\n");
    bytes.extend(lines(2..4).into_bytes());
    let ran = run(place.path(), &[("a.jsonl", bytes)]);
    ran.check(4, &[("invalid_utf8", "a.jsonl")]);
    assert_eq!((ran.rejected[0].place.record, ran.rejected[0].place.byte), (3, byte));
}

#[test]
fn wrong_types_and_missing_fields_are_named() {
    let place = tempfile::tempdir().unwrap();
    let text = [
        r#"{"id":"a","text":17}"#,
        r#"{"id":["b"],"text":"The id is a list."}"#,
        r#"["not","an","object"]"#,
        r#"{"id":"d"}"#,
        r#"{"id":"e","text":"This one is good."}"#,
        r#"{"id":"f","text":"cut"#,
        r#"{"id":"g","text":null}"#,
        "",
    ]
    .join("\n");
    let ran = run(place.path(), &[("a.jsonl", text.into_bytes())]);
    ran.check(
        2,
        &[
            ("wrong_type", "a.jsonl"),
            ("wrong_type", "a.jsonl"),
            ("not_an_object", "a.jsonl"),
            ("no_text", "a.jsonl"),
            ("malformed_json", "a.jsonl"),
            ("empty_text", "a.jsonl"), // null is no text
        ],
    );
    let mut records: Vec<u64> = ran.rejected.iter().map(|one| one.place.record).collect();
    records.sort_unstable();
    assert_eq!(records, [1, 2, 3, 4, 6, 7]);
    assert_eq!(ran.documents.len(), 1, "{:#?}", ran.documents);
}

#[test]
fn empty_documents_are_rejected_and_huge_ones_split() {
    let place = tempfile::tempdir().unwrap();
    let sentence = "Every sentence of this very long document is the same. ";
    let huge = sentence.repeat(10_000_000 / sentence.len());
    let text = [
        serde_json::json!({ "id": "empty", "text": "" }),
        serde_json::json!({ "id": "blank", "text": " \n\t " }),
        serde_json::json!({ "id": "huge", "text": huge }),
    ];
    let text: String = text.iter().map(|line| format!("{line}\n")).collect();
    let ran = run(place.path(), &[("a.jsonl", text.into_bytes())]);
    assert_eq!(ran.manifest.account(0, 0).unknown(), 0);
    assert_eq!(
        ran.documents.iter().filter(|d| d.source_ids == ["huge"]).count(),
        ran.documents.len()
    );
    let mut texts: Vec<_> = ran.documents.iter().flat_map(|d| &d.entries).collect();
    let number = |id: &str| -> u64 {
        id.chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap()
    };
    texts.sort_by_key(|entry| number(&entry.id));
    let whole: String = texts.iter().map(|entry| entry.text.as_str()).collect();
    assert!(whole == huge, "{} of {} bytes", whole.len(), huge.len());
    assert_eq!(ran.rejected.iter().filter(|r| r.reason.starts_with("empty")).count(), 2);
}

#[test]
fn markers_inside_documents_are_text() {
    let place = tempfile::tempdir().unwrap();
    let texts = [
        "Before <CON> inside </CON> after.",
        "Ends </END> early <QUE> Is this a question? <ANS> No. </END>",
        "<s> opens </s> and closes <s>[INST] not an instruction [/INST]",
        "Plain text.",
    ];
    let text: String = texts
        .iter()
        .enumerate()
        .map(|(i, text)| format!("{}\n", serde_json::json!({ "id": i.to_string(), "text": text })))
        .collect();
    let ran = run(place.path(), &[("a.jsonl", text.into_bytes())]);
    ran.check(4, &[]);
    assert_eq!(ran.get("admit/marker_in_text"), 3);
    assert_eq!(ran.get("parse/pairs"), 4);
    for document in &ran.documents {
        for entry in &document.entries {
            assert!(document.text.contains(&entry.text), "{document:#?}");
            assert_eq!(entry.pairs.len(), 1);
        }
    }
    // No id of the packed tokens is a control id but those that open and close items.
    let tokenizer = small_tokenizer(place.path());
    let control = [tokenizer.bos().unwrap(), tokenizer.eos().unwrap()];
    for epoch in &ran.manifest.epochs {
        for sequence in ran.folder.sequences(epoch).unwrap() {
            let marks = sequence.tokens.iter().filter(|id| control.contains(id)).count();
            let whole = sequence.segments.len();
            assert!(marks <= 2 * whole, "{marks} control ids in {whole} items");
        }
    }
}

fn small_tokenizer(place: &Path) -> headwater::tokenizer::Tokenizer {
    small(Small {
        input: vec![place.join("input")],
        general: Vec::new(),
        out: place,
        workers: 1,
        lanes: 1,
        rounds: 1,
        epoch_documents: 1,
        seed: 1,
        flags: &[],
    })
    .model
    .tokenizer
}

#[test]
fn damaged_xml_costs_its_own_article_only() {
    let place = tempfile::tempdir().unwrap();
    let article = |id: u32, text: &str| {
        format!(
            "<PubmedArticle><MedlineCitation><PMID>{id}</PMID><Article><ArticleTitle>Title {id}.\
             </ArticleTitle><Abstract><AbstractText>{text}</AbstractText></Abstract></Article>\
             </MedlineCitation></PubmedArticle>\n"
        )
    };
    let text = format!(
        "<?xml version=\"1.0\"?>\n<PubmedArticleSet>\n{}{}{}</PubmedArticleSet>\n",
        article(1, "A &lt; B &amp; so on."),
        article(2, "wrong <b>nesting</i> here"),
        article(3, "Good again."),
    );
    let ran = run(place.path(), &[("a.xml", text.into_bytes())]);
    assert_eq!(ran.manifest.account(0, 0).unknown(), 0);
    let ids: Vec<&str> =
        ran.documents.iter().flat_map(|d| &d.source_ids).map(String::as_str).collect();
    assert!(ids.contains(&"pmid:1") && ids.contains(&"pmid:3"), "{ids:?} {:#?}", ran.rejected);
    assert!(ran.rejected.iter().all(|r| r.place.record == 2), "{:#?}", ran.rejected);
}
