//! kubelet's image service, in front of a real containerd that pulls from a registry with a password.

use std::{os::unix::fs::PermissionsExt as _, path::Path, sync::Arc, time::Duration};

use base64::Engine as _;
use bytes::{Buf, BufMut, Bytes};
use loris_format::position::FileOffset;
use loris_lazy::{OpenOptions, Store, open::open_layer};
use loris_mount::pager::{OnDeath, PagerOptions};
use loris_oci::{
    Descriptor, Error, Reference,
    auth::{Environment, Keychain},
    platform::resolve_manifest,
    registry::{Client, Config},
};
use loris_snapshotter::{
    Daemon, ahead, content,
    daemon::{self, Started},
    keychain::{Keychains, Settings},
    listener,
    proto::cri::{
        AuthConfig, ImageSpec, ImageStatusRequest, PullImageRequest, RemoveImageRequest,
        image_service_client::ImageServiceClient,
    },
    remote,
};
use loris_testkit::registry::{DockerRegistry, DockerRegistryOptions};
use tonic::{
    Code, Request, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::{Channel, Endpoint},
};

use crate::{
    Log,
    containerd::Containerd,
    image::{self, CONTENT, FILE},
};

pub const USER: &str = "kubelet";
pub const PASSWORD: &str = "hunter2";

/// A configuration that knows nothing of the machine.
pub fn config() -> Config {
    Config { environment: Environment::default(), cert_roots: Vec::new(), hosts_dirs: Vec::new(), ..Config::default() }
}

fn settings(containerd: &Containerd, listen: &Path) -> Settings {
    let mut settings = Settings::default();
    settings.cri.enable_keychain = true;
    settings.cri.image_service_path = containerd.socket();
    settings.cri.listen_path = Some(listen.to_owned());
    settings
}

pub fn client(socket: &Path) -> Channel {
    Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap().connect_lazy()
}

fn spec(image: &str) -> Option<ImageSpec> {
    Some(ImageSpec { image: image.to_owned() })
}

pub async fn pull(channel: &Channel, image: &str, auth: Option<AuthConfig>) -> Result<String, Status> {
    let request = PullImageRequest { image: spec(image), auth };
    Ok(ImageServiceClient::new(channel.clone()).pull_image(request).await?.into_inner().image_ref)
}

pub fn password(password: &str) -> Option<AuthConfig> {
    Some(AuthConfig { username: USER.into(), password: password.into(), ..AuthConfig::default() })
}

/// Messages as bytes.
#[derive(Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

pub async fn raw(channel: &Channel, method: &'static str, message: &'static [u8]) -> Result<Bytes, Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| Status::unknown(error.to_string()))?;
    let path = http::uri::PathAndQuery::from_static(method);
    Ok(grpc.unary(Request::new(Bytes::from_static(message)), path, Raw).await?.into_inner())
}

/// Opens the image's layer with what the keychains have, and reads the file in it.
async fn read_lazily(keychains: Vec<Arc<dyn Keychain>>, reference: &Reference) -> Result<Vec<u8>, Error> {
    let directory = tempfile::tempdir().unwrap();
    let source = Arc::new(Client::new(Config { keychains, ..config() }).unwrap().source(reference));
    let (_, manifest) = resolve_manifest(&*source, None, &Default::default()).await?;
    let descriptor: &Descriptor = &manifest.layers[0];
    let store = Store::open(directory.path()).unwrap();
    let layer = open_layer(source, descriptor, &store, &OpenOptions::default()).await.unwrap();
    let node = layer.index().lookup(FILE.as_bytes()).unwrap();
    let mut buffer = vec![0; CONTENT.len() + 10];
    let count = layer.read(node, FileOffset(0), &mut buffer).await.unwrap();
    buffer.truncate(count);
    Ok(buffer)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_kubelet_pulls_with_is_kept_and_opens_layers() {
    let test = "what_kubelet_pulls_with_is_kept_and_opens_layers";
    let credentials = Some((USER.to_owned(), PASSWORD.to_owned()));
    let options = DockerRegistryOptions { credentials, ..DockerRegistryOptions::default() };
    let Some(registry) = DockerRegistry::start(test, &options).unwrap() else { return };
    // Of all threads, for as long as the process lives; other tests' secrets would be shown as well.
    let log = Log::default();
    tracing::subscriber::set_global_default(log.subscriber()).unwrap();
    let place = tempfile::Builder::new().prefix("loris-cri-").tempdir().unwrap();
    let Some(mut containerd) = Containerd::start(test, place.path()) else { return };
    let state = place.path().join("snapshotter");
    std::fs::create_dir(&state).unwrap();
    let name = format!("{}/team/app:1", registry.address());
    let reference: Reference = name.parse().unwrap();
    let given = loris_oci::auth::Credentials::Basic { username: USER.into(), password: PASSWORD.into() };
    image::push(place.path(), Config { credentials: Some(given), ..config() }, &reference).await;

    let socket = place.path().join("kubelet.sock");
    let keychains = Keychains::new(&settings(&containerd, &socket), &state).unwrap();
    let service = keychains.image_service().unwrap();
    let listener = listener::listen(service.listen_path().unwrap()).unwrap();
    assert_eq!(socket.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let served = service.clone();
    let serving = tokio::spawn(async move { served.serve(listener).await });
    let ours = client(&socket);

    // Who is refused leaves nothing behind, and a client with nothing is refused, too.
    for auth in [None, password("wrong")] {
        let status = pull(&ours, &name, auth).await.unwrap_err();
        assert!(status.message().contains("authorization") || status.message().contains("401"), "{status:?}");
        assert!(!format!("{status:?}").contains("wrong"));
        assert_eq!(service.kept().references(), [""; 0]);
    }
    assert!(matches!(read_lazily(keychains.list(), &reference).await, Err(Error::Denied { .. })));

    let image = pull(&ours, &name, password(PASSWORD)).await.unwrap();
    assert!(image.starts_with("sha256:"), "{image}");
    assert_eq!(service.kept().references(), [name.as_str()]);
    assert_eq!(read_lazily(keychains.list(), &reference).await.unwrap(), CONTENT);
    // A wrong password does not replace the right one.
    pull(&ours, &name, password("wrong")).await.unwrap_err();
    assert_eq!(read_lazily(keychains.list(), &reference).await.unwrap(), CONTENT);
    let neighbour: Reference = format!("{}/team/other:1", registry.address()).parse().unwrap();
    assert!(matches!(read_lazily(keychains.list(), &neighbour).await, Err(Error::Denied { .. })));

    // What is not looked at passes as it is, of both versions, and so do errors.
    let theirs = client(&containerd.socket());
    for (method, message) in [
        ("/runtime.v1.ImageService/ListImages", &b""[..]),
        ("/runtime.v1alpha2.ImageService/ListImages", b""),
        // An empty image specification is an error; the field with number 99 is nobody's.
        ("/runtime.v1.ImageService/ImageStatus", b"\x0a\x00\x9a\x06\x01x"),
        ("/runtime.v1.ImageService/NoSuchMethod", b""),
    ] {
        let (through_us, directly) = (raw(&ours, method, message).await, raw(&theirs, method, message).await);
        match (through_us, directly) {
            (Ok(through_us), Ok(directly)) => assert_eq!(through_us, directly, "{method}"),
            (Err(through_us), Err(directly)) => {
                assert_eq!(
                    (through_us.code(), through_us.message()),
                    (directly.code(), directly.message()),
                    "{method}"
                );
            }
            (through_us, directly) => panic!("{method}: {through_us:?}, directly {directly:?}"),
        }
    }
    assert!(raw(&ours, "/runtime.v1.ImageService/ListImages", b"").await.unwrap().len() > 100);
    let version = raw(&ours, "/runtime.v1.RuntimeService/Version", b"").await.unwrap_err();
    assert_eq!(version.code(), Code::Unimplemented);

    // The runtime goes and comes back; we stay.
    let gone = std::sync::Mutex::new(None);
    tokio::task::block_in_place(|| {
        containerd.restart(|| {
            let asked = tokio::runtime::Handle::current().block_on(pull(&ours, &name, password(PASSWORD)));
            *gone.lock().unwrap() = Some(asked.unwrap_err());
        });
    });
    let gone = gone.lock().unwrap().take().unwrap();
    assert_eq!(gone.code(), Code::Unavailable, "{gone:?}");
    crate::until("the image service", || async {
        ImageServiceClient::new(ours.clone())
            .image_status(ImageStatusRequest { image: spec(&name) })
            .await
            .is_ok_and(|status| status.into_inner().image.is_some_and(|known| known.id == image))
    })
    .await;

    // We go and come back.
    serving.abort();
    let _ = serving.await;
    drop((keychains, service));
    let file = state.join("cri-credentials.json");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let keychains = Keychains::new(&settings(&containerd, &socket), &state).unwrap();
    let service = keychains.image_service().unwrap();
    assert_eq!(service.kept().references(), [name.as_str()]);
    assert_eq!(read_lazily(keychains.list(), &reference).await.unwrap(), CONTENT);
    assert!(!format!("{keychains:?}").contains(PASSWORD));

    // A removed image's credentials go with it.
    let listener = listener::listen(&socket).unwrap();
    let served = service.clone();
    let serving = tokio::spawn(async move { served.serve(listener).await });
    let ours = client(&socket);
    ImageServiceClient::new(ours).remove_image(RemoveImageRequest { image: spec(&image) }).await.unwrap();
    assert_eq!(service.kept().references(), [""; 0]);
    assert!(!std::fs::read_to_string(&file).unwrap().contains(PASSWORD));
    serving.abort();
    let text = log.text();
    assert!(text.contains("pulling with kubelet's credentials"));
    let encoded = base64::prelude::BASE64_STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let shown = text.lines().find(|line| line.contains(PASSWORD) || line.contains(&encoded));
    assert_eq!(shown, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn kubelet_is_served_on_the_snapshotters_socket_or_on_its_own() {
    let test = "kubelet_is_served_on_the_snapshotters_socket_or_on_its_own";
    let place = tempfile::Builder::new().prefix("loris-cri-").tempdir().unwrap();
    let Some(containerd) = Containerd::start(test, place.path()) else { return };
    let (address, own) = (place.path().join("snapshotter.sock"), place.path().join("kubelet.sock"));
    let stat: (&'static str, &'static [u8]) = ("/containerd.services.snapshots.v1.Snapshots/Stat", b"\x12\x04none");
    let list: (&'static str, &'static [u8]) = ("/runtime.v1.ImageService/ListImages", b"");
    for listen_path in [None, Some(own.clone())] {
        // Connections of the first round may still hold what is open in its directory.
        let root = place.path().join(if listen_path.is_some() { "two" } else { "one" });
        std::fs::create_dir(&root).unwrap();
        let mut settings = settings(&containerd, &own);
        settings.cri.listen_path = listen_path.clone();
        let keychains = Keychains::new(&settings, &root).unwrap();
        let images = remote::Settings {
            client: Client::new(Config { keychains: keychains.list(), ..config() }).unwrap(),
            store: Store::open(&place.path().join("store")).unwrap(),
            open: OpenOptions::default(),
            patience: Duration::from_secs(10),
            foresee: true,
        };
        let pager = PagerOptions {
            patience: Duration::from_secs(10),
            register: place.path().join("register"),
            on_death: OnDeath::Clean(Vec::new()),
            keeper: None,
            note: None,
            log: None,
        };
        let settings = daemon::Settings {
            root,
            address: address.clone(),
            listener: None,
            images,
            keeps_address: false,
            image_service: keychains.image_service(),
            ahead: ahead::Settings { prefetch: false, complete: None },
            content: content::Settings { complete_namespaces: Vec::new(), ..content::Settings::default() },
            mount_options: Vec::new(),
            engine: None,
            pager,
            is_managed: false,
        };
        let Started::Serving(daemon) = Daemon::start(settings, None).await.unwrap() else { panic!("passed on") };
        let here = client(&address);
        let asking = async {
            let missing = raw(&here, stat.0, stat.1).await.unwrap_err();
            assert_eq!(missing.code(), Code::NotFound, "{missing:?}");
            let beside = raw(&here, list.0, list.1).await;
            match &listen_path {
                None => assert!(beside.is_ok(), "{beside:?}"),
                Some(path) => {
                    assert_eq!(beside.unwrap_err().code(), Code::Unimplemented);
                    let there = client(path);
                    crate::until("kubelet's socket", || async { raw(&there, list.0, list.1).await.is_ok() }).await;
                    assert_eq!(raw(&there, stat.0, stat.1).await.unwrap_err().code(), Code::Unimplemented);
                    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
                }
            }
        };
        tokio::select! {
            served = daemon.serve() => panic!("{served:?}"),
            () = asking => {}
        }
        tokio::task::spawn_blocking(move || daemon.take_down()).await.unwrap();
    }
}
