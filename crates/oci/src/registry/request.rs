//! A request to a registry, until its final answer: credentials, redirects, repetitions.
//!
//! Credentials are bound to the registry's origin (scheme, host and port). A request that has left it never carries them
//! again, and a challenge from elsewhere is not answered.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use loris_format::digest::Digest;
use reqwest::Url;

use super::{
    Client,
    challenge::Challenge,
    connections::Lane,
    host::Host,
    hosts::Settings,
    location::{MAX_HOPS, Origin, location},
    retry::{self, Attempts},
    scope::Scopes,
    transport::{Answer, Patience, Payload},
};
use crate::place::Error;

/// Most redirect targets that are remembered: about 2 KiB each, since signatures are long.
const MAX_TARGETS: usize = 2048;
/// How often one attempt shows credentials anew after 401: once for the challenge, once for a token that had expired.
const MAX_REFUSALS: u32 = 2;
/// How often one attempt turns to other credentials.
const MAX_TURNS: u32 = 16;

/// When a request may be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    /// After any failure that may pass: doing it twice is doing it once.
    Always,
    /// Where the registry says that it has done nothing.
    IfRefused,
    /// Never; the caller finds out what was done.
    Never,
}

/// A blob of a repository, whose redirect target is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct BlobKey {
    /// [`Host::key`]
    pub(super) host: String,
    pub(super) repository: String,
    pub(super) digest: Digest,
}

/// Why an attempt has failed.
pub(super) struct Failure {
    pub(super) error: Error,
    /// How long the server asks to wait.
    pub(super) wait: Option<Duration>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, wait: None }
    }
}

/// A request.
pub(super) struct Call<'a> {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    pub(super) payload: Payload,
    /// The repository that credentials are looked up for.
    pub(super) repository: &'a str,
    pub(super) scopes: Scopes,
    pub(super) lane: Lane,
    pub(super) patience: Patience,
    pub(super) repeat: Repeat,
    /// The blob that is read.
    pub(super) blob: Option<BlobKey>,
    /// The address is not the registry's: it is shown nothing.
    pub(super) elsewhere: bool,
}

impl<'a> Call<'a> {
    /// Returns a call that reads.
    pub(super) fn read(method: Method, url: Url, repository: &'a str) -> Self {
        Self {
            method,
            url,
            headers: HeaderMap::new(),
            payload: Payload::Empty,
            repository,
            scopes: Scopes::repository(repository, &["pull"]),
            lane: Lane::Short,
            patience: Patience::Step,
            repeat: Repeat::Always,
            blob: None,
            elsewhere: false,
        }
    }

    /// Returns a call that writes.
    pub(super) fn write(method: Method, url: Url, repository: &'a str) -> Self {
        Self { scopes: Scopes::repository(repository, &["pull", "push"]), ..Self::read(method, url, repository) }
    }

    /// Adds a header of our own making.
    pub(super) fn header(mut self, name: header::HeaderName, value: impl AsRef<str>) -> Self {
        // What is made here is ASCII; a value that is not would be left out.
        self.headers.extend(value.as_ref().parse().ok().map(|value: http::HeaderValue| (name, value)));
        self
    }
}

/// Where blobs were redirected to.
#[derive(Default)]
pub(super) struct Targets(Mutex<HashMap<BlobKey, Url>>);

impl Targets {
    fn get(&self, key: &BlobKey) -> Option<Url> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    fn remember(&self, key: &BlobKey, url: Url) {
        let mut targets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if targets.len() >= MAX_TARGETS && !targets.contains_key(key) {
            targets.clear();
        }
        targets.insert(key.clone(), url);
    }

    /// Forgets where a repository's blob is, at whatever host.
    pub(super) fn forget_blob(&self, repository: &str, digest: &Digest) {
        let mut targets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        targets.retain(|key, _| key.repository != repository || key.digest != *digest);
    }

    /// Forgets a target, if it is still that one.
    pub(super) fn forget(&self, key: &BlobKey, url: &Url) {
        let mut targets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if targets.get(key) == Some(url) {
            targets.remove(key);
        }
    }
}

impl Client {
    /// Sends a request until it is answered: with success, or with a status that repeating will not change.
    ///
    /// # Errors
    ///
    /// [`Error::Denied`] for 401 and 403 from the registry; [`Error::Registry`] for failures that did not pass, and for
    /// redirects that are not followed. Other statuses are the caller's.
    pub(super) async fn send(
        &self,
        host: &Host,
        call: &mut Call<'_>,
        attempts: &mut Attempts,
    ) -> Result<Answer, Error> {
        loop {
            let Failure { error, wait } = match self.attempt(host, call).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            let refused = matches!(&error, Error::Registry { status: Some(status), .. } if retry::is_refusal(*status));
            let may_repeat = match call.repeat {
                Repeat::Always => error.is_transient(),
                Repeat::IfRefused => refused,
                Repeat::Never => false,
            };
            // Payloads that are gone can't be sent again, whatever the method.
            if !may_repeat || !call.payload.is_ready() || !attempts.pause(wait).await {
                return Err(error);
            }
            self.count_retry();
        }
    }

    /// Sends a request once (but for credentials, redirects, and redirects' targets that are good no more). An answer
    /// that may be another one later is an error.
    ///
    /// # Errors
    ///
    /// As [`Client::send`].
    pub(super) async fn attempt(&self, host: &Host, call: &mut Call<'_>) -> Result<Answer, Failure> {
        let answer = self.send_once(host, call).await?;
        if !retry::is_transient(answer.status()) {
            return Ok(answer);
        }
        let wait = retry::retry_after(answer.headers());
        // Read now: an answer that is kept while waiting would keep its place, too.
        Err(Failure { error: answer.into_error().await, wait })
    }

    async fn send_once(&self, host: &Host, call: &mut Call<'_>) -> Result<Answer, Error> {
        let known = call.blob.as_ref().and_then(|key| Some((key.clone(), self.targets().get(key)?)));
        if let Some((key, target)) = known {
            match self.follow(host, call, target.clone(), true).await {
                Ok(answer) if answer.status().is_success() => return Ok(answer),
                // Expired, or the host is in trouble: only the registry knows where the blob is now.
                _ => {
                    tracing::debug!("a redirect's target is good no more");
                    self.targets().forget(&key, &target);
                }
            }
        }
        let start = call.url.clone();
        self.follow(host, call, start, call.elsewhere).await
    }

    /// Sends a request and follows it.
    async fn follow(&self, host: &Host, call: &mut Call<'_>, start: Url, mut foreign: bool) -> Result<Answer, Error> {
        let origin = Origin::of(host.base(self).await?);
        let direct = !foreign;
        // Locations of uploads may be another host's, too.
        foreign |= Origin::of(&start) != origin;
        let mut url = start;
        let mut visited = Vec::new();
        let (mut refusals, mut turns) = (0, 0);
        loop {
            let mut headers = call.headers.clone();
            let mut used = None;
            let authorization = match foreign {
                true => Ok(None),
                false => host.authorization(self, call.repository, &call.scopes, &mut used).await,
            };
            if matches!(authorization, Err(Error::Denied { .. })) && turns < MAX_TURNS {
                turns += 1;
                if host.turn_from(self, call.repository, used.as_ref()).await {
                    continue;
                }
            }
            let shown = authorization?;
            if !foreign {
                headers.extend(host.settings.headers.clone());
            }
            if let Some(value) = shown.clone() {
                headers.insert(header::AUTHORIZATION, value);
            }
            let how = (call.lane, call.patience);
            // A foreign layer has nothing to do with this host.
            let nothing = Settings::default();
            let settings = if call.elsewhere { &nothing } else { &host.settings };
            let mut answer = self.exchange(&call.method, &url, headers, &mut call.payload, how, settings).await?;
            let status = answer.status();

            if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) && !foreign {
                let challenges = answer.headers().get_all(header::WWW_AUTHENTICATE);
                let challenge = Challenge::best(challenges.into_iter().filter_map(|value| value.to_str().ok()));
                let detail = answer.words().await;
                // Whoever asks for a token needs a place at this host, perhaps the one that the answer has.
                drop(answer);
                if let Some(challenge) = challenge.filter(|_| status == StatusCode::UNAUTHORIZED) {
                    refusals += 1;
                    if refusals <= MAX_REFUSALS
                        && self.has_more_to_show(host, call, challenge, shown.as_ref()).await?
                        && call.payload.is_ready()
                    {
                        continue;
                    }
                }
                turns += 1;
                if turns <= MAX_TURNS
                    && host.turn_from(self, call.repository, used.as_ref()).await
                    && call.payload.is_ready()
                {
                    refusals = 0;
                    continue;
                }
                let place = format!("{}/{}", host.name, call.repository);
                return Err(Error::Denied { place, detail, remedy: self.config().remedy() });
            }
            if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) && direct {
                // Of another host's refusal no log-in can be the cure.
                return Err(answer.into_error().await);
            }
            if !is_followed(status, &call.method) {
                if let Some(key) = call.blob.as_ref().filter(|_| foreign && direct && status.is_success()) {
                    self.targets().remember(key, url);
                }
                return Ok(answer);
            }

            let next = location(answer.headers(), &url)
                .map_err(|refused| answer.wrong(format!("the redirect ({status}) is not followed: {refused}")))?;
            visited.push(std::mem::replace(&mut url, next));
            if visited.contains(&url) || visited.len() > MAX_HOPS {
                return Err(answer.wrong("the redirects go in a circle"));
            }
            // The answer's body says nothing that the headers have not said; read, it frees the connection for more.
            let _ = answer.words().await;
            foreign |= Origin::of(&url) != origin;
            self.counters().redirects.fetch_add(1, Ordering::Relaxed);
            if !call.payload.is_ready() {
                return Err(answer.wrong("the upload was redirected after its content was sent"));
            }
        }
    }

    /// Takes note of a challenge and says whether there is anything to show that was not shown yet.
    async fn has_more_to_show(
        &self,
        host: &Host,
        call: &mut Call<'_>,
        challenge: Challenge,
        shown: Option<&HeaderValue>,
    ) -> Result<bool, Error> {
        // Forgotten under the scopes that it was asked for, which may be fewer than those that are wanted.
        host.refused(challenge.clone(), shown, &call.scopes).await;
        if let Challenge::Bearer { scope: Some(scope), .. } = &challenge {
            call.scopes.merge(scope);
        }
        // The same password again would be refused again; a token is a new one.
        Ok(challenge != Challenge::Basic
            || host.authorization(self, call.repository, &call.scopes, &mut None).await?.as_ref() != shown)
    }
}

/// Says whether an answer leads on. A method that changes something must stay what it is (307, 308).
fn is_followed(status: StatusCode, method: &Method) -> bool {
    match status {
        StatusCode::MOVED_PERMANENTLY | StatusCode::FOUND | StatusCode::SEE_OTHER => {
            matches!(*method, Method::GET | Method::HEAD)
        }
        StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT => true,
        _ => false,
    }
}
