//! What a registry answers when it can't do what it was asked for.
//!
//! Source: OCI distribution specification 1.1, "Error Codes".

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, Response, StatusCode, header},
};
use serde_json::json;

use super::storage::StorageError;

/// An answer that says no: a status, the specification's code, and words for a person.
#[derive(Debug)]
pub struct Problem {
    status: StatusCode,
    code: &'static str,
    message: String,
    headers: HeaderMap,
}

impl Problem {
    /// Adds a header to the answer.
    pub fn with(mut self, name: header::HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }

    /// Turns it into an answer.
    pub fn into_response(self) -> Response<Body> {
        let body = json!({ "errors": [{ "code": self.code, "message": self.message, "detail": null }] }).to_string();
        let length = body.len();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        response
    }
}

macro_rules! problems {
    ($($(#[$doc:meta])* $name:ident = $status:ident, $code:literal;)*) => {
        impl Problem {
            $($(#[$doc])*
            pub fn $name(message: impl Into<String>) -> Self {
                Self { status: StatusCode::$status, code: $code, message: message.into(), headers: HeaderMap::new() }
            })*
        }
    };
}

problems! {
    /// The path is none of ours.
    not_found = NOT_FOUND, "NAME_UNKNOWN";
    /// No such repository.
    name_unknown = NOT_FOUND, "NAME_UNKNOWN";
    /// Not a repository's name.
    name_invalid = BAD_REQUEST, "NAME_INVALID";
    /// No such manifest or tag.
    manifest_unknown = NOT_FOUND, "MANIFEST_UNKNOWN";
    /// Not a manifest.
    manifest_invalid = BAD_REQUEST, "MANIFEST_INVALID";
    /// A manifest that is larger than a registry has to take.
    manifest_too_large = PAYLOAD_TOO_LARGE, "SIZE_INVALID";
    /// A manifest whose blobs have not been pushed.
    manifest_blob_unknown = NOT_FOUND, "MANIFEST_BLOB_UNKNOWN";
    /// No such blob.
    blob_unknown = NOT_FOUND, "BLOB_UNKNOWN";
    /// No such upload.
    upload_unknown = NOT_FOUND, "BLOB_UPLOAD_UNKNOWN";
    /// The upload can't go on like this.
    upload_invalid = BAD_REQUEST, "BLOB_UPLOAD_INVALID";
    /// The content is not what the digest names, or the digest is none.
    digest_invalid = BAD_REQUEST, "DIGEST_INVALID";
    /// The length is not the one that was announced.
    size_invalid = BAD_REQUEST, "SIZE_INVALID";
    /// A chunk that doesn't begin where the last one ended, or a part that the blob hasn't.
    range_invalid = RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID";
    /// Another request is writing to the upload.
    upload_busy = CONFLICT, "BLOB_UPLOAD_INVALID";
    /// Too much at a time.
    too_many = TOO_MANY_REQUESTS, "TOOMANYREQUESTS";
    /// A method that the path doesn't know.
    unsupported = METHOD_NOT_ALLOWED, "UNSUPPORTED";
    /// Our own fault.
    internal = INTERNAL_SERVER_ERROR, "UNKNOWN";
}

impl From<StorageError> for Problem {
    fn from(error: StorageError) -> Self {
        // The client is told that it was us, and not where our files are.
        tracing::error!(%error, "the registry's storage failed");
        Self::internal("the registry's storage failed")
    }
}
