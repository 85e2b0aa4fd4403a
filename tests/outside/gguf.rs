//! A GGUF file gives the model that it was made from, or a reason why not.

use super::program::{check, corpus};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::Value;
use candle_core::{Device, Tensor};
use headwater::gguf::Gguf;
use headwater::kernels::attention::attention;
use headwater::model::config::{ModelConfig, RopeScaling};
use headwater::model::precision::Precision;
use headwater::model::weights::Weights;
use headwater::model::{Form, Llama};
use headwater::seed::stream;
use headwater_pipelines::shell::bundled::synthesizer;
use headwater_pipelines::shell::models::{BUNDLED, Model};
use headwater_tests::folders::{assert_same, tree};
use headwater_tests::gguf::{GgufFile, after_quantising, random};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const CPU: Device = Device::Cpu;

/// A model whose rows come in blocks of every kind.
fn config(tied: bool) -> ModelConfig {
    ModelConfig {
        model_type: "llama".into(),
        vocab_size: 320,
        hidden_size: 256,
        intermediate_size: 512,
        num_hidden_layers: 2,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        head_dim: 32,
        max_position_embeddings: 512,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        sliding_window: None,
        tie_word_embeddings: tied,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    }
}

fn place() -> (TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("model.gguf");
    (place, path)
}

/// The logits of two prompts.
fn logits(model: &Llama) -> Tensor {
    let mut draw = stream(1, "gguf", "prompts");
    let ids: Vec<u32> = (0..90).map(|_| draw.index(320) as u32).collect();
    let positions: Vec<u32> = (0..60).chain(0..30).collect();
    let heads = model.config.heads();
    let attend =
        |_, [q, k, v]: &[Tensor; 3]| Ok(attention(q, k, v, &[0..60, 60..90], &heads)?.output);
    let x = model.forward(&ids, &positions, attend).unwrap();
    model.logits(&x).unwrap()
}

/// The logits that plain tensors give.
fn exact(config: &ModelConfig, values: &BTreeMap<String, Tensor>) -> Tensor {
    let value = |name: &str, _: &[usize]| Ok(values[name].clone());
    logits(&Llama::build(config, Form::Plain, &CPU, value).unwrap())
}

fn loaded(path: &Path, precision: Precision) -> Tensor {
    let file = Gguf::open(path).unwrap();
    let weights = Weights::open_gguf(path).unwrap();
    logits(&Llama::load(file.config(), &weights, precision, &CPU).unwrap())
}

fn square(tensor: &Tensor) -> f32 {
    tensor.sqr().unwrap().mean_all().unwrap().to_scalar().unwrap()
}

/// What is not as expected, as a share of what is.
fn noise(found: &Tensor, expected: &Tensor) -> f32 {
    square(&(found - expected).unwrap()) / square(expected)
}

fn farthest(left: &Tensor, right: &Tensor) -> f32 {
    let difference = (left - right).unwrap().abs().unwrap();
    difference.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// The mix that llama.cpp calls `Q4_K_M`.
fn q4_k_m(name: &str) -> GgmlDType {
    let is_wider = ["v_proj", "down_proj", "lm_head"].iter().any(|part| name.contains(part));
    if is_wider { GgmlDType::Q6K } else { GgmlDType::Q4K }
}

fn check_logits(config: &ModelConfig, kind: impl Fn(&str) -> GgmlDType + Copy) {
    let (_place, path) = place();
    let values = random(config).unwrap();
    GgufFile::new(config, &values, kind).unwrap().write(&path).unwrap();
    let expected = exact(config, &after_quantising(&values, kind).unwrap());
    let error = farthest(&loaded(&path, Precision::F32), &expected);
    assert!(error < 1e-5, "{:?}: {error}", kind("q_proj"));
}

#[test]
fn logits_are_those_of_the_same_numbers_in_a_checkpoint() {
    use GgmlDType::{BF16, F16, F32, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    for kind in [F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2K, Q3K, Q4K, Q5K, Q6K] {
        check_logits(&config(false), |_| kind);
    }
    check_logits(&config(false), q4_k_m);
    check_logits(&config(true), q4_k_m);
}

/// Noise of the logits with weights packed in some type, of files in `kind`.
fn check_noise(kind: impl Fn(&str) -> GgmlDType + Copy, precision: Precision, most: f32) {
    let (_place, path) = place();
    let config = config(false);
    let values = random(&config).unwrap();
    GgufFile::new(&config, &values, kind).unwrap().write(&path).unwrap();
    let expected = exact(&config, &after_quantising(&values, kind).unwrap());
    let noise = noise(&loaded(&path, precision), &expected);
    println!("{:?} in {}: noise is {noise:.1e} of the signal", kind("q_proj"), precision.name());
    assert!(noise < most, "{:?} in {precision:?}: noise is {noise} of the signal", kind("q_proj"));
}

#[test]
fn packing_adds_little_noise_to_a_file() {
    check_noise(|_| GgmlDType::Q8_0, Precision::Int8, 3e-3);
    check_noise(q4_k_m, Precision::Int8, 3e-3);
    check_noise(|_| GgmlDType::Q4_0, Precision::Int8, 3e-3);
    check_noise(|_| GgmlDType::BF16, Precision::Bf16, 3e-4);
    check_noise(|_| GgmlDType::F16, Precision::F16, 1e-5); // normalisations are rounded too
}

#[test]
fn packing_a_file_in_eight_bits_anew_is_not_far_from_packing_its_checkpoint() {
    let (_place, path) = place();
    let config = config(false);
    let values = random(&config).unwrap();
    let expected = exact(&config, &values);
    let noise_of = |kind: GgmlDType| {
        GgufFile::new(&config, &values, |_| kind).unwrap().write(&path).unwrap();
        noise(&loaded(&path, Precision::Int8), &expected)
    };
    let (once, twice) = (noise_of(GgmlDType::F32), noise_of(GgmlDType::Q8_0));
    println!("in int8 noise is {once:.1e} of the signal, by way of Q8_0 {twice:.1e}");
    assert!(twice < 2.0 * once, "{twice} is far more than {once}");
}

#[test]
fn the_file_says_which_type_suits_it() {
    use GgmlDType::{BF16, F16, F32, Q8_0};
    for (kind, expected) in [
        (F32, Precision::F32),
        (F16, Precision::F32),
        (BF16, Precision::Bf16),
        (Q8_0, Precision::Int8),
    ] {
        let (_place, path) = place();
        let config = config(true);
        let values = random(&config).unwrap();
        GgufFile::new(&config, &values, |_| kind).unwrap().write(&path).unwrap();
        let file = Gguf::open(&path).unwrap();
        assert_eq!(file.precision(), expected, "{kind:?}");
        assert_eq!(file.config(), &config, "{kind:?}");
    }
}

#[test]
fn rotary_factors_stretch_as_those_of_llama_3() {
    let plain = config(false);
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };
    let stretched = ModelConfig { rope_scaling: scaling, ..plain.clone() };
    let frequencies = plain.rope_frequencies().into_iter().zip(stretched.rope_frequencies());
    let factors: Vec<f32> = frequencies.map(|(plain, stretched)| plain / stretched).collect();
    assert!(factors[0] == 1.0 && factors[15] == 8.0, "{factors:?}");
    let values = random(&plain).unwrap();
    let mut file = GgufFile::new(&plain, &values, |_| GgmlDType::F32).unwrap();
    let tensor = Tensor::new(factors, &CPU).unwrap();
    let tensor = QTensor::quantize(&tensor, GgmlDType::F32).unwrap();
    file.tensors.insert("rope_freqs.weight".into(), tensor);
    let (_place, path) = place();
    file.write(&path).unwrap();
    let found = loaded(&path, Precision::F32);
    assert!(farthest(&found, &exact(&stretched, &values)) < 1e-4);
    assert!(farthest(&found, &exact(&plain, &values)) > 1e-2, "the factors changed nothing");
}

/// A file after a change, and why it cannot be used.
fn check_refused(change: impl FnOnce(&mut GgufFile), reason: &str) {
    let (_place, path) = place();
    let config = config(false);
    let file = GgufFile::new(&config, &random(&config).unwrap(), |_| GgmlDType::Q8_0).unwrap();
    let mut file = file.with_characters(300);
    change(&mut file);
    file.write(&path).unwrap();
    let error = format!("{:#}", Model::trained(path.to_str().unwrap()).unwrap_err());
    assert!(error.contains(reason) && error.contains("model.gguf"), "{error}");
}

fn without(key: &'static str) -> impl FnOnce(&mut GgufFile) {
    move |file| assert!(file.settings.remove(key).is_some())
}

fn with(key: &'static str, value: Value) -> impl FnOnce(&mut GgufFile) {
    move |file| {
        file.settings.insert(key.into(), value);
    }
}

fn text(text: &str) -> Value {
    Value::String(text.into())
}

#[test]
fn what_is_missing_is_named_with_its_file() {
    for key in [
        "general.architecture",
        "llama.embedding_length",
        "llama.block_count",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.context_length",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.eos_token_id",
    ] {
        check_refused(without(key), &format!("the key {key:?} is missing"));
    }
    let tensor = "blk.1.ffn_up.weight";
    check_refused(
        |file| drop(file.tensors.remove(tensor)),
        "the file has no tensor \"blk.1.ffn_up.weight\"",
    );
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    check_refused(
        with("general.architecture", text("qwen2")),
        "the architecture \"qwen2\" is not supported",
    );
    check_refused(with("llama.rope.scaling.type", text("yarn")), "rope scaling \"yarn\"");
    check_refused(with("llama.expert_count", Value::U32(8)), "mixtures of experts");
    check_refused(with("split.count", Value::U16(2)), "one part of several");
    check_refused(
        with("llama.block_count", Value::U32(u32::MAX)),
        "\"llama.block_count\" cannot be",
    );
    check_refused(with("llama.block_count", Value::U32(60_000)), "cannot be made of");
    check_refused(
        with("llama.context_length", Value::U32(u32::MAX)),
        "\"llama.context_length\" cannot be",
    );
    check_refused(with("llama.attention.head_count_kv", Value::U32(3)), "do not divide");
    check_refused(with("llama.attention.key_length", Value::U32(64)), "should be [512, 256]");
    check_refused(
        with("llama.attention.key_length", Value::U32(1024)),
        "heads cannot be 1024 wide",
    );
    check_refused(
        with("tokenizer.ggml.pre", text("qwen2")),
        "put the model's tokenizer.json beside the file",
    );
    check_refused(
        with("tokenizer.ggml.model", text("t5")),
        "put the model's tokenizer.json beside the file",
    );
    check_refused(
        |file| {
            let bias = Tensor::zeros(256, candle_core::DType::F32, &CPU).unwrap();
            let bias = QTensor::quantize(&bias, GgmlDType::F32).unwrap();
            file.tensors.insert("blk.0.attn_q.bias".into(), bias);
        },
        "tensor \"blk.0.attn_q.bias\" is no part of",
    );
}

#[test]
fn types_of_tensors_that_are_not_supported_are_refused_by_tensor() {
    let (_place, path) = place();
    let config = config(false);
    let file = GgufFile::new(&config, &random(&config).unwrap(), |_| GgmlDType::Q8_0).unwrap();
    file.write(&path).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let name = b"blk.0.attn_k.weight";
    let at = bytes.windows(name.len()).position(|bytes| bytes == name).unwrap();
    let kind = at + name.len() + 4 + 2 * 8;
    assert_eq!(bytes[kind], 8);
    bytes[kind] = 23;
    std::fs::write(&path, bytes).unwrap();
    let error = Gguf::open(&path).unwrap_err().to_string();
    assert!(error.contains("tensor \"blk.0.attn_k.weight\" is of type 23"), "{error}");
}

#[test]
fn cut_and_damaged_files_are_refused_or_read_but_never_break_the_program() {
    let (_place, path) = place();
    let config = ModelConfig {
        vocab_size: 40,
        hidden_size: 32,
        intermediate_size: 32,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 16,
        ..config(false)
    };
    let file = GgufFile::new(&config, &random(&config).unwrap(), |_| GgmlDType::Q8_0).unwrap();
    file.with_characters(30).write(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let name = path.to_str().unwrap();
    let load = || Model::trained(name).and_then(|model| model.load(&CPU));
    load().unwrap();
    for length in (0..whole.len() - 31).step_by(7) {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert!(load().is_err(), "{length} bytes of {} were enough", whole.len());
    }
    let mut draw = stream(3, "gguf", "damage");
    let (mut refused, header) = (0, whole.len() / 2);
    for round in 0..1500 {
        let mut bytes = whole.clone();
        for _ in 0..=round % 3 {
            let at = draw.index(header);
            bytes[at] = match draw.index(4) {
                0 => 0xff,
                1 => 0,
                _ => bytes[at] ^ (1 << draw.index(8)),
            };
        }
        std::fs::write(&path, bytes).unwrap();
        refused += usize::from(load().is_err());
    }
    assert!((200..1500).contains(&refused), "{refused} damaged files were refused");
}

/// Writes the bundled synthesizer as GGUF, its tokenizer beside it.
fn bundled(folder: &Path) -> PathBuf {
    let files = synthesizer();
    let config = ModelConfig::parse(files.config).unwrap();
    let weights = Weights::from_bytes(files.weights.to_vec(), "the bundled synthesizer").unwrap();
    let values = headwater::train::loaded(&config, &weights, &CPU).unwrap().into_iter().collect();
    let mut file = GgufFile::new(&config, &values, |_| GgmlDType::F32).unwrap().with_characters(30);
    for key in ["bos", "eos"] {
        file.settings.remove(&format!("tokenizer.ggml.{key}_token_id"));
    }
    let path = folder.join("model.gguf");
    file.write(&path).unwrap();
    std::fs::write(folder.join("tokenizer.json"), files.tokenizer.tokenizer).unwrap();
    std::fs::write(folder.join("tokenizer_config.json"), files.tokenizer.config).unwrap();
    path
}

/// The augmented documents of a run, without the name of their synthesizer.
fn augmented(run: &Path, synthesizer: &str) -> String {
    let files = tree(&run.join("augmented")).into_values();
    let texts =
        files.map(|bytes| String::from_utf8(zstd::decode_all(&bytes[..]).unwrap()).unwrap());
    texts.collect::<String>().replace(&format!("{synthesizer:?}"), "")
}

#[test]
fn a_run_with_a_gguf_file_leaves_the_bytes_of_a_run_with_its_checkpoint() {
    let place = tempfile::tempdir().unwrap();
    let (documents, general) = corpus(place.path());
    let file = bundled(place.path());
    let [documents, general, file] =
        [&documents, &general, &file].map(|path| path.to_str().unwrap());
    let run = |synthesizer: &str, out: &str, more: &[&str]| {
        let out = place.path().join(out);
        let fixed = [
            "pubmed",
            "--input",
            documents,
            "--general",
            general,
            "--model",
            "2m",
            "--length",
            "128",
            "--new-tokens",
            "96",
            "--no-train",
            "--progress",
            "none",
        ];
        let own = ["--out", out.to_str().unwrap(), "--synthesizer", synthesizer];
        check(&[&fixed[..], &own, more].concat(), 0, "");
        out
    };
    let expected = run(BUNDLED, "bundled", &[]);
    let found = run(file, "gguf", &[]);
    // What was generated stands in `rejected` where it is no pair; the account names the model.
    let is_other = |path: &Path| !(path.starts_with("packed") || path.starts_with("rejected"));
    assert_same(&found, &expected, is_other);
    let (found, written) = (augmented(&found, file), augmented(&expected, BUNDLED));
    assert!(found == written, "augmented documents differ");
    assert!(written.contains("\"question\""), "no pair was written");
    let eight = run(file, "eight", &["--dtype", "int8", "--agreement", "10", "--judge", file]);
    let settings = std::fs::read_to_string(eight.join("run.json")).unwrap();
    let eight_bits = format!("\"cpu int8 ({})\"", headwater::kernels::bf16_unit());
    assert!(settings.contains(&eight_bits), "{settings}");
    let settings = std::fs::read_to_string(expected.join("run.json")).unwrap();
    assert!(settings.contains("\"cpu f32\""), "{settings}");
}

#[test]
fn a_gguf_file_is_for_generation_only() {
    let place = tempfile::tempdir().unwrap();
    let (documents, _) = corpus(place.path());
    let (documents, file) = (documents.to_str().unwrap(), bundled(place.path()));
    let out = place.path().join("run");
    let flags = ["pubmed", "--input", documents, "--out", out.to_str().unwrap()];
    let model = ["--model", file.to_str().unwrap()];
    check(&[&flags[..], &model].concat(), 2, "a GGUF file cannot be trained");
    check(&[&flags[..], &["--synthesizer", documents]].concat(), 2, "nor a GGUF file");
    check(&[&flags[..], &["--dtype", "int4"]].concat(), 2, "unknown type \"int4\"");
}
