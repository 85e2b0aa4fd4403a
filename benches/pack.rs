//! How fast are items packed? Tokens a second in each mode.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use headwater::pack::{OPEN_MAX, PackMode, Packer};
use headwater::record::Item;

const ITEMS: usize = 20_000;
const LENGTH: usize = 2048;

/// Items of 1 to 3,200 tokens, short ones more often.
fn items() -> Vec<Item> {
    let item = |number: usize| {
        let draw = number * 7919 % 1000; // a prime: all values, well mixed
        let tokens = vec![number as u32; 1 + draw * draw / 312];
        Item { id: number.to_string(), tokens, ..Item::default() }
    };
    (0..ITEMS).map(item).collect()
}

fn pack(criterion: &mut Criterion) {
    let items = items();
    let tokens: usize = items.iter().map(|item| item.tokens.len()).sum();
    let mut group = criterion.benchmark_group("pack");
    group.throughput(Throughput::Elements(tokens as u64));
    let modes = [
        ("best fit", PackMode::BestFit(OPEN_MAX)),
        ("concatenate", PackMode::Concatenate),
        ("an item a row", PackMode::OneItem),
    ];
    for (name, mode) in modes {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let mut packer = Packer::new(LENGTH, mode);
                let full: usize = items.iter().map(|item| packer.push(item).len()).sum();
                full + packer.finish().len()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, pack);
criterion_main!(benches);
