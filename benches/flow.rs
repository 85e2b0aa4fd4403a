//! What does the dataflow cost? Texts a second with a synthesizer that answers at once, beside the plain
//! sequential loop on the same input.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use headwater::synthesizer::{Queue, scripted};
use headwater_benches::{sample, texts};
use headwater_pipelines::instruct;
use headwater_pipelines::shell::parts::Parts;
use headwater_pipelines::shell::plan::Plan;
use headwater_pipelines::shell::running::execute;
use headwater_pipelines::shell::settings::Settings;
use headwater_tests::settings::{Small, small};
use headwater_tests::{reference, script};
use std::sync::Arc;
use tempfile::TempDir;

const COPIES: usize = 20;

fn settings(workers: usize) -> (TempDir, Settings) {
    let place = tempfile::tempdir().expect("there is room");
    let settings = small(Small {
        input: vec![sample("biomedicine.xml"); COPIES],
        general: vec![sample("instructions.jsonl")],
        out: &place.path().join("run"),
        workers,
        lanes: 1,
        rounds: 3,
        epoch_documents: 240,
        seed: 1,
        flags: &[],
    });
    (place, settings)
}

fn dataflow(settings: &Settings) {
    let plan = Plan::new(settings).expect("the sample can be read");
    let (queue, jobs) = Queue::new(64);
    let tokenizer = settings.synthesizer.tokenizer.clone();
    scripted(jobs, 1, move |request| script::answer(request, &tokenizer));
    let parts = Parts::around(settings, &plan, queue, None).expect("a new folder");
    execute(settings.engine.workers, Arc::new(parts), instruct::dataflow).expect("it runs through");
}

fn plain_loop(settings: &Settings) {
    let tokenizer = settings.synthesizer.tokenizer.clone();
    reference::run(settings, |request| script::answer(request, &tokenizer));
}

fn flow(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flow");
    group.throughput(Throughput::Elements((texts().len() * COPIES) as u64)).sample_size(10);
    group.bench_function("plain loop", |bencher| {
        bencher.iter_batched(
            || settings(1),
            |(_place, settings)| plain_loop(&settings),
            BatchSize::PerIteration,
        );
    });
    for workers in [1, 2] {
        group.bench_function(format!("dataflow, {workers} workers"), |bencher| {
            bencher.iter_batched(
                || settings(workers),
                |(_place, settings)| dataflow(&settings),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, flow);
criterion_main!(benches);
