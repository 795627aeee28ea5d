//! What a workload read, as `ctr-remote image optimize --record-out` and nerdctl write it down.
//!
//! One JSON object a line: `{"path":"usr/bin/x","manifestDigest":"sha256:...","layerIndex":2}`, in the order in which
//! files were first opened. The last two keys may be missing; such a line is for every layer.

use std::{collections::HashSet, io::BufRead};

use loris_format::{digest::Digest, limits::Limits};
use serde::Deserialize;

/// Longest line, in bytes beside the path, whose bytes may each take six characters.
const LINE_BYTES: usize = 1 << 10;

/// The list of files that a workload read, in order.
#[derive(Clone, Debug, Default)]
pub struct Record {
    entries: Vec<Line>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    path: String,
    #[serde(default)]
    manifest_digest: Option<String>,
    #[serde(default)]
    layer_index: Option<u64>,
}

/// A record that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The file does not come.
    #[error("record cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// Not what a recorder writes.
    #[error("line {line} of the record is not valid: {detail}")]
    Invalid {
        /// From 1.
        line: usize,
        /// What is wrong.
        detail: String,
    },
    /// More lines than [`Limits::entries`].
    #[error("the record has more than {limit} lines")]
    TooLong {
        /// The bound.
        limit: usize,
    },
}

impl Record {
    /// Reads a record.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn read(mut source: impl BufRead, limits: &Limits) -> Result<Self, RecordError> {
        let most = limits.path_bytes.saturating_mul(6).saturating_add(LINE_BYTES);
        let mut entries = Vec::new();
        let mut number = 0;
        loop {
            number += 1;
            let invalid = |detail: String| RecordError::Invalid { line: number, detail };
            let mut line = Vec::new();
            std::io::Read::take(&mut source, most as u64 + 1).read_until(b'\n', &mut line)?;
            if line.len() > most {
                return Err(invalid(format!("longer than {most} bytes")));
            }
            if line.is_empty() {
                return Ok(Self { entries });
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            if entries.len() >= limits.entries {
                return Err(RecordError::TooLong { limit: limits.entries });
            }
            let entry: Line = serde_json::from_slice(&line).map_err(|error| invalid(error.to_string()))?;
            if entry.path.len() > limits.path_bytes || entry.path.contains('\0') {
                return Err(invalid("no path".to_owned()));
            }
            entries.push(entry);
        }
    }

    /// Says whether any line is for this manifest.
    #[must_use]
    pub fn knows(&self, manifest: &Digest) -> bool {
        let manifest = manifest.to_string();
        self.entries.iter().any(|line| line.manifest_digest.as_deref() == Some(&manifest))
    }

    /// Returns the paths for one layer of a manifest, each once, in order.
    #[must_use]
    pub fn layer(&self, manifest: &Digest, index: usize) -> Vec<Vec<u8>> {
        let manifest = manifest.to_string();
        self.paths(|line| {
            line.manifest_digest.as_ref().is_none_or(|digest| *digest == manifest)
                && line.layer_index.is_none_or(|layer| layer == index as u64)
        })
    }

    /// Returns all paths, each once, in order: for an image that the record was not made of.
    #[must_use]
    pub fn all(&self) -> Vec<Vec<u8>> {
        self.paths(|_| true)
    }

    fn paths(&self, wanted: impl Fn(&Line) -> bool) -> Vec<Vec<u8>> {
        let mut seen = HashSet::new();
        let lines = self.entries.iter().filter(|line| wanted(line) && seen.insert(line.path.as_str()));
        lines.map(|line| line.path.clone().into_bytes()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Record, RecordError> {
        Record::read(text.as_bytes(), &Limits { entries: 5, path_bytes: 10, ..Limits::default() })
    }

    #[test]
    fn lines_are_sorted_by_layer() {
        let (one, two) = (Digest::sha256_of(b"1"), Digest::sha256_of(b"2"));
        let record = read(&format!(
            "{{\"path\":\"a\",\"manifestDigest\":\"{one}\",\"layerIndex\":0}}\n\n\
             {{\"path\":\"b\",\"manifestDigest\":\"{one}\",\"layerIndex\":1}}\r\n\
             {{\"path\":\"a\",\"manifestDigest\":\"{one}\",\"layerIndex\":0}}\n\
             {{\"path\":\"c\",\"manifestDigest\":\"{two}\",\"layerIndex\":0}}\n\
             {{\"path\":\"d\"}}"
        ))
        .unwrap();
        let names = |paths: Vec<Vec<u8>>| String::from_utf8(paths.join(&b' ')).unwrap();
        assert_eq!(names(record.layer(&one, 0)), "a d");
        assert_eq!(names(record.layer(&one, 1)), "b d");
        assert_eq!(names(record.layer(&two, 0)), "c d");
        assert_eq!(names(record.all()), "a b c d");
        assert!(record.knows(&one) && record.knows(&two) && !record.knows(&Digest::sha256_of(b"3")));
    }

    #[test]
    fn bad_lines_are_named() {
        for (text, want) in [
            ("{\"path\":\"a\"}\nnonsense", "line 2"),
            ("{}", "line 1"),
            ("{\"path\":\"12345678901\"}", "no path"),
            ("{\"path\":\"a\",\"layerIndex\":-1}", "line 1"),
            (&format!("\n{}", "x".repeat(2000)), "line 2 of the record is not valid: longer than"),
            (&"{\"path\":\"a\"}\n".repeat(6), "more than 5 lines"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
        assert!(read("").unwrap().all().is_empty());
    }
}
