//! How fast is PubMed XML read? In bytes of XML a second, on one thread.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use headwater::format::documents::Documents;
use headwater::format::jsonl::Fields;
use headwater_benches::sample;
use std::hint::black_box;

const COPIES: usize = 20;

fn read(criterion: &mut Criterion) {
    let file = sample("biomedicine.xml");
    let bytes = std::fs::metadata(&file).expect("the sample is there").len();
    let mut group = criterion.benchmark_group("read");
    group.throughput(Throughput::Bytes(bytes * COPIES as u64)).sample_size(20);
    group.bench_function("pubmed xml", |bencher| {
        bencher.iter(|| {
            let documents = Documents::new(vec![file.clone(); COPIES], "s", Fields::detected());
            black_box(documents.count())
        });
    });
    group.finish();
}

criterion_group!(benches, read);
criterion_main!(benches);
