//! One request and its answer: a place among the host's requests, no wait without a bound, everything counted.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use reqwest::{Body, Url};

use super::{
    Client,
    connections::{Lane, Place},
    error::{self, ERROR_BYTES},
    location::Origin,
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
    counters: Arc<Counters>,
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
    ) -> Result<Answer, Error> {
        let config = self.config();
        let connection = self.connections().to(&Origin::of(url), config)?;
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

        let stall = config.stall_timeout;
        let patience = match patience {
            Patience::Step => stall,
            Patience::Commit => config.commit_timeout,
        };
        tracing::trace!(%method, url = super::location::redacted(url), "request");
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
        Ok(Answer { method: method.clone(), url: url.clone(), response, place, stall, counters })
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

impl Answer {
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
        let next = match tokio::time::timeout(self.stall, self.response.chunk()).await {
            Ok(next) => next.map_err(|error| error::transport(&self.method, &self.url, error))?,
            Err(_) => {
                let seconds = self.stall.as_secs_f32();
                return Err(error::broken(&self.method, &self.url, format!("no byte for {seconds} seconds")));
            }
        };
        if let Some(bytes) = &next {
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
