//! Manifests: got, put and deleted, by tag and by digest.

use std::{collections::BTreeMap, io::Read};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, header},
};
use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt;
use loris_format::{digest::Digest, limits::Limits};
use serde::Deserialize;

use super::{
    Registry,
    http::{Answer, CONTENT_DIGEST, empty, is_known, set},
    name::{Reference, Repository, Tag},
    problem::Problem,
    storage::{Entry, StorageError},
};

/// Tells a client that the registry keeps track of what refers to the subject.
const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");

/// What a registry needs to know of a manifest or an index.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    config: Option<Blob>,
    #[serde(default)]
    layers: Option<Vec<Blob>>,
    #[serde(default)]
    subject: Option<Blob>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// A descriptor in a manifest.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Blob {
    #[serde(default)]
    media_type: String,
    digest: Digest,
    #[serde(default)]
    urls: Option<Vec<String>>,
}

/// `GET` and `HEAD /v2/<name>/manifests/<reference>`
pub async fn get(registry: &Registry, repository: Repository, reference: Reference, headers: &HeaderMap) -> Answer {
    let asked = reference.clone();
    let limit = Limits::default().manifest_bytes;
    let found = registry
        .blocking(move |registry| -> Result<_, Problem> {
            let Some((entry, file)) = registry.storage().manifest(&repository, &asked)? else { return Ok(None) };
            let mut bytes = Vec::new();
            file.take(limit).read_to_end(&mut bytes).map_err(|error| {
                tracing::error!(%error, digest = %entry.digest, "failed to read a manifest");
                Problem::internal("the registry's storage failed")
            })?;
            Ok(Some((entry, bytes)))
        })
        .await?;
    let (entry, bytes) =
        found.ok_or_else(|| Problem::manifest_unknown(format!("no manifest is called {reference}")))?;
    let mut response = if is_known(headers, &entry.digest) {
        empty(StatusCode::NOT_MODIFIED)
    } else {
        let mut response = empty(StatusCode::OK);
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(bytes.len()));
        *response.body_mut() = Body::from(bytes);
        response
    };
    set(&mut response, header::CONTENT_TYPE, &entry.media_type);
    set(&mut response, header::ETAG, &format!("\"{}\"", entry.digest));
    set(&mut response, CONTENT_DIGEST, &entry.digest.to_string());
    Ok(response)
}

/// `PUT /v2/<name>/manifests/<reference>`
pub async fn put(registry: &Registry, repository: Repository, reference: Reference, request: Request<Body>) -> Answer {
    let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let content_type = content_type.map(|value| value.split(';').next().unwrap_or_default().trim().to_owned());
    let bytes = read(registry, request.into_body()).await?;
    let digest = match &reference {
        Reference::Digest(digest) if !digest.matches(&bytes) => {
            return Err(Problem::digest_invalid("the manifest is not what the digest names"));
        }
        Reference::Digest(digest) => *digest,
        Reference::Tag(_) => Digest::sha256_of(&bytes),
    };
    // The deserializer would take a list of values for an object too.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(Problem::manifest_invalid("not a JSON object"));
    }
    let manifest: Manifest =
        serde_json::from_slice(&bytes).map_err(|error| Problem::manifest_invalid(error.to_string()))?;
    let media_type = match (content_type, &manifest.media_type) {
        (Some(header), Some(body)) if header != *body => {
            return Err(Problem::manifest_invalid("Content-Type and the manifest's mediaType differ"));
        }
        (Some(header), _) => header,
        (None, Some(body)) => body.clone(),
        (None, None) => return Err(Problem::manifest_invalid("the manifest has no media type")),
    };
    let subject = manifest.subject.as_ref().map(|subject| subject.digest);
    let entry = Entry {
        media_type,
        digest,
        size: bytes.len() as u64,
        artifact_type: manifest
            .artifact_type
            .clone()
            .or_else(|| manifest.config.as_ref().map(|config| config.media_type.clone())),
        annotations: manifest.annotations.clone().unwrap_or_default(),
    };
    let tag = match &reference {
        Reference::Tag(tag) => Some(tag.clone()),
        Reference::Digest(_) => None,
    };
    let name = repository.clone();
    registry.blocking(move |registry| store(registry, &name, &entry, &manifest, &bytes, tag.as_ref())).await?;

    let mut response = empty(StatusCode::CREATED);
    set(&mut response, header::LOCATION, &format!("/v2/{repository}/manifests/{reference}"));
    set(&mut response, CONTENT_DIGEST, &digest.to_string());
    if let Some(subject) = subject {
        set(&mut response, SUBJECT, &subject.to_string());
    }
    Ok(response)
}

/// `DELETE /v2/<name>/manifests/<reference>`
pub async fn delete(registry: &Registry, repository: Repository, reference: Reference) -> Answer {
    let asked = reference.clone();
    let had = registry.blocking(move |registry| registry.storage().delete_manifest(&repository, &asked)).await?;
    if !had {
        return Err(Problem::manifest_unknown(format!("no manifest is called {reference}")));
    }
    Ok(empty(StatusCode::ACCEPTED))
}

/// Stores a manifest whose blobs are here. Manifests that an index lists may be missing: an index of which only some
/// platforms were copied is still of use. So may a subject, by the specification.
fn store(
    registry: &Registry,
    repository: &Repository,
    entry: &Entry,
    manifest: &Manifest,
    bytes: &[u8],
    tag: Option<&Tag>,
) -> Result<(), Problem> {
    for blob in manifest.config.iter().chain(manifest.layers.iter().flatten()) {
        let elsewhere = blob.urls.as_ref().is_some_and(|urls| !urls.is_empty());
        if !elsewhere && registry.storage().blob(repository, &blob.digest)?.is_none() {
            return Err(Problem::manifest_blob_unknown(format!("{} has not been pushed", blob.digest)));
        }
    }
    let subject = manifest.subject.as_ref().map(|subject| &subject.digest);
    registry.storage().put_manifest(repository, entry, bytes, subject, tag).map_err(|error: StorageError| error.into())
}

/// Reads a manifest whole; it is bounded.
async fn read(registry: &Registry, body: Body) -> Result<Bytes, Problem> {
    let limit = Limits::default().manifest_bytes;
    let mut bytes = BytesMut::new();
    let mut body = body.into_data_stream();
    while let Some(chunk) = body.try_next().await.map_err(|error| Problem::size_invalid(error.to_string()))? {
        registry.inner.counters.bytes_received.fetch_add(chunk.len() as u64, std::sync::atomic::Ordering::Relaxed);
        if (bytes.len() + chunk.len()) as u64 > limit {
            return Err(Problem::manifest_too_large(format!("a manifest may have {limit} bytes")));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.freeze())
}
