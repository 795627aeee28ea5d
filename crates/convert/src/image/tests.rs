use std::fmt::Write as _;

use loris_format::estargz::toc::TOC_DIGEST_ANNOTATION;
use loris_oci::document::{Kind, media_type};

use super::*;
use crate::{
    copy::{CopyOptions, copy_image},
    layer::archive::Archive,
    memory::Memory,
    progress::Silent,
};

/// A layer's tar.
fn tar(name: &str) -> Vec<u8> {
    Archive::default().directory("d/").file(&format!("d/{name}"), name.as_bytes()).file("z", b"last").end()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    loris_format::compression::gzip_member(loris_format::compression::GzipLevel::DEFAULT, bytes)
}

fn json(descriptor: &Descriptor) -> String {
    serde_json::to_string(descriptor).unwrap()
}

/// Puts an image into a place, with fields that nobody knows, and returns its manifest.
fn image(place: &Memory, tars: &[Vec<u8>], architecture: &str, docker: bool) -> Document {
    let types = if docker {
        [media_type::DOCKER_MANIFEST, media_type::DOCKER_CONFIG, media_type::DOCKER_LAYER_GZIP]
    } else {
        [media_type::OCI_MANIFEST, media_type::OCI_CONFIG, media_type::OCI_LAYER_GZIP]
    };
    let diff_ids: Vec<String> = tars.iter().map(|tar| format!("\"{}\"", Digest::sha256_of(tar))).collect();
    let config = format!(
        r#"{{"architecture":"{architecture}","os":"linux","unknown":1.50,"rootfs":{{"type":"layers","diff_ids":[{}]}},"history":[{{"created_by":"x"}}]}}"#,
        diff_ids.join(",")
    );
    let config = place.add_blob(types[1], config);
    let layers: Vec<String> = tars.iter().map(|tar| json(&place.add_blob(types[2], gzip(tar)))).collect();
    let text = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","x":{{"b":1,"a":2}},"config":{},"layers":[{}]}}"#,
        types[0],
        json(&config),
        layers.join(",")
    );
    place.add_document(&text)
}

fn index(place: &Memory, entries: &[(&Document, &str)], docker: bool) -> Document {
    let media_type = if docker { media_type::DOCKER_INDEX } else { media_type::OCI_INDEX };
    let mut text = format!(r#"{{"schemaVersion":2,"mediaType":"{media_type}","manifests":["#);
    for (number, (document, rest)) in entries.iter().enumerate() {
        let comma = if number > 0 { "," } else { "" };
        let own = json(&document.descriptor());
        write!(text, "{comma}{}{rest}}}", own.strip_suffix('}').unwrap()).unwrap();
    }
    text.push_str("],\"annotations\":{\"kept\":\"yes\"}}");
    place.add_document(&text)
}

fn for_platform(architecture: &str) -> String {
    format!(r#","platform":{{"architecture":"{architecture}","os":"linux"}}"#)
}

fn attestation(place: &Memory, about: &Document) -> (Document, String) {
    let config = place.add_blob(media_type::OCI_CONFIG, r#"{"architecture":"unknown","os":"unknown"}"#);
    let layer = place.add_blob("application/vnd.in-toto+json", format!("about {}", about.digest));
    let text = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","config":{},"layers":[{}]}}"#,
        media_type::OCI_MANIFEST,
        json(&config),
        json(&layer)
    );
    let rest = format!(
        r#","platform":{{"architecture":"unknown","os":"unknown"}},"annotations":{{"vnd.docker.reference.type":"attestation-manifest","vnd.docker.reference.digest":"{}"}}"#,
        about.digest
    );
    (place.add_document(&text), rest)
}

fn referrer(place: &Memory, about: &Document, artifact_type: &str) -> Document {
    let empty = place.add_blob(media_type::OCI_EMPTY, "{}");
    let text = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","artifactType":"{artifact_type}","config":{},"layers":[{}],"subject":{}}}"#,
        media_type::OCI_MANIFEST,
        json(&empty),
        json(&empty),
        json(&about.descriptor())
    );
    place.add_document(&text)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn convert(source: &Memory, sink: &Memory, options: &ConvertOptions) -> Result<Report, Error> {
    runtime().block_on(convert_image(source, sink, options, &Silent))
}

fn copy(source: &Memory, sink: &Memory, platforms: Platforms) -> Result<crate::copy::CopyReport, Error> {
    let options = CopyOptions { platforms, ..CopyOptions::default() };
    runtime().block_on(copy_image(source, sink, &options, &Silent))
}

fn only(platform: &str) -> Platforms {
    platform.parse().unwrap()
}

fn manifest(place: &Memory, digest: &Digest) -> loris_oci::document::Manifest {
    place.stored(digest).unwrap().manifest(&Limits::default()).unwrap()
}

/// Checks that an image is whole: every blob there with its digest, DiffIDs right, layers lazily readable by their
/// annotation.
fn check(place: &Memory, digest: &Digest) {
    let manifest = manifest(place, digest);
    let config = place.blob_bytes(&manifest.config.digest).unwrap();
    let config = Document::verified(config, &manifest.config, "test").unwrap();
    let config = config.image_config(&Limits::default()).unwrap();
    config.check_layers(&manifest).unwrap();
    for (layer, diff_id) in manifest.layers.iter().zip(&config.diff_ids) {
        let blob = place.blob_bytes(&layer.digest).unwrap();
        assert!(layer.digest.matches(&blob) && layer.size == blob.len() as u64);
        let mut text = Vec::new();
        let (digest, size) =
            crate::layer::decompress_layer(&*blob, &crate::layer::Watch::default(), &mut text).unwrap();
        assert_eq!(DiffId(digest), *diff_id);
        if let Some(claim) = layer.annotations.get("io.containers.estargz.uncompressed-size") {
            assert_eq!(*claim, size.to_string());
        }
        if let Some(toc) = layer.annotations.get(TOC_DIGEST_ANNOTATION) {
            let toc_digest: Digest = toc.parse().unwrap();
            let mut reader = loris_format::tar::Reader::new(text.as_slice(), &Limits::default());
            let mut matches = false;
            while let Some(entry) = reader.next_entry().unwrap() {
                if entry.path == b"stargz.index.json" {
                    let mut json = Vec::new();
                    std::io::copy(&mut reader.content(), &mut json).unwrap();
                    matches = toc_digest.matches(&json);
                }
            }
            assert!(matches);
        }
    }
}

#[test]
fn an_image_is_converted_and_again_is_the_same() {
    let (source, sink, second) = (Memory::new(), Memory::new(), Memory::new());
    let same = tar("same");
    let old = image(&source, &[same.clone(), tar("b"), same], "amd64", false);
    source.set_root(&old);
    let report = convert(&source, &sink, &ConvertOptions::default()).unwrap();
    check(&sink, &report.digest);
    assert!(report.warnings.is_empty(), "{:?}", report.warnings);
    let new = manifest(&sink, &report.digest);
    assert_eq!(new.layers[0], new.layers[2]);
    // Two layers and a configuration.
    assert_eq!(sink.sent(), 3);
    let layers = &report.images[0].layers;
    assert!(layers.iter().all(|layer| layer.change == LayerChange::Converted && layer.toc_digest.is_some()));
    // What nobody knows is kept, in its order.
    let text = String::from_utf8(sink.stored(&report.digest).unwrap().bytes.to_vec()).unwrap();
    assert!(text.contains(r#""x":{"b":1,"a":2},"config":"#), "{text}");
    let config = String::from_utf8(sink.blob_bytes(&new.config.digest).unwrap().to_vec()).unwrap();
    assert!(config.contains(r#""unknown":1.50"#) && config.ends_with(r#""history":[{"created_by":"x"}]}"#), "{config}");

    let again = convert(&sink, &second, &ConvertOptions::default()).unwrap();
    assert_eq!(again.digest, report.digest);
    assert!(again.images[0].layers.iter().all(|layer| layer.change == LayerChange::Unchanged));
    check(&second, &again.digest);
    // With other options it is another image, and from our output the same one as from the source.
    let mut other = LayerOptions { chunk_bytes: 1 << 20, ..LayerOptions::default() };
    let options = ConvertOptions { target: Target::Lazy(other.clone()), ..ConvertOptions::default() };
    let from_ours = convert(&sink, &Memory::new(), &options).unwrap();
    assert_ne!(from_ours.digest, report.digest);
    assert_eq!(from_ours.digest, convert(&source, &Memory::new(), &options).unwrap().digest);
    // An order that was given is kept where none is asked for.
    other.chunk_bytes = LayerOptions::default().chunk_bytes;
    other.prioritised = vec![b"z".to_vec()];
    let ordered = Memory::new();
    let options = ConvertOptions { target: Target::Lazy(other), ..ConvertOptions::default() };
    let first = convert(&source, &ordered, &options).unwrap();
    assert_ne!(first.digest, report.digest);
    assert_eq!(convert(&ordered, &Memory::new(), &ConvertOptions::default()).unwrap().digest, first.digest);
}

#[test]
fn indexes_attestations_and_referrers_follow() {
    let (source, sink) = (Memory::new(), Memory::new());
    let one = image(&source, &[tar("one")], "amd64", false);
    let two = image(&source, &[tar("two")], "arm64", false);
    let three = image(&source, &[tar("three")], "s390x", false);
    let (about_one, rest_one) = attestation(&source, &one);
    let (about_two, rest_two) = attestation(&source, &two);
    let inner = index(&source, &[(&three, "")], false);
    let root = index(
        &source,
        &[
            (&about_one, &rest_one),
            (&one, &for_platform("amd64")),
            (&two, &for_platform("arm64")),
            (&about_two, &rest_two),
            (&inner, ""),
        ],
        false,
    );
    source.set_root(&root);
    let signature = referrer(&source, &one, "application/x.signature");
    let of_signature = referrer(&source, &signature, "application/x.note");
    referrer(&source, &two, "application/vnd.amazon.soci.index.v1+json");
    let report = convert(&source, &sink, &ConvertOptions::default()).unwrap();
    let platforms: Vec<_> = report.images.iter().map(|image| image.platform.as_str()).collect();
    assert_eq!(platforms, ["linux/amd64", "linux/arm64", "linux/s390x"]);
    report.images.iter().for_each(|image| check(&sink, &image.digest));
    let new = sink.stored(&report.digest).unwrap().index(&Limits::default()).unwrap();
    assert_eq!(new.annotations["kept"], "yes");
    assert_eq!(new.manifests[1].digest, report.images[0].digest);
    assert_eq!(new.manifests[1].platform.as_ref().unwrap().architecture, "amd64");
    // The attestation itself is as it was; what it is about has another digest.
    assert_eq!(new.manifests[0].digest, about_one.digest);
    assert_eq!(new.manifests[0].attested(), Some(report.images[0].digest));
    assert_eq!(new.manifests[3].attested(), Some(report.images[1].digest));
    assert_eq!(report.referrers.len(), 2);
    let relinked = manifest(&sink, &report.referrers[0]);
    assert_eq!(relinked.subject.unwrap().digest, report.images[0].digest);
    assert_eq!(manifest(&sink, &report.referrers[1]).subject.unwrap().digest, report.referrers[0]);
    assert!(report.referrers[1] != of_signature.digest);
    assert!(report.warnings.iter().any(|warning| warning.contains("SOCI")), "{:?}", report.warnings);

    let none = ConvertOptions { referrers: false, ..ConvertOptions::default() };
    assert!(convert(&source, &Memory::new(), &none).unwrap().referrers.is_empty());
}

#[test]
fn platforms_are_chosen() {
    let source = Memory::new();
    let one = image(&source, &[tar("one")], "amd64", false);
    let two = image(&source, &[tar("two")], "arm64", false);
    let (about_one, rest_one) = attestation(&source, &one);
    let (about_two, rest_two) = attestation(&source, &two);
    let entries =
        [(&one, for_platform("amd64")), (&two, String::new()), (&about_one, rest_one), (&about_two, rest_two)];
    let entries: Vec<_> = entries.iter().map(|(document, rest)| (*document, rest.as_str())).collect();
    let root = index(&source, &entries, false);
    source.set_root(&root);
    // An entry without a platform has that of its configuration.
    for (platforms, images, entries) in
        [("linux/arm64", 1, 2), ("linux/amd64", 1, 2), ("linux/amd64,linux/arm64", 2, 4), ("all", 2, 4)]
    {
        let options = ConvertOptions { platforms: only(platforms), ..ConvertOptions::default() };
        let sink = Memory::new();
        let report = convert(&source, &sink, &options).unwrap();
        assert_eq!(report.images.len(), images, "{platforms}");
        let new = sink.stored(&report.digest).unwrap().index(&Limits::default()).unwrap();
        assert_eq!(new.manifests.len(), entries, "{platforms}");
    }
    let options = ConvertOptions { platforms: only("linux/s390x"), ..ConvertOptions::default() };
    let error = convert(&source, &Memory::new(), &options).unwrap_err();
    assert!(matches!(error, Error::Place(loris_oci::Error::NoPlatform { .. })), "{error}");
    assert!(error.to_string().contains("linux/amd64, linux/arm64"), "{error}");

    // A copy of one platform is its manifest, of several an index, of all the same index.
    let sink = Memory::new();
    assert_eq!(copy(&source, &sink, only("linux/arm64")).unwrap().digest, two.digest);
    check(&sink, &two.digest);
    assert_eq!(copy(&source, &Memory::new(), only("linux/amd64,linux/arm64")).unwrap().digest, root.digest);
    assert_eq!(copy(&source, &Memory::new(), Platforms::All).unwrap().digest, root.digest);
}

#[test]
fn dockers_types_are_kept_or_made_ocis() {
    let source = Memory::new();
    let one = image(&source, &[tar("one")], "amd64", true);
    let root = index(&source, &[(&one, &for_platform("amd64"))], true);
    source.set_root(&root);
    for (target, oci, want, layer) in [
        (Target::Lazy(LayerOptions::default()), false, media_type::DOCKER_MANIFEST, media_type::DOCKER_LAYER_GZIP),
        (Target::Lazy(LayerOptions::default()), true, media_type::OCI_MANIFEST, media_type::OCI_LAYER_GZIP),
        (Target::Keep, true, media_type::OCI_MANIFEST, media_type::OCI_LAYER_GZIP),
        (Target::Keep, false, media_type::DOCKER_MANIFEST, media_type::DOCKER_LAYER_GZIP),
        (Target::Uncompressed, false, media_type::DOCKER_MANIFEST, media_type::DOCKER_LAYER),
        (Target::Uncompressed, true, media_type::OCI_MANIFEST, media_type::OCI_LAYER),
    ] {
        let sink = Memory::new();
        let options = ConvertOptions { target, oci, ..ConvertOptions::default() };
        let report = convert(&source, &sink, &options).unwrap();
        let digest = report.images[0].digest;
        check(&sink, &digest);
        let new = manifest(&sink, &digest);
        assert_eq!((new.media_type.as_str(), new.layers[0].media_type.as_str()), (want, layer));
        assert_eq!(report.images[0].layers[0].media_type, layer);
        let config = if oci { media_type::OCI_CONFIG } else { media_type::DOCKER_CONFIG };
        assert_eq!(new.config.media_type, config);
        let index = sink.stored(&report.digest).unwrap().index(&Limits::default()).unwrap();
        assert_eq!(index.manifests[0].media_type, want);
        let warned = report.warnings.iter().any(|warning| warning.contains("Docker's media types"));
        assert_eq!(warned, matches!(options.target, Target::Lazy(_)) && !oci);
        if matches!(options.target, Target::Keep) && !oci {
            assert_eq!(report.digest, root.digest);
        }
    }
}

#[test]
fn what_cannot_be_converted_is_carried_along() {
    let (source, sink) = (Memory::new(), Memory::new());
    let foreign = Descriptor {
        urls: vec!["https://example.com/layer".into()],
        ..Descriptor::new(
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            Digest::sha256_of(b"elsewhere"),
            9,
        )
    };
    let strange = source.add_blob("application/x.strange", "what is this");
    let plain = tar("plain");
    let layer = source.add_blob(media_type::OCI_LAYER_GZIP, gzip(&plain));
    let ids = [foreign.digest, strange.digest, Digest::sha256_of(&plain)].map(|id| format!("\"{id}\"")).join(",");
    let config =
        format!(r#"{{"architecture":"amd64","os":"windows","rootfs":{{"type":"layers","diff_ids":[{ids}]}}}}"#);
    let config = source.add_blob(media_type::OCI_CONFIG, config);
    let old = source.add_document(&format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","config":{},"layers":[{},{},{}]}}"#,
        media_type::OCI_MANIFEST,
        json(&config),
        json(&foreign),
        json(&strange),
        json(&layer)
    ));
    source.set_root(&old);
    let report = convert(&source, &sink, &ConvertOptions::default()).unwrap();
    let new = manifest(&sink, &report.digest);
    assert_eq!(new.layers[..2], [foreign, strange]);
    let changes: Vec<_> = report.images[0].layers.iter().map(|layer| layer.change).collect();
    assert_eq!(changes, [LayerChange::Foreign, LayerChange::Unknown, LayerChange::Converted]);
    assert!(report.warnings[0].contains("unknown type \"application/x.strange\""), "{:?}", report.warnings);

    // An artifact is no image at all.
    let artifact = referrer(&source, &old, "application/x.thing");
    source.set_root(&artifact);
    assert_eq!(convert(&source, &Memory::new(), &ConvertOptions::default()).unwrap().digest, artifact.digest);
}

#[test]
fn a_record_orders_each_layer() {
    let source = Memory::new();
    let old = image(&source, &[tar("a"), tar("b")], "amd64", false);
    source.set_root(&old);
    let line = |path: &str, layer: usize, digest: Digest| {
        format!("{{\"path\":\"{path}\",\"manifestDigest\":\"{digest}\",\"layerIndex\":{layer}}}\n")
    };
    let record = |digest| {
        let text = [line("z", 0, digest), line("gone", 0, digest), line("d/b", 1, digest)].concat();
        Some(Record::read(text.as_bytes(), &Limits::default()).unwrap())
    };
    let names = |place: &Memory, layer: &Descriptor| {
        let blob = place.blob_bytes(&layer.digest).unwrap();
        let mut text = Vec::new();
        crate::layer::decompress_layer(&*blob, &crate::layer::Watch::default(), &mut text).unwrap();
        let mut reader = loris_format::tar::Reader::new(text.as_slice(), &Limits::default());
        let mut names = Vec::new();
        while let Some(entry) = reader.next_entry().unwrap() {
            names.push(String::from_utf8(entry.path).unwrap());
        }
        names.join(" ")
    };
    let sink = Memory::new();
    let options = ConvertOptions { record: record(old.digest), ..ConvertOptions::default() };
    let report = convert(&source, &sink, &options).unwrap();
    let new = manifest(&sink, &report.digest);
    assert_eq!(names(&sink, &new.layers[0]), "z .prefetch.landmark d/ d/a stargz.index.json");
    assert_eq!(names(&sink, &new.layers[1]), "d/ d/b .prefetch.landmark z stargz.index.json");
    assert_eq!(report.images[0].layers[0].missing, 1);
    assert!(report.warnings.is_empty());

    let sink = Memory::new();
    let options = ConvertOptions { record: record(Digest::sha256_of(b"other")), ..ConvertOptions::default() };
    let report = convert(&source, &sink, &options).unwrap();
    let new = manifest(&sink, &report.digest);
    assert_eq!(names(&sink, &new.layers[1]), "z d/ d/b .prefetch.landmark stargz.index.json");
    assert!(report.warnings[0].contains("made of another image"), "{:?}", report.warnings);
}

#[test]
fn a_layer_that_is_not_what_it_says_is_refused() {
    let place = || {
        let source = Memory::new();
        let old = image(&source, &[tar("a")], "amd64", false);
        source.set_root(&old);
        let layer = manifest(&source, &old.digest).layers.remove(0);
        (source, layer)
    };
    // The blob's digest is wrong, and so is the gzip member's checksum.
    let (source, layer) = place();
    source.damage(&layer.digest, layer.size as usize - 6);
    let sink = Memory::new();
    let error = convert(&source, &sink, &ConvertOptions::default()).unwrap_err();
    assert!(matches!(&error, Error::Layer { digest, .. } if *digest == layer.digest), "{error}");
    assert_eq!(sink.sent(), 0);
    // Only the header's time differs: nobody but the source notices.
    let (source, layer) = place();
    source.damage(&layer.digest, 4);
    let error = convert(&source, &sink, &ConvertOptions::default()).unwrap_err();
    assert!(matches!(error.place(), Some(loris_oci::Error::Corrupt { .. })), "{error}");
    // A configuration that lists another tar.
    let source = Memory::new();
    let layer = source.add_blob(media_type::OCI_LAYER_GZIP, gzip(&tar("b")));
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
        Digest::sha256_of(b"another")
    );
    let config = source.add_blob(media_type::OCI_CONFIG, config);
    let old = source.add_document(&format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","config":{},"layers":[{}]}}"#,
        media_type::OCI_MANIFEST,
        json(&config),
        json(&layer)
    ));
    source.set_root(&old);
    for target in [Target::Lazy(LayerOptions::default()), Target::Uncompressed] {
        let options = ConvertOptions { target, ..ConvertOptions::default() };
        let error = convert(&source, &Memory::new(), &options).unwrap_err();
        assert!(matches!(error, Error::DiffId { .. }), "{error}");
    }
}

#[test]
fn copies_are_exact() {
    let source = Memory::in_registry("registry", "a");
    let one = image(&source, &[tar("one"), tar("two")], "amd64", true);
    let (about, rest) = attestation(&source, &one);
    let root = index(&source, &[(&one, &for_platform("amd64")), (&about, &rest)], true);
    source.set_root(&root);
    let signature = referrer(&source, &root, "application/x.signature");
    let sink = Memory::new();
    let report = copy(&source, &sink, Platforms::All).unwrap();
    assert_eq!((report.digest, &report.referrers[..]), (root.digest, &[signature.digest][..]));
    for document in [&root, &one, &about, &signature] {
        assert_eq!(sink.stored(&document.digest).as_ref(), Some(document));
    }
    check(&sink, &one.digest);
    // Two layers, configuration, attestation with its configuration, the empty blob.
    assert_eq!(sink.sent(), 6);
    copy(&source, &sink, Platforms::All).unwrap();
    assert_eq!(sink.sent(), 6);
    // In one registry no blob is sent but the configuration, which was read in any case.
    let neighbour = Memory::in_registry("registry", "b");
    assert_eq!(copy(&source, &neighbour, Platforms::All).unwrap().digest, root.digest);
    assert_eq!(neighbour.sent(), 1);
}

#[test]
fn nesting_is_bounded() {
    let source = Memory::new();
    let mut document = image(&source, &[], "amd64", false);
    for _ in 0..Limits::default().index_depth {
        document = index(&source, &[(&document, "")], false);
    }
    source.set_root(&document);
    copy(&source, &Memory::new(), Platforms::All).unwrap();
    let document = index(&source, &[(&document, "")], false);
    source.set_root(&document);
    assert!(matches!(document.parse_kind(&Limits::default()).unwrap(), Kind::Index(_)));
    let error = copy(&source, &Memory::new(), Platforms::All).unwrap_err().to_string();
    assert!(error.contains("nested deeper than the limit"), "{error}");
}
