//! A layer of 64 MiB made into eStargz, on one core and on all.

use std::{io, num::NonZeroUsize, thread};

use divan::{Bencher, black_box, counter::BytesCount};
use loris_benches::LAYER_BYTES;
use loris_convert::layer::{LayerOptions, Watch, Workers, convert_layer};
use loris_format::compression::GzipLevel;

/// As `loris convert` has it.
const MEMORY_BYTES: u64 = 64 << 20;

#[divan::bench(args = [6, 9], sample_count = 3, sample_size = 1)]
fn one_core(bencher: Bencher<'_, '_>, level: i32) {
    convert(bencher, level, NonZeroUsize::MIN);
}

#[divan::bench(args = [6, 9], sample_count = 3, sample_size = 1)]
fn all_cores(bencher: Bencher<'_, '_>, level: i32) {
    convert(bencher, level, thread::available_parallelism().unwrap());
}

fn convert(bencher: Bencher<'_, '_>, level: i32, threads: NonZeroUsize) {
    let layer = loris_benches::layer(LAYER_BYTES);
    let options = LayerOptions { level: GzipLevel::new(level).unwrap(), ..LayerOptions::default() };
    let workers = Workers::start(threads, options.chunk_bytes, MEMORY_BYTES).unwrap();
    let directory = tempfile::tempdir().unwrap();
    bencher.counter(BytesCount::of_slice(&layer)).bench_local(|| {
        let input = black_box(layer.as_slice());
        convert_layer(input, &options, &workers, &Watch::default(), directory.path(), io::sink()).unwrap()
    });
}
