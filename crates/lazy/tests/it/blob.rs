//! A tiny writer of eStargz, after the format's description and not after our own writer.

use std::{
    io::{Read as _, Write as _},
    ops::Range,
};

use bytes::Bytes;
use loris_format::digest::Digest;
use loris_oci::Descriptor;
use serde_json::{Value, json};

/// How a blob is laid out.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Uncompressed bytes of a chunk.
    pub chunk_bytes: usize,
    /// Files that share one gzip member.
    pub files_per_member: usize,
    /// The file before which the prefetch landmark stands.
    pub landmark: Option<usize>,
    /// Whether chunks have digests.
    pub digests: bool,
    /// The mode of files in the table of contents; in the tar it is 0644.
    pub mode: u32,
    /// Bytes of a file behind all others that only the tar has; none where it is 0.
    pub hidden: usize,
    /// Whether the tar has, behind a symbolic link, a file below it.
    pub below_link: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            chunk_bytes: 4096,
            files_per_member: 1,
            landmark: None,
            digests: true,
            mode: 0o644,
            hidden: 0,
            below_link: false,
        }
    }
}

/// A blob, and what it was made of.
pub struct TestBlob {
    pub bytes: Bytes,
    pub descriptor: Descriptor,
    pub files: Vec<(String, Vec<u8>)>,
    /// The gzip members that hold content, in order.
    pub members: Vec<Range<u64>>,
}

impl TestBlob {
    /// Flips one byte, and leaves the descriptor as it is.
    pub fn flipped(&self, place: u64) -> Bytes {
        let mut bytes = self.bytes.to_vec();
        bytes[usize::try_from(place).unwrap()] ^= 0x10;
        bytes.into()
    }

    /// Packs a member anew with another user's name in the last header of the tar in it: with all content, of the same length and
    /// with a checksum that is right. Nothing in the table of contents tells that it is another.
    pub fn forged(&self, member: usize) -> Bytes {
        let range =
            usize::try_from(self.members[member].start).unwrap()..usize::try_from(self.members[member].end).unwrap();
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(&self.bytes[range.clone()]).read_to_end(&mut plain).unwrap();
        let at = plain.windows(5).rposition(|window| window == b"ustar").unwrap() - 257;
        for name in 1..100_000 {
            let header: &mut [u8; 512] = (&mut plain[at..at + 512]).try_into().unwrap();
            header[265..277].copy_from_slice(format!("{name:011o}\0").as_bytes());
            checksum(header);
            let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            packed.write_all(&plain).unwrap();
            let packed = packed.finish().unwrap();
            if packed.len() == range.len() {
                return [&self.bytes[..range.start], &packed, &self.bytes[range.end..]].concat().into();
            }
        }
        panic!("no such member has the same length");
    }
}

/// Content that does not compress and is nowhere the same.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// `count` files of `length` bytes each, `file-0`, `file-1`, ...
pub fn files(count: usize, length: usize) -> Vec<(String, Vec<u8>)> {
    (0..count).map(|number| (format!("file-{number}"), noise(number as u64 + 1, length))).collect()
}

pub fn estargz(files: Vec<(String, Vec<u8>)>, shape: Shape) -> TestBlob {
    let mut writer = Writer::default();
    let mut entries = Vec::new();
    for (number, (name, content)) in files.iter().enumerate() {
        if shape.landmark == Some(number) {
            let entry = writer.file(".prefetch.landmark", &[0x0f], shape, true);
            entries.extend(entry);
        }
        entries.extend(writer.file(name, content, shape, number % shape.files_per_member == 0));
    }
    if shape.below_link {
        let mut link = header("a", 0);
        link[156] = b'2';
        link[157..160].copy_from_slice(b"bin");
        checksum(&mut link);
        writer.raw(&link);
        entries.push(json!({ "name": "a", "type": "symlink", "linkName": "bin", "mode": 0o644 }));
        writer.file("a/sh", b"not what it seems", shape, true);
    }
    if shape.hidden > 0 {
        writer.file("hidden", &noise(99, shape.hidden), Shape { chunk_bytes: usize::MAX, ..shape }, true);
    }
    let toc_offset = writer.cut();
    let toc = serde_json::to_vec(&json!({ "version": 1, "entries": entries })).unwrap();
    writer.raw(&header("stargz.index.json", toc.len()));
    writer.padded(&toc);
    writer.raw(&[0; 1024]);
    let end = writer.cut();
    writer.members.retain(|member| member.start < toc_offset);
    let mut bytes = writer.blob;
    assert_eq!(bytes.len() as u64, end);
    bytes.extend_from_slice(&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0]);
    bytes.extend_from_slice(format!("{toc_offset:016x}STARGZ").as_bytes());
    bytes.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);

    let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
    let mut descriptor = Descriptor::new(media_type, Digest::sha256_of(&bytes), bytes.len() as u64);
    let annotation = "containerd.io/snapshot/stargz/toc.digest";
    descriptor.annotations.insert(annotation.to_owned(), Digest::sha256_of(&toc).to_string());
    TestBlob { bytes: bytes.into(), descriptor, files, members: writer.members }
}

#[derive(Default)]
struct Writer {
    blob: Vec<u8>,
    /// Uncompressed bytes of the open member.
    open: Vec<u8>,
    members: Vec<Range<u64>>,
}

impl Writer {
    /// Ends the open member, and returns where the next one begins.
    fn cut(&mut self) -> u64 {
        if !self.open.is_empty() {
            let start = self.blob.len() as u64;
            let mut encoder = flate2::write::GzEncoder::new(&mut self.blob, flate2::Compression::fast());
            encoder.write_all(&self.open).unwrap();
            encoder.finish().unwrap();
            self.members.push(start..self.blob.len() as u64);
            self.open.clear();
        }
        self.blob.len() as u64
    }

    fn raw(&mut self, bytes: &[u8]) {
        self.open.extend_from_slice(bytes);
    }

    fn padded(&mut self, bytes: &[u8]) {
        self.raw(bytes);
        self.open.resize(self.open.len().next_multiple_of(512), 0);
    }

    fn file(&mut self, name: &str, content: &[u8], shape: Shape, new_member: bool) -> Vec<Value> {
        self.raw(&header(name, content.len()));
        let mut entries = Vec::new();
        for (number, chunk) in content.chunks(shape.chunk_bytes).enumerate() {
            if new_member && (number == 0 || shape.files_per_member == 1) {
                self.cut();
            }
            let mut entry = json!({
                "name": name,
                "type": if number == 0 { "reg" } else { "chunk" },
                "offset": self.blob.len(),
            });
            let fields = entry.as_object_mut().unwrap();
            if number == 0 {
                fields.insert("size".to_owned(), json!(content.len()));
                fields.insert("mode".to_owned(), json!(shape.mode));
            } else {
                fields.insert("chunkOffset".to_owned(), json!(number * shape.chunk_bytes));
            }
            if !self.open.is_empty() {
                fields.insert("innerOffset".to_owned(), json!(self.open.len()));
            }
            if chunk.len() == shape.chunk_bytes {
                fields.insert("chunkSize".to_owned(), json!(chunk.len()));
            }
            if shape.digests {
                fields.insert("chunkDigest".to_owned(), json!(Digest::sha256_of(chunk).to_string()));
            }
            entries.push(entry);
            self.raw(chunk);
        }
        if content.is_empty() {
            entries.push(json!({ "name": name, "type": "reg", "mode": 0o644 }));
        }
        self.open.resize(self.open.len() + content.len().next_multiple_of(512) - content.len(), 0);
        entries
    }
}

/// A header of a regular file, as USTAR has it.
fn header(name: &str, length: usize) -> [u8; 512] {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{length:011o}\0").as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    checksum(&mut header);
    header
}

fn checksum(header: &mut [u8; 512]) {
    header[148..156].copy_from_slice(b"        ");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}
