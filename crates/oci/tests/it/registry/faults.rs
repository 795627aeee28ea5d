//! Reading from a registry whose answers are wrong, cut, slow or refused.

use std::time::Duration;

use bytes::Bytes;
use loris_format::{digest::Digest, limits::Limits};
use loris_oci::{
    Descriptor, Error, ImageSource as _,
    document::media_type,
    registry::{Client, Config, ManifestName},
};
use loris_testkit::registry::{Effect, Fault, FaultRegistry};

use super::{config, content, descriptor, manifest, read, reference, source};

const BLOBS: &str = "/blobs/";
const LENGTH: usize = 3 << 20;

fn kind(error: &Error) -> &'static str {
    match error {
        Error::NotFound { .. } => "not found",
        Error::Denied { .. } => "denied",
        Error::Corrupt { .. } => "corrupt",
        Error::Invalid { .. } => "invalid",
        Error::TooLarge { .. } => "too large",
        Error::Unsupported { .. } => "unsupported",
        Error::Registry { transient: true, .. } => "transient",
        Error::Registry { .. } => "registry",
        _ => "other",
    }
}

fn is_stall(name: &str) -> bool {
    name.starts_with("stalled")
}

/// A short patience only where a stall is waited for: on a busy machine anything may take its time.
fn patient(name: &str) -> Config {
    let usual = config();
    let stall_timeout = if is_stall(name) { Duration::from_secs(1) } else { usual.stall_timeout };
    Config { stall_timeout, ..usual }
}

#[tokio::test]
async fn a_whole_blob_is_right_whatever_breaks() {
    let stall = || Effect::Stall(40_000, Duration::from_secs(60));
    let bit = Effect::FlipBit(2_000_000);
    let other = Effect::WrongContent(content(LENGTH - 4).into());
    let other_of_same_length = Effect::WrongContent(vec![7; LENGTH].into());
    let digest_header = Effect::DigestHeader(Digest::sha256_of(b"other").to_string());
    let encoded = Effect::Header("content-encoding", "gzip".to_owned());
    for (name, faults, expected) in [
        ("nothing", vec![], Ok(1)),
        ("cut at once", vec![Effect::Truncate(0)], Ok(2)),
        ("cut thrice", vec![Effect::Truncate(2_000_000), Effect::Truncate(5), Effect::Truncate(700_000)], Ok(4)),
        ("reset", vec![Effect::Reset(500_000)], Ok(2)),
        ("reset before the answer", vec![Effect::ResetAtOnce], Ok(2)),
        ("ended early", vec![Effect::EndEarly(500_000)], Ok(2)),
        ("no length", vec![Effect::NoLength], Ok(1)),
        ("stalled", vec![stall()], Ok(2)),
        ("stalled before the body", vec![Effect::Stall(0, Duration::from_secs(60))], Ok(2)),
        ("server trouble", vec![Effect::Status(500), Effect::Status(502), Effect::Status(503)], Ok(4)),
        ("too many requests", vec![Effect::RetryAfter(429, "0".to_owned())], Ok(2)),
        ("cut, and the rest by no range", vec![Effect::Truncate(900_000), Effect::IgnoreRange], Ok(2)),
        ("cut, and another rest", vec![Effect::Truncate(900_000), Effect::ShiftRange(1)], Err("corrupt")),
        ("cut, and a rest that lies", vec![Effect::Truncate(900_000), Effect::ShiftBytes(1)], Err("corrupt")),
        ("a flipped bit", vec![bit], Err("corrupt")),
        ("another blob", vec![other], Err("corrupt")),
        ("another blob of the same length", vec![other_of_same_length], Err("corrupt")),
        ("another digest", vec![digest_header], Err("corrupt")),
        ("more bytes", vec![Effect::ExtraBytes("more".into())], Err("corrupt")),
        ("encoded", vec![encoded], Err("registry")),
        ("refused for good", vec![Effect::Status(403)], Err("denied")),
        ("not understood", vec![Effect::Status(400)], Err("registry")),
    ] {
        let registry = FaultRegistry::start().await;
        let blob = content(LENGTH);
        registry.add_blob(blob.clone());
        for effect in faults {
            registry.fault(Fault::new(effect).path(BLOBS));
        }
        let source = source(&registry, patient(name));
        let outcome = read(source.blob(&descriptor(&blob)).await.unwrap()).await;
        match (&outcome, &expected) {
            (Ok(read), Ok(requests)) => {
                assert!(*read == blob, "{name}: wrong bytes");
                assert!(registry.requests().len() == *requests || is_stall(name), "{name}: not {requests} requests");
            }
            (Err(error), Err(expected)) => assert_eq!(kind(error), *expected, "{name}: {error}"),
            _ => panic!("{name}: {:?} instead of {expected:?}", outcome.map(|read| read.len())),
        }
        assert_eq!(registry.faults_left(), Vec::<String>::new(), "{name}");
    }
}

#[tokio::test]
async fn a_download_is_resumed_where_it_broke() {
    let registry = FaultRegistry::start().await;
    let blob = content(LENGTH);
    registry.add_blob(blob.clone());
    registry.fault(Fault::new(Effect::Truncate(1_000_000)).path(BLOBS).times(3));
    let source = source(&registry, config());
    assert!(read(source.blob(&descriptor(&blob)).await.unwrap()).await.unwrap() == blob);
    let requests = registry.requests();
    assert_eq!(requests[0].header("range"), None);
    let starts: Vec<u64> = requests[1..]
        .iter()
        .map(|request| request.header("range").unwrap().strip_prefix("bytes=").unwrap())
        .map(|range| range.strip_suffix(&format!("-{}", LENGTH - 1)).unwrap().parse().unwrap())
        .collect();
    assert!(starts.is_sorted() && starts[0] > 0 && starts.len() == 3, "{starts:?}");
    // What came before each break was kept: little more than the blob has crossed the wire.
    let received = source.in_repository().client().statistics().received_bytes;
    assert_eq!(received, LENGTH as u64);
}

#[tokio::test]
async fn attempts_have_an_end() {
    for effect in [Effect::Truncate(0), Effect::Status(503), Effect::ResetAtOnce, Effect::EndEarly(1)] {
        let registry = FaultRegistry::start().await;
        let blob = content(1000);
        registry.add_blob(blob.clone());
        registry.fault(Fault::new(effect).always());
        let source = source(&registry, Config { retries: 3, ..config() });
        let error = read(source.blob(&descriptor(&blob)).await.unwrap()).await.unwrap_err();
        assert!(error.is_transient(), "{error}");
        assert_eq!(registry.requests().len(), 4);
        let error = source.blob_range(&descriptor(&blob), 5..10).await.unwrap_err();
        assert!(error.is_transient(), "{error}");
        assert_eq!(registry.requests().len(), 8);
    }
}

#[tokio::test]
async fn ranges_are_exact_or_an_error() {
    let far = 2_000_000..2_100_000;
    let near = 100_000..200_000;
    let whole = 0..LENGTH;
    let shorter = || Effect::WrongContent(content(2_500_000).into());
    let unclear = || Effect::Header("content-range", "x".into());
    for (name, range, faults, expected) in [
        ("plain", far.clone(), vec![], Ok(1)),
        ("one byte", 7..8, vec![], Ok(1)),
        ("the last byte", LENGTH - 1..LENGTH, vec![], Ok(1)),
        ("all", whole.clone(), vec![], Ok(1)),
        ("nothing", 7..7, vec![], Ok(0)),
        ("cut", far.clone(), vec![Effect::Truncate(50_000), Effect::Truncate(20_000)], Ok(3)),
        ("ended early", far.clone(), vec![Effect::EndEarly(50_000)], Ok(2)),
        ("no length", far.clone(), vec![Effect::NoLength], Ok(1)),
        ("reset", far.clone(), vec![Effect::Reset(50_000)], Ok(2)),
        ("stalled", far.clone(), vec![Effect::Stall(50_000, Duration::from_secs(60))], Ok(2)),
        ("too many requests", far.clone(), vec![Effect::RetryAfter(429, "0".to_owned())], Ok(2)),
        ("shifted once", far.clone(), vec![Effect::ShiftRange(3)], Ok(2)),
        ("shifted", far.clone(), vec![Effect::ShiftRange(3); 2], Err("corrupt")),
        ("more bytes", far.clone(), vec![Effect::ExtraBytes("more".into())], Err("corrupt")),
        ("of a shorter blob, once", far.clone(), vec![shorter()], Ok(2)),
        ("of a shorter blob", far.clone(), vec![shorter(); 2], Err("corrupt")),
        ("of a much shorter blob", far.clone(), vec![Effect::WrongContent(content(99).into())], Err("corrupt")),
        (
            "of another blob",
            far.clone(),
            vec![Effect::DigestHeader(Digest::sha256_of(b"").to_string())],
            Err("corrupt"),
        ),
        ("without Content-Range, once", far.clone(), vec![unclear()], Ok(2)),
        ("without Content-Range", far.clone(), vec![unclear(); 2], Err("registry")),
        ("ignored once, far", far.clone(), vec![Effect::IgnoreRange], Ok(2)),
        ("ignored, far", far.clone(), vec![Effect::IgnoreRange; 2], Err("unsupported")),
        ("ignored, then shifted", far.clone(), vec![Effect::IgnoreRange, Effect::ShiftRange(3)], Err("corrupt")),
        ("ignored and cut", far.clone(), vec![Effect::IgnoreRange, Effect::Truncate(50_000)], Ok(3)),
        ("ignored, near", near.clone(), vec![Effect::IgnoreRange], Ok(1)),
        ("cut, and ignored, near", near.clone(), vec![Effect::Truncate(50_000), Effect::IgnoreRange], Ok(2)),
        ("cut, and ignored, all", whole, vec![Effect::Truncate(9), Effect::IgnoreRange], Ok(2)),
        ("cut, and ignored once, far", far.clone(), vec![Effect::Truncate(9), Effect::IgnoreRange], Ok(3)),
        (
            "cut, and ignored, far",
            far.clone(),
            vec![Effect::Truncate(9), Effect::IgnoreRange, Effect::IgnoreRange],
            Err("unsupported"),
        ),
    ] {
        let registry = FaultRegistry::start().await;
        let blob = content(LENGTH);
        registry.add_blob(blob.clone());
        for effect in faults {
            registry.fault(Fault::new(effect).path(BLOBS));
        }
        let source = source(&registry, patient(name));
        let wanted = range.start as u64..range.end as u64;
        let outcome = source.blob_range(&descriptor(&blob), wanted).await;
        match (&outcome, &expected) {
            (Ok(read), Ok(requests)) => {
                assert!(*read == blob[range.clone()], "{name}: wrong bytes");
                assert!(registry.requests().len() == *requests || is_stall(name), "{name}: not {requests} requests");
            }
            (Err(error), Err(expected)) => assert_eq!(kind(error), *expected, "{name}: {error}"),
            _ => panic!("{name}: {:?} instead of {expected:?}", outcome.map(|read| read.len())),
        }
    }
}

#[tokio::test]
async fn a_range_outside_of_the_blob_is_not_asked_for() {
    let registry = FaultRegistry::start().await;
    let blob = content(1000);
    registry.add_blob(blob.clone());
    let source = source(&registry, config());
    #[expect(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    for range in [0..1001, 1000..1001, 9..5, u64::MAX - 1..u64::MAX] {
        assert_eq!(kind(&source.blob_range(&descriptor(&blob), range).await.unwrap_err()), "invalid");
    }
    assert_eq!(registry.requests().len(), 0);
}

#[tokio::test]
async fn it_is_remembered_that_ranges_are_ignored() {
    let registry = FaultRegistry::start().await;
    let blob = content(LENGTH);
    registry.add_blob(blob.clone());
    registry.fault(Fault::new(Effect::IgnoreRange).always());
    let source = source(&registry, config());
    for _ in 0..3 {
        let error = source.blob_range(&descriptor(&blob), 2_000_000..2_000_100).await.unwrap_err();
        assert_eq!(kind(&error), "unsupported", "{error}");
    }
    // It was asked twice before that was believed.
    assert_eq!(registry.requests().len(), 2);
    // What can be read all the same is.
    assert_eq!(source.blob_range(&descriptor(&blob), 5..100).await.unwrap(), blob[5..100]);
    assert_eq!(source.blob_range(&descriptor(&blob), 0..LENGTH as u64).await.unwrap(), blob);
    assert!(read(source.blob(&descriptor(&blob)).await.unwrap()).await.unwrap() == blob);
}

/// A single 200 for a range made every other read of the blob fail for minutes, without a request.
#[tokio::test]
async fn one_odd_answer_is_not_remembered() {
    let registry = FaultRegistry::start().await;
    let blob = content(LENGTH);
    registry.add_blob(blob.clone());
    let source = source(&registry, config());
    // Near the beginning the whole is as good as the range, so that nothing has to be asked again.
    for near in [true, false, true, false] {
        registry.fault(Fault::new(Effect::IgnoreRange).path(BLOBS));
        let range = if near { 5..100 } else { 2_000_000..2_000_100 };
        assert_eq!(
            source.blob_range(&descriptor(&blob), range.clone()).await.unwrap(),
            blob[range.start as usize..range.end as usize]
        );
        assert_eq!(
            source.blob_range(&descriptor(&blob), 2_500_000..2_500_001).await.unwrap(),
            blob[2_500_000..2_500_001]
        );
    }
    assert_eq!(registry.requests().len(), 10);
}

#[tokio::test]
async fn manifests_are_verified_and_bounded() {
    let other = Digest::sha256_of(b"other").to_string();
    let flipped = || vec![Effect::FlipBit(20)];
    for (name, by_tag, faults, expected) in [
        ("plain", true, vec![], Ok(1)),
        ("plain", false, vec![], Ok(1)),
        ("cut", true, vec![Effect::Truncate(10)], Ok(2)),
        ("trouble", false, vec![Effect::Status(500), Effect::ResetAtOnce], Ok(3)),
        ("no length", true, vec![Effect::NoLength], Ok(1)),
        ("another digest is said", true, vec![Effect::DigestHeader(other.clone())], Err("corrupt")),
        ("another digest is said", false, vec![Effect::DigestHeader(other.clone())], Err("corrupt")),
        ("a digest that is none", true, vec![Effect::DigestHeader("sha256:xyz".into())], Err("invalid")),
        ("an algorithm that is not known", true, vec![Effect::DigestHeader("blake3:xyz".into())], Ok(1)),
        ("an odd type", true, vec![Effect::Header("content-type", "text/plain".into())], Ok(1)),
        ("a flipped bit", true, flipped(), Err("corrupt")),
        ("a flipped bit", false, flipped(), Err("corrupt")),
        ("not there", true, vec![Effect::Status(404)], Err("not found")),
        ("too large", true, vec![Effect::WrongContent(vec![b' '; 5 << 20].into())], Err("too large")),
        ("too large, no length", true, vec![Effect::ExtraBytes(vec![b' '; 5 << 20].into())], Err("too large")),
    ] {
        let registry = FaultRegistry::start().await;
        let document = manifest("x");
        registry.add_manifest("latest", &document.media_type, document.bytes.clone());
        for effect in faults {
            registry.fault(Fault::new(effect));
        }
        let source = source(&registry, config());
        let digest = document.digest;
        let asked = if by_tag { ManifestName::Tag("latest") } else { ManifestName::Digest(&digest) };
        let outcome = source.in_repository().manifest(asked).await;
        match (&outcome, &expected) {
            (Ok(found), Ok(requests)) => {
                assert_eq!(*found, document, "{name}");
                assert_eq!(registry.requests().len(), *requests, "{name}");
            }
            (Err(error), Err(expected)) => assert_eq!(kind(error), *expected, "{name}: {error}"),
            _ => panic!("{name}: {outcome:?} instead of {expected:?}"),
        }
    }
}

#[tokio::test]
async fn documents_are_read_from_where_they_are() {
    let registry = FaultRegistry::start().await;
    let document = manifest("x");
    registry.add_manifest("latest", &document.media_type, document.bytes.clone());
    let image_config =
        Bytes::from_static(br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#);
    registry.add_blob(image_config.clone());
    let source = source(&registry, config());
    assert_eq!(source.root().await.unwrap(), document);
    assert_eq!(source.document(&document.descriptor()).await.unwrap(), document);
    let wanted = Descriptor::new(media_type::OCI_CONFIG, Digest::sha256_of(&image_config), image_config.len() as u64);
    assert_eq!(source.document(&wanted).await.unwrap().bytes, image_config);
    let before = registry.requests().len();
    assert_eq!(before, 3);
    // Nothing is asked for what is inline, empty or too large.
    let inline = Descriptor { data: Some("e30=".into()), ..Descriptor::new("x/y", Digest::sha256_of(b"{}"), 2) };
    assert_eq!(source.document(&inline).await.unwrap().bytes, "{}");
    let huge = Descriptor { size: Limits::default().config_bytes + 1, ..wanted.clone() };
    assert_eq!(kind(&source.document(&huge).await.unwrap_err()), "too large");
    let empty = descriptor(b"");
    assert_eq!(read(source.blob(&empty).await.unwrap()).await.unwrap(), b"");
    assert_eq!(registry.requests().len(), before);
    // A size that is not true is found out.
    let short = Descriptor { size: wanted.size - 1, ..wanted };
    assert_eq!(kind(&source.document(&short).await.unwrap_err()), "corrupt");
}

#[tokio::test]
async fn head_says_what_a_name_leads_to() {
    let registry = FaultRegistry::start().await;
    let document = manifest("x");
    registry.add_manifest("latest", &document.media_type, document.bytes.clone());
    let repository = source(&registry, config()).in_repository().clone();
    let by_tag = ManifestName::Tag("latest");
    assert_eq!(repository.manifest_descriptor(by_tag).await.unwrap(), Some(document.descriptor()));
    assert_eq!(repository.manifest_descriptor(ManifestName::Tag("none")).await.unwrap(), None);
    assert!(registry.requests().iter().all(|request| request.method == "HEAD"));
    // Where HEAD says too little, GET is asked.
    registry.fault(Fault::new(Effect::Header("docker-content-digest", String::new())).method("HEAD"));
    assert_eq!(repository.manifest_descriptor(by_tag).await.unwrap(), Some(document.descriptor()));
    registry.fault(Fault::new(Effect::Status(405)).method("HEAD"));
    assert_eq!(repository.manifest_descriptor(by_tag).await.unwrap(), Some(document.descriptor()));
    assert_eq!(registry.requests().iter().filter(|request| request.method == "GET").count(), 2);
}

#[tokio::test]
async fn lists_are_read_to_their_end_and_no_further() {
    let registry = FaultRegistry::start().await;
    let document = manifest("x");
    let tags: Vec<String> = (0..25).map(|n| format!("v{n:02}")).collect();
    for tag in &tags {
        registry.add_manifest(tag, &document.media_type, document.bytes.clone());
    }
    registry.page_size(10);
    let repository = source(&registry, config()).in_repository().clone();
    assert_eq!(repository.tags().await.unwrap(), tags);
    assert_eq!(registry.requests().len(), 3);
    assert_eq!(repository.catalog().await.unwrap(), Vec::<String>::new());
    for (link, message) in [
        ("</v2/test/image/tags/list?n=1000>; rel=\"next\"".to_owned(), "no end"),
        (format!("<http://{}/tags>; rel=\"next\"", registry.elsewhere()), "it is at"),
        ("<ftp://x/tags>; rel=\"next\"".to_owned(), "leads to"),
    ] {
        registry.fault(Fault::new(Effect::Header("link", link)).path("/tags/"));
        let error = repository.tags().await.unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    assert!(registry.requests().iter().all(|request| request.site == loris_testkit::registry::Site::Registry));
}

#[tokio::test]
async fn no_more_is_asked_at_once_than_allowed() {
    let registry = FaultRegistry::start().await;
    let blob = content(100_000);
    registry.add_blob(blob.clone());
    registry.fault(Fault::new(Effect::Delay(Duration::from_millis(20))).always());
    let source = source(&registry, Config { connections_per_host: 3, ..config() });
    let tasks: Vec<_> = (0..20_u64)
        .map(|n| {
            let (source, blob) = (source.clone(), descriptor(&blob));
            tokio::spawn(async move { source.blob_range(&blob, n * 1000..(n + 1) * 1000).await.unwrap() })
        })
        .collect();
    for (n, task) in tasks.into_iter().enumerate() {
        assert_eq!(task.await.unwrap(), blob[n * 1000..(n + 1) * 1000]);
    }
    assert_eq!(registry.peak_concurrency(), 3);
}

#[tokio::test]
async fn requests_say_who_asks_and_errors_hide_secrets() {
    let registry = FaultRegistry::start().await;
    let blob = content(1000);
    registry.add_blob(blob.clone());
    let client = Client::new(config()).unwrap();
    let source = client.source(&reference(&registry));
    source.blob_range(&descriptor(&blob), 0..10).await.unwrap();
    let request = &registry.requests()[0];
    assert_eq!(request.header("user-agent").unwrap(), format!("loris/{}", env!("CARGO_PKG_VERSION")));
    assert_eq!(request.header("accept-encoding").unwrap(), "identity");
    assert_eq!(request.header("range").unwrap(), "bytes=0-9");

    let target = format!("http://{}/cdn/x?signature=hunter2", registry.elsewhere());
    registry.fault(Fault::new(Effect::RedirectTo(target)));
    let error = source.blob_range(&descriptor(&blob), 0..10).await.unwrap_err().to_string();
    assert!(error.contains("/cdn/x") && error.contains("403") && !error.contains("hunter2"), "{error}");

    let statistics = client.statistics();
    assert_eq!((statistics.requests, statistics.redirects, statistics.retries), (3, 1, 0));
    // Ten bytes of the blob, and the words of the error.
    assert!(statistics.received_bytes > 10 && statistics.sent_bytes == 0);
}

#[tokio::test]
async fn a_host_that_does_not_answer_is_an_error_that_may_pass() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let reference = format!("{address}/a/b:c").parse().unwrap();
    let source = Client::new(Config { retries: 1, ..config() }).unwrap().source(&reference);
    let error = source.root().await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}
