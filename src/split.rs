//! Cuts documents that are too long for the synthesizer into pieces, losing no byte.
//!
//! A piece ends behind a paragraph where there is one in its second half, else behind a sentence, else
//! between two tokens. The pieces together are the document. As a *window*, only the first piece is shown to
//! the synthesizer, and the document stays whole.

use crate::prompt::PromptWriter;
use crate::record::{Document, Part, Treatment};
use std::ops::Range;

/// The pieces of a document that each fit into a prompt of `tokens_max` tokens, or the document itself.
pub fn split(mut document: Document, writer: &PromptWriter, tokens_max: usize) -> Vec<Document> {
    let Some(pieces) = pieces(&document.text, writer, tokens_max) else {
        return vec![document];
    };
    let ranges: Vec<Range<usize>> = pieces.collect();
    let count = ranges.len() as u32;
    let text = std::mem::take(&mut document.text);
    let piece = |(index, range): (usize, Range<usize>)| Document {
        id: format!("{}#{index}", document.id),
        text: text[range].to_owned(),
        part: Some(Part { of: document.id.clone(), index: index as u32, count }),
        ..document.clone()
    };
    ranges.into_iter().enumerate().map(piece).collect()
}

/// The document, of which the synthesizer is to see no more than its first piece.
pub fn window(document: Document, writer: &PromptWriter, tokens_max: usize) -> Document {
    let Some(mut pieces) = pieces(&document.text, writer, tokens_max) else {
        return document;
    };
    let bytes = pieces.next().map_or(0, |range| range.end) as u32;
    drop(pieces);
    Document { treatment: Treatment::Window(bytes), ..document }
}

/// The pieces of a text; none if it fits as it is.
fn pieces(
    text: &str,
    writer: &PromptWriter,
    tokens_max: usize,
) -> Option<impl Iterator<Item = Range<usize>>> {
    let frame = writer.question("").len();
    let few = move |text: &str| {
        // A token has one byte at least, and a frame is merged with few of them.
        text.len() + 2 * frame <= tokens_max
    };
    let fits = move |text: &str| few(text) || writer.question_fits(text, tokens_max);
    if fits(text) {
        return None;
    }
    let (_, mut starts) = writer.tokenizer().encode_with_starts(text);
    starts.retain(|&start| text.is_char_boundary(start));
    starts.dedup();
    let most = tokens_max.saturating_sub(frame).max(1);
    let (mut from, mut room) = (0, most);
    Some(std::iter::from_fn(move || {
        while from < text.len() {
            let first = starts.partition_point(|&start| start <= from);
            let end = starts.get(first + room - 1).copied().unwrap_or(text.len());
            let end = best_end(text, from, end);
            if room == 1 || fits(&text[from..end]) {
                room = most;
                return Some(std::mem::replace(&mut from, end)..end);
            }
            room -= (room / 8).max(1); // tokens at the cut changed, or the frame takes more than thought
        }
        None
    }))
}

/// The best place to end a piece that starts at `from` and may reach to `end`.
fn best_end(text: &str, from: usize, end: usize) -> usize {
    if end == text.len() {
        return end;
    }
    let half = from + (end - from) / 2;
    let tail = &text[text.ceil_char_boundary(half)..end];
    let behind = |mark: &str| tail.rfind(mark).map(|at| end - tail.len() + at + mark.len());
    let paragraph = behind("\n\n").or_else(|| behind("\n"));
    let sentence = || [". ", "! ", "? ", "。"].into_iter().filter_map(behind).max();
    paragraph.or_else(sentence).unwrap_or(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::small;

    fn document(text: &str) -> Document {
        Document { id: "d".into(), text: text.into(), ..Document::default() }
    }

    fn writer() -> PromptWriter {
        PromptWriter::new(small()).unwrap()
    }

    /// Tokens of a prompt whose text has so many.
    fn prompt(tokens: usize) -> usize {
        writer().question("").len() + tokens
    }

    fn check(text: &str, tokens_max: usize, pieces: usize) -> Vec<String> {
        let tokens_max = prompt(tokens_max);
        let found = split(document(text), &writer(), tokens_max);
        let texts: Vec<String> = found.iter().map(|piece| piece.text.clone()).collect();
        assert_eq!(texts.concat(), text, "bytes were lost");
        let fits = |text: &String| writer().question(text).len() <= tokens_max;
        assert!(texts.iter().all(fits), "a piece is too long: {texts:?}");
        assert_eq!(found.len(), pieces, "{texts:?}");
        for (index, piece) in found.iter().enumerate().filter(|_| pieces > 1) {
            let (index, count) = (index as u32, pieces as u32);
            assert_eq!(piece.id, format!("d#{index}"));
            assert_eq!(piece.part, Some(Part { of: "d".into(), index, count }));
        }
        texts
    }

    #[test]
    fn a_short_document_stays_whole() {
        assert_eq!(check("Rates rose.", 50, 1), ["Rates rose."]);
        check("", 50, 1);
    }

    #[test]
    fn pieces_end_behind_paragraphs_where_they_can() {
        let text = format!("{}\n\n{}", "Rates rose. ".repeat(6), "Rates rose. ".repeat(8));
        let texts = check(&text, 50, 2);
        assert!(texts[0].ends_with("\n\n"), "{texts:?}");
    }

    #[test]
    fn else_behind_sentences() {
        let texts = check(&"The rates rose by 25 points. ".repeat(10), 60, 2);
        assert!(texts.iter().all(|text| text.ends_with(". ")), "{texts:?}");
    }

    #[test]
    fn a_window_is_the_first_piece_and_the_text_stays_whole() {
        let text = format!("{}\n\n{}", "Rates rose. ".repeat(6), "Rates rose. ".repeat(8));
        let pieces = check(&text, 50, 2);
        let found = window(document(&text), &writer(), prompt(50));
        assert_eq!((found.seen(), found.text.as_str()), (pieces[0].as_str(), text.as_str()));
        let short = document("Rates rose.");
        assert_eq!(window(short.clone(), &writer(), prompt(50)), short);
    }

    #[test]
    fn else_between_tokens() {
        check(&"x".repeat(100), 10, 10);
        check(&"漢字🙂".repeat(40), 12, 40);
    }
}
