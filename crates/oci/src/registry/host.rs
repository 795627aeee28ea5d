//! What is known of one registry: its address, what it wants to be shown, the credentials and tokens for it, and what it
//! can't do.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::HeaderValue;
use reqwest::Url;
use tokio::sync::{Mutex as AsyncMutex, OnceCell};

use super::{
    Client,
    candidates::Candidates,
    challenge::Challenge,
    connections::may_be_plain,
    hosts::{self, Endpoint, Settings},
    location::{Origin, is_loopback, split_port},
    retry::Attempts,
    scope::Scopes,
    tls,
    token::Slot,
};
use crate::{auth::Credentials, place::Error};

/// How long it is remembered that ranges are ignored; a proxy on the way may have been at fault.
const RANGES_REMEMBERED: Duration = Duration::from_secs(300);
/// Longest wait for the first byte of a server that may or may not speak TLS.
const TLS_PROBE: Duration = Duration::from_secs(5);
/// Most token slots that are kept, expired ones included.
const MAX_SLOTS: usize = 4096;

/// One host: a registry, or a mirror.
pub(super) struct Host {
    /// The name by which its credentials are kept: `docker.io`.
    pub(super) name: String,
    /// How it is talked to, where it differs from others.
    pub(super) settings: Settings,
    /// Host and port of its API.
    api: String,
    /// What repositories' names are appended to in its addresses: `v2/`.
    prefix: String,
    /// The registry that it is a mirror of.
    mirror_of: Option<String>,
    base: OnceCell<Url>,
    state: Mutex<State>,
    credentials: AsyncMutex<HashMap<String, Candidates>>,
}

#[derive(Default)]
struct State {
    challenge: Option<Challenge>,
    slots: HashMap<Scopes, Arc<AsyncMutex<Slot>>>,
    /// A newer identity token than the one in the files: token servers may replace it with each use.
    identity: Option<String>,
    ranges_ignored: Option<Instant>,
}

impl Host {
    /// Returns a host of the registry `registry`, whose own API is at `api`.
    pub(super) fn new(registry: &str, api: &str, endpoint: &Endpoint) -> Self {
        let mut host = Self {
            name: registry.to_owned(),
            settings: endpoint.settings.clone(),
            api: api.to_owned(),
            prefix: "v2/".to_owned(),
            mirror_of: None,
            base: OnceCell::new(),
            state: Mutex::default(),
            credentials: AsyncMutex::default(),
        };
        if let Some(url) = &endpoint.url {
            let authority = Origin::of(url).authority();
            if authority != api {
                host.name = hosts::name_of(&authority).to_owned();
                host.mirror_of = Some(registry.to_owned()).filter(|registry| *registry != host.name);
            }
            host.api = authority;
            host.prefix = url.path().trim_start_matches('/').to_owned();
            let mut base = url.clone();
            base.set_path("/");
            host.base = OnceCell::new_with(Some(base));
        }
        host
    }

    /// Returns an address of the API. `path` is behind `/v2/`. As containerd does it, a mirror is told whose it is.
    pub(super) async fn url(&self, client: &Client, path: &str) -> Result<Url, Error> {
        let base = self.base(client).await?;
        let joined = base.join(&format!("{}{path}", self.prefix));
        let mut url = joined.map_err(|_| Error::Invalid {
            what: format!("{}/{path}", self.name),
            detail: "no address can be made of it".to_owned(),
        })?;
        if let Some(registry) = &self.mirror_of {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        Ok(url)
    }

    /// Returns what tells this host's content from that of others that serve the same registry.
    pub(super) fn key(&self) -> String {
        format!("{} {}", self.api, self.prefix)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the address that paths are under: scheme, host and port. The first call may have to find out the scheme.
    pub(super) async fn base(&self, client: &Client) -> Result<&Url, Error> {
        self.base.get_or_try_init(|| self.find_base(client)).await
    }

    async fn find_base(&self, client: &Client) -> Result<Url, Error> {
        let config = client.config();
        let plain = config.plain_http || (may_be_plain(config, &self.api) && !self.speaks_tls(client).await?);
        let scheme = if plain { "http" } else { "https" };
        format!("{scheme}://{}/", self.api).parse().map_err(|_| Error::Invalid {
            what: format!("registry {:?}", self.name),
            detail: "it is not a host that an address can be made of".to_owned(),
        })
    }

    /// Finds out whether a host that may be spoken to in plain HTTP speaks TLS.
    async fn speaks_tls(&self, client: &Client) -> Result<bool, Error> {
        let config = client.config();
        let (host, port) = split_port(&self.api);
        let patience = TLS_PROBE.min(config.connect_timeout);
        let mut attempts = Attempts::new(config);
        loop {
            let error = match tls::speaks_tls(host, port.unwrap_or(443), patience).await {
                Ok(tls) => return Ok(tls),
                Err(error) => error,
            };
            // Without a port it may be at either.
            if port.is_none() && tls::speaks_tls(host, 80, patience).await.is_ok() {
                return Ok(false);
            }
            if !is_loopback(host) {
                // It may be there for a proxy only: a request will show.
                return Ok(true);
            }
            if !attempts.pause(None).await {
                return Err(Error::Registry {
                    method: "CONNECT".to_owned(),
                    url: self.api.clone(),
                    status: None,
                    detail: error.to_string(),
                    transient: true,
                });
            }
            client.count_retry();
        }
    }

    /// Returns what the registry wants to be shown, where it has said so.
    pub(super) fn challenge(&self) -> Option<Challenge> {
        self.state().challenge.clone()
    }

    /// Returns the `Authorization` for a request; `None` where nothing is known to be wanted, or nothing is there to show.
    /// `used` becomes the credentials that it is, or was asked for with.
    pub(super) async fn authorization(
        &self,
        client: &Client,
        repository: &str,
        scopes: &Scopes,
        used: &mut Option<Credentials>,
    ) -> Result<Option<HeaderValue>, Error> {
        let Some(challenge) = self.challenge() else { return Ok(None) };
        let credentials = self.credentials(client, repository).await?;
        used.clone_from(&credentials);
        match (challenge, credentials) {
            (_, Some(Credentials::Bearer(token))) => bearer(&token).map(Some).ok_or_else(|| self.odd_secret()),
            (Challenge::Basic, Some(Credentials::Basic { username, password })) => {
                basic(&username, &password).map(Some).ok_or_else(|| self.odd_secret())
            }
            // An identity token is of no use without a token server.
            (Challenge::Basic, _) => Ok(None),
            (Challenge::Bearer { realm, service, .. }, credentials) => {
                let slot = self.slot(scopes);
                super::token::token(client, self, &slot, (&realm, service.as_deref()), scopes, credentials.as_ref())
                    .await
                    .map(Some)
            }
        }
    }

    /// Takes note that a request with `shown` was answered 401: what was shown is not shown again.
    pub(super) async fn refused(&self, challenge: Challenge, shown: Option<&HeaderValue>, scopes: &Scopes) {
        self.credentials.lock().await.values_mut().for_each(Candidates::expire);
        let slot = {
            let mut state = self.state();
            state.challenge = Some(challenge);
            state.slots.get(scopes).cloned()
        };
        if let (Some(slot), Some(shown)) = (slot, shown) {
            slot.lock().await.forget(shown);
        }
    }

    /// Takes note that `used` gives no access to a repository; says whether there are other credentials to try.
    pub(super) async fn turn_from(&self, client: &Client, repository: &str, used: Option<&Credentials>) -> bool {
        let config = client.config();
        if config.credentials.is_some() && self.mirror_of.is_none() {
            return false;
        }
        let mut known = self.credentials.lock().await;
        let Some(candidates) = known.get_mut(repository) else { return false };
        if !candidates.turn_from(used, config, &self.name, repository).await {
            return false;
        }
        // Tokens were got by the old ones.
        let mut state = self.state();
        state.slots.clear();
        state.identity = None;
        true
    }

    fn slot(&self, scopes: &Scopes) -> Arc<AsyncMutex<Slot>> {
        let mut state = self.state();
        if state.slots.len() >= MAX_SLOTS && !state.slots.contains_key(scopes) {
            // Those in use are held by who uses them.
            state.slots.clear();
        }
        state.slots.entry(scopes.clone()).or_default().clone()
    }

    async fn credentials(&self, client: &Client, repository: &str) -> Result<Option<Credentials>, Error> {
        let config = client.config();
        // Given for the registry that was named, and no mirror of it.
        if config.credentials.is_some() && self.mirror_of.is_none() {
            return Ok(config.credentials.clone());
        }
        // Held while a helper runs, so that it is asked once and not by every layer.
        let mut known = self.credentials.lock().await;
        if let Some(candidates) = known.get(repository).filter(|candidates| candidates.is_good()) {
            return Ok(candidates.current().cloned());
        }
        let earlier = known.remove(repository);
        known.retain(|_, candidates| !candidates.is_old());
        let candidates = Candidates::find(config, &self.name, repository, earlier).await?;
        let current = candidates.current().cloned();
        known.insert(repository.to_owned(), candidates);
        Ok(current)
    }

    /// Returns the newest identity token: the one from the files, or what a token server has replaced it with.
    pub(super) fn newest_identity(&self, of_files: &str) -> String {
        self.state().identity.clone().unwrap_or_else(|| of_files.to_owned())
    }

    /// Keeps what a token server has replaced the identity token with; `None` where that was refused.
    pub(super) fn replace_identity(&self, token: Option<String>) {
        self.state().identity = token;
    }

    /// Says whether ranges were ignored not long ago.
    pub(super) fn ignores_ranges(&self) -> bool {
        self.state().ranges_ignored.is_some_and(|since| since.elapsed() < RANGES_REMEMBERED)
    }

    /// Remembers that ranges are ignored.
    pub(super) fn remember_ranges_ignored(&self) {
        self.state().ranges_ignored = Some(Instant::now());
    }

    fn odd_secret(&self) -> Error {
        let detail = "they have characters that can't be sent in a header".to_owned();
        Error::Invalid { what: format!("the credentials for {}", self.name), detail }
    }
}

/// Returns `Basic ...`, marked so that no log shows it.
pub(super) fn basic(username: &str, password: &str) -> Option<HeaderValue> {
    sensitive(&format!("Basic {}", BASE64_STANDARD.encode(format!("{username}:{password}"))))
}

/// Returns `Bearer ...`, marked so that no log shows it.
pub(super) fn bearer(token: &str) -> Option<HeaderValue> {
    sensitive(&format!("Bearer {token}"))
}

fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}
