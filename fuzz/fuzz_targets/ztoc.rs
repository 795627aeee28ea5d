//! Any bytes as a ztoc, and as a layer that one is made of: the inflater of spans against zlib's.
#![no_main]

use std::io::Read as _;

use libfuzzer_sys::fuzz_target;
use loris_format::{
    compression::{Compression, Decoder},
    limits::Limits,
    soci::{self, BuildOptions, window_places, zinfo, ztoc},
};

fuzz_target!(|bytes: &[u8]| {
    let limits = Limits { entries: 1000, frame_bytes: 1 << 20, ..Limits::default() };
    let _ = zinfo::TarZinfo::read(bytes);
    if let Ok(points) = zinfo::Checkpoints::read(bytes) {
        assert_eq!(points.iter().count(), points.count());
    }
    if let Ok(document) = ztoc::Ztoc::read(bytes, &limits) {
        let _ = document.files().count() + document.digests().count();
        if let Ok(places) = window_places(bytes, &limits)
            && places.count > 0
        {
            assert!(places.first + places.stride * (places.count - 1) + (32 << 10) <= bytes.len());
        }
        let _ = soci::open(bytes, document.compressed_size, &limits);
    }
    // What one inflater takes the other takes, and they agree.
    if Compression::detect(bytes) == Compression::Gzip {
        let options = BuildOptions { span_bytes: 1000, limits, ..BuildOptions::default() };
        let mut plain = Vec::new();
        let other = Decoder::new(bytes).expect("memory can be read").take(1 << 24).read_to_end(&mut plain);
        if let (Ok(built), Ok(length)) = (soci::build(bytes, &options), other)
            && length < 1 << 24
        {
            assert_eq!(built.tar_size, length as u64);
            assert_eq!(built.diff_id.0, loris_format::digest::Digest::sha256_of(&plain));
            soci::open(&built.ztoc, bytes.len() as u64, &Limits::default()).expect("what is made can be read");
        }
    }
});
