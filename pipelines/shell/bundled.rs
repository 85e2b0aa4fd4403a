//! What comes inside the program: a small synthesizer, sample corpora, sample instructions.

use anyhow::{Context, Result};
use headwater::tokenizer::TokenizerFiles;
use std::path::{Path, PathBuf};

/// The files of the bundled synthesizer, as of any model directory.
pub struct BundledModel {
    /// `config.json`
    pub config: &'static str,
    /// Tokenizer and its configuration.
    pub tokenizer: TokenizerFiles,
    /// `model.safetensors`
    pub weights: &'static [u8],
}

macro_rules! asset {
    ($path:literal) => {
        include_str!(concat!("../../assets/", $path))
    };
}

/// The bundled synthesizer.
pub fn synthesizer() -> BundledModel {
    BundledModel {
        config: asset!("synthesizer/config.json"),
        tokenizer: TokenizerFiles {
            tokenizer: asset!("synthesizer/tokenizer.json").into(),
            config: asset!("synthesizer/tokenizer_config.json").into(),
        },
        weights: include_bytes!("../../assets/synthesizer/model.safetensors"),
    }
}

/// Sample files by name.
const SAMPLES: [(&str, &str); 4] = [
    ("biomedicine.xml", asset!("samples/biomedicine.xml")),
    ("finance.jsonl", asset!("samples/finance.jsonl")),
    ("instructions.jsonl", asset!("samples/instructions.jsonl")),
    ("general.jsonl", asset!("samples/general.jsonl")),
];

/// Writes a sample file into `folder`, where it can be looked at, and returns its path.
///
/// # Errors
/// If the disk refuses.
///
/// # Panics
/// If there is no such sample.
pub fn unpack(name: &str, folder: &Path) -> Result<PathBuf> {
    let (_, text) =
        SAMPLES.iter().find(|(known, _)| *known == name).expect("the caller knows the samples");
    std::fs::create_dir_all(folder).with_context(|| format!("could not create {folder:?}"))?;
    let path = folder.join(name);
    std::fs::write(&path, text).with_context(|| format!("could not write {path:?}"))?;
    Ok(path)
}
