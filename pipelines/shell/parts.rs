//! Everything a dataflow is wired from, opened once and shared by its workers.

use super::memory::training_bytes;
use super::metrics;
use super::models::Model;
use super::plan::{Plan, training_configuration};
use super::settings::Settings;
use super::terminal::tell;
use anyhow::Result;
use candle_core::Device;
use headwater::augment::Augmenter;
use headwater::block::{Admission, Blocks};
use headwater::commit::Committer;
use headwater::engine;
use headwater::engine::metrics::EngineCounters;
use headwater::format::documents::Documents;
use headwater::gate::agreement::ANSWER_TOKENS_MAX;
use headwater::gate::{Agreement, DocumentGates, PairGates};
use headwater::manifest::{LaneState, Manifest};
use headwater::meter::Meters;
use headwater::prompt::PromptWriter;
use headwater::request_store::metrics::StoreCounters;
use headwater::request_store::{RequestStore, front};
use headwater::run::{RunFolder, RunLock};
use headwater::synthesizer::{Queue, Synthesizer, Waker};
use headwater::train::feed::Feed;
use headwater_operators::commit::Committing;
use headwater_operators::credit::Credit;
use headwater_operators::mix::Mixing;
use headwater_operators::pack::Packing;
use headwater_operators::read::Reading;
use headwater_operators::synthesize::Synthesis;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

/// The parts of a run.
pub struct Parts {
    /// The run folder.
    pub folder: RunFolder,
    /// What has been committed before.
    pub manifest: Manifest,
    /// Counts for whoever watches.
    pub meters: Arc<Meters>,
    /// Writes prompts.
    pub writer: PromptWriter,
    /// Tokens of the longest prompt.
    pub prompt_tokens_max: usize,
    /// What is asked of the synthesizer.
    pub synthesis: Synthesis,
    /// What is asked of pairs.
    pub gates: PairGates,
    /// How answers are compared with those of a judge; none if there is no judge.
    pub agreement: Option<Agreement>,
    /// Renders chains.
    pub augmenter: Augmenter,
    /// What is mixed with what.
    pub mixing: Mixing,
    /// How sequences are made.
    pub packing: Packing,
    rounds: usize,
    window: u64,
    /// What the synthesis engines have done.
    pub engine: Arc<EngineCounters>,
    /// What the request store has done, if there is one.
    pub requests: Option<Arc<StoreCounters>>,
    queue: Queue,
    judge: Queue,
    blocks: Mutex<Option<Blocks>>,
    feed: Mutex<Option<Feed>>,
    _lock: RunLock,
}

impl Parts {
    /// Opens the run folder, loads the synthesizer, and finds out where to go on.
    ///
    /// # Errors
    /// If the folder holds another run, or a model cannot be loaded.
    pub fn open(settings: &Settings, plan: &Plan, feed: Option<Feed>) -> Result<Self> {
        let (folder, lock) = open_folder(settings, plan)?;
        let (store, requests) = match settings.request_store() {
            Some(folder) => {
                let store = RequestStore::open(&folder, settings.request_store_bytes())?;
                let counters = store.counters();
                (Some(Arc::new(Mutex::new(store))), Some(counters))
            }
            None => (None, None),
        };
        let counters =
            Arc::new(EngineCounters::with_log(&settings.out.join("engine.jsonl"), metrics::now)?);
        let start = |model, counters, next| -> Result<Queue> {
            let engines = start_engines(settings, model, counters, next)?;
            match &store {
                Some(store) => remembered(settings, model, &engines, store),
                None => Ok(engines),
            }
        };
        let queue = start(&settings.synthesizer, &counters, settings.judge.as_ref())?;
        let judge = match &settings.judge {
            Some(judge) => start(judge, &Arc::default(), None)?,
            None => queue.clone(),
        };
        let parts = Self::wire(settings, (folder, lock), (queue, judge), feed)?;
        Ok(Parts { engine: counters, requests, ..parts })
    }

    /// The parts around any synthesizer that takes its jobs from `queue`.
    ///
    /// # Errors
    /// If the folder holds another run.
    pub fn around(
        settings: &Settings,
        plan: &Plan,
        queue: Queue,
        feed: Option<Feed>,
    ) -> Result<Self> {
        let (folder, lock) = open_folder(settings, plan)?;
        Self::wire(settings, (folder, lock), (queue.clone(), queue), feed)
    }

    fn wire(
        settings: &Settings,
        (folder, lock): (RunFolder, RunLock),
        (queue, judge): (Queue, Queue),
        feed: Option<Feed>,
    ) -> Result<Self> {
        let manifest = folder.recover()?;
        let meters = Arc::new(Meters::default());
        let writer = PromptWriter::new(settings.synthesizer.tokenizer.clone())?;
        let prompt_tokens_max = settings.prompt_tokens_max();
        let admission = admission(settings, &writer)?;
        Ok(Parts {
            gates: PairGates::new(settings.pair_rules.clone())?,
            agreement: agreement(settings)?,
            judge,
            blocks: Mutex::new(Some(blocks(settings, admission, &manifest))),
            synthesis: Synthesis {
                tokenizer: settings.synthesizer.tokenizer.clone(),
                new_tokens_max: settings.augment.new_tokens,
                meters: meters.clone(),
            },
            augmenter: Augmenter {
                templates: settings.templates.clone(),
                tokenizer: settings.model.tokenizer.clone(),
                synthesizer: settings.synthesizer.name.clone(),
                seed: settings.machine.seed,
            },
            mixing: mixing(settings, &manifest, &meters),
            packing: Packing { length: settings.length, mode: settings.packing },
            rounds: settings.preset.rounds,
            window: settings.augment.epochs_in_flight,
            feed: Mutex::new(feed),
            _lock: lock,
            folder,
            manifest,
            meters,
            writer,
            prompt_tokens_max,
            engine: Arc::default(),
            requests: None,
            queue,
        })
    }

    /// The input, for the worker that reads it; none for the others, or if the run has ended with one of
    /// its side sources.
    pub fn blocks(&self) -> Option<Blocks> {
        if self.manifest.is_stopped() {
            return None;
        }
        self.blocks.lock().ok()?.take()
    }

    /// The trainer's feed, for the worker that commits; none for the others.
    pub fn feed(&self, worker: usize) -> Option<Feed> {
        if worker == 0 { self.feed.lock().ok()?.take() } else { None }
    }

    /// Credit for the source.
    pub fn credit(&self) -> Rc<Credit> {
        Credit::new(self.manifest.next_epoch(), self.window)
    }

    /// How the source cuts and counts.
    pub fn reading(&self) -> Reading {
        Reading {
            rounds: self.rounds,
            first_epoch: self.manifest.next_epoch(),
            meters: self.meters.clone(),
        }
    }

    /// Where epochs go on from.
    pub fn committing(&self) -> Committing {
        Committing { lanes: self.mixing.lanes.clone(), meters: self.meters.clone() }
    }

    /// Gives a worker its synthesizer.
    pub fn synthesizer(&self) -> impl FnOnce(Waker) -> Box<dyn Synthesizer> + use<> {
        let queue = self.queue.clone();
        move |waker| Box::new(queue.open(waker))
    }

    /// Gives a worker the model that answers again.
    pub fn judge(&self) -> impl FnOnce(Waker) -> Box<dyn Synthesizer> + use<> {
        let queue = self.judge.clone();
        move |waker| Box::new(queue.open(waker))
    }

    /// Gives the committing worker its thread.
    pub fn committer(&self) -> impl FnOnce(Waker) -> Committer + use<> {
        let (folder, sequences) = (self.folder.clone(), self.manifest.sequences());
        move |waker| {
            Committer::start(folder, sequences, waker, |error| {
                fail(&format!("could not commit an epoch: {error}"));
            })
        }
    }
}

/// What texts must be like.
///
/// # Errors
/// If the gates cannot be opened.
pub fn admission(settings: &Settings, writer: &PromptWriter) -> Result<Admission> {
    Ok(Admission {
        writer: writer.clone(),
        prompt_tokens_max: settings.prompt_tokens_max(),
        gates: DocumentGates::new(settings.document_rules.clone())?,
        long_texts: settings.long_texts,
        converted: settings.preset.converted,
    })
}

/// Ends the run: what is committed is safe.
pub fn fail(reason: &str) -> ! {
    tell!("error: {reason}");
    tell!("what is committed is safe; run the same command again to go on");
    std::process::exit(1)
}

fn open_folder(settings: &Settings, plan: &Plan) -> Result<(RunFolder, RunLock)> {
    let training = plan.training.as_ref();
    let devices = settings.devices.len();
    let training = training.map(|training| training_configuration(training, devices));
    let folder = RunFolder::open(&settings.out, &settings.configuration(training)?)?;
    let lock = folder.lock()?;
    Ok((folder, lock))
}

/// An engine on each device of the synthesizer. It leaves room for what comes after it: another model to
/// generate with, and the one that is trained.
fn start_engines(
    settings: &Settings,
    model: &Model,
    counters: &Arc<EngineCounters>,
    next: Option<&Model>,
) -> Result<Queue> {
    let next_weights = next.map_or(0, |next| {
        next.precision.bytes(next.config.parameter_count(), settings.synthesizes_on_cpu())
    });
    let engines = 1 + usize::from(next.is_some());
    let start = |device: &Device| -> Result<Queue> {
        let ends = model.config.eos_token_ids.clone();
        let loaded = model.load(device)?;
        let training = match &settings.train {
            Some(train) if settings.trains_on(device) => {
                training_bytes(train, &settings.model.config, settings.length, &settings.devices)
            }
            _ => 0,
        };
        let rows = settings.engine_settings(0).step_tokens_max;
        let reserved = next_weights + training + loaded.step_bytes(rows) as u64;
        let cache = settings.engine.steps.cache_bytes(loaded.free_bytes()?, reserved, engines);
        let engine_settings = settings.engine_settings(cache);
        let (queue, _) = engine::start(loaded, ends, engine_settings, counters.clone(), |error| {
            fail(&format!("the synthesis engine failed: {error}"));
        })?;
        Ok(queue)
    };
    let queues = settings.synthesizer_devices.iter().map(start).collect::<Result<Vec<_>>>()?;
    Ok(Queue::over(queues))
}

/// The engines of a model behind what they answered before.
fn remembered(
    settings: &Settings,
    model: &Model,
    engines: &Queue,
    store: &Arc<Mutex<RequestStore>>,
) -> Result<Queue> {
    let identity = model.identity(&settings.arithmetic(model))?;
    let (queue, _) = front::start(engines, identity, store.clone(), |error| {
        fail(&format!("the request store failed: {error}"));
    })?;
    Ok(queue)
}

fn agreement(settings: &Settings) -> Result<Option<Agreement>> {
    let Some(percent) = settings.pair_rules.agreement_percent else { return Ok(None) };
    let judge = settings.judge.as_ref().unwrap_or(&settings.synthesizer);
    let writer = PromptWriter::new(judge.tokenizer.clone())?;
    let context = judge.config.max_position_embeddings;
    let prompt_tokens_max = context.saturating_sub(ANSWER_TOKENS_MAX);
    Ok(Some(Agreement { writer, prompt_tokens_max, percent }))
}

fn blocks(settings: &Settings, admission: Admission, manifest: &Manifest) -> Blocks {
    let (files, fields) = (settings.inputs.clone(), settings.fields.clone());
    let corpus = settings.preset.corpus;
    let before = || Documents::new(files.clone(), corpus, fields.clone());
    let documents = Documents::resume(files.clone(), corpus, fields.clone(), manifest.input());
    let read = manifest.ledger().get("read/records");
    Blocks::new(documents, admission, settings.preset.epoch_documents, settings.limit).resume(
        manifest.next_epoch(),
        manifest.input(),
        read,
        before,
    )
}

fn mixing(settings: &Settings, manifest: &Manifest, meters: &Arc<Meters>) -> Mixing {
    let lanes = match manifest.epochs.last() {
        Some(last) => last.lanes.clone(),
        None => vec![LaneState::default(); settings.lanes],
    };
    let (tokenizer, seed) = (&settings.model.tokenizer, settings.machine.seed);
    Mixing {
        rules: settings.sources.rules.clone(),
        sides: settings.sources.open(tokenizer, &settings.templates, seed),
        lanes,
        meters: meters.clone(),
    }
}
