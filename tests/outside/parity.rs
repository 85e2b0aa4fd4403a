//! Our model computes what Hugging Face transformers, PyTorch and candle-transformers compute.
//!
//! `tests/record_parity.py` recorded what is in `tests/data/parity`: logits, greedy continuations and
//! gradients of small random models of every kind we load.

use candle_core::{DType, Device, IndexOp, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral};
use crossbeam_channel::unbounded;
use headwater::engine::metrics::EngineCounters;
use headwater::engine::schedule::{Means, PrefixReuse, Speculation};
use headwater::engine::{self, EngineSettings};
use headwater::kernels::attention::attention;
use headwater::kernels::cross_entropy::Objective;
use headwater::model::Llama;
use headwater::model::backward::{Batch, Gradients, Keep, Learning};
use headwater::model::config::ModelConfig;
use headwater::model::precision::Precision;
use headwater::model::weights::Weights;
use headwater::record::{Segment, Sequence};
use headwater::seed::stream;
use headwater::synthesizer::{Request, Synthesizer};
use headwater::tokenizer::Tokenizer;
use headwater::train::optimizer::AdamW;
use headwater::train::schedule::{Decay, Schedule};
use headwater::train::{self, TrainSettings, Trainer, loaded};
use headwater_pipelines::shell::models::{BUNDLED, Model};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const MODELS: [&str; 5] = [
    "llama-grouped-f32",
    "llama-tied-f32",
    "llama3-rope-sharded-bf16",
    "mistral-window-f16",
    "mistral-tied-window-f32",
];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/parity").join(name)
}

/// A model, and what was recorded of it.
struct Recorded {
    config: ModelConfig,
    weights: Weights,
    values: HashMap<String, Tensor>,
}

impl Recorded {
    fn open(name: &str) -> Self {
        Self::with(name, "recorded.safetensors")
    }

    fn with(name: &str, file: &str) -> Self {
        let config = ModelConfig::read(&folder(name)).unwrap();
        let weights = Weights::open(&folder(name)).unwrap();
        let path = folder(name).join(file);
        Recorded {
            config,
            weights,
            values: candle_core::safetensors::load(path, &Device::Cpu).unwrap(),
        }
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.values[name].to_dtype(DType::U32).unwrap().to_vec1().unwrap()
    }

    /// A row of packed items.
    fn sequence(&self, index: usize) -> Sequence {
        let segment = |length| Segment { item: String::new(), source: 0, offset: 0, length };
        Sequence {
            tokens: self.ids(&format!("tokens.{index}")),
            learned: self.ids(&format!("learned.{index}")).iter().map(|&flag| flag > 0).collect(),
            segments: self.ids(&format!("lengths.{index}")).into_iter().map(segment).collect(),
            ..Sequence::default()
        }
    }

    fn prompts(&self) -> Vec<Vec<u32>> {
        (0..)
            .map_while(|i| {
                let name = format!("ids.{i}");
                self.values.contains_key(&name).then(|| self.ids(&name))
            })
            .collect()
    }
}

/// All prompts below each other, without padding.
fn ragged(prompts: &[Vec<u32>]) -> Batch {
    let mut batch = Batch::default();
    for prompt in prompts {
        let row = batch.ids.len();
        for i in 1..prompt.len() {
            batch.rows.push((row + i - 1) as u32);
            batch.targets.push(prompt[i]);
        }
        batch.ids.extend(prompt);
        batch.positions.extend(0..prompt.len() as u32);
        batch.spans.push(row..row + prompt.len());
    }
    batch
}

fn logits(model: &Llama, batch: &Batch) -> Tensor {
    let heads = model.config.heads();
    let attend = |_, [q, k, v]: &[Tensor; 3]| Ok(attention(q, k, v, &batch.spans, &heads)?.output);
    let x = model.forward(&batch.ids, &batch.positions, attend).unwrap();
    model.logits(&x).unwrap()
}

fn farthest(left: &Tensor, right: &Tensor) -> f32 {
    let difference = (left - right).unwrap().abs().unwrap();
    difference.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

#[test]
fn logits_of_ragged_batches_are_those_of_transformers() {
    for name in MODELS {
        let recorded = Recorded::open(name);
        let prompts = recorded.prompts();
        assert_eq!(prompts.iter().map(Vec::len).collect::<Vec<_>>(), [1, 4, 17, 50]);
        let batch = ragged(&prompts);
        let config = &recorded.config;
        let model = Llama::load(config, &recorded.weights, Precision::F32, &Device::Cpu).unwrap();
        let found = logits(&model, &batch);
        for (index, span) in batch.spans.iter().enumerate() {
            let expected = &recorded.values[&format!("logits.{index}")];
            let found = found.i(span.clone()).unwrap();
            let error = farthest(&found, expected);
            assert!(error < 2e-4, "{name}, prompt {index}: {error}");
        }
    }
}

#[test]
fn greedy_generation_in_a_batch_is_that_of_transformers_one_by_one() {
    for name in MODELS {
        let recorded = Recorded::open(name);
        let config = &recorded.config;
        let model = Llama::load(config, &recorded.weights, Precision::F32, &Device::Cpu).unwrap();
        let prompts = recorded.prompts();
        let new_tokens_max = recorded.ids("greedy.0").len();
        let found = generate(model, &prompts, new_tokens_max);
        for (index, tokens) in found.iter().enumerate() {
            assert_eq!(*tokens, recorded.ids(&format!("greedy.{index}")), "{name}, prompt {index}");
        }
    }
}

fn generate(model: Llama, prompts: &[Vec<u32>], new_tokens_max: usize) -> Vec<Vec<u32>> {
    let settings = EngineSettings {
        sequences_max: 3,
        step_tokens_max: 16,
        cache_bytes: 1 << 24,
        queue_max: 16,
        means: Means { prefix_reuse: PrefixReuse::On, speculation: Speculation::Always },
    };
    let counters = Arc::new(EngineCounters::default());
    let (queue, _) =
        engine::start(model, Vec::new(), settings, counters, |error| panic!("{error}")).unwrap();
    let (woken, wakes) = unbounded();
    let mut handle = queue.open(Arc::new(move || {
        let _ = woken.send(());
    }));
    for (key, prompt) in (0..).zip(prompts) {
        let request = Request { key, tokens: prompt.clone(), new_tokens_max };
        handle.submit(request).unwrap();
    }
    let mut answers = BTreeMap::new();
    while answers.len() < prompts.len() {
        wakes.recv_timeout(Duration::from_secs(60)).unwrap();
        answers.extend(std::iter::from_fn(|| handle.poll()).map(|one| (one.key, one.tokens)));
    }
    answers.into_values().collect()
}

#[test]
fn losses_and_gradients_are_those_of_pytorch() {
    for name in MODELS {
        let recorded = Recorded::open(name);
        check_gradients(name, &recorded, &ragged(&recorded.prompts()));
    }
}

/// Rows with several items and tokens that are not learned, as the trainer takes them from shards.
#[test]
fn losses_and_gradients_of_packed_sequences_are_those_of_pytorch() {
    for name in MODELS {
        let recorded = Recorded::with(name, "packed.safetensors");
        let sequences: Vec<Sequence> = (0..2).map(|index| recorded.sequence(index)).collect();
        assert_eq!(sequences.iter().map(|row| row.segments.len()).collect::<Vec<_>>(), [3, 1]);
        let batch = train::batch(&sequences);
        assert!(batch.targets.len() < 3 + 16 + 49, "some tokens are not learned");
        check_gradients(name, &recorded, &batch);
    }
}

/// Compares loss and gradients of a batch with what was recorded of it: those of the pass that CPUs train with, and
/// those of the pass in tensors.
fn check_gradients(name: &str, recorded: &Recorded, batch: &Batch) {
    let config = &recorded.config;
    let values = loaded(config, &recorded.weights, &Device::Cpu).unwrap();
    let by_name: HashMap<String, Tensor> = values.iter().cloned().collect();
    let form = headwater::model::Form::Plain;
    let model =
        Llama::build(config, form, &Device::Cpu, |name, _| Ok(by_name[name].clone())).unwrap();
    let objective = Objective::scaled(1.0 / batch.targets.len() as f64);
    for keep in [Keep::Everything, Keep::Inputs] {
        let mut gradients = Gradients::default();
        let learning = Learning { objective, keep, dropout: None };
        let losses = model.learn(batch, learning, &mut gradients).unwrap();
        check_recorded(&format!("{name} in tensors"), recorded, &losses, &gradients);
        let place = (DType::F32, &Device::Cpu);
        let (losses, gradients) =
            train::gradients(config, values.clone(), place, batch, learning).unwrap();
        check_recorded(&format!("{name} on a CPU"), recorded, &losses, &gradients);
    }
}

fn check_recorded(name: &str, recorded: &Recorded, losses: &[f64], gradients: &Gradients) {
    let loss = losses.iter().sum::<f64>() / losses.len() as f64;
    let expected: Vec<f32> = recorded.values["loss"].to_vec1().unwrap();
    assert!((loss - f64::from(expected[0])).abs() < 1e-5, "{name}: {loss} {expected:?}");
    let mut seen = 0;
    for (parameter, found) in gradients.iter() {
        let expected = &recorded.values[&format!("gradient.{parameter}")];
        let error = farthest(found, expected);
        let largest = farthest(expected, &expected.zeros_like().unwrap());
        assert!(error < 1e-4 * largest + 1e-6, "{name}: {parameter} {error} of {largest}");
        seen += 1;
    }
    assert_eq!(seen, recorded.config.parameters().len());
}

#[test]
fn logits_are_those_of_candle_transformers_on_fresh_prompts() {
    let theirs_loads = |name: &&str| *name != "mistral-tied-window-f32"; // it ties no heads of Mistral
    for (number, name) in MODELS.into_iter().filter(theirs_loads).enumerate() {
        let recorded = Recorded::open(name);
        let config = &recorded.config;
        let model = Llama::load(config, &recorded.weights, Precision::F32, &Device::Cpu).unwrap();
        let mut draw = stream(number as u64, name, "prompts");
        let lengths = [1, 2, 9, 33, 60];
        let mut id = || 3 + draw.below(94) as u32;
        let prompts: Vec<Vec<u32>> =
            lengths.iter().map(|&length| (0..length).map(|_| id()).collect()).collect();
        let batch = ragged(&prompts);
        let found = logits(&model, &batch);
        let values = loaded(config, &recorded.weights, &Device::Cpu).unwrap();
        let values: HashMap<String, Tensor> = values.into_iter().collect();
        for (prompt, span) in prompts.iter().zip(&batch.spans) {
            let ids = Tensor::new(prompt.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            let expected = theirs(name, config, values.clone(), &ids);
            let error = farthest(&found.i(span.end - 1).unwrap(), &expected);
            assert!(error < 2e-4, "{name}, {} tokens: {error}", prompt.len());
        }
    }
}

/// The logits of the last token, as candle-transformers computes them.
fn theirs(
    name: &str,
    config: &ModelConfig,
    values: HashMap<String, Tensor>,
    ids: &Tensor,
) -> Tensor {
    let builder = VarBuilder::from_tensors(values, DType::F32, &Device::Cpu);
    if name.starts_with("mistral") {
        let config = mistral::Config {
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            head_dim: Some(config.head_dim),
            num_key_value_heads: config.num_key_value_heads,
            hidden_act: candle_nn::Activation::Silu,
            max_position_embeddings: config.max_position_embeddings,
            rms_norm_eps: config.rms_norm_eps,
            rope_theta: config.rope_theta,
            sliding_window: config.sliding_window.map(|window| window - 1), // theirs counts the past
            use_flash_attn: false,
        };
        let mut model = mistral::Model::new(&config, builder).unwrap();
        return model.forward(ids, 0).unwrap().flatten_all().unwrap();
    }
    let rope_scaling = name.starts_with("llama3").then_some(llama::Llama3RopeConfig {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
        rope_type: llama::Llama3RopeType::Llama3,
    });
    let config = llama::Config {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        use_flash_attn: false,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope_theta as f32,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling,
        max_position_embeddings: config.max_position_embeddings,
        tie_word_embeddings: config.tie_word_embeddings,
    };
    let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
    let model = llama::Llama::load(builder, &config).unwrap();
    model.forward(ids, 0, &mut cache).unwrap().flatten_all().unwrap()
}

/// Exports to `HEADWATER_EXPORT`, if that is set, for `tests/check_export.py` to look at.
#[test]
fn an_export_is_the_model_that_was_loaded() {
    let place = tempfile::tempdir().unwrap();
    let named = std::env::var_os("HEADWATER_EXPORT").map(PathBuf::from);
    let place = named.unwrap_or_else(|| place.path().to_owned());
    let tokenizer: Tokenizer = Model::trained(BUNDLED).unwrap().tokenizer;
    for name in MODELS {
        let Recorded { config, weights, .. } = Recorded::open(name);
        let values = loaded(&config, &weights, &Device::Cpu).unwrap();
        let settings = TrainSettings {
            batch_sequences: 1,
            micro_batch_tokens: 1,
            schedule: Schedule {
                peak: 1.0,
                warmup_steps: 0,
                total_steps: 1,
                floor_share: 0.1,
                decay: Decay::Cosine,
            },
            optimizer: AdamW {
                beta1: 0.9,
                beta2: 0.95,
                epsilon: 1e-8,
                weight_decay: 0.1,
                clip_norm: 1.0,
            },
            recompute: false,
            z_loss: 0.0,
            dropout: None,
        };
        let trainer =
            Trainer::new(&config, values.clone(), settings, DType::F32, &[Device::Cpu]).unwrap();
        let export = place.join(name);
        trainer.export(&export, &tokenizer, DType::F32).unwrap();
        assert_eq!(ModelConfig::read(&export).unwrap(), config, "{name}");
        let again = loaded(&config, &Weights::open(&export).unwrap(), &Device::Cpu).unwrap();
        for ((name, left), (_, right)) in values.iter().zip(&again) {
            assert_eq!(farthest(left, right), 0.0, "{name}");
        }
    }
}
