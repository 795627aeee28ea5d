//! Tokens: asked for once however many wait, kept until shortly before they expire.
//!
//! Source: distribution's token authentication specification (GET with Basic credentials) and its OAuth 2 variant (POST
//! with a refresh token), which Docker uses where `docker login` has left an identity token.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use reqwest::Url;
use serde::Deserialize;
use tokio::sync::Mutex;

use super::{
    Client,
    connections::Lane,
    host::{Host, basic, bearer},
    location::{MAX_HOPS, Origin, location},
    retry::{self, Attempts},
    scope::Scopes,
    transport::{Patience, Payload},
};
use crate::{auth::Credentials, place::Error};

/// Largest answer of a token server, in bytes. Tokens that list many permissions have tens of kilobytes.
const ANSWER_BYTES: u64 = 1 << 20;
/// How long a token lives whose server does not say. The specification's value.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// A token is not used for the last tenth of its life, at most for so long: the request must arrive before it ends.
const MARGIN: Duration = Duration::from_secs(10);
/// The client's name at token servers.
const CLIENT_ID: &str = "loris";

/// The token for one set of scopes.
#[derive(Default)]
pub(super) struct Slot {
    token: Option<(HeaderValue, Instant)>,
    /// A refusal, so that those who waited for it don't ask again one after another.
    refusal: Option<(Instant, String)>,
}

impl Slot {
    fn valid(&self) -> Option<HeaderValue> {
        self.token.as_ref().filter(|(_, until)| *until > Instant::now()).map(|(token, _)| token.clone())
    }

    /// Drops the token if it is still the one that was refused.
    pub(super) fn forget(&mut self, shown: &HeaderValue) {
        self.token.take_if(|(token, _)| token == shown);
    }
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
    refresh_token: Option<String>,
}

/// Returns the `Authorization` for a set of scopes, from the slot or from the token server.
pub(super) async fn token(
    client: &Client,
    host: &Host,
    slot: &Mutex<Slot>,
    (realm, service): (&str, Option<&str>),
    scopes: &Scopes,
    credentials: Option<&Credentials>,
) -> Result<HeaderValue, Error> {
    let began = Instant::now();
    let mut slot = slot.lock().await;
    if let Some(token) = slot.valid() {
        return Ok(token);
    }
    let denied = |detail: String| Error::Denied { place: host.name.clone(), detail, remedy: client.config().remedy() };
    if let Some((at, detail)) = slot.refusal.as_ref().filter(|(at, _)| *at > began) {
        tracing::trace!(since = ?at.elapsed(), "the token was refused to somebody else");
        return Err(denied(detail.clone()));
    }
    let realm = check_realm(realm, host.base(client).await?)?;
    let asked_at = Instant::now();
    let outcome = match credentials {
        Some(Credentials::Identity(identity)) => post(client, host, &realm, service, scopes, identity).await,
        Some(Credentials::Basic { username, password }) => {
            get(client, host, &realm, service, scopes, Some((username, password))).await
        }
        Some(Credentials::Bearer(_)) | None => get(client, host, &realm, service, scopes, None).await,
    };
    let answer = outcome.inspect_err(|error| {
        if let Error::Denied { detail, .. } = error {
            slot.refusal = Some((Instant::now(), detail.clone()));
        }
    })?;
    let text = answer.token.or(answer.access_token).filter(|token| !token.is_empty());
    let value = text.as_deref().and_then(bearer);
    let value =
        value.ok_or_else(|| denied(format!("the token server {} answered without a token", realm_name(&realm))))?;
    // By our clock from when we asked: the server's `issued_at` is by its own.
    let life = answer.expires_in.map_or(DEFAULT_LIFE, Duration::from_secs);
    let until = asked_at.checked_add(life.saturating_sub(MARGIN.min(life / 10)));
    slot.token = Some((value.clone(), until.unwrap_or(asked_at + DEFAULT_LIFE)));
    if let Some(refresh) = answer.refresh_token.filter(|token| !token.is_empty())
        && matches!(credentials, Some(Credentials::Identity(_)))
    {
        host.replace_identity(Some(refresh));
    }
    Ok(value)
}

fn realm_name(realm: &Url) -> String {
    Origin::of(realm).authority()
}

/// Credentials are sent to the realm, so it must be as safe as the registry itself.
fn check_realm(realm: &str, base: &Url) -> Result<Url, Error> {
    let invalid = |detail: &str| Error::Invalid {
        what: format!("the token server that {} names", Origin::of(base).authority()),
        detail: detail.to_owned(),
    };
    let mut url: Url = realm.parse().map_err(|_| invalid("it is not an address"))?;
    match (url.scheme(), base.scheme()) {
        ("https", _) | ("http", "http") => {}
        ("http", _) => return Err(invalid("credentials would be sent to it without TLS")),
        _ => return Err(invalid("it is neither an https nor an http address")),
    }
    url.set_fragment(None);
    url.set_username("").and_then(|()| url.set_password(None)).map_err(|()| invalid("it has no host"))?;
    Ok(url)
}

async fn get(
    client: &Client,
    host: &Host,
    realm: &Url,
    service: Option<&str>,
    scopes: &Scopes,
    account: Option<(&String, &String)>,
) -> Result<Answer, Error> {
    let mut url = realm.clone();
    {
        let mut query = url.query_pairs_mut();
        query.extend_pairs(service.map(|service| ("service", service)));
        query.extend_pairs(scopes.texts().map(|scope| ("scope", scope)));
        query.extend_pairs(account.map(|(username, _)| ("account", username)));
        query.append_pair("client_id", CLIENT_ID);
    }
    let mut headers = HeaderMap::new();
    headers.extend(account.and_then(|(name, password)| Some((header::AUTHORIZATION, basic(name, password)?))));
    ask(client, host, Method::GET, url, headers, Payload::Empty).await
}

async fn post(
    client: &Client,
    host: &Host,
    realm: &Url,
    service: Option<&str>,
    scopes: &Scopes,
    identity: &str,
) -> Result<Answer, Error> {
    let scope: Vec<String> = scopes.texts().collect();
    let identity = host.newest_identity(identity);
    let pairs = [
        ("grant_type", "refresh_token"),
        ("service", service.unwrap_or_default()),
        ("client_id", CLIENT_ID),
        ("scope", &scope.join(" ")),
        ("refresh_token", &identity),
    ];
    let form = realm.clone().query_pairs_mut().clear().extend_pairs(pairs).finish().query().map(str::to_owned);
    let content_type = HeaderValue::from_static("application/x-www-form-urlencoded");
    let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, content_type)]);
    let payload = Payload::Bytes(form.unwrap_or_default().into());
    let outcome = ask(client, host, Method::POST, realm.clone(), headers, payload).await;
    if matches!(outcome, Err(Error::Denied { .. })) {
        // The files may have a good one by the next time.
        host.replace_identity(None);
    }
    outcome
}

/// Asks, follows redirects (with credentials only within the token server), and repeats what may pass.
async fn ask(
    client: &Client,
    host: &Host,
    method: Method,
    start: Url,
    mut headers: HeaderMap,
    mut payload: Payload,
) -> Result<Answer, Error> {
    // Its certificates and times, and not its headers.
    let settings = &host.settings;
    let mut attempts = Attempts::new(client.config());
    let mut url = start;
    let mut hops = 0;
    client.counters().tokens.fetch_add(1, Ordering::Relaxed);
    headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
    loop {
        let sent = client
            .exchange(&method, &url, headers.clone(), &mut payload, (Lane::Short, Patience::Step), settings)
            .await;
        let mut answer = match sent {
            Ok(answer) => answer,
            Err(error) if error.is_transient() && attempts.pause(None).await => {
                client.count_retry();
                continue;
            }
            Err(error) => return Err(error),
        };
        let status = answer.status();
        if status == StatusCode::OK {
            let body = answer.body("the token server's answer", ANSWER_BYTES).await?;
            // The text of the error would quote the token.
            return serde_json::from_slice(&body).map_err(|_| answer.wrong("the token server's answer is not one"));
        }
        if status.is_redirection() && method == Method::GET && hops < MAX_HOPS {
            let next = location(answer.headers(), &url).map_err(|refused| answer.wrong(refused.to_string()))?;
            if Origin::of(&next) != Origin::of(&url) {
                headers.remove(header::AUTHORIZATION);
            }
            url = next;
            hops += 1;
            continue;
        }
        if retry::is_transient(status) {
            let wait = retry::retry_after(answer.headers());
            // Read before waiting: the answer has a place among the host's requests.
            let error = answer.into_error().await;
            if !attempts.pause(wait).await {
                return Err(error);
            }
            client.count_retry();
            continue;
        }
        if matches!(status, StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            let detail = format!("its token server {}", answer.words().await);
            return Err(Error::Denied { place: host.name.clone(), detail, remedy: client.config().remedy() });
        }
        return Err(answer.into_error().await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_realm_is_as_safe_as_the_registry() {
        let secure: Url = "https://r.example/".parse().unwrap();
        let plain: Url = "http://127.0.0.1:5000/".parse().unwrap();
        for (realm, base, expected) in [
            ("https://auth.example/token", &secure, Some("https://auth.example/token")),
            ("https://u:p@auth.example/token?x=y#z", &secure, Some("https://auth.example/token?x=y")),
            ("http://auth.example/token", &secure, None),
            ("http://127.0.0.1:5001/token", &plain, Some("http://127.0.0.1:5001/token")),
            ("https://auth.example/token", &plain, Some("https://auth.example/token")),
            ("file:///etc/passwd", &plain, None),
            ("/token", &secure, None),
            ("", &secure, None),
        ] {
            assert_eq!(check_realm(realm, base).ok().as_ref().map(Url::as_str), expected, "{realm}");
        }
    }

    #[test]
    fn only_the_refused_token_is_forgotten() {
        let value = |text: &str| bearer(text).unwrap();
        let until = Instant::now() + DEFAULT_LIFE;
        let mut slot = Slot { token: Some((value("new"), until)), refusal: None };
        slot.forget(&value("old"));
        assert_eq!(slot.valid(), Some(value("new")));
        slot.forget(&value("new"));
        assert_eq!(slot.valid(), None);
    }
}
