//! Lessons for a synthesizer: few-shot sequences of task rows in its wire format (recipe (f)).
//!
//! ```text
//! rows of one dataset ─▶ 1 … `shots_max` of them in a row ─▶ one item ─▶ packed with others
//! ```
//!
//! Rows of an item follow each other as in a prompt, so that the model learns to continue the pattern of
//! those before; only pairs are learned. How many rows an item takes is drawn for each item, so that the
//! first row of a prompt, which has nothing to imitate, is practised as often as the last.

use crate::format::tasks::Task;
use crate::pack::{PackMode, Packer};
use crate::prompt::PromptWriter;
use crate::record::{Item, Rejected, Sequence};
use crate::seed;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is learned of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossOn {
    /// From the first question mark to the closing id: tuning a model that knows the language.
    Pairs,
    /// Everything: making such a model in the first place. Rows without pairs are used too.
    Everything,
}

/// How lessons are made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LessonSettings {
    /// Tokens of a sequence, and of the longest item.
    pub length: usize,
    /// Rows of an item at most.
    pub shots_max: usize,
    /// Rows used of each dataset, those with the most pairs first.
    pub rows_per_dataset_max: usize,
    /// What is learned.
    pub loss_on: LossOn,
    /// The seed of all choices.
    pub seed: u64,
}

/// Rows as token ids, ready to be put together anew for each epoch.
#[derive(Debug)]
pub struct Lessons {
    settings: LessonSettings,
    by_dataset: BTreeMap<String, Vec<Lesson>>,
}

#[derive(Debug)]
struct Lesson {
    id: String,
    tokens: Vec<u32>,
    learned: Vec<bool>,
}

impl Lessons {
    /// Encodes the rows; those that cannot be used are handed back with a reason.
    pub fn new(
        tasks: Vec<Task>,
        writer: &PromptWriter,
        settings: LessonSettings,
    ) -> (Self, Vec<Rejected>) {
        let mut rejected = Vec::new();
        let mut by_dataset: BTreeMap<String, Vec<Task>> = BTreeMap::new();
        for task in tasks {
            if task.pairs.is_empty() && settings.loss_on == LossOn::Pairs {
                rejected.push(task.reject("no_pairs", ""));
            } else {
                by_dataset.entry(task.dataset.clone()).or_default().push(task);
            }
        }
        let mut encode = |mut tasks: Vec<Task>| -> Vec<Lesson> {
            tasks.sort_by_key(|task| std::cmp::Reverse(task.pairs.len())); // stable: input order
            for task in tasks.drain(settings.rows_per_dataset_max.min(tasks.len())..) {
                rejected.push(task.reject("dataset_is_full", ""));
            }
            let lessons = tasks.into_iter().filter_map(|task| {
                let (tokens, mut learned) = writer.lesson(&task.text, &task.pairs);
                if tokens.len() > settings.length {
                    let detail = format!("{} tokens", tokens.len());
                    rejected.push(task.reject("example_too_long", detail));
                    return None;
                }
                if settings.loss_on == LossOn::Everything {
                    learned.fill(true);
                }
                Some(Lesson { id: task.id, tokens, learned })
            });
            lessons.collect()
        };
        let by_dataset =
            by_dataset.into_iter().map(|(name, tasks)| (name, encode(tasks))).collect();
        (Lessons { settings, by_dataset }, rejected)
    }

    /// Rows in use.
    pub fn rows(&self) -> usize {
        self.by_dataset.values().map(Vec::len).sum()
    }

    /// Tokens of all rows, and how many of them are learned.
    pub fn tokens(&self) -> (u64, u64) {
        let lessons = self.by_dataset.values().flatten();
        lessons.fold((0, 0), |(tokens, learned), lesson| {
            let flags = lesson.learned.iter().filter(|&&flag| flag).count();
            (tokens + lesson.tokens.len() as u64, learned + flags as u64)
        })
    }

    /// The sequences of one pass over all rows. Each epoch groups and orders the rows differently.
    pub fn epoch(&self, epoch: u64) -> Vec<Sequence> {
        let seed = self.settings.seed;
        let mut items = Vec::new();
        for (dataset, lessons) in &self.by_dataset {
            let mut order: Vec<usize> = (0..lessons.len()).collect();
            seed::stream(seed, dataset, &format!("order of rows, epoch {epoch}"))
                .shuffle(&mut order);
            let mut shots = seed::stream(seed, dataset, &format!("rows of items, epoch {epoch}"));
            let mut rest = order.as_slice();
            while !rest.is_empty() {
                let wanted = 1 + shots.index(self.settings.shots_max);
                let (item, taken) = self.item(lessons, rest, wanted);
                items.push(item);
                rest = &rest[taken..];
            }
        }
        let mut order = seed::stream(seed, "", &format!("order of items, epoch {epoch}"));
        order.shuffle(&mut items);
        let mut packer = Packer::new(self.settings.length, PackMode::default());
        let mut sequences: Vec<Sequence> =
            items.iter().flat_map(|item| packer.push(item)).collect();
        sequences.extend(packer.finish());
        order.shuffle(&mut sequences); // the last ones were put together from pieces
        sequences
    }

    /// The next rows as one item, `wanted` of them or as many as fit.
    fn item(&self, lessons: &[Lesson], rest: &[usize], wanted: usize) -> (Item, usize) {
        let (mut item, mut ids) = (Item::default(), Vec::new());
        for &index in rest.iter().take(wanted) {
            let lesson = &lessons[index];
            if !ids.is_empty() && item.tokens.len() + lesson.tokens.len() > self.settings.length {
                break;
            }
            item.tokens.extend_from_slice(&lesson.tokens);
            item.learned.extend_from_slice(&lesson.learned);
            ids.push(lesson.id.as_str());
        }
        item.id = ids.join("+");
        (item, ids.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::Pair;
    use crate::tokenizer::tests::small;

    const SETTINGS: LessonSettings = LessonSettings {
        length: 200,
        shots_max: 3,
        rows_per_dataset_max: 100,
        loss_on: LossOn::Pairs,
        seed: 1,
    };

    fn task(dataset: &str, index: usize, pairs: usize) -> Task {
        let pair = |i| Pair { question: format!("Q{i}?"), answer: format!("A{index}") };
        Task {
            id: format!("{dataset}-{index}"),
            dataset: dataset.into(),
            text: format!("{dataset} row {index}"),
            pairs: (0..pairs).map(pair).collect(),
            place: crate::record::Place::default(),
        }
    }

    fn lessons(tasks: Vec<Task>, settings: LessonSettings) -> (Lessons, Vec<String>) {
        let writer = PromptWriter::new(small()).unwrap();
        let (lessons, rejected) = Lessons::new(tasks, &writer, settings);
        (lessons, rejected.into_iter().map(|r| format!("{} {}", r.ids[0], r.reason)).collect())
    }

    #[test]
    fn every_row_is_in_every_epoch_once() {
        let tasks = (0..40).map(|i| task(["a", "b"][i % 2], i, 1)).collect();
        let (lessons, rejected) = lessons(tasks, SETTINGS);
        assert!(rejected.is_empty());
        for epoch in 0..3 {
            let sequences = lessons.epoch(epoch);
            let placed: usize = sequences.iter().map(|s| s.tokens.len()).sum();
            assert_eq!(placed as u64, lessons.tokens().0);
            let learned = sequences.iter().flat_map(|s| &s.learned).filter(|&&flag| flag).count();
            assert_eq!(learned as u64, lessons.tokens().1);
        }
        assert_ne!(lessons.epoch(0), lessons.epoch(1));
        assert_eq!(lessons.epoch(2), lessons.epoch(2));
    }

    #[test]
    fn an_item_holds_rows_of_one_dataset() {
        let tasks = (0..40).map(|i| task(["a", "b"][i % 2], i, 1)).collect();
        let sequences = lessons(tasks, SETTINGS).0.epoch(0);
        let mut shots = [0; 4];
        for segment in sequences.iter().flat_map(|s| &s.segments).filter(|s| s.offset == 0) {
            let rows: Vec<&str> = segment.item.split('+').collect();
            assert!(rows.iter().all(|row| row[..2] == rows[0][..2]), "{rows:?}");
            shots[rows.len()] += 1;
        }
        assert!(shots[1] > 0 && shots[2] > 0 && shots[3] > 0, "{shots:?}");
    }

    #[test]
    fn an_item_is_whole_rows_and_fits_into_a_sequence() {
        let tasks: Vec<Task> = (0..40).map(|i| task("a", i, 1 + i % 4)).collect();
        let rows: BTreeMap<String, usize> = tasks
            .iter()
            .map(|task| {
                let writer = PromptWriter::new(small()).unwrap();
                (task.id.clone(), writer.example(&task.text, &task.pairs).len())
            })
            .collect();
        let mut items: BTreeMap<String, usize> = BTreeMap::new();
        for segment in lessons(tasks, SETTINGS).0.epoch(0).iter().flat_map(|s| &s.segments) {
            *items.entry(segment.item.clone()).or_default() += segment.length as usize;
        }
        for (item, tokens) in items {
            assert_eq!(item.split('+').map(|row| rows[row]).sum::<usize>(), tokens, "{item}");
            assert!(tokens <= SETTINGS.length, "{item} has {tokens} tokens");
        }
    }

    #[test]
    fn rows_that_cannot_be_used_are_handed_back() {
        let mut long = task("a", 0, 1);
        long.text = "word ".repeat(300);
        let tasks = vec![long, task("a", 1, 0), task("a", 2, 1), task("a", 3, 2)];
        let settings = LessonSettings { rows_per_dataset_max: 2, ..SETTINGS };
        let (lessons, rejected) = lessons(tasks, settings);
        assert_eq!(lessons.rows(), 1);
        assert_eq!(rejected.len(), 3);
        assert!(rejected.contains(&"a-1 no_pairs".into()), "{rejected:?}");
        assert!(rejected.contains(&"a-2 dataset_is_full".into()), "{rejected:?}");
        assert!(rejected[2].starts_with("a-0 example_too_long"), "{rejected:?}");
    }

    #[test]
    fn with_loss_on_everything_a_bare_text_is_a_lesson() {
        let settings = LessonSettings { loss_on: LossOn::Everything, ..SETTINGS };
        let (lessons, rejected) = lessons(vec![task("a", 1, 0)], settings);
        assert!(rejected.is_empty());
        assert_eq!(lessons.tokens().0, lessons.tokens().1);
    }
}
