//! Parameters by name, from a Hugging Face directory, a GGUF file, or from memory.

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
        let tensor = tensor.map_err(|_| {
            Error::malformed(&self.origin, format!("the checkpoint has no parameter {name:?}"))
        })?;
        if tensor.dims() != shape {
            let reason = format!(
                "parameter {name:?} has shape {:?}, config.json says {shape:?}",
                tensor.dims()
            );
            return Err(Error::malformed(&self.origin, reason));
        }
        tensor.to_dtype(dtype).context(name)
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
