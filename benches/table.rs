//! A table of contents read, and made into a layer index: what stands between a download and the first file.

use divan::{Bencher, black_box, counter::ItemsCount};
use loris_format::{estargz::open::index, index::Codec, limits::Limits, opening::Trust, position::BlobOffset};

const ENTRIES: usize = 100_000;

#[divan::bench(sample_count = 20)]
fn to_index(bencher: Bencher<'_, '_>) {
    let (json, end) = loris_benches::table(ENTRIES);
    let limits = Limits::default();
    bencher
        .counter(ItemsCount::new(ENTRIES))
        .bench_local(|| index(black_box(&json), BlobOffset(end), Codec::Gzip, Trust::Required, &limits).unwrap());
}
