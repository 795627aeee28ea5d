//! The document that says which spans of a layer are wanted first.
//!
//! ```text
//! {"version":"1.0","prefetch_spans":[{"start_span":0,"end_span":2,"priority":1}]}        ends are inclusive
//! ```

use serde::Deserialize;

/// The version that is read.
const VERSION: &str = "1.0";

/// Some spans that are wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
pub struct PrefetchSpans {
    /// The first.
    pub start_span: u32,
    /// The last.
    pub end_span: u32,
    /// What goes before what, where that is said: the smaller first.
    #[serde(default)]
    pub priority: Option<i64>,
}

/// A document, as JSON has it. Whoever reads JSON hands it over for a check.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct PrefetchDocument {
    version: String,
    prefetch_spans: Vec<PrefetchSpans>,
}

/// Why a document is none.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrefetchError {
    /// Its version is not known.
    #[error("a list of spans to prefetch is of version {version:?}; known is 1.0")]
    Version {
        /// What it says.
        version: String,
    },
    /// It lists nothing.
    #[error("a list of spans to prefetch is empty")]
    Empty,
    /// It lists what is none.
    #[error("a list of spans to prefetch has spans {first} to {last}")]
    Backward {
        /// The first.
        first: u32,
        /// The last.
        last: u32,
    },
}

impl PrefetchDocument {
    /// Returns the spans that are wanted, in the order in which they are.
    ///
    /// # Errors
    /// Where the document is of another version, lists nothing, or a last span before the first.
    pub fn spans(&self) -> Result<Vec<PrefetchSpans>, PrefetchError> {
        if self.version != VERSION {
            return Err(PrefetchError::Version { version: self.version.chars().take(40).collect() });
        }
        if self.prefetch_spans.is_empty() {
            return Err(PrefetchError::Empty);
        }
        if let Some(spans) = self.prefetch_spans.iter().find(|spans| spans.end_span < spans.start_span) {
            return Err(PrefetchError::Backward { first: spans.start_span, last: spans.end_span });
        }
        let mut spans = self.prefetch_spans.clone();
        spans.sort_by_key(|spans| spans.priority.unwrap_or(i64::MAX));
        Ok(spans)
    }
}

/// Writes a document.
#[must_use]
pub fn write(spans: &[PrefetchSpans]) -> String {
    let one = |spans: &PrefetchSpans| {
        let priority = spans.priority.map_or_else(String::new, |priority| format!(",\"priority\":{priority}"));
        format!("{{\"start_span\":{},\"end_span\":{}{priority}}}", spans.start_span, spans.end_span)
    };
    let list: Vec<String> = spans.iter().map(one).collect();
    format!("{{\"version\":\"{VERSION}\",\"prefetch_spans\":[{}]}}", list.join(","))
}
