//! Any bytes as a blob: what its end says, and what opening it comes to.
#![no_main]

use libfuzzer_sys::fuzz_target;
use loris_format::{
    estargz::footer::{self, Footer},
    limits::Limits,
    opening::{Promise, Opening, Step, Trust},
};

fuzz_target!(|blob: &[u8]| {
    let size = blob.len() as u64;
    if let Ok(Footer::Toc { offset, footer_bytes, .. }) = footer::read(blob, size) {
        assert!(offset.0 < size - footer_bytes as u64);
    }
    let tail = &blob[blob.len().saturating_sub(footer::DETECT_BYTES)..];
    assert_eq!(footer::detect(tail, size), footer::detect(blob, size));

    let limits = Limits { toc_bytes: 1 << 20, entries: 1000, ..Limits::default() };
    let Ok((mut opening, mut range)) = Opening::new(size, Promise::default(), Trust::Optional, &limits) else { return };
    for _ in 0..2 {
        let start = usize::try_from(range.start.0).expect("inside the blob");
        let length = usize::try_from(range.length).expect("inside the blob");
        match opening.supply(&blob[start..start + length]) {
            Ok(Step::Read(next, next_range)) => (opening, range) = (next, next_range),
            Ok(Step::Done(..)) | Err(_) => return,
        }
    }
    panic!("a third read is wanted");
});
