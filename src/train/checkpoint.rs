//! Checkpoints: a model directory that Hugging Face transformers loads, with what is needed to go on.
//!
//! ```text
//! step-00000100/  config.json generation_config.json tokenizer.json tokenizer_config.json
//!                 model.safetensors optimizer.safetensors trainer.json
//! ```
//!
//! A checkpoint is there whole or not at all: it is written under another name first. It is taken as a copy
//! of the state ([`Snapshot`]), so that the next steps need not wait for the disk ([`super::writer`]).

use super::guard::Recent;
use super::replicas::Group;
use super::{Progress, TrainSettings, Trainer};
use crate::error::{Error, Result};
use crate::format::{durable, input};
use crate::model::config::ModelConfig;
use crate::model::weights::Weights;
use crate::tokenizer::Tokenizer;
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

const PREFIX: &str = "step-";

/// The other files that a training goes on from.
const RESUMED: [&str; 3] = ["config.json", "model.safetensors", "optimizer.safetensors"];

/// `trainer.json`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct State {
    progress: Progress,
    settings: TrainSettings,
    recent: Recent,
    /// xxh3-128 of the other files, by name. None of checkpoints that were written before there were digests.
    #[serde(default)]
    digests: BTreeMap<String, String>,
}

/// Which checkpoints stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// So many of the latest, one at least.
    pub last: usize,
    /// Those of every so many-th step, for ever.
    pub every: Option<u64>,
}

impl Retention {
    /// The steps that go, of those given, oldest first.
    fn outdated<'a>(&self, steps: &'a [u64]) -> impl Iterator<Item = u64> + 'a {
        let Retention { last, every } = *self;
        let older = &steps[..steps.len().saturating_sub(last.max(1))];
        let is_kept = move |step: u64| every.is_some_and(|every| step.is_multiple_of(every));
        older.iter().copied().filter(move |&step| !is_kept(step))
    }
}

/// All that a checkpoint holds, in memory of its own on the CPU: 12 bytes a parameter.
#[derive(Clone, Debug)]
pub struct Snapshot {
    config: ModelConfig,
    values: Vec<(String, Tensor)>,
    moments: Vec<(String, Tensor)>,
    state: State,
}

impl Snapshot {
    /// Writes a checkpoint into `folder`; returns its directory. When this returns, it is there for good.
    ///
    /// # Errors
    /// If the disk refuses; there is then no checkpoint of this step.
    pub fn save(&self, folder: &Path, tokenizer: &Tokenizer) -> Result<PathBuf> {
        let (path, temporary) = paths(folder, self.state.progress.step);
        if path.exists() {
            return Ok(path); // the same step of the same run
        }
        remove(&temporary)?;
        write_model(&temporary, &self.config, &self.values, DType::F32, tokenizer)?;
        save_tensors(&temporary.join("optimizer.safetensors"), &self.moments)?;
        let mut state = self.state.clone();
        for name in RESUMED {
            state.digests.insert(name.into(), digest_of(&temporary.join(name))?);
        }
        let state = serde_json::to_value(&state).expect("plain");
        write_json(&temporary.join("trainer.json"), &state)?;
        durable::publish_directory(&temporary, &path)?;
        Ok(path)
    }
}

impl Trainer {
    /// A copy of everything that a checkpoint of the current step holds.
    ///
    /// # Errors
    /// If the device fails.
    pub fn snapshot(&self) -> Result<Snapshot> {
        // Parts of a tensor share its storage until they are copied; a copy between devices takes all of it.
        let copy = |tensor: Tensor| tensor.force_contiguous()?.to_device(&Device::Cpu);
        let (mut values, mut moments) = (Vec::new(), Vec::new());
        for (name, parameter) in self.replicas.first().parameters.iter() {
            let (mean, mean_square) = parameter.moments()?;
            values.push((name.to_owned(), copy(parameter.value()?)?));
            moments.push((format!("{name}.mean"), copy(mean)?));
            moments.push((format!("{name}.mean_square"), copy(mean_square)?));
        }
        let (progress, settings, recent) = (self.progress, self.settings, self.recent.clone());
        let state = State { progress, settings, recent, digests: BTreeMap::new() };
        Ok(Snapshot { config: self.config.clone(), values, moments, state })
    }

    /// Writes the model alone, its parameters in `dtype`, as a Hugging Face directory.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn export(&self, directory: &Path, tokenizer: &Tokenizer, dtype: DType) -> Result<()> {
        let value = |(name, parameter): (&str, &crate::kernels::adamw::Parameter)| {
            Ok((name.to_owned(), parameter.value()?))
        };
        let values =
            self.replicas.first().parameters.iter().map(value).collect::<Result<Vec<_>>>()?;
        write_model(directory, &self.config, &values, dtype, tokenizer)
    }

    /// Goes on from a checkpoint.
    ///
    /// # Errors
    /// If a file of it is missing, malformed or not what was written, or a device fails.
    pub fn resume(
        directory: &Path,
        settings: TrainSettings,
        compute: DType,
        devices: &[Device],
    ) -> Result<Self> {
        Self::resume_of(directory, settings, compute, Group::new(devices)?)
    }

    pub(super) fn resume_of(
        directory: &Path,
        settings: TrainSettings,
        compute: DType,
        group: Group,
    ) -> Result<Self> {
        let State { progress, settings: _, recent, digests } = read_state(directory)?;
        for (name, digest) in &digests {
            let path = directory.join(name);
            if digest_of(&path)? != *digest {
                return Err(Error::malformed(&path, "its bytes are not those that were written"));
            }
        }
        let config = ModelConfig::read(directory)?;
        let weights = Weights::open(directory)?;
        let device = group.devices[0].clone();
        // As they were written, whatever they are.
        let get = |weights: &Weights, name: &str, shape: &[usize]| {
            weights.get(name, shape, DType::F32, &device)
        };
        let parameters = config.parameters();
        let value =
            |(name, shape): &(String, Vec<usize>)| Ok((name.clone(), get(&weights, name, shape)?));
        let values = parameters.iter().map(value).collect::<Result<Vec<_>>>()?;
        let mut trainer = Trainer::of(&config, values, settings, compute, group)?;
        let state = Weights::of_file(&directory.join("optimizer.safetensors"))?;
        for (name, shape) in &parameters {
            let moment = |moment| get(&state, &format!("{name}.{moment}"), shape);
            trainer.replicas.set_moments(name, &moment("mean")?, &moment("mean_square")?)?;
        }
        (trainer.progress, trainer.recent) = (progress, recent);
        Ok(trainer)
    }
}

/// The checkpoints in `folder`, oldest first. None if there is no such folder.
///
/// # Errors
/// If the folder cannot be listed.
pub fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    Ok(steps(folder)?.into_iter().map(|step| paths(folder, step).0).collect())
}

/// Removes the checkpoints of `folder` that are not to stay.
///
/// # Errors
/// If the folder cannot be listed or a file not be removed.
pub fn prune(folder: &Path, retention: Retention) -> Result<()> {
    for step in retention.outdated(&steps(folder)?) {
        let (path, temporary) = paths(folder, step);
        remove(&temporary)?;
        // Under another name first: what is half removed is no checkpoint.
        fs::rename(&path, &temporary).map_err(Error::file("rename", &path))?;
        remove(&temporary)?;
    }
    Ok(())
}

/// Removes what a save or a removal that was interrupted left in `folder`.
///
/// # Errors
/// If the folder cannot be listed or a file not be removed.
pub fn sweep(folder: &Path) -> Result<()> {
    for name in names(folder)? {
        let step = name.strip_prefix('.').and_then(|name| name.strip_suffix(".tmp"));
        if step.and_then(step_of).is_some() {
            remove(&folder.join(name))?;
        }
    }
    Ok(())
}

/// The directory of the checkpoint of a step, and where it is written.
fn paths(folder: &Path, step: u64) -> (PathBuf, PathBuf) {
    let name = format!("{PREFIX}{step:08}");
    (folder.join(&name), folder.join(format!(".{name}.tmp")))
}

/// The steps of which there are checkpoints, in order.
fn steps(folder: &Path) -> Result<Vec<u64>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut steps: Vec<u64> = names(folder)?.iter().filter_map(|name| step_of(name)).collect();
    steps.sort_unstable();
    Ok(steps)
}

fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let name = |entry: std::io::Result<fs::DirEntry>| {
        Ok(entry.map_err(Error::file("list", folder))?.file_name().to_string_lossy().into_owned())
    };
    fs::read_dir(folder).map_err(Error::file("list", folder))?.map(name).collect()
}

fn remove(directory: &Path) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory).map_err(Error::file("remove", directory))?;
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

/// xxh3-128 of the bytes of a file.
fn digest_of(path: &Path) -> Result<String> {
    Ok(format!("{:032x}", input::digest(path)?))
}

fn read_state(directory: &Path) -> Result<State> {
    let path = directory.join("trainer.json");
    let text = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    serde_json::from_str(&text).map_err(|error| Error::malformed(&path, error))
}

/// Writes parameters, in `dtype`, with all that makes a directory a model.
fn write_model(
    directory: &Path,
    config: &ModelConfig,
    values: &[(String, Tensor)],
    dtype: DType,
    tokenizer: &Tokenizer,
) -> Result<()> {
    fs::create_dir_all(directory).map_err(Error::file("create", directory))?;
    let mut json = config.to_json();
    json["torch_dtype"] = match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
    .into();
    write_json(&directory.join("config.json"), &json)?;
    write_json(&directory.join("generation_config.json"), &config.generation_json())?;
    let files = tokenizer.files();
    for (name, text) in
        [("tokenizer.json", &files.tokenizer), ("tokenizer_config.json", &files.config)]
    {
        let path = directory.join(name);
        fs::write(&path, text).map_err(Error::file("write", &path))?;
    }
    let cast = |(name, value): &(String, Tensor)| Ok((name.clone(), value.to_dtype(dtype)?));
    let values = values.iter().map(cast).collect::<Result<Vec<_>>>()?;
    save_tensors(&directory.join("model.safetensors"), &values)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn check(retention: Retention, steps: &[u64], gone: &[u64]) {
        assert_eq!(retention.outdated(steps).collect::<Vec<_>>(), gone, "{retention:?}");
    }

    #[test]
    fn the_last_checkpoints_stay_and_every_so_many_th_for_ever() {
        let steps = [10, 20, 30, 40, 45];
        check(Retention { last: 2, every: None }, &steps, &[10, 20, 30]);
        check(Retention { last: 1, every: Some(20) }, &steps, &[10, 30]);
        check(Retention { last: 9, every: None }, &steps, &[]);
        check(Retention { last: 0, every: None }, &steps, &[10, 20, 30, 40]);
    }

    #[test]
    fn what_was_interrupted_is_no_checkpoint_and_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let names =
            ["step-00000009", "step-100000000", ".step-00000012.tmp", "step-x", ".other.tmp"];
        names.iter().for_each(|name| fs::create_dir(folder.path().join(name)).unwrap());
        let found = list(folder.path()).unwrap();
        assert_eq!(found, [&names[0], &names[1]].map(|name| folder.path().join(name)));
        sweep(folder.path()).unwrap();
        let left: Vec<bool> = names.iter().map(|name| folder.path().join(name).exists()).collect();
        assert_eq!(left, [true, true, false, true, true]);
        prune(folder.path(), Retention { last: 1, every: None }).unwrap();
        assert_eq!(list(folder.path()).unwrap(), [folder.path().join(names[1])]);
        assert_eq!(names_of(folder.path()), 3);
    }

    fn names_of(folder: &Path) -> usize {
        names(folder).unwrap().len()
    }

    #[test]
    fn a_folder_that_is_not_there_holds_no_checkpoints() {
        assert!(list(Path::new("/no/such/folder")).unwrap().is_empty());
    }
}
