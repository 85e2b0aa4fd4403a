//! Whole steps on a tiny model: what is skipped, what is resumed, what is measured.

mod export;
mod gpus;
mod memory;
mod replicas;
mod tensors;

use super::checkpoint::{Retention, list};
use super::guard::Fault;
use super::held_out::HeldOut;
use super::schedule::Decay;
use super::writer::{Target, Writer};
use super::*;
use crate::format::jsonl::Fields;
use crate::model::shape::Shape;
use crate::record::{Segment, Shot};
use crate::tokenizer::tests::small;
use std::path::Path;

/// A token whose embedding is not finite: a sequence with it has a loss that is not, too.
const POISON: u32 = 5;

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: small().vocabulary(),
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        max_position_embeddings: 32,
        tie_word_embeddings: false,
        ..Shape::named("2m").unwrap().config()
    }
}

fn settings(recompute: bool, peak: f64) -> TrainSettings {
    TrainSettings {
        batch_sequences: 2,
        micro_batch_tokens: 24,
        schedule: Schedule {
            peak,
            warmup_steps: 0,
            total_steps: 1000,
            floor_share: 0.0,
            decay: Decay::Wsd { decay_percent: 10 },
        },
        optimizer: optimizer::AdamW {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
        },
        recompute,
        z_loss: 0.0,
        dropout: None,
    }
}

fn dropping(settings: TrainSettings, probability: f64) -> TrainSettings {
    TrainSettings { dropout: HiddenDropout::of(probability, 4), ..settings }
}

fn trainer(settings: TrainSettings) -> Trainer {
    let config = config();
    let mut values = initial(&config, 1, &Device::Cpu).unwrap();
    let (_, table) = values.iter_mut().find(|(name, _)| name.contains("embed")).unwrap();
    let mut rows: Vec<Vec<f32>> = table.to_vec2().unwrap();
    rows[POISON as usize].fill(f32::NAN);
    *table = Tensor::new(rows, &Device::Cpu).unwrap();
    Trainer::new(&config, values, settings, DType::F32, &[Device::Cpu]).unwrap()
}

/// Two sequences of two items of two sources.
fn sequences(seed: u64) -> Vec<Sequence> {
    let sequence = |index: u64| {
        let mut stream = seed::stream(seed, &index.to_string(), "test");
        let vocabulary = small().vocabulary();
        let mut token = || stream.index(vocabulary) as u32;
        let tokens = (0..20).map(|_| Some(token()).filter(|&t| t != POISON).unwrap_or(6)).collect();
        let segment = |source: u32, length| {
            let item = format!("item {seed}.{index}.{source}");
            Segment { item, source, offset: 0, length }
        };
        let segments = vec![segment(0, 12), segment(1, 8)];
        let shots =
            [(0, 0, 5), (1, 5, 7)].map(|(round, offset, length)| Shot { round, offset, length });
        Sequence { tokens, learned: vec![true; 20], segments, shots: shots.to_vec() }
    };
    (0..2).map(sequence).collect()
}

fn poisoned() -> Vec<Sequence> {
    let mut sequences = sequences(99);
    sequences[1].tokens[3] = POISON;
    sequences
}

/// Parameters and moments, bit by bit.
fn bits(trainer: &Trainer) -> Vec<(String, Vec<u32>)> {
    let bits = |tensor: &Tensor| -> Vec<u32> {
        let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    let of = |(name, parameter): (&str, &crate::kernels::adamw::Parameter)| {
        let (mean, mean_square) = parameter.moments().unwrap();
        let all = [parameter.value().unwrap(), mean, mean_square];
        (name.to_owned(), all.iter().flat_map(bits).collect())
    };
    trainer.replicas.first().parameters.iter().map(of).collect()
}

fn resumed(folder: &Path, trainer: &Trainer) -> Trainer {
    let path = trainer.snapshot().unwrap().save(folder, &small()).unwrap();
    Trainer::resume(&path, *trainer.settings(), DType::F32, &[Device::Cpu]).unwrap()
}

fn guards(nonfinite: OnFault, spike: Option<OnFault>) -> Guards {
    Guards { nonfinite, spike }
}

#[test]
fn initial_weights_have_the_published_deviations() {
    let config = ModelConfig { hidden_size: 64, intermediate_size: 96, ..config() };
    for (name, value) in initial(&config, 7, &Device::Cpu).unwrap() {
        let values: Vec<f32> = value.flatten_all().unwrap().to_vec1().unwrap();
        if name.contains("norm") {
            assert!(values.iter().all(|&value| value == 1.0), "{name}");
            continue;
        }
        // Back into the stream go two projections of each of two blocks.
        let back = name.contains("o_proj") || name.contains("down_proj");
        let expected = if back { 0.01 } else { 0.02 };
        let mean_of = |power: i32| {
            values.iter().map(|&value| f64::from(value).powi(power)).sum::<f64>()
                / values.len() as f64
        };
        let (mean, deviation) = (mean_of(1), mean_of(2).sqrt());
        assert!((deviation / expected - 1.0).abs() < 0.08, "{name}: {deviation}");
        assert!(mean.abs() < expected / 8.0, "{name}: {mean}");
    }
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let kinds = [(false, 0.0), (true, 0.0), (false, 0.3), (true, 0.3)];
    for (recompute, probability) in kinds {
        let settings = dropping(settings(recompute, 1e-2), probability);
        let place = tempfile::tempdir().unwrap();
        let skip = guards(OnFault::Skip, None);
        let batches: Vec<Vec<Sequence>> =
            (0..7).map(|step| if step == 2 { poisoned() } else { sequences(step) }).collect();
        let mut whole = trainer(settings).with_guards(skip);
        let expected: Vec<StepReport> = batches.iter().map(|b| whole.step(b).unwrap()).collect();
        let mut parts = trainer(settings).with_guards(skip);
        let mut found = Vec::new();
        for batch in &batches {
            parts = resumed(place.path(), &parts).with_guards(skip);
            found.push(parts.step(batch).unwrap());
        }
        assert_eq!(format!("{found:?}"), format!("{expected:?}"), "recompute {recompute}");
        assert_eq!(bits(&parts), bits(&whole), "recompute {recompute}");
        assert_eq!((parts.progress(), &parts.recent), (whole.progress(), &whole.recent));
    }
}

#[test]
fn a_run_that_computes_blocks_again_is_the_same_run() {
    let run = |recompute, probability| {
        let mut trainer = trainer(dropping(settings(recompute, 1e-2), probability));
        (0..3).for_each(|step| drop(trainer.step(&sequences(step)).unwrap()));
        bits(&trainer)
    };
    assert_eq!(run(true, 0.0), run(false, 0.0));
    assert_eq!(run(true, 0.3), run(false, 0.3));
    assert_ne!(run(true, 0.3), run(true, 0.0));
}

#[test]
fn what_is_dropped_depends_on_seed_and_step_and_not_on_micro_batches() {
    let losses = |settings| {
        let mut trainer = trainer(settings);
        let (first, second) = (sequences(0), sequences(1));
        [&first, &first, &second].map(|batch| {
            let report = trainer.step(batch).unwrap();
            (report.loss, report.grad_norm)
        })
    };
    let still = settings(false, 1e-12); // nothing moves: the same sequences have the same loss
    let dropped = dropping(still, 0.3);
    let whole = losses(TrainSettings { micro_batch_tokens: 40, ..dropped });
    for ((loss, norm), (whole_loss, whole_norm)) in losses(dropped).into_iter().zip(whole) {
        assert!((loss / whole_loss - 1.0).abs() < 1e-6, "{loss} and {whole_loss}");
        assert!((norm / whole_norm - 1.0).abs() < 1e-5, "{norm} and {whole_norm}");
    }
    assert_ne!(whole[0], whole[1], "each step drops anew");
    let other = HiddenDropout::of(0.3, 5);
    assert_ne!(losses(TrainSettings { dropout: other, ..dropped })[0], losses(dropped)[0]);
    let plain = losses(still);
    assert!((plain[0].0 - plain[1].0).abs() < 1e-6, "{plain:?}");
}

#[test]
fn nothing_is_dropped_where_a_model_is_measured() {
    let evaluate = |probability| {
        let mut trainer = trainer(dropping(settings(false, 1e-2), probability));
        trainer.evaluate(&sequences(3)).unwrap()
    };
    assert_eq!(evaluate(0.5).to_bits(), evaluate(0.0).to_bits());
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_names_what_caused_it() {
    let mut trainer = trainer(settings(false, 1e-2));
    trainer.step(&sequences(0)).unwrap();
    let before = (bits(&trainer), trainer.progress(), trainer.recent.clone());
    let error = trainer.step(&poisoned()).unwrap_err().to_string();
    let suspect = "sequence 3, item item 99.1.0, loss NaN";
    for said in ["step 2", "sequences 2 to 3", suspect, "--on-nonfinite skip", "NaN"] {
        assert!(error.contains(said), "{said:?} in {error}");
    }
    for other in ["sequence 2,", "item 99.1.1"] {
        assert!(!error.contains(other), "{other:?} in {error}");
    }
    assert_eq!((bits(&trainer), trainer.progress(), trainer.recent.clone()), before);
    trainer.step(&sequences(1)).unwrap();
}

#[test]
fn a_skipped_step_is_counted_and_changes_nothing_else() {
    let skip = guards(OnFault::Skip, None);
    let mut skipping = trainer(settings(false, 1e-2)).with_guards(skip);
    let mut without = trainer(settings(false, 1e-2));
    for step in 0..4 {
        if step == 2 {
            let report = skipping.step(&poisoned()).unwrap();
            assert_eq!((report.skipped, report.skipped_total), (Some(Fault::Nonfinite), 1));
            assert_eq!((report.step, report.next_sequence, report.tokens), (3, 6, 40));
        }
        skipping.step(&sequences(step)).unwrap();
        without.step(&sequences(step)).unwrap();
    }
    assert_eq!(bits(&skipping), bits(&without));
    let (progress, other) = (skipping.progress(), without.progress());
    assert_eq!((progress.step, progress.skipped), (5, 1));
    assert_eq!((progress.next_sequence, progress.tokens), (10, 200));
    assert_eq!((other.step, other.next_sequence), (4, 8));
}

#[test]
fn a_run_of_bad_steps_is_not_skipped_for_ever() {
    let mut trainer = trainer(settings(false, 1e-2)).with_guards(guards(OnFault::Skip, None));
    for _ in 0..guard::SKIPPED_IN_A_ROW_MAX {
        trainer.step(&poisoned()).unwrap();
    }
    let error = trainer.step(&poisoned()).unwrap_err().to_string();
    assert!(error.contains("64 steps before it were skipped"), "{error}");
}

#[test]
fn a_spike_is_judged_by_the_steps_before_also_behind_a_resume() {
    let place = tempfile::tempdir().unwrap();
    let mut steady = trainer(settings(false, 1e-12)); // nothing moves: losses are equal
    for _ in 0..guard::WINDOW / 2 {
        steady.step(&sequences(0)).unwrap();
    }
    let judge = |spike: Option<OnFault>| {
        let mut trainer = resumed(place.path(), &steady).with_guards(guards(OnFault::Stop, spike));
        let before = bits(&trainer);
        let result = trainer.step(&sequences(1));
        (result, bits(&trainer) == before)
    };
    let (report, unmoved) = judge(None);
    assert_eq!((report.unwrap().skipped, unmoved), (None, false));
    let (report, unmoved) = judge(Some(OnFault::Skip));
    assert_eq!((report.unwrap().skipped, unmoved), (Some(Fault::Spike), true));
    let (error, unmoved) = judge(Some(OnFault::Stop));
    let error = error.unwrap_err().to_string();
    for said in [
        "had a spike",
        "the 64 steps before had loss",
        "step 65",
        "--on-spike skip",
        "item item 1.",
    ] {
        assert!(error.contains(said), "{said:?} in {error}");
    }
    assert!(unmoved);
}

#[test]
fn the_losses_of_sources_and_rounds_make_up_the_loss() {
    let report = trainer(settings(false, 1e-2)).step(&sequences(0)).unwrap();
    let of_rounds: f64 = report.rounds.iter().map(|one| one.loss * one.learned as f64).sum();
    let (own, rounds) = (report.sources[0], &report.rounds);
    assert_eq!((rounds[0].learned, rounds[1].learned), (8, 14));
    assert!((of_rounds - own.loss * own.learned as f64).abs() < 1e-9, "{report:?}");
    let learned: Vec<u64> = report.sources.iter().map(|source| source.learned).collect();
    assert_eq!(learned, [22, 14]);
    let sum: f64 = report.sources.iter().map(|source| source.loss * source.learned as f64).sum();
    assert!((sum / 36.0 - report.loss).abs() < 1e-12);
}

#[test]
fn held_out_texts_are_measured_and_not_learned() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("valid.txt");
    std::fs::write(&file, "Rates rose again this month. ".repeat(9)).unwrap();
    let held_out = HeldOut::read(&[file], &Fields::detected(), &small(), 20).unwrap();
    let mut trainer = trainer(settings(false, 1e-2));
    let before = bits(&trainer);
    let measure = |trainer: &mut Trainer| {
        trainer.evaluate_held_out(&held_out, &|| true).unwrap().expect("nothing stops it")
    };
    let first = measure(&mut trainer);
    assert_eq!(trainer.evaluate_held_out(&held_out, &|| false).unwrap(), None);
    assert_eq!(measure(&mut trainer), first);
    assert_eq!(bits(&trainer), before);
    assert_eq!((first.len(), first[0].step, first[0].source.as_str()), (1, 0, "valid"));
    assert_eq!(first[0].tokens, held_out.ledger().get("held_out/tokens/valid"));
    assert_eq!(first[0].perplexity, first[0].loss.map(f64::exp));
    trainer.step(&sequences(0)).unwrap();
    let second = measure(&mut trainer);
    assert_eq!(second[0].step, 1);
    assert_ne!(second[0].loss, first[0].loss);
}

#[test]
fn checkpoints_are_written_beside_the_steps_and_are_those_of_their_step() {
    let place = tempfile::tempdir().unwrap();
    let target = |logs| Target {
        folder: place.path().join("checkpoints"),
        tokenizer: small(),
        retention: Retention { last: 2, every: Some(4) },
        logs,
    };
    let mut writer = Writer::new(target(Vec::new())).unwrap();
    let mut trainer = trainer(settings(false, 1e-2));
    let mut states = Vec::new();
    for step in 0..7 {
        trainer.step(&sequences(step)).unwrap();
        states.push(bits(&trainer));
        writer.check().unwrap();
        writer.write(&trainer).unwrap();
    }
    writer.wait().unwrap();
    let found = list(&place.path().join("checkpoints")).unwrap();
    let steps = [4, 6, 7];
    assert_eq!(found.len(), steps.len(), "{found:?}");
    for (path, step) in found.iter().zip(steps) {
        let again = Trainer::resume(path, *trainer.settings(), DType::F32, &[Device::Cpu]).unwrap();
        assert_eq!(again.progress().step, step as u64);
        assert_eq!(bits(&again), states[step - 1]);
    }
    let mut failing = Writer::new(target(vec!["/no/such/log".into()])).unwrap();
    failing.write(&trainer).unwrap();
    let error = failing.write(&trainer).unwrap_err().to_string();
    assert!(error.contains("/no/such/log"), "{error}");
}

#[test]
fn a_checkpoint_whose_bytes_changed_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let mut trainer = trainer(settings(false, 1e-2));
    trainer.step(&sequences(0)).unwrap();
    let path = trainer.snapshot().unwrap().save(place.path(), &small()).unwrap();
    let again = || Trainer::resume(&path, *trainer.settings(), DType::F32, &[Device::Cpu]);
    for name in ["config.json", "model.safetensors", "optimizer.safetensors"] {
        let file = path.join(name);
        let whole = std::fs::read(&file).unwrap();
        let mut bytes = whole.clone();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&file, &bytes).unwrap();
        let error = again().map(drop).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("not those that were written"), "{error}");
        std::fs::write(&file, &whole).unwrap();
    }
    assert_eq!(bits(&again().unwrap()), bits(&trainer));
    // As it was before there were digests.
    let state = path.join("trainer.json");
    let mut json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&state).unwrap()).unwrap();
    json.as_object_mut().unwrap().remove("digests").unwrap();
    std::fs::write(&state, json.to_string()).unwrap();
    assert_eq!(bits(&again().unwrap()), bits(&trainer));
}
