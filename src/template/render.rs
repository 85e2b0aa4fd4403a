//! Writes a group of entries as one document.

use super::Templates;
use super::choice::{Choices, Layout};
use super::family::PairPattern;
use super::mode::{Choice, Form, Unshown, form};
use super::pattern::Slot;
use crate::prompt::Pair;
use crate::record::Entry;
use crate::seed;

/// A document as the language model reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The id of its first text.
    pub id: String,
    /// The text.
    pub text: String,
    /// Indices into the group of the entries it was made of.
    pub entries: Vec<usize>,
    /// The byte of the text that what was made of each entry starts at.
    pub starts: Vec<usize>,
    /// What was drawn; none for a raw text.
    pub choices: Option<Choices>,
    /// Pairs whose answer is in the text.
    pub shown: u64,
    /// Pairs whose pattern shows the question only.
    pub hidden: u64,
    /// Pairs that could not be shown, with the index of their entry.
    pub dropped: Vec<(usize, Pair, Unshown)>,
}

/// The documents of a group: one for all entries with usable pairs, and one for each other entry, which
/// goes out as it is. In the order of their first entries.
pub fn render(group: &[Entry], templates: &Templates, run: u64) -> Vec<Rendered> {
    let none = |answer: &str| templates.means_none(answer);
    let (mut usable, mut raw) = (Vec::new(), Vec::new());
    let mut dropped = Vec::new();
    for (index, entry) in group.iter().enumerate() {
        let mut forms = Vec::new();
        let mut unshown = Vec::new();
        for (number, pair) in entry.pairs.iter().enumerate() {
            match form(pair, none) {
                Ok(form) => forms.push((number, form)),
                Err(reason) => unshown.push((index, pair.clone(), reason)),
            }
        }
        if forms.is_empty() {
            raw.push(Rendered {
                id: entry.document.id.clone(),
                text: entry.document.text.clone(),
                entries: vec![index],
                starts: vec![0],
                choices: None,
                shown: 0,
                hidden: 0,
                dropped: unshown,
            });
        } else {
            dropped.extend(unshown);
            usable.push((index, forms));
        }
    }
    let mut documents = raw;
    if !usable.is_empty() {
        documents.push(augmented(group, &usable, dropped, templates, run));
    }
    documents.sort_by_key(|document| document.entries[0]);
    documents
}

type Forms = Vec<(usize, Form)>;

fn augmented(
    group: &[Entry],
    usable: &[(usize, Forms)],
    dropped: Vec<(usize, Pair, Unshown)>,
    templates: &Templates,
    run: u64,
) -> Rendered {
    let id = group[usable[0].0].document.id.clone();
    let counts = || usable.iter().map(|(_, forms)| forms.len());
    let (fewest, most) = (counts().min().unwrap_or(0), counts().max().unwrap_or(0));
    let choices = Choices::draw(templates, run, &id, fewest, most);
    let mut writer = Writer { templates, choices: &choices, run, shown: 0, hidden: 0 };
    let texts: Vec<String> = usable
        .iter()
        .map(|(index, forms)| {
            let document = &group[*index].document;
            writer.text(&document.id, &document.text, forms)
        })
        .collect();
    let joint = &templates.free_form.get(choices.joint).separator;
    let start = |at: &mut usize, text: &String| {
        let start = *at;
        *at += text.len() + joint.len();
        Some(start)
    };
    let starts = texts.iter().scan(0, start).collect();
    let (text, shown, hidden) = (texts.join(joint), writer.shown, writer.hidden);
    let entries = usable.iter().map(|(index, _)| *index).collect();
    Rendered { id, text, entries, starts, choices: Some(choices), shown, hidden, dropped }
}

/// Writes the texts of one document.
struct Writer<'a> {
    templates: &'a Templates,
    choices: &'a Choices,
    run: u64,
    shown: u64,
    hidden: u64,
}

/// A pair with its options laid out.
struct Shown<'a> {
    form: &'a Form,
    options: String,
    option_answer: String,
}

impl Shown<'_> {
    fn answer(&self) -> &str {
        match self.form.options {
            Some(_) => &self.option_answer,
            None => &self.form.answer,
        }
    }

    /// The answer in full; that no option is right is said in the words of the document.
    fn full_answer(&self) -> &str {
        match self.form.options {
            Some(Choice { right: None, .. }) => &self.option_answer,
            _ => &self.form.answer,
        }
    }

    fn values(&self) -> [(Slot, &str); 5] {
        [
            (Slot::Question, &self.form.stem),
            (Slot::Options, &self.options),
            (Slot::OptionAnswer, &self.option_answer),
            (Slot::Answer, self.full_answer()),
            (Slot::Reasoning, self.form.reasoning.as_deref().unwrap_or_default()),
        ]
    }

    fn question(&self) -> String {
        match (self.form.options.is_some(), self.options.starts_with(['\n', ' '])) {
            (false, _) => self.form.stem.clone(),
            (true, true) => format!("{}{}", self.form.stem, self.options),
            (true, false) => format!("{}\n{}", self.form.stem, self.options),
        }
    }
}

impl Writer<'_> {
    /// One text with its pairs.
    fn text(&mut self, id: &str, context: &str, forms: &Forms) -> String {
        let pairs: Vec<Shown<'_>> =
            forms.iter().map(|(number, form)| self.lay_out(id, *number, form)).collect();
        match self.choices.layout {
            Layout::Classic => self.classic(context, &pairs),
            Layout::Dialog => self.dialog(context, &pairs),
            Layout::NextTurn => self.next_turn(context, &pairs),
            Layout::Numbered => self.numbered(context, &pairs),
            Layout::Inline => self.inline(context, &pairs),
        }
    }

    /// Shuffles and names the options of a pair; the order is drawn for each pair of each text.
    fn lay_out<'a>(&self, id: &str, number: usize, form: &'a Form) -> Shown<'a> {
        let Some(Choice { options, right }) = &form.options else {
            return Shown { form, options: String::new(), option_answer: form.answer.clone() };
        };
        let mut order: Vec<usize> = (0..options.len()).collect();
        seed::stream(self.run, id, &format!("options of pair {number}")).shuffle(&mut order);
        let names = self.templates.option_names.get(self.choices.option_names);
        let ending = self.templates.option_ending.get(self.choices.option_ending).fill(&[]);
        let mut block = self.templates.options_opener.get(self.choices.options_opener).fill(&[]);
        for (place, &option) in order.iter().enumerate() {
            block += &format!("{}{}{ending}", names.name(place), options[option]);
        }
        let place = right.and_then(|right| order.iter().position(|&option| option == right));
        let option_answer = match place {
            None => self.templates.none_of_these.get(self.choices.none_of_these).fill(&[]),
            Some(place) if names.is_enumeration() => names.name(place).trim().to_owned(),
            Some(_) => form.answer.clone(),
        };
        Shown { form, options: block, option_answer }
    }

    fn pattern(&self, form: &Form) -> &PairPattern {
        let Templates { free_form, options, reasoning, options_reasoning, .. } = self.templates;
        match (&form.options, &form.reasoning) {
            (None, None) => free_form.get(self.choices.free_form),
            (Some(_), None) => options.get(self.choices.options),
            (None, Some(_)) => reasoning.get(self.choices.reasoning),
            (Some(_), Some(_)) => options_reasoning.get(self.choices.options_reasoning),
        }
    }

    /// The separator of the free-form pattern rules the whole document.
    fn separator(&self) -> &str {
        &self.templates.free_form.get(self.choices.free_form).separator
    }

    fn classic(&mut self, context: &str, pairs: &[Shown<'_>]) -> String {
        let mut written = Vec::new();
        for pair in pairs {
            let pattern = self.pattern(pair.form);
            written.push(pattern.fill(&pair.values()));
            match pattern.has(Slot::Answer) || pattern.has(Slot::OptionAnswer) {
                true => self.shown += 1,
                false => self.hidden += 1,
            }
        }
        let pairs = written.join(self.separator());
        if self.choices.inverted {
            return self.inverted(context, &pairs);
        }
        let introduction = self.templates.introduction.get(self.choices.introduction).fill(&[]);
        let glue = match introduction.is_empty() {
            true => String::new(),
            false => self.templates.text_glue.get(self.choices.text_glue).fill(&[]),
        };
        let before = self.templates.before_text.get(self.choices.before_text);
        let text = before.fill(&[(Slot::Context, context)]);
        text + &glue + &introduction + self.separator() + &pairs
    }

    fn inverted(&self, context: &str, pairs: &str) -> String {
        let header = self.templates.inverted_header.get(self.choices.inverted_header);
        let text = self.templates.inverted_text.get(self.choices.inverted_text);
        let glue = self.templates.inverted_glue.get(self.choices.inverted_glue).fill(&[]);
        let (header, text) =
            (header.fill(&[(Slot::Pairs, pairs)]), text.fill(&[(Slot::Context, context)]));
        header + &glue + &text
    }

    /// Question and answer as turns: by the pattern of the pair where it reads forward.
    fn turns(&mut self, pairs: &[Shown<'_>]) -> Vec<(String, String)> {
        self.shown += pairs.len() as u64;
        let turn = |pair: &Shown<'_>| {
            let pattern = self.pattern(pair.form);
            if pattern.is_forward() {
                let values = pair.values();
                return (pattern.input.fill(&values), pattern.target.fill(&values));
            }
            let answer = match &pair.form.reasoning {
                Some(reasoning) => format!("{reasoning}. So the answer is {}", pair.answer()),
                None => pair.answer().to_owned(),
            };
            (pair.question(), answer)
        };
        pairs.iter().map(turn).collect()
    }

    /// Turns as lines of a conversation, two for each pair.
    fn lines(&mut self, pairs: &[Shown<'_>]) -> Vec<String> {
        let speakers = self.templates.dialog_speakers.get(self.choices.dialog_speakers);
        let ending = self.templates.dialog_ending.get(self.choices.dialog_ending).fill(&[]);
        // A turn that has its own end gets no second one.
        let close = |turn: String| match turn.ends_with(['.', '?', '!', ';', ':']) {
            true => turn,
            false => turn + &ending,
        };
        let turns = self.turns(pairs).into_iter();
        turns
            .flat_map(|(question, answer)| {
                [
                    close(format!("{}{question}", speakers.first)),
                    close(format!("{}{answer}", speakers.second)),
                ]
            })
            .collect()
    }

    fn conversation(&self, lines: &[String]) -> String {
        let gap = if self.choices.spaced { "\n\n" } else { "\n" };
        lines.chunks(2).map(|pair| pair.join("\n")).collect::<Vec<_>>().join(gap)
    }

    fn dialog(&mut self, context: &str, pairs: &[Shown<'_>]) -> String {
        let lines = self.lines(pairs);
        let turns = self.conversation(&lines);
        if self.choices.inverted {
            return self.inverted(context, &turns);
        }
        let connector =
            self.templates.dialog_connector.get(self.choices.dialog_connector).fill(&[]);
        let opener = self.templates.dialog_opener.get(self.choices.dialog_opener).fill(&[]);
        let gap = match (opener.is_empty(), self.choices.spaced) {
            (true, _) => "",
            (false, true) => "\n\n",
            (false, false) => "\n",
        };
        format!("{context}{connector}{opener}{gap}{turns}")
    }

    fn next_turn(&mut self, context: &str, pairs: &[Shown<'_>]) -> String {
        let mut lines = self.lines(pairs);
        let last = lines.pop().expect("a text in this layout has two pairs at least");
        let dialog = self.conversation(&lines);
        let pattern = self.templates.next_turn.get(self.choices.next_turn);
        let filled = pattern.fill(&[(Slot::Dialog, &dialog), (Slot::LastTurn, &last)]);
        format!("{context}{}{filled}", self.separator())
    }

    fn numbered(&mut self, context: &str, pairs: &[Shown<'_>]) -> String {
        let names = self.templates.question_names.get(self.choices.question_names);
        let (questions, answers): (Vec<String>, Vec<String>) = self
            .turns(pairs)
            .into_iter()
            .enumerate()
            .map(|(index, (question, answer))| {
                let name = names.name(index);
                (format!("{name}{question}"), format!("{name}{answer}"))
            })
            .unzip();
        let (questions, answers) = (questions.join("\n"), answers.join("\n"));
        self.templates.numbered.get(self.choices.numbered).fill(&[
            (Slot::Context, context),
            (Slot::Questions, &questions),
            (Slot::Answers, &answers),
        ])
    }

    fn inline(&mut self, context: &str, pairs: &[Shown<'_>]) -> String {
        self.shown += pairs.len() as u64;
        let explained = pairs.iter().all(|pair| pair.form.reasoning.is_some());
        let pattern = match explained {
            true => self.templates.inline_explained.get(self.choices.inline_explained),
            false => self.templates.inline_plain.get(self.choices.inline_plain),
        };
        let (last, examples) = pairs.split_last().expect("a text in this layout has two pairs");
        let fill = |pair: &Shown<'_>, pattern: &super::Pattern| {
            pattern.fill(&[
                (Slot::Input, &pair.question()),
                (Slot::Output, pair.answer()),
                (Slot::Explanation, pair.form.reasoning.as_deref().unwrap_or_default()),
            ])
        };
        let mut parts = vec![pattern.header.fill(&[(Slot::Context, context)])];
        parts.extend(examples.iter().map(|pair| fill(pair, &pattern.example)));
        parts.push(fill(last, &pattern.test));
        parts.join(&pattern.separator)
    }
}

impl Templates {
    /// Whether an answer says that no option is right: one of the known phrases, in whatever case and
    /// with or without its final stop.
    fn means_none(&self, answer: &str) -> bool {
        let plain = |text: &str| {
            let text = text.trim();
            text.strip_suffix('.').unwrap_or(text).to_lowercase()
        };
        let answer = plain(answer);
        answer == "none"
            || self.none_of_these.iter().any(|phrase| plain(&phrase.fill(&[])) == answer)
    }
}
