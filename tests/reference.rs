//! A run as a plain sequential loop: no dataflow, no threads, one text after the other.

use headwater::augment::Augmenter;
use headwater::block::{Admission, Block, Blocks};
use headwater::chain::{Chain, Generation, chains};
use headwater::format::documents::Documents;
use headwater::gate::agreement::ANSWER_TOKENS_MAX;
use headwater::gate::{Agreement, DocumentGates, PairGates};
use headwater::lane::{Lane, Mixed, Need};
use headwater::ledger::Ledger;
use headwater::manifest::{EpochOutput, LaneState, Manifest};
use headwater::pack::Packer;
use headwater::prompt::PromptWriter;
use headwater::record::{Finish, Item, Sequence};
use headwater::run::RunFolder;
use headwater::side::SideRecord;
use headwater::synthesizer::Request;
use headwater_pipelines::shell::settings::Settings;

/// A lane with the records of its side sources.
struct Stream {
    lane: Lane,
    sides: Vec<Box<dyn Iterator<Item = SideRecord>>>,
    state: LaneState,
}

/// Asks the synthesizer and the judge.
struct Asker<'a, F> {
    settings: &'a Settings,
    answer: F,
    writer: PromptWriter,
    gates: PairGates,
    agreement: Option<Agreement>,
}

/// Runs the loop into the run folder of `settings`.
///
/// # Panics
/// If anything fails.
pub fn run(settings: &Settings, answer: impl Fn(&Request) -> (Vec<u32>, Finish)) {
    let configuration = settings.configuration(None).expect("files can be read");
    let folder = RunFolder::open(&settings.out, &configuration).expect("a new folder");
    let asker = Asker::new(settings, answer);
    let augmenter = Augmenter {
        templates: settings.templates.clone(),
        tokenizer: settings.model.tokenizer.clone(),
        synthesizer: settings.synthesizer.name.clone(),
        seed: settings.machine.seed,
    };
    let mut streams = streams(settings);
    let mut manifest = Manifest::default();
    for block in asker.blocks() {
        let Block { epoch, documents, rejected, ledger, end } = block;
        let mut output =
            EpochOutput { epoch, rejected, ledger, input: end, ..EpochOutput::default() };
        let mut items: Vec<Vec<Item>> = vec![Vec::new(); streams.len()];
        let mut rendered: Vec<Vec<_>> = vec![Vec::new(); streams.len()];
        for mut chain in chains(documents, settings.preset.rounds) {
            asker.complete(&mut chain);
            let lane = chain.index as usize % streams.len();
            let augmented = augmenter.augment(chain);
            output.ledger.merge(&augmented.ledger);
            output.rejected.extend(augmented.rejected);
            for (document, item) in augmented.documents {
                rendered[lane].push(document);
                items[lane].push(item);
            }
        }
        output.augmented = rendered.into_iter().flatten().collect();
        for (stream, items) in streams.iter_mut().zip(items) {
            let mut sequences = Vec::new();
            if !items.is_empty() {
                let mixed = stream.mix(epoch, items, &mut output);
                sequences = pack(&mixed, settings, &mut output.ledger);
            }
            output.lanes.push((stream.state.clone(), sequences));
        }
        let record = folder.commit(&output, manifest.sequences()).expect("the disk takes it");
        let stopped = record.is_stopped();
        manifest.epochs.push(record);
        if stopped {
            break;
        }
    }
}

impl<'a, F: Fn(&Request) -> (Vec<u32>, Finish)> Asker<'a, F> {
    fn new(settings: &'a Settings, answer: F) -> Self {
        let tokenizer = settings.synthesizer.tokenizer.clone();
        let writer = PromptWriter::new(tokenizer).expect("it has bos and eos");
        let agreement = |percent| Agreement {
            writer: writer.clone(),
            prompt_tokens_max: settings.synthesizer.config.max_position_embeddings
                - ANSWER_TOKENS_MAX,
            percent,
        };
        Asker {
            agreement: settings.pair_rules.agreement_percent.map(agreement),
            gates: PairGates::new(settings.pair_rules.clone()).expect("rules that can work"),
            settings,
            answer,
            writer,
        }
    }

    fn blocks(&self) -> Blocks {
        let settings = self.settings;
        let admission = Admission {
            writer: self.writer.clone(),
            prompt_tokens_max: settings.prompt_tokens_max(),
            gates: DocumentGates::new(settings.document_rules.clone())
                .expect("rules that can work"),
            long_texts: settings.long_texts,
            converted: settings.preset.converted,
        };
        let (inputs, fields) = (settings.inputs.clone(), settings.fields.clone());
        let documents = Documents::new(inputs, settings.preset.corpus, fields);
        Blocks::new(documents, admission, settings.preset.epoch_documents, settings.limit)
    }

    fn ask(&self, tokens: Vec<u32>, new_tokens_max: usize) -> Generation {
        let (tokens, finish) = (self.answer)(&Request { key: 0, tokens, new_tokens_max });
        let text = self.settings.synthesizer.tokenizer.decode(&tokens);
        Generation { text, finish, tokens: tokens.len() as u64 }
    }

    /// Takes a chain through its rounds.
    fn complete(&self, chain: &mut Chain) {
        let settings = self.settings;
        while let Some(prompt) = chain.prompt(&self.writer, settings.prompt_tokens_max()) {
            let generation = self.ask(prompt.tokens.clone(), settings.augment.new_tokens);
            chain.accept(&prompt, &generation);
            chain.refuse(|text, earlier, pair| self.gates.judge(text, earlier, pair));
            let Some(agreement) = &self.agreement else { continue };
            let mut not_judged = 0;
            chain.refuse(|text, _, pair| {
                let asked = agreement.prompt(text, pair);
                let answer = asked.map(|prompt| self.ask(prompt, ANSWER_TOKENS_MAX));
                match answer.filter(|answer| !matches!(answer.finish, Finish::Failed(_))) {
                    Some(answer) => agreement.judge(pair, &answer.text),
                    None => {
                        not_judged += 1;
                        None
                    }
                }
            });
            chain.entries.last_mut().expect("one was accepted").not_judged = not_judged;
        }
    }
}

fn streams(settings: &Settings) -> Vec<Stream> {
    let lanes = settings.lanes as u64;
    let (tokenizer, seed) = (&settings.model.tokenizer, settings.machine.seed);
    let sides = settings.sources.open(tokenizer, &settings.templates, seed);
    let stream = |number: u64| {
        let records = sides.iter().map(|side| -> Box<dyn Iterator<Item = SideRecord>> {
            Box::new(side.records(number, lanes, 0))
        });
        let state = LaneState::default();
        let lane = Lane::new(settings.sources.rules.clone(), state.clone());
        Stream { lane, sides: records.collect(), state }
    };
    (0..lanes).map(stream).collect()
}

impl Stream {
    /// Takes items of the side sources in between, as the lane says.
    fn mix(&mut self, epoch: u64, items: Vec<Item>, output: &mut EpochOutput) -> Vec<Item> {
        self.lane.start(epoch, items);
        while let Need::Record(side) = self.lane.advance() {
            match self.sides[side - 1].next() {
                Some(record) => self.lane.give(side, record),
                None => self.lane.end(side),
            }
        }
        let (Mixed { items, rejected, ledger }, state) = self.lane.finish();
        self.state = state;
        output.rejected.extend(rejected);
        output.ledger.merge(&ledger);
        items
    }
}

fn pack(items: &[Item], settings: &Settings, ledger: &mut Ledger) -> Vec<Sequence> {
    let mut packer = Packer::new(settings.length, settings.packing);
    let mut sequences: Vec<Sequence> = items.iter().flat_map(|item| packer.push(item)).collect();
    sequences.extend(packer.finish());
    let tally = packer.tally();
    ledger.add("pack/tokens", tally.tokens);
    ledger.add("pack/padding", tally.padding);
    ledger.add("pack/sequences", tally.sequences);
    ledger.add("pack/room", tally.sequences * settings.length as u64);
    ledger.add("pack/cuts", tally.cuts);
    sequences
}
