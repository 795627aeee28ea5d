//! Several hosts for one registry: who is asked, in which order, and what happens on a bad day.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use loris_format::digest::Digest;
use loris_oci::{
    Error, ImageSource as _, Reference,
    auth::Environment,
    document::media_type,
    registry::{Client, Config, RegistrySource},
};
use loris_testkit::registry::{Access, DockerRegistry, DockerRegistryOptions, Effect, Fault, FaultRegistry, Site};
use tempfile::TempDir;

use super::{config, content, descriptor, manifest, read};

/// A registry and two mirrors of it, and the file that says so.
struct Site3 {
    registry: FaultRegistry,
    near: FaultRegistry,
    far: FaultRegistry,
    directory: TempDir,
}

const BLOB: usize = 300_000;

impl Site3 {
    async fn start() -> Self {
        let (registry, near, far) =
            (FaultRegistry::start().await, FaultRegistry::start().await, FaultRegistry::start().await);
        let site = Self { registry, near, far, directory: tempfile::tempdir().unwrap() };
        site.hosts(&format!(
            "[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]",
            site.near.address(),
            site.far.address()
        ));
        for registry in [&site.registry, &site.near, &site.far] {
            registry.add_blob(content(BLOB));
            let document = manifest("x");
            registry.add_manifest("latest", &document.media_type, document.bytes.clone());
        }
        site
    }

    fn hosts(&self, text: &str) {
        let directory = self.directory.path().join(self.registry.address());
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("hosts.toml"), text).unwrap();
    }

    fn config(&self) -> Config {
        Config { hosts_dirs: vec![self.directory.path().to_owned()], ..config() }
    }

    fn source(&self) -> RegistrySource {
        self.source_with(self.config())
    }

    fn source_with(&self, config: Config) -> RegistrySource {
        let reference: Reference = self.registry.reference("latest").parse().unwrap();
        Client::new(config).unwrap().source(&reference)
    }

    /// Returns how many requests the near mirror, the far one, and the registry have got, and forgets them.
    fn asked(&self) -> [usize; 3] {
        [&self.near, &self.far, &self.registry].map(|registry| {
            let count = registry.requests().len();
            registry.forget_requests();
            count
        })
    }
}

async fn range(source: &RegistrySource, from: usize) -> Bytes {
    source.blob_range(&descriptor(&content(BLOB)), from as u64..from as u64 + 1000).await.unwrap()
}

#[tokio::test]
async fn mirrors_are_asked_first_for_what_they_can() {
    let site = Site3::start().await;
    let source = site.source();
    assert_eq!(source.root().await.unwrap(), manifest("x"));
    assert_eq!(source.document(&manifest("x").descriptor()).await.unwrap(), manifest("x"));
    assert_eq!(range(&source, 5).await, content(BLOB)[5..1005]);
    assert!(read(source.blob(&descriptor(&content(BLOB))).await.unwrap()).await.unwrap() == content(BLOB));
    // They are told whose images they are asked for.
    let namespace = format!("ns={}", site.registry.address().replace(':', "%3A"));
    for request in site.near.requests() {
        assert_eq!(request.query.as_deref(), Some(namespace.as_str()), "{}", request.path);
    }
    assert_eq!(site.asked(), [4, 0, 0]);
    // What refers to an image, and its tags, only the registry knows.
    assert_eq!(source.referrers(&manifest("x").digest, None).await.unwrap(), []);
    assert_eq!(source.in_repository().tags().await.unwrap(), ["latest"]);
    let requests = site.registry.requests();
    assert!(requests.iter().all(|request| !request.query.as_deref().unwrap_or_default().contains("ns=")));
    assert_eq!(site.asked(), [0, 0, 2]);
    // A mirror without `resolve` is not believed what a tag leads to.
    site.near.fault(Fault::new(Effect::Status(503)));
    assert_eq!(source.root().await.unwrap(), manifest("x"));
    assert_eq!(site.asked(), [1, 0, 1]);
}

#[tokio::test]
async fn whatever_is_wrong_with_a_mirror_the_next_one_is_asked_at_once() {
    let other = content(BLOB - 1);
    for (name, effect) in [
        ("resets", Effect::ResetAtOnce),
        ("breaks off", Effect::Truncate(500)),
        ("resets in the midst", Effect::Reset(300)),
        ("stalls", Effect::Stall(100, Duration::from_secs(60))),
        ("does not answer", Effect::Delay(Duration::from_secs(60))),
        ("stalls but for a byte now and then", Effect::Drip(100, Duration::from_millis(100))),
        ("answers 404", Effect::Status(404)),
        ("answers 500", Effect::Status(500)),
        ("answers 429", Effect::RetryAfter(429, "3600".into())),
        ("answers 401", Effect::Status(401)),
        ("answers 403", Effect::Status(403)),
        ("answers 400", Effect::Status(400)),
        ("answers with another range", Effect::ShiftRange(7)),
        ("says that it is another blob", Effect::DigestHeader(Digest::sha256_of(b"other").to_string())),
        ("encodes", Effect::Header("content-encoding", "gzip".into())),
        ("redirects to nowhere", Effect::RedirectTo("ftp://nowhere/".into())),
        ("redirects to a dead host", Effect::RedirectTo("http://127.0.0.1:1/".into())),
        ("has another blob", Effect::WrongContent(other.into())),
    ] {
        let site = Site3::start().await;
        site.near.fault(Fault::new(effect).path("/blobs/").always());
        // No wait is short enough to be passed over here: there must be none. Nothing but a stall takes time.
        let patience = if name.starts_with("stalls") || name.starts_with("does not") { 1 } else { 60 };
        let stall_timeout = Duration::from_secs(patience);
        let slow = Duration::from_secs(3600);
        let config =
            Config { stall_timeout, retry_delay: slow, retry_delay_max: slow, put_back: slow, ..site.config() };
        let source = site.source_with(config);
        assert_eq!(range(&source, 2000).await, content(BLOB)[2000..3000], "{name}");
        assert_eq!(site.asked(), [1, 1, 0], "{name}");
        // It is known by now.
        assert_eq!(range(&source, 5000).await, content(BLOB)[5000..6000], "{name}");
        assert_eq!(site.asked(), [0, 1, 0], "{name}");
    }
}

#[tokio::test]
async fn whole_blobs_go_on_elsewhere() {
    for effect in [Effect::Truncate(100_000), Effect::Reset(50_000), Effect::Status(502), Effect::EndEarly(9)] {
        let site = Site3::start().await;
        site.near.fault(Fault::new(effect.clone()).path("/blobs/").always());
        site.far.fault(Fault::new(effect.clone()).path("/blobs/").always());
        let source = site.source();
        let found = read(source.blob(&descriptor(&content(BLOB))).await.unwrap()).await.unwrap();
        assert!(found == content(BLOB), "{effect:?}");
        assert_eq!(site.asked(), [1, 1, 1], "{effect:?}");
    }
    // Bytes that were handed out can't be taken back; but the next time they come from elsewhere.
    let site = Site3::start().await;
    site.near.fault(Fault::new(Effect::FlipBit(7)).path("/blobs/").always());
    let source = site.source();
    let error = read(source.blob(&descriptor(&content(BLOB))).await.unwrap()).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert!(read(source.blob(&descriptor(&content(BLOB))).await.unwrap()).await.unwrap() == content(BLOB));
    assert_eq!(site.asked(), [1, 1, 0]);
}

#[tokio::test]
async fn a_wrong_document_comes_from_the_next_host() {
    let site = Site3::start().await;
    let source = site.source();
    let wrong = manifest("y").bytes;
    site.near.fault(Fault::new(Effect::WrongContent(wrong)).path("/manifests/").always());
    assert_eq!(source.document(&manifest("x").descriptor()).await.unwrap(), manifest("x"));
    assert_eq!(site.asked(), [1, 1, 0]);
    assert_eq!(source.document(&manifest("x").descriptor()).await.unwrap(), manifest("x"));
    assert_eq!(site.asked(), [0, 1, 0]);
}

#[tokio::test]
async fn a_mirror_that_lacks_one_thing_is_asked_for_others() {
    let site = Site3::start().await;
    let only_here = content(1000);
    site.registry.add_blob(only_here.clone());
    let source = site.source();
    for expected in [[1, 1, 1], [0, 0, 1]] {
        assert_eq!(source.blob_range(&descriptor(&only_here), 0..10).await.unwrap(), only_here[..10]);
        assert_eq!(site.asked(), expected);
    }
    assert_eq!(range(&source, 0).await, content(BLOB)[..1000]);
    assert_eq!(site.asked(), [1, 0, 0]);
    // What nobody has is not there, and asking again does not help.
    let error = source.blob_range(&descriptor(b"nowhere"), 0..3).await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    assert_eq!(site.asked(), [1, 1, 1]);
}

#[tokio::test]
async fn a_mirror_is_tried_again_after_a_while() {
    let site = Site3::start().await;
    // That it is put back for longer is seen where `put_back` is an hour.
    let source = site.source_with(Config { put_back: Duration::from_millis(1), ..site.config() });
    site.near.fault(Fault::new(Effect::Status(503)).times(2));
    for expected in [[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]] {
        range(&source, 0).await;
        assert_eq!(site.asked(), expected);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn bytes_that_prove_wrong_come_from_elsewhere_the_next_time() {
    let site = Site3::start().await;
    let source = site.source_with(Config { put_back: Duration::ZERO, ..site.config() });
    site.near.fault(Fault::new(Effect::FlipBit(0)).path("/blobs/"));
    let blob = descriptor(&content(BLOB));
    assert_ne!(range(&source, 1000).await, content(BLOB)[1000..2000]);
    assert!(source.distrust_range(&blob, 1500..1600));
    assert_eq!(range(&source, 1000).await, content(BLOB)[1000..2000]);
    assert_eq!(site.asked(), [1, 1, 0]);
    // It concerns those bytes, and no others, and not who has served them since.
    range(&source, 100_000).await;
    assert_eq!(site.asked(), [1, 0, 0]);
    assert!(source.distrust_range(&blob, 1000..2000));
    range(&source, 1999).await;
    assert_eq!(site.asked(), [0, 0, 1]);
    // Where all are distrusted, they are asked all the same.
    assert!(source.distrust_range(&blob, 1999..2000));
    assert_eq!(range(&source, 1000).await, content(BLOB)[1000..2000]);
}

#[tokio::test]
async fn bytes_may_prove_wrong_while_the_rest_of_them_is_under_way() {
    let site = Site3::start().await;
    let source = site.source_with(Config { put_back: Duration::ZERO, ..site.config() });
    site.near.fault(Fault::new(Effect::FlipBit(0)).path("/blobs/"));
    let blob = descriptor(&content(BLOB));
    let mut got = Vec::new();
    let mut distrust = |piece: Bytes| {
        if got.is_empty() {
            // Two readers find that out.
            assert!(source.distrust_range(&blob, 1000..1001));
            assert!(source.distrust_range(&blob, 1000..1001));
        }
        got.extend_from_slice(&piece);
    };
    source.blob_range_pieces(&blob, 1000..200_000, &mut distrust).await.unwrap();
    assert!(got[1..] == content(BLOB)[1001..200_000]);
    assert_eq!(range(&source, 1000).await, content(BLOB)[1000..2000]);
    assert_eq!(site.asked(), [1, 1, 0]);
}

#[tokio::test]
async fn pieces_go_on_where_an_answer_broke_off() {
    let site = Site3::start().await;
    let source = site.source_with(Config { put_back: Duration::ZERO, ..site.config() });
    site.near.fault(Fault::new(Effect::Truncate(70_000)).path("/blobs/"));
    let blob = descriptor(&content(BLOB));
    let mut got = Vec::new();
    source.blob_range_pieces(&blob, 1000..200_000, &mut |piece| got.extend_from_slice(&piece)).await.unwrap();
    assert!(got == content(BLOB)[1000..200_000]);
    assert_eq!(site.asked(), [1, 1, 0]);
    // Each of the two is held to what it has sent, and to nothing else.
    assert!(source.distrust_range(&blob, 150_000..150_001));
    range(&source, 1000).await;
    assert_eq!(site.asked(), [1, 0, 0]);
}

#[tokio::test]
async fn all_in_trouble_is_waited_out_and_a_deadline_ends_it() {
    let site = Site3::start().await;
    for registry in [&site.near, &site.far, &site.registry] {
        registry.fault(Fault::new(Effect::Status(503)).times(2));
    }
    assert_eq!(range(&site.source(), 10).await, content(BLOB)[10..1010]);
    assert_eq!(site.asked(), [3, 2, 2]);
    for registry in [&site.near, &site.far, &site.registry] {
        registry.fault(Fault::new(Effect::Status(503)).always());
    }
    let deadline = Duration::from_millis(300);
    let slow = Duration::from_secs(3600);
    let source = site.source_with(Config { deadline, retry_delay: slow, retry_delay_max: slow, ..site.config() });
    let error = source.blob_range(&descriptor(&content(BLOB)), 0..10).await.unwrap_err();
    assert!(matches!(error, Error::Registry { status: Some(503), transient: true, .. }), "{error}");
    for registry in [&site.near, &site.far, &site.registry] {
        registry.end_faults();
        registry.fault(Fault::new(Effect::Delay(Duration::from_secs(60))).always());
    }
    let error = source.root().await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("no whole answer within"), "{error}");
}

#[tokio::test]
async fn a_mirror_whose_name_leads_nowhere_does_no_harm() {
    let site = Site3::start().await;
    site.hosts("[host.\"https://mirror.invalid\"]\n[host.\"http://127.0.0.1:1\"]\n");
    assert_eq!(site.source().root().await.unwrap(), manifest("x"));
    assert_eq!(site.asked(), [0, 0, 1]);
}

/// Returns an environment whose file has a password for each host.
fn passwords(directory: &Path, hosts: &[(&str, &str)]) -> Environment {
    use base64::Engine as _;
    let entry = |(host, password): &(&str, &str)| {
        let auth = base64::prelude::BASE64_STANDARD.encode(format!("u:{password}"));
        format!("\"{host}\":{{\"auth\":\"{auth}\"}}")
    };
    let entries: Vec<String> = hosts.iter().map(entry).collect();
    let file = directory.join("auth.json");
    std::fs::write(&file, format!("{{\"auths\":{{{}}}}}", entries.join(","))).unwrap();
    Environment { auth_file: Some(file), ..Environment::default() }
}

#[tokio::test]
async fn each_host_is_shown_its_own_credentials_and_headers() {
    let site = Site3::start().await;
    let basic = |password: &str| Access::Basic { username: "u".into(), password: password.into() };
    site.near.access(basic("near"));
    site.registry.access(basic("registry"));
    site.hosts(&format!(
        "[host.\"http://{}\".header]\nx-tenant = \"secret\"\n[host.\"http://{}\"]\n",
        site.near.address(),
        site.far.address()
    ));
    let environment =
        passwords(site.directory.path(), &[(&site.near.address(), "near"), (&site.registry.address(), "registry")]);
    site.near.redirect_blobs(loris_testkit::registry::Redirection::default());
    let source = site.source_with(Config { environment, ..site.config() });
    range(&source, 0).await;
    let requests = site.near.requests();
    let at = |site| requests.iter().filter(move |request| request.site == site);
    assert!(at(Site::Registry).all(|request| request.header("x-tenant") == Some("secret")));
    assert_eq!(at(Site::Elsewhere).count(), 1);
    let bare = |request: &loris_testkit::registry::LoggedRequest| {
        request.header("x-tenant").is_none() && request.header("authorization").is_none()
    };
    assert!(at(Site::Elsewhere).all(bare));
    site.near.fault(Fault::new(Effect::Status(500)).always());
    site.far.fault(Fault::new(Effect::Status(401)).always());
    range(&source, 0).await;
    assert!(!site.far.requests().is_empty() && site.far.requests().iter().all(bare));
    let shown: Vec<_> = site.registry.requests().iter().map(|request| request.status.unwrap().as_u16()).collect();
    assert_eq!(shown, [401, 206]);
}

#[tokio::test]
async fn given_credentials_are_the_registrys_alone() {
    let site = Site3::start().await;
    for registry in [&site.near, &site.registry] {
        registry.access(Access::Basic { username: "u".into(), password: "p".into() });
    }
    let credentials = loris_oci::auth::Credentials::Basic { username: "u".into(), password: "p".into() };
    let source = site.source_with(Config { credentials: Some(credentials), ..site.config() });
    assert_eq!(source.root().await.unwrap(), manifest("x"));
    assert!(site.near.requests().iter().all(|request| request.header("authorization").is_none()));
    // Refused once, it is not asked again for this repository.
    range(&source, 0).await;
    assert_eq!(site.asked(), [1, 1, 2]);
}

#[tokio::test]
async fn a_wrong_file_is_an_error_that_names_it() {
    let site = Site3::start().await;
    site.hosts("[host.\"https://m.example\"]\ncapabilities = [\"fly\"]");
    let error = site.source().root().await.unwrap_err().to_string();
    assert!(error.contains("hosts.toml is not valid: host.\"https://m.example\".capabilities: \"fly\""), "{error}");
    site.hosts("[host.\"https://m.example\"]\ncapabilities = [\"push\"]\n");
    assert_eq!(site.source().root().await.unwrap(), manifest("x"));
    site.hosts("server = \"https://m.example\"\ncapabilities = [\"push\"]\n");
    let error = site.source().root().await.unwrap_err().to_string();
    assert!(error.contains("no host with the capability \"resolve\""), "{error}");
}

#[tokio::test]
async fn a_file_that_changes_is_read_again() {
    let site = Site3::start().await;
    let client = Client::new(Config { hosts_live: Duration::ZERO, ..site.config() }).unwrap();
    let reference: Reference = site.registry.reference("latest").parse().unwrap();
    let before = client.source(&reference);
    before.root().await.unwrap();
    assert_eq!(site.asked(), [1, 0, 0]);
    site.hosts(&format!("[host.\"http://{}\"]", site.far.address()));
    client.source(&reference).root().await.unwrap();
    assert_eq!(site.asked(), [0, 1, 0]);
    before.root().await.unwrap();
    assert_eq!(site.asked(), [1, 0, 0]);
    site.hosts("server = 1");
    assert!(matches!(client.source(&reference).root().await, Err(Error::Invalid { .. })));
}

#[tokio::test]
async fn certificates_are_those_of_the_file() {
    let test = "registry::mirrors::certificates_are_those_of_the_file";
    let upstream = FaultRegistry::start().await;
    let document = image(&upstream);
    let options = DockerRegistryOptions {
        tls: true,
        client_certificate: true,
        proxy_of: Some(format!("http://{}", upstream.address())),
        ..Default::default()
    };
    let Some(mirror) = DockerRegistry::start(test, &options).unwrap() else { return };
    let directory = tempfile::tempdir().unwrap();
    let own = directory.path().join(upstream.address());
    std::fs::create_dir(&own).unwrap();
    let (certificate, key) = mirror.client_certificate();
    for (from, to) in [(&mirror.ca(), "ca.crt"), (&certificate, "client.cert"), (&key, "client.key")] {
        std::fs::copy(from, own.join(to)).unwrap();
    }
    let both = [std::fs::read(&certificate).unwrap(), std::fs::read(&key).unwrap()].concat();
    std::fs::write(own.join("both.pem"), both).unwrap();
    for (settings, works) in [
        ("ca = \"ca.crt\"\nclient = [[\"client.cert\", \"client.key\"]]", true),
        ("ca = [\"ca.crt\"]\nclient = \"both.pem\"", true),
        ("skip_verify = true\nclient = [\"both.pem\"]", true),
        ("client = \"both.pem\"", false),
        ("skip_verify = false\nclient = \"both.pem\"", false),
        ("ca = \"ca.crt\"", false),
        ("ca = \"missing.crt\"", false),
        ("ca = \"ca.crt\"\nclient = \"client.cert\"", false),
    ] {
        // Alone, so that nobody answers in its place.
        let server = format!("server = \"https://{}\"\n{settings}", mirror.address());
        std::fs::write(own.join("hosts.toml"), server).unwrap();
        let config = Config { hosts_dirs: vec![directory.path().to_owned()], retries: 0, ..config() };
        let source = Client::new(config).unwrap().source(&upstream.reference("four").parse().unwrap());
        let outcome = source.root().await;
        assert_eq!(outcome.as_ref().is_ok_and(|root| *root == document), works, "{settings}: {outcome:?}");
    }
}

#[tokio::test]
async fn the_way_is_measured() {
    let site = Site3::start().await;
    let source = site.source();
    assert_eq!(source.link(), None);
    let blob = descriptor(&content(BLOB));
    source.blob_range(&blob, 0..200_000).await.unwrap();
    let link = source.link().unwrap();
    assert!(link.round_trip < Duration::from_secs(30) && link.bytes_per_second > 0, "{link:?}");
    // Another host has served what came last, and of the way to it nothing is known but the time of a short answer.
    site.near.fault(Fault::new(Effect::Status(503)).always());
    source.blob_range(&blob, 0..10).await.unwrap();
    assert_eq!(source.link(), None);
}

/// Returns a gzip layer's descriptor-like manifest: a configuration and four layers.
fn image(registry: &FaultRegistry) -> loris_oci::Document {
    let config = registry.add_blob(&b"{}"[..]);
    let layers: Vec<String> = (1..5_usize)
        .map(|n| {
            let layer = content(100_000 * n);
            let digest = registry.add_blob(layer.clone());
            let media_type = media_type::OCI_LAYER_GZIP;
            format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":{}}}"#, layer.len())
        })
        .collect();
    let text = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","config":{{"mediaType":"{}","digest":"{config}","size":2}},"layers":[{}]}}"#,
        media_type::OCI_MANIFEST,
        media_type::OCI_CONFIG,
        layers.join(",")
    );
    let document = loris_oci::Document::new(media_type::OCI_MANIFEST, text.into()).unwrap();
    registry.add_manifest("four", &document.media_type, document.bytes.clone());
    document
}

/// The number of requests is written down in docs/registries.md.
#[tokio::test]
async fn an_open_asks_for_nothing_that_is_known() {
    let tokens = || loris_testkit::registry::Tokens::default();
    for (access, challenged) in [(None, false), (Some(Access::Token(tokens())), true)] {
        let registry = FaultRegistry::start().await;
        let document = image(&registry);
        if let Some(access) = access {
            registry.access(access);
        }
        let reference: Reference = registry.reference("four").parse().unwrap();
        let source = Client::new(config()).unwrap().source(&reference);
        let root = source.root().await.unwrap();
        assert_eq!(root, document);
        let loris_oci::document::Kind::Manifest(found) = root.parse_kind(&config().limits).unwrap() else {
            panic!("it is a manifest")
        };
        // The configuration and the tails of all layers at once.
        let tails = found.layers.iter().map(|layer| source.blob_range(layer, layer.size - 1000..layer.size));
        let (config, tails) =
            futures_util::future::join(source.document(&found.config), futures_util::future::join_all(tails)).await;
        config.unwrap();
        assert!(tails.into_iter().all(|tail| tail.is_ok()));
        let requests = registry.requests();
        let statuses: Vec<u16> = requests.iter().map(|request| request.status.unwrap().as_u16()).collect();
        assert!(requests.iter().all(|request| request.method == "GET"));
        if challenged {
            assert_eq!(requests.len(), 8, "{statuses:?}");
            assert_eq!(statuses[..3], [401, 200, 200]);
            assert!(requests[1].path.contains("/token"));
        } else {
            assert_eq!(requests.len(), 6, "{statuses:?}");
        }
        assert!(statuses[statuses.len() - 4..].iter().all(|status| *status == 206 || *status == 200));
    }
}

/// Asks a proxy for a blob until it has it itself. Distribution 2.8 stores a blob behind the first answer, and while it
/// does so it fails now and then with what it is asked for (`registry/proxy/proxyblobstore.go`); then a client rightly
/// goes on to the next registry.
async fn keep(url: &str) {
    for _ in 0..600 {
        let answer = reqwest::Client::new().get(url).header("range", "bytes=0-0").send().await.unwrap();
        if answer.status() == reqwest::StatusCode::PARTIAL_CONTENT {
            return;
        }
        drop(answer.bytes().await);
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("{url}: the proxy does not keep what it passes on");
}

#[tokio::test]
async fn a_real_registry_that_passes_on_serves_ranges() {
    let test = "registry::mirrors::a_real_registry_that_passes_on_serves_ranges";
    let upstream = FaultRegistry::start().await;
    let document = image(&upstream);
    let options =
        DockerRegistryOptions { proxy_of: Some(format!("http://{}", upstream.address())), ..Default::default() };
    let Some(proxy) = DockerRegistry::start(test, &options).unwrap() else { return };
    let directory = tempfile::tempdir().unwrap();
    let own = directory.path().join(upstream.address());
    std::fs::create_dir(&own).unwrap();
    std::fs::write(own.join("hosts.toml"), format!("[host.\"http://{}\"]", proxy.address())).unwrap();
    let config = Config { hosts_dirs: vec![directory.path().to_owned()], ..config() };
    let source = Client::new(config).unwrap().source(&upstream.reference("four").parse().unwrap());
    assert_eq!(source.root().await.unwrap(), document);
    let layer = content(400_000);
    keep(&format!("http://{}/v2/{}/blobs/{}", proxy.address(), FaultRegistry::REPOSITORY, descriptor(&layer).digest))
        .await;
    for range in [399_000..400_000, 0..1000, 100_000..300_000] {
        let found = source.blob_range(&descriptor(&layer), range.start as u64..range.end as u64).await.unwrap();
        assert!(found == layer[range]);
    }
    assert!(read(source.blob(&descriptor(&layer)).await.unwrap()).await.unwrap() == layer);
    // Everything came by way of the proxy, which does not say who it is.
    let ours = |request: &loris_testkit::registry::LoggedRequest| {
        request.header("user-agent").is_some_and(|agent| agent.starts_with("loris/"))
    };
    assert!(!upstream.requests().is_empty());
    assert!(!upstream.requests().iter().any(ours), "{:?}", upstream.requests());
}
