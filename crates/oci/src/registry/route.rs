//! Which of a registry's hosts is asked now, and what happens when it fails.
//!
//! Hosts are asked in the order that the administrator gave (`hosts`). One that fails (no connection, no byte in time, 5xx,
//! 429, 401, 403, an answer that is wrong) is *put back*: it is asked only after all others, for a time that doubles with
//! each failure; then one request tries it again, and if that succeeds it has its place back. So operations stay with the
//! host that works. Some failures say nothing of the host but only of what was asked: a repository that it refuses, a blob
//! that it does not have or has wrongly. For such a subject it is *passed over* for a while.
//!
//! An operation is a [`Trip`]: it asks one host after the other without a wait, each once; when all have failed, and it
//! may help, it waits as [`Attempts`] say, and begins anew. Its error is that of the last host in the order, which is the
//! registry itself as a rule: what a mirror has not, the registry may have, and not the other way round.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use loris_format::digest::Digest;

use super::{
    Config,
    host::Host,
    hosts::{self, Capabilities, Endpoint},
    meter::Meter,
    request::Failure,
    retry::{Attempts, jittered},
};
use crate::{Reference, link::Link, place::Error};

/// How often the time that a host is put back is doubled, at most.
const DOUBLINGS: u32 = 6;
/// How long a host is passed over for one subject.
const PASSED_OVER: Duration = Duration::from_secs(60);
/// How long bytes that proved wrong are held against the host that sent them.
const DISTRUSTED: Duration = Duration::from_secs(600);
/// Most subjects that one host is passed over for.
const MAX_SUBJECTS: usize = 4096;
/// Most ranges of which it is known who served them, and most that are distrusted.
const MAX_RANGES: usize = 1024;

/// The hosts that serve one registry's images.
pub(super) struct Route {
    registry: String,
    api: String,
    /// Read when the first request is made.
    members: OnceLock<Vec<Member>>,
    /// When the administrator's files were last looked at.
    checked_at: Mutex<Instant>,
    ranges: Mutex<Ranges>,
    meter: Mutex<Option<Arc<Meter>>>,
}

struct Member {
    host: Arc<Host>,
    endpoint: Endpoint,
    health: Mutex<Health>,
}

#[derive(Default)]
struct Health {
    /// Failures in a row.
    failures: u32,
    failed_at: Option<Instant>,
    /// Until when it is put back.
    until: Option<Instant>,
    passed_over: HashMap<String, Instant>,
}

/// Who served which ranges.
#[derive(Default)]
struct Ranges {
    served: VecDeque<(Digest, Range<u64>, usize)>,
    distrusted: VecDeque<(Digest, Range<u64>, usize, Instant)>,
}

/// What an operation is about.
#[derive(Clone, Copy)]
pub(super) enum Content<'a> {
    /// What a tag leads to.
    Tag,
    /// A document or a blob.
    Whole(&'a Digest),
    /// Bytes of a blob, of which some may have proved wrong before.
    Range(&'a Digest, &'a Range<u64>),
}

impl Content<'_> {
    fn digest(&self) -> Option<&Digest> {
        match self {
            Self::Tag => None,
            Self::Whole(digest) | Self::Range(digest, _) => Some(digest),
        }
    }
}

/// One operation on its way over the hosts of a route.
pub(super) struct Trip {
    route: Arc<Route>,
    attempts: Attempts,
    put_back: Duration,
    /// Hosts that can be asked, by number.
    candidates: Vec<usize>,
    /// Those that have failed since the last wait.
    tried: Vec<usize>,
    current: usize,
    asked_at: Instant,
    repository: String,
    /// What the operation is about, where it has a digest.
    content: Option<String>,
    /// The bytes that are wanted, where it is a range.
    range: Option<(Digest, Range<u64>)>,
    /// The error of the last host in the order that has failed, and whether it may pass.
    error: Option<(usize, Error, bool)>,
    may_pass: bool,
    wait: Option<Duration>,
}

impl Route {
    pub(super) fn new(reference: &Reference) -> Self {
        Self {
            registry: reference.registry().to_owned(),
            api: reference.api_host().to_owned(),
            members: OnceLock::new(),
            checked_at: Mutex::new(Instant::now()),
            ranges: Mutex::default(),
            meter: Mutex::default(),
        }
    }

    /// Returns the registry's name.
    pub(super) fn registry(&self) -> &str {
        &self.registry
    }

    /// Returns the hosts, in order. The first call reads the administrator's files.
    fn members(&self, config: &Config) -> Result<&[Member], Error> {
        if let Some(members) = self.members.get() {
            return Ok(members);
        }
        let endpoints = hosts::endpoints(config, &self.registry)?;
        let member = |endpoint: &Endpoint| Member {
            host: Arc::new(Host::new(&self.registry, &self.api, endpoint)),
            endpoint: endpoint.clone(),
            health: Mutex::default(),
        };
        // Somebody else may have read them at the same time.
        Ok(self.members.get_or_init(|| endpoints.iter().map(member).collect()))
    }

    /// Says whether the administrator's files say something else by now. They are looked at once a minute at most.
    pub(super) fn is_outdated(&self, config: &Config) -> bool {
        let Some(members) = self.members.get() else { return false };
        let mut checked_at = self.checked_at.lock().unwrap_or_else(PoisonError::into_inner);
        if checked_at.elapsed() < config.hosts_live {
            return false;
        }
        *checked_at = Instant::now();
        // An error is for whoever asks next.
        let now = hosts::endpoints(config, &self.registry);
        !now.is_ok_and(|now| now.iter().eq(members.iter().map(|member| &member.endpoint)))
    }

    /// Returns the registry itself: the last of its hosts.
    pub(super) fn upstream(&self, config: &Config) -> Result<&Arc<Host>, Error> {
        let last = self.members(config)?.last();
        last.map(|member| &member.host).ok_or_else(|| self.nobody("answers"))
    }

    /// Returns the host that is written to.
    pub(super) fn target(&self, config: &Config) -> Result<&Arc<Host>, Error> {
        let mut members = self.members(config)?.iter();
        let found = members.find(|member| member.endpoint.capabilities.has(Capabilities::PUSH));
        found.map(|member| &member.host).ok_or_else(|| self.nobody("\"push\""))
    }

    fn nobody(&self, what: &str) -> Error {
        let detail = format!("no host with the capability {what} is configured; see hosts.toml of {}", self.registry);
        Error::Invalid { what: format!("the registry {}", self.registry), detail }
    }

    fn ranges(&self) -> MutexGuard<'_, Ranges> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of what measures the host that serves the newest bytes.
    pub(super) fn is_measured_by(&self, meter: &Arc<Meter>) {
        *self.meter.lock().unwrap_or_else(PoisonError::into_inner) = Some(meter.clone());
    }

    /// Takes note of who served a piece of a blob. The pieces of one answer, which began at `began`, are one range.
    pub(super) fn served(&self, digest: &Digest, began: u64, piece: Range<u64>, trip: &Trip) {
        if self.members.get().is_none_or(|members| members.len() < 2) {
            return;
        }
        let mut ranges = self.ranges();
        let grows = |(of, served, by): &&mut (Digest, Range<u64>, usize)| {
            of == digest && *by == trip.current && served.end == piece.start && served.start >= began
        };
        if let Some((_, served, _)) = ranges.served.iter_mut().rev().find(grows) {
            served.end = piece.end;
            return;
        }
        if ranges.served.len() >= MAX_RANGES {
            ranges.served.pop_front();
        }
        ranges.served.push_back((*digest, piece, trip.current));
    }

    /// Takes note that bytes of a blob proved wrong: whoever served them is put back, and asked for these only after
    /// others. Says whether there are others. Where two readers find the same answer wrong, both are told so.
    pub(super) fn distrust(&self, digest: &Digest, range: &Range<u64>, config: &Config) -> bool {
        let Some(members) = self.members.get() else { return false };
        let mut ranges = self.ranges();
        let until = Instant::now() + DISTRUSTED;
        let touches = |served: &Range<u64>| served.start < range.end && range.start < served.end;
        let (guilty, others): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut ranges.served).into_iter().partition(|(of, served, _)| of == digest && touches(served));
        ranges.served = others;
        let is_known = |(of, bad, _, until): &(Digest, Range<u64>, usize, Instant)| {
            of == digest && *until > Instant::now() && touches(bad)
        };
        let is_choice = members.len() > 1 && (!guilty.is_empty() || ranges.distrusted.iter().any(is_known));
        for (digest, range, member) in guilty {
            let Some(host) = members.get(member) else { continue };
            tracing::warn!(host = host.host.name, %digest, ?range, "a host has sent wrong bytes; others are asked first");
            host.health().put_back(config.put_back, Instant::now(), None);
            if ranges.distrusted.len() >= MAX_RANGES {
                ranges.distrusted.pop_front();
            }
            ranges.distrusted.push_back((digest, range, member, until));
        }
        is_choice
    }

    /// Says whether bytes that a host sent of this range have proved wrong.
    fn is_distrusted(&self, digest: &Digest, range: &Range<u64>, member: usize, now: Instant) -> bool {
        self.ranges().distrusted.iter().any(|(of, bad, by, until)| {
            of == digest && *by == member && *until > now && bad.start < range.end && range.start < bad.end
        })
    }

    /// Returns what is known of the way to the host that served the newest bytes.
    pub(super) fn link(&self) -> Option<Link> {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner).as_ref()?.link()
    }
}

impl Member {
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Health {
    /// Takes note of the failure of an attempt that began at `asked_at`.
    fn put_back(&mut self, time: Duration, asked_at: Instant, asked_for: Option<Duration>) {
        let now = Instant::now();
        // Failures of attempts that ran side by side are one.
        if self.failed_at.is_none_or(|failed_at| failed_at < asked_at) {
            self.failures = self.failures.saturating_add(1);
            self.failed_at = Some(now);
        }
        let doubled = time.saturating_mul(1 << (self.failures.saturating_sub(1)).min(DOUBLINGS));
        let longest = time.saturating_mul(1 << DOUBLINGS);
        let time = jittered(doubled).max(asked_for.unwrap_or_default().min(longest));
        self.until = self.until.max(now.checked_add(time));
    }

    fn pass_over(&mut self, subject: &str) {
        let now = Instant::now();
        if self.passed_over.len() >= MAX_SUBJECTS {
            self.passed_over.retain(|_, until| *until > now);
            if self.passed_over.len() >= MAX_SUBJECTS {
                self.passed_over.clear();
            }
        }
        self.passed_over.insert(subject.to_owned(), now + PASSED_OVER);
    }

    fn passes_over(&self, subject: &str, now: Instant) -> bool {
        self.passed_over.get(subject).is_some_and(|until| *until > now)
    }

    /// Says whether the host is put back. One that has been so for long enough is tried by whoever asks first; for others
    /// it stays back while that is under way.
    fn is_put_back(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| until > now)
    }
}

impl Trip {
    /// Begins an operation in a repository.
    pub(super) fn new(
        route: &Arc<Route>,
        repository: &str,
        content: Content<'_>,
        wanted: Capabilities,
        config: &Config,
    ) -> Result<Self, Error> {
        let members = route.members(config)?;
        let able = members.iter().enumerate().filter(|(_, member)| member.endpoint.capabilities.has(wanted));
        let candidates: Vec<usize> = able.map(|(number, _)| number).collect();
        if candidates.is_empty() {
            return Err(route.nobody(if wanted.resolve { "\"resolve\"" } else { "\"pull\"" }));
        }
        let mut trip = Self {
            route: route.clone(),
            attempts: Attempts::new(config),
            put_back: config.put_back,
            tried: Vec::with_capacity(candidates.len()),
            candidates,
            current: 0,
            asked_at: Instant::now(),
            repository: repository.to_owned(),
            content: content.digest().map(|digest| format!("{repository}@{digest}")),
            range: match content {
                Content::Range(digest, range) => Some((*digest, range.clone())),
                Content::Tag | Content::Whole(_) => None,
            },
            error: None,
            may_pass: false,
            wait: None,
        };
        trip.choose();
        Ok(trip)
    }

    /// Begins no attempt after `deadline`.
    pub(super) fn until(self, deadline: Instant) -> Self {
        Self { attempts: self.attempts.until(deadline), ..self }
    }

    fn members(&self) -> &[Member] {
        // Read before a trip begins.
        self.route.members.get().map_or(&[], Vec::as_slice)
    }

    /// Returns the host that is asked now.
    pub(super) fn host(&self) -> Arc<Host> {
        // Candidates are numbers of members, which don't change.
        self.members()[self.current].host.clone()
    }

    /// Returns the number of the host that is asked now.
    pub(super) fn number(&self) -> usize {
        self.current
    }

    fn is_alone(&self) -> bool {
        self.candidates.len() == 1
    }

    /// Chooses the host that is asked next: one that has not failed since the last wait, and stands foremost.
    fn choose(&mut self) {
        let now = Instant::now();
        let left = self.candidates.iter().copied().filter(|number| !self.tried.contains(number));
        let rank = |number: &usize| {
            let health = self.members()[*number].health();
            let passed_over = health.passes_over(&self.repository, now)
                || self.content.as_ref().is_some_and(|content| health.passes_over(content, now))
                || self
                    .range
                    .as_ref()
                    .is_some_and(|(digest, range)| self.route.is_distrusted(digest, range, *number, now));
            (passed_over, health.is_put_back(now), *number)
        };
        let Some(best) = left.min_by_key(rank) else { return };
        (self.current, self.asked_at) = (best, now);
        if !self.is_alone() {
            let mut health = self.members()[best].health();
            if health.failures > 0 && !health.is_put_back(now) {
                // It is tried again by this operation, and by others when they have seen that it works.
                health.until = now.checked_add(self.put_back);
            }
        }
    }

    /// Takes note that the host has done what was asked.
    pub(super) fn succeeded(&self) {
        if self.is_alone() {
            return;
        }
        let mut health = self.members()[self.current].health();
        (health.failures, health.until) = (0, None);
    }

    /// Takes note that something was achieved: failures from here on are new ones.
    pub(super) fn progress(&mut self) {
        self.attempts.progress();
    }

    /// Takes note that the host has failed, and turns to the next one, after a wait where all have failed. `again` says
    /// whether the same host may do better the next time.
    ///
    /// # Errors
    ///
    /// The error to give up with.
    pub(super) async fn failed(&mut self, Failure { error, wait }: Failure, again: bool) -> Result<(), Error> {
        if !self.is_alone() {
            self.remember(&error, wait);
            let host = &self.members()[self.current].host.name;
            tracing::info!(host, of = self.route.registry, %error, "a host has failed; the next is asked");
        }
        self.tried.push(self.current);
        self.may_pass |= again;
        // One that asks for no wait is no reason to wait long.
        self.wait = if self.tried.len() == 1 { wait } else { self.wait.min(wait) };
        if self.error.as_ref().is_none_or(|(number, ..)| *number <= self.current) {
            self.error = Some((self.current, error, again));
        }
        if self.tried.len() < self.candidates.len() {
            self.choose();
            return Ok(());
        }
        let last = self.error.take();
        let is_absent = matches!(&last, Some((_, Error::NotFound { .. }, _)));
        let go_on = std::mem::take(&mut self.may_pass) && !is_absent;
        let wait = self.wait.take();
        if (!go_on || !self.attempts.pause(wait).await)
            && let Some((_, error, _)) = last
        {
            return Err(error);
        }
        self.tried.clear();
        self.choose();
        Ok(())
    }

    /// Remembers what a failure says of the host.
    fn remember(&self, error: &Error, wait: Option<Duration>) {
        let mut health = self.members()[self.current].health();
        let subject = match error {
            Error::Denied { .. } => Some(&self.repository),
            Error::NotFound { .. } | Error::Corrupt { .. } | Error::TooLarge { .. } => self.content.as_ref(),
            // Kept by the host itself.
            Error::Unsupported { .. } => return,
            _ => None,
        };
        match subject {
            Some(subject) => {
                health.pass_over(subject);
                // That it has answered means that it is there; but wrong bytes are no small thing.
                if matches!(error, Error::Corrupt { .. }) {
                    health.put_back(self.put_back, self.asked_at, wait);
                }
            }
            // A tag that it does not know.
            None if matches!(error, Error::NotFound { .. }) => {}
            None => health.put_back(self.put_back, self.asked_at, wait),
        }
    }

    /// Takes note that content which the host has sent is wrong, where it is too late to turn to another one.
    pub(super) fn condemn(&self, error: &Error) {
        if !self.is_alone() {
            self.remember(error, None);
        }
    }

    /// Waits, for a repetition that asks none of the hosts; `false` where there is none left.
    pub(super) async fn pause(&mut self, wait: Option<Duration>) -> bool {
        self.attempts.pause(wait).await
    }
}

#[cfg(test)]
mod tests;
