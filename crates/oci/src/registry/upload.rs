//! Writing blobs: at once, or in chunks that can be resumed; or not at all, where the registry can take them from another
//! repository.
//!
//! Source: distribution specification 1.1, section "Pushing blobs". A blob is sent at once (POST, PUT) unless it is large
//! ([`super::Config::chunked_from_bytes`]). A step whose outcome is unknown is not repeated blindly: the registry is asked
//! whether it has the blob, or how much of the chunk it has taken.

use std::path::Path;

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use http::{Method, StatusCode, header};
use loris_format::digest::Digest;
use reqwest::Url;
use tokio_util::io::ReaderStream;

use self::{
    checked::Problem,
    chunks::{ChunkSource, Chunked},
};
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

mod checked;
mod chunks;

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

impl Repository {
    /// Says whether the repository has a blob.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] where it has one of another size under this digest.
    pub async fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, Error> {
        let url = self.url(self.target()?, &format!("blobs/{}", descriptor.digest)).await?;
        let mut call = Call::read(Method::HEAD, url, &self.name);
        let mut attempts = Attempts::new(self.client.config());
        match self.client.send(self.target()?, &mut call, &mut attempts).await {
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
        let mut url = self.url(self.target()?, "blobs/uploads/").await?;
        url.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", from);
        let mut call = Call::write(Method::POST, url, &self.name);
        call.repeat = Repeat::IfRefused;
        call.scopes = call.scopes.and_repository(from, &["pull"]);
        let mut attempts = Attempts::new(self.client.config());
        match self.client.send(self.target()?, &mut call, &mut attempts).await {
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
        let mut call = Call::write(Method::POST, self.url(self.target()?, "blobs/uploads/").await?, &self.name);
        call.repeat = Repeat::IfRefused;
        let answer = self.client.send(self.target()?, &mut call, attempts).await?;
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
        let mut answer = self.client.send(self.target()?, &mut call, attempts).await?;
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
        // Its upload has begun there.
        let Ok(target) = self.target() else { return };
        if let Err(error) = self.client.send(target, &mut call, &mut attempts).await {
            tracing::debug!(%error, "an upload was not cancelled");
        }
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
