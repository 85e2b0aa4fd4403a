//! PubMed XML, as NLM distributes it: baseline files, update files, and what its services return.
//!
//! ```text
//! bytes ─▶ fragments: one article, book or list of deletions each ─▶ parsed alone ─▶ documents
//! ```
//!
//! The stream is cut into fragments before anything is parsed, so that a malformed article costs that
//! article and memory stays flat on a file of any size.

mod article;

use super::documents::Found;
use super::fragments::{Fragment, Fragments, Records};
use super::input::{self, Counter};
use crate::error::Result;
use crate::record::{Document, Place, Rejected, excerpt};
use article::{Article, Content};
use std::collections::VecDeque;
use std::path::Path;

/// Articles, books, and lists of deletions.
const RECORDS: Records = Records {
    elements: &["PubmedArticle", "PubmedBookArticle", "DeleteCitation", "DeleteDocument"],
    latin: false,
};

/// The documents of a file. A document is a title, a blank line, and the abstract, a section a line.
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
    Ok(Reader { fragments, source, found: VecDeque::new() })
}

struct Reader {
    fragments: Fragments,
    source: String,
    found: VecDeque<Found>,
}

impl Iterator for Reader {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        while self.found.is_empty() {
            let found = match self.fragments.next()? {
                Ok(fragment) => self.parse(&fragment),
                Err(rejected) => vec![Found::Rejected(rejected)],
            };
            self.found.extend(found);
        }
        self.found.pop_front()
    }
}

impl Reader {
    fn parse(&self, fragment: &Fragment) -> Vec<Found> {
        let place = fragment.place.clone();
        let reject = |reason: &str, detail: String, ids: Vec<String>, place: Place| {
            let rejected = Rejected {
                ids,
                ..Rejected::unread(reason, detail, place, &excerpt(&fragment.text))
            };
            vec![Found::Rejected(Box::new(rejected))]
        };
        match article::parse(&fragment.text) {
            Err(detail) => reject("malformed_xml", detail, Vec::new(), place),
            Ok(Content::Deleted(pmids)) => pmids
                .into_iter()
                .map(|pmid| Found::Withdrawn { id: format!("pmid:{pmid}"), place: place.clone() })
                .collect(),
            Ok(Content::Article(article)) => {
                let id = article.pmid.as_ref().map(|pmid| format!("pmid:{pmid}"));
                match (id, article.sections.is_empty()) {
                    (None, _) => reject("no_id", "no PMID".into(), Vec::new(), place),
                    (Some(id), true) => reject("no_abstract", String::new(), vec![id], place),
                    (Some(id), false) => {
                        vec![Found::Document(Box::new(self.document(id, *article, place)))]
                    }
                }
            }
        }
    }

    fn document(&self, id: String, article: Article, place: Place) -> Document {
        let mut metadata = std::collections::BTreeMap::new();
        let mut note = |name: &str, value: Option<String>| {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                metadata.insert(name.to_owned(), value);
            }
        };
        let text = article.text();
        note("title", Some(article.title));
        note("version", article.version.filter(|version| version != "1"));
        note("vernacular_title", article.vernacular_title);
        note("language", Some(article.languages.join(" ")));
        note("journal", article.journal);
        note("year", article.year);
        note("publication_types", Some(article.publication_types.join("; ")));
        Document { id, source: self.source.clone(), text, metadata, place, ..Document::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Documents as `id text`, rejections as `reason!`, withdrawals as `-id`.
    fn check(xml: &str, expected: &[&str]) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.xml");
        std::fs::write(&path, xml).unwrap();
        let found: Vec<String> = read(&path, "s".into(), Counter::default())
            .unwrap()
            .map(|found| match found {
                Found::Document(document) => format!("{} {}", document.id, document.text),
                Found::Rejected(rejected) => format!("{}!", rejected.reason),
                Found::Withdrawn { id, .. } => format!("-{id}"),
            })
            .collect();
        assert_eq!(found, expected);
    }

    fn article(pmid: u32, title: &str, text: &str) -> String {
        format!(
            "<PubmedArticle><MedlineCitation><PMID Version=\"1\">{pmid}</PMID><Article>\
             <ArticleTitle>{title}</ArticleTitle><Abstract>{text}</Abstract></Article>\
             </MedlineCitation></PubmedArticle>"
        )
    }

    #[test]
    fn sections_are_lines_and_markup_is_text() {
        let xml = article(
            7,
            "A <i>title</i> &amp; more",
            "<AbstractText Label=\"AIM\">To   test p &lt; 0.05.</AbstractText>\n\
             <AbstractText>CO<sub>2</sub> &#946; <mml:math><mml:mi>x</mml:mi></mml:math></AbstractText>",
        );
        let text = "A title & more\n\nAIM: To test p < 0.05.\nCO2 β x";
        check(&format!("<PubmedArticleSet>{xml}</PubmedArticleSet>"), &[&format!("pmid:7 {text}")]);
    }

    #[test]
    fn an_article_without_an_abstract_is_rejected() {
        check(&article(7, "T", ""), &["no_abstract!"]);
        check(&article(7, "T", "<AbstractText> </AbstractText>"), &["no_abstract!"]);
    }

    #[test]
    fn a_malformed_article_costs_that_article() {
        let good = |pmid| article(pmid, "T", "<AbstractText>a</AbstractText>");
        let bad = good(2).replace("</Abstract>", "</Abstrac>");
        check(
            &[good(1), bad, good(3)].concat(),
            &["pmid:1 T\n\na", "malformed_xml!", "pmid:3 T\n\na"],
        );
    }

    #[test]
    fn deletions_are_withdrawals() {
        check(
            "<DeleteCitation><PMID Version=\"1\">5</PMID><PMID>6</PMID></DeleteCitation>",
            &["-pmid:5", "-pmid:6"],
        );
    }

    #[test]
    fn an_article_that_breaks_off_is_rejected_by_name() {
        let good = article(1, "T", "<AbstractText>a</AbstractText>");
        check(&format!("{good}{}", &good[..90]), &["pmid:1 T\n\na", "truncated_record!"]);
        check(&format!("{}{good}", &good[..90]), &["truncated_record!", "pmid:1 T\n\na"]);
    }

    #[test]
    fn only_the_id_of_the_article_itself_counts() {
        let xml = article(7, "T", "<AbstractText>a</AbstractText>").replace(
            "</MedlineCitation>",
            "<CommentsCorrectionsList><CommentsCorrections><PMID>9</PMID></CommentsCorrections>\
             </CommentsCorrectionsList><OtherAbstract><AbstractText>b</AbstractText>\
             </OtherAbstract></MedlineCitation>",
        );
        check(&xml, &["pmid:7 T\n\na"]);
    }
}
