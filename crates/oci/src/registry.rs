//! A client of registries: the OCI distribution specification 1.1.
//!
//! - [`Client`] is shared by everything that a process reads and writes: it keeps connections, tokens and what it has
//!   learnt of hosts. [`Client::source`] and [`Client::sink`] are one image; [`Repository`] has what goes beyond it: tags,
//!   deletion, referrers, HEAD.
//! - No request is made only to find something out, with one exception: whether a host that may be spoken to in plain
//!   HTTP (the machine itself, or listed as insecure) speaks TLS. It is asked with the first message of a TLS handshake
//!   and not with a request. If it does, its certificate is verified, on loopback as anywhere else.
//! - Everything is verified that has a digest, and bounded in size; waits, redirects, repetitions, pages and memory are
//!   bounded too. Credentials go to the registry's origin and to the token server that it names, nowhere else.
//! - A registry's images may be served by several hosts ([`Config::hosts_dirs`]). Documents and blobs are asked for at one
//!   after the other, and one that fails is put back for a while; see `route`. Tags, referrers and whatever is written are
//!   the registry's own: a mirror has what was asked for, not all there is.
//! - Proxies are those of the environment (`HTTPS_PROXY`, `NO_PROXY`, ...), never for loopback hosts.
//!
//! What is left out: several ranges in one request. Registries and their stores differ too much in it, and a request for
//! each range over a kept connection costs little.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
};

use reqwest::Url;
use tokio::sync::Mutex as AsyncMutex;

use crate::{Reference, document::Descriptor, place::Error};

mod anchors;
mod blob;
mod candidates;
mod challenge;
mod config;
mod connections;
mod error;
mod host;
mod hosts;
mod location;
mod manifest;
mod meter;
mod place;
mod referrers;
mod request;
mod retry;
mod route;
mod scope;
mod tags;
mod tls;
mod token;
mod transport;
mod upload;

pub use self::{
    config::Config,
    manifest::ManifestName,
    place::{RegistrySink, RegistrySource},
};
use self::{
    connections::Connections,
    host::Host,
    hosts::Capabilities,
    request::Targets,
    route::{Content, Route, Trip},
    transport::Counters,
};

/// Most registries that are remembered.
const MAX_ROUTES: usize = 1024;

/// A client of registries. Clones share everything.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    config: Config,
    connections: Connections,
    routes: Mutex<HashMap<String, Arc<Route>>>,
    targets: Targets,
    counters: Arc<Counters>,
    fallback_turn: AsyncMutex<()>,
}

/// What a client has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Requests sent, to registries, token servers and redirects' targets.
    pub requests: u64,
    /// Requests among them that repeated one that had failed.
    pub retries: u64,
    /// Redirects followed.
    pub redirects: u64,
    /// Tokens asked for.
    pub tokens: u64,
    /// Bytes of bodies received.
    pub received_bytes: u64,
    /// Bytes of bodies sent.
    pub sent_bytes: u64,
}

/// A repository of a registry. Cheap to clone.
#[derive(Clone)]
pub struct Repository {
    client: Client,
    route: Arc<Route>,
    name: String,
}

impl Client {
    /// Returns a client. Nothing is asked or read before the first request, but files that `config` names.
    ///
    /// # Errors
    ///
    /// [`Error::File`] or [`Error::Invalid`] where a file with certificates that `config` names can't be used.
    pub fn new(config: Config) -> Result<Self, Error> {
        tls::check(&config)?;
        let inner = Inner {
            config,
            connections: Connections::default(),
            routes: Mutex::default(),
            targets: Targets::default(),
            counters: Arc::default(),
            fallback_turn: AsyncMutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Returns the image that a reference names, to be read.
    #[must_use]
    pub fn source(&self, reference: &Reference) -> RegistrySource {
        RegistrySource::new(self.repository(reference), reference.clone())
    }

    /// Returns the image that a reference names, to be written.
    #[must_use]
    pub fn sink(&self, reference: &Reference) -> RegistrySink {
        RegistrySink::new(self.repository(reference), reference.clone())
    }

    /// Returns the repository that a reference names.
    #[must_use]
    pub fn repository(&self, reference: &Reference) -> Repository {
        let mut routes = self.inner.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if routes.len() >= MAX_ROUTES && !routes.contains_key(reference.registry()) {
            routes.clear();
        }
        if routes.get(reference.registry()).is_some_and(|route| route.is_outdated(&self.inner.config)) {
            routes.remove(reference.registry());
        }
        let route = routes.entry(reference.registry().to_owned()).or_insert_with(|| Arc::new(Route::new(reference)));
        Repository { client: self.clone(), route: route.clone(), name: reference.repository().to_owned() }
    }

    /// Returns what this client and its clones have done so far.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let counters = &self.inner.counters;
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        Statistics {
            requests: count(&counters.requests),
            retries: count(&counters.retries),
            redirects: count(&counters.redirects),
            tokens: count(&counters.tokens),
            received_bytes: count(&counters.received),
            sent_bytes: count(&counters.sent),
        }
    }

    fn config(&self) -> &Config {
        &self.inner.config
    }

    fn connections(&self) -> &Connections {
        &self.inner.connections
    }

    fn counters(&self) -> &Arc<Counters> {
        &self.inner.counters
    }

    fn targets(&self) -> &Targets {
        &self.inner.targets
    }

    fn fallback_turn(&self) -> &AsyncMutex<()> {
        &self.inner.fallback_turn
    }
}

impl Repository {
    /// Returns the registry's name: `docker.io` for Docker Hub.
    #[must_use]
    pub fn registry(&self) -> &str {
        self.route.registry()
    }

    /// Returns the repository's name within the registry.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the client.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    fn place(&self) -> String {
        format!("{}/{}", self.route.registry(), self.name)
    }

    /// Returns the host that is written to.
    fn target(&self) -> Result<&Arc<Host>, Error> {
        self.route.target(self.client.config())
    }

    /// Returns the registry itself, for what a mirror can't be asked: it does not have all there is.
    fn upstream(&self) -> Result<&Arc<Host>, Error> {
        self.route.upstream(self.client.config())
    }

    /// Begins an operation that any host which may can do.
    fn trip(&self, content: Content<'_>) -> Result<Trip, Error> {
        let wanted = if let Content::Tag = content { Capabilities::RESOLVE } else { Capabilities::PULL };
        Trip::new(&self.route, &self.name, content, wanted, self.client.config())
    }

    async fn url(&self, host: &Host, path: &str) -> Result<Url, Error> {
        host.url(&self.client, &format!("{}/{path}", self.name)).await
    }

    fn not_found(&self, what: String) -> Error {
        Error::NotFound { what, place: self.place() }
    }

    fn corrupt(&self, descriptor: &Descriptor, detail: String) -> Error {
        Error::Corrupt { what: descriptor.digest.to_string(), place: self.place(), detail }
    }
}
