//! Faults: what goes wrong, with which requests, how often.

use std::time::Duration;

use bytes::Bytes;

/// One thing that goes wrong. By default with the next request that it can go wrong with, once.
///
/// ```
/// use loris_testkit::registry::{Effect, Fault};
///
/// let fault = Fault::new(Effect::IgnoreRange).method("GET").path("/blobs/").skip(1).times(2);
/// assert_eq!(fault.to_string(), "IgnoreRange, 2 times after 1, of GET */blobs/*");
/// ```
#[derive(Clone, Debug)]
pub struct Fault {
    effect: Effect,
    method: Option<&'static str>,
    path: Option<String>,
    skip: usize,
    times: usize,
}

/// What goes wrong.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Effect {
    /// Answers a range request with a range that begins this many bytes later, and says so in `Content-Range`.
    ShiftRange(u64),
    /// Answers a range request with bytes that begin this many bytes later, under the `Content-Range` that was asked
    /// for: only a digest can tell.
    ShiftBytes(u64),
    /// Answers a range request with 200 and the whole.
    IgnoreRange,
    /// Closes the connection after this many bytes of the body; `Content-Length` promises all.
    Truncate(u64),
    /// Ends the body after this many bytes as if it were whole (no `Content-Length`).
    EndEarly(u64),
    /// Sends more bytes after the end (no `Content-Length`).
    ExtraBytes(Bytes),
    /// Sends this many bytes of the body, then nothing for the given time.
    Stall(u64, Duration),
    /// Sends this many bytes of the body, then one byte each time that the given time has passed.
    Drip(u64, Duration),
    /// Resets the connection (RST) after this many bytes of the body.
    Reset(u64),
    /// Resets the connection before any answer.
    ResetAtOnce,
    /// Sends the body chunked, without `Content-Length`.
    NoLength,
    /// Answers with these bytes instead of those that were asked for. Headers that name the digest stay.
    WrongContent(Bytes),
    /// Flips one bit of the body at this offset.
    FlipBit(u64),
    /// Names this digest in `Docker-Content-Digest`.
    DigestHeader(String),
    /// Answers with this status and an error document.
    Status(u16),
    /// Answers with this status and `Retry-After`.
    RetryAfter(u16, String),
    /// Answers 401 with the challenge, as for a token that has just expired.
    Unauthorized,
    /// Answers 307 with this `Location`.
    RedirectTo(String),
    /// Answers this much later.
    Delay(Duration),
    /// Takes this many bytes of the request's body (they count as received), then resets the connection.
    AbortUpload(u64),
    /// Takes the request, does what it asks for, then resets the connection without an answer.
    LoseAnswer,
    /// Adds or replaces a header of the answer.
    Header(&'static str, String),
}

impl Fault {
    /// Makes a fault that happens once, with the next request of any method and path.
    #[must_use]
    pub fn new(effect: Effect) -> Self {
        Self { effect, method: None, path: None, skip: 0, times: 1 }
    }

    /// Lets it happen to requests of one method only.
    #[must_use]
    pub fn method(mut self, method: &'static str) -> Self {
        self.method = Some(method);
        self
    }

    /// Lets it happen only where the path contains a text.
    #[must_use]
    pub fn path(mut self, part: impl Into<String>) -> Self {
        self.path = Some(part.into());
        self
    }

    /// Lets so many requests pass that it could have happened to.
    #[must_use]
    pub fn skip(mut self, requests: usize) -> Self {
        self.skip = requests;
        self
    }

    /// Lets it happen to so many requests.
    #[must_use]
    pub fn times(mut self, times: usize) -> Self {
        self.times = times;
        self
    }

    /// Lets it happen to all requests, from then on.
    #[must_use]
    pub fn always(self) -> Self {
        self.times(usize::MAX)
    }

    /// Says whether this fault is over.
    pub(super) fn is_over(&self) -> bool {
        self.times == 0
    }

    /// Counts a request and returns what goes wrong with it.
    pub(super) fn meet(&mut self, method: &str, path: &str, is_range: bool) -> Option<Effect> {
        let matches = self.method.is_none_or(|wanted| wanted == method)
            && self.path.as_ref().is_none_or(|part| path.contains(part.as_str()))
            && (is_range || !self.effect.needs_range());
        if !matches || self.times == 0 {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        self.times -= usize::from(self.times != usize::MAX);
        Some(self.effect.clone())
    }
}

impl Effect {
    fn needs_range(&self) -> bool {
        matches!(self, Self::ShiftRange(_) | Self::ShiftBytes(_) | Self::IgnoreRange)
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { effect, method, path, skip, times } = self;
        let (method, path) = (method.unwrap_or("any"), path.as_deref().unwrap_or(""));
        match times {
            &usize::MAX => write!(f, "{effect:?}, always after {skip}, of {method} *{path}*"),
            times => write!(f, "{effect:?}, {times} times after {skip}, of {method} *{path}*"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_counts_only_what_it_could_happen_to() {
        let mut fault = Fault::new(Effect::IgnoreRange).method("GET").path("/blobs/").skip(1).times(2);
        let requests = [
            ("HEAD", "/v2/a/blobs/x", true, false),
            ("GET", "/v2/a/manifests/x", true, false),
            ("GET", "/v2/a/blobs/x", false, false),
            ("GET", "/v2/a/blobs/x", true, false),
            ("GET", "/v2/a/blobs/x", true, true),
            ("GET", "/v2/a/blobs/y", true, true),
            ("GET", "/v2/a/blobs/y", true, false),
        ];
        for (number, (method, path, is_range, expected)) in requests.into_iter().enumerate() {
            assert_eq!(fault.meet(method, path, is_range).is_some(), expected, "request {number}");
        }
        assert!(fault.is_over());
    }
}
