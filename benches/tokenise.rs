//! How fast does text become ids? The path of tokenizers made here, beside the library they are equal to.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use headwater_benches::{synthesizer, texts};

fn tokenise(criterion: &mut Criterion) {
    let texts = texts();
    let tokenizer = synthesizer().tokenizer;
    let library = tokenizers::Tokenizer::from_bytes(&tokenizer.files().tokenizer);
    let library = library.expect("it is part of the project");
    let bytes: usize = texts.iter().map(String::len).sum();
    let mut group = criterion.benchmark_group("tokenise");
    group.throughput(Throughput::Bytes(bytes as u64));
    group.bench_function("made here", |bencher| {
        bencher.iter(|| texts.iter().map(|text| tokenizer.encode(text).len()).sum::<usize>());
    });
    group.bench_function("library", |bencher| {
        let encode = |text: &String| library.encode_fast(text.as_str(), false);
        let count = |text| encode(text).expect("it encodes every string").len();
        bencher.iter(|| texts.iter().map(count).sum::<usize>());
    });
    group.finish();
}

criterion_group!(benches, tokenise);
criterion_main!(benches);
