//! kubelet's credentials: it names this socket as its image service (`--image-service-endpoint`), everything is passed on to
//! the runtime's, and what kubelet pulls with is taken from it on the way.
//!
//! ```text
//!  kubelet ──▶ ImageService ──▶ containerd ──▶ Prepare ──▶ snapshots ──▶ registry
//!                  │  PullImage: reference, credentials                     ▲
//!                  └──────────────────▶ Kept ──────────────────────────────┘
//! ```
//!
//! Messages are passed on as bytes, so that fields and methods which nobody knows here stay. What a pull brings counts for
//! its own repository while it goes on, and is kept when it succeeds: a wrong password does not replace a right one.
//!
//! What this module must not know: snapshots.

use std::{
    convert::Infallible,
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full, Limited};
use loris_oci::{Reference, auth::Credentials};
use prost::Message as _;
use tonic::{
    Status,
    body::Body,
    server::NamedService,
    transport::{Channel, Endpoint},
};

use self::kept::Pulling;
pub use self::kept::{Kept, KeptError};
use crate::proto::cri::{AuthConfig, PullImageRequest, PullImageResponse, RemoveImageRequest};

mod kept;

/// Largest message that is looked at, in bytes. containerd takes up to 16 MiB.
const MESSAGE_BYTES: usize = 16 << 20;
/// What stands before a message: whether it is compressed, and its length.
const FRAME_HEAD: usize = 5;

/// Whether and where kubelet is served. The names of stargz-snapshotter's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Whether it is.
    pub enable_keychain: bool,
    /// The runtime's socket.
    pub image_service_path: PathBuf,
    /// A socket of its own; where it is `None`, the snapshotter's also serves kubelet.
    pub listen_path: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            enable_keychain: false,
            image_service_path: PathBuf::from("/run/containerd/containerd.sock"),
            listen_path: None,
        }
    }
}

/// The image service, as it is shown to kubelet. Clones share everything.
#[derive(Clone, Debug)]
pub struct ImageService {
    runtime: Channel,
    kept: Kept,
    listen_path: Option<PathBuf>,
}

impl ImageService {
    /// Connects to nothing before somebody calls. Credentials are kept in the directory `state`.
    ///
    /// # Errors
    /// [`KeptError`] where what was kept before can't be read, or the socket's path is none.
    pub fn new(settings: &Settings, state: &Path) -> Result<Self, KeptError> {
        let path = &settings.image_service_path;
        let endpoint = path.to_str().filter(|path| path.starts_with('/'));
        let endpoint = endpoint.and_then(|path| Endpoint::from_shared(format!("unix://{path}")).ok());
        let endpoint = endpoint.ok_or_else(|| KeptError::Socket { path: path.clone() })?;
        Ok(Self {
            runtime: endpoint.connect_lazy(),
            kept: Kept::open(&state.join(kept::FILE))?,
            listen_path: settings.listen_path.clone(),
        })
    }

    /// What pulls have brought.
    #[must_use]
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// The socket of its own, if it is to have one.
    #[must_use]
    pub fn listen_path(&self) -> Option<&Path> {
        self.listen_path.as_deref()
    }

    /// What answers calls of the first version of the API.
    #[must_use]
    pub fn v1(&self) -> V1 {
        V1(self.clone())
    }

    /// What answers calls of the version before.
    #[must_use]
    pub fn v1alpha2(&self) -> V1alpha2 {
        V1alpha2(self.clone())
    }

    /// Answers calls on a socket of its own.
    ///
    /// # Errors
    /// Where the socket fails.
    pub async fn serve(&self, listener: tokio::net::UnixListener) -> io::Result<()> {
        let server = tonic::transport::Server::builder().add_service(self.v1()).add_service(self.v1alpha2());
        server.serve_with_incoming(crate::listener::incoming(listener)).await.map_err(io::Error::other)
    }

    async fn call(mut self, request: Request<Body>) -> Response<Body> {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        let outcome = match method.as_str() {
            "PullImage" => self.pull(request).await,
            "RemoveImage" => self.remove(request).await,
            _ => self.pass_on(request).await,
        };
        outcome.unwrap_or_else(Status::into_http)
    }

    async fn pull(&mut self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (request, message) = read(request).await?;
        let pulling = self.pulling(message);
        let response = self.pass_on(request).await?;
        let Some(pulling) = pulling else { return Ok(response) };
        let (response, message) = read_answer(response).await?;
        if let Some(message) = message {
            let image = PullImageResponse::decode(message).map(|answer| answer.image_ref).unwrap_or_default();
            pulling.succeeded(&image).await;
        }
        Ok(response)
    }

    /// Takes note of a pull's credentials; `None` where it has none.
    fn pulling(&self, message: Option<Bytes>) -> Option<Pulling> {
        let pull = PullImageRequest::decode(message?).ok()?;
        let image = pull.image?.image;
        let reference: Reference = image.parse().ok()?;
        let auth = pull.auth?;
        if !is_for(&auth.server_address, &reference) {
            tracing::warn!(image, server = auth.server_address, "kubelet's credentials are for another registry");
            return None;
        }
        let credentials = credentials(auth)?;
        tracing::debug!(image, ?credentials, "pulling with kubelet's credentials");
        self.kept.begin(&reference, credentials)
    }

    async fn remove(&mut self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (request, message) = read(request).await?;
        let image = message.and_then(|message| Some(RemoveImageRequest::decode(message).ok()?.image?.image));
        let (response, answer) = read_answer(self.pass_on(request).await?).await?;
        if let (Some(image), Some(_)) = (image, answer) {
            self.kept.forget(&image).await;
        }
        Ok(response)
    }

    async fn pass_on(&mut self, request: Request<Body>) -> Result<Response<Body>, Status> {
        use tonic::codegen::Service as _;
        let unavailable = |error: tonic::transport::Error| {
            let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
            Status::unavailable(format!("the container runtime's image service can't be reached: {error}{source}"))
        };
        std::future::poll_fn(|context| self.runtime.poll_ready(context)).await.map_err(unavailable)?;
        self.runtime.call(request).await.map_err(unavailable)
    }
}

/// Says whether credentials that name a server are for a reference's registry.
fn is_for(server: &str, reference: &Reference) -> bool {
    let bare = server.strip_prefix("https://").or_else(|| server.strip_prefix("http://")).unwrap_or(server);
    let host = match bare.split('/').next().unwrap_or_default() {
        "" => return true,
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    };
    host == reference.registry()
}

/// Takes what is there, in the order in which containerd does.
fn credentials(auth: AuthConfig) -> Option<Credentials> {
    if !auth.username.is_empty() {
        return Some(Credentials::Basic { username: auth.username, password: auth.password });
    }
    if !auth.identity_token.is_empty() {
        return Some(Credentials::Identity(auth.identity_token));
    }
    if !auth.auth.is_empty() {
        return Credentials::from_auth_field(&auth.auth);
    }
    Some(Credentials::Bearer(auth.registry_token))
        .filter(|credentials| *credentials != Credentials::Bearer(String::new()))
}

/// Reads a call's only message, and returns the call as it was. The message is `None` where it can't be looked at.
async fn read(request: Request<Body>) -> Result<(Request<Body>, Option<Bytes>), Status> {
    let (head, body) = request.into_parts();
    let whole = Limited::new(body, MESSAGE_BYTES + FRAME_HEAD).collect().await;
    let whole = whole.map_err(|error| Status::resource_exhausted(format!("the call can't be read: {error}")))?;
    let bytes = whole.to_bytes();
    Ok((Request::from_parts(head, Body::new(Full::new(bytes.clone()))), message(&bytes)))
}

/// Reads an answer's only message, and returns the answer as it was. The message is `None` where the call has failed.
async fn read_answer(response: Response<Body>) -> Result<(Response<Body>, Option<Bytes>), Status> {
    let (head, body) = response.into_parts();
    let whole = Limited::new(body, MESSAGE_BYTES + FRAME_HEAD).collect().await;
    let whole = whole.map_err(|error| Status::unavailable(format!("the image service's answer broke off: {error}")))?;
    let trailers = whole.trailers().cloned();
    let bytes = whole.to_bytes();
    let is_good = |headers: &HeaderMap| headers.get("grpc-status").is_some_and(|status| status == "0");
    let succeeded = trailers.as_ref().is_some_and(is_good) || is_good(&head.headers);
    // Compressed, it can't be looked at, but has succeeded all the same.
    let message = succeeded.then(|| message(&bytes).unwrap_or_default());
    let body = match trailers {
        Some(trailers) => Body::new(Full::new(bytes).with_trailers(std::future::ready(Some(Ok(trailers))))),
        None if bytes.is_empty() => Body::empty(),
        None => Body::new(Full::new(bytes)),
    };
    Ok((Response::from_parts(head, body), message))
}

/// Returns the message in a body with one frame; `None` where it is compressed or not whole.
fn message(body: &Bytes) -> Option<Bytes> {
    let (head, _) = body.split_first_chunk::<FRAME_HEAD>()?;
    let [0, length @ ..] = *head else { return None };
    let end = FRAME_HEAD.checked_add(usize::try_from(u32::from_be_bytes(length)).ok()?)?;
    (body.len() >= end).then(|| body.slice(FRAME_HEAD..end))
}

/// The service under the name that it has in one version of the API.
macro_rules! version {
    ($(#[$doc:meta])* $name:ident, $service:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub struct $name(ImageService);

        impl NamedService for $name {
            const NAME: &'static str = $service;
        }

        impl tonic::codegen::Service<Request<Body>> for $name {
            type Response = Response<Body>;
            type Error = Infallible;
            type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, request: Request<Body>) -> Self::Future {
                let service = self.0.clone();
                Box::pin(async move { Ok(service.call(request).await) })
            }
        }
    };
}

version!(
    /// `runtime.v1.ImageService`
    V1,
    "runtime.v1.ImageService"
);
version!(
    /// `runtime.v1alpha2.ImageService`
    V1alpha2,
    "runtime.v1alpha2.ImageService"
);

/// Its keychain, as a client of registries takes it.
pub(super) fn keychain(service: &ImageService) -> Arc<dyn loris_oci::auth::Keychain> {
    Arc::new(service.kept.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_of_all_kinds_are_taken() {
        let basic = Credentials::Basic { username: "u".into(), password: "p:q".into() };
        let auth = |change: fn(&mut AuthConfig)| {
            let mut auth = AuthConfig::default();
            change(&mut auth);
            credentials(auth)
        };
        let named = auth(|auth| (auth.username, auth.password) = ("u".into(), "p:q".into()));
        assert_eq!(named, Some(basic.clone()));
        assert_eq!(auth(|auth| auth.auth = "dTpwOnE=".into()), Some(basic.clone()));
        assert_eq!(auth(|auth| auth.auth = "dTpwOnE".into()), Some(basic));
        assert_eq!(auth(|auth| auth.identity_token = "t".into()), Some(Credentials::Identity("t".into())));
        assert_eq!(auth(|auth| auth.registry_token = "t".into()), Some(Credentials::Bearer("t".into())));
        assert_eq!(auth(|auth| auth.auth = "!".into()), None);
        assert_eq!(auth(|_| {}), None);
    }

    #[test]
    fn a_server_that_is_named_must_be_the_registry() {
        for (server, image, expected) in [
            ("", "r.example/a", true),
            ("https://r.example", "r.example/a", true),
            ("r.example", "r.example/a", true),
            ("https://r.example:443/v2/", "r.example/a", false),
            ("https://other.example", "r.example/a", false),
            ("https://index.docker.io/v1/", "alpine", true),
            ("docker.io", "alpine", true),
        ] {
            assert_eq!(is_for(server, &image.parse().unwrap()), expected, "{server} {image}");
        }
    }

    #[test]
    fn frames_are_whole_or_not_looked_at() {
        for (body, expected) in [
            (&b"\0\0\0\0\x02ab"[..], Some(&b"ab"[..])),
            (b"\0\0\0\0\0", Some(b"")),
            (b"\0\0\0\0\x03ab", None),
            (b"\x01\0\0\0\x02ab", None),
            (b"\0\xff\xff\xff\xffab", None),
            (b"\0\0", None),
            (b"", None),
        ] {
            assert_eq!(message(&Bytes::copy_from_slice(body)).as_deref(), expected, "{body:?}");
        }
    }
}
