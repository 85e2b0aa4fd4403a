//! Models of the Llama and Mistral family in GGUF files, as llama.cpp has them.
//!
//! ```text
//! file ─ header ─┬─ settings ─▶ shape (config.rs), tokenizer (vocabulary.rs)
//!                └─ places ───▶ rows in f32, one tensor in memory at a time (tensors.rs)
//! ```

mod config;
mod header;
#[cfg(test)]
mod laws;
mod tensors;
mod vocabulary;

use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::model::precision::Precision;
use crate::tokenizer::{Tokenizer, TokenizerFiles};
use config::ROPE_FACTORS;
use header::{Header, MAGIC, Place};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
pub(crate) use tensors::Rows;

/// A GGUF file whose header was read and found to describe a model that we have.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: File,
    header: Header,
    config: ModelConfig,
}

impl Gguf {
    /// Whether a file starts as GGUF files do.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn is_one(path: &Path) -> Result<bool> {
        let mut file = File::open(path).map_err(Error::file("open", path))?;
        let mut start = [0; MAGIC.len()];
        Ok(file.read_exact(&mut start).is_ok() && start == MAGIC)
    }

    /// Opens a file and checks all of it but the numbers in its tensors.
    ///
    /// # Errors
    /// Names the file, and what in it is missing, malformed or not supported.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::file("open", path))?;
        let length = file.metadata().map_err(Error::file("read", path))?.len();
        let malformed = |reason: String| Error::malformed(path, reason);
        let header = Header::read(BufReader::new(&file), length).map_err(malformed)?;
        let factors = match header.tensors.get(ROPE_FACTORS) {
            Some(place) => Some(rope_factors(&file, place).map_err(malformed)?),
            None => None,
        };
        let config = config::config(&header, factors).map_err(malformed)?;
        check_tensors(&header, &config).map_err(malformed)?;
        Ok(Gguf { path: path.to_owned(), file, header, config })
    }

    /// The shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The type that suits the weights of the file: 8 bits if any of them are quantised, else their own.
    pub fn precision(&self) -> Precision {
        config::own_precision(&self.header)
    }

    /// The tokenizer: that of `tokenizer.json` beside the file, or else the one inside it.
    ///
    /// # Errors
    /// Names the file that is malformed, or the key that is missing or stands for a tokenizer that we do
    /// not have.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let beside = self.path.with_file_name("tokenizer.json");
        let malformed = |reason: String| Error::malformed(&self.path, reason);
        let tokenizer = match beside.exists() {
            true => {
                let read =
                    |path: &Path| std::fs::read_to_string(path).map_err(Error::file("read", path));
                let settings = self.path.with_file_name("tokenizer_config.json");
                let config = match settings.exists() {
                    true => read(&settings)?,
                    false => vocabulary::settings(&self.header).map_err(malformed)?,
                };
                let files = TokenizerFiles { tokenizer: read(&beside)?, config };
                Tokenizer::from_files(files).map_err(|reason| Error::malformed(&beside, reason))?
            }
            false => vocabulary::tokenizer(&self.header).map_err(malformed)?,
        };
        let (tokens, rows) = (tokenizer.vocabulary(), self.config.vocab_size);
        match tokens <= rows {
            true => Ok(tokenizer),
            false => Err(malformed(format!("{tokens} tokens have embeddings in {rows} rows only"))),
        }
    }

    /// A parameter under its name in checkpoints, with its shape.
    pub(crate) fn rows(&self, parameter: &str, shape: &[usize]) -> Result<Rows> {
        let name = tensors::name_of(parameter);
        let place = name.and_then(|name| self.header.tensors.get(&name));
        let place = place.filter(|place| place.shape == shape).ok_or_else(|| {
            Error::malformed(&self.path, format!("has no {parameter:?} of shape {shape:?}"))
        })?;
        let sorted_heads = tensors::sorted_heads(parameter, &self.config);
        Rows::read(&self.file, place, sorted_heads).map_err(Error::file("read", &self.path))
    }
}

fn rope_factors(file: &File, place: &Place) -> std::result::Result<Vec<f32>, String> {
    let failed = |error: &dyn std::fmt::Display| format!("tensor {ROPE_FACTORS:?}: {error}");
    let &[width] = place.shape.as_slice() else {
        return Err(failed(&format!("cannot have the shape {:?}", place.shape)));
    };
    let rows = Rows::read(file, place, None).map_err(|error| failed(&error))?;
    let mut factors = vec![0.0; width];
    rows.row(0, &mut factors).map_err(|error| failed(&error))?;
    Ok(factors)
}

/// Every parameter is there in its shape, and nothing else is: what we do not know would change the output.
fn check_tensors(header: &Header, config: &ModelConfig) -> std::result::Result<(), String> {
    let mut unknown: BTreeSet<&str> = header.tensors.keys().map(String::as_str).collect();
    unknown.remove(ROPE_FACTORS);
    for (parameter, shape) in config.parameters() {
        let name = tensors::name_of(&parameter).expect("every parameter has a name in GGUF");
        let Some(place) = header.tensors.get(&name) else {
            return Err(format!("the file has no tensor {name:?}"));
        };
        if place.shape != shape {
            return Err(format!(
                "tensor {name:?} has shape {:?}, by the settings it should be {shape:?}",
                place.shape
            ));
        }
        unknown.remove(name.as_str());
    }
    match unknown.first() {
        Some(name) => {
            Err(format!("tensor {name:?} is no part of a Llama or Mistral model that we have"))
        }
        None => Ok(()),
    }
}
