//! The choices of one document, each from a stream of its own.

use super::Templates;
use crate::seed;
use serde::{Deserialize, Serialize};

/// How the pairs of a text are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// One pair after another.
    Classic,
    /// Turns of a conversation.
    Dialog,
    /// Numbered questions, then numbered answers.
    Numbered,
    /// All pairs but the last are examples.
    Inline,
    /// The last turn of a conversation is asked for.
    NextTurn,
}

/// Pairs beyond which a text is written in [`Layout::Classic`], as others do not scale.
const PAIRS_MAX: usize = 26;

/// What one document draws. Family members are indices into their data files.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Choices {
    /// How pairs are put together.
    pub layout: Layout,
    /// Whether questions stand before the text (Classic and Dialog).
    pub inverted: bool,
    /// Whether a blank line stands between the pairs of a conversation.
    pub spaced: bool,
    pub(super) free_form: usize,
    pub(super) options: usize,
    pub(super) reasoning: usize,
    pub(super) options_reasoning: usize,
    pub(super) joint: usize,
    pub(super) numbered: usize,
    pub(super) next_turn: usize,
    pub(super) inline_explained: usize,
    pub(super) inline_plain: usize,
    pub(super) before_text: usize,
    pub(super) text_glue: usize,
    pub(super) introduction: usize,
    pub(super) inverted_header: usize,
    pub(super) inverted_glue: usize,
    pub(super) inverted_text: usize,
    pub(super) options_opener: usize,
    pub(super) option_names: usize,
    pub(super) option_ending: usize,
    pub(super) none_of_these: usize,
    pub(super) question_names: usize,
    pub(super) dialog_opener: usize,
    pub(super) dialog_connector: usize,
    pub(super) dialog_speakers: usize,
    pub(super) dialog_ending: usize,
}

impl Choices {
    /// Draws for the document `id`, whose texts have between `fewest` and `most` pairs.
    pub fn draw(templates: &Templates, run: u64, id: &str, fewest: usize, most: usize) -> Self {
        let stream = |purpose: &str| seed::stream(run, id, purpose);
        let layouts: &[(Layout, u64)] = match (fewest, most) {
            (_, PAIRS_MAX..) if most > PAIRS_MAX => &[(Layout::Classic, 1)],
            (0 | 1, _) => &[(Layout::Classic, 95), (Layout::Dialog, 5)],
            _ => &[
                (Layout::Classic, 80),
                (Layout::Dialog, 5),
                (Layout::Numbered, 5),
                (Layout::Inline, 5),
                (Layout::NextTurn, 5),
            ],
        };
        let layout = stream("layout").weighted(layouts.iter().map(|(_, weight)| *weight));
        macro_rules! draw {
            ($($family:ident from $purpose:literal),* $(,)?) => {
                Choices {
                    layout: layouts[layout].0,
                    inverted: stream("inverted").below(20) == 0,
                    spaced: stream("dialog gap").below(2) == 0,
                    joint: templates.free_form.draw(&mut stream("joint of texts")),
                    $($family: templates.$family.draw(&mut stream($purpose))),*
                }
            };
        }
        draw! {
            free_form from "free form",
            options from "options",
            reasoning from "reasoning",
            options_reasoning from "options and reasoning",
            numbered from "numbered",
            next_turn from "next turn",
            inline_explained from "inline, explained",
            inline_plain from "inline",
            before_text from "before the text",
            text_glue from "text glue",
            introduction from "introduction",
            inverted_header from "inverted header",
            inverted_glue from "inverted glue",
            inverted_text from "inverted text",
            options_opener from "options opener",
            option_names from "option names",
            option_ending from "option ending",
            none_of_these from "none of these",
            question_names from "question names",
            dialog_opener from "dialog opener",
            dialog_connector from "dialog connector",
            dialog_speakers from "dialog speakers",
            dialog_ending from "dialog ending",
        }
    }
}
