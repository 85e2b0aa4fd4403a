//! Requests to measure with, and who asks them.
//!
//! ```text
//! random    every prompt of random tokens at once; nothing is shared, nothing ends early
//! corpus    a chain of texts: round r asks with the texts and pairs of the rounds before it
//! ```

use crate::shell::terminal::tell;
use anyhow::{Context, Result, bail, ensure};
use crossbeam_channel::unbounded;
use headwater::chain::{Chain, Generation, Prompt, chains};
use headwater::format::documents::{Documents, Found, files};
use headwater::format::jsonl::Fields;
use headwater::prompt::PromptWriter;
use headwater::record::{Document, Finish};
use headwater::seed;
use headwater::synthesizer::{Completion, Queue, Request, Synthesizer};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_128;

/// Requests to measure with.
#[derive(Clone)]
pub(super) enum Workload {
    /// Prompts that have nothing to do with each other.
    Random(Vec<Vec<u32>>),
    /// Chains of texts.
    Corpus(Box<Corpus>),
}

/// Chains of texts, with what their prompts are written by.
#[derive(Clone)]
pub(super) struct Corpus {
    chains: Vec<Chain>,
    writer: PromptWriter,
    prompt_tokens_max: usize,
}

/// What was asked and answered.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Answered {
    /// Requests.
    pub(super) requests: u64,
    /// Tokens of their prompts.
    pub(super) prompt_tokens: u64,
    /// Tokens of the answers.
    pub(super) output_tokens: u64,
    /// What all prompts with their answers come to, in whatever order they came.
    pub(super) digest: u128,
}

impl Answered {
    /// Counts an answer.
    fn count(&mut self, prompt: &[u32], answer: &[u32]) {
        self.requests += 1;
        self.prompt_tokens += prompt.len() as u64;
        self.output_tokens += answer.len() as u64;
        let words = [&[prompt.len() as u32], prompt, answer].concat();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.digest = self.digest.wrapping_add(xxh3_128(&bytes));
    }
}

impl Workload {
    /// So many prompts of random tokens.
    pub(super) fn random(requests: usize, prompt_tokens: usize, vocabulary: usize) -> Self {
        let prompt = |index: usize| {
            let mut stream = seed::stream(9, &index.to_string(), "bench prompt");
            (0..prompt_tokens).map(|_| stream.index(vocabulary) as u32).collect()
        };
        Workload::Random((0..requests).map(prompt).collect())
    }

    /// The first texts of a corpus that fit into a prompt, `limit` at most, over so many rounds.
    ///
    /// # Errors
    /// If a path does not exist, or there is no text in it.
    pub(super) fn corpus(
        paths: &[PathBuf],
        limit: Option<usize>,
        rounds: usize,
        writer: PromptWriter,
        prompt_tokens_max: usize,
    ) -> Result<Self> {
        let (inputs, _) = files(paths)?;
        let found = Documents::new(inputs, "bench", Fields::detected());
        let fits = |text: &Document| writer.question_fits(text.seen(), prompt_tokens_max);
        let (mut too_long, mut rejected, mut first) = (0, 0, None);
        let texts = found.filter_map(|found| match found {
            Found::Document(document) => {
                let fits = fits(&document);
                too_long += u64::from(!fits);
                fits.then_some(*document)
            }
            Found::Rejected(bad) => {
                rejected += 1;
                first.get_or_insert(bad);
                None
            }
            Found::Withdrawn { .. } => None,
        });
        let texts: Vec<Document> = texts.take(limit.unwrap_or(usize::MAX)).collect();
        let first = first.map(|first| format!("; the first: {first}")).unwrap_or_default();
        let left_out = format!(
            "{too_long} texts too long for a prompt, {rejected} records that cannot be used{first}"
        );
        ensure!(!texts.is_empty(), "--prompts has no text to ask about: {left_out}");
        if too_long + rejected > 0 {
            tell!("left out of --prompts: {left_out}");
        }
        let chains = chains(texts, rounds);
        Ok(Workload::Corpus(Box::new(Corpus { chains, writer, prompt_tokens_max })))
    }

    /// The prompts that are asked first: one of each chain.
    ///
    /// # Panics
    /// If a chain has no text.
    pub(super) fn first(&self) -> Vec<Vec<u32>> {
        match self {
            Workload::Random(prompts) => prompts.clone(),
            Workload::Corpus(corpus) => {
                let prompts = (0..corpus.chains.len()).map(|chain| corpus.prompt(chain).tokens);
                prompts.collect()
            }
        }
    }

    /// Has everything answered, and waits for it.
    ///
    /// # Errors
    /// If a request fails.
    pub(super) fn run(mut self, queue: &Queue, new_tokens_max: usize) -> Result<Answered> {
        let (woken, wakes) = unbounded();
        let mut handle = queue.open(Arc::new(move || {
            let _ = woken.send(()); // nobody listens at the end
        }));
        let mut waiting: VecDeque<(u64, Vec<u32>)> = (0..).zip(self.first()).collect();
        let (mut answered, mut in_flight) = (Answered::default(), 0);
        while !waiting.is_empty() || in_flight > 0 {
            while let Some((key, tokens)) = waiting.pop_front() {
                match handle.submit(Request { key, tokens, new_tokens_max }) {
                    Ok(()) => in_flight += 1,
                    Err(request) => {
                        waiting.push_front((request.key, request.tokens));
                        break;
                    }
                }
            }
            wakes.recv().context("the engine is gone")?;
            while let Some(completion) = handle.poll() {
                in_flight -= 1;
                let key = completion.key;
                if let Some(tokens) = self.take(completion, &mut answered)? {
                    waiting.push_front((key, tokens)); // what the engine holds of it is still there
                }
            }
        }
        Ok(answered)
    }

    /// Takes an answer in; returns the next prompt of its chain.
    fn take(
        &mut self,
        completion: Completion,
        answered: &mut Answered,
    ) -> Result<Option<Vec<u32>>> {
        if let Finish::Failed(reason) = &completion.finish {
            bail!("request {} failed: {reason}", completion.key);
        }
        let index = completion.key as usize;
        match self {
            Workload::Random(prompts) => {
                answered.count(&prompts[index], &completion.tokens);
                Ok(None)
            }
            Workload::Corpus(corpus) => {
                let prompt = corpus.prompt(index);
                answered.count(&prompt.tokens, &completion.tokens);
                let generation = Generation {
                    text: corpus.writer.tokenizer().decode(&completion.tokens),
                    finish: completion.finish,
                    tokens: completion.tokens.len() as u64,
                };
                let chain = &mut corpus.chains[index];
                chain.accept(&prompt, &generation);
                Ok(chain.prompt(&corpus.writer, corpus.prompt_tokens_max).map(|next| next.tokens))
            }
        }
    }
}

impl Corpus {
    fn prompt(&self, chain: usize) -> Prompt {
        let prompt = self.chains[chain].prompt(&self.writer, self.prompt_tokens_max);
        prompt.expect("a chain that is asked for has a text waiting")
    }
}
