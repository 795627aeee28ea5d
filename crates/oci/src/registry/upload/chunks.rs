//! Blobs in chunks: each is taken whole or asked about, so that none is sent from the beginning again.

use std::path::Path;

use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt as _;
use http::{Method, StatusCode, header};
use tokio::io::AsyncReadExt as _;

use super::{CHUNK_MAX, Session, file_error};
use crate::{
    document::Descriptor,
    place::{BlobStream, Error},
    registry::{
        Repository,
        connections::Lane,
        error,
        request::{Call, Repeat},
        retry::Attempts,
        transport::{Answer, Payload},
    },
};

/// How an upload in chunks has ended.
pub(super) enum Chunked {
    Done,
    /// The registry takes no chunks; what was read of the content.
    Unsupported(Bytes),
}

/// What chunks are taken from.
pub(super) enum ChunkSource<'a> {
    File(tokio::fs::File, &'a Path),
    Stream(&'a mut BlobStream, BytesMut),
}

impl ChunkSource<'_> {
    /// Returns the next `length` bytes, or as many as there are.
    async fn chunk(&mut self, length: u64) -> Result<Bytes, Error> {
        let wanted = usize::try_from(length).unwrap_or(usize::MAX);
        match self {
            Self::File(file, path) => {
                let mut chunk = Vec::with_capacity(wanted);
                let read = file.take(length).read_to_end(&mut chunk).await;
                read.map_err(|source| file_error(path, source))?;
                Ok(chunk.into())
            }
            Self::Stream(content, read) => {
                while read.len() < wanted {
                    let Some(more) = content.try_next().await? else { break };
                    read.extend_from_slice(&more);
                }
                let end = read.len().min(wanted);
                Ok(read.split_to(end).freeze())
            }
        }
    }
}

impl Repository {
    /// Sends a blob in chunks.
    pub(super) async fn put_chunks(
        &self,
        descriptor: &Descriptor,
        source: &mut ChunkSource<'_>,
        begun: Option<Session>,
    ) -> Result<Chunked, Error> {
        let mut attempts = Attempts::new(self.client.config());
        let mut session = match begun {
            Some(session) => session,
            None => self.begin(&mut attempts).await?,
        };
        let chunk_bytes = self.client.config().chunk_bytes.max(session.chunk_min).max(1);
        if chunk_bytes > CHUNK_MAX {
            self.cancel(&session).await;
            return Ok(Chunked::Unsupported(Bytes::new()));
        }
        let mut hasher = descriptor.digest.hasher();
        let mut offset = 0;
        while offset < descriptor.size {
            let length = chunk_bytes.min(descriptor.size - offset);
            let chunk = match source.chunk(length).await {
                Ok(chunk) if chunk.len() as u64 == length => chunk,
                outcome => {
                    self.cancel(&session).await;
                    let found = offset + outcome?.len() as u64;
                    return Err(self.content_differs(descriptor, format!("it ends after {found} bytes")));
                }
            };
            hasher.update(&chunk);
            let taken = self.put_chunk(&mut session, offset, &chunk, &mut attempts).await?;
            if !taken && offset == 0 {
                self.cancel(&session).await;
                return Ok(Chunked::Unsupported(chunk));
            } else if !taken {
                let detail = "the registry takes no more chunks of an upload that it has begun";
                return Err(error::wrong(&Method::PATCH, &session.location, detail));
            }
            offset += length;
            attempts.progress();
        }
        let rest = source.chunk(1).await?;
        let found = hasher.finish();
        if found != descriptor.digest || !rest.is_empty() {
            self.cancel(&session).await;
            let detail = if rest.is_empty() {
                format!("its bytes have the digest {found}")
            } else {
                format!("it has more than {} bytes", descriptor.size)
            };
            return Err(self.content_differs(descriptor, detail));
        }
        self.end_chunks(descriptor, session, &mut attempts).await
    }

    /// Ends an upload whose chunks are all there.
    async fn end_chunks(
        &self,
        descriptor: &Descriptor,
        mut session: Session,
        attempts: &mut Attempts,
    ) -> Result<Chunked, Error> {
        loop {
            let outcome = self.commit(descriptor, &session, Payload::Empty, Repeat::Never, attempts).await;
            let Err(error) = outcome else { return Ok(Chunked::Done) };
            if !error.is_transient() {
                return Err(error);
            }
            if self.has_blob(descriptor).await.unwrap_or(false) {
                return Ok(Chunked::Done);
            }
            if !attempts.pause(None).await || self.received(&mut session, attempts).await? != descriptor.size {
                return Err(error);
            }
            self.client.count_retry();
        }
    }

    /// Sends one chunk, the rest of it again where a part was taken. `false`: the registry takes no chunks.
    async fn put_chunk(
        &self,
        session: &mut Session,
        offset: u64,
        chunk: &Bytes,
        attempts: &mut Attempts,
    ) -> Result<bool, Error> {
        let end = offset + chunk.len() as u64;
        let mut at = offset;
        while at < end {
            let rest = chunk.slice(usize::try_from(at - offset).unwrap_or(usize::MAX)..);
            let mut call = Call::write(Method::PATCH, session.location.clone(), &self.name)
                .header(header::CONTENT_TYPE, "application/octet-stream")
                .header(header::CONTENT_RANGE, format!("{at}-{}", end - 1));
            call.lane = Lane::Upload;
            call.repeat = Repeat::Never;
            call.payload = Payload::Bytes(rest);
            let failure = match self.client.send(self.target()?, &mut call, attempts).await {
                Ok(answer) if answer.status() == StatusCode::ACCEPTED => {
                    session.moved(&answer)?;
                    at = received(&answer).filter(|taken| (at..=end).contains(taken)).unwrap_or(end);
                    continue;
                }
                Ok(answer) if answer.status() == StatusCode::RANGE_NOT_SATISFIABLE => answer.into_error().await,
                Ok(answer) if at == 0 && is_unsupported(answer.status()) => return Ok(false),
                Ok(answer) => return Err(answer.into_error().await),
                Err(error) if error.is_transient() => error,
                Err(error) => return Err(error),
            };
            if !attempts.pause(None).await {
                return Err(failure);
            }
            self.client.count_retry();
            let taken = self.received(session, attempts).await?;
            if !(offset..=end).contains(&taken) {
                let detail = format!("the upload stands at {taken} bytes instead of between {offset} and {end}");
                return Err(error::broken(&Method::PATCH, &session.location, detail));
            }
            tracing::debug!(taken, "an upload is resumed");
            at = taken;
        }
        Ok(true)
    }

    /// Asks how much of an upload has been taken, in bytes.
    async fn received(&self, session: &mut Session, attempts: &mut Attempts) -> Result<u64, Error> {
        let mut call = Call::write(Method::GET, session.location.clone(), &self.name);
        let mut answer = self.client.send(self.target()?, &mut call, attempts).await?;
        match answer.status() {
            status if status.is_success() => {
                session.moved(&answer)?;
                Ok(received(&answer).unwrap_or(0))
            }
            StatusCode::NOT_FOUND => {
                let detail = format!("the registry has lost the upload ({})", answer.words().await);
                Err(error::broken(&answer.method, &answer.url, detail))
            }
            _ => Err(answer.into_error().await),
        }
    }
}

/// Reads `Range: 0-N` of an upload: N + 1 bytes are there. `0-0` is what registries also say of an empty upload, and is
/// read as such.
fn received(answer: &Answer) -> Option<u64> {
    let text = answer.header(header::RANGE)?.trim();
    parse_received(text.strip_prefix("bytes=").unwrap_or(text))
}

fn parse_received(text: &str) -> Option<u64> {
    let (first, last) = text.split_once('-')?;
    let last: u64 = last.trim().parse().ok()?;
    (first.trim() == "0").then_some(if last == 0 { 0 } else { last.checked_add(1)? })
}

/// What registries say that take an upload only at once.
fn is_unsupported(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::BAD_REQUEST
            | StatusCode::NOT_FOUND
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::UNSUPPORTED_MEDIA_TYPE
            | StatusCode::NOT_IMPLEMENTED
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_uploads_are_read() {
        for (text, expected) in [
            ("0-99", Some(100)),
            ("0-0", Some(0)),
            ("1-99", None),
            ("0-18446744073709551615", None),
            ("0--1", None),
            ("", None),
        ] {
            assert_eq!(parse_received(text), expected, "{text}");
        }
    }
}
