//! What may know credentials beside the files: a cluster's secrets, what a client has pulled with, a cloud's programs.

use std::fmt;

use async_trait::async_trait;

use super::Credentials;

/// A place that has credentials for some repositories. Asked before the files, and again when a registry has refused what
/// it was shown (401): so what it returns is to be what it knows now.
///
/// It deals with its own failures: where it can't answer it logs why, and has nothing. `Debug` and logs must not show a
/// secret.
#[async_trait]
pub trait Keychain: fmt::Debug + Send + Sync {
    /// Says what it is, for logs.
    fn name(&self) -> &str;

    /// Returns what there is for a repository, the most likely first: the next is tried where a registry refuses one.
    ///
    /// `registry` is a name as in [`crate::Reference::registry`] (`docker.io` for Docker Hub), or a mirror's own.
    async fn credentials(&self, registry: &str, repository: &str) -> Vec<Credentials>;

    /// Takes note that a registry refused what this or another source had: it is asked again next, and who keeps answers of
    /// others should ask them anew.
    fn refused(&self, registry: &str, repository: &str, credentials: &Credentials) {
        let _ = (registry, repository, credentials);
    }
}
