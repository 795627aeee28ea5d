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
    text: Text,
    entries: u64,
}

/// Text that grows.
#[derive(Debug, Default)]
struct Text {
    bytes: Vec<u8>,
    /// Without white space, as zstd:chunked has it.
    compact: bool,
}

impl TocWriter {
    /// Starts a document.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a document without white space, for a format in which nobody counts on any.
    #[must_use]
    pub fn compact() -> Self {
        Self { text: Text { bytes: Vec::new(), compact: true }, entries: 0 }
    }

    /// Returns how many entries were pushed.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Appends an entry.
    pub fn push(&mut self, entry: &Entry<'_>) {
        let text = &mut self.text;
        text.layout(if self.entries == 0 { "{\n\t\"version\": 1,\n\t\"entries\": [" } else { "," });
        text.layout("\n\t\t{\n\t\t\t\"name\": ");
        string(&entry.name, &mut text.bytes);
        text.text("type", entry.entry_type.as_str().as_bytes());
        text.unsigned("size", entry.size);
        text.time("modtime", Some(entry.modtime).filter(|time| *time != Timestamp::default()));
        text.optional("linkName", &entry.link_name);
        text.signed("mode", entry.mode);
        text.signed("uid", entry.uid);
        text.signed("gid", entry.gid);
        text.optional("userName", &entry.user_name);
        text.optional("groupName", &entry.group_name);
        text.unsigned("offset", entry.offset);
        text.unsigned("innerOffset", entry.inner_offset);
        text.signed("devMajor", entry.dev_major);
        text.signed("devMinor", entry.dev_minor);
        text.xattrs(entry);
        text.digest("digest", entry.digest.as_ref());
        text.unsigned("chunkOffset", entry.chunk_offset);
        text.unsigned("chunkSize", entry.chunk_size);
        text.digest("chunkDigest", entry.chunk_digest.as_ref());
        if entry.hole {
            text.text("chunkType", b"zeros");
        }
        text.unsigned("endOffset", entry.end_offset);
        text.time("accesstime", entry.accessed);
        text.time("changetime", entry.changed);
        text.not_utf8("nameBytes", &entry.name);
        text.not_utf8("linkNameBytes", &entry.link_name);
        text.layout("\n\t\t}");
        self.entries += 1;
    }

    /// Returns the text since the last call. The document is all of these, one behind the other, and what
    /// [`TocWriter::finish`] returns.
    #[must_use]
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.text.bytes)
    }

    /// Ends the document and returns its text, or what was not taken yet.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.finish_with(None)
    }

    /// Ends the document of a zstd:chunked blob, with the digest of the compressed `tar-split` where there is one.
    #[must_use]
    pub fn finish_with(mut self, tar_split: Option<&Digest>) -> Vec<u8> {
        // A nil slice in Go.
        self.text.layout(if self.entries == 0 { "{\n\t\"version\": 1,\n\t\"entries\": null" } else { "\n\t]" });
        if let Some(digest) = tar_split {
            self.text.layout(",\n\t\"tarSplitDigest\": ");
            string(digest.to_string().as_bytes(), &mut self.text.bytes);
        }
        self.text.layout("\n}");
        self.text.bytes
    }
}

impl Text {
    /// Appends what stands between values: text without white space of its own but for the layout.
    fn layout(&mut self, layout: &str) {
        if self.compact {
            self.bytes.extend(layout.bytes().filter(|byte| !byte.is_ascii_whitespace()));
        } else {
            self.bytes.extend_from_slice(layout.as_bytes());
        }
    }

    fn key(&mut self, name: &str) {
        let (before, behind): (&[u8], &[u8]) = if self.compact { (b",\"", b"\":") } else { (b",\n\t\t\t\"", b"\": ") };
        self.bytes.extend_from_slice(before);
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.extend_from_slice(behind);
    }

    fn unsigned(&mut self, name: &str, value: u64) {
        if value != 0 {
            self.key(name);
            // Writing to a vector does not fail.
            let _ = write!(self.bytes, "{value}");
        }
    }

    fn signed(&mut self, name: &str, value: i64) {
        if value != 0 {
            self.key(name);
            let _ = write!(self.bytes, "{value}");
        }
    }

    fn time(&mut self, name: &str, value: Option<Timestamp>) {
        if let Some(value) = value {
            self.key(name);
            self.bytes.push(b'"');
            time::write(value, &mut self.bytes);
            self.bytes.push(b'"');
        }
    }

    fn digest(&mut self, name: &str, value: Option<&Digest>) {
        if let Some(value) = value {
            self.key(name);
            self.bytes.push(b'"');
            let _ = write!(self.bytes, "{value}");
            self.bytes.push(b'"');
        }
    }

    fn text(&mut self, name: &str, value: &[u8]) {
        self.key(name);
        string(value, &mut self.bytes);
    }

    fn optional(&mut self, name: &str, value: &[u8]) {
        if !value.is_empty() {
            self.text(name, value);
        }
    }

    fn not_utf8(&mut self, name: &str, value: &[u8]) {
        if std::str::from_utf8(value).is_err() {
            self.key(name);
            base64(value, &mut self.bytes);
        }
    }

    fn xattrs(&mut self, entry: &Entry<'_>) {
        if entry.xattrs.is_empty() {
            return;
        }
        let mut sorted: Vec<_> = entry.xattrs.iter().collect();
        sorted.sort_by(|one, other| one.0.cmp(&other.0));
        self.key("xattrs");
        self.bytes.push(b'{');
        let mut separator = "\n\t\t\t\t";
        for (place, (name, value)) in sorted.iter().enumerate() {
            // The sort is stable: the last of equal names is the one that a map would keep.
            if sorted.get(place + 1).is_some_and(|next| next.0 == *name) {
                continue;
            }
            self.layout(separator);
            string(name, &mut self.bytes);
            self.layout(": ");
            base64(value, &mut self.bytes);
            separator = ",\n\t\t\t\t";
        }
        self.layout("\n\t\t\t}");
    }
}

fn base64(value: &[u8], text: &mut Vec<u8>) {
    text.push(b'"');
    text.extend_from_slice(STANDARD.encode(value).as_bytes());
    text.push(b'"');
}

/// Appends a JSON string with Go's escapes: also `<`, `>`, `&`, U+2028 and U+2029, and for every byte that is not UTF-8
/// the six characters of an escaped U+FFFD. Backspace and form feed are written as Go 1.22 and later write them.
pub(crate) fn string(value: &[u8], text: &mut Vec<u8>) {
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
