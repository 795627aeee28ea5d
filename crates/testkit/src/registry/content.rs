//! What the registry holds, and its answers by the distribution specification 1.1 when nothing goes wrong.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, header};
use serde_json::{Value, json};
use sha2::Digest as _;

/// Stands for every repository: what a test adds by hand is in all of them.
const EVERYWHERE: &str = "*";

/// An answer before faults.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// The blob that the answer is a whole or a part of, for faults that send other parts.
    pub(super) whole: Option<Bytes>,
}

/// A request, with its body read.
pub(super) struct Asked<'a> {
    pub(super) method: &'a Method,
    pub(super) path: &'a str,
    pub(super) query: &'a [(String, String)],
    pub(super) headers: &'a HeaderMap,
    pub(super) body: &'a Bytes,
}

/// What the registry does and does not do.
#[derive(Clone, Debug)]
pub(super) struct Abilities {
    pub(super) referrers: bool,
    pub(super) filters: bool,
    pub(super) mount: bool,
    pub(super) patch: bool,
    pub(super) relative_locations: bool,
    pub(super) chunk_min: Option<u64>,
    pub(super) page: usize,
}

impl Default for Abilities {
    fn default() -> Self {
        Self {
            referrers: true,
            filters: true,
            mount: true,
            patch: true,
            relative_locations: false,
            chunk_min: None,
            page: 1000,
        }
    }
}

/// Blobs, manifests, tags and uploads.
#[derive(Default)]
pub(super) struct Content {
    pub(super) abilities: Abilities,
    address: String,
    blobs: HashMap<String, Bytes>,
    visible: BTreeSet<(String, String)>,
    manifests: HashMap<String, (String, Bytes)>,
    /// (repository, tag or digest) to digest.
    names: BTreeMap<(String, String), String>,
    uploads: HashMap<u64, Upload>,
    uploads_begun: u64,
}

struct Upload {
    repository: String,
    received: Vec<u8>,
    /// Changes with every answer: a client must use the newest location.
    state: u64,
}

/// Returns the `sha256:...` digest of bytes.
pub(super) fn digest_of(bytes: &[u8]) -> String {
    let hash = sha2::Sha256::digest(bytes);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

impl Answer {
    pub(super) fn new(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self { status, headers: HeaderMap::new(), body: body.into(), whole: None }
    }

    pub(super) fn error(status: StatusCode, code: &str, message: &str) -> Self {
        let document = json!({"errors": [{"code": code, "message": message}]});
        Self::new(status, document.to_string()).header(header::CONTENT_TYPE, "application/json")
    }

    pub(super) fn header(mut self, name: impl header::IntoHeaderName, value: impl AsRef<str>) -> Self {
        if let Ok(value) = value.as_ref().parse() {
            self.headers.insert(name, value);
        }
        self
    }

    /// Answers with a blob or the part of it that a `Range` header asks for.
    pub(super) fn blob(content: &Bytes, headers: &HeaderMap) -> Self {
        let answer = match asked_range(headers, content.len()) {
            None => Self::new(StatusCode::OK, content.clone()),
            Some(Err(())) => Self::error(StatusCode::RANGE_NOT_SATISFIABLE, "RANGE_INVALID", "outside of the blob")
                .header(header::CONTENT_RANGE, format!("bytes */{}", content.len())),
            Some(Ok((start, end))) => Self::new(StatusCode::PARTIAL_CONTENT, content.slice(start..end))
                .header(header::CONTENT_RANGE, format!("bytes {start}-{}/{}", end.saturating_sub(1), content.len())),
        };
        let mut answer = answer.header(header::ACCEPT_RANGES, "bytes");
        answer
            .headers
            .entry(header::CONTENT_TYPE)
            .or_insert(header::HeaderValue::from_static("application/octet-stream"));
        answer.whole = Some(content.clone());
        answer
    }
}

/// Reads `Range: bytes=S-E`, as start and end (exclusive); `Err` where it lies outside.
pub(super) fn asked_range(headers: &HeaderMap, length: usize) -> Option<Result<(usize, usize), ()>> {
    let text = headers.get(header::RANGE)?.to_str().ok()?.strip_prefix("bytes=")?;
    let (start, end) = text.split_once('-')?;
    let start: usize = start.parse().ok()?;
    let end = if end.is_empty() { length } else { end.parse::<usize>().ok()?.saturating_add(1).min(length) };
    Some(if start < end { Ok((start, end)) } else { Err(()) })
}

impl Content {
    pub(super) fn at(address: String) -> Self {
        Self { address, ..Self::default() }
    }

    pub(super) fn add_blob(&mut self, bytes: Bytes) -> String {
        let digest = digest_of(&bytes);
        self.store_blob(EVERYWHERE, digest.clone(), bytes);
        digest
    }

    pub(super) fn add_manifest(&mut self, tag: &str, media_type: &str, bytes: Bytes) -> String {
        self.store_manifest(EVERYWHERE, tag, media_type, bytes)
    }

    pub(super) fn blob(&self, repository: &str, digest: &str) -> Option<&Bytes> {
        let seen = |repository: &str| self.visible.contains(&(repository.to_owned(), digest.to_owned()));
        if seen(repository) || seen(EVERYWHERE) { self.blobs.get(digest) } else { None }
    }

    pub(super) fn any_blob(&self, digest: &str) -> Option<&Bytes> {
        self.blobs.get(digest)
    }

    pub(super) fn manifest(&self, repository: &str, reference: &str) -> Option<(&str, &str, &Bytes)> {
        let name = |repository: &str| self.names.get(&(repository.to_owned(), reference.to_owned()));
        let digest = name(repository).or_else(|| name(EVERYWHERE))?;
        let (media_type, bytes) = self.manifests.get(digest)?;
        Some((digest, media_type, bytes))
    }

    pub(super) fn tags(&self, repository: &str) -> Vec<String> {
        let ours = |name: &&(String, String)| name.0 == repository || name.0 == EVERYWHERE;
        let tags = self.names.keys().filter(ours).map(|(_, reference)| reference.clone());
        let tags: BTreeSet<String> = tags.filter(|reference| !reference.contains(':')).collect();
        tags.into_iter().collect()
    }

    /// Returns how many uploads are begun and neither ended nor cancelled.
    pub(super) fn open_uploads(&self) -> usize {
        self.uploads.len()
    }

    /// Keeps bytes of an upload whose request broke off.
    pub(super) fn keep_upload_part(&mut self, path: &str, part: &[u8]) {
        if let Some(upload) = upload_id(path).and_then(|id| self.uploads.get_mut(&id)) {
            upload.received.extend_from_slice(part);
        }
    }

    fn store_blob(&mut self, repository: &str, digest: String, bytes: Bytes) {
        self.visible.insert((repository.to_owned(), digest.clone()));
        self.blobs.insert(digest, bytes);
    }

    fn store_manifest(&mut self, repository: &str, reference: &str, media_type: &str, bytes: Bytes) -> String {
        let digest = digest_of(&bytes);
        self.manifests.insert(digest.clone(), (media_type.to_owned(), bytes));
        self.names.insert((repository.to_owned(), digest.clone()), digest.clone());
        self.names.insert((repository.to_owned(), reference.to_owned()), digest.clone());
        digest
    }

    /// Answers a request under `/v2/`.
    pub(super) fn answer(&mut self, asked: &Asked<'_>) -> Answer {
        let path = asked.path.strip_prefix("/v2/").unwrap_or_default();
        if path.is_empty() {
            return Answer::new(StatusCode::OK, "{}");
        }
        if path == "_catalog" {
            let repositories: BTreeSet<String> =
                self.names.keys().map(|(repository, _)| repository.clone()).filter(|name| name != EVERYWHERE).collect();
            return self.page(asked, "repositories", &repositories.into_iter().collect::<Vec<_>>(), json!({}));
        }
        // The repository's name has slashes of its own: the last known word decides.
        for (word, handle) in [
            ("/blobs/uploads/", Self::upload as fn(&mut Self, &Asked<'_>, &str, &str) -> Answer),
            ("/blobs/", Self::blob_request),
            ("/manifests/", Self::manifest_request),
            ("/referrers/", Self::referrers),
            ("/tags/list", Self::tag_list),
        ] {
            if let Some(at) = path.rfind(word) {
                return handle(self, asked, &path[..at], &path[at + word.len()..]);
            }
        }
        Answer::error(StatusCode::NOT_FOUND, "UNSUPPORTED", "no such path")
    }

    fn blob_request(&mut self, asked: &Asked<'_>, repository: &str, digest: &str) -> Answer {
        let Some(content) = self.blob(repository, digest).cloned() else {
            return Answer::error(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", "blob unknown to registry");
        };
        match asked.method.as_str() {
            "GET" | "HEAD" => Answer::blob(&content, asked.headers).header("docker-content-digest", digest),
            "DELETE" => {
                self.visible.remove(&(repository.to_owned(), digest.to_owned()));
                Answer::new(StatusCode::ACCEPTED, "")
            }
            _ => method_not_allowed(),
        }
    }

    fn manifest_request(&mut self, asked: &Asked<'_>, repository: &str, reference: &str) -> Answer {
        match asked.method.as_str() {
            "GET" | "HEAD" => match self.manifest(repository, reference) {
                Some((digest, media_type, bytes)) => Answer::new(StatusCode::OK, bytes.clone())
                    .header(header::CONTENT_TYPE, media_type)
                    .header("docker-content-digest", digest),
                None => Answer::error(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "manifest unknown"),
            },
            "PUT" => self.put_manifest(asked, repository, reference),
            "DELETE" => {
                let before = self.names.len();
                self.names.retain(|(name, key), digest| {
                    name != repository || (key != reference && digest.as_str() != reference)
                });
                if self.names.len() == before {
                    return Answer::error(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "manifest unknown");
                }
                Answer::new(StatusCode::ACCEPTED, "")
            }
            _ => method_not_allowed(),
        }
    }

    fn put_manifest(&mut self, asked: &Asked<'_>, repository: &str, reference: &str) -> Answer {
        let digest = digest_of(asked.body);
        if reference.contains(':') && reference != digest {
            return Answer::error(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "digest and content differ");
        }
        let Ok(document) = serde_json::from_slice::<Value>(asked.body) else {
            return Answer::error(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", "not JSON");
        };
        let blobs = document["layers"].as_array().into_iter().flatten().chain(document.get("config"));
        for blob in blobs.filter_map(|blob| blob["digest"].as_str()) {
            if self.blob(repository, blob).is_none() {
                return Answer::error(StatusCode::NOT_FOUND, "MANIFEST_BLOB_UNKNOWN", blob);
            }
        }
        let media_type = asked.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = media_type.unwrap_or_default().to_owned();
        self.store_manifest(repository, reference, &media_type, asked.body.clone());
        let answer = Answer::new(StatusCode::CREATED, "")
            .header("docker-content-digest", &digest)
            .header(header::LOCATION, format!("/v2/{repository}/manifests/{digest}"));
        match document["subject"]["digest"].as_str() {
            Some(subject) if self.abilities.referrers => answer.header("oci-subject", subject),
            _ => answer,
        }
    }

    fn referrers(&mut self, asked: &Asked<'_>, repository: &str, subject: &str) -> Answer {
        if !self.abilities.referrers {
            return Answer::error(StatusCode::NOT_FOUND, "UNSUPPORTED", "no such path");
        }
        let wanted = asked.query.iter().find(|(key, _)| key == "artifactType").map(|(_, value)| value.as_str());
        let mut referrers = Vec::new();
        for (digest, (media_type, bytes)) in &self.manifests {
            let Ok(document) = serde_json::from_slice::<Value>(bytes) else { continue };
            if document["subject"]["digest"] != subject || self.manifest(repository, digest).is_none() {
                continue;
            }
            let kind = document["artifactType"].as_str().or(document["config"]["mediaType"].as_str());
            if self.abilities.filters && wanted.is_some() && wanted != kind {
                continue;
            }
            referrers.push(json!({
                "mediaType": media_type, "digest": digest, "size": bytes.len(), "artifactType": kind,
                "annotations": document["annotations"],
            }));
        }
        referrers.sort_by_key(|referrer| referrer["digest"].as_str().map(str::to_owned));
        let index = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": referrers,
        });
        let answer = Answer::new(StatusCode::OK, index.to_string())
            .header(header::CONTENT_TYPE, "application/vnd.oci.image.index.v1+json");
        if self.abilities.filters && wanted.is_some() {
            return answer.header("oci-filters-applied", "artifactType");
        }
        answer
    }

    fn tag_list(&mut self, asked: &Asked<'_>, repository: &str, _: &str) -> Answer {
        let tags = self.tags(repository);
        if tags.is_empty() {
            return Answer::error(StatusCode::NOT_FOUND, "NAME_UNKNOWN", "repository name not known to registry");
        }
        self.page(asked, "tags", &tags, json!({ "name": repository }))
    }

    fn page(&self, asked: &Asked<'_>, key: &str, items: &[String], mut document: Value) -> Answer {
        let parameter = |name: &str| asked.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let size = parameter("n").and_then(|n| n.parse().ok()).unwrap_or(usize::MAX).min(self.abilities.page);
        let last = parameter("last").unwrap_or_default();
        let mut rest = items.iter().filter(|item| item.as_str() > last);
        let page: Vec<&String> = rest.by_ref().take(size).collect();
        let link = page.last().filter(|_| rest.next().is_some()).map(|last| {
            let path = asked.path;
            format!("<{path}?last={last}&n={size}>; rel=\"next\"")
        });
        document[key] = json!(page);
        let answer = Answer::new(StatusCode::OK, document.to_string()).header(header::CONTENT_TYPE, "application/json");
        match link {
            Some(link) => answer.header(header::LINK, link),
            None => answer,
        }
    }

    fn upload(&mut self, asked: &Asked<'_>, repository: &str, id: &str) -> Answer {
        if id.is_empty() {
            return if asked.method == Method::POST {
                self.begin_upload(asked, repository)
            } else {
                method_not_allowed()
            };
        }
        let Some(id) = id.parse().ok().filter(|id| self.uploads.get(id).is_some_and(|it| it.repository == repository))
        else {
            return Answer::error(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", "blob upload unknown to registry");
        };
        let state = asked.query.iter().find(|(key, _)| key == "_state").and_then(|(_, value)| value.parse().ok());
        match asked.method.as_str() {
            "GET" => self.upload_status(id, StatusCode::NO_CONTENT),
            "DELETE" => {
                self.uploads.remove(&id);
                Answer::new(StatusCode::NO_CONTENT, "")
            }
            _ if state != self.uploads.get(&id).map(|upload| upload.state) => {
                Answer::error(StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID", "an old location was used")
            }
            "PATCH" if self.abilities.patch => self.patch_upload(asked, id),
            "PUT" => self.end_upload(asked, repository, id),
            _ => method_not_allowed(),
        }
    }

    fn begin_upload(&mut self, asked: &Asked<'_>, repository: &str) -> Answer {
        let parameter = |name: &str| asked.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        if let (Some(digest), Some(from), true) = (parameter("mount"), parameter("from"), self.abilities.mount)
            && let Some(content) = self.blob(from, digest).cloned()
        {
            self.store_blob(repository, digest.to_owned(), content);
            return created(repository, digest);
        }
        if let Some(digest) = parameter("digest") {
            return self.store_upload(repository, digest, asked.body.clone());
        }
        self.uploads_begun += 1;
        let id = self.uploads_begun;
        self.uploads.insert(id, Upload { repository: repository.to_owned(), received: Vec::new(), state: 0 });
        self.upload_status(id, StatusCode::ACCEPTED)
    }

    fn upload_status(&mut self, id: u64, status: StatusCode) -> Answer {
        let Some(upload) = self.uploads.get_mut(&id) else {
            return Answer::error(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", "blob upload unknown to registry");
        };
        upload.state += 1;
        let path = format!("/v2/{}/blobs/uploads/{id}?_state={}", upload.repository, upload.state);
        let location = if self.abilities.relative_locations { path } else { format!("http://{}{path}", self.address) };
        let mut answer = Answer::new(status, "")
            .header(header::LOCATION, location)
            .header(header::RANGE, format!("0-{}", upload.received.len().saturating_sub(1)));
        if let Some(minimum) = self.abilities.chunk_min {
            answer = answer.header("oci-chunk-min-length", minimum.to_string());
        }
        answer
    }

    fn patch_upload(&mut self, asked: &Asked<'_>, id: u64) -> Answer {
        let Some(upload) = self.uploads.get_mut(&id) else { return method_not_allowed() };
        let have = upload.received.len();
        let range = asked.headers.get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
        if let Some(range) = range {
            let expected = format!("{have}-{}", (have + asked.body.len()).saturating_sub(1));
            if range != expected {
                return self.upload_status(id, StatusCode::RANGE_NOT_SATISFIABLE);
            }
        }
        upload.received.extend_from_slice(asked.body);
        self.upload_status(id, StatusCode::ACCEPTED)
    }

    fn end_upload(&mut self, asked: &Asked<'_>, repository: &str, id: u64) -> Answer {
        let Some(digest) = asked.query.iter().find(|(key, _)| key == "digest").map(|(_, value)| value.clone()) else {
            return Answer::error(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "no digest");
        };
        let Some(mut upload) = self.uploads.remove(&id) else { return method_not_allowed() };
        upload.received.extend_from_slice(asked.body);
        self.store_upload(repository, &digest, upload.received.into())
    }

    fn store_upload(&mut self, repository: &str, digest: &str, content: Bytes) -> Answer {
        if digest_of(&content) != digest {
            return Answer::error(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "provided digest did not match");
        }
        self.store_blob(repository, digest.to_owned(), content);
        created(repository, digest)
    }
}

fn upload_id(path: &str) -> Option<u64> {
    path.rsplit_once("/blobs/uploads/")?.1.parse().ok()
}

fn created(repository: &str, digest: &str) -> Answer {
    Answer::new(StatusCode::CREATED, "")
        .header(header::LOCATION, format!("/v2/{repository}/blobs/{digest}"))
        .header("docker-content-digest", digest)
}

fn method_not_allowed() -> Answer {
    Answer::error(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "the operation is unsupported")
}
