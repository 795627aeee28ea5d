//! Content that is compared with its descriptor on the way out.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use loris_format::digest::Hasher;

use crate::{
    document::Descriptor,
    place::{BlobStream, Error},
    registry::Repository,
};

impl Repository {
    /// Reads a small blob, and checks it.
    pub(super) async fn collect(&self, descriptor: &Descriptor, mut content: BlobStream) -> Result<Bytes, Error> {
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
    pub(super) fn checked(&self, descriptor: Descriptor, content: BlobStream, problem: Problem) -> BlobStream {
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

    pub(super) fn content_differs(&self, descriptor: &Descriptor, detail: String) -> Error {
        let place = format!("what is to be stored in {}", self.place());
        Error::Corrupt { what: descriptor.digest.to_string(), place, detail }
    }
}

/// Why a stream was cut, on its way around the HTTP library.
#[derive(Clone, Default)]
pub(super) struct Problem(Arc<Mutex<Option<Error>>>);

impl Problem {
    fn set(&self, error: Error) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    pub(super) fn take(&self) -> Option<Error> {
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
