//! Finds the models a command names: a directory, a GGUF file, a shape, or the one inside the program.

use super::bundled::{self, BundledModel};
use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use headwater::format::input;
use headwater::gguf::Gguf;
use headwater::kernels::instruction_set;
use headwater::model::Llama;
use headwater::model::config::ModelConfig;
use headwater::model::precision::Precision;
use headwater::model::shape::Shape;
use headwater::model::weights::{Weights, checkpoint_files};
use headwater::request_store::key::Identity;
use headwater::tokenizer::Tokenizer;
use headwater::train;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::xxh3_128;

/// The name of the model inside the program.
pub const BUNDLED: &str = "bundled";

/// A model with its tokenizer, not yet loaded.
#[derive(Clone, Debug)]
pub struct Model {
    /// What the command called it.
    pub name: String,
    /// Its shape.
    pub config: ModelConfig,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// The type of its weights when it generates: at first the one that suits its file on a CPU.
    pub precision: Precision,
    origin: Origin,
}

#[derive(Clone, Debug)]
enum Origin {
    Bundled,
    Directory(PathBuf),
    Gguf(PathBuf),
    /// Random weights.
    Shape,
}

impl Model {
    /// The model called `name`: `bundled`, a Hugging Face directory, or a GGUF file.
    ///
    /// # Errors
    /// If it is none of them, or a file is missing or malformed.
    pub fn trained(name: &str) -> Result<Self> {
        if name == BUNDLED {
            return Self::bundled();
        }
        let directory = PathBuf::from(name);
        if directory.is_file() && Gguf::is_one(&directory)? {
            return Self::gguf(directory);
        }
        if !directory.is_dir() {
            bail!(
                "{name:?} is neither a directory nor a GGUF file; give a Hugging Face model \
                 directory, a GGUF file or {BUNDLED:?}"
            );
        }
        let mut config = ModelConfig::read(&directory)?;
        let tokenizer = Tokenizer::read(&directory)?;
        config.eos_token_ids = ends(&directory, &config, &tokenizer);
        let origin = Origin::Directory(directory);
        Ok(Model { name: name.to_owned(), config, tokenizer, precision: Precision::F32, origin })
    }

    fn gguf(path: PathBuf) -> Result<Self> {
        let file = Gguf::open(&path)?;
        let tokenizer = file.tokenizer()?;
        let mut config = file.config().clone();
        config.eos_token_ids.extend(tokenizer.eos());
        config.eos_token_ids.sort_unstable();
        config.eos_token_ids.dedup();
        Ok(Model {
            name: path.display().to_string(),
            config,
            tokenizer,
            precision: file.precision(),
            origin: Origin::Gguf(path),
        })
    }

    /// The model called `name`: a shape with random weights and the tokenizer of `tokenizer`, or whatever
    /// [`Model::trained`] finds.
    ///
    /// # Errors
    /// If it is nothing we know.
    pub fn named(name: &str, tokenizer: &Tokenizer, length: usize) -> Result<Self> {
        let Some(shape) = Shape::named(name) else {
            return Self::trained(name).with_context(|| {
                format!("--model {name:?} is also none of the shapes {}", Shape::names())
            });
        };
        let config = shape.config();
        let config = ModelConfig {
            vocab_size: tokenizer.vocabulary(),
            max_position_embeddings: config.max_position_embeddings.max(length),
            bos_token_id: tokenizer.bos(),
            eos_token_ids: tokenizer.eos().into_iter().collect(),
            ..config
        };
        Ok(Model {
            name: name.to_owned(),
            config,
            tokenizer: tokenizer.clone(),
            precision: Precision::F32,
            origin: Origin::Shape,
        })
    }

    /// A model of random weights in the usual vocabulary of its shape, to measure with.
    pub fn random(shape: &Shape, tokenizer: &Tokenizer) -> Self {
        Model {
            name: shape.name.to_owned(),
            config: shape.config(),
            tokenizer: tokenizer.clone(),
            precision: Precision::F32,
            origin: Origin::Shape,
        }
    }

    fn bundled() -> Result<Self> {
        let BundledModel { config, tokenizer, weights: _ } = bundled::synthesizer();
        let mut config = ModelConfig::parse(config).map_err(anyhow::Error::msg)?;
        let tokenizer = Tokenizer::from_files(tokenizer).map_err(anyhow::Error::msg)?;
        config.eos_token_ids = tokenizer.eos().into_iter().collect();
        Ok(Model {
            name: BUNDLED.into(),
            config,
            tokenizer,
            precision: Precision::F32,
            origin: Origin::Bundled,
        })
    }

    /// A digest of the weights: the bytes of the files, or the name of the shape.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn digest(&self) -> Result<String> {
        let mut digests = String::new();
        match &self.origin {
            Origin::Bundled => {
                digests = format!("{:032x}", xxh3_128(bundled::synthesizer().weights));
            }
            Origin::Shape => digests = format!("random {}", self.name),
            Origin::Directory(directory) => {
                for file in checkpoint_files(directory)? {
                    digests += &format!("{:032x}", input::digest(&file)?);
                }
            }
            Origin::Gguf(file) => digests = format!("{:032x}", input::digest(file)?),
        }
        Ok(digests)
    }

    /// What decides all its answers besides the request: this program, its weights, its shape, the ids that
    /// end a generation, and how it computes. Its context decides which requests it takes, not what it says.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn identity(&self, arithmetic: &str) -> Result<Identity> {
        let mut shape = self.config.to_json();
        shape["max_position_embeddings"] = Value::Null;
        let description = json!({
            "headwater": env!("CARGO_PKG_VERSION"),
            "weights": self.digest()?,
            "shape": shape,
            "ends": self.config.eos_token_ids,
            "arithmetic": arithmetic,
            "instruction_set": instruction_set(),
        });
        Ok(Identity::new(&description.to_string()))
    }

    /// Loads the model to generate with.
    ///
    /// # Errors
    /// If the weights do not fit the shape, or the device has no room or does not compute in their type.
    pub fn load(&self, device: &Device) -> Result<Llama> {
        let weights = self.weights()?.context("random weights have nothing to say")?;
        Ok(Llama::load(&self.config, &weights, self.precision, device)?)
    }

    /// The parameters to start training from.
    ///
    /// # Errors
    /// If the weights do not fit the shape, the device has no room, or it is a GGUF file.
    pub fn parameters(&self, seed: u64, device: &Device) -> Result<Vec<(String, Tensor)>> {
        self.check_trainable()?;
        Ok(match self.weights()? {
            Some(weights) => train::loaded(&self.config, &weights, device)?,
            None => train::initial(&self.config, seed, device)?,
        })
    }

    /// Whether the model can be trained.
    ///
    /// # Errors
    /// If it is a GGUF file: these are made for generation.
    pub fn check_trainable(&self) -> Result<()> {
        if let Origin::Gguf(path) = &self.origin {
            bail!(
                "a GGUF file cannot be trained: {}; give the Hugging Face directory it was made from",
                path.display()
            );
        }
        Ok(())
    }

    fn weights(&self) -> Result<Option<Weights>> {
        Ok(match &self.origin {
            Origin::Shape => None,
            Origin::Directory(directory) => Some(Weights::open(directory)?),
            Origin::Gguf(file) => Some(Weights::open_gguf(file)?),
            Origin::Bundled => {
                let bytes = bundled::synthesizer().weights.to_vec();
                Some(Weights::from_bytes(bytes, "the bundled synthesizer")?)
            }
        })
    }
}

/// The ids that end a generation: those of `generation_config.json`, of `config.json`, and the
/// tokenizer's own.
fn ends(directory: &Path, config: &ModelConfig, tokenizer: &Tokenizer) -> Vec<u32> {
    let mut ends = config.eos_token_ids.clone();
    let text = std::fs::read_to_string(directory.join("generation_config.json"));
    let json: serde_json::Value =
        text.ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    match &json["eos_token_id"] {
        serde_json::Value::Array(ids) => {
            ends.extend(ids.iter().filter_map(|id| id.as_u64().map(|id| id as u32)));
        }
        id => ends.extend(id.as_u64().map(|id| id as u32)),
    }
    ends.extend(tokenizer.eos());
    ends.sort_unstable();
    ends.dedup();
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(change: impl Fn(&mut ModelConfig), arithmetic: &str) -> Identity {
        let mut model = Model::trained(BUNDLED).expect("it is in the program");
        change(&mut model.config);
        model.identity(arithmetic).expect("nothing is read")
    }

    #[test]
    fn an_identity_tells_models_apart_that_answer_differently() {
        let bundled = identity(|_| {}, "cpu f32");
        assert_ne!(identity(|_| {}, "cpu bf16"), bundled);
        assert_ne!(identity(|config| config.eos_token_ids.push(7), "cpu f32"), bundled);
        assert_ne!(identity(|config| config.rope_theta *= 2.0, "cpu f32"), bundled);
        assert_eq!(identity(|config| config.max_position_embeddings = 512, "cpu f32"), bundled);
    }
}
