//! Parameters by name, from a Hugging Face directory, a GGUF file, or from memory.

use super::config::ModelConfig;
use super::precision::Precision;
use crate::error::{Context, Error, Result};
use crate::gguf::Gguf;
use crate::kernels::mapped::mapped;
use crate::kernels::packed::PackedWeight;
use candle_core::safetensors::{BufferedSafetensors, MmapedSafetensors};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The parameters of a checkpoint.
pub struct Weights {
    files: Files,
    origin: PathBuf,
}

enum Files {
    Mapped(MmapedSafetensors),
    Memory(BufferedSafetensors),
    Gguf(Box<Gguf>),
}

impl Weights {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// If neither is there, or a file is not a checkpoint.
    pub fn open(directory: &Path) -> Result<Self> {
        let paths = checkpoint_files(directory)?;
        let files = mapped(&paths).map_err(|error| Error::malformed(directory, error))?;
        Ok(Weights { files: Files::Mapped(files), origin: directory.to_owned() })
    }

    /// Opens one file of safetensors.
    ///
    /// # Errors
    /// If it is not there, or no checkpoint.
    pub fn of_file(path: &Path) -> Result<Self> {
        let files = mapped(&[path.to_owned()]).map_err(|error| Error::malformed(path, error))?;
        Ok(Weights { files: Files::Mapped(files), origin: path.to_owned() })
    }

    /// A checkpoint that is already in memory.
    ///
    /// # Errors
    /// If the bytes are not a checkpoint.
    pub fn from_bytes(bytes: Vec<u8>, origin: &str) -> Result<Self> {
        let files = BufferedSafetensors::new(bytes)
            .map_err(|error| Error::malformed(Path::new(origin), error))?;
        Ok(Weights { files: Files::Memory(files), origin: origin.into() })
    }

    /// The parameters in a GGUF file.
    ///
    /// # Errors
    /// If it is none, or not of a model that we have.
    pub fn open_gguf(path: &Path) -> Result<Self> {
        let file = Gguf::open(path)?;
        Ok(Weights { files: Files::Gguf(Box::new(file)), origin: path.to_owned() })
    }

    /// Loads a parameter of a known shape.
    ///
    /// # Errors
    /// If it is missing or has another shape.
    pub fn get(
        &self,
        name: &str,
        shape: &[usize],
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let tensor = match &self.files {
            Files::Mapped(files) => files.load(name, device),
            Files::Memory(files) => files.load(name, device),
            Files::Gguf(file) => return from_rows(file, name, shape, dtype, device),
        };
        let tensor = tensor.map_err(|error| {
            let reason = match self.names().iter().any(|own| own == name) {
                true => format!("parameter {name:?}: {error}"),
                false => format!("the checkpoint has no parameter {name:?}"),
            };
            Error::malformed(&self.origin, reason)
        })?;
        if !tensor.dtype().is_float() {
            let reason = format!("parameter {name:?} is of whole numbers, {:?}", tensor.dtype());
            return Err(Error::malformed(&self.origin, reason));
        }
        if tensor.dims() != shape {
            let reason = format!(
                "parameter {name:?} has shape {:?}, config.json says {shape:?}",
                tensor.dims()
            );
            return Err(Error::malformed(&self.origin, reason));
        }
        tensor.to_dtype(dtype).context(name)
    }

    /// Loads a parameter as [`Weights::get`] does, all of whose numbers are to be finite: whoever trains on others is told
    /// that the data are bad.
    ///
    /// # Errors
    /// If one is not finite, too.
    pub fn finite(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        let tensor = self.get(name, shape, DType::F32, device)?;
        let nothing = (&tensor * 0.0).and_then(|zeros| zeros.sum_all()?.to_scalar::<f32>());
        match nothing.context(name)? == 0.0 {
            true => Ok(tensor),
            false => {
                let reason = format!("parameter {name:?} holds numbers that are not finite");
                Err(Error::malformed(&self.origin, reason))
            }
        }
    }

    /// Checks that the checkpoint holds nothing that a model of this configuration would leave out, such as biases.
    ///
    /// # Errors
    /// If it does; the first in the order of names.
    pub fn check_all_used(&self, config: &ModelConfig) -> Result<()> {
        let used: BTreeSet<String> =
            config.parameters().into_iter().map(|(name, _)| name).collect();
        let is_known = |name: &String| {
            // The frequencies of rotation follow from the configuration; a tied head is the embedding.
            used.contains(name)
                || name.ends_with("rotary_emb.inv_freq")
                || (config.tie_word_embeddings && name == "lm_head.weight")
        };
        match self.names().into_iter().filter(|name| !is_known(name)).min() {
            None => Ok(()),
            Some(name) => {
                let reason =
                    format!("config.json says no parameter {name:?}, which the checkpoint has");
                Err(Error::malformed(&self.origin, reason))
            }
        }
    }

    /// Names of the parameters; none of a GGUF file, whose own are others.
    fn names(&self) -> Vec<String> {
        let names = |tensors: Vec<(String, _)>| tensors.into_iter().map(|(name, _)| name).collect();
        match &self.files {
            Files::Mapped(files) => names(files.tensors()),
            Files::Memory(files) => names(files.tensors()),
            Files::Gguf(_) => Vec::new(),
        }
    }

    /// Loads a weight `(out, in)` of a known shape, packed for the CPU. What is quantised in a GGUF file is
    /// packed row by row: it never stands in memory in f32.
    ///
    /// # Errors
    /// If it is missing or has another shape.
    pub fn packed(
        &self,
        name: &str,
        shape: &[usize],
        precision: Precision,
    ) -> Result<PackedWeight> {
        let kind = precision.packed();
        if let (Files::Gguf(file), Precision::F32 | Precision::Bf16 | Precision::Int8) =
            (&self.files, precision)
        {
            let rows = file.rows(name, shape)?;
            let read = |row, out: &mut [f32]| rows.row(row, out);
            return PackedWeight::from_rows(rows.count(), rows.width(), kind, read).context(name);
        }
        let dtype = match precision {
            Precision::Int8 => DType::F32,
            precision => precision.tensors()?,
        };
        let tensor = self.get(name, shape, dtype, &Device::Cpu)?;
        PackedWeight::of_type(&tensor, kind).context(name)
    }
}

/// A parameter of a GGUF file as a tensor.
fn from_rows(
    file: &Gguf,
    name: &str,
    shape: &[usize],
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let rows = file.rows(name, shape)?;
    let mut values = vec![0.0; rows.count() * rows.width()];
    let each = values.par_chunks_mut(rows.width().max(1)).enumerate();
    each.try_for_each(|(row, out)| rows.row(row, out)).context(name)?;
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu).context(name)?;
    tensor.to_dtype(dtype).and_then(|tensor| tensor.to_device(device)).context(name)
}

/// The files of a checkpoint in `directory`, in the order of their names.
///
/// # Errors
/// If there are none.
pub fn checkpoint_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let single = directory.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let index = directory.join("model.safetensors.index.json");
    if !index.exists() {
        let reason = "holds neither model.safetensors nor model.safetensors.index.json";
        return Err(Error::malformed(directory, reason));
    }
    let text = std::fs::read_to_string(&index).map_err(Error::file("read", &index))?;
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| Error::malformed(&index, error))?;
    let map = json["weight_map"]
        .as_object()
        .ok_or_else(|| Error::malformed(&index, "has no object \"weight_map\""))?;
    let names: BTreeSet<&str> = map.values().filter_map(serde_json::Value::as_str).collect();
    names.into_iter().map(|name| shard(directory, &index, name)).collect()
}

/// A shard is a file of the same directory: an index cannot lead elsewhere.
fn shard(directory: &Path, index: &Path, name: &str) -> Result<PathBuf> {
    let plain = Path::new(name).file_name().is_some_and(|file| file == name);
    match plain {
        true => Ok(directory.join(name)),
        false => Err(Error::malformed(index, format!("{name:?} is not a file name"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::shape::Shape;
    use super::*;
    use std::collections::BTreeMap;

    /// A checkpoint of a small model, after a change.
    fn changed(change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> (ModelConfig, Weights) {
        let shape = Shape::named("2m").unwrap().config();
        let config = ModelConfig { vocab_size: 90, num_hidden_layers: 1, ..shape };
        let ones = |shape: Vec<usize>| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
        let named = config.parameters().into_iter().map(|(name, shape)| (name, ones(shape)));
        let mut tensors: BTreeMap<String, Tensor> = named.collect();
        change(&mut tensors);
        let bytes = safetensors::serialize(tensors, None).unwrap();
        (config, Weights::from_bytes(bytes, "made").unwrap())
    }

    fn refused<T>(result: Result<T>, said: &str) {
        let error = result.err().expect("it is refused").to_string();
        assert!(error.contains(said) && error.contains("made"), "{error}");
    }

    fn norm(weights: &Weights, config: &ModelConfig) -> Result<Tensor> {
        weights.finite("model.norm.weight", &[config.hidden_size], &Device::Cpu)
    }

    #[test]
    fn what_a_model_would_leave_out_is_refused_by_name() {
        let bias = |name: &'static str| {
            changed(move |all| {
                let bias = all["model.norm.weight"].clone();
                all.insert(name.into(), bias);
            })
        };
        let (config, weights) = bias("model.layers.0.self_attn.q_proj.bias");
        refused(weights.check_all_used(&config), "q_proj.bias");
        let (config, weights) = bias("model.layers.0.self_attn.rotary_emb.inv_freq");
        assert!(weights.check_all_used(&config).is_ok());
        let (config, weights) = bias("lm_head.weight");
        let is_tied = |tie_word_embeddings| ModelConfig { tie_word_embeddings, ..config.clone() };
        assert!(weights.check_all_used(&is_tied(true)).is_ok());
        assert!(weights.check_all_used(&is_tied(false)).is_ok());
    }

    #[test]
    fn numbers_that_are_none_and_whole_ones_are_told_apart_from_what_is_missing() {
        let set = |value: Option<Tensor>| {
            changed(|all| match value {
                Some(value) => drop(all.insert("model.norm.weight".into(), value)),
                None => drop(all.remove("model.norm.weight")),
            })
        };
        let of = |value: f32, config: &ModelConfig| {
            Tensor::full(value, config.hidden_size, &Device::Cpu).unwrap()
        };
        let (config, weights) = changed(|_| ());
        assert!(norm(&weights, &config).is_ok());
        for value in [f32::NAN, f32::INFINITY] {
            refused(norm(&set(Some(of(value, &config))).1, &config), "not finite");
        }
        let whole = of(1.0, &config).to_dtype(DType::U32).unwrap();
        refused(norm(&set(Some(whole)).1, &config), "whole numbers");
        refused(norm(&set(None).1, &config), "has no parameter");
    }
}
