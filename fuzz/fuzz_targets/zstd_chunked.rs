//! Any annotations and any bytes as a zstd:chunked layer: an error or a sound index; and any content as a file: its chunks are
//! all of it.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use loris_format::{
    limits::Limits,
    opening::{Family, Opening, Promise, Step, Trust},
    tar::Raw,
    zstd_chunked::cuts::Cutter,
};

fuzz_target!(|input: (&str, &str, &[u8])| {
    let (position, tar_split, blob) = input;
    let mut cutter = Cutter::new(4096);
    blob.chunks(1000).for_each(|piece| cutter.update(piece));
    assert_eq!(cutter.finish().iter().map(|cut| cut.length).sum::<u64>(), blob.len() as u64);
    let _ = Raw::read(blob);

    let digest = loris_format::digest::Digest::sha256_of(blob).to_string();
    let annotations = BTreeMap::from([
        (Family::Containers.checksum_annotation(), digest),
        (Family::Containers.position_annotation(), position.to_owned()),
        (Family::Containers.tar_split_annotation(), tar_split.to_owned()),
    ]);
    let Ok(promise) = Promise::read(&annotations) else { return };
    assert_eq!(Promise::read(&promise.annotations()).as_ref(), Ok(&promise));
    let limits = Limits { toc_bytes: 1 << 20, entries: 1000, ..Limits::default() };
    for promise in [promise, Promise::default()] {
        let Ok((mut opening, mut range)) = Opening::new(blob.len() as u64, promise, Trust::Optional, &limits) else {
            continue;
        };
        for _ in 0..2 {
            let start = usize::try_from(range.start.0).expect("inside the blob");
            let length = usize::try_from(range.length).expect("inside the blob");
            match opening.supply(&blob[start..start + length]) {
                Ok(Step::Read(next, next_range)) => (opening, range) = (next, next_range),
                Ok(Step::Done(..)) | Err(_) => break,
            }
        }
    }
});
