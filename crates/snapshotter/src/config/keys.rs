//! Every key of ours: one line of a table, from which files and flags are read, what is in force is printed, and
//! documentation is checked.

use std::{num::NonZeroU64, path::PathBuf, time::Duration};

use loris_lazy::IndexTrust;
use loris_mount::engine::Engine;

use super::{
    settings::{Settings, When},
    value::{Kind, Value},
};

/// The formats that there are.
pub const FORMATS: &[&str] = &["estargz", "zstdchunked"];
const ENGINES: &[&str] = &["fanotify", "erofs-fuse", "erofs-loop", "fuse"];
const WHENS: &[&str] = &["always", "idle", "never"];
const TRUSTS: &[&str] = &["manifest", "repository", "any"];
const LOG_FORMATS: &[&str] = &["text", "json"];
const DAY: i64 = 86_400;

/// A key of the configuration.
#[derive(Debug)]
pub struct Key {
    /// Its name, with those of the tables that it is in: `cache.quota`.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// Whether a change counts without a restart.
    pub reloads: bool,
    pub(super) set: fn(&mut Settings, Value),
    pub(super) get: fn(&Settings) -> Option<Value>,
}

impl Key {
    /// Returns what it has, if anything.
    #[must_use]
    pub fn value(&self, settings: &Settings) -> Option<Value> {
        (self.get)(settings)
    }
}

/// Finds a key.
#[must_use]
pub fn key(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// A line of the table: `set` gets the value as what the field is.
macro_rules! key {
    ($name:literal, $kind:expr, $when:ident, $take:ident / $give:ident, $($field:ident).+) => {
        Key {
            name: $name,
            kind: $kind,
            reloads: stringify!($when).len() == "live".len(),
            set: |settings, value| settings.$($field).+ = $take(value),
            get: |settings| $give(&settings.$($field).+),
        }
    };
}

/// All of them. Those of a table stand together.
pub const KEYS: &[Key] = &[
    key!("root", Kind::Path, restart, path / of_path, root),
    key!("address", Kind::Path, restart, path / of_path, address),
    key!("open_timeout", Kind::Seconds(1, DAY), live, seconds / of_seconds, open_timeout),
    key!("read_timeout", Kind::Seconds(1, DAY), restart, seconds / of_seconds, read_timeout),
    key!("prefetch", Kind::Boolean, live, boolean / of_boolean, prefetch),
    key!("complete", Kind::Choice(WHENS), live, when / of_when, complete),
    key!("complete_rate", Kind::Size, live, rate / of_rate, complete_rate),
    key!("engine", Kind::Choice(ENGINES), restart, engine / of_engine, engine),
    key!("mount_options", Kind::Texts, restart, texts / of_texts, mount_options),
    key!("allow_unverified", Kind::Boolean, live, boolean / of_boolean, allow_unverified),
    key!("index_trust", Kind::Choice(TRUSTS), live, trust / of_trust, index_trust),
    key!("formats", Kind::Choices(FORMATS), restart, texts / of_texts, formats),
    key!("memory", Kind::Size, restart, size / of_size, memory),
    key!("metrics_address", Kind::Text, restart, some_text / of_some_text, metrics_address),
    key!("cache.dir", Kind::Path, restart, some_path / of_some_path, cache.dir),
    key!("cache.quota", Kind::Size, restart, some_size / of_some_size, cache.quota),
    key!("cache.paranoid", Kind::Boolean, restart, boolean / of_boolean, cache.paranoid),
    key!("log.level", Kind::Text, live, text / of_text, log.level),
    key!("log.format", Kind::Choice(LOG_FORMATS), live, is_json / of_json, log.json),
    key!("containerd.address", Kind::Path, restart, path / of_path, containerd.address),
    key!("containerd.complete_namespaces", Kind::Texts, restart, texts / of_texts, containerd.complete_namespaces),
    key!("registries.hosts_dirs", Kind::Texts, live, paths / of_paths, registries.hosts_dirs),
    key!("registries.insecure", Kind::Texts, live, texts / of_texts, registries.insecure),
    key!("registries.plain_http", Kind::Boolean, live, boolean / of_boolean, registries.plain_http),
    key!("registries.tls_verify", Kind::Boolean, live, boolean / of_boolean, registries.tls_verify),
    key!("registries.ca", Kind::Texts, live, paths / of_paths, registries.ca),
    key!("registries.cert_dir", Kind::Path, live, some_path / of_some_path, registries.cert_dir),
    key!("registries.stargz_config", Kind::Path, live, some_path / of_some_path, registries.stargz_config),
    key!("registries.retries", Kind::Number(0, 100), live, count / of_count, registries.retries),
    key!("registries.stall_timeout", Kind::Seconds(1, DAY), live, seconds / of_seconds, registries.stall_timeout),
    key!("registries.read_deadline", Kind::Seconds(1, DAY), live, seconds / of_seconds, registries.read_deadline),
    key!("credentials.docker", Kind::Boolean, live, boolean / of_boolean, credentials.docker),
    key!("credentials.authfile", Kind::Path, live, some_path / of_some_path, credentials.authfile),
    key!(
        "kubeconfig_keychain.enable_keychain",
        Kind::Boolean,
        restart,
        boolean / of_boolean,
        kubeconfig_keychain.enable_keychain
    ),
    key!(
        "kubeconfig_keychain.kubeconfig_path",
        Kind::Path,
        restart,
        some_path / of_some_path,
        kubeconfig_keychain.kubeconfig_path
    ),
    key!("cri_keychain.enable_keychain", Kind::Boolean, restart, boolean / of_boolean, cri_keychain.enable_keychain),
    key!("cri_keychain.image_service_path", Kind::Path, restart, path / of_path, cri_keychain.image_service_path),
    key!("cri_keychain.listen_path", Kind::Path, restart, some_path / of_some_path, cri_keychain.listen_path),
    key!(
        "credential_provider.config_path",
        Kind::Path,
        restart,
        some_path / of_some_path,
        credential_provider.config_path
    ),
    key!("credential_provider.bin_dir", Kind::Path, restart, some_path / of_some_path, credential_provider.bin_dir),
];

// The kind was checked: what another kind would have given does not come here.

#[allow(clippy::needless_pass_by_value)] // all of them are alike
fn boolean(value: Value) -> bool {
    value == Value::Boolean(true)
}

fn number(value: &Value) -> u64 {
    match value {
        Value::Number(number) => u64::try_from(*number).unwrap_or_default(),
        _ => 0,
    }
}

fn text(value: Value) -> String {
    match value {
        Value::Text(text) => text,
        other => other.to_string(),
    }
}

fn texts(value: Value) -> Vec<String> {
    match value {
        Value::Texts(texts) => texts,
        other => vec![text(other)],
    }
}

fn path(value: Value) -> PathBuf {
    text(value).into()
}

fn some_path(value: Value) -> Option<PathBuf> {
    Some(path(value))
}

fn paths(value: Value) -> Vec<PathBuf> {
    texts(value).into_iter().map(PathBuf::from).collect()
}

fn some_text(value: Value) -> Option<String> {
    Some(text(value)).filter(|text| !text.is_empty())
}

#[allow(clippy::needless_pass_by_value)] // all of them are alike
fn seconds(value: Value) -> Duration {
    Duration::from_secs(number(&value))
}

#[allow(clippy::needless_pass_by_value)] // all of them are alike
fn size(value: Value) -> u64 {
    number(&value)
}

#[allow(clippy::needless_pass_by_value)] // all of them are alike
fn some_size(value: Value) -> Option<u64> {
    Some(number(&value))
}

#[allow(clippy::needless_pass_by_value)] // all of them are alike
fn rate(value: Value) -> Option<NonZeroU64> {
    NonZeroU64::new(number(&value))
}

#[allow(clippy::needless_pass_by_value)] // all of them are alike
fn count(value: Value) -> u32 {
    u32::try_from(number(&value)).unwrap_or(u32::MAX)
}

fn when(value: Value) -> When {
    match text(value).as_str() {
        "idle" => When::Idle,
        "never" => When::Never,
        _ => When::Always,
    }
}

fn trust(value: Value) -> IndexTrust {
    match text(value).as_str() {
        "repository" => IndexTrust::Repository,
        "any" => IndexTrust::Any,
        _ => IndexTrust::Manifest,
    }
}

fn engine(value: Value) -> Option<Engine> {
    text(value).parse().ok()
}

fn is_json(value: Value) -> bool {
    text(value) == "json"
}

fn of_boolean(value: &bool) -> Option<Value> {
    Some(Value::Boolean(*value))
}

fn of_size(value: &u64) -> Option<Value> {
    Some(Value::Number(i64::try_from(*value).unwrap_or(i64::MAX)))
}

fn of_some_size(value: &Option<u64>) -> Option<Value> {
    of_size(value.as_ref()?)
}

fn of_rate(value: &Option<NonZeroU64>) -> Option<Value> {
    of_size(&value.as_ref()?.get())
}

fn of_count(value: &u32) -> Option<Value> {
    Some(Value::Number(i64::from(*value)))
}

fn of_seconds(value: &Duration) -> Option<Value> {
    of_size(&value.as_secs())
}

fn of_text(value: &str) -> Option<Value> {
    Some(Value::Text(value.to_owned()))
}

fn of_some_text(value: &Option<String>) -> Option<Value> {
    of_text(value.as_ref()?)
}

fn of_texts(value: &[String]) -> Option<Value> {
    Some(Value::Texts(value.to_vec()))
}

fn of_path(value: &std::path::Path) -> Option<Value> {
    Some(Value::Text(value.to_string_lossy().into_owned()))
}

fn of_some_path(value: &Option<PathBuf>) -> Option<Value> {
    of_path(value.as_ref()?)
}

fn of_paths(value: &[PathBuf]) -> Option<Value> {
    Some(Value::Texts(value.iter().map(|path| path.to_string_lossy().into_owned()).collect()))
}

fn of_when(value: &When) -> Option<Value> {
    of_text(match value {
        When::Always => "always",
        When::Idle => "idle",
        When::Never => "never",
    })
}

fn of_trust(value: &IndexTrust) -> Option<Value> {
    of_text(match value {
        IndexTrust::Manifest => "manifest",
        IndexTrust::Repository => "repository",
        IndexTrust::Any => "any",
    })
}

fn of_engine(value: &Option<Engine>) -> Option<Value> {
    of_text(value.as_ref()?.name())
}

fn of_json(value: &bool) -> Option<Value> {
    of_text(if *value { "json" } else { "text" })
}
