//! One request and its answer: a place among the host's requests, no wait without a bound, everything counted.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use reqwest::{Body, Url};

use super::{
    Client,
    connections::{Lane, Place},
    error::{self, ERROR_BYTES},
    hosts::Settings,
    location::Origin,
    meter::Meter,
};
use crate::place::{BlobStream, Error};

/// What a request carries.
pub(super) enum Payload {
    /// Nothing.
    Empty,
    /// Bytes that can be sent again.
    Bytes(Bytes),
    /// A stream of a known length, in bytes, that can be sent once; `None` when it has been.
    Once(Option<BlobStream>, u64),
}

impl Payload {
    /// Says whether the request can be sent (again).
    pub(super) fn is_ready(&self) -> bool {
        !matches!(self, Self::Once(None, _))
    }
}

/// How long an answer may take after the request is sent.
#[derive(Clone, Copy, Debug)]
pub(super) enum Patience {
    /// As long as any step.
    Step,
    /// As long as a registry may work on a blob's end.
    Commit,
}

/// An answer whose body is still to be read.
pub(super) struct Answer {
    pub(super) method: Method,
    /// The address that answered, after redirects.
    pub(super) url: Url,
    response: reqwest::Response,
    place: Place,
    stall: Duration,
    pace: Pace,
    counters: Arc<Counters>,
    meter: Arc<Meter>,
    /// Whether its body is one that is read as fast as it comes.
    is_measured: bool,
}

/// Whether a body comes fast enough to be called alive.
struct Pace {
    least_bytes_per_second: u64,
    /// Over so much time of waiting.
    over: Duration,
    waited: Duration,
    bytes: u64,
}

/// Counts of everything that a client has done.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) requests: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) redirects: AtomicU64,
    pub(super) tokens: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) sent: AtomicU64,
}

impl Client {
    /// Sends one request, to whatever host, with no credentials but those in `headers`.
    ///
    /// # Errors
    ///
    /// [`Error::Registry`], transient, where no answer comes.
    pub(super) async fn exchange(
        &self,
        method: &Method,
        url: &Url,
        mut headers: HeaderMap,
        payload: &mut Payload,
        (lane, patience): (Lane, Patience),
        settings: &Settings,
    ) -> Result<Answer, Error> {
        let config = self.config();
        let connection = self.connections().to(&Origin::of(url), settings.connection.as_ref(), config)?;
        let place = connection.place(lane).await;
        let counters = self.counters().clone();
        counters.requests.fetch_add(1, Ordering::Relaxed);

        // Bodies are compared with digests: nothing on the way may encode them.
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let (content, length): (Option<BlobStream>, u64) = match payload {
            Payload::Empty => (None, 0),
            Payload::Bytes(bytes) => (Some(pieces(bytes.clone())), bytes.len() as u64),
            Payload::Once(stream, length) => {
                let stream = stream.take().ok_or_else(|| error::wrong(method, url, "its content was sent already"))?;
                (Some(stream), *length)
            }
        };
        // Said also where it is 0, which the library would leave out.
        if !matches!(*method, Method::GET | Method::HEAD | Method::DELETE) {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        }
        let sent = Arc::new(AtomicU64::new(0));
        let body = content.map(|content| {
            let (sent, counters, gate) = (sent.clone(), counters.clone(), place.gate().clone());
            Body::wrap_stream(content.inspect(move |chunk| {
                let bytes = chunk.as_ref().map_or(0, |chunk| chunk.len() as u64);
                sent.fetch_add(bytes, Ordering::Relaxed);
                counters.sent.fetch_add(bytes, Ordering::Relaxed);
                gate.moved();
            }))
        });
        let mut request = reqwest::Request::new(method.clone(), url.clone());
        *request.headers_mut() = headers;
        *request.body_mut() = body;

        let stall = settings.patience.map_or(config.stall_timeout, |patience| patience.min(config.stall_timeout));
        let patience = match patience {
            Patience::Step => stall,
            Patience::Commit => config.commit_timeout,
        };
        tracing::trace!(%method, url = super::location::redacted(url), "request");
        let asked_at = Instant::now();
        let mut answering = std::pin::pin!(connection.http.execute(request));
        let mut before = 0;
        let response = loop {
            // Until the content is taken, what counts is whether it moves; from then on the registry may think.
            let allowed = if before < length { stall } else { patience };
            match tokio::time::timeout(allowed, &mut answering).await {
                Ok(response) => break response.map_err(|error| error::transport(method, url, error))?,
                Err(_) => {
                    let now = sent.load(Ordering::Relaxed);
                    if now == before {
                        let seconds = allowed.as_secs_f32();
                        return Err(error::broken(method, url, format!("no answer within {seconds} seconds")));
                    }
                    before = now;
                }
            }
        };
        let meter = connection.meter.clone();
        let now = Instant::now();
        if length == 0 {
            meter.answered(now.saturating_duration_since(asked_at));
        }
        let is_measured = lane == Lane::Short && length == 0;
        if is_measured {
            meter.begin(now);
        }
        let pace = Pace {
            least_bytes_per_second: config.least_bytes_per_second,
            over: stall.saturating_mul(2),
            waited: Duration::ZERO,
            bytes: 0,
        };
        Ok(Answer {
            method: method.clone(),
            url: url.clone(),
            response,
            place,
            stall,
            pace,
            counters,
            meter,
            is_measured,
        })
    }

    /// Takes note of a repetition.
    pub(super) fn count_retry(&self) {
        self.counters().retries.fetch_add(1, Ordering::Relaxed);
    }
}

/// Cuts bytes that are in memory, so that it can be seen how they are taken.
fn pieces(mut bytes: Bytes) -> BlobStream {
    const PIECE: usize = 64 << 10;
    Box::pin(stream::iter(std::iter::from_fn(move || {
        let piece = bytes.split_to(bytes.len().min(PIECE));
        (!piece.is_empty()).then_some(Ok(piece))
    })))
}

impl Pace {
    /// Takes note of bytes that were waited for; what is wrong, where too few come.
    fn check(&mut self, waited: Duration, bytes: usize) -> Result<(), String> {
        self.waited += waited;
        self.bytes += bytes as u64;
        if self.waited < self.over {
            return Ok(());
        }
        let seconds = self.waited.as_secs_f32();
        let bytes = std::mem::take(&mut self.bytes);
        let least = u128::from(self.least_bytes_per_second) * self.waited.as_millis() / 1000;
        self.waited = Duration::ZERO;
        if u128::from(bytes) < least { Err(format!("no more than {bytes} bytes in {seconds} seconds")) } else { Ok(()) }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.is_measured {
            self.meter.end(Instant::now());
        }
    }
}

impl Answer {
    /// Returns what measures the host that answered.
    pub(super) fn meter(&self) -> &Arc<Meter> {
        &self.meter
    }

    pub(super) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(super) fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// Returns a header's text.
    pub(super) fn header(&self, name: impl header::AsHeaderName) -> Option<&str> {
        self.headers().get(name)?.to_str().ok()
    }

    /// Returns `Content-Length`.
    pub(super) fn length(&self) -> Option<u64> {
        self.header(header::CONTENT_LENGTH)?.parse().ok()
    }

    /// Returns the error that this answer is, to be told that it is wrong.
    pub(super) fn wrong(&self, detail: impl Into<String>) -> Error {
        error::wrong(&self.method, &self.url, detail)
    }

    /// Refuses a body that was encoded on the way.
    pub(super) fn check_encoding(&self) -> Result<(), Error> {
        match self.header(header::CONTENT_ENCODING) {
            None | Some("" | "identity") => Ok(()),
            Some(other) => {
                let other = error::printable(other);
                Err(self.wrong(format!("the body is encoded as {other:?}, which was not asked for")))
            }
        }
    }

    /// Returns the next bytes of the body, `None` at its end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        let asked_at = Instant::now();
        let next = match tokio::time::timeout(self.stall, self.response.chunk()).await {
            Ok(next) => next.map_err(|error| error::transport(&self.method, &self.url, error))?,
            Err(_) => {
                let seconds = self.stall.as_secs_f32();
                return Err(error::broken(&self.method, &self.url, format!("no byte for {seconds} seconds")));
            }
        };
        if let Some(bytes) = &next {
            let now = Instant::now();
            self.meter.arrived(bytes.len(), now);
            // The reader's own time is not the server's.
            self.pace
                .check(now.saturating_duration_since(asked_at), bytes.len())
                .map_err(|detail| error::broken(&self.method, &self.url, detail))?;
            self.place.gate().moved();
            self.counters.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        Ok(next)
    }

    /// Returns the whole body.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] where it has more than `limit` bytes, named `what`.
    pub(super) async fn body(&mut self, what: &str, limit: u64) -> Result<Bytes, Error> {
        let too_large = || Error::TooLarge { what: what.to_owned(), limit };
        if self.length().is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let mut body = BytesMut::new();
        while let Some(chunk) = self.chunk().await? {
            if (body.len() + chunk.len()) as u64 > limit {
                return Err(too_large());
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body.freeze())
    }

    /// Reads what the answer says about its error.
    pub(super) async fn words(&mut self) -> String {
        let mut body = BytesMut::new();
        while body.len() < ERROR_BYTES {
            match self.chunk().await {
                Ok(Some(chunk)) => body.extend_from_slice(&chunk),
                _ => break,
            }
        }
        body.truncate(ERROR_BYTES);
        error::words(self.status(), &body)
    }

    /// Turns an answer that nobody expected into an error.
    pub(super) async fn into_error(mut self) -> Error {
        let detail = self.words().await;
        error::unexpected(&self.method, &self.url, self.status(), detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_now_and_then_is_no_life() {
        let second = Duration::from_secs(1);
        for (name, waits, expected) in [
            ("fast", vec![(second, 1 << 20); 100], true),
            ("just enough", vec![(second, 64); 100], true),
            ("too little", vec![(second, 63); 60], false),
            ("a byte each time", vec![(29 * second, 1); 3], false),
            ("a short one", vec![(second, 1); 59], true),
            ("a slow end", [vec![(second, 1 << 20); 60], vec![(second, 1); 60]].concat(), false),
            ("a slow reader", vec![(Duration::ZERO, 1); 100_000], true),
        ] {
            let over = 60 * second;
            let mut pace = Pace { least_bytes_per_second: 64, over, waited: Duration::ZERO, bytes: 0 };
            let outcome = waits.into_iter().try_for_each(|(waited, bytes)| pace.check(waited, bytes));
            assert_eq!(outcome.is_ok(), expected, "{name}: {outcome:?}");
        }
    }
}
