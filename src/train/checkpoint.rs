//! Checkpoints: a model directory that Hugging Face transformers loads, with what is needed to go on.
//!
//! ```text
//! step-00000100/  config.json generation_config.json tokenizer.json tokenizer_config.json
//!                 model.safetensors optimizer.safetensors trainer.json
//! ```
//!
//! A checkpoint is there whole or not at all: it is written under another name first.

use super::optimizer::Parameters;
use super::{Progress, TrainSettings, Trainer};
use crate::error::{Error, Result};
use crate::format::durable;
use crate::model::config::ModelConfig;
use crate::model::weights::Weights;
use crate::tokenizer::Tokenizer;
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

const PREFIX: &str = "step-";

/// `trainer.json`
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct State {
    progress: Progress,
    settings: TrainSettings,
}

impl Trainer {
    /// Writes a checkpoint of the current step into `folder`; returns its directory.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn save(&self, folder: &Path, tokenizer: &Tokenizer) -> Result<PathBuf> {
        let name = format!("{PREFIX}{:08}", self.progress.step);
        let (path, temporary) = (folder.join(&name), folder.join(format!(".{name}.tmp")));
        if path.exists() {
            return Ok(path); // the same step of the same run
        }
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(Error::file("remove", &temporary))?;
        }
        self.export(&temporary, tokenizer, DType::F32)?;
        let moments = moments(&self.parameters)?;
        save_tensors(&temporary.join("optimizer.safetensors"), &moments)?;
        let state = State { progress: self.progress, settings: self.settings };
        write_json(&temporary.join("trainer.json"), &serde_json::to_value(&state).expect("plain"))?;
        durable::publish_directory(&temporary, &path)?;
        Ok(path)
    }

    /// Writes the model alone, its parameters in `dtype`, as a Hugging Face directory.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn export(&self, directory: &Path, tokenizer: &Tokenizer, dtype: DType) -> Result<()> {
        fs::create_dir_all(directory).map_err(Error::file("create", directory))?;
        let mut config = self.config.to_json();
        config["torch_dtype"] = match dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        }
        .into();
        write_json(&directory.join("config.json"), &config)?;
        let generation = self.config.generation_json();
        write_json(&directory.join("generation_config.json"), &generation)?;
        let files = tokenizer.files();
        for (name, text) in
            [("tokenizer.json", &files.tokenizer), ("tokenizer_config.json", &files.config)]
        {
            let path = directory.join(name);
            fs::write(&path, text).map_err(Error::file("write", &path))?;
        }
        let value = |(name, parameter): (&str, &crate::kernels::adamw::Parameter)| {
            Ok((name.to_owned(), parameter.value()?.to_dtype(dtype)?))
        };
        let values = self.parameters.iter().map(value).collect::<Result<Vec<_>>>()?;
        save_tensors(&directory.join("model.safetensors"), &values)
    }

    /// Goes on from a checkpoint.
    ///
    /// # Errors
    /// If a file of it is missing or malformed.
    pub fn resume(
        directory: &Path,
        settings: TrainSettings,
        compute: DType,
        device: &Device,
    ) -> Result<Self> {
        let config = ModelConfig::read(directory)?;
        let weights = Weights::open(directory)?;
        let values = super::loaded(&config, &weights, device)?;
        let mut trainer = Trainer::new(&config, values, settings, compute, device)?;
        let path = directory.join("optimizer.safetensors");
        let bytes = fs::read(&path).map_err(Error::file("read", &path))?;
        let state = Weights::from_bytes(bytes, &path.display().to_string())?;
        for (name, parameter) in trainer.parameters.iter() {
            let value = parameter.value()?;
            let get =
                |moment| state.get(&format!("{name}.{moment}"), value.dims(), DType::F32, device);
            parameter.set_moments(&get("mean")?, &get("mean_square")?)?;
        }
        trainer.progress = read_state(directory)?.progress;
        Ok(trainer)
    }
}

/// The checkpoints in `folder`, oldest first. None if there is no such folder.
///
/// # Errors
/// If the folder cannot be listed.
pub fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::file("list", folder))? {
        let path = entry.map_err(Error::file("list", folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.strip_prefix(PREFIX).is_some_and(|step| step.parse::<u64>().is_ok()) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Removes all but the last `keep` checkpoints of `folder`, and what an interrupted save left.
///
/// # Errors
/// If the folder cannot be listed or a file not be removed.
pub fn prune(folder: &Path, keep: usize) -> Result<()> {
    let found = list(folder)?;
    for old in &found[..found.len().saturating_sub(keep)] {
        fs::remove_dir_all(old).map_err(Error::file("remove", old))?;
    }
    Ok(())
}

/// How far the training that wrote a checkpoint had come.
///
/// # Errors
/// If `trainer.json` is missing or malformed.
pub fn progress(directory: &Path) -> Result<Progress> {
    Ok(read_state(directory)?.progress)
}

fn read_state(directory: &Path) -> Result<State> {
    let path = directory.join("trainer.json");
    let text = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    serde_json::from_str(&text).map_err(|error| Error::malformed(&path, error))
}

fn moments(parameters: &Parameters) -> Result<Vec<(String, Tensor)>> {
    let mut all = Vec::new();
    for (name, parameter) in parameters.iter() {
        let (mean, mean_square) = parameter.moments()?;
        all.push((format!("{name}.mean"), mean));
        all.push((format!("{name}.mean_square"), mean_square));
    }
    Ok(all)
}

fn save_tensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    // Readers look for the format; without it some refuse the file.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let tensors: Vec<(&str, Tensor)> = tensors
        .iter()
        .map(|(name, tensor)| Ok((name.as_str(), tensor.contiguous()?)))
        .collect::<Result<_>>()?;
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .map_err(|error| Error::malformed(path, format!("could not be written: {error}")))
}

fn write_json(path: &Path, json: &serde_json::Value) -> Result<()> {
    fs::write(path, format!("{json:#}\n")).map_err(Error::file("write", path))
}
