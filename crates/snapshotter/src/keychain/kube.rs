//! The cluster's pull secrets: those of the types `kubernetes.io/dockerconfigjson` and `kubernetes.io/dockercfg`, of all
//! namespaces that we may read, listed once and watched from then on.
//!
//! Which secret belongs to which pod is not known where a layer is read, so every secret counts for all images that its
//! keys match, as with stargz-snapshotter; the more exact key goes first, and what a registry refuses is followed by the
//! next. Who does not want this gives the service account `get`, `list` and `watch` of secrets in some namespaces only.
//!
//! What this module must not know: how registries are asked.

use std::{
    collections::HashMap,
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use loris_oci::auth::{self, Credentials, Keychain};
use tokio::{sync::watch, task::AbortHandle, time::Instant};

use super::pattern::Pattern;

mod config;
mod watching;

pub use config::ConfigError;

/// Most secrets that are kept, of each type.
const MOST_SECRETS: usize = 20_000;
/// Most keys in one secret.
const MOST_KEYS: usize = 256;
/// Most bytes of names and secrets that are kept.
const MOST_BYTES: usize = 64 << 20;
/// How long who asks waits for the first list, from the start.
const FIRST_LIST: Duration = Duration::from_secs(5);

/// Whether and where secrets are looked for. The names of stargz-snapshotter's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Whether they are.
    pub enable_keychain: bool,
    /// The kubeconfig file; what a pod has where it is `None`.
    pub kubeconfig_path: Option<PathBuf>,
}

/// The types of secrets that hold credentials, and the key of their data.
const KINDS: [Kind; 2] = [
    Kind { name: "kubernetes.io/dockerconfigjson", key: ".dockerconfigjson", is_legacy: false },
    Kind { name: "kubernetes.io/dockercfg", key: ".dockercfg", is_legacy: true },
];

/// A type of secrets.
#[derive(Clone, Copy, Debug)]
struct Kind {
    name: &'static str,
    key: &'static str,
    is_legacy: bool,
}

/// The cluster's pull secrets. Watching ends with the value.
pub struct Secrets {
    known: Arc<Known>,
    watching: Vec<AbortHandle>,
    began: Instant,
    listed: Vec<watch::Receiver<bool>>,
}

/// What is known of secrets.
#[derive(Default)]
struct Known(Mutex<State>);

#[derive(Default)]
struct State {
    /// By type and `NAMESPACE/NAME`.
    secrets: HashMap<(&'static str, String), Vec<Entry>>,
    bytes: usize,
}

/// A key of a secret.
struct Entry {
    pattern: Pattern,
    credentials: Credentials,
    bytes: usize,
}

impl Secrets {
    /// Begins to watch, on the runtime of the caller. What is wrong with the configuration is logged, and looked at again:
    /// on a new node the file comes later than we do.
    #[must_use]
    pub fn watch(settings: &Settings) -> Self {
        let known = Arc::new(Known::default());
        let (mut watching, mut listed) = (Vec::new(), Vec::new());
        for kind in KINDS {
            let (sender, receiver) = watch::channel(false);
            let (kubeconfig, known) = (settings.kubeconfig_path.clone(), Arc::clone(&known));
            let task = tokio::spawn(watching::watch(kubeconfig, kind, known, sender));
            watching.push(task.abort_handle());
            listed.push(receiver);
        }
        Self { known, watching, began: Instant::now(), listed }
    }

    /// Returns the secrets that are known, as `NAMESPACE/NAME`.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.known.state().secrets.keys().map(|(_, name)| name.clone()).collect();
        names.sort();
        names
    }
}

impl Drop for Secrets {
    fn drop(&mut self) {
        self.watching.iter().for_each(AbortHandle::abort);
    }
}

/// How many there are: secrets stay out of logs.
impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets").field("secrets", &self.known.state().secrets.len()).finish_non_exhaustive()
    }
}

#[async_trait]
impl Keychain for Secrets {
    fn name(&self) -> &str {
        "the cluster's pull secrets"
    }

    async fn credentials(&self, registry: &str, repository: &str) -> Vec<Credentials> {
        for listed in &self.listed {
            let mut first = listed.clone();
            let _ = tokio::time::timeout_at(self.began + FIRST_LIST, first.wait_for(|listed| *listed)).await;
        }
        self.known.credentials(registry, repository)
    }
}

impl Known {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn credentials(&self, registry: &str, repository: &str) -> Vec<Credentials> {
        let state = self.state();
        let mut found: Vec<(&(&str, String), &Entry)> = state
            .secrets
            .iter()
            .flat_map(|(name, entries)| entries.iter().map(move |entry| (name, entry)))
            .filter(|(_, entry)| entry.pattern.matches(registry, repository))
            .collect();
        // The same order each time, whatever the map's.
        found.sort_by(|(one, a), (other, b)| b.pattern.exactness().cmp(&a.pattern.exactness()).then(one.cmp(other)));
        found.into_iter().map(|(_, entry)| entry.credentials.clone()).collect()
    }

    /// Takes a secret in place of what it was; one that can't be read has no credentials.
    fn insert(&self, kind: Kind, name: &str, data: &[u8]) {
        let what = format!("the secret {name}");
        let entries = auth::entries(&what, data, kind.is_legacy).unwrap_or_else(|error| {
            tracing::warn!(%error, "a pull secret is not read");
            Vec::new()
        });
        let entries = entries.into_iter().take(MOST_KEYS).map(|(key, credentials)| {
            let secret = match &credentials {
                Credentials::Basic { username, password } => username.len() + password.len(),
                Credentials::Identity(token) | Credentials::Bearer(token) => token.len(),
            };
            Entry { pattern: Pattern::new(&key), credentials, bytes: key.len() + secret }
        });
        let entries: Vec<Entry> = entries.collect();
        let bytes: usize = entries.iter().map(|entry| entry.bytes).sum();
        let mut state = self.state();
        state.remove(kind, name);
        if entries.is_empty() {
            return;
        }
        if state.secrets.len() >= MOST_SECRETS || state.bytes + bytes > MOST_BYTES {
            tracing::warn!(secret = name, "there are too many pull secrets; this one does not count");
            return;
        }
        state.bytes += bytes;
        state.secrets.insert((kind.name, name.to_owned()), entries);
    }

    fn remove(&self, kind: Kind, name: &str) {
        self.state().remove(kind, name);
    }

    /// Forgets all of a type that are not among those that a list had.
    fn retain(&self, kind: Kind, listed: &std::collections::HashSet<String>) {
        let mut state = self.state();
        let gone: Vec<String> = state
            .secrets
            .keys()
            .filter(|(of, name)| *of == kind.name && !listed.contains(name))
            .map(|(_, name)| name.clone())
            .collect();
        for name in gone {
            state.remove(kind, &name);
        }
    }
}

impl State {
    fn remove(&mut self, kind: Kind, name: &str) {
        if let Some(entries) = self.secrets.remove(&(kind.name, name.to_owned())) {
            self.bytes -= entries.iter().map(|entry| entry.bytes).sum::<usize>();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(text: &str) -> Credentials {
        Credentials::Basic { username: text.into(), password: text.into() }
    }

    fn auths(entries: &[(&str, &str)]) -> String {
        let entries =
            entries.iter().map(|(key, text)| format!(r#""{key}":{{"username":"{text}","password":"{text}"}}"#));
        format!("{{{}}}", entries.collect::<Vec<_>>().join(","))
    }

    #[test]
    fn the_most_exact_key_of_all_secrets_goes_first() {
        let known = Known::default();
        let [config, legacy] = KINDS;
        let wrapped = |entries| format!("{{\"auths\":{}}}", auths(entries));
        known.insert(config, "a/one", wrapped(&[("r.example", "host"), ("*.example", "wild")]).as_bytes());
        known.insert(config, "b/two", wrapped(&[("r.example/ns", "ns"), ("r.example", "other")]).as_bytes());
        known.insert(legacy, "b/two", auths(&[("https://index.docker.io/v1/", "hub")]).as_bytes());
        let names = ["ns", "host", "other", "wild"];
        assert_eq!(known.credentials("r.example", "ns/x"), names.map(basic));
        assert_eq!(known.credentials("r.example", "x"), ["host", "other", "wild"].map(basic));
        assert_eq!(known.credentials("docker.io", "library/x"), [basic("hub")]);
        assert_eq!(known.credentials("s.other", "x"), []);
        // Replaced, damaged, listed no more.
        known.insert(config, "a/one", wrapped(&[("r.example", "new")]).as_bytes());
        known.insert(legacy, "b/two", b"hunter2");
        assert_eq!(known.credentials("r.example", "x"), ["new", "other"].map(basic));
        assert_eq!(known.credentials("docker.io", "library/x"), []);
        known.retain(config, &["b/two".to_owned()].into());
        assert_eq!(known.credentials("r.example", "x"), [basic("other")]);
        known.remove(config, "b/two");
        let state = known.state();
        assert_eq!((state.secrets.len(), state.bytes), (0, 0));
    }

    #[test]
    fn memory_is_bounded() {
        let known = Known::default();
        let long = "x".repeat(1 << 20);
        for n in 0..100 {
            let text = format!("{{\"auths\":{}}}", auths(&[("r.example", &long)]));
            known.insert(KINDS[0], &format!("a/{n}"), text.as_bytes());
        }
        let state = known.state();
        assert!(state.bytes <= MOST_BYTES && state.secrets.len() >= 20, "{} in {}", state.bytes, state.secrets.len());
    }
}
