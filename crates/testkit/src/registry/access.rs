//! Who may do what: Basic credentials, or tokens that this registry hands out and that expire soon.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use base64::Engine as _;
use http::{HeaderMap, Method, StatusCode, header};
use serde_json::json;

use super::content::{Answer, Asked};

/// The `service` of the token server.
pub(super) const SERVICE: &str = "fault-registry";

/// How a client must show who it is.
#[derive(Clone, Debug, Default)]
pub enum Access {
    /// Not at all.
    #[default]
    Open,
    /// By user name and password in each request.
    Basic {
        /// The only user.
        username: String,
        /// Its password.
        password: String,
    },
    /// By a token from `/token`.
    Token(Tokens),
}

/// The tokens that the token server hands out.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// User name and password that it asks for; anybody gets a token where this is `None`.
    pub credentials: Option<(String, String)>,
    /// The refresh (identity) token that it takes in a POST.
    pub refresh_token: Option<String>,
    /// How long a token is good, as `expires_in` says it; left out of the answer where this is `None`.
    pub expires_in_seconds: Option<u64>,
    /// How long a token is really good.
    pub lifetime: Duration,
    /// How many requests a token is good for.
    pub uses: usize,
    /// Whether the token server is on the other address.
    pub elsewhere: bool,
    /// Whether the answer calls it `access_token`.
    pub access_token_field: bool,
}

impl Default for Tokens {
    fn default() -> Self {
        Self {
            credentials: None,
            refresh_token: None,
            expires_in_seconds: Some(300),
            lifetime: Duration::from_secs(300),
            uses: usize::MAX,
            elsewhere: false,
            access_token_field: false,
        }
    }
}

/// The tokens that are out.
#[derive(Default)]
pub(super) struct Guard {
    pub(super) access: Access,
    tokens: HashMap<String, Token>,
    issued: usize,
}

struct Token {
    scopes: Vec<String>,
    expires: Instant,
    uses: usize,
}

impl Guard {
    pub(super) fn issued(&self) -> usize {
        self.issued
    }

    pub(super) fn expire_all(&mut self) {
        self.tokens.clear();
    }

    /// Returns the answer to a request that shows too little.
    pub(super) fn refuse(&mut self, asked: &Asked<'_>, addresses: (&str, &str)) -> Option<Answer> {
        let shown = asked.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let granted = match &self.access {
            Access::Open => true,
            Access::Basic { username, password } => basic(asked.headers) == Some((username.clone(), password.clone())),
            Access::Token(_) => match self.tokens.get_mut(shown.strip_prefix("Bearer ").unwrap_or_default()) {
                Some(token) if token.expires > Instant::now() && token.uses > 0 => {
                    token.uses -= usize::from(token.uses != usize::MAX);
                    needed_scopes(asked).iter().all(|needed| covers(&token.scopes, needed))
                }
                _ => false,
            },
        };
        (!granted).then(|| self.challenge(asked, addresses))
    }

    /// Returns the 401 that says how to get in.
    pub(super) fn challenge(&self, asked: &Asked<'_>, (registry, elsewhere): (&str, &str)) -> Answer {
        let challenge = match &self.access {
            Access::Open | Access::Basic { .. } => "Basic realm=\"fault \\\"registry\\\"\"".to_owned(),
            Access::Token(tokens) => {
                let host = if tokens.elsewhere { elsewhere } else { registry };
                let scope = needed_scopes(asked).join(" ");
                format!("Bearer realm=\"http://{host}/token\",service=\"{SERVICE}\",scope=\"{scope}\"")
            }
        };
        Answer::error(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "authentication required")
            .header(header::WWW_AUTHENTICATE, challenge)
    }

    /// Answers a request to the token server.
    pub(super) fn token_request(&mut self, asked: &Asked<'_>) -> Answer {
        let Access::Token(tokens) = self.access.clone() else {
            return Answer::error(StatusCode::NOT_FOUND, "UNSUPPORTED", "no token server here");
        };
        let form: Vec<(String, String)>;
        let parameters = if asked.method == Method::POST {
            form = super::server::parse_query(&String::from_utf8_lossy(asked.body));
            let parameter = |name: &str| form.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
            if parameter("grant_type").as_deref() != Some("refresh_token")
                || parameter("refresh_token") != tokens.refresh_token
                || tokens.refresh_token.is_none()
            {
                return Answer::error(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "refresh token refused");
            }
            &form
        } else {
            if tokens.credentials.is_some() && basic(asked.headers) != tokens.credentials {
                return Answer::error(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "incorrect username or password");
            }
            asked.query
        };
        if !parameters.iter().any(|(key, value)| key == "service" && value == SERVICE) {
            return Answer::error(StatusCode::BAD_REQUEST, "DENIED", "wrong service");
        }
        let scopes = parameters.iter().filter(|(key, _)| key == "scope");
        let scopes = scopes.flat_map(|(_, value)| value.split(' ')).map(str::to_owned).collect();
        self.issued += 1;
        let token = format!("token-{}", self.issued);
        let expires = Instant::now() + tokens.lifetime;
        self.tokens.insert(token.clone(), Token { scopes, expires, uses: tokens.uses });
        let mut document = json!({ if tokens.access_token_field { "access_token" } else { "token" }: token });
        if let Some(seconds) = tokens.expires_in_seconds {
            document["expires_in"] = json!(seconds);
        }
        Answer::new(StatusCode::OK, document.to_string()).header(header::CONTENT_TYPE, "application/json")
    }
}

fn basic(headers: &HeaderMap) -> Option<(String, String)> {
    let shown = headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Basic ")?;
    let text = base64::engine::general_purpose::STANDARD.decode(shown).ok()?;
    let (username, password) = std::str::from_utf8(&text).ok()?.split_once(':')?;
    Some((username.to_owned(), password.to_owned()))
}

/// Returns `repository:NAME:ACTIONS` of what a request needs.
fn needed_scopes(asked: &Asked<'_>) -> Vec<String> {
    let Some(path) = asked.path.strip_prefix("/v2/").filter(|path| !path.is_empty()) else { return Vec::new() };
    if path == "_catalog" {
        return vec!["registry:catalog:*".to_owned()];
    }
    let words = ["/blobs/", "/manifests/", "/referrers/", "/tags/"];
    let Some(repository) = words.iter().find_map(|word| path.find(word)).map(|at| &path[..at]) else {
        return Vec::new();
    };
    let actions = match asked.method.as_str() {
        "GET" | "HEAD" if !path.contains("/blobs/uploads/") => "pull",
        "DELETE" if !path.contains("/blobs/uploads/") => "delete",
        _ => "pull,push",
    };
    let mut scopes = vec![format!("repository:{repository}:{actions}")];
    if let Some((_, from)) = asked.query.iter().find(|(key, _)| key == "from") {
        scopes.push(format!("repository:{from}:pull"));
    }
    scopes
}

fn covers(scopes: &[String], needed: &str) -> bool {
    let split = |scope: &str| scope.rsplit_once(':').map(|(name, actions)| (name.to_owned(), actions.to_owned()));
    let Some((resource, actions)) = split(needed) else { return false };
    let granted: Vec<String> = scopes
        .iter()
        .filter_map(|scope| split(scope))
        .filter(|(name, _)| *name == resource)
        .flat_map(|(_, actions)| actions.split(',').map(str::to_owned).collect::<Vec<_>>())
        .collect();
    actions.split(',').all(|action| granted.iter().any(|granted| granted == action))
}
