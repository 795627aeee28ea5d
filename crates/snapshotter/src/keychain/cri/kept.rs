//! What pulls have brought, by image reference: in memory, and in a file for after a restart.
//!
//! The file is JSON: `{"version": 1, "pulls": {REFERENCE: {"since": SECONDS, "image": ID, KIND: ...}}}`, with mode 0600 and
//! replaced as a whole. It holds secrets as they are, as Docker's `config.json` does.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use loris_oci::{
    Reference,
    auth::{Credentials, Keychain},
};
use serde::{Deserialize, Serialize};

/// The file's name.
pub(super) const FILE: &str = "cri-credentials.json";
/// The form of the file.
const VERSION: u32 = 1;
/// Most references that are kept; the oldest go first.
const MOST: usize = 1024;
/// Most pulls at once whose credentials are taken note of.
const MOST_PULLING: usize = 256;
/// Longest secret, in bytes. Tokens of cloud providers have a few kilobytes.
const SECRET_BYTES: usize = 16 << 10;
/// How long credentials are kept after the last pull with them.
const LIVE: Duration = Duration::from_secs(90 * 24 * 3600);
/// Largest file that is read.
const FILE_BYTES: u64 = (MOST * (SECRET_BYTES + 4096)) as u64;

/// Why kubelet can't be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeptError {
    /// The file can't be read.
    #[error("{path} can't be read: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is of a later version.
    #[error(
        "{path} was written by a later version ({version}) of Loris; remove it to begin without kubelet's credentials"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The runtime's socket has no path that can be used.
    #[error("{path} can't be the container runtime's socket: it must be an absolute path of text")]
    Socket {
        /// The path.
        path: PathBuf,
    },
}

/// What pulls have brought. Clones share everything.
#[derive(Clone)]
pub struct Kept {
    inner: Arc<Inner>,
}

struct Inner {
    file: PathBuf,
    state: Mutex<State>,
    /// Held while the file is written, so that an older state does not replace a newer one.
    writing: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    pulls: BTreeMap<String, Pull>,
    /// Pulls that go on, the newest first.
    pulling: VecDeque<(u64, Reference, Credentials)>,
    /// The number of the next one.
    next: u64,
}

/// A pull that has succeeded.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Pull {
    /// When, in seconds since 1970.
    since: u64,
    /// What the runtime calls the image.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    image: String,
    #[serde(flatten)]
    credentials: Secret,
}

/// [`Credentials`], as they are written.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Secret {
    Basic { username: String, password: String },
    Identity(String),
    Bearer(String),
}

#[derive(Serialize, Deserialize)]
struct Written {
    version: u32,
    #[serde(default)]
    pulls: BTreeMap<String, Pull>,
}

/// A pull that goes on. Dropped, it has failed.
pub(super) struct Pulling {
    kept: Kept,
    number: u64,
}

impl Kept {
    /// Reads what was kept. A file that is damaged counts as none, which is logged.
    ///
    /// # Errors
    /// See [`KeptError`].
    pub fn open(file: &Path) -> Result<Self, KeptError> {
        let pulls = read(file)?;
        let state = State { pulls, ..State::default() };
        let inner = Inner { file: file.to_owned(), state: Mutex::new(state), writing: tokio::sync::Mutex::default() };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Returns the references that credentials are kept for.
    #[must_use]
    pub fn references(&self) -> Vec<String> {
        self.state().pulls.keys().cloned().collect()
    }

    /// Takes note of a pull that begins. `None` where its secrets are longer than any registry's.
    pub(super) fn begin(&self, reference: &Reference, credentials: Credentials) -> Option<Pulling> {
        let length = match &credentials {
            Credentials::Basic { username, password } => username.len() + password.len(),
            Credentials::Identity(token) | Credentials::Bearer(token) => token.len(),
        };
        if length > SECRET_BYTES {
            tracing::warn!(image = reference.canonical(), length, "kubelet's credentials are too long to be kept");
            return None;
        }
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        state.pulling.push_front((number, reference.clone(), credentials));
        state.pulling.truncate(MOST_PULLING);
        Some(Pulling { kept: self.clone(), number })
    }

    /// Forgets an image, by its reference or by what the runtime calls it.
    pub(super) async fn forget(&self, image: &str) {
        let reference = image.parse().map(|reference: Reference| reference.canonical()).unwrap_or_default();
        let is_changed = {
            let pulls = &mut self.state().pulls;
            let before = pulls.len();
            pulls.retain(|key, pull| *key != reference && (pull.image.is_empty() || pull.image != image));
            pulls.len() != before
        };
        if is_changed {
            self.write().await;
        }
    }

    async fn write(&self) {
        let turn = self.inner.writing.lock().await;
        let written = Written { version: VERSION, pulls: self.state().pulls.clone() };
        let file = self.inner.file.clone();
        let outcome = tokio::task::spawn_blocking(move || write(&file, &written)).await;
        drop(turn);
        if let Err(error) = outcome.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into())) {
            let file = self.inner.file.display();
            tracing::warn!(%error, %file, "kubelet's credentials are not kept over a restart");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many there are: secrets stay out of logs.
impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").field("file", &self.inner.file).field("pulls", &self.state().pulls.len()).finish()
    }
}

#[async_trait]
impl Keychain for Kept {
    fn name(&self) -> &str {
        "kubelet's pulls"
    }

    async fn credentials(&self, registry: &str, repository: &str) -> Vec<Credentials> {
        let state = self.state();
        let is_meant = |reference: &Reference| reference.registry() == registry && reference.repository() == repository;
        let going_on = state.pulling.iter().filter(|(_, reference, _)| is_meant(reference));
        let mut found: Vec<Credentials> = going_on.map(|(_, _, credentials)| credentials.clone()).collect();
        let mut kept: Vec<&Pull> = state
            .pulls
            .iter()
            .filter(|(key, pull)| pull.is_good() && key.parse().is_ok_and(|reference| is_meant(&reference)))
            .map(|(_, pull)| pull)
            .collect();
        kept.sort_by_key(|pull| std::cmp::Reverse(pull.since));
        found.extend(kept.into_iter().map(|pull| pull.credentials.clone().into()));
        found
    }
}

impl Pulling {
    /// The pull has succeeded; `image` is what the runtime calls what it has pulled.
    pub(super) async fn succeeded(self, image: &str) {
        {
            let mut state = self.kept.state();
            let Some(at) = state.pulling.iter().position(|(number, _, _)| *number == self.number) else { return };
            let Some((_, reference, credentials)) = state.pulling.remove(at) else { return };
            let pull = Pull { since: now(), image: image.chars().take(256).collect(), credentials: credentials.into() };
            state.pulls.insert(reference.canonical(), pull);
            bound(&mut state.pulls);
        }
        self.kept.write().await;
    }
}

impl Drop for Pulling {
    fn drop(&mut self) {
        self.kept.state().pulling.retain(|(number, _, _)| *number != self.number);
    }
}

impl Pull {
    fn is_good(&self) -> bool {
        // A clock that was set back makes nothing older.
        now().saturating_sub(self.since) < LIVE.as_secs()
    }
}

impl From<Credentials> for Secret {
    fn from(credentials: Credentials) -> Self {
        match credentials {
            Credentials::Basic { username, password } => Self::Basic { username, password },
            Credentials::Identity(token) => Self::Identity(token),
            Credentials::Bearer(token) => Self::Bearer(token),
        }
    }
}

impl From<Secret> for Credentials {
    fn from(secret: Secret) -> Self {
        match secret {
            Secret::Basic { username, password } => Self::Basic { username, password },
            Secret::Identity(token) => Self::Identity(token),
            Secret::Bearer(token) => Self::Bearer(token),
        }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Drops what is old, and the oldest of too many.
fn bound(pulls: &mut BTreeMap<String, Pull>) {
    pulls.retain(|_, pull| pull.is_good());
    while pulls.len() > MOST {
        let oldest = pulls.iter().min_by_key(|(_, pull)| pull.since).map(|(key, _)| key.clone());
        pulls.remove(&oldest.unwrap_or_default());
    }
}

fn read(file: &Path) -> Result<BTreeMap<String, Pull>, KeptError> {
    let failed = |source| KeptError::File { path: file.to_owned(), source };
    let mut text = Vec::new();
    match std::fs::File::open(file) {
        Ok(open) => open.take(FILE_BYTES).read_to_end(&mut text).map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(failed(error)),
    };
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    // The error's own words may quote a secret.
    match serde_json::from_slice::<Versioned>(&text) {
        Ok(Versioned { version: VERSION }) => {}
        Ok(Versioned { version }) if version > VERSION => {
            return Err(KeptError::Version { path: file.to_owned(), version });
        }
        _ => {
            tracing::warn!(file = %file.display(), "the file with kubelet's credentials is damaged, and begun anew");
            return Ok(BTreeMap::new());
        }
    }
    match serde_json::from_slice::<Written>(&text) {
        Ok(mut written) => {
            bound(&mut written.pulls);
            Ok(written.pulls)
        }
        Err(_) => {
            tracing::warn!(file = %file.display(), "the file with kubelet's credentials is damaged, and begun anew");
            Ok(BTreeMap::new())
        }
    }
}

fn write(file: &Path, written: &Written) -> io::Result<()> {
    let directory = file.parent().unwrap_or(Path::new("/"));
    // With mode 0600, as temporary files have it.
    let mut beside = tempfile::NamedTempFile::new_in(directory)?;
    beside.write_all(&serde_json::to_vec(written)?)?;
    beside.as_file().sync_all()?;
    beside.persist(file).map_err(|error| error.error)?;
    std::fs::File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn basic(password: &str) -> Credentials {
        Credentials::Basic { username: "u".into(), password: password.into() }
    }

    async fn pull(kept: &Kept, reference: &str, credentials: Credentials, image: &str) {
        kept.begin(&reference.parse().unwrap(), credentials).unwrap().succeeded(image).await;
    }

    #[tokio::test]
    async fn a_pull_counts_for_its_repository_and_over_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE);
        let kept = Kept::open(&file).unwrap();
        pull(&kept, "r.example/a/b:1", basic("one"), "sha256:1").await;
        pull(&kept, "alpine", Credentials::Identity("two".into()), "").await;
        pull(&kept, "r.example/t:1", Credentials::Bearer("three".into()), "").await;
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        for kept in [&kept, &Kept::open(&file).unwrap()] {
            for (registry, repository, expected) in [
                ("r.example", "a/b", vec![basic("one")]),
                ("docker.io", "library/alpine", vec![Credentials::Identity("two".into())]),
                ("r.example", "t", vec![Credentials::Bearer("three".into())]),
                ("r.example", "a", vec![]),
                ("r.example", "a/b/c", vec![]),
                ("other.example", "a/b", vec![]),
            ] {
                assert_eq!(kept.credentials(registry, repository).await, expected, "{registry}/{repository}");
            }
            assert!(!format!("{kept:?}").contains("one"));
        }
        // By what the runtime calls it, and by its name; nothing else.
        for image in ["sha256:2", "", "sha256:1", "docker.io/library/alpine:latest"] {
            kept.forget(image).await;
        }
        assert_eq!(Kept::open(&file).unwrap().references(), ["r.example/t:1"]);
    }

    #[tokio::test]
    async fn a_pull_that_fails_leaves_what_was_kept() {
        let directory = tempfile::tempdir().unwrap();
        let kept = Kept::open(&directory.path().join(FILE)).unwrap();
        pull(&kept, "r.example/a:1", basic("right"), "").await;
        let pulling = kept.begin(&"r.example/a:1".parse().unwrap(), basic("wrong")).unwrap();
        assert_eq!(kept.credentials("r.example", "a").await, [basic("wrong"), basic("right")]);
        drop(pulling);
        assert_eq!(kept.credentials("r.example", "a").await, [basic("right")]);
        pull(&kept, "r.example/a:1", basic("newer"), "").await;
        assert_eq!(kept.credentials("r.example", "a").await, [basic("newer")]);
    }

    #[tokio::test]
    async fn number_age_and_length_are_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE);
        let pulls = (0..MOST + 10).map(|n| {
            let since = if n == 0 { now() - LIVE.as_secs() } else { now() - 5000 + n as u64 };
            (format!("r.example/a{n}:1"), Pull { since, image: String::new(), credentials: basic("x").into() })
        });
        write(&file, &Written { version: VERSION, pulls: pulls.collect() }).unwrap();
        let kept = Kept::open(&file).unwrap();
        assert_eq!(kept.references().len(), MOST);
        assert!(kept.credentials("r.example", "a0").await.is_empty());
        pull(&kept, "r.example/new:1", basic("x"), "").await;
        assert_eq!(kept.references().len(), MOST);
        assert_eq!(kept.credentials("r.example", "new").await, [basic("x")]);
        assert!(kept.begin(&"r.example/a:1".parse().unwrap(), basic(&"x".repeat(SECRET_BYTES))).is_none());
        let many: Vec<_> = (0..2 * MOST_PULLING)
            .filter_map(|_| kept.begin(&"r.example/many:1".parse().unwrap(), basic("x")))
            .collect();
        assert_eq!(kept.state().pulling.len(), MOST_PULLING);
        drop(many);
        assert_eq!(kept.state().pulling.len(), 0);
    }

    #[test]
    fn a_damaged_file_is_none_and_a_newer_one_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE);
        for text in ["", "hunter2", "{}", "{\"version\":1,\"pulls\":{\"a\":\"hunter2\"}}", "{\"version\":0}"] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(Kept::open(&file).unwrap().references().len(), 0, "{text}");
        }
        std::fs::write(&file, "{\"version\":2,\"pulls\":7}").unwrap();
        let error = Kept::open(&file).unwrap_err();
        assert!(matches!(error, KeptError::Version { version: 2, .. }), "{error}");
        let error = Kept::open(Path::new("/dev/null/x")).unwrap_err();
        assert!(matches!(error, KeptError::File { .. }), "{error}");
    }
}
