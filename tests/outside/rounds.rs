//! Rounds: who waits for whom, how much is under way, and what is asked again after a stop.

use crossbeam_channel::{Receiver, RecvTimeoutError};
use headwater::record::Finish;
use headwater::synthesizer::{Job, Queue, scripted};
use headwater_pipelines::instruct;
use headwater_pipelines::shell::parts::Parts;
use headwater_pipelines::shell::plan::Plan;
use headwater_pipelines::shell::running::execute;
use headwater_pipelines::shell::settings::Settings;
use headwater_tests::settings::{Small, small};
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const ONE_PAIR: &str = "<QUE> What? <ANS> That. </END>";

/// Texts that follow each other in a chain are asked for one after the other; this is long for any.
const LONG: Duration = Duration::from_secs(60);

/// After this much silence nothing more is taken to come: too short a time would hide a fault, never
/// show one that is none.
const SILENCE: Duration = Duration::from_millis(500);

fn settings(place: &Path, documents: usize, rounds: usize, epoch_documents: usize) -> Settings {
    let input = place.join("documents.jsonl");
    let mut lines = String::new();
    for number in 0..documents {
        let text = format!("This is text {number} of all.");
        writeln!(lines, "{}", serde_json::json!({ "id": number.to_string(), "text": text }))
            .unwrap();
    }
    std::fs::write(&input, lines).unwrap();
    small(Small {
        input: vec![input],
        general: Vec::new(),
        out: &place.join("run"),
        workers: 2,
        lanes: 1,
        rounds,
        epoch_documents,
        seed: 1,
        flags: &[],
    })
}

fn run(settings: &Settings, queue: Queue) {
    let plan = Plan::new(settings).unwrap();
    let parts = Arc::new(Parts::around(settings, &plan, queue, None).unwrap());
    execute(settings.engine.workers, parts, instruct::dataflow).unwrap();
}

fn answer(job: Job, settings: &Settings) {
    let tokens = settings.synthesizer.tokenizer.encode(ONE_PAIR);
    job.complete(tokens, Finish::Stop);
}

/// The number of the text that a request asks about: the last one in its prompt.
fn asked(job: &Job, settings: &Settings) -> usize {
    let prompt = settings.synthesizer.tokenizer.decode(&job.request.tokens);
    let (_, last) = prompt.rsplit_once("text ").unwrap();
    last.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_chain_waits_for_no_other() {
    let place = tempfile::tempdir().unwrap();
    let settings = settings(place.path(), 6, 3, 6);
    let (queue, jobs) = Queue::new(8);
    let own = settings.clone();
    let synthesizer = std::thread::spawn(move || {
        let held = jobs.recv_timeout(LONG).unwrap();
        let mut others = Vec::new();
        for _ in 0..3 {
            let job = jobs.recv_timeout(LONG).expect("the other chain goes on alone");
            others.push(asked(&job, &own));
            answer(job, &own);
        }
        let first = asked(&held, &own);
        answer(held, &own);
        jobs.iter().for_each(|job| answer(job, &own));
        (first, others)
    });
    run(&settings, queue);
    let (first, others) = synthesizer.join().unwrap();
    assert!(first < 2, "{first}");
    assert_eq!(others, [1 - first, 3 - first, 5 - first]);
}

#[test]
fn texts_under_way_are_bounded() {
    let place = tempfile::tempdir().unwrap();
    let settings = settings(place.path(), 40, 1, 4);
    assert_eq!(settings.augment.epochs_in_flight, 2);
    let (queue, jobs) = Queue::new(100);
    let own = settings.clone();
    let synthesizer = std::thread::spawn(move || most_under_way(&jobs, &own));
    run(&settings, queue);
    let most = synthesizer.join().unwrap();
    assert!((1..=2 * 4).contains(&most), "{most} texts under way");
}

/// Answers only when nothing more comes; the most requests that were held at a time.
fn most_under_way(jobs: &Receiver<Job>, settings: &Settings) -> usize {
    let (mut held, mut most) = (Vec::new(), 0);
    loop {
        match jobs.recv_timeout(SILENCE) {
            Ok(job) => held.push(job),
            Err(RecvTimeoutError::Timeout) => {
                most = most.max(held.len());
                held.drain(..).for_each(|job| answer(job, settings));
            }
            Err(RecvTimeoutError::Disconnected) => return most,
        }
    }
}

#[test]
fn what_was_committed_is_not_asked_again() {
    let place = tempfile::tempdir().unwrap();
    let settings = settings(place.path(), 12, 2, 4);
    let asked = || {
        let (queue, jobs) = Queue::new(8);
        let (count, tokenizer) = (Arc::new(AtomicUsize::new(0)), &settings.synthesizer.tokenizer);
        let (own, tokens) = (count.clone(), tokenizer.encode(ONE_PAIR));
        scripted(jobs, 1, move |_| {
            own.fetch_add(1, Ordering::Relaxed);
            (tokens.clone(), Finish::Stop)
        });
        run(&settings, queue);
        count.load(Ordering::Relaxed)
    };
    assert_eq!(asked(), 12);
    let manifest = settings.out.join("manifest.jsonl");
    let whole = std::fs::read_to_string(&manifest).unwrap();
    let first = whole.lines().next().unwrap();
    std::fs::write(&manifest, format!("{first}\n")).unwrap();
    assert_eq!(asked(), 8, "the texts of two blocks of three");
}

#[test]
fn a_prompt_leaves_room_for_what_is_to_be_written() {
    let place = tempfile::tempdir().unwrap();
    let settings = settings(place.path(), 1, 1, 1);
    let context = settings.synthesizer.config.max_position_embeddings;
    assert!(context <= settings.augment.context);
    assert_eq!(settings.prompt_tokens_max() + settings.augment.new_tokens, context);
}
