//! The part of an API server's protocol that is about secrets, over TLS. No API server is to be had from the packages that
//! tests install; `kubectl` is, and takes this one for one.
//!
//! Source: Kubernetes' documentation, "Kubernetes API Concepts": pages with `continue`, watches from a version, bookmarks,
//! and 410 for versions that are too old, as a status and as an event.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// Secrets in a page, whatever is asked for.
const PAGE: usize = 2;

/// A running server. Ends with the value.
pub struct ApiServer {
    shared: Arc<Shared>,
    address: String,
    task: JoinHandle<()>,
}

struct Shared {
    state: Mutex<State>,
    /// Moves when something has changed, or watches are to end.
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    version: u64,
    /// Watches from before it are refused.
    oldest: u64,
    /// Ends watches when it changes.
    generation: u64,
    secrets: BTreeMap<String, (String, Value)>,
    /// Version, type of secrets, and line.
    events: Vec<(u64, String, Value)>,
    token: Option<String>,
    pages: HashMap<String, (u64, Vec<Value>)>,
    requests: Vec<String>,
    /// A list's next page is refused with 410 once.
    forget_pages: bool,
}

impl ApiServer {
    /// Starts one with the certificates in a directory. Clients show `token` or a certificate.
    pub async fn start(certificates: &Path, token: Option<&str>) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let read = |name: &str| std::fs::read(certificates.join(name)).unwrap();
        let chain = vec![CertificateDer::from_pem_slice(&read("server.cert")).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(&read("server.key")).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&read("ca.crt")).unwrap()).unwrap();
        let verifier = WebPkiClientVerifier::builder(roots.into()).allow_unauthenticated().build().unwrap();
        let config = ServerConfig::builder().with_client_cert_verifier(verifier).with_single_cert(chain, key).unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = State { version: 1000, token: token.map(str::to_owned), ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: watch::channel(0).0 });
        let of_task = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, shared) = (acceptor.clone(), Arc::clone(&of_task));
                tokio::spawn(async move { shared.serve(&acceptor, stream).await });
            }
        });
        Self { shared, address, task }
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Makes or changes a secret of a type, with the text under the type's key.
    pub fn put(&self, name: &str, kind: &str, key: &str, text: &str) {
        self.change("MODIFIED", name, kind, &json!({key: BASE64_STANDARD.encode(text)}));
    }

    pub fn delete(&self, name: &str) {
        let kind = self.state().secrets[name].0.clone();
        self.change("DELETED", name, &kind, &json!({}));
    }

    /// Sends what only says how far it is.
    pub fn bookmark(&self, kind: &str) {
        let mut state = self.state();
        state.version += 1;
        let version = state.version;
        let object =
            json!({"kind": "Secret", "apiVersion": "v1", "metadata": {"resourceVersion": version.to_string()}});
        state.events.push((version, kind.to_owned(), json!({"type": "BOOKMARK", "object": object})));
        drop(state);
        self.shared.changed.send_modify(|count| *count += 1);
    }

    /// Ends all watches.
    pub fn end_watches(&self) {
        self.state().generation += 1;
        self.shared.changed.send_modify(|count| *count += 1);
    }

    /// Ends all watches, and knows nothing of what was before any more.
    pub fn compact(&self) {
        let mut state = self.state();
        state.version += 10;
        state.oldest = state.version;
        state.events.clear();
        drop(state);
        self.end_watches();
    }

    pub fn forget_pages(&self) {
        self.state().forget_pages = true;
    }

    pub fn set_token(&self, token: &str) {
        self.state().token = Some(token.to_owned());
    }

    /// Returns the requests so far, with the status that each got.
    pub fn requests(&self) -> Vec<String> {
        self.state().requests.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap()
    }

    fn change(&self, what: &str, name: &str, kind: &str, data: &Value) {
        let mut state = self.state();
        state.version += 1;
        let version = state.version;
        let (namespace, short) = name.split_once('/').unwrap();
        let object = json!({
            "kind": "Secret",
            "apiVersion": "v1",
            "metadata": {"namespace": namespace, "name": short, "uid": "u", "resourceVersion": version.to_string(),
                         "managedFields": [{"manager": "kubectl"}]},
            "type": kind,
            "data": data,
        });
        let what = if state.secrets.contains_key(name) { what } else { "ADDED" };
        if what == "DELETED" {
            state.secrets.remove(name);
        } else {
            state.secrets.insert(name.to_owned(), (kind.to_owned(), object.clone()));
        }
        state.events.push((version, kind.to_owned(), json!({"type": what, "object": object})));
        drop(state);
        self.shared.changed.send_modify(|count| *count += 1);
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.task.abort();
        self.end_watches();
    }
}

impl Shared {
    async fn serve(&self, acceptor: &TlsAcceptor, stream: TcpStream) -> Option<()> {
        let mut stream = acceptor.accept(stream).await.ok()?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.ok()?);
        }
        let head = String::from_utf8(head).ok()?;
        let target = head.split(' ').nth(1)?.to_owned();
        let url: reqwest::Url = format!("https://x{target}").parse().ok()?;
        let query: HashMap<String, String> = url.query_pairs().into_owned().collect();
        let shown = head.lines().find_map(|line| {
            Some(line.split_once(": ")?)
                .filter(|(name, _)| name.eq_ignore_ascii_case("authorization"))
                .map(|(_, value)| value.to_owned())
        });
        let has_certificate = stream.get_ref().1.peer_certificates().is_some();
        let is_watch = query.get("watch").is_some_and(|value| value == "1" || value == "true");
        let (status, body) = {
            let mut state = self.state.lock().unwrap();
            let wanted = state.token.as_ref().map(|token| format!("Bearer {token}"));
            let (status, body) = if !has_certificate && (wanted.is_none() || shown != wanted) {
                (401, json!({"kind": "Status", "code": 401, "reason": "Unauthorized"}))
            } else if url.path() != "/api/v1/secrets" {
                (404, json!({"kind": "Status", "code": 404}))
            } else if is_watch {
                (200, Value::Null)
            } else {
                state.list(&query)
            };
            state.requests.push(format!("{status} {target}"));
            (status, body)
        };
        let mut answer = format!("HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nConnection: close\r\n");
        if status == 200 && is_watch {
            answer.push_str("\r\n");
            stream.write_all(answer.as_bytes()).await.ok()?;
            self.watch(&mut stream, &query).await;
        } else {
            let body = body.to_string();
            answer.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
            stream.write_all(answer.as_bytes()).await.ok()?;
        }
        stream.shutdown().await.ok()
    }

    async fn watch(&self, stream: &mut TlsStream<TcpStream>, query: &HashMap<String, String>) -> Option<()> {
        let mut version: u64 = query.get("resourceVersion")?.parse().ok()?;
        let kind = query.get("fieldSelector")?.strip_prefix("type=")?;
        let mut changed = self.changed.subscribe();
        let generation = {
            let state = self.state.lock().unwrap();
            if version < state.oldest { None } else { Some(state.generation) }
        };
        let Some(generation) = generation else {
            let status = json!({"kind": "Status", "status": "Failure", "reason": "Expired", "code": 410});
            let line = json!({"type": "ERROR", "object": status});
            return stream.write_all(format!("{line}\n").as_bytes()).await.ok();
        };
        loop {
            changed.borrow_and_update();
            let mut text = String::new();
            {
                let state = self.state.lock().unwrap();
                if state.generation != generation {
                    return Some(());
                }
                let since = version;
                for (at, of, line) in state.events.iter().filter(|(at, ..)| *at > since) {
                    if of == kind {
                        text.push_str(&format!("{line}\n"));
                    }
                    version = *at;
                }
            }
            // In pieces that know nothing of lines.
            for piece in text.as_bytes().chunks(100) {
                stream.write_all(piece).await.ok()?;
                stream.flush().await.ok()?;
            }
            changed.changed().await.ok()?;
        }
    }
}

impl State {
    fn list(&mut self, query: &HashMap<String, String>) -> (u16, Value) {
        let (version, mut rest) = match query.get("continue") {
            Some(_) if std::mem::take(&mut self.forget_pages) => {
                return (410, json!({"kind": "Status", "reason": "Expired", "code": 410}));
            }
            Some(token) => self.pages.remove(token).unwrap(),
            None => {
                let selected = query.get("fieldSelector").and_then(|selector| selector.strip_prefix("type="));
                let meant = self.secrets.values().filter(|(kind, _)| selected.is_none_or(|selected| selected == kind));
                (self.version, meant.map(|(_, object)| object.clone()).collect())
            }
        };
        let items: Vec<Value> = rest.drain(..rest.len().min(PAGE)).collect();
        let mut metadata = json!({"resourceVersion": version.to_string()});
        if !rest.is_empty() {
            let token = format!("token+/{}", self.requests.len());
            metadata["continue"] = json!(token);
            metadata["remainingItemCount"] = json!(rest.len());
            self.pages.insert(token, (version, rest));
        }
        (200, json!({"kind": "SecretList", "apiVersion": "v1", "metadata": metadata, "items": items}))
    }
}
