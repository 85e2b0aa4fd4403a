//! What an export holds, beside what `tests/outside/parity.rs` reads again from one.

use super::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// What `generation_config.json` says, and whether the head is among the weights.
fn exported(eos_token_ids: &[u32], is_tied: bool) -> (Value, bool) {
    let config = ModelConfig {
        bos_token_id: Some(1),
        eos_token_ids: eos_token_ids.to_vec(),
        tie_word_embeddings: is_tied,
        ..config()
    };
    let values = initial(&config, 1, &Device::Cpu).unwrap();
    let devices = [Device::Cpu];
    let trainer =
        Trainer::new(&config, values, settings(false, 1e-2), DType::F32, &devices).unwrap();
    let place = tempfile::tempdir().unwrap();
    trainer.export(place.path(), &small(), DType::BF16).unwrap();
    let read = |name: &str| std::fs::read(place.path().join(name)).unwrap();
    let weights = read("model.safetensors");
    let weights = SafeTensors::deserialize(&weights).unwrap();
    let mut names = weights.names();
    let mut expected: Vec<String> = config.parameters().into_iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    expected.sort_unstable();
    assert_eq!(names, expected);
    assert_eq!(ModelConfig::read(place.path()).unwrap(), config);
    let generation = serde_json::from_slice(&read("generation_config.json")).unwrap();
    (generation, names.contains(&"lm_head.weight"))
}

#[test]
fn an_export_says_what_ends_a_text_and_has_a_head_where_that_is_not_the_table() {
    let one = json!({ "bos_token_id": 1, "eos_token_id": 2 });
    assert_eq!(exported(&[2], true), (one, false));
    let several = json!({ "bos_token_id": 1, "eos_token_id": [2, 4] });
    assert_eq!(exported(&[2, 4], false), (several, true));
}
