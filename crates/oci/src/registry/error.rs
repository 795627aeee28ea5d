//! Answers that are errors, and transports that fail, as [`Error`]s.
//!
//! A registry's words are shown to the user, so they are cut to a length and freed of control characters, which could
//! otherwise rewrite the terminal.

use http::{Method, StatusCode};
use reqwest::Url;
use serde::Deserialize;

use super::{location::redacted, retry};
use crate::place::Error;

/// Longest answer with an error that is read, in bytes.
pub(super) const ERROR_BYTES: usize = 64 << 10;
/// Longest text of a registry's that is shown, in characters.
const SHOWN: usize = 500;

/// The error document of the distribution specification.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Document {
    errors: Vec<Item>,
    // Token servers of OAuth 2 and some gateways have these instead.
    error_description: Option<String>,
    message: Option<String>,
    details: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Item {
    code: Option<String>,
    message: Option<String>,
}

/// Returns what an answer says about its error: the registry's list, or the beginning of its text.
pub(super) fn words(status: StatusCode, body: &[u8]) -> String {
    let document: Document = serde_json::from_slice(body).unwrap_or_default();
    let items = document.errors.iter().map(|item| {
        let parts = [item.code.as_deref(), item.message.as_deref()];
        parts.into_iter().flatten().filter(|text| !text.is_empty()).collect::<Vec<_>>().join(": ")
    });
    let others = [document.error_description.clone(), document.message.clone(), document.details.clone()];
    let mut texts: Vec<String> = items.chain(others.into_iter().flatten()).filter(|text| !text.is_empty()).collect();
    if texts.is_empty() {
        let text = String::from_utf8_lossy(body);
        // A page for browsers says nothing in its first lines.
        if !text.trim_start().starts_with('<') {
            texts.push(text.trim().to_owned());
        }
    }
    let text = printable(&texts.join("; "));
    if text.is_empty() { format!("answered {status}") } else { format!("answered {status}: {text}") }
}

/// Cuts a foreign text to a length and makes it safe to show.
pub(super) fn printable(text: &str) -> String {
    text.chars().take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().trim().to_owned()
}

/// Returns the error for an answer that the specification, or this client, does not expect.
pub(super) fn unexpected(method: &Method, url: &Url, status: StatusCode, detail: String) -> Error {
    Error::Registry {
        method: method.to_string(),
        url: redacted(url),
        status: Some(status.as_u16()),
        detail,
        transient: retry::is_transient(status),
    }
}

/// Returns the error for an answer that is not what was asked for, and will not be the next time.
pub(super) fn wrong(method: &Method, url: &Url, detail: impl Into<String>) -> Error {
    Error::Registry {
        method: method.to_string(),
        url: redacted(url),
        status: None,
        detail: detail.into(),
        transient: false,
    }
}

/// Returns the error for a connection that was not made, broke, or stood still.
pub(super) fn broken(method: &Method, url: &Url, detail: impl Into<String>) -> Error {
    Error::Registry {
        method: method.to_string(),
        url: redacted(url),
        status: None,
        detail: detail.into(),
        transient: true,
    }
}

/// Returns the error for what the HTTP library says.
pub(super) fn transport(method: &Method, url: &Url, error: reqwest::Error) -> Error {
    // The library's own words have the address with its query.
    let error = error.without_url();
    let certificate = tls_failure(&error);
    let mut detail = chain(&error);
    if certificate {
        detail.push_str("; trust its authority with --ca FILE, or use --tls-verify=false where that is safe");
    }
    // A request that could not be built will not be built the next time.
    let transient = !certificate && !error.is_builder();
    Error::Registry { method: method.to_string(), url: redacted(url), status: None, detail, transient }
}

/// Says whether the peers could not agree on TLS, which the next attempt will not change.
fn tls_failure(error: &(dyn std::error::Error + 'static)) -> bool {
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return matches!(
            tls,
            rustls::Error::InvalidCertificate(_)
                | rustls::Error::AlertReceived(_)
                | rustls::Error::PeerIncompatible(_)
                | rustls::Error::NoCertificatesPresented
        );
    }
    // An I/O error's source is the source of the error that it wraps: the wrapped one itself would be passed over.
    let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    wrapped.is_some_and(|inner| tls_failure(inner)) || error.source().is_some_and(tls_failure)
}

/// Returns an error with all that led to it, each part once.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        source = error.source();
    }
    printable(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registrys_words_are_found_and_made_safe() {
        let status = StatusCode::FORBIDDEN;
        let html = "<!DOCTYPE html><html>sorry</html>";
        for (body, expected) in [
            (r#"{"errors":[{"code":"DENIED","message":"no","detail":{"x":1}}]}"#, "answered 403 Forbidden: DENIED: no"),
            (r#"{"errors":[{"code":"A"},{"message":"b"}]}"#, "answered 403 Forbidden: A; b"),
            (r#"{"details":"incorrect username"}"#, "answered 403 Forbidden: incorrect username"),
            ("plain\u{1b}[2J words\n", "answered 403 Forbidden: plain [2J words"),
            (html, "answered 403 Forbidden"),
            ("", "answered 403 Forbidden"),
            (r#"{"errors":"odd"}"#, r#"answered 403 Forbidden: {"errors":"odd"}"#),
        ] {
            assert_eq!(words(status, body.as_bytes()), expected);
        }
        assert!(words(status, "x".repeat(100_000).as_bytes()).len() < 600);
    }
}
