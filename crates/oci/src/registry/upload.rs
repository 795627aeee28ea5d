//! Writing blobs: at once, or in chunks that can be resumed; or not at all, where the registry can take them from another
//! repository.
//!
//! Source: distribution specification 1.1, section "Pushing blobs". A blob is sent at once (POST, PUT) unless it is large
//! ([`super::Config::chunked_from_bytes`]). A step whose outcome is unknown is not repeated blindly: the registry is asked
//! whether it has the blob, or how much of the chunk it has taken.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use http::{Method, StatusCode, header};
use loris_format::digest::{Digest, Hasher};
use reqwest::Url;
use tokio::io::AsyncReadExt as _;
use tokio_util::io::ReaderStream;

use super::{
    Repository,
    connections::Lane,
    location::location,
    request::{Call, Repeat},
    retry::Attempts,
    transport::{Answer, Patience, Payload},
};
use crate::{
    document::Descriptor,
    place::{BlobStream, Error},
};

/// Blobs from a stream up to this size are held in memory, in bytes, so that they can be sent again.
const HELD: u64 = 4 << 20;
/// Largest `OCI-Chunk-Min-Length` that is obeyed, in bytes: a chunk is held in memory.
const CHUNK_MAX: u64 = 128 << 20;
/// How much of a file is read at once.
const READ: usize = 256 << 10;

/// An upload that the registry has begun.
#[derive(Debug)]
pub(super) struct Session {
    location: Url,
    chunk_min: u64,
}

/// Where a blob's bytes come from.
enum Content<'a> {
    File(&'a Path),
    Held(Bytes),
}

/// How an upload in chunks has ended.
enum Chunked {
    Done,
    /// The registry takes no chunks; what was read of the content.
    Unsupported(Bytes),
}

impl Repository {
    /// Says whether the repository has a blob.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] where it has one of another size under this digest.
    pub async fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, Error> {
        let url = self.url(&format!("blobs/{}", descriptor.digest)).await?;
        let mut call = Call::read(Method::HEAD, url, &self.name);
        let mut attempts = Attempts::new(self.client.config());
        match self.client.send(&self.host, &mut call, &mut attempts).await {
            Ok(answer) if answer.status() == StatusCode::OK => match answer.length() {
                Some(length) if length != descriptor.size => {
                    let detail = format!("it has {length} bytes there instead of {}", descriptor.size);
                    Err(self.corrupt(descriptor, detail))
                }
                _ => Ok(true),
            },
            Ok(answer) if answer.status() == StatusCode::NOT_FOUND => Ok(false),
            // Addresses that are signed for GET refuse HEAD. To send the blob again is the worse but safe choice.
            Ok(answer) if answer.status().is_client_error() => Ok(false),
            Ok(answer) => Err(answer.into_error().await),
            Err(Error::Registry { status: Some(400..=499), .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Asks for a blob of another repository of this registry. `Err` of a session: the registry has begun an upload
    /// instead; nothing where it won't.
    pub(super) async fn mount(&self, digest: &Digest, from: &str) -> Result<Result<(), Option<Session>>, Error> {
        let mut url = self.url("blobs/uploads/").await?;
        url.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", from);
        let mut call = Call::write(Method::POST, url, &self.name);
        call.repeat = Repeat::IfRefused;
        call.scopes = call.scopes.and_repository(from, &["pull"]);
        let mut attempts = Attempts::new(self.client.config());
        match self.client.send(&self.host, &mut call, &mut attempts).await {
            Ok(answer) if answer.status() == StatusCode::CREATED => Ok(Ok(())),
            Ok(answer) if answer.status() == StatusCode::ACCEPTED => Ok(Err(Some(session(&answer)?))),
            // Not being allowed to read from there, or to mount at all, only means that the blob has to be sent.
            Ok(answer) if answer.status().is_client_error() => Ok(Err(None)),
            Ok(answer) => Err(answer.into_error().await),
            Err(Error::Denied { .. }) => Ok(Err(None)),
            Err(error) => Err(error),
        }
    }

    /// Stores a blob from a stream.
    pub(super) async fn put_stream(
        &self,
        descriptor: &Descriptor,
        mut content: BlobStream,
        mut begun: Option<Session>,
    ) -> Result<(), Error> {
        if descriptor.size <= HELD {
            let held = self.collect(descriptor, content).await?;
            return self.put_again(descriptor, &Content::Held(held), begun).await;
        }
        if self.is_chunked(descriptor) {
            let mut source = ChunkSource::Stream(&mut content, BytesMut::new());
            match self.put_chunks(descriptor, &mut source, begun.take()).await? {
                Chunked::Done => return Ok(()),
                Chunked::Unsupported(first) => {
                    let ChunkSource::Stream(_, rest) = source else { return Ok(()) };
                    let read = stream::iter([Ok(first), Ok(rest.freeze())]);
                    content = Box::pin(read.chain(content));
                }
            }
        }
        let mut attempts = Attempts::new(self.client.config());
        match self.put_at_once(descriptor, Source::Once(content), begun, &mut attempts).await {
            Err(error) if error.is_transient() && self.has_blob(descriptor).await.unwrap_or(false) => Ok(()),
            outcome => outcome,
        }
    }

    /// Stores a blob that is in a file.
    pub(super) async fn put_file(
        &self,
        descriptor: &Descriptor,
        file: &Path,
        mut begun: Option<Session>,
    ) -> Result<(), Error> {
        let metadata = tokio::fs::metadata(file).await.map_err(|source| file_error(file, source))?;
        if metadata.len() != descriptor.size {
            let detail = format!("expected {} bytes, found {}", descriptor.size, metadata.len());
            let place = file.display().to_string();
            return Err(Error::Corrupt { what: descriptor.digest.to_string(), place, detail });
        }
        if self.is_chunked(descriptor) {
            let mut attempts = Attempts::new(self.client.config());
            loop {
                let open = tokio::fs::File::open(file).await.map_err(|source| file_error(file, source))?;
                let outcome = self.put_chunks(descriptor, &mut ChunkSource::File(open, file), begun.take()).await;
                match outcome {
                    Ok(Chunked::Done) => return Ok(()),
                    Ok(Chunked::Unsupported(_)) => break,
                    // The registry has lost the upload: from the beginning.
                    Err(error) if error.is_transient() && attempts.pause(None).await => self.client.count_retry(),
                    Err(error) => return Err(error),
                }
            }
        }
        self.put_again(descriptor, &Content::File(file), begun).await
    }

    fn is_chunked(&self, descriptor: &Descriptor) -> bool {
        let config = self.client.config();
        descriptor.size >= config.chunked_from_bytes && descriptor.size > config.chunk_bytes
    }

    /// Sends a blob at once, from the beginning again where that fails.
    async fn put_again(
        &self,
        descriptor: &Descriptor,
        content: &Content<'_>,
        mut begun: Option<Session>,
    ) -> Result<(), Error> {
        let mut attempts = Attempts::new(self.client.config());
        let mut denied = false;
        loop {
            let source = match content {
                Content::Held(bytes) => Source::Held(bytes.clone()),
                Content::File(file) => Source::Once(read_file(file).await?),
            };
            let outcome = self.put_at_once(descriptor, source, begun.take(), &mut attempts).await;
            let Err(error) = outcome else { return Ok(()) };
            // A token may have expired just when the content was sent; there is a new one by now.
            let first_denial = matches!(error, Error::Denied { .. }) && !std::mem::replace(&mut denied, true);
            if !first_denial {
                if !error.is_transient() {
                    return Err(error);
                }
                // The answer may be all that was lost.
                if self.has_blob(descriptor).await.unwrap_or(false) {
                    return Ok(());
                }
                if !attempts.pause(None).await {
                    return Err(error);
                }
            }
            self.client.count_retry();
        }
    }

    async fn put_at_once(
        &self,
        descriptor: &Descriptor,
        source: Source,
        begun: Option<Session>,
        attempts: &mut Attempts,
    ) -> Result<(), Error> {
        let session = match begun {
            Some(session) => session,
            None => self.begin(attempts).await?,
        };
        let problem = Problem::default();
        let payload = match source {
            Source::Held(bytes) => Payload::Bytes(bytes),
            Source::Once(content) => {
                let checked = self.checked(descriptor.clone(), content, problem.clone());
                Payload::Once(Some(checked), descriptor.size)
            }
        };
        let outcome = self.commit(descriptor, &session, payload, Repeat::Never, attempts).await;
        // What stopped the content explains more than the connection that was cut for it.
        let Some(problem) = problem.take() else { return outcome };
        self.cancel(&session).await;
        Err(problem)
    }

    /// Begins an upload.
    async fn begin(&self, attempts: &mut Attempts) -> Result<Session, Error> {
        let mut call = Call::write(Method::POST, self.url("blobs/uploads/").await?, &self.name);
        call.repeat = Repeat::IfRefused;
        let answer = self.client.send(&self.host, &mut call, attempts).await?;
        if answer.status() != StatusCode::ACCEPTED {
            return Err(answer.into_error().await);
        }
        session(&answer)
    }

    /// Ends an upload: what it has, and `payload`, is the blob.
    async fn commit(
        &self,
        descriptor: &Descriptor,
        session: &Session,
        payload: Payload,
        repeat: Repeat,
        attempts: &mut Attempts,
    ) -> Result<(), Error> {
        let mut url = session.location.clone();
        url.query_pairs_mut().append_pair("digest", &descriptor.digest.to_string());
        let mut call = Call::write(Method::PUT, url, &self.name);
        call = call.header(header::CONTENT_TYPE, "application/octet-stream");
        call.lane = Lane::Upload;
        call.patience = Patience::Commit;
        call.repeat = repeat;
        call.payload = payload;
        let mut answer = self.client.send(&self.host, &mut call, attempts).await?;
        match answer.status() {
            status if status.is_success() => {}
            // The session is gone, or another process has ended it.
            StatusCode::NOT_FOUND => {
                let detail = answer.words().await;
                return Err(super::error::broken(&answer.method, &answer.url, detail));
            }
            _ => return Err(answer.into_error().await),
        }
        let stored = answer.header("docker-content-digest").and_then(|text| text.parse::<Digest>().ok());
        match stored {
            Some(stored) if stored.algorithm() == descriptor.digest.algorithm() && stored != descriptor.digest => {
                Err(self.corrupt(descriptor, format!("it was stored as {stored}")))
            }
            _ => Ok(()),
        }
    }

    /// Tells the registry to forget an upload. It would do so by itself, some day.
    async fn cancel(&self, session: &Session) {
        let mut call = Call::write(Method::DELETE, session.location.clone(), &self.name);
        call.repeat = Repeat::Never;
        let mut attempts = Attempts::new(self.client.config());
        if let Err(error) = self.client.send(&self.host, &mut call, &mut attempts).await {
            tracing::debug!(%error, "an upload was not cancelled");
        }
    }

    /// Sends a blob in chunks.
    async fn put_chunks(
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
                return Err(super::error::wrong(&Method::PATCH, &session.location, detail));
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
            let failure = match self.client.send(&self.host, &mut call, attempts).await {
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
                return Err(super::error::broken(&Method::PATCH, &session.location, detail));
            }
            tracing::debug!(taken, "an upload is resumed");
            at = taken;
        }
        Ok(true)
    }

    /// Asks how much of an upload has been taken, in bytes.
    async fn received(&self, session: &mut Session, attempts: &mut Attempts) -> Result<u64, Error> {
        let mut call = Call::write(Method::GET, session.location.clone(), &self.name);
        let mut answer = self.client.send(&self.host, &mut call, attempts).await?;
        match answer.status() {
            status if status.is_success() => {
                session.moved(&answer)?;
                Ok(received(&answer).unwrap_or(0))
            }
            StatusCode::NOT_FOUND => {
                let detail = format!("the registry has lost the upload ({})", answer.words().await);
                Err(super::error::broken(&answer.method, &answer.url, detail))
            }
            _ => Err(answer.into_error().await),
        }
    }

    /// Reads a small blob, and checks it.
    async fn collect(&self, descriptor: &Descriptor, mut content: BlobStream) -> Result<Bytes, Error> {
        let mut held = BytesMut::new();
        while let Some(chunk) = content.try_next().await? {
            if (held.len() + chunk.len()) as u64 > descriptor.size {
                return Err(self.content_differs(descriptor, format!("it has more than {} bytes", descriptor.size)));
            }
            held.extend_from_slice(&chunk);
        }
        let held = held.freeze();
        if held.len() as u64 != descriptor.size {
            return Err(self.content_differs(descriptor, format!("it ends after {} bytes", held.len())));
        }
        if !descriptor.digest.matches(&held) {
            return Err(self.content_differs(descriptor, "its bytes have another digest".to_owned()));
        }
        Ok(held)
    }

    /// Checks a stream while it is sent. The last bytes are let through only when all are known to be right, so that a
    /// registry never gets to see a whole blob that is wrong.
    fn checked(&self, descriptor: Descriptor, content: BlobStream, problem: Problem) -> BlobStream {
        let state = Checking {
            repository: self.clone(),
            hasher: Some(descriptor.digest.hasher()),
            descriptor,
            content,
            seen: 0,
            held: None,
            problem,
        };
        Box::pin(stream::unfold(state, |mut state| async move {
            let item = state.next().await?;
            Some((item, state))
        }))
    }

    fn content_differs(&self, descriptor: &Descriptor, detail: String) -> Error {
        let place = format!("what is to be stored in {}", self.place());
        Error::Corrupt { what: descriptor.digest.to_string(), place, detail }
    }
}

impl Session {
    /// Takes the newest location from an answer.
    fn moved(&mut self, answer: &Answer) -> Result<(), Error> {
        if answer.headers().contains_key(header::LOCATION) {
            self.location = session(answer)?.location;
        }
        Ok(())
    }
}

fn session(answer: &Answer) -> Result<Session, Error> {
    let location = location(answer.headers(), &answer.url)
        .map_err(|refused| answer.wrong(format!("the upload can't go on: {refused}")))?;
    let chunk_min = answer.header("oci-chunk-min-length").and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    Ok(Session { location, chunk_min })
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

async fn read_file(file: &Path) -> Result<BlobStream, Error> {
    let open = tokio::fs::File::open(file).await.map_err(|source| file_error(file, source))?;
    let path = file.to_owned();
    Ok(Box::pin(ReaderStream::with_capacity(open, READ).map_err(move |source| file_error(&path, source))))
}

fn file_error(file: &Path, source: std::io::Error) -> Error {
    Error::File { path: file.display().to_string(), source }
}

/// What a blob is sent from.
enum Source {
    Held(Bytes),
    Once(BlobStream),
}

/// What chunks are taken from.
enum ChunkSource<'a> {
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

/// Why a stream was cut, on its way around the HTTP library.
#[derive(Clone, Default)]
struct Problem(Arc<Mutex<Option<Error>>>);

impl Problem {
    fn set(&self, error: Error) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    fn take(&self) -> Option<Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A stream that is checked.
struct Checking {
    repository: Repository,
    descriptor: Descriptor,
    content: BlobStream,
    hasher: Option<Hasher>,
    seen: u64,
    held: Option<Bytes>,
    problem: Problem,
}

impl Checking {
    async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        loop {
            let outcome = match self.content.next().await {
                Some(Ok(chunk)) => self.take(chunk),
                Some(Err(error)) => Err(error),
                None => return self.end(),
            };
            match outcome {
                Ok(None) => {}
                Ok(Some(chunk)) => return Some(Ok(chunk)),
                Err(error) => return Some(Err(self.fail(error))),
            }
        }
    }

    /// Takes a chunk and returns the one before.
    fn take(&mut self, chunk: Bytes) -> Result<Option<Bytes>, Error> {
        if chunk.is_empty() {
            return Ok(None);
        }
        self.seen += chunk.len() as u64;
        if self.seen > self.descriptor.size {
            return Err(self.differs(format!("it has more than {} bytes", self.descriptor.size)));
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&chunk);
        }
        Ok(self.held.replace(chunk))
    }

    fn end(&mut self) -> Option<Result<Bytes, Error>> {
        let found = self.hasher.take()?.finish();
        if self.seen != self.descriptor.size {
            let error = self.differs(format!("it ends after {} bytes", self.seen));
            return Some(Err(self.fail(error)));
        }
        if found != self.descriptor.digest {
            let error = self.differs(format!("its bytes have the digest {found}"));
            return Some(Err(self.fail(error)));
        }
        self.held.take().map(Ok)
    }

    fn differs(&self, detail: String) -> Error {
        self.repository.content_differs(&self.descriptor, detail)
    }

    /// Keeps the error for the caller; the HTTP library gets one that says only that the stream is cut.
    fn fail(&mut self, error: Error) -> Error {
        self.hasher = None;
        self.problem.set(error);
        Error::Invalid { what: "the content".to_owned(), detail: "it was cut".to_owned() }
    }
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
