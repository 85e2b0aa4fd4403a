//! Newswire in SGML, as the Reuters-21578 collection is distributed: one `<REUTERS>` element a story.
//!
//! A document is the headline, a blank line, and the story, a paragraph a line: the wire's hard line breaks
//! and its sign-off are taken out. Stories without a body, mere headlines, are rejected.

use super::documents::Found;
use super::fragments::{Fragment, Fragments, Records};
use super::input::{self, Counter};
use crate::error::Result;
use crate::record::{Document, Rejected, excerpt};
use std::collections::BTreeMap;
use std::path::Path;

/// Stories. The collection is older than UTF-8.
const RECORDS: Records = Records { elements: &["REUTERS"], latin: true };

/// The documents of a file.
///
/// # Errors
/// If the file cannot be opened.
pub fn read(
    path: &Path,
    source: String,
    counter: Counter,
) -> Result<impl Iterator<Item = Found> + use<>> {
    let reader = input::open_counted(path, counter)?;
    let fragments = Fragments::new(RECORDS, reader, path.display().to_string());
    Ok(fragments.map(move |fragment| match fragment {
        Ok(fragment) => parse(&fragment, &source),
        Err(rejected) => Found::Rejected(rejected),
    }))
}

fn parse(fragment: &Fragment, source: &str) -> Found {
    let Fragment { text: story, place } = fragment;
    let id = attribute(story, "NEWID").map(|id| format!("reuters:{id}"));
    let (Some(id), Some(text)) = (id.clone(), text(story)) else {
        let reason = if id.is_none() { "no_id" } else { "no_text" };
        let mut rejected = Rejected::unread(reason, "", place.clone(), &excerpt(story));
        rejected.ids.extend(id);
        return Found::Rejected(Box::new(rejected));
    };
    let mut metadata = BTreeMap::new();
    for (name, value) in [
        ("title", element(story, "TITLE").map(one_line)),
        ("date", element(story, "DATE").map(one_line)),
        ("topics", element(story, "TOPICS").map(list)),
        ("places", element(story, "PLACES").map(list)),
    ] {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            metadata.insert(name.to_owned(), value);
        }
    }
    let (source, place) = (source.to_owned(), place.clone());
    Found::Document(Box::new(Document { id, source, text, metadata, place, ..Document::default() }))
}

/// Headline, blank line, dateline and body; none if there is no body.
fn text(story: &str) -> Option<String> {
    let title = element(story, "TITLE").map(one_line).unwrap_or_default();
    let text = element(story, "TEXT")?;
    let body = match element(text, "BODY") {
        Some(body) => {
            let dateline = element(text, "DATELINE").map(one_line).unwrap_or_default();
            let gap = if dateline.is_empty() { "" } else { " " };
            format!("{dateline}{gap}{}", paragraphs(body))
        }
        None if text.contains("<TITLE>") => return None, // a brief: a headline and nothing else
        None => paragraphs(text),                        // unprocessed: the wire as it came
    };
    match (title.is_empty(), body.trim().is_empty()) {
        (_, true) => None,
        (true, false) => Some(body),
        (false, false) => Some(format!("{title}\n\n{body}")),
    }
}

/// The paragraphs of a body, one a line. On the wire a paragraph starts with an indented line, and the last
/// line is the agency's name.
fn paragraphs(body: &str) -> String {
    let body = plain(body);
    let mut lines: Vec<&str> = body.lines().filter(|line| !line.trim().is_empty()).collect();
    lines.pop_if(|line| line.trim().eq_ignore_ascii_case("reuter"));
    let mut paragraphs: Vec<String> = Vec::new();
    for line in lines {
        match paragraphs.last_mut() {
            Some(paragraph) if !line.starts_with("    ") => {
                paragraph.push(' ');
                paragraph.push_str(&unwrap(line));
            }
            _ => paragraphs.push(unwrap(line)),
        }
    }
    paragraphs.join("\n")
}

/// Text in one line.
fn unwrap(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Marked-up text in one line.
fn one_line(text: &str) -> String {
    unwrap(&plain(text))
}

/// The items of a list: `<D>a</D><D>b</D>`.
fn list(text: &str) -> String {
    let items: Vec<&str> = text.split("<D>").filter_map(|item| item.split("</D>").next()).collect();
    items.into_iter().filter(|item| !item.trim().is_empty()).collect::<Vec<_>>().join(" ")
}

/// What stands between the first start tag of that name and its end tag.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut from = 0;
    loop {
        let at = from + text[from..].find(&format!("<{name}"))? + 1 + name.len();
        let rest = &text[at..];
        if rest.starts_with(['>', ' ', '\n', '\r', '\t']) {
            let start = at + rest.find('>')? + 1;
            let end = start + text[start..].find(&format!("</{name}>"))?;
            return Some(&text[start..end]);
        }
        from = at;
    }
}

/// An attribute of the first tag.
fn attribute<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let tag = &text[..text.find('>')?];
    let at = tag.find(&format!(" {name}=\""))? + name.len() + 3;
    let value = &tag[at..];
    Some(&value[..value.find('"')?])
}

/// Text with its references resolved, without the control characters of the wire.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        plain.push_str(&rest[..at]);
        let reference =
            rest[at..].find(';').filter(|end| *end <= 10).map(|end| &rest[at + 1..at + end]);
        let resolved = reference.and_then(resolve);
        let length = match (reference, resolved) {
            (Some(reference), Some(character)) => {
                plain.push(character);
                reference.len() + 2
            }
            _ => {
                plain.push('&');
                1
            }
        };
        rest = &rest[at + length..];
    }
    plain.push_str(rest);
    plain.retain(|character| !character.is_control() || character == '\n');
    plain
}

fn resolve(reference: &str) -> Option<char> {
    match reference {
        "lt" => Some('<'),
        "gt" => Some('>'),
        "amp" => Some('&'),
        "quot" => Some('"'),
        "apos" => Some('\''),
        number => char::from_u32(number.strip_prefix('#')?.parse().ok()?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Documents as `id text`, rejections as `reason!`.
    fn check(sgml: &[u8], expected: &[&str]) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sgm");
        std::fs::write(&path, sgml).unwrap();
        let found: Vec<String> = read(&path, "s".into(), Counter::default())
            .unwrap()
            .map(|found| match found {
                Found::Document(document) => format!("{} {}", document.id, document.text),
                Found::Rejected(rejected) => format!("{}!", rejected.reason),
                Found::Withdrawn { .. } => unreachable!(),
            })
            .collect();
        assert_eq!(found, expected);
    }

    fn story(id: u32, text: &str) -> String {
        format!(
            "<REUTERS TOPICS=\"YES\" OLDID=\"9\" NEWID=\"{id}\">\n<DATE>26-FEB-1987</DATE>\n\
             <TOPICS><D>cocoa</D><D>tea</D></TOPICS>\n{text}\n</REUTERS>\n"
        )
    }

    #[test]
    fn a_story_is_headline_dateline_and_paragraphs() {
        let text = "<TEXT>&#2;\n<TITLE>COCOA &lt;CCA> UP</TITLE>\n<DATELINE>    BAHIA, Feb 26 - \
                    </DATELINE><BODY>Showers went\non &amp; on.\n    Prices rose.\n Reuter\n&#3;</BODY></TEXT>";
        let head = "<!DOCTYPE lewis SYSTEM \"lewis.dtd\">\n";
        check(
            format!("{head}{}", story(1, text)).as_bytes(),
            &["reuters:1 COCOA <CCA> UP\n\nBAHIA, Feb 26 - Showers went on & on.\nPrices rose."],
        );
    }

    #[test]
    fn a_headline_alone_is_no_document_and_an_unprocessed_story_is_one() {
        let brief =
            story(1, "<TEXT TYPE=\"BRIEF\">&#2;\n<TITLE>GOLD UP</TITLE>Reuter\n&#3;</TEXT>");
        let raw =
            story(2, "<TEXT TYPE=\"UNPROC\">&#2;\nGM SEES\n    Fry said so.\n Reuter\n&#3;</TEXT>");
        check(
            format!("{brief}{raw}<REUTERS><TEXT>x</TEXT></REUTERS>").as_bytes(),
            &["no_text!", "reuters:2 GM SEES\nFry said so.", "no_id!"],
        );
    }

    #[test]
    fn bytes_of_another_time_are_latin() {
        let sgml = story(1, "<TEXT><BODY>M?nchen.</BODY></TEXT>").into_bytes();
        let sgml: Vec<u8> = sgml.into_iter().map(|b| if b == b'?' { 0xfc } else { b }).collect();
        check(&sgml, &["reuters:1 München."]);
    }

    #[test]
    fn references_are_resolved_and_others_left() {
        assert_eq!(plain("a &lt;b&gt; &#65; AT&T & &unknown; &#5;."), "a <b> A AT&T & &unknown; .");
    }

    #[test]
    fn metadata_has_topics_and_date() {
        let fragment = Fragment {
            text: story(3, "<TEXT><TITLE>T</TITLE><BODY>b</BODY></TEXT>"),
            place: crate::record::Place::default(),
        };
        let Found::Document(document) = parse(&fragment, "s") else { panic!("a document") };
        let metadata: Vec<_> =
            document.metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(metadata, [("date", "26-FEB-1987"), ("title", "T"), ("topics", "cocoa tea")]);
    }
}
