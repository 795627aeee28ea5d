//! Requests to operations: which path means what, and what every answer has in common.
//!
//! A repository's name has slashes, and any of its components may be called `blobs` or `manifests`, so paths are read
//! from their end.

use std::sync::atomic::Ordering;

use axum::{
    Router,
    body::Body,
    extract::{Path, RawQuery, State},
    http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, header},
    routing::any,
};
use futures_util::TryStreamExt;
use loris_format::digest::Digest;

use super::{
    Registry,
    name::{Reference, Repository},
    problem::Problem,
};

/// What an operation gives back.
pub type Answer = Result<Response<Body>, Problem>;

/// The digest of the content of an answer.
pub const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
/// Marks the server as one that speaks the registry's protocol. Docker's clients look for it.
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");

/// What a path asks about.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Base,
    Catalog,
    Manifest(Repository, Reference),
    Blob(Repository, Digest),
    Uploads(Repository),
    Upload(Repository, String),
    Tags(Repository),
    Referrers(Repository, Digest),
}

/// Returns a router that answers below `/v2/`.
pub fn router(registry: Registry) -> Router {
    Router::new()
        .route("/v2", any(base))
        .route("/v2/", any(base))
        .route("/v2/{*path}", any(operation))
        .with_state(registry)
}

async fn base(registry: State<Registry>, query: RawQuery, request: Request<Body>) -> Response<Body> {
    answer(registry.0, "", query, request).await
}

async fn operation(
    registry: State<Registry>,
    Path(path): Path<String>,
    query: RawQuery,
    request: Request<Body>,
) -> Response<Body> {
    answer(registry.0, &path, query, request).await
}

async fn answer(registry: Registry, path: &str, query: RawQuery, request: Request<Body>) -> Response<Body> {
    registry.inner.counters.requests.fetch_add(1, Ordering::Relaxed);
    let method = request.method().clone();
    let query = Query(query.0.unwrap_or_default());
    let mut response = match Target::parse(path) {
        Ok(target) => dispatch(&registry, target, &query, request).await.unwrap_or_else(Problem::into_response),
        Err(problem) => problem.into_response(),
    };
    tracing::debug!(%method, path, status = response.status().as_u16(), "answered");
    response.headers_mut().insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    if method == Method::HEAD {
        // What a GET would have sent; its length stays in the header.
        *response.body_mut() = Body::empty();
        return response;
    }
    response.map(|body| {
        Body::from_stream(body.into_data_stream().inspect_ok(move |bytes| {
            registry.inner.counters.bytes_sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }))
    })
}

impl Target {
    fn parse(path: &str) -> Result<Self, Problem> {
        let unknown = || Problem::not_found("no such endpoint");
        let name = |text: &str| {
            text.parse::<Repository>().map_err(|error| Problem::name_invalid(format!("repository: {error}")))
        };
        let digest = |text: &str| text.parse::<Digest>().map_err(|error| Problem::digest_invalid(error.to_string()));
        match path {
            "" => return Ok(Self::Base),
            "_catalog" => return Ok(Self::Catalog),
            _ => {}
        }
        let (rest, last) = path.rsplit_once('/').ok_or_else(unknown)?;
        if let Some(repository) = rest.strip_suffix("/blobs/uploads") {
            return match last {
                "" => Ok(Self::Uploads(name(repository)?)),
                id => Ok(Self::Upload(name(repository)?, id.to_owned())),
            };
        }
        let (repository, kind) = rest.rsplit_once('/').ok_or_else(unknown)?;
        match kind {
            // Clients exist that leave the last slash out.
            "blobs" if last == "uploads" => Ok(Self::Uploads(name(repository)?)),
            "blobs" => Ok(Self::Blob(name(repository)?, digest(last)?)),
            "manifests" => {
                let repository = name(repository)?;
                let reference = match last.parse() {
                    Ok(reference) => reference,
                    Err(_) if last.contains(':') => {
                        return Err(Problem::digest_invalid("not a digest that is known here"));
                    }
                    Err(error) => return Err(Problem::manifest_invalid(format!("reference: {error}"))),
                };
                Ok(Self::Manifest(repository, reference))
            }
            "tags" if last == "list" => Ok(Self::Tags(name(repository)?)),
            "referrers" => Ok(Self::Referrers(name(repository)?, digest(last)?)),
            _ => Err(unknown()),
        }
    }
}

async fn dispatch(registry: &Registry, target: Target, query: &Query, request: Request<Body>) -> Answer {
    use super::{blobs, listings, manifests};
    let method = request.method().clone();
    let reading = matches!(method, Method::GET | Method::HEAD);
    let unsupported = || Err(Problem::unsupported("this endpoint has no such method"));
    match (target, method) {
        (Target::Base, _) if reading => Ok(json(StatusCode::OK, "{}".to_owned())),
        (Target::Catalog, _) if reading => listings::repositories(registry, query).await,
        (Target::Tags(repository), _) if reading => listings::tags(registry, repository, query).await,
        (Target::Referrers(repository, digest), _) if reading => {
            listings::referrers(registry, repository, digest, query).await
        }
        (Target::Manifest(repository, reference), _) if reading => {
            manifests::get(registry, repository, reference, request.headers()).await
        }
        (Target::Manifest(repository, reference), Method::PUT) => {
            manifests::put(registry, repository, reference, request).await
        }
        (Target::Manifest(repository, reference), Method::DELETE) => {
            manifests::delete(registry, repository, reference).await
        }
        (Target::Blob(repository, digest), _) if reading => {
            blobs::get(registry, repository, digest, request.headers()).await
        }
        (Target::Blob(repository, digest), Method::DELETE) => blobs::delete(registry, repository, digest).await,
        (Target::Uploads(repository), Method::POST) => blobs::start(registry, repository, query, request).await,
        (Target::Upload(repository, id), Method::PATCH) => blobs::append(registry, repository, &id, request).await,
        (Target::Upload(repository, id), Method::PUT) => blobs::finish(registry, repository, &id, query, request).await,
        (Target::Upload(repository, id), Method::GET) => blobs::status(registry, &repository, &id),
        (Target::Upload(repository, id), Method::DELETE) => blobs::cancel(registry, &repository, &id),
        _ => unsupported(),
    }
}

/// The part of a URL behind the question mark.
pub struct Query(String);

impl Query {
    /// Returns the first value of `key`, decoded.
    pub fn get(&self, key: &str) -> Option<String> {
        form_urlencoded::parse(self.0.as_bytes()).find(|(name, _)| name == key).map(|(_, value)| value.into_owned())
    }
}

/// An answer without a body.
pub fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    if status != StatusCode::NO_CONTENT {
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(0));
    }
    response
}

/// An answer in JSON.
pub fn json(status: StatusCode, text: String) -> Response<Body> {
    let length = text.len();
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    response
}

/// Sets a header whose value is made of names that have been checked.
pub fn set(response: &mut Response<Body>, name: HeaderName, value: &str) {
    match HeaderValue::from_str(value) {
        Ok(value) => drop(response.headers_mut().insert(name, value)),
        Err(error) => tracing::warn!(%name, %error, "a header was left out"),
    }
}

/// Says whether the client has the content of that digest already, by its `If-None-Match`.
pub fn is_known(headers: &header::HeaderMap, digest: &Digest) -> bool {
    let tag = format!("\"{digest}\"");
    headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.split(',').map(str::trim).any(|known| known == "*" || known.trim_start_matches("W/") == tag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let repository = |name: &str| name.parse::<Repository>().unwrap();
        let digest = Digest::sha256_of(b"");
        let cases = [
            ("", Target::Base),
            ("_catalog", Target::Catalog),
            ("a/tags/list", Target::Tags(repository("a"))),
            ("a/tags/tags/list", Target::Tags(repository("a/tags"))),
            ("a/blobs/uploads/", Target::Uploads(repository("a"))),
            ("a/blobs/uploads", Target::Uploads(repository("a"))),
            ("blobs/blobs/uploads/x", Target::Upload(repository("blobs"), "x".to_owned())),
            ("a/manifests/manifests/latest", Target::Manifest(repository("a/manifests"), "latest".parse().unwrap())),
        ];
        for (path, target) in cases {
            assert_eq!(Target::parse(path).unwrap(), target, "{path}");
        }
        let path = format!("a/b/c/blobs/{digest}");
        assert_eq!(Target::parse(&path).unwrap(), Target::Blob(repository("a/b/c"), digest));
        let path = format!("a/referrers/{digest}");
        assert_eq!(Target::parse(&path).unwrap(), Target::Referrers(repository("a"), digest));
        for bad in
            ["a", "a/b", "a/tags/other", "A/tags/list", "../tags/list", "/tags/list", "a/blobs/latest", "a/other/b"]
        {
            assert!(Target::parse(bad).is_err(), "{bad}");
        }
    }
}
