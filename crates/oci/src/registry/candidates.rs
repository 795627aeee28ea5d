//! The credentials for a repository: what keychains and files have, in order, and which of them is shown.
//!
//! A source is asked only where those before it have nothing, or where all that they had was refused: some are programs
//! that take their time.

use std::time::{Duration, Instant};

use super::Config;
use crate::{
    auth::{self, Credentials},
    place::Error,
};

/// How long credentials are used before their sources are asked again: helpers hand out some that expire.
const LIVE: Duration = Duration::from_secs(300);
/// How long after all were refused the sources are not asked for something new within a request: some have a new token each
/// time, and none that is let in.
const RENEWED: Duration = Duration::from_secs(30);
/// Most that are tried for one repository.
const MOST: usize = 16;

/// Credentials for one repository at one host.
pub(super) struct Candidates {
    since: Instant,
    is_stale: bool,
    /// How many sources were asked: keychains, then the files.
    asked: usize,
    found: Vec<Credentials>,
    /// The one that is shown.
    at: usize,
    /// When all were refused the last time.
    renewed: Option<Instant>,
}

impl Candidates {
    /// Asks, until something is found. Goes on with the one that `earlier` has come to, where its sources still say the
    /// same.
    pub(super) async fn find(
        config: &Config,
        registry: &str,
        repository: &str,
        earlier: Option<Self>,
    ) -> Result<Self, Error> {
        let renewed = earlier.as_ref().and_then(|earlier| earlier.renewed);
        let mut candidates =
            Self { since: Instant::now(), is_stale: false, asked: 0, found: Vec::new(), at: 0, renewed };
        let again = earlier.as_ref().map_or(0, |earlier| earlier.asked);
        while (candidates.found.is_empty() || candidates.asked < again)
            && candidates.ask_next(config, registry, repository).await?
        {}
        candidates.at = earlier.filter(|earlier| earlier.found == candidates.found).map_or(0, |earlier| earlier.at);
        Ok(candidates)
    }

    /// Returns what is to be shown.
    pub(super) fn current(&self) -> Option<&Credentials> {
        self.found.get(self.at)
    }

    /// Whether it is believed without asking anew.
    pub(super) fn is_good(&self) -> bool {
        !self.is_stale && !self.is_old()
    }

    /// Whether nobody has needed it for long.
    pub(super) fn is_old(&self) -> bool {
        self.since.elapsed() >= LIVE
    }

    /// The sources are to be asked anew.
    pub(super) fn expire(&mut self) {
        self.is_stale = true;
    }

    /// Takes note that `shown` was refused; says whether there is something else to show.
    pub(super) async fn turn_from(
        &mut self,
        shown: Option<&Credentials>,
        config: &Config,
        registry: &str,
        repository: &str,
    ) -> bool {
        if self.current() != shown {
            // Somebody else was faster. What was refused may have been replaced, too.
            return self.current().is_some();
        }
        while self.at + 1 >= self.found.len() {
            match self.ask_next(config, registry, repository).await {
                Ok(true) => {}
                Ok(false) => return self.renew(shown, config, registry, repository).await,
                Err(error) => tracing::warn!(%error, registry, repository, "credentials can't be looked up"),
            }
            if shown.is_none() && !self.found.is_empty() {
                self.at = 0;
                return true;
            }
        }
        tracing::info!(registry, repository, "credentials were refused; others are tried");
        self.at += 1;
        true
    }

    /// Looks whether the sources have something new, after all that they had was refused.
    async fn renew(&mut self, shown: Option<&Credentials>, config: &Config, registry: &str, repository: &str) -> bool {
        for (keychain, credentials) in config.keychains.iter().flat_map(|keychain| shown.map(|shown| (keychain, shown)))
        {
            keychain.refused(registry, repository, credentials);
        }
        // From the first one again, when somebody asks again.
        (self.at, self.is_stale) = (0, true);
        if self.renewed.is_some_and(|renewed| renewed.elapsed() < RENEWED) {
            return false;
        }
        self.renewed = Some(Instant::now());
        let fresh = match Self::find(config, registry, repository, None).await {
            Ok(fresh) => fresh,
            Err(error) => {
                tracing::warn!(%error, registry, repository, "credentials can't be looked up");
                return false;
            }
        };
        let new = fresh.found.iter().position(|credentials| !self.found.contains(credentials));
        if let Some(at) = new {
            *self = Self { at, renewed: self.renewed, ..fresh };
        }
        new.is_some()
    }

    /// Asks one more source; `false` where there is none.
    async fn ask_next(&mut self, config: &Config, registry: &str, repository: &str) -> Result<bool, Error> {
        let number = self.asked;
        if number > config.keychains.len() || self.found.len() >= MOST {
            return Ok(false);
        }
        self.asked += 1;
        let more = match config.keychains.get(number) {
            Some(keychain) => {
                let more = keychain.credentials(registry, repository).await;
                tracing::debug!(
                    registry,
                    repository,
                    keychain = keychain.name(),
                    found = more.len(),
                    "asked a keychain"
                );
                more
            }
            None => auth::lookup(&config.environment, registry, repository).await?.into_iter().collect(),
        };
        for credentials in more {
            if self.found.len() < MOST && !self.found.contains(&credentials) {
                self.found.push(credentials);
            }
        }
        Ok(true)
    }
}
