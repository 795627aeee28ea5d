//! Docker's credential helpers: `docker-credential-NAME get`, a key on standard input, JSON on standard output.

use std::{ffi::OsString, process::Stdio, time::Duration};

use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::Command,
};

use super::Credentials;

/// How long a helper may take. Some ask a key ring, which may have to be unlocked by the user.
const PATIENCE: Duration = Duration::from_secs(60);
/// Largest answer, in bytes. Tokens of cloud providers have a few kilobytes.
const ANSWER_BYTES: u64 = 1 << 20;
/// The user name that marks the secret as an identity token.
const TOKEN_USER: &str = "<token>";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    secret: String,
}

/// Asks a helper; `None` where it has nothing or fails.
pub(super) async fn get(name: &str, key: &str, path: Option<&OsString>) -> Option<Credentials> {
    // The name is part of a program's name and must not lead out of `PATH`.
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'+'));
    if !plain {
        tracing::warn!("a credential helper's name has characters that it must not have; it is not run");
        return None;
    }
    match tokio::time::timeout(PATIENCE, run(&format!("docker-credential-{name}"), key, path)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            tracing::warn!(helper = name, %error, "the credential helper failed");
            None
        }
        Err(_) => {
            tracing::warn!(helper = name, seconds = PATIENCE.as_secs(), "the credential helper did not answer in time");
            None
        }
    }
}

async fn run(program: &str, key: &str, path: Option<&OsString>) -> std::io::Result<Option<Credentials>> {
    let mut command = Command::new(program);
    if let Some(path) = path {
        command.env("PATH", path);
    }
    // Standard error is dropped: helpers have been seen to write secrets to it.
    let mut child = command
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut input) = child.stdin.take() {
        // A helper that ends without reading is judged by its answer.
        let _ = input.write_all(key.as_bytes()).await;
    }
    let mut text = Vec::new();
    if let Some(output) = child.stdout.take() {
        output.take(ANSWER_BYTES).read_to_end(&mut text).await?;
    }
    let status = child.wait().await?;
    if !status.success() {
        // Also "credentials not found", which the protocol can't tell from a failure but by its words.
        tracing::debug!(program, %status, "the credential helper has no credentials");
        return Ok(None);
    }
    let Ok(answer) = serde_json::from_slice::<Answer>(&text) else {
        return Err(std::io::Error::other("its answer is not what the helper protocol says"));
    };
    Ok(Some(match answer.username.as_str() {
        TOKEN_USER => Credentials::Identity(answer.secret),
        username => Credentials::Basic { username: username.to_owned(), password: answer.secret },
    }))
}
