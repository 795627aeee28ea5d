//! Writes a table of contents as Go's `json.MarshalIndent(toc, "", "\t")` does.

use std::io::Write as _;

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::{Entry, time};
use crate::{digest::Digest, index::Timestamp};

/// Collects the JSON text, entry by entry.
///
/// The text of an entry has about 400 bytes; [`TocWriter::take`] hands out what is there, so that memory need not grow
/// with the number of entries.
#[derive(Debug, Default)]
pub struct TocWriter {
    text: Vec<u8>,
    entries: u64,
}

impl TocWriter {
    /// Starts a document.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns how many entries were pushed.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Appends an entry.
    pub fn push(&mut self, entry: &Entry<'_>) {
        let text = &mut self.text;
        text.extend_from_slice(if self.entries == 0 { b"{\n\t\"version\": 1,\n\t\"entries\": [" } else { b"," });
        text.extend_from_slice(b"\n\t\t{\n\t\t\t\"name\": ");
        string(&entry.name, text);
        key("type", text);
        string(entry.entry_type.as_str().as_bytes(), text);
        unsigned("size", entry.size, text);
        if entry.modtime != Timestamp::default() {
            key("modtime", text);
            text.push(b'"');
            time::write(entry.modtime, text);
            text.push(b'"');
        }
        optional_string("linkName", &entry.link_name, text);
        signed("mode", entry.mode, text);
        signed("uid", entry.uid, text);
        signed("gid", entry.gid, text);
        optional_string("userName", &entry.user_name, text);
        optional_string("groupName", &entry.group_name, text);
        unsigned("offset", entry.offset, text);
        unsigned("innerOffset", entry.inner_offset, text);
        signed("devMajor", entry.dev_major, text);
        signed("devMinor", entry.dev_minor, text);
        xattrs(entry, text);
        digest("digest", entry.digest.as_ref(), text);
        unsigned("chunkOffset", entry.chunk_offset, text);
        unsigned("chunkSize", entry.chunk_size, text);
        digest("chunkDigest", entry.chunk_digest.as_ref(), text);
        bytes("nameBytes", &entry.name, text);
        bytes("linkNameBytes", &entry.link_name, text);
        text.extend_from_slice(b"\n\t\t}");
        self.entries += 1;
    }

    /// Returns the text since the last call. The document is all of these, one behind the other, and what
    /// [`TocWriter::finish`] returns.
    #[must_use]
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.text)
    }

    /// Ends the document and returns its text, or what was not taken yet.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        // A nil slice in Go.
        let end: &[u8] = if self.entries == 0 { b"{\n\t\"version\": 1,\n\t\"entries\": null\n}" } else { b"\n\t]\n}" };
        self.text.extend_from_slice(end);
        self.text
    }
}

fn key(name: &str, text: &mut Vec<u8>) {
    text.extend_from_slice(b",\n\t\t\t\"");
    text.extend_from_slice(name.as_bytes());
    text.extend_from_slice(b"\": ");
}

fn unsigned(name: &str, value: u64, text: &mut Vec<u8>) {
    if value != 0 {
        key(name, text);
        // Writing to a vector does not fail.
        let _ = write!(text, "{value}");
    }
}

fn signed(name: &str, value: i64, text: &mut Vec<u8>) {
    if value != 0 {
        key(name, text);
        let _ = write!(text, "{value}");
    }
}

fn digest(name: &str, value: Option<&Digest>, text: &mut Vec<u8>) {
    if let Some(value) = value {
        key(name, text);
        text.push(b'"');
        let _ = write!(text, "{value}");
        text.push(b'"');
    }
}

fn optional_string(name: &str, value: &[u8], text: &mut Vec<u8>) {
    if !value.is_empty() {
        key(name, text);
        string(value, text);
    }
}

fn bytes(name: &str, value: &[u8], text: &mut Vec<u8>) {
    if std::str::from_utf8(value).is_err() {
        key(name, text);
        base64(value, text);
    }
}

fn xattrs(entry: &Entry<'_>, text: &mut Vec<u8>) {
    if entry.xattrs.is_empty() {
        return;
    }
    let mut sorted: Vec<_> = entry.xattrs.iter().collect();
    sorted.sort_by(|one, other| one.0.cmp(&other.0));
    key("xattrs", text);
    text.push(b'{');
    let mut separator: &[u8] = b"\n\t\t\t\t";
    for (place, (name, value)) in sorted.iter().enumerate() {
        // The sort is stable: the last of equal names is the one that a map would keep.
        if sorted.get(place + 1).is_some_and(|next| next.0 == *name) {
            continue;
        }
        text.extend_from_slice(separator);
        string(name, text);
        text.extend_from_slice(b": ");
        base64(value, text);
        separator = b",\n\t\t\t\t";
    }
    text.extend_from_slice(b"\n\t\t\t}");
}

fn base64(value: &[u8], text: &mut Vec<u8>) {
    text.push(b'"');
    text.extend_from_slice(STANDARD.encode(value).as_bytes());
    text.push(b'"');
}

/// Appends a JSON string with Go's escapes: also `<`, `>`, `&`, U+2028 and U+2029, and for every byte that is not UTF-8
/// the six characters of an escaped U+FFFD. Backspace and form feed are written as Go 1.22 and later write them.
fn string(value: &[u8], text: &mut Vec<u8>) {
    text.push(b'"');
    for chunk in value.utf8_chunks() {
        escaped(chunk.valid(), text);
        for _ in chunk.invalid() {
            text.extend_from_slice(b"\\ufffd");
        }
    }
    text.push(b'"');
}

fn escaped(value: &str, text: &mut Vec<u8>) {
    let mut plain = 0;
    for (place, byte) in value.bytes().enumerate() {
        let (escape, length): (&[u8], usize) = match byte {
            b'"' => (b"\\\"", 1),
            b'\\' => (b"\\\\", 1),
            b'\n' => (b"\\n", 1),
            b'\r' => (b"\\r", 1),
            b'\t' => (b"\\t", 1),
            0x08 => (b"\\b", 1),
            0x0c => (b"\\f", 1),
            b'<' => (b"\\u003c", 1),
            b'>' => (b"\\u003e", 1),
            b'&' => (b"\\u0026", 1),
            0..0x20 => (b"", 1),
            // The first byte of U+2028 and U+2029; no other byte of UTF-8 text can begin here with these three.
            0xe2 if value.as_bytes()[place..].starts_with("\u{2028}".as_bytes()) => (b"\\u2028", 3),
            0xe2 if value.as_bytes()[place..].starts_with("\u{2029}".as_bytes()) => (b"\\u2029", 3),
            _ => continue,
        };
        text.extend_from_slice(&value.as_bytes()[plain..place]);
        if escape.is_empty() {
            let _ = write!(text, "\\u{byte:04x}");
        }
        text.extend_from_slice(escape);
        plain = place + length;
    }
    text.extend_from_slice(&value.as_bytes()[plain..]);
}
