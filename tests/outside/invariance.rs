//! The bundled synthesizer gives each request one answer, however its engine is used.

use crossbeam_channel::unbounded;
use headwater::engine::metrics::EngineCounters;
use headwater::engine::schedule::{Means, PrefixReuse, Speculation};
use headwater::engine::{self, EngineSettings};
use headwater::format::documents::{Documents, Found};
use headwater::format::jsonl::Fields;
use headwater::model::cache::Cache;
use headwater::model::precision::Precision;
use headwater::prompt::PromptWriter;
use headwater::synthesizer::{Queue, Request, Synthesizer};
use headwater_pipelines::shell::models::{BUNDLED, Model};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Two prompts each: the beginning of a text, and another one behind it with its pairs.
const CHAINS: usize = 250;
/// Three prompts each, of whole texts: as long as those of a corpus.
const WHOLE_CHAINS: usize = 10;
/// Tokens of an answer, which nothing ends before. Ten in a hundred, one behind the other, and those of whole texts go on
/// for longer: through several blocks of the cache.
const NEW_TOKENS: [usize; 2] = [10, 150];
/// Bytes of the beginning of a text.
const TEXT_BYTES: usize = 180;
/// Tokens of a prompt at most whose texts are no whole ones.
const BEGUN_TOKENS: usize = 320;
/// Bytes of a whole text: of three, a chain keeps to the context of the synthesizer.
const WHOLE_BYTES: std::ops::Range<usize> = 900..1400;

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

/// The bundled samples: of each chain, one text behind the other.
fn chains() -> Vec<Vec<String>> {
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
    let (first, second) = pieces[..2 * CHAINS].split_at(CHAINS);
    let begun = first.iter().zip(second).map(|(first, second)| vec![first.clone(), second.clone()]);
    let whole = texts.iter().filter(|text| WHOLE_BYTES.contains(&text.len())).cloned();
    let whole: Vec<String> = whole.take(3 * WHOLE_CHAINS).collect();
    assert_eq!(whole.len(), 3 * WHOLE_CHAINS, "whole texts");
    begun.chain(whole.chunks(3).map(<[String]>::to_vec)).collect()
}

/// The answers of one or several engines to prompts with the keys from `first`, and what these counted.
fn generate(
    synthesizer: &Model,
    settings: EngineSettings,
    engines: usize,
    first: usize,
    prompts: &[Vec<u32>],
) -> (BTreeMap<u64, Vec<u32>>, BTreeMap<&'static str, u64>) {
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
        new_tokens_max: NEW_TOKENS[usize::from(key / 10 % 10 == 0 || tokens.len() > BEGUN_TOKENS)],
    };
    let mut waiting: Vec<Request> = (first..).zip(prompts).map(request).collect();
    waiting.reverse();
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

/// The prompts of all rounds, and the answer of each alone: a round goes on from the one before and its answers, as they
/// were generated.
fn prompts() -> (Vec<Vec<u32>>, BTreeMap<u64, Vec<u32>>) {
    let synthesizer = Model::trained(BUNDLED).unwrap();
    let writer = PromptWriter::new(synthesizer.tokenizer.clone()).unwrap();
    let chains = chains();
    let mut so_far = vec![Vec::new(); chains.len()];
    let (mut prompts, mut alone) = (Vec::new(), BTreeMap::new());
    for round in 0.. {
        let asked: Vec<usize> =
            (0..chains.len()).filter(|&chain| round < chains[chain].len()).collect();
        if asked.is_empty() {
            break;
        }
        let first = prompts.len();
        for &chain in &asked {
            so_far[chain].extend(writer.question(&chains[chain][round]));
            prompts.push(so_far[chain].clone());
        }
        let (answers, _) = generate(&synthesizer, ALONE, 1, first, &prompts[first..]);
        for (&chain, answer) in asked.iter().zip(answers.values()) {
            so_far[chain].extend(answer.iter().chain([&writer.eos()]));
        }
        alone.extend(answers);
    }
    (prompts, alone)
}

/// Settings that differ from one request at a time in one thing each, and in all.
fn ways() -> [EngineSettings; 6] {
    let [reuse, guesses, both] = [
        (PrefixReuse::On, Speculation::Off),
        (PrefixReuse::Off, Speculation::Always),
        (PrefixReuse::On, Speculation::Auto),
    ]
    .map(|(prefix_reuse, speculation)| Means { prefix_reuse, speculation });
    [
        EngineSettings { sequences_max: 32, step_tokens_max: 4096, ..ALONE },
        EngineSettings { step_tokens_max: 37, ..ALONE },
        EngineSettings { sequences_max: 32, step_tokens_max: 512, means: reuse, ..ALONE },
        EngineSettings { sequences_max: 32, step_tokens_max: 512, means: guesses, ..ALONE },
        EngineSettings { sequences_max: 8, step_tokens_max: 256, means: both, ..ALONE },
        TOGETHER,
    ]
}

/// The same with so few blocks that sequences lose theirs.
fn narrow() -> EngineSettings {
    let config = Model::trained(BUNDLED).unwrap().config;
    let block = Cache::block_bytes(&config, candle_core::DType::F32);
    let context = config.max_position_embeddings / headwater::kernels::cached::BLOCK;
    EngineSettings { cache_bytes: (context + 4) * block, ..TOGETHER }
}

/// Answers of engines are those of each alone, and what the settings allow for did happen.
fn check(
    synthesizer: &Model,
    (settings, engines): (EngineSettings, usize),
    prompts: &[Vec<u32>],
    alone: &BTreeMap<u64, Vec<u32>>,
) {
    let (found, counts) = generate(synthesizer, settings, engines, 0, prompts);
    assert!(found == *alone, "{engines} engines change answers: {settings:?}");
    let Means { prefix_reuse, speculation } = settings.means;
    let is_narrow = settings == narrow();
    assert_eq!(counts["accepted_tokens"] > 100, speculation != Speculation::Off, "{counts:?}");
    assert_eq!(counts["preemptions"] > 0, is_narrow, "{counts:?}");
    let reuses = prefix_reuse == PrefixReuse::On;
    assert!(is_narrow || (counts["cached_tokens"] > 5000) == reuses, "{counts:?}");
}

#[test]
fn more_than_five_hundred_prompts_have_one_answer_each() {
    let (prompts, alone) = prompts();
    assert_eq!(prompts.len(), 2 * CHAINS + 3 * WHOLE_CHAINS);
    let longest = prompts.iter().map(Vec::len).max().unwrap();
    let synthesizer = Model::trained(BUNDLED).unwrap();
    let context = synthesizer.config.max_position_embeddings;
    assert!((1000..context - NEW_TOKENS[1]).contains(&longest), "{longest}");
    for settings in ways() {
        check(&synthesizer, (settings, 1), &prompts, &alone);
    }
    check(&synthesizer, (narrow(), 1), &prompts, &alone);
    check(&synthesizer, (TOGETHER, 2), &prompts, &alone);
}

#[test]
fn in_16_and_8_bits_too_they_have_one_answer_each() {
    let (prompts, _) = prompts();
    for precision in [Precision::Bf16, Precision::Int8] {
        let mut synthesizer = Model::trained(BUNDLED).unwrap();
        synthesizer.precision = precision;
        let (alone, _) = generate(&synthesizer, ALONE, 1, 0, &prompts);
        check(&synthesizer, (TOGETHER, 1), &prompts, &alone);
    }
}
