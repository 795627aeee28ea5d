//! What the distribution specification says, request by request.

use std::path::Path;

use loris_format::digest::Digest;
use loris_serve::registry::{Registry, storage::StorageError};
use reqwest::{Method, Response, StatusCode, header};
use serde_json::{Value, json};

use super::Served;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

impl Served {
    async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Response {
        let mut request = self.client.request(method, self.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(body).send().await.unwrap()
    }

    async fn get(&self, path: &str) -> Response {
        self.send(Method::GET, path, &[], Vec::new()).await
    }

    async fn push_blob(&self, repository: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::sha256_of(bytes);
        let path = format!("/v2/{repository}/blobs/uploads/?digest={}", digest.to_string().replace(':', "%3A"));
        let response = self.send(Method::POST, &path, &[], bytes.to_vec()).await;
        assert_eq!(response.status(), StatusCode::CREATED);
        assert_eq!(text(&response, "location"), format!("/v2/{repository}/blobs/{digest}"));
        digest
    }

    async fn start_upload(&self, repository: &str) -> String {
        let response = self.send(Method::POST, &format!("/v2/{repository}/blobs/uploads/"), &[], Vec::new()).await;
        assert_eq!(response.status(), StatusCode::ACCEPTED);
        assert_eq!(text(&response, "range"), "0-0");
        text(&response, "location").to_owned()
    }

    async fn push_manifest(&self, repository: &str, reference: &str, kind: &str, manifest: &Value) -> Response {
        let path = format!("/v2/{repository}/manifests/{reference}");
        self.send(Method::PUT, &path, &[("content-type", kind)], manifest.to_string().into_bytes()).await
    }

    /// Pushes an image without layers, and returns its digest.
    async fn push_image(&self, repository: &str, tag: &str, note: &str) -> Digest {
        let config = self.push_blob(repository, note.as_bytes()).await;
        let manifest = image(&config, note.len());
        let response = self.push_manifest(repository, tag, MANIFEST, &manifest).await;
        assert_eq!(response.status(), StatusCode::CREATED);
        let digest = Digest::sha256_of(manifest.to_string().as_bytes());
        assert_eq!(text(&response, "docker-content-digest"), digest.to_string());
        digest
    }
}

fn text<'a>(response: &'a Response, name: &str) -> &'a str {
    response.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

fn image(config: &Digest, size: usize) -> Value {
    json!({ "schemaVersion": 2, "mediaType": MANIFEST, "layers": [],
        "config": { "mediaType": CONFIG, "digest": config, "size": size } })
}

/// Checks the status and the code of a refusal.
async fn assert_refused(response: Response, status: u16, code: &str) {
    assert_eq!(response.status().as_u16(), status);
    let body: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
    assert_eq!(body["errors"][0]["code"], code, "{body}");
}

/// Counts the files below a directory.
fn files(directory: &Path) -> usize {
    let entries = std::fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().path()).map(|path| if path.is_dir() { files(&path) } else { 1 }).sum()
}

#[tokio::test]
async fn endpoints_and_names() {
    let served = Served::start();
    for path in ["/v2/", "/v2"] {
        let response = served.get(path).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(text(&response, "docker-distribution-api-version"), "registry/2.0");
    }
    let cases = [
        (Method::GET, "/v2/UPPER/tags/list", 400, "NAME_INVALID"),
        (Method::GET, "/v2/a%2F..%2Fb/tags/list", 400, "NAME_INVALID"),
        (Method::GET, "/v2/none/tags/list", 404, "NAME_UNKNOWN"),
        (Method::GET, "/v2/none/manifests/latest", 404, "MANIFEST_UNKNOWN"),
        (Method::GET, "/v2/none/manifests/.bad", 400, "MANIFEST_INVALID"),
        (Method::GET, "/v2/none/manifests/sha256:0", 400, "DIGEST_INVALID"),
        (Method::GET, "/v2/none/blobs/latest", 400, "DIGEST_INVALID"),
        (Method::GET, "/v2/none/other", 404, "NAME_UNKNOWN"),
        (Method::POST, "/v2/none/tags/list", 405, "UNSUPPORTED"),
        (Method::PATCH, "/v2/a/blobs/uploads/nothing", 404, "BLOB_UPLOAD_UNKNOWN"),
        (Method::PUT, "/v2/a/blobs/uploads/..", 404, "BLOB_UPLOAD_UNKNOWN"),
        (Method::POST, "/v2/a/blobs/uploads/?digest=md5:0", 400, "DIGEST_INVALID"),
    ];
    for (method, path, status, code) in cases {
        let response = served.send(method.clone(), path, &[], Vec::new()).await;
        // A client resolves `..` itself; then the path is none of ours.
        let expected = if path.ends_with("..") { (400, "DIGEST_INVALID") } else { (status, code) };
        if path.ends_with("..") {
            assert!(response.status().is_client_error(), "{method} {path}");
        } else {
            assert_refused(response, expected.0, expected.1).await;
        }
    }
    served.server.stop().await;
}

#[tokio::test]
async fn blobs_and_ranges() {
    let served = Served::start();
    let bytes: Vec<u8> = (0..100_000_u32).map(|position| (position % 251) as u8).collect();
    let digest = served.push_blob("a/b", &bytes).await;
    let path = format!("/v2/a/b/blobs/{digest}");

    let head = served.send(Method::HEAD, &path, &[], Vec::new()).await;
    assert_eq!((head.status(), text(&head, "content-length")), (StatusCode::OK, "100000"));
    assert_eq!(text(&head, "docker-content-digest"), digest.to_string());
    assert_eq!(text(&head, "accept-ranges"), "bytes");
    assert_eq!(head.bytes().await.unwrap().len(), 0);

    let before = served.registry.statistics();
    assert!(served.get(&path).await.bytes().await.unwrap() == bytes);
    let spent = served.registry.statistics() - before;
    assert_eq!((spent.requests, spent.bytes_sent, spent.bytes_received), (1, 100_000, 0));

    for (range, content_range, expected) in [
        ("bytes=0-0", "bytes 0-0/100000", 0..1),
        ("bytes=5000-70000", "bytes 5000-70000/100000", 5000..70001),
        ("bytes=99990-200000", "bytes 99990-99999/100000", 99990..100_000),
        ("bytes=-7", "bytes 99993-99999/100000", 99993..100_000),
    ] {
        let response = served.send(Method::GET, &path, &[("range", range)], Vec::new()).await;
        assert_eq!(response.status(), StatusCode::PARTIAL_CONTENT, "{range}");
        assert_eq!(text(&response, "content-range"), content_range);
        assert_eq!(text(&response, "content-length"), expected.len().to_string());
        assert!(response.bytes().await.unwrap() == bytes[expected], "{range}");
    }
    let response = served.send(Method::GET, &path, &[("range", "bytes=100000-")], Vec::new()).await;
    assert_eq!(text(&response, "content-range"), "bytes */100000");
    assert_eq!(response.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    let response = served.send(Method::GET, &path, &[("range", "bytes=0-1,5-6")], Vec::new()).await;
    assert_eq!(response.status(), StatusCode::OK);
    let known = format!("\"{digest}\"");
    let response = served.send(Method::GET, &path, &[("if-none-match", &known)], Vec::new()).await;
    assert_eq!(response.status(), StatusCode::NOT_MODIFIED);

    // A blob of one repository is none of another, until it is mounted.
    let elsewhere = format!("/v2/c/blobs/{digest}");
    assert_refused(served.get(&elsewhere).await, 404, "BLOB_UNKNOWN").await;
    let mount = |from: &str| format!("/v2/c/blobs/uploads/?mount={digest}&from={from}");
    let response = served.send(Method::POST, &mount("none"), &[], Vec::new()).await;
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    let response = served.send(Method::POST, &mount("a%2Fb"), &[], Vec::new()).await;
    assert_eq!(response.status(), StatusCode::CREATED);
    assert_eq!(text(&response, "location"), elsewhere);

    // Content lives as long as one repository has it.
    let response = served.send(Method::DELETE, &path, &[], Vec::new()).await;
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    assert_refused(served.get(&path).await, 404, "BLOB_UNKNOWN").await;
    assert_refused(served.send(Method::DELETE, &path, &[], Vec::new()).await, 404, "BLOB_UNKNOWN").await;
    assert!(served.get(&elsewhere).await.bytes().await.unwrap() == bytes);
    let blobs = served.directory.path().join("blobs");
    assert_eq!(files(&blobs), 1);
    served.send(Method::DELETE, &elsewhere, &[], Vec::new()).await;
    assert_eq!(files(&blobs), 0);

    let empty = served.push_blob("a/b", b"").await;
    let response = served.get(&format!("/v2/a/b/blobs/{empty}")).await;
    assert_eq!((response.status(), text(&response, "content-length")), (StatusCode::OK, "0"));
    served.server.stop().await;
}

#[tokio::test]
async fn uploads() {
    let served = Served::start();
    let bytes = b"0123456789".repeat(1000);
    let digest = Digest::sha256_of(&bytes);

    // In chunks, with their places and without, out of order and with a lie about their length.
    let location = served.start_upload("a").await;
    let patch = async |range: &str, body: Vec<u8>| {
        served.send(Method::PATCH, &location, &[("content-range", range)], body).await
    };
    let response = patch("0-3999", bytes[..4000].to_vec()).await;
    assert_eq!((response.status(), text(&response, "range")), (StatusCode::ACCEPTED, "0-3999"));
    let response = patch("5000-5999", bytes[5000..6000].to_vec()).await;
    assert_eq!((response.status(), text(&response, "range")), (StatusCode::RANGE_NOT_SATISFIABLE, "0-3999"));
    assert_refused(patch("4000-4999", bytes[4000..5001].to_vec()).await, 400, "SIZE_INVALID").await;
    assert_refused(patch("4000", bytes[4000..5001].to_vec()).await, 400, "BLOB_UPLOAD_INVALID").await;
    assert_refused(patch("4999-4000", Vec::new()).await, 400, "BLOB_UPLOAD_INVALID").await;
    let response = served.get(&location).await;
    assert_eq!((response.status(), text(&response, "range")), (StatusCode::NO_CONTENT, "0-3999"));
    let response = served.send(Method::PATCH, &location, &[], bytes[4000..6000].to_vec()).await;
    assert_eq!((response.status(), text(&response, "range")), (StatusCode::ACCEPTED, "0-5999"));
    let put = format!("{location}?digest={digest}");
    let response = served.send(Method::PUT, &put, &[("content-range", "6000-9999")], bytes[6000..].to_vec()).await;
    assert_eq!(response.status(), StatusCode::CREATED);
    assert!(served.get(&format!("/v2/a/blobs/{digest}")).await.bytes().await.unwrap() == bytes);
    assert_refused(served.get(&location).await, 404, "BLOB_UPLOAD_UNKNOWN").await;

    // In one piece, by SHA-512.
    let digest = {
        let mut hasher = format!("sha512:{}", "0".repeat(128)).parse::<Digest>().unwrap().hasher();
        hasher.update(&bytes);
        hasher.finish()
    };
    let location = served.start_upload("a").await;
    let response = served.send(Method::PUT, &format!("{location}?digest={digest}"), &[], bytes.clone()).await;
    assert_eq!(response.status(), StatusCode::CREATED);
    assert!(served.get(&format!("/v2/a/blobs/{digest}")).await.bytes().await.unwrap() == bytes);

    // What isn't what it says.
    let wrong = Digest::sha256_of(b"other");
    let location = served.start_upload("a").await;
    let response = served.send(Method::PUT, &format!("{location}?digest={wrong}"), &[], bytes.clone()).await;
    assert_refused(response, 400, "DIGEST_INVALID").await;
    assert_refused(served.get(&format!("/v2/a/blobs/{wrong}")).await, 404, "BLOB_UNKNOWN").await;
    let path = format!("/v2/a/blobs/uploads/?digest={wrong}");
    assert_refused(served.send(Method::POST, &path, &[], bytes.clone()).await, 400, "DIGEST_INVALID").await;
    let location = served.start_upload("a").await;
    assert_refused(served.send(Method::PUT, &location, &[], Vec::new()).await, 400, "DIGEST_INVALID").await;

    // Given up, and asked for in another repository.
    assert_refused(served.get(&location.replace("/v2/a/", "/v2/b/")).await, 404, "BLOB_UPLOAD_UNKNOWN").await;
    let response = served.send(Method::DELETE, &location, &[], Vec::new()).await;
    assert_eq!(response.status(), StatusCode::NO_CONTENT);
    assert_refused(served.get(&location).await, 404, "BLOB_UPLOAD_UNKNOWN").await;
    let uploads = served.directory.path().join("uploads");
    assert_eq!(files(&uploads), 0);

    // Left alone: it ends with the registry.
    let location = served.start_upload("a").await;
    served.send(Method::PATCH, &location, &[], bytes).await;
    assert_eq!(files(&uploads), 1);
    served.registry.end_uploads();
    assert_eq!(files(&uploads), 0);
    served.server.stop().await;
}

#[tokio::test]
async fn manifests_and_tags() {
    let served = Served::start();
    let first = served.push_image("a", "latest", "first").await;
    let second = served.push_image("a", "v2", "second").await;
    assert_ne!(first, second);

    for reference in ["v2".to_owned(), second.to_string()] {
        let response = served.get(&format!("/v2/a/manifests/{reference}")).await;
        assert_eq!(text(&response, "content-type"), MANIFEST);
        assert_eq!(text(&response, "docker-content-digest"), second.to_string());
        let length: usize = text(&response, "content-length").parse().unwrap();
        let bytes = response.bytes().await.unwrap();
        assert!(second.matches(&bytes));
        let head = served.send(Method::HEAD, &format!("/v2/a/manifests/{reference}"), &[], Vec::new()).await;
        assert_eq!((bytes.len(), text(&head, "content-length")), (length, length.to_string().as_str()));
    }

    // A tag moves, and the manifest stays.
    let config = served.push_blob("a", b"first").await;
    served.push_manifest("a", "v2", MANIFEST, &image(&config, 5)).await;
    let response = served.send(Method::HEAD, "/v2/a/manifests/v2", &[], Vec::new()).await;
    assert_eq!(text(&response, "docker-content-digest"), first.to_string());
    assert_eq!(served.get(&format!("/v2/a/manifests/{second}")).await.status(), StatusCode::OK);

    // An index may list what isn't here; an image must not.
    let missing = Digest::sha256_of(b"missing");
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX,
        "manifests": [{ "mediaType": MANIFEST, "digest": missing, "size": 7 }] });
    assert_eq!(served.push_manifest("a", "index", INDEX, &index).await.status(), StatusCode::CREATED);
    let response = served.push_manifest("a", "x", MANIFEST, &image(&missing, 7)).await;
    assert_refused(response, 404, "MANIFEST_BLOB_UNKNOWN").await;
    let response = served.push_manifest("a", "x", INDEX, &image(&config, 5)).await;
    assert_refused(response, 400, "MANIFEST_INVALID").await;
    let response = served.push_manifest("a", &missing.to_string(), MANIFEST, &image(&config, 5)).await;
    assert_refused(response, 400, "DIGEST_INVALID").await;
    for bad in [&b"not json"[..], b"[]", br#"{"config":{"digest":"sha256:0"}}"#] {
        let response = served.send(Method::PUT, "/v2/a/manifests/x", &[("content-type", MANIFEST)], bad.to_vec()).await;
        assert_refused(response, 400, "MANIFEST_INVALID").await;
    }
    let response = served.send(Method::PUT, "/v2/a/manifests/x", &[], vec![b' '; (4 << 20) + 1]).await;
    assert_refused(response, 413, "SIZE_INVALID").await;

    let body: Value = serde_json::from_slice(&served.get("/v2/a/tags/list").await.bytes().await.unwrap()).unwrap();
    assert_eq!(body, json!({ "name": "a", "tags": ["index", "latest", "v2"] }));
    let mut next = "/v2/a/tags/list?n=2".to_owned();
    let mut pages = Vec::new();
    loop {
        let response = served.get(&next).await;
        let link = text(&response, "link").to_owned();
        let body: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
        pages.push(body["tags"].clone());
        let Some((target, _)) = link.strip_prefix('<').and_then(|link| link.split_once('>')) else { break };
        target.clone_into(&mut next);
    }
    assert_eq!(pages, [json!(["index", "latest"]), json!(["v2"])]);
    served.push_image("lib/b", "latest", "b").await;
    let body: Value = serde_json::from_slice(&served.get("/v2/_catalog").await.bytes().await.unwrap()).unwrap();
    assert_eq!(body, json!({ "repositories": ["a", "lib/b"] }));

    // A tag is deleted alone; a manifest goes with its tags.
    let delete = |reference: String| {
        let path = format!("/v2/a/manifests/{reference}");
        let served = &served;
        async move { served.send(Method::DELETE, &path, &[], Vec::new()).await.status() }
    };
    assert_eq!(delete("latest".to_owned()).await, StatusCode::ACCEPTED);
    assert_eq!(delete("latest".to_owned()).await, StatusCode::NOT_FOUND);
    assert_eq!(served.get("/v2/a/manifests/v2").await.status(), StatusCode::OK);
    assert_eq!(delete(first.to_string()).await, StatusCode::ACCEPTED);
    assert_refused(served.get("/v2/a/manifests/v2").await, 404, "MANIFEST_UNKNOWN").await;
    let body: Value = serde_json::from_slice(&served.get("/v2/a/tags/list").await.bytes().await.unwrap()).unwrap();
    assert_eq!(body["tags"], json!(["index"]));
    served.server.stop().await;
}

#[tokio::test]
async fn referrers() {
    let served = Served::start();
    let subject = served.push_image("a", "latest", "subject").await;
    let list = |query: &'static str| {
        let path = format!("/v2/a/referrers/{subject}{query}");
        let served = &served;
        async move {
            let response = served.get(&path).await;
            assert_eq!((response.status(), text(&response, "content-type")), (StatusCode::OK, INDEX));
            let filters = text(&response, "oci-filters-applied").to_owned();
            let body: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
            (body["manifests"].as_array().unwrap().clone(), filters)
        }
    };
    assert_eq!(list("").await, (Vec::new(), String::new()));

    let config = served.push_blob("a", b"{}").await;
    let mut digests = Vec::new();
    for (artifact_type, note) in [(Some("text/sbom"), "one"), (None, "two")] {
        let mut manifest = image(&config, 2);
        manifest["subject"] = json!({ "mediaType": MANIFEST, "digest": subject, "size": 1 });
        manifest["annotations"] = json!({ "note": note });
        if let Some(artifact_type) = artifact_type {
            manifest["artifactType"] = json!(artifact_type);
        }
        let digest = Digest::sha256_of(manifest.to_string().as_bytes());
        let response = served.push_manifest("a", &digest.to_string(), MANIFEST, &manifest).await;
        assert_eq!(response.status(), StatusCode::CREATED);
        assert_eq!(text(&response, "oci-subject"), subject.to_string());
        digests.push(digest);
    }
    assert_eq!(list("").await.0.len(), 2);
    let (filtered, filters) = list("?artifactType=text%2Fsbom").await;
    assert_eq!(filters, "artifactType");
    assert_eq!(filtered.len(), 1);
    assert_eq!(filtered[0]["digest"], digests[0].to_string());
    assert_eq!(filtered[0]["artifactType"], "text/sbom");
    assert_eq!(filtered[0]["annotations"], json!({ "note": "one" }));
    let (filtered, _) = list("?artifactType=application/vnd.oci.image.config.v1%2Bjson").await;
    assert_eq!(filtered[0]["digest"], digests[1].to_string());

    served.send(Method::DELETE, &format!("/v2/a/manifests/{}", digests[0]), &[], Vec::new()).await;
    assert_eq!(list("").await.0.len(), 1);
    served.server.stop().await;
}

#[tokio::test]
async fn it_survives() {
    let served = Served::start();
    let digest = served.push_image("a/b", "latest", "kept").await;
    served.start_upload("a/b").await;
    let directory = served.directory.path().to_owned();
    assert!(matches!(Registry::open(&directory), Err(StorageError::InUse { .. })));
    let Served { registry, server, directory, client } = served;
    server.stop().await;
    drop(registry);

    let registry = Registry::open(directory.path()).unwrap();
    assert_eq!(files(&directory.path().join("uploads")), 0);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let server = registry.serve(listener, Default::default()).unwrap();
    let url = format!("http://{}/v2/a/b/manifests/latest", server.address());
    let response = client.get(url).header(header::ACCEPT, MANIFEST).send().await.unwrap();
    assert!(digest.matches(&response.bytes().await.unwrap()));
    server.stop().await;
}

#[tokio::test]
async fn an_upload_that_breaks_off_can_be_resumed() {
    use std::io::{Read, Write};
    let served = Served::start();
    let location = served.start_upload("a").await;
    let address = served.server.address();
    let request = format!("PATCH {location} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n0123456789");
    tokio::task::spawn_blocking(move || {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        // Whatever is answered, the server is done with it then.
        let _ = stream.read_to_end(&mut answer);
    })
    .await
    .unwrap();
    let response = served.get(&location).await;
    let range = text(&response, "range").to_owned();
    assert_eq!(response.status(), StatusCode::NO_CONTENT);
    let received: usize = range.strip_prefix("0-").unwrap().parse::<usize>().unwrap() + 1;
    assert!(received == 10 || received == 1, "{range}");
    let rest = if range == "0-0" { &b"0123456789ab"[..] } else { b"ab" };
    let digest = Digest::sha256_of(b"0123456789ab");
    let response = served.send(Method::PUT, &format!("{location}?digest={digest}"), &[], rest.to_vec()).await;
    assert_eq!(response.status(), StatusCode::CREATED);
    served.server.stop().await;
}
