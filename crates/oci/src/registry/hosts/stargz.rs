//! Mirrors in stargz-snapshotter's `config.toml`: `[[resolver.host."REGISTRY".mirrors]]`.
//!
//! Source: its `docs/overview.md`, section "Registry mirrors", and `service/resolver/registry.go`: mirrors are asked in
//! the order of the file and then the registry itself; a mirror is `https` unless it is insecure or the machine itself;
//! `request_timeout_sec` is a time for a whole request, 0 the usual one, and below 0 none. Here it is the longest wait for
//! the next byte, since requests end when they stand still and not by their size.

use std::{path::Path, time::Duration};

use super::{
    Capabilities, Endpoint, MAX_HOSTS, Settings,
    file::{address_of, headers},
    value::{Section, parse},
};
use crate::{
    place::Error,
    registry::location::{is_loopback, split_port},
};

/// Returns the hosts of a registry; `None` where the file says nothing of it.
pub(super) fn mirrors(path: &Path, text: &str, registry: &str) -> Result<Option<Vec<Endpoint>>, Error> {
    let table = parse(path, text)?;
    let Some(resolver) = Section::root(path, &table).section("resolver")? else { return Ok(None) };
    let Some(hosts) = resolver.section("host")? else { return Ok(None) };
    let Some(host) = hosts.section(registry)? else { return Ok(None) };
    let mirrors = host.list("mirrors")?;
    if mirrors.is_empty() {
        return Ok(None);
    }
    if mirrors.len() >= MAX_HOSTS {
        return Err(host.error("mirrors", format!("more than {} mirrors", MAX_HOSTS - 1)));
    }
    let mut endpoints = mirrors.iter().map(mirror).collect::<Result<Vec<_>, _>>()?;
    endpoints.push(Endpoint::registry());
    Ok(Some(endpoints))
}

fn mirror(section: &Section<'_>) -> Result<Endpoint, Error> {
    let written = section.text("host")?.unwrap_or_default();
    if written.is_empty() {
        return Err(section.error("host", "a mirror must have one"));
    }
    let authority = if written == crate::reference::DEFAULT_REGISTRY { "registry-1.docker.io" } else { written };
    let insecure = section.boolean("insecure")?.unwrap_or_default();
    let bare = split_port(authority.split('/').next().unwrap_or_default()).0;
    let text = match authority.contains("://") {
        true => authority.to_owned(),
        false if insecure || is_loopback(bare) => format!("http://{authority}"),
        false => format!("https://{authority}"),
    };
    let url = address_of(&text, false).map_err(|detail| section.error("host", detail))?;
    let seconds = section.integer("request_timeout_sec")?.unwrap_or_default();
    // Zero and less: what is usual here.
    let patience = u64::try_from(seconds).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs);
    let settings = Settings { connection: None, headers: headers(section)?, patience };
    Ok(Endpoint { url: Some(url), capabilities: Capabilities::RESOLVE, settings })
}
