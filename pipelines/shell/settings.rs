//! Everything that decides a run, in one place.

use super::args::{
    AugmentArgs, EngineArgs, InputArgs, MachineArgs, TrainArgs, check_progress, ratio,
};
use super::models::Model;
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use headwater::engine::EngineSettings;
use headwater::format::documents::{Kind, files};
use headwater::format::jsonl::Fields;
use headwater::format::{input, instructions};
use headwater::gate::DocumentRules;
use headwater::model::device;
use headwater::template::Templates;
use serde_json::{Value, json};
use std::path::PathBuf;

/// What a pipeline sets where its user does not.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// The name of the command.
    pub command: &'static str,
    /// The name of the corpus.
    pub corpus: &'static str,
    /// Texts that may see each other.
    pub rounds: usize,
    /// Shares by tokens of augmented documents and general instructions.
    pub ratio: [u64; 2],
    /// Texts that are committed together.
    pub epoch_documents: usize,
    /// What is asked of documents.
    pub rules: DocumentRules,
}

/// Everything that decides a run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What the pipeline sets.
    pub preset: Preset,
    /// Files to read.
    pub inputs: Vec<PathBuf>,
    /// Files in directories of the input that are of no known kind.
    pub passed_over: Vec<PathBuf>,
    /// Where ids and texts are in JSON.
    pub fields: Fields,
    /// Records to read at most.
    pub limit: Option<u64>,
    /// Files of general instructions.
    pub general: Vec<PathBuf>,
    /// How these are written.
    pub general_spellings: Vec<&'static str>,
    /// Shares by tokens: of augmented documents and, if there are any, of general instructions.
    pub weights: Vec<u64>,
    /// Flags of augmentation.
    pub augment: AugmentArgs,
    /// Flags of training; none if nothing is trained.
    pub train: Option<TrainArgs>,
    /// Flags of the machine.
    pub machine: MachineArgs,
    /// Flags of synthesis.
    pub engine: EngineArgs,
    /// The run folder.
    pub out: PathBuf,
    /// The synthesizer.
    pub synthesizer: Model,
    /// The model whose tokenizer makes items, and which is trained.
    pub model: Model,
    /// Where models compute.
    pub device: Device,
    /// Type of the synthesizer's weights.
    pub dtype: DType,
}

impl Settings {
    /// Checks flags against each other and the world, before anything is read or spent.
    ///
    /// # Errors
    /// Says which flag cannot work, and why.
    pub fn new(
        preset: Preset,
        input: &InputArgs,
        (augment, engine): (AugmentArgs, EngineArgs),
        (train, no_train): (TrainArgs, bool),
        machine: MachineArgs,
    ) -> Result<Self> {
        let rounds = augment.rounds.unwrap_or(preset.rounds);
        ensure!(rounds > 0, "--rounds must be 1 at least");
        let epoch_documents = augment.epoch_documents.unwrap_or_else(|| {
            preset.epoch_documents.div_ceil(rounds) * rounds // a multiple for any number of rounds
        });
        ensure!(
            epoch_documents > 0 && epoch_documents.is_multiple_of(rounds),
            "--epoch-documents {epoch_documents} is not a multiple of the {rounds} rounds"
        );
        ensure!(augment.length >= 16, "--length must be 16 at least");
        ensure!(engine.workers > 0, "--workers must be 1 at least");
        ensure!((1..=99).contains(&augment.lanes), "--lanes takes 1 to 99");
        ensure!(augment.epochs_in_flight > 0, "--epochs-in-flight must be 1 at least");
        ensure!(engine.sequences > 0, "--sequences must be 1 at least");
        ensure!(engine.step_tokens > 0, "--step-tokens must be 1 at least");
        check_progress(&machine.progress)?;
        let ratio = match &augment.ratio {
            Some(text) => ratio(text)?,
            None => preset.ratio,
        };
        let general = input::expand(&augment.general)?;
        let general_spellings = spellings(&general)?;
        ensure!(
            augment.ratio.is_none() || ratio[1] == 0 || !general.is_empty(),
            "--ratio wants general instructions: name their files with --general"
        );
        let device = device::device(&machine.device)?;
        let dtype = device::dtype(&engine.dtype, &device)?;
        let mut synthesizer = Model::trained(&augment.synthesizer).context("--synthesizer")?;
        let context = synthesizer.config.max_position_embeddings.min(augment.context);
        synthesizer.config.max_position_embeddings = context;
        let model = train.model(augment.length)?;
        if !no_train {
            train.check(&model, augment.length)?;
        }
        ensure!(
            augment.new_tokens > 0 && augment.new_tokens + 64 < context,
            "--new-tokens {} leaves no room for a prompt in the synthesizer's context of {context}",
            augment.new_tokens
        );
        let (inputs, passed_over) = files(&input.input)?;
        let settings = Settings {
            preset: Preset {
                rounds,
                ratio,
                epoch_documents,
                rules: input.rules(preset.rules)?,
                ..preset
            },
            inputs,
            passed_over,
            fields: input.fields(),
            limit: input.limit,
            general_spellings,
            weights: if general.is_empty() { vec![1] } else { ratio.to_vec() },
            general,
            augment,
            train: (!no_train).then_some(train),
            machine,
            engine,
            out: input.out.clone(),
            synthesizer,
            model,
            device,
            dtype,
        };
        ensure!(!settings.inputs.is_empty(), "--input names no files of a known kind");
        Ok(settings)
    }

    /// Tokens of the longest prompt.
    pub fn prompt_tokens_max(&self) -> usize {
        self.synthesizer.config.max_position_embeddings - self.augment.new_tokens
    }

    /// How the engine uses the device.
    pub fn engine_settings(&self) -> EngineSettings {
        EngineSettings {
            sequences_max: self.engine.sequences,
            step_tokens_max: self.engine.step_tokens,
            cache_bytes: self.engine.cache_mib << 20,
            queue_max: 2 * self.engine.sequences,
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
    pub fn configuration(&self, templates: &Templates, training: Option<Value>) -> Result<Value> {
        let tokenizer = |model: &Model| format!("{:032x}", model.tokenizer.digest());
        let kind = if self.device.is_cpu() { "cpu" } else { "cuda" };
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
                "arithmetic": format!("{kind} {}", self.dtype.as_str()),
            },
            "documents": self.preset.rules,
            "rounds": self.preset.rounds,
            "epoch_documents": self.preset.epoch_documents,
            "templates": format!("{:032x}", templates.digest()),
            "mix": { "weights": self.weights, "general": digests(&self.general)? },
            "lanes": self.augment.lanes,
            "length": self.augment.length,
            "model": {
                "name": self.model.name,
                "tokenizer": tokenizer(&self.model),
            },
            "training": training,
        }))
    }
}

/// How general instructions are written, by the first of each file; some must be there to mix in.
fn spellings(files: &[PathBuf]) -> Result<Vec<&'static str>> {
    let (mut names, mut fault) = (Vec::new(), None);
    for file in files {
        for read in instructions::read(file).context("--general")? {
            match read {
                Ok(instruction) => {
                    names.push(instruction.spelling.name());
                    break;
                }
                Err(rejected) => drop(fault.get_or_insert(rejected)),
            }
        }
    }
    let fault = fault.map(|rejected| format!("; the first: {rejected}")).unwrap_or_default();
    let some = files.is_empty() || !names.is_empty();
    ensure!(some, "--general: no record of its files can be used{fault}");
    names.sort_unstable();
    names.dedup();
    Ok(names)
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
