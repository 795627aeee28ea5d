//! Connections to hosts: one HTTP client for each kind of trust, and a bound on what is asked of one host at once.
//!
//! Short requests (documents, ranges, steps of an upload), whole blobs that come and blobs that go have a bound each: a
//! read on demand does not wait behind downloads, and a copy within a registry not for itself. A whole blob's place is
//! taken until its stream ends, at the pace of who reads it; if all places are taken by streams that nobody reads on (a
//! merge of many layers in lock step), one more is let through rather than waiting for ever.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    Config,
    hosts::ConnectionSettings,
    location::{Origin, is_loopback, split_port},
    meter::Meter,
    tls::{self, Trust},
};
use crate::place::Error;

/// Most hosts whose connections are kept; redirects to more of them make older ones be forgotten.
const MAX_HOSTS: usize = 256;
/// How long a whole blob waits while no other stream of the host moves.
const NOBODY_MOVES: Duration = Duration::from_secs(5);

/// Which bound a request falls under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// Ends by itself, soon.
    Short,
    /// A whole blob that is read.
    Download,
    /// A blob, or a chunk of one, that is written.
    Upload,
}

/// All hosts.
#[derive(Default)]
pub(super) struct Connections {
    clients: Mutex<HashMap<Trust, reqwest::Client>>,
    hosts: Mutex<HashMap<Key, Arc<Connection>>>,
}

/// A host, and what the administrator has said of those who speak to it.
type Key = (Origin, Option<Arc<ConnectionSettings>>);

/// One host.
pub(super) struct Connection {
    pub(super) http: reqwest::Client,
    pub(super) meter: Arc<Meter>,
    short: Arc<Gate>,
    downloads: Arc<Gate>,
    uploads: Arc<Gate>,
}

/// A bound, and a sign of life of those within it.
pub(super) struct Gate {
    places: Arc<Semaphore>,
    moved: AtomicU64,
}

/// A request's place among those of its host, free again when dropped.
pub(super) struct Place {
    gate: Arc<Gate>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Connections {
    /// Returns the connection to a host. Reads certificates from files the first time.
    pub(super) fn to(
        &self,
        origin: &Origin,
        settings: Option<&Arc<ConnectionSettings>>,
        config: &Config,
    ) -> Result<Arc<Connection>, Error> {
        let key = (origin.clone(), settings.cloned());
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = hosts.get(&key) {
            return Ok(connection.clone());
        }
        let gate = || Arc::new(Gate::new(config.connections_per_host.max(1)));
        let http = self.client(origin, settings, config)?;
        let meter = Arc::default();
        let connection = Arc::new(Connection { http, meter, short: gate(), downloads: gate(), uploads: gate() });
        if hosts.len() >= MAX_HOSTS {
            hosts.clear();
        }
        hosts.insert(key, connection.clone());
        Ok(connection)
    }

    fn client(
        &self,
        origin: &Origin,
        settings: Option<&Arc<ConnectionSettings>>,
        config: &Config,
    ) -> Result<reqwest::Client, Error> {
        let plain = origin.is_plain();
        let authority = origin.authority();
        let skip =
            settings.and_then(|settings| settings.skip_verify).unwrap_or_else(|| is_insecure(config, &authority));
        let own = settings.and_then(|settings| settings.directory.clone());
        let trust = Trust {
            verify: config.tls_verify && !skip,
            plain,
            loopback: origin.is_loopback(),
            directory: if plain { None } else { own.or_else(|| tls::certificates_of(config, &authority)) },
            settings: settings.cloned(),
        };
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&trust) {
            return Ok(client.clone());
        }
        let client = tls::build_client(config, &trust)?;
        clients.insert(trust, client.clone());
        Ok(client)
    }
}

/// Says whether a registry is listed as insecure, by `HOST` for all its ports or by `HOST:PORT`.
pub(super) fn is_insecure(config: &Config, authority: &str) -> bool {
    let host = split_port(authority).0;
    config.insecure.iter().any(|listed| listed.eq_ignore_ascii_case(authority) || listed.eq_ignore_ascii_case(host))
}

/// Says whether a registry may be spoken to in plain HTTP where it does not speak TLS.
pub(super) fn may_be_plain(config: &Config, authority: &str) -> bool {
    is_loopback(split_port(authority).0) || is_insecure(config, authority)
}

impl Connection {
    /// Waits for a place.
    pub(super) async fn place(&self, lane: Lane) -> Place {
        let (gate, patience) = match lane {
            // Ends by itself, so that waiting does too.
            Lane::Short => (&self.short, None),
            Lane::Download => (&self.downloads, Some(NOBODY_MOVES)),
            Lane::Upload => (&self.uploads, Some(NOBODY_MOVES)),
        };
        Place { gate: gate.clone(), _permit: gate.permit(patience).await }
    }
}

impl Gate {
    fn new(places: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(places)), moved: AtomicU64::new(0) }
    }

    /// Waits for a permit; `None` where none of those who have one has moved for as long as `patience`.
    async fn permit(&self, patience: Option<Duration>) -> Option<OwnedSemaphorePermit> {
        let acquire = || self.places.clone().acquire_owned();
        // The semaphore is never closed, so an error can't be; without a permit the bound would merely be looser.
        let Some(patience) = patience else { return acquire().await.ok() };
        let mut before = self.moved.load(Ordering::Relaxed);
        loop {
            if let Ok(permit) = tokio::time::timeout(patience, acquire()).await {
                return permit.ok();
            }
            let now = self.moved.load(Ordering::Relaxed);
            if now == before {
                tracing::debug!("more blobs are open than connections are allowed, and none moves");
                return None;
            }
            before = now;
        }
    }

    /// Takes note that somebody within the bound goes on.
    pub(super) fn moved(&self) {
        self.moved.fetch_add(1, Ordering::Relaxed);
    }
}

impl Place {
    /// Returns the bound that the place is within.
    pub(super) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(places: usize) -> Arc<Connection> {
        let config = Config { connections_per_host: places, ..Config::default() };
        let origin = Origin::of(&"http://127.0.0.1:1/".parse().unwrap());
        Connections::default().to(&origin, None, &config).unwrap()
    }

    #[tokio::test]
    async fn the_lanes_do_not_block_each_other() {
        let connection = connection(1);
        let _places = [
            connection.place(Lane::Upload).await,
            connection.place(Lane::Download).await,
            connection.place(Lane::Short).await,
        ];
        for gate in [&connection.short, &connection.downloads, &connection.uploads] {
            assert_eq!(gate.places.available_permits(), 0);
        }
    }

    #[tokio::test]
    async fn a_place_is_free_again_when_dropped() {
        let connection = connection(1);
        drop(connection.place(Lane::Download).await);
        assert!(connection.downloads.permit(Some(Duration::from_secs(600))).await.is_some());
    }

    #[tokio::test]
    async fn streams_that_nobody_reads_do_not_block_for_ever() {
        let gate = Arc::new(Gate::new(1));
        let held = gate.permit(None).await;
        assert!(gate.permit(Some(Duration::from_millis(1))).await.is_none());
        // While the holder moves, the wait goes on until the place is free.
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move { gate.permit(Some(Duration::from_millis(500))).await.is_some() }
        });
        for _ in 0..30 {
            gate.moved();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(held);
        assert!(waiting.await.unwrap());
    }

    #[test]
    fn insecure_registries_are_listed_by_host_or_port() {
        let config = Config { insecure: vec!["a.example".into(), "b.example:5000".into()], ..Config::default() };
        for (authority, expected) in [
            ("a.example", true),
            ("A.example:5000", true),
            ("b.example:5000", true),
            ("b.example", false),
            ("c.example", false),
        ] {
            assert_eq!(is_insecure(&config, authority), expected, "{authority}");
        }
        assert!(may_be_plain(&config, "localhost:5000") && may_be_plain(&config, "a.example"));
        assert!(!may_be_plain(&config, "c.example"));
    }
}
