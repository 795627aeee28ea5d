//! A chunk made into a gzip member, by us and by flate2 (zlib-rs, as the workspace builds it); and back.

use std::io::Write as _;

use divan::{Bencher, black_box, counter::BytesCount};
use flate2::{Compression, write::GzEncoder};
use loris_format::{
    compression::{FrameDecoder, GzipCompressor, GzipLevel, gzip_member},
    index::Codec,
    limits::Limits,
};

/// Uncompressed bytes: a chunk of eStargz.
const CHUNK_BYTES: usize = 4 << 20;

fn chunk() -> Vec<u8> {
    let mut layer = loris_benches::layer(CHUNK_BYTES);
    layer.truncate(CHUNK_BYTES);
    layer
}

#[divan::bench(args = [6, 9], sample_count = 10)]
fn loris(bencher: Bencher<'_, '_>, level: i32) {
    let chunk = chunk();
    let mut compressor = GzipCompressor::new(GzipLevel::new(level).unwrap());
    bencher.counter(BytesCount::of_slice(&chunk)).bench_local(|| compressor.compress(black_box(&chunk)));
}

#[divan::bench(args = [6, 9], sample_count = 10)]
fn flate2(bencher: Bencher<'_, '_>, level: u32) {
    let chunk = chunk();
    bencher.counter(BytesCount::of_slice(&chunk)).bench_local(|| {
        let mut encoder = GzEncoder::new(Vec::with_capacity(CHUNK_BYTES), Compression::new(level));
        encoder.write_all(black_box(&chunk)).unwrap();
        encoder.finish().unwrap()
    });
}

#[divan::bench(sample_count = 30)]
fn decode(bencher: Bencher<'_, '_>) {
    let chunk = chunk();
    let member = gzip_member(GzipLevel::BEST, &chunk);
    let (mut decoder, limits) = (FrameDecoder::new(), Limits::default());
    bencher
        .counter(BytesCount::of_slice(&chunk))
        .bench_local(|| decoder.decode(Codec::Gzip, black_box(&member), chunk.len() as u64, &limits).unwrap());
}
