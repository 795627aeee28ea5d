//! An OCI registry over a directory: the distribution specification 1.1, server side.
//!
//! Everything that the specification's end-1 to end-13 ask for: pull with single ranges, push (monolithic, in one
//! request, in chunks, resumed, cancelled), cross-repository mounts, tags and repositories with pagination, referrers
//! with filter, deletion. No authentication: it is meant for loopback and for networks that can be trusted.
//!
//! [`storage`] knows the directory and no HTTP; [`http`](self) answers requests and knows no path of a file. Blobs are
//! streamed in both directions: memory use is [`STREAM_BYTES`] per request, whatever a blob's size.

use std::{
    io,
    net::TcpListener,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::server::{self, ServerHandle, ServerOptions};

mod blobs;
mod http;
mod listings;
mod manifests;
pub mod name;
mod problem;
pub mod storage;
mod upload;

use self::{
    storage::{Storage, StorageError},
    upload::Uploads,
};

/// How much of a blob is held in memory while it is sent or received, in bytes. Large enough that handing a piece to a
/// thread costs nothing against copying it, small enough that hundreds of requests fit.
pub const STREAM_BYTES: usize = 256 << 10;

/// A registry. Cloning it is cheap, and gives the same one.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    storage: Storage,
    uploads: Uploads,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
}

/// What a registry has done since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Requests, of whatever kind and answer.
    pub requests: u64,
    /// Bytes of answers' bodies handed to the network. Of an answer that the client gave up, up to the size of the
    /// socket's buffers may be counted that never arrived.
    pub bytes_sent: u64,
    /// Bytes of requests' bodies.
    pub bytes_received: u64,
}

impl std::ops::Sub for Statistics {
    type Output = Self;

    /// What has been done since `earlier` was taken.
    fn sub(self, earlier: Self) -> Self {
        Self {
            requests: self.requests.saturating_sub(earlier.requests),
            bytes_sent: self.bytes_sent.saturating_sub(earlier.bytes_sent),
            bytes_received: self.bytes_received.saturating_sub(earlier.bytes_received),
        }
    }
}

impl Registry {
    /// Opens the registry in `directory`, or makes one there. Blocks on the disk.
    ///
    /// # Errors
    /// The directory can't be written, or another registry has it open.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self, StorageError> {
        let storage = Storage::open(directory.as_ref())?;
        let inner = Inner { storage, uploads: Uploads::default(), counters: Counters::default() };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Serves the registry on `listener`, in tasks of the current runtime.
    ///
    /// # Errors
    /// The listener can't be used.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn serve(&self, listener: TcpListener, options: ServerOptions) -> io::Result<ServerHandle> {
        server::serve(listener, self.router(), options)
    }

    /// Returns the registry's answers as a router, to be served beside others. It answers below `/v2/`.
    pub fn router(&self) -> axum::Router {
        http::router(self.clone())
    }

    /// Returns what the registry has done so far.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let counters = &self.inner.counters;
        Statistics {
            requests: counters.requests.load(Ordering::Relaxed),
            bytes_sent: counters.bytes_sent.load(Ordering::Relaxed),
            bytes_received: counters.bytes_received.load(Ordering::Relaxed),
        }
    }

    /// Ends all uploads that have not become blobs, and removes what they have written.
    pub fn end_uploads(&self) {
        self.inner.uploads.end_all();
    }

    fn storage(&self) -> &Storage {
        &self.inner.storage
    }

    fn uploads(&self) -> &Uploads {
        &self.inner.uploads
    }

    /// Runs a piece of work that blocks on the disk, on a thread that may.
    async fn blocking<T, E>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, E> + Send + 'static,
    ) -> Result<T, problem::Problem>
    where
        T: Send + 'static,
        E: Into<problem::Problem> + Send + 'static,
    {
        let registry = self.clone();
        match tokio::task::spawn_blocking(move || work(&registry)).await {
            Ok(result) => result.map_err(Into::into),
            Err(error) => {
                tracing::error!(%error, "a request's work ended badly");
                Err(problem::Problem::internal("the registry failed"))
            }
        }
    }
}
