//! Writing: blobs at once and in chunks, from streams and files; manifests, referrers, deletion.

use std::collections::BTreeMap;

use bytes::Bytes;
use loris_format::digest::Digest;
use loris_oci::{
    BlobStream, Descriptor, Document, Error, ImageSink as _, ImageSource as _,
    document::media_type,
    registry::{Client, Config, ManifestName, RegistrySink},
};
use loris_testkit::registry::{Effect, Fault, FaultRegistry};

use super::{config, content, descriptor, manifest, reference, sink, source, stream};

const LENGTH: usize = 6 << 20;

/// Blobs beyond 1 MiB go in chunks of 1 MiB.
fn chunked() -> Config {
    Config { chunked_from_bytes: 1 << 20, chunk_bytes: 1 << 20, ..config() }
}

fn stored(registry: &FaultRegistry, blob: &[u8]) -> bool {
    registry.blob(FaultRegistry::REPOSITORY, &Digest::sha256_of(blob).to_string()).is_some_and(|found| found == blob)
}

fn count(registry: &FaultRegistry, method: &str) -> usize {
    registry.requests().iter().filter(|request| request.method == method).count()
}

async fn put(sink: &RegistrySink, blob: &[u8], from_file: bool) -> Result<(), Error> {
    if !from_file {
        return sink.put_blob(&descriptor(blob), stream(blob)).await;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), blob).unwrap();
    sink.put_blob_file(&descriptor(blob), file.path()).await
}

#[tokio::test]
async fn blobs_are_sent_at_once() {
    for (length, from_file) in [(0, false), (0, true), (1000, false), (1000, true), (LENGTH, false), (LENGTH, true)] {
        let registry = FaultRegistry::start().await;
        let blob = content(length);
        let sink = sink(&registry, config());
        assert!(!sink.has_blob(&descriptor(&blob)).await.unwrap());
        put(&sink, &blob, from_file).await.unwrap();
        assert!(stored(&registry, &blob), "{length} {from_file}");
        assert!(sink.has_blob(&descriptor(&blob)).await.unwrap());
        assert_eq!((count(&registry, "POST"), count(&registry, "PATCH"), count(&registry, "PUT")), (1, 0, 1));
        let requests = registry.requests();
        let put = requests.iter().find(|request| request.method == "PUT").unwrap();
        assert_eq!(put.header("content-length").unwrap(), length.to_string());
        assert_eq!(sink.in_repository().client().statistics().sent_bytes, length as u64);
    }
}

#[tokio::test]
async fn large_blobs_are_sent_in_chunks() {
    for (from_file, relative, minimum, chunks) in
        [(false, false, None, 6), (true, true, None, 6), (true, false, Some(2 << 20), 3), (false, true, Some(9), 6)]
    {
        let registry = FaultRegistry::start().await;
        registry.relative_locations(relative);
        registry.chunk_minimum(minimum);
        let blob = content(LENGTH);
        put(&sink(&registry, chunked()), &blob, from_file).await.unwrap();
        assert!(stored(&registry, &blob));
        assert_eq!((count(&registry, "POST"), count(&registry, "PATCH"), count(&registry, "PUT")), (1, chunks, 1));
        assert_eq!(registry.open_uploads(), 0);
    }
}

#[tokio::test]
async fn chunks_go_on_where_they_broke() {
    for from_file in [false, true] {
        for effect in [
            Effect::AbortUpload(0),
            Effect::AbortUpload(300_000),
            Effect::LoseAnswer,
            Effect::Status(500),
            Effect::ResetAtOnce,
            Effect::RetryAfter(429, "0".into()),
        ] {
            let registry = FaultRegistry::start().await;
            let blob = content(LENGTH);
            registry.fault(Fault::new(effect.clone()).method("PATCH").skip(2).times(2));
            let sink = sink(&registry, chunked());
            put(&sink, &blob, from_file).await.unwrap();
            assert!(stored(&registry, &blob), "{effect:?}");
            assert_eq!(registry.faults_left(), Vec::<String>::new());
            // It was the same upload all the time.
            assert_eq!(count(&registry, "POST"), 1, "{effect:?}");
            assert_eq!(count(&registry, "GET"), 2, "{effect:?}");
        }
    }
}

#[tokio::test]
async fn the_end_of_chunks_may_break_too() {
    for effect in [Effect::LoseAnswer, Effect::Status(503), Effect::ResetAtOnce] {
        let registry = FaultRegistry::start().await;
        let blob = content(LENGTH);
        registry.fault(Fault::new(effect.clone()).method("PUT"));
        put(&sink(&registry, chunked()), &blob, false).await.unwrap();
        assert!(stored(&registry, &blob), "{effect:?}");
        assert_eq!(count(&registry, "POST"), 1, "{effect:?}");
    }
}

#[tokio::test]
async fn registries_without_chunks_get_blobs_at_once() {
    for from_file in [false, true] {
        let registry = FaultRegistry::start().await;
        registry.chunked_uploads(false);
        let blob = content(LENGTH);
        put(&sink(&registry, chunked()), &blob, from_file).await.unwrap();
        assert!(stored(&registry, &blob));
        assert_eq!((count(&registry, "PATCH"), count(&registry, "PUT")), (1, 1));
        assert_eq!(registry.open_uploads(), 0);
        // Chunks that would have to be too large for memory are not sent.
        registry.chunk_minimum(Some(1 << 40));
        let other = content(LENGTH + 1);
        put(&sink(&registry, chunked()), &other, from_file).await.unwrap();
        assert!(stored(&registry, &other));
        assert_eq!(count(&registry, "PATCH"), 1);
    }
}

#[tokio::test]
async fn uploads_at_once_begin_again() {
    for (length, from_file) in [(1000, false), (1000, true), (LENGTH, true)] {
        for effect in [Effect::AbortUpload(500), Effect::Status(500), Effect::ResetAtOnce, Effect::LoseAnswer] {
            let registry = FaultRegistry::start().await;
            let blob = content(length);
            registry.fault(Fault::new(effect.clone()).method("PUT"));
            put(&sink(&registry, config()), &blob, from_file).await.unwrap();
            assert!(stored(&registry, &blob), "{effect:?}");
            // Where only the answer was lost, the blob is found to be there.
            let expected = if matches!(effect, Effect::LoseAnswer) { 1 } else { 2 };
            assert_eq!(count(&registry, "PUT"), expected, "{effect:?}");
        }
    }
}

#[tokio::test]
async fn a_stream_that_can_be_sent_only_once_fails_in_a_way_that_may_pass() {
    let registry = FaultRegistry::start().await;
    let blob = content(LENGTH);
    registry.fault(Fault::new(Effect::AbortUpload(500_000)).method("PUT"));
    let sink = sink(&registry, config());
    let error = put(&sink, &blob, false).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert!(!stored(&registry, &blob));
    // Only the answer is lost: the blob is there.
    registry.fault(Fault::new(Effect::LoseAnswer).method("PUT"));
    put(&sink, &blob, false).await.unwrap();
    assert!(stored(&registry, &blob));
}

#[tokio::test]
async fn an_upload_is_begun_again_only_where_nothing_was_done() {
    let registry = FaultRegistry::start().await;
    let sink = sink(&registry, config());
    registry.fault(Fault::new(Effect::Status(503)).method("POST"));
    registry.fault(Fault::new(Effect::RetryAfter(429, "0".into())).method("POST"));
    put(&sink, b"a", false).await.unwrap();
    assert_eq!(count(&registry, "POST"), 3);
    registry.forget_requests();
    registry.fault(Fault::new(Effect::Status(400)).method("POST"));
    let error = put(&sink, b"b", false).await.unwrap_err();
    assert!(matches!(error, Error::Registry { status: Some(400), .. }), "{error}");
    assert_eq!(count(&registry, "POST"), 1);
}

#[tokio::test]
async fn what_is_not_what_it_should_be_is_not_stored() {
    for length in [1000, LENGTH] {
        for (name, wrong) in [
            ("other bytes", content(length).iter().map(|byte| byte ^ 1).collect::<Vec<u8>>()),
            ("too short", content(length - 1)),
            ("too long", content(length + 1)),
        ] {
            for config in [config(), chunked()] {
                let registry = FaultRegistry::start().await;
                let wanted = descriptor(&content(length));
                let sink = sink(&registry, config);
                let error = sink.put_blob(&wanted, stream(&wrong)).await.unwrap_err();
                assert!(matches!(error, Error::Corrupt { .. }), "{name}: {error}");
                let file = tempfile::NamedTempFile::new().unwrap();
                std::fs::write(file.path(), &wrong).unwrap();
                let error = sink.put_blob_file(&wanted, file.path()).await.unwrap_err();
                assert!(matches!(error, Error::Corrupt { .. }), "{name}: {error}");
                assert!(registry.blob(FaultRegistry::REPOSITORY, &wanted.digest.to_string()).is_none());
                assert_eq!(registry.open_uploads(), 0, "{name}, {length} bytes");
            }
        }
    }
}

#[tokio::test]
async fn a_source_that_fails_is_the_error_that_is_told() {
    for config in [config(), chunked()] {
        let registry = FaultRegistry::start().await;
        let blob = content(LENGTH);
        let chunks = [
            Ok(Bytes::copy_from_slice(&blob[..2 << 20])),
            Err(Error::Invalid { what: "the source".into(), detail: "gone".into() }),
        ];
        let broken: BlobStream = Box::pin(futures_util::stream::iter(chunks));
        let error = sink(&registry, config).put_blob(&descriptor(&blob), broken).await.unwrap_err();
        assert_eq!(error.to_string(), "the source is not valid: gone");
        assert_eq!(registry.open_uploads(), 0);
    }
}

#[tokio::test]
async fn blobs_are_mounted_from_other_repositories() {
    let registry = FaultRegistry::start().await;
    let blob = content(1000);
    let client = Client::new(config()).unwrap();
    let other = format!("{}/other/image:1", registry.address()).parse().unwrap();
    client.sink(&other).put_blob(&descriptor(&blob), stream(&blob)).await.unwrap();
    let sink = client.sink(&reference(&registry));
    let (host, from) = client.source(&other).repository().unwrap();
    assert_eq!((host.as_str(), from.as_str()), (registry.address().as_str(), "other/image"));
    assert!(!sink.has_blob(&descriptor(&blob)).await.unwrap());
    assert!(sink.mount_blob(&descriptor(&blob), (&host, &from)).await.unwrap());
    assert!(stored(&registry, &blob));

    // Another registry's, and its own, are not asked for.
    registry.forget_requests();
    assert!(!sink.mount_blob(&descriptor(&blob), ("other.example", &from)).await.unwrap());
    assert!(!sink.mount_blob(&descriptor(&blob), (&host, FaultRegistry::REPOSITORY)).await.unwrap());
    assert_eq!(registry.requests().len(), 0);

    // Where it is not mounted, the upload that was begun instead is used.
    registry.mounting(false);
    let more = content(2000);
    assert!(!sink.mount_blob(&descriptor(&more), (&host, &from)).await.unwrap());
    sink.put_blob(&descriptor(&more), stream(&more)).await.unwrap();
    assert!(stored(&registry, &more));
    assert_eq!((count(&registry, "POST"), registry.open_uploads()), (1, 0));
    for status in [403, 404, 405] {
        registry.fault(Fault::new(Effect::Status(status)).method("POST"));
        assert!(!sink.mount_blob(&descriptor(&more), (&host, &from)).await.unwrap(), "{status}");
    }
}

#[tokio::test]
async fn a_blob_of_another_size_is_not_the_blob() {
    let registry = FaultRegistry::start().await;
    let blob = content(1000);
    registry.add_blob(blob.clone());
    let sink = sink(&registry, config());
    let error = sink.has_blob(&Descriptor { size: 999, ..descriptor(&blob) }).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    for status in [400, 403, 405] {
        registry.fault(Fault::new(Effect::Status(status)).method("HEAD"));
        let outcome = sink.has_blob(&descriptor(&blob)).await;
        // A refusal by the registry itself is one; otherwise the blob is sent again.
        assert!(if status == 403 { outcome.is_err() } else { !outcome.unwrap() }, "{status}");
    }
}

#[tokio::test]
async fn an_image_is_visible_when_it_is_committed() {
    let registry = FaultRegistry::start().await;
    let sink = sink(&registry, config());
    let document = manifest("x");
    sink.put_blob(&descriptor(b"{}"), stream(b"{}")).await.unwrap();
    sink.put_manifest(&document).await.unwrap();
    assert!(registry.manifest(FaultRegistry::REPOSITORY, "latest").is_none());
    registry.fault(Fault::new(Effect::Status(503)).method("PUT"));
    registry.fault(Fault::new(Effect::LoseAnswer).method("PUT"));
    sink.commit(&document, &BTreeMap::new()).await.unwrap();
    let (digest, kind, bytes) = registry.manifest(FaultRegistry::REPOSITORY, "latest").unwrap();
    assert_eq!(
        (digest, kind, bytes),
        (document.digest.to_string(), document.media_type.clone(), document.bytes.clone())
    );

    // A reference by digest takes that image and no other.
    let client = Client::new(config()).unwrap();
    let pinned = client.sink(&reference(&registry).with_digest(manifest("y").digest));
    let error = pinned.commit(&document, &BTreeMap::new()).await.unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    // A registry that stores something else is found out.
    registry.fault(Fault::new(Effect::DigestHeader(manifest("y").digest.to_string())).method("PUT"));
    let error = sink.commit(&document, &BTreeMap::new()).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
}

/// Returns an artifact that refers to `subject`.
pub(super) fn artifact(subject: &Document, kind: &str, mark: &str) -> Document {
    let empty = Digest::sha256_of(b"{}");
    let text = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","artifactType":"{kind}","config":{{"mediaType":"{}","digest":"{empty}","size":2}},"layers":[],"subject":{{"mediaType":"{}","digest":"{}","size":{}}},"annotations":{{"mark":"{mark}"}}}}"#,
        media_type::OCI_MANIFEST,
        media_type::OCI_EMPTY,
        subject.media_type,
        subject.digest,
        subject.bytes.len()
    );
    Document::new(media_type::OCI_MANIFEST, text.into()).unwrap()
}

#[tokio::test]
async fn referrers_are_found_with_and_without_the_api() {
    for (api, filter) in [(true, true), (true, false), (false, false)] {
        let registry = FaultRegistry::start().await;
        registry.referrers_api(api);
        registry.referrers_filter(filter);
        let sink = sink(&registry, config());
        let source = source(&registry, config());
        let subject = manifest("x");
        sink.put_blob(&descriptor(b"{}"), stream(b"{}")).await.unwrap();
        sink.put_manifest(&subject).await.unwrap();
        assert_eq!(source.referrers(&subject.digest, None).await.unwrap(), []);

        let (one, two) = (artifact(&subject, "a/one", "1"), artifact(&subject, "a/two", "2"));
        for document in [&one, &two, &one] {
            sink.put_manifest(document).await.unwrap();
        }
        let all = source.referrers(&subject.digest, None).await.unwrap();
        let mut digests: Vec<Digest> = all.iter().map(|referrer| referrer.digest).collect();
        digests.sort();
        let mut expected = [one.digest, two.digest];
        expected.sort();
        assert_eq!(digests, expected);
        let found = source.referrers(&subject.digest, Some("a/two")).await.unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].digest, found[0].size), (two.digest, two.bytes.len() as u64));
        assert_eq!(found[0].annotations.get("mark").map(String::as_str), Some("2"));
        assert_eq!(source.referrers(&subject.digest, Some("a/three")).await.unwrap(), []);
        let tag = format!("sha256-{}", subject.digest.hex());
        assert_eq!(registry.manifest(FaultRegistry::REPOSITORY, &tag).is_some(), !api);

        // What is deleted refers to nothing any more.
        sink.in_repository().delete_manifest(ManifestName::Digest(&one.digest)).await.unwrap();
        let left = source.referrers(&subject.digest, None).await.unwrap();
        assert_eq!(left.iter().map(|referrer| referrer.digest).collect::<Vec<_>>(), [two.digest]);
    }
}

#[tokio::test]
async fn many_referrers_at_once_are_all_listed() {
    let registry = FaultRegistry::start().await;
    registry.referrers_api(false);
    let client = Client::new(config()).unwrap();
    let subject = manifest("x");
    client.sink(&reference(&registry)).put_blob(&descriptor(b"{}"), stream(b"{}")).await.unwrap();
    let tasks: Vec<_> = (0..8)
        .map(|n| {
            let sink = client.sink(&reference(&registry));
            let document = artifact(&subject, "a/b", &n.to_string());
            tokio::spawn(async move { sink.put_manifest(&document).await.unwrap() })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let source = client.source(&reference(&registry));
    assert_eq!(source.referrers(&subject.digest, None).await.unwrap().len(), 8);
}

#[tokio::test]
async fn an_index_of_referrers_keeps_what_others_have_put_in() {
    let registry = FaultRegistry::start().await;
    registry.referrers_api(false);
    let subject = manifest("x");
    let tag = format!("sha256-{}", subject.digest.hex());
    let other = format!(
        r#"{{"schemaVersion":2,"mediaType":"{0}","odd":{{"a":1}},"manifests":[{{"mediaType":"{1}","digest":"{2}","size":5,"odd":"kept"}}]}}"#,
        media_type::OCI_INDEX,
        media_type::OCI_MANIFEST,
        Digest::sha256_of(b"other")
    );
    registry.add_manifest(&tag, media_type::OCI_INDEX, other);
    let sink = sink(&registry, config());
    sink.put_blob(&descriptor(b"{}"), stream(b"{}")).await.unwrap();
    sink.put_manifest(&artifact(&subject, "a/b", "1")).await.unwrap();
    let (_, _, bytes) = registry.manifest(FaultRegistry::REPOSITORY, &tag).unwrap();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    assert!(text.contains(r#""odd":{"a":1}"#) && text.contains(r#""odd":"kept""#), "{text}");
    assert_eq!(source(&registry, config()).referrers(&subject.digest, None).await.unwrap().len(), 2);
    // What is no index is not overwritten.
    registry.add_manifest(&tag, media_type::OCI_MANIFEST, subject.bytes.clone());
    let sub = Client::new(config()).unwrap().sink(&format!("{}/another:1", registry.address()).parse().unwrap());
    sub.put_blob(&descriptor(b"{}"), stream(b"{}")).await.unwrap();
    let error = sub.put_manifest(&artifact(&subject, "a/b", "2")).await.unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
}

#[tokio::test]
async fn a_page_for_people_is_no_list_of_referrers() {
    let registry = FaultRegistry::start().await;
    registry.fault(Fault::new(Effect::Header("content-type", "text/html".into())).path("/referrers/"));
    let digest = manifest("x").digest;
    assert_eq!(source(&registry, config()).referrers(&digest, None).await.unwrap(), []);
    for status in [400, 404, 405] {
        registry.fault(Fault::new(Effect::Status(status)).path("/referrers/"));
        assert_eq!(source(&registry, config()).referrers(&digest, None).await.unwrap(), []);
    }
    registry.fault(Fault::new(Effect::Status(403)).path("/referrers/"));
    assert!(matches!(source(&registry, config()).referrers(&digest, None).await, Err(Error::Denied { .. })));
}

#[tokio::test]
async fn what_is_deleted_is_gone() {
    let registry = FaultRegistry::start().await;
    let sink = sink(&registry, config());
    let repository = sink.in_repository();
    let document = manifest("x");
    sink.put_blob(&descriptor(b"{}"), stream(b"{}")).await.unwrap();
    sink.commit(&document, &BTreeMap::new()).await.unwrap();
    let digest = document.digest;
    repository.delete_manifest(ManifestName::Tag("latest")).await.unwrap();
    assert!(registry.manifest(FaultRegistry::REPOSITORY, "latest").is_none());
    assert!(registry.manifest(FaultRegistry::REPOSITORY, &digest.to_string()).is_some());
    // The answer is lost, the deletion is not: the second attempt finds nothing, which is as it should be.
    registry.fault(Fault::new(Effect::LoseAnswer).method("DELETE"));
    repository.delete_manifest(ManifestName::Digest(&digest)).await.unwrap();
    assert!(registry.manifest(FaultRegistry::REPOSITORY, &digest.to_string()).is_none());
    assert!(matches!(repository.delete_manifest(ManifestName::Tag("latest")).await, Err(Error::NotFound { .. })));
    registry.fault(Fault::new(Effect::Status(405)).method("DELETE"));
    assert!(matches!(repository.delete_blob(&descriptor(b"{}").digest).await, Err(Error::Unsupported { .. })));
    repository.delete_blob(&descriptor(b"{}").digest).await.unwrap();
    assert!(!sink.has_blob(&descriptor(b"{}")).await.unwrap());
}
