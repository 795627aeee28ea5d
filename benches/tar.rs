//! A layer's tar read from beginning to end.

use std::io;

use divan::{Bencher, black_box, counter::BytesCount};
use loris_benches::LAYER_BYTES;
use loris_format::{limits::Limits, tar::Reader};

#[divan::bench(sample_count = 20)]
fn read(bencher: Bencher<'_, '_>) {
    let layer = loris_benches::layer(LAYER_BYTES);
    let limits = Limits::default();
    bencher.counter(BytesCount::of_slice(&layer)).bench_local(|| {
        let mut reader = Reader::new(black_box(layer.as_slice()), &limits);
        let mut bytes = 0;
        while reader.next_entry().unwrap().is_some() {
            bytes += io::copy(&mut reader.content(), &mut io::sink()).unwrap();
        }
        bytes
    });
}
