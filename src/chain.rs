//! Chains: documents that may see each other, one round after another.
//!
//! ```text
//! block of N documents, M rounds, B = ceil(N / M):   chain j = documents j, B + j, 2B + j, …
//! prompt of a round = earlier documents of the chain with their pairs, then the next document
//! ```
//!
//! The rules are those of recipe (d). A chain owns its state: nothing of it depends on other chains, on
//! arrival, or on how many documents a round has.

use crate::gate::Refusal;
use crate::prompt::{Pair, PromptWriter, parse};
use crate::record::{Document, Entry, Finish, Treatment};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// A chain on its way through the rounds.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Chain {
    /// Number of the chain in its block.
    pub index: u64,
    /// Documents with their pairs, oldest first.
    pub entries: Vec<Entry>,
    /// Documents that are still to come.
    pub waiting: VecDeque<Document>,
}

/// What is asked of the synthesizer next.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Prompt {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Entries of the chain that the prompt shows.
    pub shown: usize,
}

/// What came back.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Generation {
    /// The text, without special tokens.
    pub text: String,
    /// How it ended.
    pub finish: Finish,
    /// Tokens that were generated.
    pub tokens: u64,
}

/// Cuts a block of documents into chains over `rounds` rounds, in the order of their first documents.
///
/// A document of the raw share is a chain of its own, which is done before it starts.
///
/// # Panics
/// If there are no rounds.
pub fn chains(documents: Vec<Document>, rounds: usize) -> Vec<Chain> {
    assert!(rounds > 0, "there is at least one round");
    let raw = |document: &Document| document.treatment == Treatment::Raw;
    let count = documents.iter().filter(|document| !raw(document)).count().div_ceil(rounds);
    let mut chains: Vec<Chain> = Vec::new();
    let mut converted: Vec<usize> = Vec::new();
    let mut position = 0;
    for document in documents {
        let raw = raw(&document);
        if raw || position < count {
            if !raw {
                converted.push(chains.len());
            }
            chains.push(Chain { index: chains.len() as u64, ..Chain::default() });
        }
        if raw {
            let entry = Entry { document, finish: Finish::NotAsked, ..Entry::default() };
            chains.last_mut().expect("just pushed").entries.push(entry);
        } else {
            chains[converted[position % count]].waiting.push_back(document);
            position += 1;
        }
    }
    chains
}

impl Chain {
    /// The prompt for the next document: with as many earlier entries as fit into `tokens_max`, the
    /// oldest left out first. None if no document is waiting.
    pub fn prompt(&self, writer: &PromptWriter, tokens_max: usize) -> Option<Prompt> {
        let document = self.waiting.front()?;
        let mut shown: VecDeque<Vec<u32>> = self
            .linked()
            .iter()
            .map(|entry| writer.example(entry.document.seen(), &entry.pairs))
            .collect();
        let question = writer.question(document.seen());
        let total =
            |shown: &VecDeque<Vec<u32>>| question.len() + shown.iter().map(Vec::len).sum::<usize>();
        while !shown.is_empty() && total(&shown) > tokens_max {
            shown.pop_front();
        }
        let count = shown.len();
        let tokens = shown.into_iter().flatten().chain(question).collect();
        Some(Prompt { tokens, shown: count })
    }

    /// Takes in what was generated for the next document.
    ///
    /// # Panics
    /// If no document is waiting.
    pub fn accept(&mut self, prompt: &Prompt, generation: &Generation) {
        let document = self.waiting.pop_front().expect("a generation answers a waiting document");
        if let Some(last) = self.entries.last_mut() {
            last.followed = Some(prompt.shown > 0);
        }
        let parsed = match &generation.finish {
            Finish::Failed(_) => crate::prompt::Parsed::default(),
            _ => parse(&generation.text),
        };
        self.entries.push(Entry {
            document,
            inherits: prompt.shown > 0 && !parsed.pairs.is_empty(),
            pairs: parsed.pairs,
            dropped: parsed.dropped,
            refused: Vec::new(),
            not_judged: 0,
            finish: generation.finish.clone(),
            followed: None,
            prompt_tokens: prompt.tokens.len() as u64,
            generated_tokens: generation.tokens,
        });
    }

    /// Refuses pairs of the last entry: `judge` says why, from the pair and those kept before it.
    pub fn refuse(&mut self, mut judge: impl FnMut(&str, &[Pair], &Pair) -> Option<Refusal>) {
        let Some(entry) = self.entries.last_mut() else { return };
        let text = entry.document.seen();
        let mut kept = Vec::new();
        for pair in entry.pairs.drain(..) {
            match judge(text, &kept, &pair) {
                None => kept.push(pair),
                Some(refusal) => entry.refused.push((refusal, pair)),
            }
        }
        entry.pairs = kept;
        entry.inherits &= !entry.pairs.is_empty();
    }

    /// Whether all documents have been through.
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The last entry, if it has a pair, with the entries before it that it is linked to.
    fn linked(&self) -> &[Entry] {
        match self.entries.last() {
            Some(last) if !last.pairs.is_empty() => {
                let breaks = self.entries.iter().rposition(|entry| !entry.inherits);
                &self.entries[breaks.expect("the first entry inherits from none")..]
            }
            _ => &[],
        }
    }

    /// The entries in runs: each run is one document to be rendered, an entry without pairs a run of its
    /// own.
    pub fn into_groups(self) -> Vec<Vec<Entry>> {
        let mut groups: Vec<Vec<Entry>> = Vec::new();
        for entry in self.entries {
            match groups.last_mut() {
                Some(group) if entry.inherits => group.push(entry),
                _ => groups.push(vec![entry]),
            }
        }
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::small;
    use std::collections::BTreeSet;

    fn documents(count: usize) -> Vec<Document> {
        let text = |i| format!("Text {i}.");
        (0..count)
            .map(|i| Document { id: i.to_string(), text: text(i), ..Document::default() })
            .collect()
    }

    /// Runs all chains; `valid(document)` says whether its generation has a pair.
    fn run(
        count: usize,
        rounds: usize,
        tokens_max: usize,
        valid: impl Fn(usize) -> bool,
    ) -> Vec<Chain> {
        let writer = PromptWriter::new(small()).unwrap();
        let mut chains = chains(documents(count), rounds);
        for chain in &mut chains {
            while let Some(prompt) = chain.prompt(&writer, tokens_max) {
                let id: usize = chain.waiting[0].id.parse().unwrap();
                let text =
                    if valid(id) { format!("<QUE> q{id} <ANS> a </END>") } else { "?".into() };
                chain.accept(&prompt, &Generation { text, ..Generation::default() });
            }
        }
        chains
    }

    fn ids(chains: &[Chain]) -> Vec<Vec<usize>> {
        let id = |entry: &Entry| entry.document.id.parse().unwrap();
        chains.iter().map(|chain| chain.entries.iter().map(id).collect()).collect()
    }

    fn groups(chains: &[Chain]) -> Vec<Vec<usize>> {
        let id = |entry: &Entry| entry.document.id.parse().unwrap();
        let groups = chains.iter().cloned().flat_map(Chain::into_groups);
        groups.map(|group| group.iter().map(id).collect()).collect()
    }

    // The tables of recipe (d).

    #[test]
    fn six_documents_over_three_rounds_make_two_chains() {
        let chains = run(6, 3, 1000, |_| true);
        assert_eq!(ids(&chains), [[0, 2, 4], [1, 3, 5]]);
        for chain in &chains {
            let flags = |f: fn(&Entry) -> bool| chain.entries.iter().map(f).collect::<Vec<_>>();
            assert_eq!(flags(|entry| entry.inherits), [false, true, true]);
            let followed: Vec<_> = chain.entries.iter().map(|entry| entry.followed).collect();
            assert_eq!(followed, [Some(true), Some(true), None]);
        }
        assert_eq!(groups(&chains), [[0, 2, 4], [1, 3, 5]]);
    }

    #[test]
    fn a_late_round_may_be_short() {
        let chains = run(3, 2, 1000, |_| true);
        assert_eq!(groups(&chains), [vec![0, 2], vec![1]]);
    }

    #[test]
    fn the_last_prompt_shows_all_that_came_before() {
        let writer = PromptWriter::new(small()).unwrap();
        let mut chain = run(3, 3, 1000, |_| true).remove(0);
        let last = chain.entries.pop().unwrap();
        chain.waiting.push_back(last.document);
        let example = |i: usize| {
            let entry = &chain.entries[i];
            writer.example(&entry.document.text, &entry.pairs)
        };
        let expected = [example(0), example(1), writer.question("Text 2.")].concat();
        let prompt = chain.prompt(&writer, 1000).unwrap();
        assert_eq!(prompt, Prompt { tokens: expected, shown: 2 });
    }

    #[test]
    fn only_examples_are_opened_and_closed_by_control_ids() {
        let writer = PromptWriter::new(small()).unwrap();
        let mut chain = run(3, 3, 1000, |_| true).remove(0);
        let mut last = chain.entries.pop().unwrap();
        last.document.text = "<s> struck </s> through".into();
        chain.entries[0].document.text = "</s> opens".into();
        chain.waiting.push_back(last.document);
        let tokens = chain.prompt(&writer, 1000).unwrap().tokens;
        let count = |id| tokens.iter().filter(|&&token| token == id).count();
        assert_eq!((count(1), count(2)), (3, 2), "two examples and a question");
    }

    #[test]
    fn a_document_without_pairs_cuts_the_chain() {
        let chains = run(2, 2, 1000, |id| id == 0);
        assert_eq!(groups(&chains), [vec![0], vec![1]]);
        assert!(chains[0].entries[1].pairs.is_empty());
        let chains = run(3, 3, 1000, |id| id != 1);
        assert_eq!(groups(&chains), [vec![0], vec![1], vec![2]]);
        assert_eq!(chains[0].entries[1].followed, Some(false));
    }

    #[test]
    fn with_nothing_valid_every_document_goes_out_alone() {
        let chains = run(7, 3, 1000, |_| false);
        assert_eq!(groups(&chains).len(), 7);
    }

    #[test]
    fn every_size_gives_every_document_once() {
        // Among them the sizes at which the first implementation crashes.
        for rounds in 2..=5 {
            for count in 0..=20 {
                let found: Vec<usize> = ids(&run(count, rounds, 1000, |_| true)).concat();
                let unique: BTreeSet<usize> = found.iter().copied().collect();
                assert_eq!((found.len(), unique.len()), (count, count), "{count} over {rounds}");
            }
        }
    }

    #[test]
    fn the_oldest_examples_are_left_out_until_the_prompt_fits() {
        let writer = PromptWriter::new(small()).unwrap();
        let mut chain = run(3, 3, 1000, |_| true).remove(0);
        let last = chain.entries.pop().unwrap();
        chain.waiting.push_back(last.document);
        let whole = chain.prompt(&writer, 1000).unwrap().tokens.len();
        assert_eq!(chain.prompt(&writer, whole).unwrap().shown, 2);
        assert_eq!(chain.prompt(&writer, whole - 1).unwrap().shown, 1);
        assert_eq!(chain.prompt(&writer, 1).unwrap().shown, 0);
    }

    #[test]
    fn an_entry_hidden_by_trimming_stays_in_its_document() {
        let writer = PromptWriter::new(small()).unwrap();
        let whole = {
            let mut chain = run(3, 3, 1000, |_| true).remove(0);
            let last = chain.entries.pop().unwrap();
            chain.waiting.push_back(last.document);
            chain.prompt(&writer, 1000).unwrap().tokens.len()
        };
        let chains = run(3, 3, whole - 1, |_| true);
        assert_eq!(groups(&chains), [[0, 1, 2]]);
    }

    #[test]
    fn documents_of_the_raw_share_are_chains_of_their_own_in_order() {
        let mut all = documents(8);
        for raw in [0, 3, 4, 7] {
            all[raw].treatment = Treatment::Raw;
        }
        let chains = chains(all, 2); // 1, 2, 5, 6 are converted: 1 with 5, 2 with 6
        let ids = |chain: &Chain| -> Vec<String> {
            let entries = chain.entries.iter().map(|entry| &entry.document);
            entries.chain(&chain.waiting).map(|document| document.id.clone()).collect()
        };
        let found: Vec<Vec<String>> = chains.iter().map(ids).collect();
        assert_eq!(
            found,
            [vec!["0"], vec!["1", "5"], vec!["2", "6"], vec!["3"], vec!["4"], vec!["7"]]
        );
        assert!(chains.iter().map(|chain| chain.index).eq(0..6));
        assert_eq!(chains.iter().filter(|chain| chain.is_done()).count(), 4);
    }

    #[test]
    fn a_document_whose_pairs_are_all_refused_cuts_the_chain() {
        let writer = PromptWriter::new(small()).unwrap();
        let mut chain = chains(documents(2), 2).remove(0);
        while let Some(prompt) = chain.prompt(&writer, 1000) {
            let text = "<QUE> q <ANS> a </END><QUE> r <ANS> b </END>".into();
            chain.accept(&prompt, &Generation { text, ..Generation::default() });
            let last = chain.entries.len() == 2;
            chain.refuse(|_, kept, pair| {
                (last || pair.answer == "b").then(|| {
                    assert!(last || kept.len() == 1);
                    Refusal::Ungrounded
                })
            });
        }
        let counts = |entry: &Entry| (entry.pairs.len(), entry.refused.len(), entry.inherits);
        assert_eq!(
            chain.entries.iter().map(counts).collect::<Vec<_>>(),
            [(1, 1, false), (0, 2, false)]
        );
        assert_eq!(chain.into_groups().len(), 2);
    }

    #[test]
    fn a_failed_request_leaves_the_document_raw() {
        let mut chain = chains(documents(1), 1).remove(0);
        let finish = Finish::Failed("device lost".into());
        let generation = Generation { finish: finish.clone(), ..Generation::default() };
        chain.accept(&Prompt::default(), &generation);
        assert_eq!((chain.entries[0].pairs.len(), chain.entries[0].dropped.len()), (0, 0));
        assert_eq!(chain.entries[0].finish, finish);
    }
}
