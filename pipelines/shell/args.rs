//! Flags that several commands share.

use super::models::BUNDLED;
use super::train_args::TrainArgs;
use anyhow::{Result, bail, ensure};
use clap::{Args, Command, FromArgMatches};
use headwater::engine::EngineSettings;
use headwater::engine::schedule::{Means, PrefixReuse, Speculation};
use headwater::format::jsonl::Fields;
use std::ffi::OsString;
use std::path::PathBuf;

/// The flags of a pipeline from raw documents to a trained model.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    #[allow(missing_docs)] // a comment would become help
    #[command(flatten)]
    pub input: InputArgs,
    #[allow(missing_docs)] // a comment would become help
    #[command(flatten)]
    pub augment: AugmentArgs,
    #[allow(missing_docs)] // a comment would become help
    #[command(flatten)]
    pub mix: MixArgs,
    #[allow(missing_docs)] // a comment would become help
    #[command(flatten)]
    pub gates: GateArgs,
    #[allow(missing_docs)] // a comment would become help
    #[command(flatten)]
    pub engine: EngineArgs,
    #[allow(missing_docs)] // a comment would become help
    #[command(flatten)]
    pub train: TrainArgs,
    /// Write shards only
    #[arg(long, conflicts_with_all = HOW_TO_TRAIN)]
    pub no_train: bool,
    #[allow(missing_docs)] // a comment would become help
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// What says nothing where nothing is trained: all flags of training but those that decide what is written into shards.
const HOW_TO_TRAIN: [&str; 19] = [
    "batch",
    "batch_tokens",
    "rate",
    "warmup",
    "steps",
    "schedule",
    "decay_share",
    "train_dtype",
    "micro_batch_tokens",
    "recompute",
    "z_loss",
    "hidden_dropout",
    "on_nonfinite",
    "on_spike",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "eval",
    "eval_every",
];

/// What is read, and where everything goes.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Input and output")]
pub struct InputArgs {
    /// Files or directories to read: .xml, .sgm, .jsonl, .csv, .tsv, .txt, also with .gz or .zst behind
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    pub input: Vec<PathBuf>,
    /// The run folder; an existing one is continued
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// JSON fields or columns that make up the text [default: text, else title and abstract, else content]
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    pub text_field: Vec<String>,
    /// JSON field or column that holds the id
    #[arg(long, default_value = "id", value_name = "NAME")]
    pub id_field: String,
    /// Read at most so many records
    #[arg(long, value_name = "N")]
    pub limit: Option<u64>,
}

/// What documents and pairs must be like. All gates but those of the pipeline are off unless asked for.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Quality gates")]
pub struct GateArgs {
    /// Words of a document at least; shorter ones are rejected [default: 20 for finance, else 1]
    #[arg(long, value_name = "N")]
    pub min_words: Option<usize>,
    /// Words of a document at most; longer ones are rejected
    #[arg(long, value_name = "N")]
    pub max_words: Option<usize>,
    /// What becomes of documents whose text was read before: keep or drop [default: drop for finance, else keep]
    #[arg(long, value_name = "HOW")]
    pub duplicates: Option<String>,
    /// Drop documents that are so similar to an earlier one: Jaccard similarity of runs of 5 words
    #[arg(long, value_name = "PERCENT")]
    pub near_duplicates: Option<u32>,
    /// Languages to use, as ISO 639-3 codes (eng, deu, …) [default: all]
    #[arg(long, value_delimiter = ',', value_name = "CODE,…")]
    pub language: Vec<String>,
    /// Evaluation sets: documents and pairs that share a run of words with them are dropped
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub decontaminate: Vec<PathBuf>,
    /// Words of such a run
    #[arg(long, default_value_t = 13, value_name = "N")]
    pub decontaminate_words: usize,
    /// Words of a question, such as 3:60
    #[arg(long, value_name = "MIN:MAX")]
    pub question_words: Option<String>,
    /// Words of an answer, such as 1:200
    #[arg(long, value_name = "MIN:MAX")]
    pub answer_words: Option<String>,
    /// Drop questions whose words are so similar to those of an earlier one of the same text
    #[arg(long, value_name = "PERCENT")]
    pub similar_questions: Option<u32>,
    /// Words of a free-form answer that must stand in the text
    #[arg(long, value_name = "PERCENT")]
    pub grounded: Option<u32>,
    /// Words of an answer among options that must stand in the text
    #[arg(long, value_name = "PERCENT")]
    pub grounded_options: Option<u32>,
    /// Words of the reasoning to an answer that must stand in the text
    #[arg(long, value_name = "PERCENT")]
    pub grounded_reasoning: Option<u32>,
    /// Ask each question again and drop pairs whose answers agree less: token F1 of both answers
    #[arg(long, value_name = "PERCENT")]
    pub agreement: Option<u32>,
    /// The model that is asked, named like the synthesizer [default: the synthesizer]
    #[arg(long, requires = "agreement", value_name = "DIR|FILE")]
    pub judge: Option<String>,
}

/// What is mixed with what, and how it is packed.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Mixing and packing")]
pub struct MixArgs {
    /// Files of general instructions to mix in (JSON Lines)
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub general: Vec<PathBuf>,
    /// Files of task rows to mix in, rendered like augmented texts (JSON Lines)
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub tasks: Vec<PathBuf>,
    /// Raw texts to mix in under a name of their own; may be given several times
    #[arg(long, value_name = "NAME=FILE,…")]
    pub also: Vec<String>,
    /// Tokens of augmented documents to those of the other sources, in the order general, tasks, also;
    /// behind commas, other shares from later epochs on, as in 1:1,10=1:2 [default: 1:1; for scratch, as long as its tasks last]
    #[arg(long, value_name = "A:B…")]
    pub ratio: Option<String>,
    /// How often a source is read; may be given several times [default: for ever; tasks of scratch 4]
    #[arg(long, value_name = "NAME=N")]
    pub passes: Vec<String>,
    /// What happens when a source has been read so often: renormalise (the others share its part) or stop
    #[arg(long, default_value = "renormalise", value_name = "HOW")]
    pub at_end: String,
    /// Tokens of a packed sequence [default: 2048]
    #[arg(long, value_name = "N")]
    pub length: Option<usize>,
    /// How sequences are filled: best-fit, concatenate, or one-item
    #[arg(long, default_value = "best-fit", value_name = "HOW")]
    pub packing: String,
    /// Sequences that are open at a time (best-fit)
    #[arg(long, default_value_t = headwater::pack::OPEN_MAX, value_name = "N")]
    pub open_sequences: usize,
    /// Independent mix-and-pack streams
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub lanes: usize,
}

/// What is made of it.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Augmenting")]
pub struct AugmentArgs {
    /// The synthesizer: a Hugging Face directory of the Llama and Mistral family, a GGUF file of one, or
    /// "bundled"
    #[arg(long, default_value = BUNDLED, value_name = "DIR|FILE")]
    pub synthesizer: String,
    /// Texts that may see each other: one a round [default: 2 for scratch, else 3]
    #[arg(long, value_name = "M")]
    pub rounds: Option<usize>,
    /// Tokens to generate for each text at most
    #[arg(long, default_value_t = 400, value_name = "N")]
    pub new_tokens: usize,
    /// Tokens of a prompt with its answer at most; less if the synthesizer takes less
    #[arg(long, default_value_t = 4096, value_name = "N")]
    pub context: usize,
    /// The part of the documents that is converted; the rest goes out raw [default: 1/5 for scratch, else 1/1]
    #[arg(long, value_name = "PART/OF")]
    pub convert: Option<String>,
    /// What becomes of texts that are too long for a prompt: split (into texts of their own) or window
    /// (the synthesizer sees their beginning)
    #[arg(long, default_value = "split", value_name = "HOW")]
    pub long_texts: String,
    /// Template families of your own, in files named like the built-in ones
    #[arg(long, value_name = "DIR")]
    pub templates: Option<PathBuf>,
    /// Texts that are committed together: a multiple of the rounds [default: 240]
    #[arg(long, value_name = "N")]
    pub epoch_documents: Option<usize>,
    /// Epochs that may be under way
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub epochs_in_flight: u64,
}

/// How texts are synthesized. None of this changes the output, but for the type of the weights.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Synthesis engine")]
pub struct EngineArgs {
    /// Threads of the dataflow
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub workers: usize,
    /// Devices of the synthesizer, one engine each: cpu, or cuda:0,cuda:1,… [default: that of --device]
    #[arg(long, value_delimiter = ',', value_name = "DEVICE,…")]
    pub synthesizer_device: Vec<String>,
    /// Threads of a CPU that train while texts are synthesized, which has the others; those of one that waits work for
    /// the other [default: both share all]
    #[arg(long, value_name = "N")]
    pub train_threads: Option<usize>,
    /// Where answers are kept and found again, by this run or others: a directory, or off
    /// [default: requests in the run folder]
    #[arg(long, value_name = "DIR")]
    pub request_store: Option<String>,
    /// What is kept there at most, in MiB: what was not asked for longest goes first
    #[arg(long, default_value_t = 4096, value_name = "MIB")]
    pub request_store_mib: u64,
    #[allow(missing_docs)] // a comment would become help
    #[command(flatten)]
    pub steps: StepArgs,
}

/// How an engine computes its steps.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Synthesis engine")]
pub struct StepArgs {
    /// Type of the synthesizer's weights: auto, f32, bf16, f16 (computed in f32 on a CPU), or int8 (CPU
    /// only). auto is f32 on a CPU, for GGUF files their own type or int8 if they are quantised, and bf16
    /// on a GPU
    #[arg(long, default_value = "auto", value_name = "TYPE")]
    pub dtype: String,
    /// Sequences that are generated at a time [default: 32, on a GPU 256]
    #[arg(long, value_name = "N")]
    pub sequences: Option<usize>,
    /// Rows of one generation step [default: 512, on a GPU 4096]
    #[arg(long, value_name = "N")]
    pub step_tokens: Option<usize>,
    /// Memory for keys and values, in MiB [default: 2048, on a GPU 85 % of what is free there]
    #[arg(long, value_name = "MIB")]
    pub cache_mib: Option<usize>,
    /// Use again what the cache holds of earlier prompts: on or off
    #[arg(long, default_value = "on", value_name = "HOW")]
    pub prefix_reuse: String,
    /// Guess tokens that are copied, where that is faster: auto, always or off
    #[arg(long, default_value = "auto", value_name = "HOW")]
    pub speculation: String,
}

/// Sequences at a time, and rows of a step, at most.
const ROWS_MAX: usize = 1 << 20;

/// Sequences at a time and rows of a step on a CPU.
const CPU_BATCH: (usize, usize) = (32, 512);

/// Sequences at a time and rows of a step on a GPU.
const GPU_BATCH: (usize, usize) = (256, 4096);

/// Keys and values on a CPU.
const CPU_CACHE_BYTES: usize = 2 << 30;

/// Of what is free on a GPU; the rest is for what a step computes.
const GPU_CACHE_SHARE: f64 = 0.85;

impl Default for StepArgs {
    /// As on the command line.
    fn default() -> Self {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            steps: StepArgs,
        }
        let line = <Line as clap::Parser>::try_parse_from(["headwater"]);
        line.expect("no flag has to be there").steps
    }
}

impl StepArgs {
    /// How an engine uses a CPU, or a GPU, with `cache_bytes` for keys and values.
    ///
    /// # Errors
    /// Says which flag cannot work, and why.
    pub fn settings(&self, on_cpu: bool, cache_bytes: usize) -> Result<EngineSettings> {
        for (flag, count) in [("sequences", self.sequences), ("step-tokens", self.step_tokens)] {
            let fits = count.is_none_or(|count| (1..=ROWS_MAX).contains(&count));
            ensure!(fits, "--{flag} takes 1 to {ROWS_MAX}");
        }
        let (sequences, step_tokens) = if on_cpu { CPU_BATCH } else { GPU_BATCH };
        let sequences_max = self.sequences.unwrap_or(sequences);
        Ok(EngineSettings {
            sequences_max,
            step_tokens_max: self.step_tokens.unwrap_or(step_tokens),
            cache_bytes,
            queue_max: 2 * sequences_max,
            means: self.means()?,
        })
    }

    /// Bytes for the keys and values of each of `engines` engines that are yet to be started on a device: on a
    /// GPU, of `free` bytes that are free, of which `reserved` will be wanted by others.
    pub fn cache_bytes(&self, free: Option<usize>, reserved: u64, engines: usize) -> usize {
        match (self.cache_mib, free) {
            (Some(mib), _) => mib.saturating_mul(1 << 20),
            (None, Some(free)) => {
                let left = (free as u64).saturating_sub(reserved);
                (left as f64 * GPU_CACHE_SHARE) as usize / engines
            }
            (None, None) => CPU_CACHE_BYTES,
        }
    }

    fn means(&self) -> Result<Means> {
        let prefix_reuse = match self.prefix_reuse.as_str() {
            "on" => PrefixReuse::On,
            "off" => PrefixReuse::Off,
            other => bail!("--prefix-reuse takes on or off, not {other:?}"),
        };
        let speculation = match self.speculation.as_str() {
            "auto" => Speculation::Auto,
            "always" => Speculation::Always,
            "off" => Speculation::Off,
            other => bail!("--speculation takes auto, always or off, not {other:?}"),
        };
        Ok(Means { prefix_reuse, speculation })
    }
}

/// How a command is run.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Running")]
pub struct MachineArgs {
    /// Where models compute: cpu, cuda:0, or cuda:0,cuda:1,… for a copy of each model on every one
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

impl RunArgs {
    /// The flags as they would be given on the command line, for programs that run a pipeline.
    ///
    /// # Errors
    /// If there is no such flag, or one that must be there is missing.
    pub fn of<T: Into<OsString> + Clone>(flags: impl IntoIterator<Item = T>) -> Result<Self> {
        let command = RunArgs::augment_args(Command::new("headwater").no_binary_name(true));
        let matches = command.try_get_matches_from(flags)?;
        Ok(RunArgs::from_arg_matches(&matches)?)
    }
}

impl InputArgs {
    /// Where ids and texts are in JSON.
    pub fn fields(&self) -> Fields {
        Fields { id: self.id_field.clone(), text: self.text_field.clone() }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn check_means(flags: &[&str], expected: Option<Means>) {
        let needed = ["--input", "x.jsonl", "--out", "x"];
        let args = RunArgs::of(needed.iter().chain(flags)).expect("flags that exist");
        let found = args.engine.steps.settings(true, 0).ok().map(|settings| settings.means);
        assert_eq!(found, expected, "{flags:?}");
    }

    #[test]
    fn flags_of_training_are_refused_where_nothing_is_trained() {
        let line = |flags: &[&str]| {
            let needed = ["--input", "x.jsonl", "--out", "x"];
            let found = RunArgs::of(needed.iter().chain(flags)).map(drop);
            found.map_err(|error| error.to_string())
        };
        assert_eq!(line(&["--no-train", "--model", "2m", "--tokenizer", "x"]), Ok(()));
        let refused = line(&["--z-loss", "1e-4", "--no-train"]).expect_err("both");
        assert!(refused.contains("cannot be used with"), "{refused}");
        let command = TrainArgs::augment_args(Command::new("train"));
        let of_shards = ["published", "model", "tokenizer"];
        let mut flags: Vec<&str> =
            command.get_arguments().map(|flag| flag.get_id().as_str()).collect();
        flags.retain(|flag| !of_shards.contains(flag));
        assert_eq!(flags, HOW_TO_TRAIN);
    }

    #[test]
    fn what_makes_synthesis_faster_can_be_turned_off() {
        let all = Means { prefix_reuse: PrefixReuse::On, speculation: Speculation::Auto };
        check_means(&[], Some(all));
        let none = Means { prefix_reuse: PrefixReuse::Off, speculation: Speculation::Off };
        check_means(&["--prefix-reuse", "off", "--speculation", "off"], Some(none));
        check_means(&["--prefix-reuse", "maybe"], None);
        check_means(&["--speculation", "on"], None);
    }

    #[test]
    fn the_cache_is_as_large_as_the_flag_says_or_as_the_device_has_room() {
        let steps = |flags: &[&str]| {
            let needed = ["--input", "x.jsonl", "--out", "x"];
            RunArgs::of(needed.iter().chain(flags)).expect("flags that exist").engine.steps
        };
        assert_eq!(steps(&["--cache-mib", "3"]).cache_bytes(Some(1 << 40), 0, 1), 3 << 20);
        assert_eq!(steps(&[]).cache_bytes(None, 0, 1), 2 << 30);
        assert_eq!(steps(&[]).cache_bytes(Some(1_000_000), 600_000, 2), 170_000);
        assert_eq!(steps(&[]).cache_bytes(Some(1_000_000), 2_000_000, 1), 0);
    }
}
