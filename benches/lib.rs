//! What the benchmarks measure on: the bundled samples and the bundled synthesizer.

use headwater::format::documents::{Documents, Found};
use headwater::format::jsonl::Fields;
use headwater::prompt::PromptWriter;
use headwater_pipelines::shell::models::{BUNDLED, Model};
use std::path::{Path, PathBuf};

/// A bundled sample file.
pub fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/samples").join(name)
}

/// The texts of the bundled biomedical sample.
pub fn texts() -> Vec<String> {
    let documents = Documents::new(vec![sample("biomedicine.xml")], "sample", Fields::detected());
    documents
        .filter_map(|found| match found {
            Found::Document(document) => Some(document.text),
            _ => None,
        })
        .collect()
}

/// The bundled synthesizer.
///
/// # Panics
/// If it is damaged.
pub fn synthesizer() -> Model {
    Model::trained(BUNDLED).expect("the bundled synthesizer can be read")
}

/// Prompts for the bundled synthesizer: one text each.
///
/// # Panics
/// If the synthesizer is damaged.
pub fn prompts(count: usize) -> Vec<Vec<u32>> {
    let writer = PromptWriter::new(synthesizer().tokenizer).expect("it has bos and eos");
    texts().iter().cycle().take(count).map(|text| writer.question(text)).collect()
}
