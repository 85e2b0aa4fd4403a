//! Reads one record of PubMed XML.

use quick_xml::escape::resolve_predefined_entity;
use quick_xml::events::{BytesRef, BytesStart, Event};
use quick_xml::{Reader, XmlVersion};

/// What a record says.
pub(super) enum Content {
    /// An article or a book chapter.
    Article(Box<Article>),
    /// Ids of articles that are withdrawn.
    Deleted(Vec<String>),
}

/// An article or a book chapter.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Article {
    pub(super) pmid: Option<String>,
    pub(super) version: Option<String>,
    pub(super) title: String,
    pub(super) vernacular_title: Option<String>,
    pub(super) languages: Vec<String>,
    pub(super) journal: Option<String>,
    pub(super) year: Option<String>,
    pub(super) publication_types: Vec<String>,
    /// Label and text of each section that is not blank.
    pub(super) sections: Vec<(Option<String>, String)>,
}

impl Article {
    /// Title, blank line, sections.
    pub(super) fn text(&self) -> String {
        let sections: Vec<String> = self
            .sections
            .iter()
            .map(|(label, text)| match label {
                Some(label) => format!("{label}: {text}"),
                None => text.clone(),
            })
            .collect();
        let sections = sections.join("\n");
        match self.title.is_empty() {
            true => sections,
            false => format!("{}\n\n{sections}", self.title),
        }
    }
}

/// Parses a record.
///
/// # Errors
/// Says what is malformed, and at which byte of the record.
pub(super) fn parse(xml: &str) -> Result<Content, String> {
    let mut reader = Reader::from_str(xml);
    let mut state = State::default();
    loop {
        let event = reader.read_event();
        let at = reader.error_position();
        match event.map_err(|error| format!("byte {at} of the record: {error}"))? {
            Event::Start(tag) => state.open(&tag)?,
            Event::Empty(tag) => {
                state.open(&tag)?;
                state.close();
            }
            Event::End(_) => state.close(),
            Event::Text(text) => state.text(&text.xml10_content()),
            Event::CData(text) => state.text(&text.xml10_content()),
            Event::GeneralRef(reference) => state.text(&resolve(&reference)),
            Event::Eof => break,
            Event::Comment(_) | Event::Decl(_) | Event::PI(_) | Event::DocType(_) => {}
        }
    }
    match state.path.is_empty() {
        true if state.is_deletion => Ok(Content::Deleted(state.deleted)),
        true => Ok(Content::Article(Box::new(state.article))),
        false => Err(format!("element {:?} is not closed", state.path.join("/"))),
    }
}

/// A character or entity reference as text; one that is not known stays as it is written.
fn resolve(reference: &BytesRef<'_>) -> String {
    if let Ok(Some(character)) = reference.resolve_char_ref() {
        return character.to_string();
    }
    match resolve_predefined_entity(reference) {
        Some(text) => text.to_owned(),
        None => format!("&{};", &**reference),
    }
}

#[derive(Default)]
struct State {
    path: Vec<String>,
    /// Text of the innermost element that is wanted, and the depth at which it opened.
    wanted: Option<(Wanted, usize, String)>,
    is_deletion: bool,
    deleted: Vec<String>,
    label: Option<String>,
    article: Article,
}

#[derive(Clone, Copy)]
enum Wanted {
    Pmid,
    Deleted,
    Title,
    VernacularTitle,
    Language,
    Journal,
    Year,
    PublicationType,
    Section,
}

impl State {
    fn open(&mut self, tag: &BytesStart<'_>) -> Result<(), String> {
        let name = tag.local_name().into_inner().to_owned();
        self.is_deletion |= self.path.is_empty() && name.starts_with("Delete");
        self.path.push(name);
        if self.wanted.is_some() {
            return Ok(()); // markup inside: its text belongs to what is being read
        }
        let wanted = {
            let names: Vec<&str> = self.path.iter().rev().map(String::as_str).collect();
            match names.as_slice() {
                ["PMID", "MedlineCitation" | "BookDocument", ..] => Wanted::Pmid,
                ["PMID", "DeleteCitation" | "DeleteDocument"] => Wanted::Deleted,
                ["ArticleTitle", "Article" | "BookDocument", ..] => Wanted::Title,
                ["VernacularTitle", "Article" | "BookDocument", ..] => Wanted::VernacularTitle,
                ["Language", "Article" | "BookDocument", ..] => Wanted::Language,
                ["Title", "Journal", ..] | ["BookTitle", "Book", ..] => Wanted::Journal,
                ["Year" | "MedlineDate", "PubDate", "JournalIssue" | "Book", ..] => Wanted::Year,
                ["PublicationType", ..] => Wanted::PublicationType,
                ["AbstractText", "Abstract", ..] => Wanted::Section,
                _ => return Ok(()),
            }
        };
        let attribute = |name: &str| -> Result<Option<String>, String> {
            let found = tag.try_get_attribute(name).map_err(|error| error.to_string())?;
            let value = found.map(|found| {
                found.normalized_value(XmlVersion::Implicit1_0).map_err(|error| error.to_string())
            });
            Ok(value.transpose()?.map(std::borrow::Cow::into_owned))
        };
        match wanted {
            Wanted::Pmid => self.article.version = attribute("Version")?,
            Wanted::Section => {
                self.label = attribute("Label")?.map(|label| squeeze(&label));
            }
            _ => {}
        }
        self.wanted = Some((wanted, self.path.len(), String::new()));
        Ok(())
    }

    fn text(&mut self, text: &str) {
        if let Some((_, _, content)) = &mut self.wanted {
            content.push_str(text);
        }
    }

    fn close(&mut self) {
        let depth = self.path.len();
        self.path.pop();
        let Some((wanted, _, content)) = self.wanted.take_if(|(_, opened, _)| *opened == depth)
        else {
            return;
        };
        let content = squeeze(&content);
        if content.is_empty() {
            return;
        }
        let article = &mut self.article;
        match wanted {
            Wanted::Pmid => article.pmid = Some(content),
            Wanted::Deleted => self.deleted.push(content),
            Wanted::Title => article.title = content,
            Wanted::VernacularTitle => article.vernacular_title = Some(content),
            Wanted::Language => article.languages.push(content),
            Wanted::Journal => article.journal = Some(content),
            Wanted::Year => article.year = Some(content.chars().take(4).collect()),
            Wanted::PublicationType => article.publication_types.push(content),
            Wanted::Section => {
                let label = self.label.take().filter(|label| !label.is_empty());
                article.sections.push((label, content));
            }
        }
    }
}

/// Runs of white space become one space, none at the ends.
fn squeeze(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
