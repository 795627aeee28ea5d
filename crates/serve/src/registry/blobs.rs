//! Blobs: read whole or by a range, uploaded, mounted, deleted.

use std::{
    io::{Seek, SeekFrom},
    ops::Range,
    sync::{Arc, atomic::Ordering},
};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header},
};
use bytes::Bytes;
use futures_util::TryStreamExt;
use loris_format::digest::Digest;
use tokio::io::AsyncReadExt;
use tokio_util::io::ReaderStream;

use super::{
    Registry, STREAM_BYTES,
    http::{Answer, CONTENT_DIGEST, Query, empty, is_known, set},
    name::Repository,
    problem::Problem,
    upload::Upload,
};

/// The identifier of an upload; Docker's clients show it.
const UPLOAD_ID: HeaderName = HeaderName::from_static("docker-upload-uuid");

/// `GET` and `HEAD /v2/<name>/blobs/<digest>`
pub async fn get(registry: &Registry, repository: Repository, digest: Digest, headers: &HeaderMap) -> Answer {
    let found = registry.blocking(move |registry| registry.storage().blob(&repository, &digest)).await?;
    let (mut file, size) = found.ok_or_else(|| Problem::blob_unknown(format!("no blob {digest} here")))?;
    let mut response = if is_known(headers, &digest) {
        empty(StatusCode::NOT_MODIFIED)
    } else {
        let range = match asked_range(headers, &digest, size) {
            Asked::Whole => None,
            Asked::Part(range) => Some(range),
            Asked::Nothing => {
                return Err(Problem::range_invalid(format!("the blob has {size} bytes"))
                    .with(header::CONTENT_RANGE, &format!("bytes */{size}")));
            }
        };
        let mut response = empty(if range.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK });
        if let Some(range) = &range {
            // A range that was asked for is never empty.
            set(&mut response, header::CONTENT_RANGE, &format!("bytes {}-{}/{size}", range.start, range.end - 1));
        }
        let range = range.unwrap_or(0..size);
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(range.end - range.start));
        file.seek(SeekFrom::Start(range.start)).map_err(|error| {
            tracing::error!(%error, %digest, "failed to seek in a blob");
            Problem::internal("the registry's storage failed")
        })?;
        let mut file = tokio::fs::File::from_std(file);
        file.set_max_buf_size(STREAM_BYTES);
        let stream = ReaderStream::with_capacity(file.take(range.end - range.start), STREAM_BYTES);
        *response.body_mut() = Body::from_stream(stream);
        response
    };
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    response.headers_mut().insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    // What a digest names never changes.
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("max-age=31536000, immutable"));
    set(&mut response, header::ETAG, &format!("\"{digest}\""));
    set(&mut response, CONTENT_DIGEST, &digest.to_string());
    Ok(response)
}

/// `DELETE /v2/<name>/blobs/<digest>`
pub async fn delete(registry: &Registry, repository: Repository, digest: Digest) -> Answer {
    if registry.blocking(move |registry| registry.storage().delete_blob(&repository, &digest)).await? {
        Ok(empty(StatusCode::ACCEPTED))
    } else {
        Err(Problem::blob_unknown(format!("no blob {digest} here")))
    }
}

/// `POST /v2/<name>/blobs/uploads/`: begins an upload, or does all of it (`digest`), or mounts (`mount`, `from`).
pub async fn start(registry: &Registry, repository: Repository, query: &Query, request: Request<Body>) -> Answer {
    if let Some(digest) = query.get("mount") {
        let digest = parse_digest(&digest)?;
        let from = query.get("from").and_then(|from| from.parse::<Repository>().ok());
        if let Some(from) = from {
            let to = repository.clone();
            if registry.blocking(move |registry| registry.storage().mount_blob(&from, &to, &digest)).await? {
                return Ok(created(&repository, &digest));
            }
        }
        // What can't be mounted is uploaded.
    }
    let digest = query.get("digest").map(|digest| parse_digest(&digest)).transpose()?;
    let name = repository.clone();
    let (id, upload) = registry
        .blocking(move |registry| -> Result<_, Problem> {
            let (file, path) = registry.storage().new_upload()?;
            registry.uploads().start(name, file, path).ok_or_else(|| Problem::too_many("too many uploads at a time"))
        })
        .await?;
    let Some(digest) = digest else { return Ok(accepted(&repository, &id, &upload)) };
    let received = receive(registry, &upload, request).await;
    let finished = match received {
        Ok(()) => complete(registry, repository, upload, digest).await,
        Err(problem) => Err(problem),
    };
    registry.uploads().end(&id);
    finished
}

/// `PATCH /v2/<name>/blobs/uploads/<id>`: the next chunk.
pub async fn append(registry: &Registry, repository: Repository, id: &str, request: Request<Body>) -> Answer {
    let upload = find(registry, &repository, id)?;
    {
        let _writing = upload.writing.try_lock().map_err(|_| Problem::upload_busy("another request is writing"))?;
        check_chunk(&repository, id, &upload, request.headers())?;
        receive(registry, &upload, request).await?;
    }
    Ok(accepted(&repository, id, &upload))
}

/// `PUT /v2/<name>/blobs/uploads/<id>?digest=<digest>`: the last chunk, which may be empty.
pub async fn finish(
    registry: &Registry,
    repository: Repository,
    id: &str,
    query: &Query,
    request: Request<Body>,
) -> Answer {
    let upload = find(registry, &repository, id)?;
    let digest = query.get("digest").ok_or_else(|| Problem::digest_invalid("the digest is missing"))?;
    let digest = parse_digest(&digest)?;
    let writing = Arc::clone(&upload);
    let _writing = writing.writing.try_lock().map_err(|_| Problem::upload_busy("another request is writing"))?;
    check_chunk(&repository, id, &upload, request.headers())?;
    receive(registry, &upload, request).await?;
    let finished = complete(registry, repository, upload, digest).await;
    registry.uploads().end(id);
    finished
}

/// `GET /v2/<name>/blobs/uploads/<id>`: how far the upload has come.
pub fn status(registry: &Registry, repository: &Repository, id: &str) -> Answer {
    let upload = find(registry, repository, id)?;
    let mut response = accepted(repository, id, &upload);
    *response.status_mut() = StatusCode::NO_CONTENT;
    response.headers_mut().remove(header::CONTENT_LENGTH);
    Ok(response)
}

/// `DELETE /v2/<name>/blobs/uploads/<id>`: gives an upload up.
pub fn cancel(registry: &Registry, repository: &Repository, id: &str) -> Answer {
    find(registry, repository, id)?;
    registry.uploads().end(id);
    Ok(empty(StatusCode::NO_CONTENT))
}

fn find(registry: &Registry, repository: &Repository, id: &str) -> Result<Arc<Upload>, Problem> {
    registry.uploads().find(repository, id).ok_or_else(|| Problem::upload_unknown("no such upload"))
}

fn parse_digest(text: &str) -> Result<Digest, Problem> {
    text.parse::<Digest>().map_err(|error| Problem::digest_invalid(error.to_string()))
}

/// Checks that a chunk begins where the last one ended, if it says where it begins.
fn check_chunk(repository: &Repository, id: &str, upload: &Upload, headers: &HeaderMap) -> Result<(), Problem> {
    let Some(range) = headers.get(header::CONTENT_RANGE) else { return Ok(()) };
    let range = range.to_str().ok().map(|range| range.strip_prefix("bytes ").unwrap_or(range));
    let range = range.and_then(|range| range.split('/').next()?.split_once('-'));
    let range =
        range.and_then(|(start, end)| Some((start.trim().parse::<u64>().ok()?, end.trim().parse::<u64>().ok()?)));
    let Some((start, end)) = range.filter(|(start, end)| start <= end) else {
        return Err(Problem::upload_invalid("Content-Range is not <first>-<last>"));
    };
    if start != upload.size() {
        let size = upload.size();
        return Err(Problem::range_invalid(format!("the next chunk begins at {size}"))
            .with(header::LOCATION, &location(repository, id))
            .with(header::RANGE, &received_range(size)));
    }
    let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    match length {
        Some(length) if Some(length) != (end - start).checked_add(1) => {
            Err(Problem::size_invalid("Content-Length and Content-Range differ"))
        }
        _ => Ok(()),
    }
}

/// Writes a request's body to the end of an upload. What came before the body broke off is kept, to be resumed.
async fn receive(registry: &Registry, upload: &Arc<Upload>, request: Request<Body>) -> Result<(), Problem> {
    let mut body = request.into_body().into_data_stream();
    let mut pending: Vec<Bytes> = Vec::new();
    let mut pending_bytes = 0;
    loop {
        let next = body.try_next().await;
        let ended = !matches!(next, Ok(Some(_)));
        if let Ok(Some(chunk)) = &next {
            registry.inner.counters.bytes_received.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            pending_bytes += chunk.len();
            pending.push(chunk.clone());
        }
        if pending_bytes >= STREAM_BYTES || (ended && pending_bytes > 0) {
            let (chunks, upload) = (std::mem::take(&mut pending), Arc::clone(upload));
            pending_bytes = 0;
            registry
                .blocking(move |_| {
                    upload.append(&chunks).map_err(|error| {
                        tracing::error!(%error, "failed to write an upload");
                        Problem::internal("the registry's storage failed")
                    })
                })
                .await?;
        }
        match next {
            Ok(Some(_)) => {}
            Ok(None) => return Ok(()),
            Err(error) => return Err(Problem::upload_invalid(format!("the body broke off: {error}"))),
        }
    }
}

/// Makes a complete upload a blob.
async fn complete(registry: &Registry, repository: Repository, upload: Arc<Upload>, digest: Digest) -> Answer {
    let name = repository.clone();
    registry
        .blocking(move |registry| -> Result<(), Problem> {
            let finished = upload.finish(&digest).map_err(|error| {
                tracing::error!(%error, "failed to read an upload");
                Problem::internal("the registry's storage failed")
            })?;
            let (file, path) =
                finished.ok_or_else(|| Problem::digest_invalid("the content is not what the digest names"))?;
            Ok(registry.storage().add_blob(&name, &digest, &file, path)?)
        })
        .await?;
    Ok(created(&repository, &digest))
}

fn created(repository: &Repository, digest: &Digest) -> Response<Body> {
    let mut response = empty(StatusCode::CREATED);
    set(&mut response, header::LOCATION, &format!("/v2/{repository}/blobs/{digest}"));
    set(&mut response, CONTENT_DIGEST, &digest.to_string());
    response
}

fn accepted(repository: &Repository, id: &str, upload: &Upload) -> Response<Body> {
    let mut response = empty(StatusCode::ACCEPTED);
    set(&mut response, header::LOCATION, &location(repository, id));
    set(&mut response, header::RANGE, &received_range(upload.size()));
    set(&mut response, UPLOAD_ID, id);
    response
}

fn location(repository: &Repository, id: &str) -> String {
    format!("/v2/{repository}/blobs/uploads/{id}")
}

/// What has come, as `0-<last>`. The form can't say "nothing"; registries say `0-0` then.
fn received_range(size: u64) -> String {
    format!("0-{}", size.saturating_sub(1))
}

/// What a `Range` header asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Whole,
    Part(Range<u64>),
    Nothing,
}

/// Reads the `Range` header (RFC 9110, section 14). One that is malformed, of another unit or of several ranges is
/// ignored, as a server may.
fn asked_range(headers: &HeaderMap, digest: &Digest, size: u64) -> Asked {
    let Some(text) = headers.get(header::RANGE).and_then(|value| value.to_str().ok()) else { return Asked::Whole };
    let unchanged = match headers.get(header::IF_RANGE) {
        None => true,
        Some(value) => value.as_bytes() == format!("\"{digest}\"").as_bytes(),
    };
    match text.strip_prefix("bytes=").and_then(|range| range.trim().split_once('-')) {
        Some((first, last)) if unchanged => part(first.trim(), last.trim(), size),
        _ => Asked::Whole,
    }
}

fn part(first: &str, last: &str, size: u64) -> Asked {
    let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
        // Digits that are no u64 are a number beyond every blob.
        true if !text.is_empty() => Some(text.parse::<u64>().unwrap_or(u64::MAX)),
        _ => None,
    };
    let range = match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(size),
        (Some(first), None) if last.is_empty() => first..size,
        (None, Some(suffix)) if first.is_empty() => size.saturating_sub(suffix)..size,
        _ => return Asked::Whole,
    };
    if range.is_empty() { Asked::Nothing } else { Asked::Part(range) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let cases = [
            ("bytes=0-0", Asked::Part(0..1)),
            ("bytes=2-4", Asked::Part(2..5)),
            ("bytes=2-", Asked::Part(2..10)),
            ("bytes=9-100", Asked::Part(9..10)),
            ("bytes=0-99999999999999999999999", Asked::Part(0..10)),
            ("bytes=-3", Asked::Part(7..10)),
            ("bytes=-30", Asked::Part(0..10)),
            ("bytes=10-", Asked::Nothing),
            ("bytes=10-11", Asked::Nothing),
            ("bytes=99999999999999999999999-", Asked::Nothing),
            ("bytes=-0", Asked::Nothing),
            ("bytes=4-2", Asked::Whole),
            ("bytes=0-1,3-4", Asked::Whole),
            ("bytes=-", Asked::Whole),
            ("bytes=a-b", Asked::Whole),
            ("bytes=+1-2", Asked::Whole),
            ("lines=0-1", Asked::Whole),
            ("", Asked::Whole),
        ];
        let digest = Digest::sha256_of(b"0123456789");
        for (text, asked) in cases {
            let mut headers = HeaderMap::new();
            headers.insert(header::RANGE, HeaderValue::from_static(text));
            assert_eq!(asked_range(&headers, &digest, 10), asked, "{text}");
            headers.insert(header::IF_RANGE, HeaderValue::from_static("\"other\""));
            assert_eq!(asked_range(&headers, &digest, 10), Asked::Whole, "{text}");
        }
    }
}
