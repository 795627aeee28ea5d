//! From flags, variables and a file to what the snapshotter is started with, and again when the file has changed.

use std::{
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use clap::{ArgMatches, parser::ValueSource};
use loris_lazy::{Completion, FetchPolicy, OpenOptions, Store, StoreOptions, Trust};
use loris_oci::{
    auth::{Environment, Keychain},
    registry::{Client, Config},
};
use loris_snapshotter::{
    ahead,
    config::{self, File, Given, Key, Kind, Origin, Settings, Settled, Value, When, keys},
    keychain,
};

use crate::{
    Global,
    failure::Usage,
    logging,
    opened::{PATIENCE, open_store},
};

/// The file that is read where none is named.
pub(super) const FILE: &str = "/etc/loris/snapshotter.toml";
/// Largest file, in bytes.
const MOST_BYTES: u64 = 1 << 20;

/// What a flag says.
#[derive(Clone, Copy)]
enum Says {
    /// What stands behind it.
    Text,
    /// This, when it is there.
    Is(bool),
    /// What stands behind it, in stargz-snapshotter's words for levels.
    Level,
}

/// Flags by their names in this program, and which keys they are, and the variable that is as good. Later ones win.
const FLAGS: &[(&str, &str, Says, Option<&str>)] = &[
    ("address", "address", Says::Text, None),
    ("root", "root", Says::Text, None),
    ("open_timeout", "open_timeout", Says::Text, None),
    ("read_timeout", "read_timeout", Says::Text, Some("LORIS_READ_TIMEOUT")),
    ("no_prefetch", "prefetch", Says::Is(false), None),
    ("complete", "complete", Says::Text, None),
    ("complete_rate", "complete_rate", Says::Text, None),
    ("engine", "engine", Says::Text, Some("LORIS_ENGINE")),
    ("mount_option", "mount_options", Says::Text, None),
    ("allow_unverified", "allow_unverified", Says::Is(true), None),
    ("index_trust", "index_trust", Says::Text, Some("LORIS_INDEX_TRUST")),
    ("memory", "memory", Says::Text, None),
    ("metrics_address", "metrics_address", Says::Text, None),
    ("cache_dir", "cache.dir", Says::Text, Some("LORIS_CACHE_DIR")),
    ("cache_quota", "cache.quota", Says::Text, Some("LORIS_CACHE_QUOTA")),
    ("paranoid", "cache.paranoid", Says::Is(true), None),
    ("log", "log.level", Says::Text, Some("LORIS_LOG")),
    ("log_level", "log.level", Says::Level, None),
    ("log_format", "log.format", Says::Text, None),
    ("plain_http", "registries.plain_http", Says::Is(true), None),
    ("tls_verify", "registries.tls_verify", Says::Text, None),
    ("ca", "registries.ca", Says::Text, None),
    ("cert_dir", "registries.cert_dir", Says::Text, None),
    ("hosts_dir", "registries.hosts_dirs", Says::Text, None),
    ("stargz_config", "registries.stargz_config", Says::Text, None),
    ("retries", "registries.retries", Says::Text, None),
    ("stall_timeout", "registries.stall_timeout", Says::Text, None),
    ("read_deadline", "registries.read_deadline", Says::Text, None),
    ("authfile", "credentials.authfile", Says::Text, None),
];

/// What is in force, and what it was made of.
pub(super) struct Configured {
    pub(super) settled: Settled,
    given: Vec<Given>,
    /// The file that was named.
    named: Option<PathBuf>,
}

impl Configured {
    /// Reads everything. A successor, which has `last_good`, goes on with that where the file is wrong by now: readers wait
    /// for it.
    pub(super) fn read(matches: &ArgMatches, last_good: Option<&Path>) -> anyhow::Result<Self> {
        let given = given(matches)?;
        let named = matches.get_one::<PathBuf>("config").cloned();
        let settled = settle(named.as_deref(), &given);
        let settled = match (settled, last_good) {
            (Err(error), Some(last)) => {
                let text = read_file(last, true)?;
                tracing::error!("{error:#}; what it said before goes on to count");
                checked(config::settle(text.as_deref().map(|text| File { path: last, text }), &given))?
            }
            (settled, _) => settled?,
        };
        Ok(Self { settled, given, named })
    }

    /// Reads the file again.
    pub(super) fn again(&self) -> anyhow::Result<Self> {
        let settled = settle(self.named.as_deref(), &self.given)?;
        Ok(Self { settled, given: self.given.clone(), named: self.named.clone() })
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settled.settings
    }

    /// Says what should be said of the file.
    pub(super) fn warn(&self) {
        for warning in self.settled.warned() {
            tracing::warn!("{warning}");
        }
    }

    /// Says which credentials there are that no file has.
    pub(super) fn keychains(&self) -> keychain::Settings {
        let Settings { cri_keychain, kubeconfig_keychain, credential_provider, .. } = self.settings().clone();
        keychain::Settings { cri: cri_keychain, kubeconfig: kubeconfig_keychain, provider: credential_provider }
    }

    /// Logs as it says.
    pub(super) fn log(&self) {
        let log = &self.settings().log;
        logging::change(&log.level, log.json);
    }

    pub(super) fn store(&self) -> anyhow::Result<Store> {
        let Settings { memory, cache, .. } = self.settings();
        let options = StoreOptions {
            memory_bytes: *memory,
            quota_bytes: cache.quota,
            paranoid: cache.paranoid,
            ..StoreOptions::default()
        };
        open_store(cache.dir.as_deref(), &options)
    }

    pub(super) fn open(&self) -> OpenOptions {
        let trust = if self.settings().allow_unverified { Trust::Anything } else { Trust::Vouched };
        let index_trust = self.settings().index_trust;
        OpenOptions { trust, index_trust, policy: FetchPolicy::MOUNT, ..OpenOptions::default() }
    }

    pub(super) fn patience(&self) -> Duration {
        self.settings().open_timeout
    }

    pub(super) fn ahead(&self) -> ahead::Settings {
        let Settings { prefetch, complete, complete_rate, .. } = self.settings();
        let complete = (*complete != When::Never).then_some(Completion {
            only_idle: *complete == When::Idle,
            bytes_per_second: *complete_rate,
            patience: PATIENCE,
        });
        ahead::Settings { prefetch: *prefetch, complete }
    }

    /// Returns what asks registries.
    pub(super) fn client(&self, global: &Global, keychains: Vec<Arc<dyn Keychain>>) -> anyhow::Result<Client> {
        let registries = &self.settings().registries;
        let credentials = &self.settings().credentials;
        let mut config = Config {
            keychains,
            plain_http: registries.plain_http,
            tls_verify: registries.tls_verify,
            insecure: registries.insecure.clone(),
            ca_files: registries.ca.clone(),
            cert_dir: registries.cert_dir.clone(),
            hosts_dirs: registries.hosts_dirs.clone(),
            stargz_config: registries.stargz_config.clone(),
            retries: registries.retries,
            stall_timeout: registries.stall_timeout,
            deadline: registries.read_deadline,
            ..global.access.config()
        };
        if !registries.mirrors.is_empty() {
            config.stargz_text = self.settled.file.clone();
        }
        if !credentials.docker {
            let (runtime_dir, config_home, docker_config, home) = (None, None, None, None);
            let Environment { auth_file, path, .. } = config.environment;
            config.environment = Environment { auth_file, runtime_dir, config_home, docker_config, home, path };
        }
        if let Some(file) = &credentials.authfile {
            config.environment.auth_file = Some(file.clone());
        }
        Ok(Client::new(config)?)
    }
}

/// Reads the file, and puts it together with what was given beside it.
pub(super) fn settle(named: Option<&Path>, given: &[Given]) -> anyhow::Result<Settled> {
    let path = named.unwrap_or(Path::new(FILE));
    let text = read_file(path, named.is_some())?;
    checked(config::settle(text.as_deref().map(|text| File { path, text }), given))
}

/// Checks what the configuration itself can't.
fn checked(settled: Result<Settled, config::ConfigError>) -> anyhow::Result<Settled> {
    let settled = settled.map_err(|error| Usage(error.to_string()))?;
    if let Err(detail) = logging::filter(&settled.settings.log.level) {
        return Err(Usage(format!("{}: log.level: {detail}", settled.place("log.level"))).into());
    }
    Ok(settled)
}

fn read_file(path: &Path, must_be: bool) -> anyhow::Result<Option<String>> {
    let reading = || format!("reading {}", path.display());
    let mut bytes = Vec::new();
    match std::fs::File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !must_be => return Ok(None),
        Err(error) => return Err(Usage(format!("{}: {error}", reading())).into()),
        Ok(_) => {}
    }
    anyhow::ensure!(bytes.len() as u64 <= MOST_BYTES, "{}: it is longer than {MOST_BYTES} bytes", reading());
    String::from_utf8(bytes).map(Some).with_context(reading)
}

/// Returns what flags and variables say, variables first.
fn given(matches: &ArgMatches) -> anyhow::Result<Vec<Given>> {
    let mut given = Vec::new();
    for wanted in [ValueSource::EnvVariable, ValueSource::CommandLine] {
        for (id, name, says, variable) in FLAGS {
            // Not every verb has all of them.
            let is_known = matches.try_contains_id(id).is_ok();
            if !is_known || matches.value_source(id) != Some(wanted) {
                continue;
            }
            let Some(key) = keys::key(name) else { continue };
            let flag = format!("--{}", id.replace('_', "-"));
            let value = said(matches, id, key, *says).map_err(|detail| Usage(format!("{flag}: {detail}")))?;
            let origin = match (wanted, variable) {
                (ValueSource::EnvVariable, Some(variable)) => Origin::Environment(variable),
                _ => Origin::Flag(flag),
            };
            given.push(Given { key, value, origin });
        }
    }
    Ok(given)
}

fn said(matches: &ArgMatches, id: &str, key: &Key, says: Says) -> Result<Value, String> {
    let raw = matches.get_raw(id).into_iter().flatten();
    let texts: Vec<String> = raw.map(|text| text.to_string_lossy().into_owned()).collect();
    match (says, key.kind) {
        (Says::Is(value), _) => Ok(Value::Boolean(value)),
        (Says::Text, Kind::Texts) => Ok(Value::Texts(texts)),
        (Says::Text, kind) => kind.of_text(texts.last().map_or("", String::as_str)),
        (Says::Level, kind) => kind.of_text(level(texts.last().map_or("", String::as_str))),
    }
}

/// stargz-snapshotter has words for levels that are others here.
pub(super) fn level(text: &str) -> &str {
    match text {
        "panic" | "fatal" => "error",
        "warning" => "warn",
        other => other,
    }
}
