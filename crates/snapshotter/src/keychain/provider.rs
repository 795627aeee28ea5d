//! kubelet's credential provider plugins: programs of cloud providers that are asked for credentials of an image, by the
//! configuration that kubelet has (`--image-credential-provider-config`, `--image-credential-provider-bin-dir`).
//!
//! A plugin gets a `CredentialProviderRequest` in JSON on its standard input, and answers with a
//! `CredentialProviderResponse` on its standard output. Its answer counts for as long as it says. Neither is logged, nor
//! is what it writes to standard error, which may quote them.
//!
//! Source: Kubernetes' documentation, "Configure a kubelet image credential provider" and "kubelet CredentialProvider (v1)".
//!
//! What is left out: `tokenAttributes`, with which a plugin is given a token of the pod's service account. Which pod it is
//! nobody knows here.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    io::Read as _,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use loris_oci::auth::{Credentials, Keychain};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::Command,
};

use super::{pattern::Pattern, yaml};

/// Largest configuration, in bytes.
const FILE_BYTES: u64 = 1 << 20;
/// Largest answer, in bytes.
const ANSWER_BYTES: u64 = 1 << 20;
/// How long a plugin may take, as with kubelet.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most answers that are kept for each plugin.
const MOST_CACHED: usize = 1024;
/// An answer that is refused is asked for anew after so long, whatever it said.
const REFUSABLE: Duration = Duration::from_secs(30);
/// Longest time that an answer is kept.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);

/// Where the plugins are. None are asked unless both are given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// kubelet's `CredentialProviderConfig`.
    pub config_path: Option<PathBuf>,
    /// The directory with the programs.
    pub bin_dir: Option<PathBuf>,
}

/// Why plugins can't be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProviderError {
    /// The configuration can't be read.
    #[error("{path} can't be read: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The configuration does not say what it must.
    #[error("{path}: {detail}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// One of the two settings is missing.
    #[error("credential providers need both a configuration and a directory of programs; the {missing} is not given")]
    Half {
        /// Which.
        missing: &'static str,
    },
}

/// All plugins of a configuration.
#[derive(Debug)]
pub struct Providers(Vec<Provider>);

struct Provider {
    name: String,
    program: PathBuf,
    images: Vec<Pattern>,
    default_life: Duration,
    api: String,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    cache: Mutex<HashMap<String, Cached>>,
    /// Held while the program runs: who waits finds its answer in the cache.
    running: tokio::sync::Mutex<()>,
    patience: Duration,
}

#[derive(Clone)]
struct Cached {
    since: Instant,
    life: Duration,
    found: Vec<(Pattern, Credentials)>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    api_version: String,
    kind: String,
    #[serde(default)]
    providers: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    name: String,
    #[serde(default)]
    match_images: Vec<String>,
    default_cache_duration: Option<String>,
    api_version: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
    token_attributes: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct Variable {
    name: String,
    value: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Asked<'a> {
    kind: &'static str,
    api_version: &'a str,
    image: &'a str,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    kind: String,
    api_version: String,
    cache_key_type: CacheKey,
    cache_duration: Option<String>,
    #[serde(default)]
    auth: Option<BTreeMap<String, Account>>,
}

#[derive(Clone, Copy, Deserialize)]
enum CacheKey {
    Image,
    Registry,
    Global,
}

#[derive(Deserialize)]
struct Account {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

impl Providers {
    /// Reads the configuration; `None` where there is to be none. Starts no program. Blocks.
    ///
    /// # Errors
    /// See [`ProviderError`].
    pub fn read(settings: &Settings) -> Result<Option<Self>, ProviderError> {
        let (file, programs) = match (&settings.config_path, &settings.bin_dir) {
            (Some(file), Some(programs)) => (file, programs),
            (None, None) => return Ok(None),
            (None, Some(_)) => return Err(ProviderError::Half { missing: "configuration" }),
            (Some(_), None) => return Err(ProviderError::Half { missing: "directory" }),
        };
        let invalid = |detail: String| ProviderError::Invalid { path: file.clone(), detail };
        let mut text = String::new();
        let outcome = std::fs::File::open(file).and_then(|file| file.take(FILE_BYTES + 1).read_to_string(&mut text));
        outcome.map_err(|source| ProviderError::File { path: file.clone(), source })?;
        if text.len() as u64 > FILE_BYTES {
            return Err(invalid(format!("it is larger than {FILE_BYTES} bytes")));
        }
        let config: Config =
            yaml::parse(&text).map_err(|detail| invalid(format!("not a CredentialProviderConfig: {detail}")))?;
        let version = config.api_version.strip_prefix("kubelet.config.k8s.io/");
        if config.kind != "CredentialProviderConfig" || !version.is_some_and(is_version) {
            let detail = format!(
                "it is a {:?} of {:?}, not a CredentialProviderConfig of kubelet.config.k8s.io/v1 or v1beta1",
                config.kind, config.api_version
            );
            return Err(invalid(detail));
        }
        let mut providers: Vec<Provider> = Vec::new();
        for entry in config.providers {
            if providers.iter().any(|other| other.name == entry.name) {
                return Err(invalid(format!("the provider {:?} is there twice", entry.name)));
            }
            providers.push(Provider::new(entry, programs).map_err(invalid)?);
        }
        Ok(Some(Self(providers)))
    }
}

fn is_version(version: &str) -> bool {
    matches!(version, "v1" | "v1beta1" | "v1alpha1")
}

#[async_trait]
impl Keychain for Providers {
    fn name(&self) -> &str {
        "kubelet's credential providers"
    }

    async fn credentials(&self, registry: &str, repository: &str) -> Vec<Credentials> {
        let meant = self.0.iter().filter(|provider| provider.is_for(registry, repository));
        let asked = meant.map(|provider| provider.credentials(registry, repository));
        futures_util::future::join_all(asked).await.into_iter().flatten().collect()
    }

    fn refused(&self, registry: &str, repository: &str, credentials: &Credentials) {
        for provider in self.0.iter().filter(|provider| provider.is_for(registry, repository)) {
            let has = |cached: &Cached| cached.found.iter().any(|(_, found)| found == credentials);
            provider.cache().retain(|_, cached| cached.since.elapsed() < REFUSABLE || !has(cached));
        }
    }
}

impl Provider {
    fn new(entry: Entry, programs: &Path) -> Result<Self, String> {
        let name = entry.name;
        let wrong = |detail: &str| format!("the provider {name:?} {detail}");
        if name.is_empty() || matches!(name.as_str(), "." | "..") || name.contains(['/', ' ', '\0']) {
            return Err(wrong("must have the name of a program, without a path"));
        }
        if entry.token_attributes.is_some() {
            return Err(wrong("has tokenAttributes, which are not supported: pods are not known here"));
        }
        if entry.match_images.is_empty() {
            return Err(wrong("must have matchImages"));
        }
        if !entry.api_version.strip_prefix("credentialprovider.kubelet.k8s.io/").is_some_and(is_version) {
            return Err(wrong("must have an apiVersion credentialprovider.kubelet.k8s.io/v1 or v1beta1"));
        }
        let life = entry.default_cache_duration.as_deref().map(duration);
        let Some(default_life) = life.unwrap_or(Some(Duration::ZERO)) else {
            return Err(wrong("must have a defaultCacheDuration such as 12h"));
        };
        let environment = entry.env.unwrap_or_default().into_iter().map(|variable| (variable.name, variable.value));
        Ok(Self {
            program: programs.join(&name),
            images: entry.match_images.iter().map(|text| Pattern::new(text)).collect(),
            default_life,
            api: entry.api_version,
            arguments: entry.args.unwrap_or_default(),
            environment: environment.collect(),
            cache: Mutex::default(),
            running: tokio::sync::Mutex::default(),
            patience: PATIENCE,
            name,
        })
    }

    fn is_for(&self, registry: &str, repository: &str) -> bool {
        self.images.iter().any(|pattern| pattern.matches(registry, repository))
    }

    async fn credentials(&self, registry: &str, repository: &str) -> Vec<Credentials> {
        let image = format!("{registry}/{repository}");
        let mut found = self.cached(registry, &image);
        if found.is_none() {
            let _turn = self.running.lock().await;
            // Perhaps the one who was before us has asked for the same.
            found = self.cached(registry, &image);
            if found.is_none() {
                found = self.ask(registry, &image).await;
            }
        }
        let mut found = found.unwrap_or_default();
        found.retain(|(pattern, _)| pattern.matches(registry, repository));
        found.sort_by_key(|(pattern, _)| std::cmp::Reverse(pattern.exactness()));
        found.into_iter().map(|(_, credentials)| credentials).collect()
    }

    /// Looks for an answer that is good: for the image, for its registry, for all.
    fn cached(&self, registry: &str, image: &str) -> Option<Vec<(Pattern, Credentials)>> {
        let mut cache = self.cache();
        cache.retain(|_, cached| cached.since.elapsed() < cached.life);
        // An image's name has a slash, a registry's has none.
        [image, registry, ""].iter().find_map(|key| Some(cache.get(*key)?.found.clone()))
    }

    async fn ask(&self, registry: &str, image: &str) -> Option<Vec<(Pattern, Credentials)>> {
        let answer = match tokio::time::timeout(self.patience, self.run(image)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(detail)) => {
                tracing::warn!(provider = self.name, image, detail, "the credential provider failed");
                return None;
            }
            Err(_) => {
                let seconds = self.patience.as_secs();
                tracing::warn!(provider = self.name, image, seconds, "the credential provider did not answer in time");
                return None;
            }
        };
        let life = match answer.cache_duration.as_deref().map(duration) {
            Some(Some(life)) => life,
            Some(None) => {
                tracing::warn!(
                    provider = self.name,
                    "the credential provider's cacheDuration is none; nothing is kept"
                );
                Duration::ZERO
            }
            None => self.default_life,
        };
        let accounts = answer.auth.unwrap_or_default().into_iter();
        let found: Vec<(Pattern, Credentials)> = accounts
            .map(|(key, Account { username, password })| {
                (Pattern::new(&key), Credentials::Basic { username, password })
            })
            .collect();
        if !life.is_zero() {
            let key = match answer.cache_key_type {
                CacheKey::Image => image,
                CacheKey::Registry => registry,
                CacheKey::Global => "",
            };
            let mut cache = self.cache();
            if cache.len() >= MOST_CACHED {
                cache.clear();
            }
            let cached = Cached { since: Instant::now(), life: life.min(LONGEST), found: found.clone() };
            cache.insert(key.to_owned(), cached);
        }
        Some(found)
    }

    /// Runs the program. What is wrong is said without a word of its own.
    async fn run(&self, image: &str) -> Result<Answer, String> {
        let asked = Asked { kind: "CredentialProviderRequest", api_version: &self.api, image };
        let asked = serde_json::to_vec(&asked).map_err(|error| error.to_string())?;
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("{} can't be started: {error}", self.program.display()))?;
        if let Some(mut input) = child.stdin.take() {
            // One that ends without reading is judged by its answer.
            let _ = input.write_all(&asked).await;
        }
        let mut text = Vec::new();
        if let Some(output) = child.stdout.take() {
            let read = output.take(ANSWER_BYTES + 1).read_to_end(&mut text).await;
            read.map_err(|error| format!("its answer can't be read: {error}"))?;
        }
        if text.len() as u64 > ANSWER_BYTES {
            return Err(format!("its answer has more than {ANSWER_BYTES} bytes"));
        }
        let status = child.wait().await.map_err(|error| error.to_string())?;
        if !status.success() {
            return Err(format!("it ended with {status}"));
        }
        let answer: Answer =
            serde_json::from_slice(&text).map_err(|_| "its answer is not a CredentialProviderResponse".to_owned())?;
        if answer.kind != "CredentialProviderResponse" || answer.api_version != self.api {
            return Err(format!("its answer is not a CredentialProviderResponse of {}", self.api));
        }
        Ok(answer)
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, HashMap<String, Cached>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which program, and nothing of what it is given or answers.
impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Provider").field("program", &self.program).finish_non_exhaustive()
    }
}

/// Reads a duration as Go writes it: `12h`, `1h30m0s`, `1.5h`, `0`. `None` for what is none, or negative.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim().strip_prefix('+').unwrap_or(text.trim());
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    let mut seconds = 0.0_f64;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let value: f64 = rest[..number].parse().ok()?;
        let unit_end =
            rest[number..].find(|c: char| c.is_ascii_digit() || c == '.').map_or(rest.len(), |at| number + at);
        let unit = match &rest[number..unit_end] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        seconds += value * unit;
        rest = &rest[unit_end..];
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests;
