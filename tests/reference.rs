//! A run as a plain sequential loop: no dataflow, no threads, one text after the other.

use headwater::augment::{AUGMENTED, Augmenter};
use headwater::block::{Admission, Block, Blocks};
use headwater::chain::{Generation, chains};
use headwater::format::documents::Documents;
use headwater::gate::DocumentGates;
use headwater::ledger::Ledger;
use headwater::manifest::{EpochOutput, LaneState, Manifest};
use headwater::mix::{Mixer, Need};
use headwater::pack::{OPEN_MAX, Packer};
use headwater::prompt::PromptWriter;
use headwater::record::{Finish, Item, Sequence};
use headwater::run::RunFolder;
use headwater::side::{SideRecord, SideSource};
use headwater::synthesizer::Request;
use headwater::template::Templates;
use headwater_pipelines::shell::settings::Settings;
use std::sync::Arc;

/// One of the independent mix-and-pack streams.
struct Lane {
    mixer: Mixer,
    side: Option<Box<dyn Iterator<Item = SideRecord>>>,
    state: LaneState,
}

/// Runs the loop into the run folder of `settings`.
///
/// # Panics
/// If anything fails.
pub fn run(settings: &Settings, answer: impl Fn(&Request) -> (Vec<u32>, Finish)) {
    let templates = Arc::new(Templates::built_in());
    let configuration = settings.configuration(&templates, None).expect("files can be read");
    let folder = RunFolder::open(&settings.out, &configuration).expect("a new folder");
    let writer =
        PromptWriter::new(settings.synthesizer.tokenizer.clone()).expect("it has bos and eos");
    let prompt_tokens_max = settings.prompt_tokens_max();
    let augmenter = Augmenter {
        templates,
        tokenizer: settings.model.tokenizer.clone(),
        synthesizer: settings.synthesizer.name.clone(),
        seed: settings.machine.seed,
    };
    let mut lanes = lanes(settings);
    let admission = Admission {
        writer: writer.clone(),
        prompt_tokens_max,
        gates: DocumentGates::new(settings.preset.rules),
    };
    let (inputs, fields) = (settings.inputs.clone(), settings.fields.clone());
    let documents = Documents::new(inputs, settings.preset.corpus, fields);
    let size = settings.preset.epoch_documents;
    let mut manifest = Manifest::default();
    for block in Blocks::new(documents, admission, size, settings.limit) {
        let Block { epoch, documents, rejected, ledger, end } = block;
        let mut output =
            EpochOutput { epoch, rejected, ledger, input: end, ..EpochOutput::default() };
        let mut items: Vec<Vec<Item>> = vec![Vec::new(); lanes.len()];
        let mut rendered: Vec<Vec<_>> = vec![Vec::new(); lanes.len()];
        for mut chain in chains(documents, settings.preset.rounds) {
            while let Some(prompt) = chain.prompt(&writer, prompt_tokens_max) {
                let (tokens, finish) = answer(&Request {
                    key: 0,
                    tokens: prompt.tokens.clone(),
                    new_tokens_max: settings.augment.new_tokens,
                });
                let text = settings.synthesizer.tokenizer.decode(&tokens);
                let generation = Generation { text, finish, tokens: tokens.len() as u64 };
                chain.accept(&prompt, &generation);
            }
            let lane = chain.index as usize % lanes.len();
            let augmented = augmenter.augment(&chain);
            output.ledger.merge(&augmented.ledger);
            output.rejected.extend(augmented.rejected);
            for (document, item) in augmented.documents {
                rendered[lane].push(document);
                items[lane].push(item);
            }
        }
        output.augmented = rendered.into_iter().flatten().collect();
        for (lane, items) in lanes.iter_mut().zip(items) {
            let mut sequences = Vec::new();
            if !items.is_empty() {
                let mixed = mix(lane, items, &mut output);
                sequences = pack(&mixed, settings.augment.length, &mut output.ledger);
            }
            output.lanes.push((lane.state.clone(), sequences));
        }
        let record = folder.commit(&output, manifest.sequences()).expect("the disk takes it");
        manifest.epochs.push(record);
    }
}

fn lanes(settings: &Settings) -> Vec<Lane> {
    let count = settings.augment.lanes as u64;
    let lane = |number: u64| {
        let source = SideSource {
            source: 1,
            name: "general".into(),
            files: settings.general.clone(),
            tokenizer: settings.model.tokenizer.clone(),
        };
        let records = || -> Box<dyn Iterator<Item = SideRecord>> {
            Box::new(source.records(number, count, 0))
        };
        let side = (!settings.general.is_empty()).then(records);
        Lane { mixer: Mixer::new(&settings.weights), side, state: LaneState::default() }
    };
    (0..count).map(lane).collect()
}

/// Takes items of the side source in between, as the mixer says.
fn mix(lane: &mut Lane, items: Vec<Item>, output: &mut EpochOutput) -> Vec<Item> {
    let mut mixing = headwater::mix::Lane::new(lane.mixer.clone());
    lane.state.side_records.resize(usize::from(lane.side.is_some()), 0);
    mixing.start(items);
    while let Need::Item(_) = mixing.advance() {
        let side = lane.side.as_mut().expect("only sources with a share are asked");
        let record = side.next().expect("side sources never end");
        lane.state.side_records[0] = record.records;
        match record.item {
            Ok(item) => mixing.give(item),
            Err(rejected) => {
                output.ledger.add(format!("mix/rejected/{}", rejected.reason), 1);
                output.rejected.push(*rejected);
            }
        }
    }
    let weights = lane.mixer.weights().to_vec();
    lane.state.mix = mixing.state().clone();
    lane.mixer = Mixer::resume(&weights, lane.state.mix.clone());
    let mixed = mixing.finish();
    for item in &mixed {
        let source = if item.source == AUGMENTED { "augmented" } else { "general" };
        let tokens = item.tokens.len() as u64;
        output.ledger.add(format!("mix/items/{source}"), 1);
        output.ledger.add(format!("mix/tokens_of/{source}"), tokens);
        output.ledger.add("mix/tokens", tokens);
    }
    mixed
}

fn pack(items: &[Item], length: usize, ledger: &mut Ledger) -> Vec<Sequence> {
    let mut packer = Packer::new(length, OPEN_MAX);
    let mut sequences: Vec<Sequence> = items.iter().flat_map(|item| packer.push(item)).collect();
    sequences.extend(packer.finish());
    let tally = packer.tally();
    ledger.add("pack/tokens", tally.tokens);
    ledger.add("pack/padding", tally.padding);
    ledger.add("pack/sequences", tally.sequences);
    ledger.add("pack/room", tally.sequences * length as u64);
    ledger.add("pack/cuts", tally.cuts);
    sequences
}
