//! The answer to a request is the same whatever happens around it: the engine as a whole, with a small
//! model of random weights.

use super::schedule::Speculation;
use super::*;
use crate::kernels::cuda::testing::{Tested, machines};
use crate::kernels::packed::WeightType;
use crate::model::Form;
use crate::model::config::ModelConfig;
use crate::model::shape::Shape;
use crate::seed;
use crate::synthesizer::{Request, Synthesizer};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

const VOCABULARY: usize = 97;
const END: u32 = 3;

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: VOCABULARY,
        max_position_embeddings: 512,
        num_hidden_layers: 2,
        ..Shape::named("2m").unwrap().config()
    }
}

fn parameter(name: &str, shape: &[usize]) -> Result<Tensor> {
    let mut stream = seed::stream(5, name, "engine test");
    // What is far away counts for little, so that the model falls into repeating itself.
    let scale = if name.contains("o_proj") { 0.03 } else { 0.3 };
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| scale * stream.normal() as f32).collect();
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
    Ok(if name.contains("norm") { (tensor + 1.0)? } else { tensor })
}

fn model(form: Form) -> Llama {
    Llama::build(&config(), form, &Device::Cpu, parameter).unwrap()
}

/// The model with kernels for GPUs.
fn model_on(machine: &Tested, dtype: DType) -> Llama {
    let narrow = |name: &str, shape: &[usize]| Ok(parameter(name, shape)?.to_dtype(dtype)?);
    Llama::build_on(&config(), machine.machine.clone(), narrow).unwrap()
}

/// A prompt with its limit.
type Ask = (Vec<u32>, usize);
/// What was generated, and how it ended.
type Answer = (Vec<u32>, Finish);

/// Prompts of all lengths. Some go on from others, some repeat themselves, so that there is something to
/// find again and to guess from.
fn prompts() -> Vec<Ask> {
    let mut stream = seed::stream(9, "prompts", "engine test");
    let mut prompts: Vec<Ask> = Vec::new();
    for index in 0..48 {
        let length = 1 + stream.index(150);
        let mut tokens: Vec<u32> = match index % 4 {
            0 => Vec::new(),
            _ => prompts[index - 1].0.clone(),
        };
        tokens.extend((0..length).map(|_| stream.index(VOCABULARY) as u32));
        if index % 3 == 0 {
            let again = tokens.clone();
            tokens.extend(again);
        }
        tokens.truncate(400);
        prompts.push((tokens, 5 + index * 7 % 100));
    }
    prompts
}

/// Has an engine answer all, and gives its counts.
fn generate(
    settings: EngineSettings,
    asked: &[Ask],
    ends: &[u32],
) -> (Vec<Answer>, BTreeMap<&'static str, u64>) {
    generate_with(model(Form::Packed), settings, asked, ends)
}

fn generate_with(
    model: Llama,
    settings: EngineSettings,
    asked: &[Ask],
    ends: &[u32],
) -> (Vec<Answer>, BTreeMap<&'static str, u64>) {
    let counters = Arc::new(EngineCounters::default());
    let failed = |error| panic!("{error}");
    let started = start(model, ends.to_vec(), settings, counters.clone(), failed).unwrap();
    let (queue, thread) = started;
    let (woken, wakes) = crossbeam_channel::unbounded();
    let mut handle = queue.open(Arc::new(move || {
        let _ = woken.send(());
    }));
    drop(queue);
    let mut answers = vec![None; asked.len()];
    let (mut sent, mut done) = (0, 0);
    while done < asked.len() {
        while sent < asked.len() {
            let (tokens, new_tokens_max) = asked[sent].clone();
            match handle.submit(Request { key: sent as u64, tokens, new_tokens_max }) {
                Ok(()) => sent += 1,
                Err(_) => break,
            }
        }
        wakes.recv().unwrap();
        while let Some(completion) = handle.poll() {
            answers[completion.key as usize] = Some((completion.tokens, completion.finish));
            done += 1;
        }
    }
    drop(handle);
    thread.join().unwrap();
    (answers.into_iter().map(Option::unwrap).collect(), BTreeMap::from(counters.figures()))
}

/// One after the other, each computed anew.
const ALONE: EngineSettings = EngineSettings {
    sequences_max: 1,
    step_tokens_max: 512,
    cache_bytes: 64 << 20,
    queue_max: 4,
    means: Means { prefix_reuse: PrefixReuse::Off, speculation: Speculation::Off },
};

const ALL: Means = Means { prefix_reuse: PrefixReuse::On, speculation: Speculation::Always };

/// Answers under some settings are those of each request alone; the counts.
fn check(settings: EngineSettings) -> BTreeMap<&'static str, u64> {
    check_all(settings, &prompts(), &[END])
}

fn check_all(settings: EngineSettings, asked: &[Ask], ends: &[u32]) -> BTreeMap<&'static str, u64> {
    let (found, counts) = generate(settings, asked, ends);
    let (alone, _) = generate(ALONE, asked, ends);
    assert!(found == alone, "{settings:?} changes answers");
    counts
}

#[test]
fn an_answer_does_not_depend_on_its_company_or_its_chunks() {
    for (sequences_max, step_tokens_max) in [(1, 7), (4, 33), (24, 64), (24, 4096)] {
        check(EngineSettings { sequences_max, step_tokens_max, ..ALONE });
    }
}

#[test]
fn in_16_and_8_bits_too_an_answer_does_not_depend_on_its_company() {
    for kind in [WeightType::Bf16, WeightType::BlockFloat, WeightType::Int8] {
        let answers = |settings, asked: &[Ask], ends: &[u32]| {
            generate_with(model(Form::PackedAs(kind)), settings, asked, ends)
        };
        let (alone, _) = answers(ALONE, &prompts(), &[END]);
        for (sequences_max, step_tokens_max) in [(24, 64), (3, 50)] {
            let settings = EngineSettings { sequences_max, step_tokens_max, means: ALL, ..ALONE };
            let (found, counts) = answers(settings, &prompts(), &[END]);
            assert!(found == alone, "answers differ in {kind:?}, {settings:?}");
            assert!(counts["drafted_tokens"] > 0 && counts["cached_tokens"] > 0, "{counts:?}");
        }
    }
}

#[test]
fn an_answer_does_not_depend_on_what_the_cache_holds_already() {
    let means = Means { prefix_reuse: PrefixReuse::On, ..ALONE.means };
    for (sequences_max, step_tokens_max) in [(1, 512), (3, 50)] {
        let settings = EngineSettings { sequences_max, step_tokens_max, means, ..ALONE };
        assert!(check(settings)["cached_tokens"] > 1000);
    }
}

#[test]
fn an_answer_does_not_depend_on_guesses() {
    for speculation in [Speculation::Always, Speculation::Auto] {
        let means = Means { speculation, ..ALONE.means };
        for (sequences_max, step_tokens_max) in [(1, 512), (6, 40)] {
            let settings = EngineSettings { sequences_max, step_tokens_max, means, ..ALONE };
            let counts = check(settings);
            assert!(counts["drafted_tokens"] > counts["accepted_tokens"]);
        }
    }
}

#[test]
fn an_answer_does_not_depend_on_how_often_it_is_sent_back() {
    let block = Cache::block_bytes(&model(Form::Packed).config, candle_core::DType::F32);
    // Short prompts with long answers: more are admitted than can grow.
    let short = |(mut tokens, _): Ask| {
        tokens.truncate(60);
        (tokens, 150)
    };
    let asked: Vec<Ask> = prompts().into_iter().map(short).collect();
    for means in [ALL, ALONE.means] {
        let cache_bytes = 10 * block; // one context is 8
        let settings =
            EngineSettings { sequences_max: 8, step_tokens_max: 96, cache_bytes, means, ..ALONE };
        let counts = check_all(settings, &asked, &[]);
        assert!(counts["preemptions"] > 0, "{counts:?}");
    }
}

#[test]
fn answers_equal_those_of_computing_each_text_anew() {
    use crate::model::backward::Batch;
    let plain = model(Form::Plain);
    let asked = prompts();
    let (answers, _) =
        generate(EngineSettings { sequences_max: 4, means: ALL, ..ALONE }, &asked, &[END]);
    for ((prompt, limit), (tokens, finish)) in asked.iter().zip(&answers).take(6) {
        let mut all = prompt.clone();
        for &token in tokens.iter().take(8) {
            // The token that was chosen costs least among all.
            let loss = |next: u32| {
                let mut ids = all.clone();
                ids.push(next);
                let rows = ids.len();
                let batch = Batch {
                    positions: (0..rows as u32).collect(),
                    spans: std::iter::once(0..rows).collect(),
                    rows: vec![rows as u32 - 2],
                    targets: vec![next],
                    ids,
                    ..Batch::default()
                };
                plain.losses(&batch).unwrap()[0]
            };
            let chosen = loss(token);
            assert!((0..VOCABULARY as u32).step_by(5).all(|next| loss(next) >= chosen - 1e-4));
            all.push(token);
        }
        assert!(tokens.len() <= *limit && (*finish == Finish::Stop || tokens.len() == *limit));
    }
}

/// A few prompts that an emulated machine comes through: some repeat themselves, some go on from others.
fn few() -> Vec<Ask> {
    let mut stream = seed::stream(9, "few prompts", "engine test");
    let mut random =
        |length| -> Vec<u32> { (0..length).map(|_| stream.index(VOCABULARY) as u32).collect() };
    let again = random(35).repeat(2);
    let further = [again.clone(), random(9)].concat();
    let furthest = [again.clone(), random(3)].concat();
    let prompts = [again, random(1), random(30), further, random(66), furthest];
    prompts.into_iter().map(|prompt| (prompt, 24)).collect()
}

#[test]
fn kernels_for_gpus_answer_as_the_cpu_does() {
    let settings = EngineSettings { sequences_max: 5, step_tokens_max: 90, means: ALL, ..ALONE };
    // Without guesses each step is launched before the tokens of the one before are known.
    let ahead = Means { speculation: Speculation::Off, ..ALL };
    let (alone, _) = generate(ALONE, &few(), &[END]);
    assert!(alone.iter().any(|(_, finish)| *finish == Finish::Stop), "some are closed");
    for machine in machines() {
        for settings in [settings, EngineSettings { means: ahead, ..settings }] {
            let model = model_on(&machine, DType::F32);
            let (found, counts) = generate_with(model, settings, &few(), &[END]);
            assert!(found == alone, "answers differ on {}", machine.name);
            assert!(counts["cached_tokens"] > 0, "{counts:?}");
            let guesses = settings.means == ALL;
            assert_eq!(counts["drafted_tokens"] > 0, guesses, "{counts:?}");
            assert!(guesses || 2 * counts["steps_ahead"] > counts["steps"], "{counts:?}");
        }
    }
}

#[test]
fn in_bf16_gpus_serve_all_and_mostly_say_what_the_cpu_does() {
    let twin = generate_with(model(Form::PackedAs(WeightType::Bf16)), ALONE, &few(), &[END]).0;
    for machine in machines() {
        let settings =
            EngineSettings { sequences_max: 5, step_tokens_max: 40, means: ALL, ..ALONE };
        let model = model_on(&machine, DType::BF16);
        let (found, counts) = generate_with(model, settings, &few(), &[END]);
        assert!(counts["drafted_tokens"] > 0 && counts["cached_tokens"] > 0, "{counts:?}");
        assert!(found.iter().all(|(_, finish)| matches!(finish, Finish::Stop | Finish::Length)));
        // Sums of another order may choose another token of two that are close, and all behind it differ.
        let first = |answers: &[Answer]| -> Vec<Option<u32>> {
            answers.iter().map(|(tokens, _)| tokens.first().copied()).collect()
        };
        let same =
            first(&found).iter().zip(first(&twin)).filter(|(one, twin)| *one == twin).count();
        assert!(
            2 * same > twin.len(),
            "{same} of {} begin the same on {}",
            twin.len(),
            machine.name
        );
    }
}

#[test]
fn in_bf16_too_an_answer_does_not_depend_on_its_company() {
    // cuBLAS may compute a product differently in another batch; everything else may not.
    for machine in machines().into_iter().filter(|machine| machine.is_invariant).take(1) {
        let answers =
            |settings| generate_with(model_on(&machine, DType::BF16), settings, &few(), &[END]);
        let (alone, _) = answers(ALONE);
        let (found, counts) =
            answers(EngineSettings { sequences_max: 5, step_tokens_max: 40, means: ALL, ..ALONE });
        assert!(counts["drafted_tokens"] > 0 && counts["cached_tokens"] > 0, "{counts:?}");
        assert!(found == alone, "answers differ on {}", machine.name);
    }
}

#[test]
fn what_cannot_be_served_fails_alone() {
    let asked = [(vec![5; 600], 5), (vec![], 5), (vec![5; 10], 5)];
    let (answers, _) = generate(ALONE, &asked, &[END]);
    let failed = answers.iter().map(|(_, finish)| matches!(finish, Finish::Failed(_)));
    assert_eq!(failed.collect::<Vec<_>>(), [true, true, false]);
}
