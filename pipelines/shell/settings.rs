//! Everything that decides a run, in one place.

use super::args::{AugmentArgs, EngineArgs, MachineArgs, MixArgs, RunArgs, check_progress};
use super::gates;
use super::memory;
use super::models::Model;
use super::published::Published;
use super::ratio::part;
use super::sources::Sources;
use super::split;
use super::train_args::TrainArgs;
use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use headwater::block::{Converted, LongTexts};
use headwater::engine::EngineSettings;
use headwater::format::documents::{Kind, files};
use headwater::format::input;
use headwater::format::jsonl::Fields;
use headwater::gate::{DocumentRules, PairRules};
use headwater::kernels::bf16_unit;
use headwater::kernels::cached::BLOCK;
use headwater::kernels::packed::WeightType;
use headwater::model::device;
use headwater::model::precision::Precision;
use headwater::pack::PackMode;
use headwater::template::Templates;
use headwater::train::held_out::HeldOut;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a pipeline sets where its user does not.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// The name of the command.
    pub command: &'static str,
    /// The name of the corpus.
    pub corpus: &'static str,
    /// Texts that may see each other.
    pub rounds: usize,
    /// The share of documents that is converted.
    pub converted: Converted,
    /// How often task rows are read.
    pub task_passes: Option<u64>,
    /// Texts that are committed together.
    pub epoch_documents: usize,
    /// Words of a document at least.
    pub words_min: usize,
    /// Whether of equal documents only the first is used.
    pub unique: bool,
    /// The set-ups that were published for it.
    pub published: &'static [Published],
}

/// Everything that decides a run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What the pipeline sets.
    pub preset: Preset,
    /// The published set-up that is followed.
    pub published: Option<&'static Published>,
    /// Files to read.
    pub inputs: Vec<PathBuf>,
    /// Files in directories of the input that are of no known kind.
    pub passed_over: Vec<PathBuf>,
    /// Where ids and texts are in JSON.
    pub fields: Fields,
    /// Records to read at most.
    pub limit: Option<u64>,
    /// What is asked of documents.
    pub document_rules: DocumentRules,
    /// What is asked of pairs.
    pub pair_rules: PairRules,
    /// What becomes of long texts.
    pub long_texts: LongTexts,
    /// The templates.
    pub templates: Arc<Templates>,
    /// What is mixed with what.
    pub sources: Sources,
    /// Tokens of a sequence.
    pub length: usize,
    /// How sequences are filled.
    pub packing: PackMode,
    /// Independent mix-and-pack streams.
    pub lanes: usize,
    /// Flags of augmentation.
    pub augment: AugmentArgs,
    /// Flags of training; none if nothing is trained.
    pub train: Option<TrainArgs>,
    /// What the loss is measured on.
    pub held_out: HeldOut,
    /// Flags of the machine.
    pub machine: MachineArgs,
    /// Flags of synthesis.
    pub engine: EngineArgs,
    /// The run folder.
    pub out: PathBuf,
    /// The synthesizer.
    pub synthesizer: Model,
    /// The model that answers again, if it is another one.
    pub judge: Option<Model>,
    /// The model whose tokenizer makes items, and which is trained.
    pub model: Model,
    /// Where models compute: on each a copy of the one that is trained.
    pub devices: Vec<Device>,
    /// Where the synthesizer computes: on each a copy of it.
    pub synthesizer_devices: Vec<Device>,
    /// How the engines use their devices; the memory for keys and values is settled when a model is there.
    engine_settings: EngineSettings,
}

impl Settings {
    /// Checks flags against each other and the world, before anything is read or spent.
    ///
    /// # Errors
    /// Says which flag cannot work, and why.
    pub fn new(mut preset: Preset, args: RunArgs) -> Result<Self> {
        let RunArgs { input, augment, mix, gates, engine, mut train, no_train, machine } = args;
        let published = train.resolve(preset.published)?;
        check_counts(&engine, &augment)?;
        check_progress(&machine.progress)?;
        preset.rounds = augment.rounds.unwrap_or(preset.rounds);
        preset.epoch_documents = epoch_documents(&augment, &preset)?;
        if let Some(text) = &augment.convert {
            let (part, of) = part("--convert", text)?;
            preset.converted = Converted { part, of };
        }
        let length = mix.length.or(published.map(|set_up| set_up.length)).unwrap_or(2048);
        ensure!(length >= 16, "--length must be 16 at least");
        ensure!((1..=99).contains(&mix.lanes), "--lanes takes 1 to 99");
        let devices = device::group(&machine.device).context("--device")?;
        let synthesizer_devices = synthesizer_devices(&engine, &devices)?;
        let mut synthesizer = Model::trained(&augment.synthesizer).context("--synthesizer")?;
        let context = synthesizer.config.max_position_embeddings.min(augment.context);
        synthesizer.config.max_position_embeddings = context;
        ensure!(
            augment.new_tokens > 0 && augment.new_tokens + 64 < context,
            "--new-tokens {} leaves no room for a prompt in the synthesizer's context of {context}",
            augment.new_tokens
        );
        let mut judge =
            gates.judge.as_deref().map(Model::trained).transpose().context("--judge")?;
        let on_cpu = synthesizer_devices[0].is_cpu();
        for model in [&mut synthesizer].into_iter().chain(&mut judge) {
            set_precision(&engine, model, on_cpu)?;
        }
        let model = train.model(length)?;
        let training = (!no_train).then_some(devices.as_slice());
        check_training(&train, training, &model, length)?;
        check_split(&engine, on_cpu, training)?;
        let templates = match &augment.templates {
            Some(directory) => Templates::with_files_of(directory).context("--templates")?,
            None => Templates::built_in(),
        };
        let (inputs, passed_over) = files(&input.input)?;
        ensure!(!inputs.is_empty(), "--input names no files of a known kind");
        let fields = input.fields();
        let held_out = train.held_out(&fields, &model, length)?;
        Ok(Settings {
            document_rules: gates.document_rules(preset.words_min, preset.unique)?,
            pair_rules: gates.pair_rules()?,
            long_texts: long_texts(&augment.long_texts)?,
            sources: Sources::new(&mix, &preset, &inputs, &fields, input.limit)?,
            packing: packing(&mix)?,
            lanes: mix.lanes,
            limit: input.limit,
            out: input.out,
            train: (!no_train).then_some(train),
            held_out,
            engine_settings: engine.steps.settings(on_cpu, 0)?,
            templates: Arc::new(templates),
            preset,
            published,
            inputs,
            passed_over,
            fields,
            length,
            augment,
            machine,
            engine,
            synthesizer,
            judge,
            model,
            devices,
            synthesizer_devices,
        })
    }

    /// The quality gates that are on, in words.
    pub fn gates(&self) -> Vec<String> {
        gates::describe(&self.document_rules, &self.pair_rules)
    }

    /// Tokens of the longest prompt.
    pub fn prompt_tokens_max(&self) -> usize {
        self.synthesizer.config.max_position_embeddings - self.augment.new_tokens
    }

    /// How an engine uses its device, with `cache_bytes` for keys and values.
    pub fn engine_settings(&self, cache_bytes: usize) -> EngineSettings {
        EngineSettings { cache_bytes, ..self.engine_settings }
    }

    /// Whether the synthesizer computes on the CPU.
    pub fn synthesizes_on_cpu(&self) -> bool {
        self.synthesizer_devices[0].is_cpu()
    }

    /// Whether a model is trained on this device.
    pub fn trains_on(&self, device: &Device) -> bool {
        self.devices.iter().any(|own| own.location() == device.location())
    }

    /// How a model that generates computes, as far as it decides the output.
    pub fn arithmetic(&self, model: &Model) -> String {
        let precision = model.precision;
        match (self.synthesizes_on_cpu(), precision.packed()) {
            (false, _) => format!("cuda {}", precision.name()),
            (true, WeightType::F32 | WeightType::Bf16x3) => format!("cpu {}", precision.name()),
            (true, WeightType::BlockFloat) => {
                format!("cpu {} (block floating point)", precision.name())
            }
            (true, WeightType::Bf16 | WeightType::Int8) => {
                format!("cpu {} ({})", precision.name(), bf16_unit())
            }
        }
    }

    /// What a request store may hold, in bytes.
    pub fn request_store_bytes(&self) -> u64 {
        self.engine.request_store_mib.saturating_mul(1 << 20)
    }

    /// The folder that answers are kept in, if they are.
    pub fn request_store(&self) -> Option<PathBuf> {
        match self.engine.request_store.as_deref() {
            Some("off") => None,
            Some(folder) => Some(folder.into()),
            None => Some(self.out.join("requests")),
        }
    }

    /// Kinds of the input files, each once.
    pub fn kinds(&self) -> Vec<&'static str> {
        let mut kinds: Vec<&str> =
            self.inputs.iter().filter_map(|file| Kind::of(file).ok()).map(Kind::name).collect();
        kinds.sort_unstable();
        kinds.dedup();
        kinds
    }

    /// What decides the bytes of the output: `run.json`.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn configuration(&self, training: Option<Value>) -> Result<Value> {
        let tokenizer = |model: &Model| format!("{:032x}", model.tokenizer.digest());
        let judge = self.judge.as_ref().map(|judge| -> Result<Value> {
            let mut entry = json!({ "name": judge.name, "weights": judge.digest()? });
            if judge.precision != self.synthesizer.precision {
                entry["arithmetic"] = json!(self.arithmetic(judge));
            }
            Ok(entry)
        });
        let held_out = self.train.as_ref().map(TrainArgs::held_out_configuration).transpose()?;
        let contamination = self.document_rules.contamination.as_ref();
        Ok(json!({
            "headwater": env!("CARGO_PKG_VERSION"),
            "command": self.preset.command,
            "seed": self.machine.seed,
            "input": {
                "files": digests(&self.inputs)?,
                "fields": self.fields,
                "limit": self.limit,
            },
            "synthesizer": {
                "name": self.synthesizer.name,
                "weights": self.synthesizer.digest()?,
                "tokenizer": tokenizer(&self.synthesizer),
                "context": self.synthesizer.config.max_position_embeddings,
                "new_tokens": self.augment.new_tokens,
                "arithmetic": self.arithmetic(&self.synthesizer),
            },
            "documents": self.document_rules,
            "pairs": self.pair_rules,
            "judge": judge.transpose()?,
            "evaluation_sets": contamination.map(|rules| digests(&rules.files)).transpose()?,
            "converted": self.preset.converted,
            "long_texts": self.long_texts,
            "rounds": self.preset.rounds,
            "epoch_documents": self.preset.epoch_documents,
            "templates": format!("{:032x}", self.templates.digest()),
            "mix": self.sources.configuration()?,
            "lanes": self.lanes,
            "length": self.length,
            "packing": self.packing,
            "model": {
                "name": self.model.name,
                "tokenizer": tokenizer(&self.model),
            },
            "training": training,
            "training_arithmetic": self.train.as_ref().map(|train| train.train_dtype.arithmetic(&self.devices[0], &self.model.config)),
            "held_out": held_out.unwrap_or_default(),
        }))
    }
}

/// `devices` are those that train; none if nothing is trained.
fn check_training(
    train: &TrainArgs,
    devices: Option<&[Device]>,
    model: &Model,
    length: usize,
) -> Result<()> {
    let Some(devices) = devices else {
        ensure!(
            train.eval.is_empty(),
            "--eval measures the model that is trained: leave out --no-train"
        );
        return Ok(());
    };
    train.check(model, length, devices)
}

/// Threads can be split where a CPU both synthesizes and trains.
fn check_split(engine: &EngineArgs, synthesizes: bool, devices: Option<&[Device]>) -> Result<()> {
    let trains = devices.is_some_and(|devices| devices[0].is_cpu());
    split::check(engine.train_threads, [synthesizes, trains])
}

fn check_counts(engine: &EngineArgs, augment: &AugmentArgs) -> Result<()> {
    ensure!(augment.rounds != Some(0), "--rounds must be 1 at least");
    ensure!(augment.epochs_in_flight > 0, "--epochs-in-flight must be 1 at least");
    ensure!(engine.workers > 0, "--workers must be 1 at least");
    check_store(engine)
}

/// What a model generates in; a cache that was asked for holds one of its sequences at least.
fn set_precision(engine: &EngineArgs, model: &mut Model, on_cpu: bool) -> Result<()> {
    let precision = Precision::choose(&engine.steps.dtype, model.precision, on_cpu);
    model.precision = precision.context("--dtype")?;
    let Some(mib) = engine.steps.cache_mib else { return Ok(()) };
    let context = model.config.max_position_embeddings;
    let blocks = engine.steps.cache_bytes(None, 0, 1) / memory::block_bytes(model, on_cpu);
    ensure!(
        blocks >= context.div_ceil(BLOCK),
        "--cache-mib {mib} holds {} tokens, less than the {context} of one sequence",
        blocks * BLOCK
    );
    Ok(())
}

fn check_store(engine: &EngineArgs) -> Result<()> {
    ensure!(engine.request_store_mib > 0, "--request-store-mib must be 1 at least");
    if let Some(folder) = engine.request_store.as_deref().map(Path::new) {
        ensure!(folder != Path::new(""), "--request-store takes a directory, or off");
        ensure!(!folder.exists() || folder.is_dir(), "--request-store {folder:?} is no folder");
    }
    Ok(())
}

/// Where the synthesizer computes. Devices of one kind compute the same, so that no answer depends on which
/// of them gave it.
fn synthesizer_devices(engine: &EngineArgs, common: &[Device]) -> Result<Vec<Device>> {
    if engine.synthesizer_device.is_empty() {
        return Ok(common.to_vec());
    }
    let names = engine.synthesizer_device.iter();
    let devices = names.map(|name| device::device(name)).collect::<Result<Vec<_>, _>>();
    let devices = devices.context("--synthesizer-device")?;
    ensure!(
        devices.iter().all(|device| device.is_cpu() == devices[0].is_cpu()),
        "--synthesizer-device takes devices of one kind: they must give the same answers"
    );
    Ok(devices)
}

/// Texts of an epoch: a multiple of the rounds.
fn epoch_documents(augment: &AugmentArgs, preset: &Preset) -> Result<usize> {
    let rounds = preset.rounds;
    let documents = match augment.epoch_documents {
        Some(documents) => documents,
        None => preset.epoch_documents.div_ceil(rounds) * rounds,
    };
    ensure!(
        documents > 0 && documents.is_multiple_of(rounds),
        "--epoch-documents {documents} is not a multiple of the {rounds} rounds"
    );
    Ok(documents)
}

fn long_texts(how: &str) -> Result<LongTexts> {
    match how {
        "split" => Ok(LongTexts::Split),
        "window" => Ok(LongTexts::Window),
        other => bail!("--long-texts takes split or window, not {other:?}"),
    }
}

fn packing(mix: &MixArgs) -> Result<PackMode> {
    ensure!(mix.open_sequences > 0, "--open-sequences must be 1 at least");
    match mix.packing.as_str() {
        "best-fit" => Ok(PackMode::BestFit(mix.open_sequences)),
        "concatenate" => Ok(PackMode::Concatenate),
        "one-item" => Ok(PackMode::OneItem),
        other => bail!("--packing takes best-fit, concatenate or one-item, not {other:?}"),
    }
}

/// Files with their sizes and digests, as they stand in `run.json`.
///
/// # Errors
/// If a file cannot be read.
pub fn digests(paths: &[PathBuf]) -> Result<Vec<Value>> {
    let file = |path: &PathBuf| {
        let bytes = std::fs::metadata(path)?.len();
        let digest = format!("{:032x}", input::digest(path)?);
        Ok(json!({ "file": path, "bytes": bytes, "xxh3": digest }))
    };
    paths.iter().map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shell::args::RunArgs;

    fn engine(flags: &[&str]) -> EngineArgs {
        let needed = ["--input", "x.jsonl", "--out", "x"];
        RunArgs::of(needed.iter().chain(flags)).expect("flags that exist").engine
    }

    fn check_devices(flags: &[&str], expected: std::result::Result<usize, &str>) {
        let found = synthesizer_devices(&engine(flags), &[Device::Cpu]);
        let found = found.map(|devices| devices.len()).map_err(|error| format!("{error:#}"));
        match expected {
            Ok(count) => assert_eq!(found, Ok(count), "{flags:?}"),
            Err(reason) => assert!(found.unwrap_err().contains(reason), "{flags:?}"),
        }
    }

    #[test]
    fn the_synthesizer_computes_on_one_device_or_on_a_list_of_them() {
        check_devices(&[], Ok(1));
        check_devices(&["--synthesizer-device", "cpu"], Ok(1));
        check_devices(&["--synthesizer-device", "cpu,cpu"], Ok(2));
        check_devices(&["--synthesizer-device", "cpu,gpu:1"], Err("unknown device \"gpu:1\""));
        check_devices(&["--synthesizer-device", "cuda:98,cuda:99"], Err("cuda:98"));
    }
}
