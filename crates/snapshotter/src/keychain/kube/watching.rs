//! Listing and watching secrets of one type, for ever.
//!
//! Source: Kubernetes' documentation, "Kubernetes API Concepts": lists come in pages, a watch begins at a list's resource
//! version and is a line of JSON for each change; where the server does not know that version any more (410) all is listed
//! anew.

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::BytesMut;
use http::StatusCode;
use serde::Deserialize;
use tokio::{sync::watch, time::Instant};

use super::{
    Kind, Known,
    config::{Cluster, ConfigError},
};

/// Most secrets in a page; fewer where they are large.
const PAGE: u32 = 100;
/// Largest page, in bytes: an object has about 1.5 MB at most, and some more in JSON.
const PAGE_BYTES: usize = 32 << 20;
/// Largest line of a watch.
const LINE_BYTES: usize = 4 << 20;
/// How long the server is asked to go on with a watch.
const WATCH_SECONDS: u64 = 300;
/// After so long without a byte, a watch is dead: bookmarks come about every minute.
const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS + 30);
/// How long a page may take.
const PAGE_PATIENCE: Duration = Duration::from_secs(60);
/// Between attempts.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Why listing or watching has ended.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("the API server can't be reached: {0}")]
    Transport(String),
    #[error("the API server answers {0}; secrets must be readable (get, list, watch)")]
    Status(StatusCode),
    #[error("the API server knows the version no more")]
    Expired,
    #[error("the API server's answer is not what its protocol says")]
    Odd,
    #[error("the API server's answer is larger than {0} bytes")]
    TooLarge(usize),
    #[error("the API server is silent")]
    Silent,
}

impl From<reqwest::Error> for Failure {
    fn from(error: reqwest::Error) -> Self {
        let error = error.without_url();
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(error) = source {
            text.push_str(&format!(": {error}"));
            source = error.source();
        }
        Self::Transport(text)
    }
}

#[derive(Deserialize)]
struct List {
    metadata: ListMetadata,
    #[serde(default)]
    items: Option<Vec<Secret>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadata {
    #[serde(default)]
    resource_version: String,
    #[serde(default)]
    r#continue: String,
}

#[derive(Deserialize)]
struct Secret {
    metadata: Metadata,
    #[serde(default)]
    data: Option<BTreeMap<String, String>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    namespace: String,
    name: String,
    resource_version: String,
}

#[derive(Deserialize)]
struct Event {
    r#type: String,
    object: serde_json::Value,
}

/// Watches, and says when the first list is known.
pub(super) async fn watch(kubeconfig: Option<PathBuf>, kind: Kind, known: Arc<Known>, listed: watch::Sender<bool>) {
    let mut pause = FIRST_PAUSE;
    let mut version = None;
    loop {
        let began = Instant::now();
        match once(kubeconfig.as_ref(), kind, &known, &listed, &mut version).await {
            Ok(()) => {}
            Err(Failure::Expired) => {
                tracing::debug!(kind = kind.name, "secrets are listed anew");
                version = None;
            }
            Err(error) => {
                tracing::warn!(kind = kind.name, %error, "the cluster's secrets are not watched; tried again");
                if matches!(error, Failure::Odd | Failure::TooLarge(_)) {
                    version = None;
                }
            }
        }
        // What went on for a while has not failed.
        pause = if began.elapsed() > LONGEST_PAUSE { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
        if version.is_some() && *listed.borrow() && began.elapsed() > FIRST_PAUSE {
            pause = FIRST_PAUSE;
        }
        tokio::time::sleep(pause / 2).await;
    }
}

/// Lists where nothing is known, and watches until the server ends it.
async fn once(
    kubeconfig: Option<&PathBuf>,
    kind: Kind,
    known: &Known,
    listed: &watch::Sender<bool>,
    version: &mut Option<String>,
) -> Result<(), Failure> {
    let file = kubeconfig.cloned();
    let cluster = tokio::task::spawn_blocking(move || Cluster::read(file.as_deref())).await;
    let cluster = cluster.map_err(|_| Failure::Silent)??;
    if version.is_none() {
        *version = Some(list(&cluster, kind, known).await?);
        listed.send_replace(true);
    }
    let Some(version) = version else { return Ok(()) };
    changes(&cluster, kind, known, version).await
}

/// Lists all, and returns the version that they have.
async fn list(cluster: &Cluster, kind: Kind, known: &Known) -> Result<String, Failure> {
    let mut names = HashSet::new();
    let (mut page, mut next) = (PAGE, String::new());
    loop {
        let mut query = vec![("limit", page.to_string())];
        if !next.is_empty() {
            query.push(("continue", next.clone()));
        }
        let body = tokio::time::timeout(PAGE_PATIENCE, async { whole(ask(cluster, kind, &query).await?).await });
        let body = match body.await.map_err(|_| Failure::Silent)? {
            Err(Failure::TooLarge(_)) if page > 1 => {
                page /= 10;
                continue;
            }
            body => body?,
        };
        // The error's own words may quote a secret.
        let list: List = serde_json::from_slice(&body).map_err(|_| Failure::Odd)?;
        for secret in list.items.unwrap_or_default() {
            let name = secret.name();
            take(known, kind, &name, &secret);
            names.insert(name);
        }
        if list.metadata.r#continue.is_empty() {
            known.retain(kind, &names);
            tracing::info!(kind = kind.name, secrets = names.len(), "the cluster's pull secrets are known");
            return Ok(list.metadata.resource_version);
        }
        next = list.metadata.r#continue;
    }
}

/// Takes changes as they come, and notes up to which version.
async fn changes(cluster: &Cluster, kind: Kind, known: &Known, version: &mut String) -> Result<(), Failure> {
    let query = [
        ("watch", "1".to_owned()),
        ("allowWatchBookmarks", "true".to_owned()),
        ("timeoutSeconds", WATCH_SECONDS.to_string()),
        ("resourceVersion", version.clone()),
    ];
    let asked = tokio::time::timeout(PAGE_PATIENCE, ask(cluster, kind, &query)).await;
    let mut answer = asked.map_err(|_| Failure::Silent)??;
    let mut text = BytesMut::new();
    let mut looked_at = 0;
    loop {
        while let Some(end) = text[looked_at..].iter().position(|byte| *byte == b'\n') {
            let line = text.split_to(looked_at + end + 1);
            looked_at = 0;
            if !line.trim_ascii().is_empty() {
                change(kind, known, version, &line)?;
            }
        }
        looked_at = text.len();
        if looked_at > LINE_BYTES {
            return Err(Failure::TooLarge(LINE_BYTES));
        }
        match tokio::time::timeout(SILENCE, answer.chunk()).await {
            Ok(Ok(Some(chunk))) => text.extend_from_slice(&chunk),
            Ok(Ok(None)) => return Ok(()),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => return Err(Failure::Silent),
        }
    }
}

fn change(kind: Kind, known: &Known, version: &mut String, line: &[u8]) -> Result<(), Failure> {
    let event: Event = serde_json::from_slice(line).map_err(|_| Failure::Odd)?;
    if event.r#type == "ERROR" {
        let code = event.object.get("code").and_then(serde_json::Value::as_u64).unwrap_or_default();
        let code = u16::try_from(code).ok().and_then(|code| StatusCode::from_u16(code).ok());
        return Err(match code {
            Some(StatusCode::GONE) => Failure::Expired,
            Some(status) => Failure::Status(status),
            None => Failure::Odd,
        });
    }
    let secret: Secret = serde_json::from_value(event.object).map_err(|_| Failure::Odd)?;
    match event.r#type.as_str() {
        "ADDED" | "MODIFIED" => take(known, kind, &secret.name(), &secret),
        "DELETED" => known.remove(kind, &secret.name()),
        _ => {}
    }
    if !secret.metadata.resource_version.is_empty() {
        *version = secret.metadata.resource_version;
    }
    Ok(())
}

fn take(known: &Known, kind: Kind, name: &str, secret: &Secret) {
    let data = secret.data.as_ref().and_then(|data| data.get(kind.key));
    let decoded = data.and_then(|data| BASE64_STANDARD.decode(data).ok());
    known.insert(kind, name, &decoded.unwrap_or_default());
}

impl Secret {
    fn name(&self) -> String {
        format!("{}/{}", self.metadata.namespace, self.metadata.name)
    }
}

async fn ask(cluster: &Cluster, kind: Kind, query: &[(&str, String)]) -> Result<reqwest::Response, Failure> {
    let mut url = cluster.server.clone();
    // A server may be behind a path, as Rancher's are.
    let path = format!("{}/api/v1/secrets", url.path().trim_end_matches('/'));
    url.set_path(&path);
    url.query_pairs_mut().append_pair("fieldSelector", &format!("type={}", kind.name)).extend_pairs(query);
    let mut request = cluster.client.get(url).header(http::header::ACCEPT, "application/json");
    if let Some(authorization) = &cluster.authorization {
        request = request.header(http::header::AUTHORIZATION, authorization.clone());
    }
    let answer = request.send().await?;
    match answer.status() {
        StatusCode::OK => Ok(answer),
        StatusCode::GONE => Err(Failure::Expired),
        status => Err(Failure::Status(status)),
    }
}

async fn whole(mut answer: reqwest::Response) -> Result<BytesMut, Failure> {
    let mut body = BytesMut::new();
    while let Some(chunk) = answer.chunk().await? {
        if body.len() + chunk.len() > PAGE_BYTES {
            return Err(Failure::TooLarge(PAGE_BYTES));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}
