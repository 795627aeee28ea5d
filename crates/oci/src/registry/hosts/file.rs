//! containerd's `hosts.toml`.
//!
//! Source: containerd's `docs/hosts.md` and what its `core/remotes/docker/config/hosts.go` makes of a file:
//! - Hosts are asked in the order of the file, and then `server`, with what stands at the top of the file. Where there is
//!   no `server`, the registry itself is asked last, for everything, whatever `capabilities` stands at the top.
//! - A host without a scheme is `https`. Its path gets `/v2` unless it ends so or `override_path` says that it is whole.
//! - Without `capabilities` (or with none in the list) a host has all.
//! - Files are relative to the directory of `hosts.toml`.
//!
//! Keys that are not known are passed over there, and so they are here, with a warning.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue};
use reqwest::Url;
use toml::Value;

use super::{
    Capabilities, ConnectionSettings, Endpoint, MAX_HOSTS, Settings,
    value::{Section, kind, parse},
};
use crate::place::Error;

const KNOWN: [&str; 9] =
    ["server", "host", "capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout"];

/// Returns what a file says of a registry.
pub(super) fn endpoints(path: &Path, text: &str, registry: &str) -> Result<Vec<Endpoint>, Error> {
    let table = parse(path, text)?;
    let root = Section::root(path, &table);
    let directory = path.parent().unwrap_or(Path::new("."));
    let hosts = root.sections("host")?;
    if hosts.len() >= MAX_HOSTS {
        return Err(root.error("host", format!("more than {} hosts", MAX_HOSTS - 1)));
    }
    let mut endpoints = Vec::with_capacity(hosts.len() + 1);
    for (address, host) in hosts {
        let parsed = |complete| address_of(address, complete).map_err(|detail| root.error("host", detail));
        // First: messages about what is in it show the address.
        parsed(false)?;
        warn_of_unknown(&host, path);
        let url = parsed(host.boolean("override_path")?.unwrap_or_default())?;
        endpoints.push(endpoint(&host, directory, Some(url))?);
    }
    warn_of_unknown(&root, path);
    let server = root.text("server")?.filter(|server| !server.is_empty());
    let complete = root.boolean("override_path")?.unwrap_or_default();
    let url = server.map(|server| address_of(server, complete)).transpose();
    let url = url.map_err(|detail| root.error("server", detail))?;
    let mut last = endpoint(&root, directory, url)?;
    if last.url.is_none() {
        last.capabilities = Capabilities::ALL;
    }
    endpoints.push(last);
    tracing::debug!(registry, file = %path.display(), hosts = endpoints.len(), "the registry's hosts are those of a file");
    Ok(endpoints)
}

fn warn_of_unknown(section: &Section<'_>, path: &Path) {
    for key in section.keys().filter(|key| !KNOWN.contains(key)) {
        tracing::warn!(file = %path.display(), key, "a key is not known and passed over");
    }
}

/// Makes an address of a host as it is written: `mirror.example`, `https://mirror.example/path`.
pub(super) fn address_of(written: &str, complete: bool) -> Result<Url, String> {
    let text = if written.starts_with("http") { written.to_owned() } else { format!("https://{written}") };
    // What stands before an @ may be a secret.
    let shown = written.rsplit('@').next().unwrap_or_default();
    let mut url: Url = text.parse().map_err(|error| format!("{shown:?} is no address ({error})"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("{shown:?} is neither an http nor an https address"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(format!("{shown:?} has a user name or password, which belong where `podman login` puts them"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(format!("{shown:?} has a query or a fragment"));
    }
    let mut path = url.path().trim_end_matches('/').to_owned();
    if !complete && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    url.set_path(&format!("{path}/"));
    Ok(url)
}

fn endpoint(section: &Section<'_>, directory: &Path, url: Option<Url>) -> Result<Endpoint, Error> {
    let connection = ConnectionSettings {
        authorities: section.texts("ca", true)?.into_iter().map(|file| directory.join(file)).collect(),
        client: client(section, directory)?,
        skip_verify: section.boolean("skip_verify")?,
        dial_timeout: dial_timeout(section)?,
        directory: None,
    };
    let settings = Settings::new(connection, headers(section)?);
    Ok(Endpoint { url, capabilities: capabilities(section)?, settings })
}

fn capabilities(section: &Section<'_>) -> Result<Capabilities, Error> {
    let mut capabilities = Capabilities { pull: false, resolve: false, push: false };
    let listed = section.texts("capabilities", false)?;
    if listed.is_empty() {
        return Ok(Capabilities::ALL);
    }
    for name in listed {
        match name.to_ascii_lowercase().as_str() {
            "pull" => capabilities.pull = true,
            "resolve" => capabilities.resolve = true,
            "push" => capabilities.push = true,
            // Known to newer versions; nothing here asks a mirror for referrers.
            "referrers" => {}
            _ => {
                let detail = format!("{name:?} is none of \"pull\", \"resolve\", \"push\"");
                return Err(section.error("capabilities", detail));
            }
        }
    }
    Ok(capabilities)
}

/// Reads `client`: a file with both, a list of such, or a list of pairs. The first is shown to the server.
fn client(section: &Section<'_>, directory: &Path) -> Result<Option<(PathBuf, Option<PathBuf>)>, Error> {
    let wrong = |detail: String| {
        section.error(
            "client",
            format!("{detail}; a file with certificate and key is expected, or [[\"CERTIFICATE\", \"KEY\"]]"),
        )
    };
    let mut found = Vec::new();
    match section.get("client") {
        None => return Ok(None),
        Some(Value::String(file)) => found.push((directory.join(file), None)),
        Some(Value::Array(items)) => {
            for item in items {
                match item {
                    Value::String(file) => found.push((directory.join(file), None)),
                    Value::Array(pair) => match &pair[..] {
                        [Value::String(certificate), Value::String(key)] => {
                            // Go's zero value: the key is in the first file, too.
                            let key = Some(directory.join(key)).filter(|_| !key.is_empty());
                            found.push((directory.join(certificate), key));
                        }
                        _ => return Err(wrong("a pair is two file names".to_owned())),
                    },
                    other => return Err(wrong(format!("{} is no file name", kind(other)))),
                }
            }
        }
        Some(other) => return Err(wrong(format!("{} is no file name", kind(other)))),
    }
    if found.len() > 1 {
        tracing::warn!("of several client certificates of a host the first is used");
    }
    Ok(found.into_iter().next())
}

/// Reads headers. Values are secrets as often as not, and so none is shown.
pub(super) fn headers(section: &Section<'_>) -> Result<HeaderMap, Error> {
    let mut headers = HeaderMap::new();
    let Some(table) = section.section("header")? else { return Ok(headers) };
    for name in table.keys() {
        let parsed: HeaderName = name.parse().map_err(|_| table.error(name, "it is no name of a header"))?;
        for text in table.texts(name, true)? {
            let value = HeaderValue::from_str(text).map_err(|_| table.error(name, "its value can't be sent"));
            let mut value = value?;
            value.set_sensitive(true);
            headers.append(&parsed, value);
        }
    }
    Ok(headers)
}

/// Reads a duration as Go writes them: `1h30m`, `2.5s`, `300ms`; 0 is as good as absent.
fn dial_timeout(section: &Section<'_>) -> Result<Option<Duration>, Error> {
    let Some(text) = section.text("dial_timeout")?.filter(|text| !text.is_empty()) else { return Ok(None) };
    let wrong = || section.error("dial_timeout", format!("{text:?} is no duration such as \"5s\" or \"300ms\""));
    duration(text).map(|duration| Some(duration).filter(|it| !it.is_zero())).ok_or_else(wrong)
}

fn duration(text: &str) -> Option<Duration> {
    const UNITS: [(&str, f64); 7] =
        [("ns", 1e-9), ("us", 1e-6), ("\u{b5}s", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').filter(|digits| *digits > 0)?;
        let amount: f64 = rest[..digits].parse().ok()?;
        let after = &rest[digits..];
        let length = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (_, unit) = UNITS.iter().find(|(name, _)| *name == &after[..length])?;
        seconds += amount * unit;
        rest = &after[length..];
    }
    if text.is_empty() { None } else { Duration::try_from_secs_f64(seconds).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        for (text, milliseconds) in [
            ("5s", Some(5000)),
            ("300ms", Some(300)),
            ("1m30s", Some(90_000)),
            ("1.5h", Some(5_400_000)),
            ("+2s", Some(2000)),
            ("0", Some(0)),
            ("1500us", Some(1)),
            ("5", None),
            ("s", None),
            ("5 s", None),
            ("-5s", None),
            ("1e3s", None),
            ("5d", None),
            ("..s", None),
            ("", None),
        ] {
            let expected = milliseconds.map(<u128 as From<u64>>::from);
            assert_eq!(duration(text).map(|duration| duration.as_millis()), expected, "{text}");
        }
    }
}
