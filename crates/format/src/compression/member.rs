//! The header of a gzip member (RFC 1952).

use super::gzip::{HEADER_BYTES, MAGIC};

/// What stands at the beginning of some bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Header {
    /// A header of so many bytes.
    Bytes(usize),
    /// The beginning of one, as far as can be told.
    CutOff,
    /// None, or one that nobody reads.
    Wrong(&'static str),
}

/// Reads a header. Its checksum is not looked at: nothing in it counts.
pub(crate) fn header(bytes: &[u8]) -> Header {
    const METHOD_DEFLATE: u8 = 8;
    const CHECKSUM: u8 = 1 << 1;
    const EXTRA: u8 = 1 << 2;
    const NAME: u8 = 1 << 3;
    const COMMENT: u8 = 1 << 4;
    const RESERVED: u8 = 0b1110_0000;
    if !MAGIC.starts_with(&bytes[..bytes.len().min(2)]) {
        return Header::Wrong("no gzip member stands here");
    }
    let Some(fixed) = bytes.first_chunk::<HEADER_BYTES>() else { return Header::CutOff };
    if fixed[2] != METHOD_DEFLATE || fixed[3] & RESERVED != 0 {
        return Header::Wrong("a gzip header is of no known kind");
    }
    let flags = fixed[3];
    let mut at = HEADER_BYTES;
    if flags & EXTRA != 0 {
        let Some(length) = bytes.get(at..).and_then(<[u8]>::first_chunk) else { return Header::CutOff };
        at += 2 + usize::from(u16::from_le_bytes(*length));
    }
    for flag in [NAME, COMMENT] {
        if flags & flag != 0 {
            let end = bytes.get(at..).and_then(|text| text.iter().position(|byte| *byte == 0));
            let Some(end) = end else { return Header::CutOff };
            at += end + 1;
        }
    }
    if flags & CHECKSUM != 0 {
        at += 2;
    }
    if at > bytes.len() { Header::CutOff } else { Header::Bytes(at) }
}
