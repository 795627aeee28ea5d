//! Any bytes as a tar archive: entries and their content, or an error; and an entry that was read is the same when it is
//! written and read again.
#![no_main]

use std::io::Read as _;

use libfuzzer_sys::fuzz_target;
use loris_format::{
    limits::Limits,
    tar::{self, BLOCK_BYTES, Entry, Reader},
};

fuzz_target!(|archive: &[u8]| {
    check(archive);
    // A mutation nearly always breaks a header's checksum, behind which everything else would be out of reach.
    let mut mended = archive.to_vec();
    if mend_checksums(&mut mended) {
        check(&mended);
    }
});

fn check(archive: &[u8]) {
    let limits = Limits {
        entries: 100,
        path_bytes: 1000,
        file_bytes: 64 << 10,
        tar_metadata_bytes: 16 << 10,
        xattr_bytes: 2000,
        ..Limits::default()
    };
    let entries = read(archive, &limits);
    let mut written = Vec::new();
    for (entry, content) in &entries {
        written.extend(tar::encode_header(entry).expect("what was read can be written"));
        written.extend_from_slice(content);
        written.extend_from_slice(tar::padding(entry.size));
    }
    written.extend(tar::END_OF_ARCHIVE);
    // Written otherwise, the metadata may be longer than the limit was for reading.
    let again = read(&written, &Limits::default());
    assert_eq!(entries.len(), again.len());
    for ((one, content), (other, other_content)) in entries.iter().zip(&again) {
        let (header_offset, content_offset) = (other.header_offset, other.content_offset);
        assert_eq!(*other, Entry { header_offset, content_offset, sparse: false, ..one.clone() });
        assert!(content == other_content);
        let clean = tar::path::clean(&one.path, &limits);
        assert!(clean.is_err() || clean.is_ok_and(|clean| tar::path::clean(&clean, &limits) == Ok(clean)));
    }
}

fn read(archive: &[u8], limits: &Limits) -> Vec<(Entry, Vec<u8>)> {
    let mut reader = Reader::new(archive, limits);
    let mut entries = Vec::new();
    while let Ok(Some(entry)) = reader.next_entry() {
        let mut content = Vec::new();
        if reader.content().read_to_end(&mut content).is_err() {
            break;
        }
        assert_eq!(content.len() as u64, entry.size);
        assert!(reader.position() <= archive.len() as u64);
        if let Some(offset) = entry.content_offset {
            let offset = usize::try_from(offset).expect("inside the archive");
            assert!(archive[offset..offset + content.len()] == content);
        }
        entries.push((entry, content));
    }
    entries
}

/// Puts right the checksum of every block that looks like a header; `false` where none was wrong.
fn mend_checksums(archive: &mut [u8]) -> bool {
    let mut mended = false;
    for block in archive.chunks_exact_mut(BLOCK_BYTES) {
        if !block[257..].starts_with(b"ustar") && &block[154..156] != b"\0 " {
            continue;
        }
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        let field: u32 = block[148..156].iter().map(|&byte| u32::from(byte)).sum();
        let right = format!("{:06o}\0 ", sum - field + 8 * u32::from(b' '));
        mended |= &block[148..156] != right.as_bytes();
        block[148..156].copy_from_slice(right.as_bytes());
    }
    mended
}
