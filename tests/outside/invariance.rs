//! The bundled synthesizer gives each request one answer, however its engine is used.

use crossbeam_channel::unbounded;
use headwater::engine::metrics::EngineCounters;
use headwater::engine::schedule::{Means, PrefixReuse, Speculation};
use headwater::engine::{self, EngineSettings};
use headwater::format::documents::{Documents, Found};
use headwater::format::jsonl::Fields;
use headwater::model::cache::Cache;
use headwater::prompt::PromptWriter;
use headwater::synthesizer::{Queue, Request, Synthesizer};
use headwater_pipelines::shell::models::{BUNDLED, Model};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Two prompts each: a text, and the next one behind it with its pairs.
const CHAINS: usize = 250;
/// Tokens of an answer, which nothing ends before. Ten in a hundred, one behind the other, go on for longer: through
/// several blocks of the cache.
const NEW_TOKENS: [usize; 2] = [10, 150];
/// Bytes of a text: the beginnings of the samples.
const TEXT_BYTES: usize = 180;

/// One at a time, each computed anew.
const ALONE: EngineSettings = EngineSettings {
    sequences_max: 1,
    step_tokens_max: 1024,
    cache_bytes: 256 << 20,
    queue_max: 64,
    means: Means { prefix_reuse: PrefixReuse::Off, speculation: Speculation::Off },
};

/// Many at a time, with all there is to make it faster.
const TOGETHER: EngineSettings = EngineSettings {
    sequences_max: 32,
    step_tokens_max: 100,
    means: Means { prefix_reuse: PrefixReuse::On, speculation: Speculation::Always },
    ..ALONE
};

/// The beginnings of the bundled samples.
fn texts() -> Vec<String> {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/samples");
    let files = ["biomedicine.xml", "finance.jsonl", "general.jsonl"];
    let files = files.map(|name| samples.join(name)).to_vec();
    let texts: Vec<String> = Documents::new(files, "samples", Fields::detected())
        .filter_map(|found| match found {
            Found::Document(document) => Some(document.text),
            _ => None,
        })
        .collect();
    let pieces = texts.iter().flat_map(|text| {
        let end = text.floor_char_boundary(2 * TEXT_BYTES);
        let middle = text.floor_char_boundary(TEXT_BYTES.min(end));
        [&text[..middle], &text[middle..end]]
    });
    let pieces: Vec<String> = pieces.filter(|text| text.len() > 50).map(String::from).collect();
    assert!(pieces.len() >= 2 * CHAINS, "{} pieces of text", pieces.len());
    pieces
}

/// The answers of one or several engines to all prompts, and what these counted.
fn generate(
    settings: EngineSettings,
    engines: usize,
    prompts: &[Vec<u32>],
) -> (BTreeMap<u64, Vec<u32>>, BTreeMap<&'static str, u64>) {
    let synthesizer = Model::trained(BUNDLED).unwrap();
    let counters = Arc::new(EngineCounters::default());
    let queues = (0..engines).map(|_| {
        let model = synthesizer.load(&candle_core::Device::Cpu).unwrap();
        let failed = |error| panic!("{error}");
        engine::start(model, Vec::new(), settings, counters.clone(), failed).unwrap().0
    });
    let (woken, wakes) = unbounded();
    let mut handle = Queue::over(queues).open(Arc::new(move || {
        let _ = woken.send(());
    }));
    let request = |(key, tokens): (usize, &Vec<u32>)| Request {
        key: key as u64,
        tokens: tokens.clone(),
        new_tokens_max: NEW_TOKENS[usize::from(key / 10 % 10 == 0)],
    };
    let mut waiting: Vec<Request> = prompts.iter().enumerate().map(request).rev().collect();
    let mut answers = BTreeMap::new();
    while answers.len() < prompts.len() {
        while let Some(request) = waiting.pop() {
            if let Err(refused) = handle.submit(request) {
                waiting.push(refused);
                break;
            }
        }
        wakes.recv().unwrap();
        answers.extend(std::iter::from_fn(|| handle.poll()).map(|one| (one.key, one.tokens)));
    }
    (answers, counters.figures().into())
}

/// Prompts of two rounds: the second goes on from the first and its answer, as it was generated.
fn prompts() -> (Vec<Vec<u32>>, BTreeMap<u64, Vec<u32>>) {
    let writer = PromptWriter::new(Model::trained(BUNDLED).unwrap().tokenizer).unwrap();
    let texts = texts();
    let mut prompts: Vec<Vec<u32>> =
        texts.iter().take(CHAINS).map(|text| writer.question(text)).collect();
    let (answers, _) = generate(ALONE, 1, &prompts);
    for ((text, first), answer) in texts[CHAINS..].iter().zip(0..CHAINS).zip(answers.values()) {
        let first = prompts[first].clone();
        prompts.push([first, answer.clone(), vec![writer.eos()], writer.question(text)].concat());
    }
    let (answers, _) = generate(ALONE, 1, &prompts);
    (prompts, answers)
}

#[test]
fn five_hundred_prompts_have_one_answer_each() {
    let (prompts, alone) = prompts();
    assert_eq!(prompts.len(), 500);
    let config = Model::trained(BUNDLED).unwrap().config;
    let block = Cache::block_bytes(&config, candle_core::DType::F32);
    let context = config.max_position_embeddings / headwater::kernels::cached::BLOCK;
    let narrow = EngineSettings { cache_bytes: (context + 4) * block, ..TOGETHER };
    for (settings, engines) in [(TOGETHER, 1), (narrow, 1), (TOGETHER, 2)] {
        let (found, counts) = generate(settings, engines, &prompts);
        assert!(found == alone, "{engines} engines change answers: {settings:?}");
        assert!(counts["accepted_tokens"] > 100, "{counts:?}");
        assert!(settings != narrow || counts["preemptions"] > 0, "{counts:?}");
        assert!(settings == narrow || counts["cached_tokens"] > 5000, "{counts:?}");
    }
}
