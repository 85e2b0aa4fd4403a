//! Flags that several commands share.

use super::models::{BUNDLED, Model};
use anyhow::{Result, bail, ensure};
use clap::Args;
use headwater::format::jsonl::Fields;
use headwater::gate::DocumentRules;
use std::path::PathBuf;

/// What is read, and where everything goes.
#[derive(Args, Clone, Debug)]
pub struct InputArgs {
    /// Files or directories to read: .xml, .jsonl, .txt, also with .gz or .zst behind
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    pub input: Vec<PathBuf>,
    /// The run folder; an existing one is continued
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// JSON fields that make up the text [default: text, else title and abstract, else content]
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    pub text_field: Vec<String>,
    /// JSON field that holds the id
    #[arg(long, default_value = "id", value_name = "NAME")]
    pub id_field: String,
    /// Read at most so many records
    #[arg(long, value_name = "N")]
    pub limit: Option<u64>,
    /// Words of a document at least; shorter ones are rejected [default: 20 for finance, else 1]
    #[arg(long, value_name = "N")]
    pub min_words: Option<usize>,
    /// What becomes of documents whose text was read before: keep or drop [default: drop for finance, else keep]
    #[arg(long, value_name = "HOW")]
    pub duplicates: Option<String>,
}

/// What is made of it.
#[derive(Args, Clone, Debug)]
pub struct AugmentArgs {
    /// The synthesizer: a Hugging Face directory of the Llama and Mistral family, or "bundled"
    #[arg(long, default_value = BUNDLED, value_name = "DIR")]
    pub synthesizer: String,
    /// Texts that may see each other: one a round [default: 3]
    #[arg(long, value_name = "M")]
    pub rounds: Option<usize>,
    /// Tokens to generate for each text at most
    #[arg(long, default_value_t = 400, value_name = "N")]
    pub new_tokens: usize,
    /// Tokens of a prompt with its answer at most; less if the synthesizer takes less
    #[arg(long, default_value_t = 4096, value_name = "N")]
    pub context: usize,
    /// Files of general instructions to mix in (JSON Lines)
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub general: Vec<PathBuf>,
    /// Tokens of augmented documents to tokens of general instructions [default: 1:1]
    #[arg(long, value_name = "A:B")]
    pub ratio: Option<String>,
    /// Tokens of a packed sequence
    #[arg(long, default_value_t = 2048, value_name = "N")]
    pub length: usize,
    /// Texts that are committed together: a multiple of the rounds [default: 240]
    #[arg(long, value_name = "N")]
    pub epoch_documents: Option<usize>,
    /// Epochs that may be under way
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub epochs_in_flight: u64,
    /// Independent mix-and-pack streams
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub lanes: usize,
}

/// What is trained on it.
#[derive(Args, Clone, Debug)]
pub struct TrainArgs {
    /// The model to train: a Hugging Face directory, "bundled", or a shape for random weights
    #[arg(long, default_value = "10m", value_name = "DIR|SHAPE")]
    pub model: String,
    /// The directory of the tokenizer for a shape [default: the bundled one]
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<String>,
    /// Sequences of one step
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub batch: usize,
    /// Peak learning rate [default: 1e-3 for random weights, 1e-5 for a loaded model]
    #[arg(long, value_name = "X")]
    pub rate: Option<f64>,
    /// Steps of warm-up [default: a tenth of the steps, at most 1000]
    #[arg(long, value_name = "N")]
    pub warmup: Option<u64>,
    /// Steps over which the rate falls [default: as many as the input is estimated to give]
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Tokens whose activations are held at a time
    #[arg(long, default_value_t = 4096, value_name = "N")]
    pub micro_batch_tokens: usize,
    /// Run blocks again in the backward pass instead of keeping their activations
    #[arg(long)]
    pub recompute: bool,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub checkpoint_every: u64,
}

/// How texts are synthesized. None of this changes the output, but for the type of the weights.
#[derive(Args, Clone, Debug)]
pub struct EngineArgs {
    /// Threads of the dataflow
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub workers: usize,
    /// Type of the synthesizer's weights: auto, f32, bf16, f16
    #[arg(long, default_value = "auto", value_name = "TYPE")]
    pub dtype: String,
    /// Sequences that are generated at a time
    #[arg(long, default_value_t = 32, value_name = "N")]
    pub sequences: usize,
    /// Rows of one generation step
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub step_tokens: usize,
    /// Memory for keys and values, in MiB
    #[arg(long, default_value_t = 2048, value_name = "MIB")]
    pub cache_mib: usize,
}

/// How a command is run.
#[derive(Args, Clone, Debug)]
pub struct MachineArgs {
    /// Where models compute: cpu or cuda:0
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: String,
    /// Show progress: auto, plain or none
    #[arg(long, default_value = "auto", value_name = "HOW")]
    pub progress: String,
    /// Seed of all random choices
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
    /// Show what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// End with status 3 if anything was rejected
    #[arg(long)]
    pub strict: bool,
    /// Print the closing summary as JSON
    #[arg(long)]
    pub json: bool,
}

impl InputArgs {
    /// Where ids and texts are in JSON.
    pub fn fields(&self) -> Fields {
        Fields { id: self.id_field.clone(), text: self.text_field.clone() }
    }

    /// What is asked of documents, where the pipeline asks for `preset`.
    ///
    /// # Errors
    /// If a flag has no meaning.
    pub fn rules(&self, preset: DocumentRules) -> Result<DocumentRules> {
        let unique = match self.duplicates.as_deref() {
            None => preset.unique,
            Some("keep") => false,
            Some("drop") => true,
            Some(other) => bail!("--duplicates takes keep or drop, not {other:?}"),
        };
        Ok(DocumentRules { words_min: self.min_words.unwrap_or(preset.words_min), unique })
    }
}

impl TrainArgs {
    /// The model to train, with its tokenizer.
    ///
    /// # Errors
    /// If it cannot be found.
    pub fn model(&self, length: usize) -> Result<Model> {
        let tokenizer = Model::trained(self.tokenizer.as_deref().unwrap_or(BUNDLED))?.tokenizer;
        Model::named(&self.model, &tokenizer, length)
    }

    /// Checks the flags against each other and the model, for sequences of `length` tokens.
    ///
    /// # Errors
    /// Says which flag cannot work, and why.
    pub fn check(&self, model: &Model, length: usize) -> Result<()> {
        ensure!(self.batch > 0, "--batch must be 1 at least");
        ensure!(self.steps != Some(0), "--steps must be 1 at least");
        ensure!(self.micro_batch_tokens > 0, "--micro-batch-tokens must be 1 at least");
        ensure!(self.checkpoint_every > 0, "--checkpoint-every must be 1 at least");
        if let Some(rate) = self.rate {
            check_rate(rate)?;
        }
        let context = model.config.max_position_embeddings;
        ensure!(
            length <= context,
            "sequences of {length} tokens do not fit the context of {:?}, {context} tokens",
            model.name
        );
        Ok(())
    }
}

/// Checks a learning rate.
///
/// # Errors
/// If nothing can be learned at it.
pub fn check_rate(rate: f64) -> Result<()> {
    ensure!(rate.is_finite() && rate > 0.0, "--rate must be a number above 0, not {rate}");
    Ok(())
}

/// Checks how progress is to be shown.
///
/// # Errors
/// If it is no way we know.
pub fn check_progress(how: &str) -> Result<()> {
    match ["auto", "plain", "none"].contains(&how) {
        true => Ok(()),
        false => bail!("--progress takes auto, plain or none, not {how:?}"),
    }
}

/// The shares of a ratio such as `1:1`.
///
/// # Errors
/// If it is no ratio of whole numbers.
pub fn ratio(text: &str) -> Result<[u64; 2]> {
    let parts: Vec<_> = text.split(':').map(|part| part.trim().parse::<u64>()).collect();
    match parts.as_slice() {
        [Ok(augmented), Ok(general)] if *augmented > 0 => Ok([*augmented, *general]),
        _ => bail!("--ratio takes two whole numbers such as 1:1, the first above 0, not {text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_two_whole_numbers() {
        assert_eq!(ratio("1:1").unwrap(), [1, 1]);
        assert_eq!(ratio("1 : 4").unwrap(), [1, 4]);
        for wrong in ["1", "0:1", "1:1:1", "a:b", "0.5:1", ""] {
            assert!(ratio(wrong).is_err(), "{wrong}");
        }
    }
}
