//! A registry for tests: the distribution specification 1.1 from memory, with programmable faults.
//!
//! ```
//! # use loris_testkit::registry::{Effect, Fault, FaultRegistry};
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let registry = FaultRegistry::start().await;
//! let digest = registry.add_blob(vec![7; 1000]);
//! registry.fault(Fault::new(Effect::Truncate(500)).path("/blobs/").times(2));
//! let name = format!("{}/{}:latest", registry.address(), FaultRegistry::REPOSITORY);
//! # assert!(name.starts_with("127.0.0.1:") && digest.starts_with("sha256:"));
//! // ... read from `name` with the client under test, then:
//! assert_eq!(registry.requests().len(), 0);
//! # });
//! ```
//!
//! It listens at two loopback addresses: the registry's, and one that stands for another host (a CDN or a token server)
//! and so must never see the registry's credentials. It runs on a thread of its own and ends with the value.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use tokio::{net::TcpListener, sync::oneshot};

mod access;
mod body;
mod content;
mod fault;
mod program;
mod server;

use self::{
    access::Guard,
    content::{Answer, Asked, Content},
};
pub use self::{
    access::{Access, Tokens},
    fault::{Effect, Fault},
    program::{DockerRegistry, DockerRegistryOptions, make_certificates},
};

/// A running registry.
pub struct FaultRegistry {
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// A request as it came in.
#[derive(Clone, Debug)]
pub struct LoggedRequest {
    /// Counts from 0, over both addresses.
    pub number: usize,
    /// Which address it came to.
    pub site: Site,
    /// Its method.
    pub method: Method,
    /// Its path, without the query.
    pub path: String,
    /// Its query, as it came.
    pub query: Option<String>,
    /// Its headers.
    pub headers: HeaderMap,
    /// Bytes of its body that were read.
    pub body_bytes: usize,
    /// The status that was answered; `None` where the connection was cut instead, or the answer is not out yet.
    pub status: Option<StatusCode>,
}

/// One of the two addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// The registry.
    Registry,
    /// What stands for another host.
    Elsewhere,
}

/// Where blobs are redirected to.
#[derive(Clone, Debug)]
pub struct Redirection {
    /// How many requests a redirect's address is good for; then it answers 403.
    pub uses: usize,
    /// The answer of an address that is used up.
    pub expired: StatusCode,
}

impl Default for Redirection {
    fn default() -> Self {
        Self { uses: usize::MAX, expired: StatusCode::FORBIDDEN }
    }
}

impl LoggedRequest {
    /// Returns a header's text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

impl FaultRegistry {
    /// A repository to use where the name does not matter. What is added by hand is in every repository.
    pub const REPOSITORY: &str = "test/image";

    /// Starts a registry on two free ports of 127.0.0.1.
    ///
    /// # Panics
    ///
    /// When the machine has no port or thread left.
    pub async fn start() -> Self {
        let (sender, receiver) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("fault-registry".to_owned())
            .spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let runtime = runtime.expect("a runtime needs only descriptors");
                runtime.block_on(async move {
                    let registry = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
                    let elsewhere = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
                    let address =
                        |listener: &TcpListener| listener.local_addr().expect("a bound socket has an address");
                    let shared = Arc::new(Shared::new(address(&registry), address(&elsewhere)));
                    let _ = sender.send(shared.clone());
                    tokio::select! {
                        () = server::serve(registry, Site::Registry, shared.clone()) => {}
                        () = server::serve(elsewhere, Site::Elsewhere, shared) => {}
                        _ = stopped => {}
                    }
                });
            })
            .expect("a thread");
        let shared = receiver.await.expect("the server's thread has bound its ports");
        Self { shared, stop: Some(stop), thread: Some(thread) }
    }

    /// Returns the registry's `HOST:PORT`.
    #[must_use]
    pub fn address(&self) -> String {
        self.shared.registry.to_string()
    }

    /// Returns the `HOST:PORT` that stands for another host.
    #[must_use]
    pub fn elsewhere(&self) -> String {
        self.shared.elsewhere.to_string()
    }

    /// Returns `HOST:PORT/REPOSITORY:TAG`.
    #[must_use]
    pub fn reference(&self, tag: &str) -> String {
        format!("{}/{}:{tag}", self.address(), Self::REPOSITORY)
    }

    /// Adds a blob, visible in every repository, and returns its digest.
    pub fn add_blob(&self, bytes: impl Into<Bytes>) -> String {
        self.shared.content().add_blob(bytes.into())
    }

    /// Adds a manifest, visible in every repository under its tag and its digest, and returns the digest.
    pub fn add_manifest(&self, tag: &str, media_type: &str, bytes: impl Into<Bytes>) -> String {
        self.shared.content().add_manifest(tag, media_type, bytes.into())
    }

    /// Returns a blob of a repository.
    #[must_use]
    pub fn blob(&self, repository: &str, digest: &str) -> Option<Bytes> {
        self.shared.content().blob(repository, digest).cloned()
    }

    /// Returns digest, media type and bytes of a manifest, by tag or digest.
    #[must_use]
    pub fn manifest(&self, repository: &str, reference: &str) -> Option<(String, String, Bytes)> {
        let content = self.shared.content();
        content
            .manifest(repository, reference)
            .map(|(digest, media_type, bytes)| (digest.to_owned(), media_type.to_owned(), bytes.clone()))
    }

    /// Returns how many uploads are neither ended nor cancelled.
    #[must_use]
    pub fn open_uploads(&self) -> usize {
        self.shared.content().open_uploads()
    }

    /// Adds a fault. Where several could happen to a request, the one that was added first does.
    pub fn fault(&self, fault: Fault) {
        self.shared.state().faults.push(fault);
    }

    /// Returns the faults that have not happened as often as they should.
    #[must_use]
    pub fn faults_left(&self) -> Vec<String> {
        self.shared.state().faults.iter().filter(|fault| !fault.is_over()).map(ToString::to_string).collect()
    }

    /// Ends all faults. What has begun, such as a stall, goes on.
    pub fn end_faults(&self) {
        self.shared.state().faults.clear();
    }

    /// Redirects requests for blobs to the other address, or stops doing so.
    pub fn redirect_blobs(&self, redirection: impl Into<Option<Redirection>>) {
        self.shared.state().redirection = redirection.into();
    }

    /// Says how clients must show who they are.
    pub fn access(&self, access: Access) {
        self.shared.guard().access = access;
    }

    /// Makes all tokens that are out invalid.
    pub fn expire_tokens(&self) {
        self.shared.guard().expire_all();
    }

    /// Returns how many tokens were handed out.
    #[must_use]
    pub fn tokens_issued(&self) -> usize {
        self.shared.guard().issued()
    }

    /// Turns the referrers API on or off; it is on at first.
    pub fn referrers_api(&self, on: bool) {
        self.shared.content().abilities.referrers = on;
    }

    /// Turns filtering of referrers on or off; it is on at first.
    pub fn referrers_filter(&self, on: bool) {
        self.shared.content().abilities.filters = on;
    }

    /// Turns mounting of blobs from other repositories on or off; it is on at first.
    pub fn mounting(&self, on: bool) {
        self.shared.content().abilities.mount = on;
    }

    /// Turns chunked uploads on or off; they are on at first.
    pub fn chunked_uploads(&self, on: bool) {
        self.shared.content().abilities.patch = on;
    }

    /// Sets `OCI-Chunk-Min-Length`.
    pub fn chunk_minimum(&self, bytes: Option<u64>) {
        self.shared.content().abilities.chunk_min = bytes;
    }

    /// Answers uploads with relative locations.
    pub fn relative_locations(&self, on: bool) {
        self.shared.content().abilities.relative_locations = on;
    }

    /// Sets the largest number of tags in one answer; 1000 at first.
    pub fn page_size(&self, items: usize) {
        self.shared.content().abilities.page = items;
    }

    /// Returns the requests so far, in the order in which they came.
    #[must_use]
    pub fn requests(&self) -> Vec<LoggedRequest> {
        self.shared.state().log.clone()
    }

    /// Forgets the requests so far.
    pub fn forget_requests(&self) {
        let mut state = self.shared.state();
        state.forgotten += state.log.len();
        state.log.clear();
    }

    /// Returns how many requests were in work at once, at most.
    #[must_use]
    pub fn peak_concurrency(&self) -> usize {
        self.shared.peak.load(Ordering::Relaxed)
    }
}

impl Drop for FaultRegistry {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the server's tasks share with the handle.
struct Shared {
    registry: SocketAddr,
    elsewhere: SocketAddr,
    registry_text: String,
    elsewhere_text: String,
    content: Mutex<Content>,
    guard: Mutex<Guard>,
    state: Mutex<State>,
    running: AtomicUsize,
    peak: AtomicUsize,
}

#[derive(Default)]
struct State {
    faults: Vec<Fault>,
    log: Vec<LoggedRequest>,
    forgotten: usize,
    redirection: Option<Redirection>,
    /// Signature of a redirect's address to the number of uses that are left.
    signatures: HashMap<String, usize>,
}

/// Counts a request as running until dropped.
struct Running<'a>(&'a Shared);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    fn new(registry: SocketAddr, elsewhere: SocketAddr) -> Self {
        let content = Content::at(registry.to_string());
        Self {
            registry,
            elsewhere,
            registry_text: registry.to_string(),
            elsewhere_text: elsewhere.to_string(),
            content: Mutex::new(content),
            guard: Mutex::default(),
            state: Mutex::default(),
            running: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
        }
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn guard(&self) -> MutexGuard<'_, Guard> {
        self.guard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn addresses(&self) -> (&str, &str) {
        (&self.registry_text, &self.elsewhere_text)
    }

    fn running(&self) -> Running<'_> {
        let now = self.running.fetch_add(1, Ordering::Relaxed) + 1;
        self.peak.fetch_max(now, Ordering::Relaxed);
        Running(self)
    }

    fn log(&self, site: Site, head: &http::request::Parts) -> usize {
        let mut state = self.state();
        let number = state.forgotten + state.log.len();
        state.log.push(LoggedRequest {
            number,
            site,
            method: head.method.clone(),
            path: head.uri.path().to_owned(),
            query: head.uri.query().map(str::to_owned),
            headers: head.headers.clone(),
            body_bytes: 0,
            status: None,
        });
        number
    }

    fn logged(&self, number: usize, change: impl FnOnce(&mut LoggedRequest)) {
        if let Some(request) = self.state().log.iter_mut().rev().find(|request| request.number == number) {
            change(request);
        }
    }

    fn received(&self, number: usize, bytes: usize) {
        self.logged(number, |request| request.body_bytes = bytes);
    }

    fn answered(&self, number: usize, status: StatusCode) {
        self.logged(number, |request| request.status = Some(status));
    }

    fn meet(&self, method: &str, path: &str, is_range: bool) -> Option<Effect> {
        self.state().faults.iter_mut().find_map(|fault| fault.meet(method, path, is_range))
    }

    /// Returns where a request for a blob that is there is sent to.
    fn redirection(&self, asked: &Asked<'_>) -> Option<String> {
        let mut state = self.state();
        let uses = state.redirection.as_ref()?.uses;
        let (repository, digest) = asked.path.strip_prefix("/v2/")?.split_once("/blobs/")?;
        let reading = matches!(asked.method.as_str(), "GET" | "HEAD");
        if !reading || digest.starts_with("uploads/") || self.content().blob(repository, digest).is_none() {
            return None;
        }
        let signature = format!("s{}", state.signatures.len());
        state.signatures.insert(signature.clone(), uses);
        Some(format!("http://{}/cdn/{digest}?signature={signature}", self.elsewhere))
    }

    /// Answers at the other address: a blob, for as long as the signature is good.
    fn signed_blob(&self, asked: &Asked<'_>) -> Answer {
        let mut state = self.state();
        let expired = state.redirection.clone().unwrap_or_default().expired;
        let signature = asked.query.iter().find(|(key, _)| key == "signature").map(|(_, value)| value.as_str());
        match signature.and_then(|signature| state.signatures.get_mut(signature)) {
            Some(uses) if *uses > 0 => *uses -= usize::from(*uses != usize::MAX),
            _ => return Answer::error(expired, "EXPIRED", "the signature has expired"),
        }
        let content = self.content();
        match asked.path.strip_prefix("/cdn/").and_then(|digest| content.any_blob(digest)) {
            Some(blob) => Answer::blob(blob, asked.headers),
            None => Answer::error(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", "no such blob"),
        }
    }
}
