//! What is measured on: layers and tables of contents that are made up, the same on every machine and in every run.
//!
//! It must not know what is measured.
#![forbid(unsafe_code)]
#![expect(clippy::expect_used, reason = "what is made up here is known to be sound")]

use loris_format::{
    digest::Digest,
    estargz::toc::{Entry, EntryType, TocWriter},
    tar,
};

/// Bytes of the layer that is converted and read.
pub const LAYER_BYTES: usize = 64 << 20;
/// Files for each directory, in the layer and in the table of contents.
const FILES_IN_DIRECTORY: usize = 25;
/// Sizes of files, as they are spread in layers of Debian's packages: most are small, most bytes are in large ones.
const SIZES: [usize; 8] = [120, 900, 2_500, 6_000, 14_000, 40_000, 250_000, 1_900_000];

/// Numbers that look like chance (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `bound`; low ones more often.
    fn below(&mut self, bound: usize) -> usize {
        let bound = bound as u64;
        let number = (self.next() % bound).min(self.next() % bound);
        usize::try_from(number).unwrap_or_default()
    }
}

/// Returns a tar of at least `bytes` bytes. Its content is text for five eighths, records of numbers, as programs are, for
/// two, and noise for one. Gzip makes about two fifths of it.
#[must_use]
pub fn layer(bytes: usize) -> Vec<u8> {
    let mut archive = Vec::with_capacity(bytes + SIZES[SIZES.len() - 1]);
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for number in 0.. {
        if archive.len() >= bytes {
            break;
        }
        let directory = format!("usr/share/package-{}/", number / FILES_IN_DIRECTORY);
        if number % FILES_IN_DIRECTORY == 0 {
            let entry =
                tar::Entry { path: directory.clone().into(), kind: tar::EntryKind::Directory, ..Default::default() };
            archive.extend(tar::encode_header(&entry).expect("a short path"));
        }
        let content = content(&mut numbers, SIZES[number % SIZES.len()], number);
        let path = format!("{directory}file-{number}").into();
        let entry = tar::Entry { path, size: content.len() as u64, ..Default::default() };
        archive.extend(tar::encode_header(&entry).expect("a short path"));
        archive.extend_from_slice(&content);
        archive.extend_from_slice(tar::padding(content.len() as u64));
    }
    archive.extend_from_slice(&tar::END_OF_ARCHIVE);
    archive
}

/// Returns the content of a file of a layer.
fn content(numbers: &mut Numbers, bytes: usize, number: usize) -> Vec<u8> {
    const WORDS: [&str; 24] = [
        "the ",
        "of ",
        "and ",
        "layer",
        " is ",
        "to ",
        "image ",
        "in ",
        "registry ",
        "a ",
        "file",
        ".\n",
        "bytes ",
        "that ",
        "content ",
        "for ",
        "digest",
        "request ",
        ", ",
        "not ",
        "mounted ",
        "which ",
        "is read ",
        "lazily ",
    ];
    let mut content = Vec::with_capacity(bytes + 32);
    // Sizes and kinds have different periods, so that each kind has files of each size.
    match (number / SIZES.len()) % 8 {
        0 | 2 | 4 | 5 | 7 => {
            while content.len() < bytes {
                content.extend_from_slice(WORDS[numbers.below(WORDS.len())].as_bytes());
            }
        }
        1 | 6 => {
            while content.len() < bytes {
                let operation = u16::try_from(numbers.below(300)).unwrap_or_default();
                let target = u32::try_from(content.len() + numbers.below(4000)).unwrap_or_default();
                content.extend_from_slice(&operation.to_le_bytes());
                content.extend_from_slice(&target.to_le_bytes());
            }
        }
        _ => {
            while content.len() < bytes {
                content.extend_from_slice(&numbers.next().to_le_bytes());
            }
        }
    }
    content.truncate(bytes);
    content
}

/// Returns a table of contents with `entries` entries, and where the content that it tells of ends in the blob.
#[must_use]
pub fn table(entries: usize) -> (Vec<u8>, u64) {
    const MEMBER_BYTES: u64 = 2_000;
    let mut writer = TocWriter::new();
    let mut offset = 0;
    for number in 0..entries {
        let directory = format!("usr/share/package-{}/", number / FILES_IN_DIRECTORY);
        let mut entry = Entry { mode: 0o755, ..Entry::default() };
        entry.modtime.seconds = 1_700_000_000 + i64::try_from(number).unwrap_or_default();
        if number % FILES_IN_DIRECTORY == 0 {
            entry.entry_type = EntryType::Directory;
            entry.name = directory.into_bytes().into();
        } else {
            let digest = Some(Digest::sha256_of(&number.to_le_bytes()));
            entry.name = format!("{directory}file-{number}").into_bytes().into();
            entry.size = 5_000;
            (entry.offset, entry.digest, entry.chunk_digest) = (offset, digest, digest);
            offset += MEMBER_BYTES;
        }
        writer.push(&entry);
    }
    (writer.finish(), offset)
}

#[cfg(test)]
mod tests {
    use loris_format::{
        compression::{GzipLevel, gzip_member},
        estargz::open::index,
        index::Codec,
        limits::Limits,
        opening::Trust,
        position::BlobOffset,
    };

    use super::*;

    #[test]
    fn a_layer_compresses_as_layers_do() {
        let layer = layer(20 << 20);
        assert!(layer.len() >= 20 << 20);
        let percent = gzip_member(GzipLevel::DEFAULT, &layer).len() * 100 / layer.len();
        assert!((30..50).contains(&percent), "{percent} %");
    }

    #[test]
    fn a_table_is_sound() {
        let (json, end) = table(1_000);
        let (index, entries) =
            index(&json, BlobOffset(end), Codec::Gzip, Trust::Required, &Limits::default()).expect("a sound one");
        // The root and the two directories above the packages are implied.
        assert_eq!((entries, index.nodes().len()), (1_000, 1_003));
    }
}
