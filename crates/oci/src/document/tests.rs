use super::*;

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn descriptor(media_type: &str) -> String {
    format!(r#"{{"mediaType":"{media_type}","digest":"{DIGEST}","size":0}}"#)
}

fn parse(said: &str, json: &str) -> Result<Kind, Error> {
    Document::new(said, Bytes::from(json.to_owned()))?.parse_kind(&Limits::default())
}

#[test]
fn kinds_are_told_by_form_name_and_descriptor_together() {
    let config = descriptor(media_type::OCI_CONFIG);
    let manifest = format!(r#""config":{config},"layers":[]"#);
    let index = r#""manifests":[]"#.to_owned();
    for (said, own, form, expected) in [
        ("", "", &manifest, media_type::OCI_MANIFEST),
        ("application/json; charset=utf-8", "", &manifest, media_type::OCI_MANIFEST),
        (media_type::DOCKER_MANIFEST, "", &manifest, media_type::DOCKER_MANIFEST),
        ("", media_type::DOCKER_MANIFEST, &manifest, media_type::DOCKER_MANIFEST),
        (media_type::OCI_MANIFEST, media_type::DOCKER_MANIFEST, &manifest, media_type::DOCKER_MANIFEST),
        ("", "", &index, media_type::OCI_INDEX),
        (media_type::OCI_INDEX, "", &index, media_type::OCI_INDEX),
        ("application/vnd.oci.image.index.v1+json; x=y", media_type::DOCKER_INDEX, &index, media_type::DOCKER_INDEX),
    ] {
        let own = if own.is_empty() { String::new() } else { format!(r#""mediaType":"{own}","#) };
        let json = format!(r#"{{"schemaVersion":2,{own}{form}}}"#);
        let found = match parse(said, &json).unwrap() {
            Kind::Manifest(manifest) => manifest.media_type,
            Kind::Index(index) => index.media_type,
        };
        assert_eq!(found, expected, "{said} {json}");
    }
}

#[test]
fn what_two_readers_could_read_differently_is_refused() {
    let config = descriptor(media_type::OCI_CONFIG);
    let index_type = media_type::OCI_INDEX;
    let manifest_type = media_type::OCI_MANIFEST;
    for (said, json, message) in [
        ("", format!(r#"{{"schemaVersion":2,"config":{config},"layers":[],"manifests":[]}}"#), "at once"),
        (index_type, r#"{"schemaVersion":2,"layers":[],"manifests":[]}"#.to_owned(), "at once"),
        (index_type, format!(r#"{{"schemaVersion":2,"config":{config},"layers":[]}}"#), "has the form of a manifest"),
        (manifest_type, r#"{"schemaVersion":2,"manifests":[]}"#.to_owned(), "has the form of an index"),
        ("", format!(r#"{{"schemaVersion":2,"mediaType":"{manifest_type}","manifests":[]}}"#), "the form of an index"),
        (index_type, format!(r#"{{"schemaVersion":2,"mediaType":"{manifest_type}"}}"#), "what leads to it"),
        ("", format!(r#"{{"schemaVersion":2,"config":{config},"config":{config},"layers":[]}}"#), "duplicate field"),
        ("", format!(r#"{{"schemaVersion":2,"config":{config},"layers":[],"Manifests":[]}}"#), "to some readers only"),
        ("", format!(r#"{{"schemaVersion":2,"config":{config},"layers":[],"x":{{"a":1,"a":2}}}}"#), "stands twice"),
        ("", format!(r#"{{"schemaVersion":2,"config":{config},"layers":[],"x":1,"X":1}}"#), "stands twice"),
        ("", format!(r#"{{"schemaVersion":2,"config":{config},"layers":[]}} x"#), "trailing"),
        ("", r#"{"schemaVersion":2}"#.to_owned(), "neither"),
        ("", r#"{"schemaVersion":2,"mediaType":"text/html","manifests":[]}"#.to_owned(), "neither"),
        ("", r#"[]"#.to_owned(), "neither"),
        ("", String::new(), "neither"),
        ("", r#"{"schemaVersion":1,"fsLayers":[],"history":[]}"#.to_owned(), "schema 1"),
        (media_type::DOCKER_SCHEMA1_SIGNED, r#"{"name":"x"}"#.to_owned(), "schema 1"),
        ("", r#"{"schemaVersion":3,"manifests":[]}"#.to_owned(), "schemaVersion 3"),
        (manifest_type, r#"{"schemaVersion":2,"layers":[]}"#.to_owned(), "missing field `config`"),
        (
            "",
            format!(r#"{{"schemaVersion":2,"manifests":[{{"digest":"{DIGEST}","size":9223372036854775808}}]}}"#),
            "impossible size",
        ),
        ("", format!(r#"{{"schemaVersion":2,"manifests":[{{"digest":"{DIGEST}","size":-1}}]}}"#), "not an index"),
        ("", r#"{"schemaVersion":2,"manifests":[{"digest":"sha256:../x","size":1}]}"#.to_owned(), "not a digest"),
    ] {
        let error = parse(said, &json).unwrap_err().to_string();
        assert!(error.contains(message), "{json}: {error}");
    }
}

#[test]
fn counts_and_sizes_are_bounded() {
    let limits = Limits { layers: 2, manifest_bytes: 2000, config_bytes: 200, ..Limits::default() };
    let list = |count| vec![descriptor(media_type::OCI_LAYER); count].join(",");
    let index = |count| Document::new("", format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, list(count)).into());
    assert!(index(2).unwrap().index(&limits).is_ok());
    assert!(index(3).unwrap().index(&limits).unwrap_err().to_string().contains("limit of 2"));
    assert!(matches!(index(50).unwrap().index(&limits), Err(Error::TooLarge { limit: 2000, .. })));
    let config = Document::new(media_type::OCI_CONFIG, " ".repeat(201).into()).unwrap();
    assert!(matches!(config.image_config(&limits), Err(Error::TooLarge { limit: 200, .. })));
    let deep = format!(r#"{{"schemaVersion":2,"manifests":[],"x":{}{}}}"#, "[".repeat(5000), "]".repeat(5000));
    assert!(parse("", &deep).is_err());
}

#[test]
fn null_stands_for_what_is_empty() {
    let config = descriptor(media_type::OCI_EMPTY);
    let json = format!(r#"{{"schemaVersion":2,"config":{config},"layers":null,"annotations":null,"subject":null}}"#);
    let Kind::Manifest(manifest) = parse("", &json).unwrap() else { panic!("not a manifest") };
    assert!(manifest.layers.is_empty() && manifest.annotations.is_empty() && manifest.subject.is_none());
    assert_eq!(manifest.effective_artifact_type(), media_type::OCI_EMPTY);
    let json = format!(r#"{{"schemaVersion":2,"mediaType":"{}","manifests":null}}"#, media_type::OCI_INDEX);
    assert!(matches!(parse("", &json).unwrap(), Kind::Index(index) if index.manifests.is_empty()));
}

#[test]
fn a_document_is_verified_against_its_descriptor() {
    let bytes = Bytes::from_static(br#"{"schemaVersion":2,"manifests":[]}"#);
    let mut right = Descriptor::new(media_type::OCI_INDEX, Digest::sha256_of(&bytes), bytes.len() as u64);
    assert_eq!(Document::verified(bytes.clone(), &right, "here").unwrap().descriptor(), right);
    right.size += 1;
    assert!(matches!(Document::verified(bytes.clone(), &right, "here"), Err(Error::Corrupt { .. })));
    right.size -= 1;
    right.digest = Digest::sha256_of(b"");
    assert!(matches!(Document::verified(bytes, &right, "here"), Err(Error::Corrupt { .. })));
    // An artifact's configuration need not be JSON at all.
    let config = Bytes::from_static(b"\x00\x01");
    let odd = Descriptor::new("application/x-odd", Digest::sha256_of(&config), 2);
    assert_eq!(Document::verified(config, &odd, "here").unwrap().media_type, "application/x-odd");
}

#[test]
fn inline_content_is_taken_only_where_it_is_right() {
    let mut descriptor = Descriptor::new(media_type::OCI_EMPTY, Digest::sha256_of(b"{}"), 2);
    assert_eq!(descriptor.inline(), None);
    for (data, right) in [("e30=", true), ("e30", false), ("e31=", false), ("e30=e30=", false), ("", false)] {
        descriptor.data = Some(data.to_owned());
        assert_eq!(descriptor.inline(), right.then(|| Bytes::from_static(b"{}")), "{data}");
    }
    descriptor.size = u64::MAX;
    assert_eq!(descriptor.inline(), None);
}

#[test]
fn views_that_are_written_read_the_same() {
    let mut manifest = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        artifact_type: Some("application/x-thing".to_owned()),
        config: Descriptor::new(media_type::OCI_EMPTY, Digest::sha256_of(b"{}"), 2),
        layers: vec![Descriptor::new(media_type::OCI_LAYER, Digest::sha256_of(b""), 0)],
        subject: Some(Descriptor::new(media_type::OCI_MANIFEST, Digest::sha256_of(b"x"), 1)),
        annotations: [("a".to_owned(), "b".to_owned())].into(),
    };
    manifest.layers[0].platform = Some(Platform {
        architecture: "arm".to_owned(),
        os: "linux".to_owned(),
        variant: Some("v7".to_owned()),
        os_version: Some("1".to_owned()),
        os_features: vec!["x".to_owned()],
    });
    let document = manifest.to_document().unwrap();
    assert_eq!(document.manifest(&Limits::default()).unwrap(), manifest);
    assert_eq!(document, manifest.to_document().unwrap());
    let index = Index { manifests: vec![document.descriptor()], ..Index::empty() };
    let document = index.to_document().unwrap();
    assert_eq!(document.index(&Limits::default()).unwrap(), index);
    assert!(document.manifest(&Limits::default()).is_err());
}

#[test]
fn attestations_are_told_from_images() {
    let mut descriptor = Descriptor::new(media_type::OCI_MANIFEST, Digest::sha256_of(b""), 0);
    assert!(!descriptor.is_attestation());
    descriptor.annotations.insert(REFERENCE_TYPE.to_owned(), "attestation-manifest".to_owned());
    assert_eq!((descriptor.is_attestation(), descriptor.attested()), (true, None));
    descriptor.annotations.insert(REFERENCE_DIGEST.to_owned(), DIGEST.to_owned());
    assert_eq!(descriptor.attested(), Some(Digest::sha256_of(b"")));
}

#[test]
fn layer_types_round_trip() {
    use media_type::{Family, LayerCompression, LayerType};
    for family in [Family::Oci, Family::Docker] {
        for compression in [LayerCompression::None, LayerCompression::Gzip, LayerCompression::Zstd] {
            for foreign in [false, true] {
                let layer = LayerType { family, compression, foreign };
                assert_eq!(LayerType::parse(layer.as_str()), Some(layer));
            }
        }
    }
    assert_eq!(LayerType::parse("application/vnd.in-toto+json"), None);
}

#[test]
fn a_configuration_is_read_as_docker_and_oci_write_it() {
    let json = format!(
        r#"{{"architecture":"arm64","os":"linux","variant":"v8","created":"2026-01-01T00:00:00Z","author":null,
        "config":{{"Env":["A=b"],"Entrypoint":null,"Cmd":"echo hi","WorkingDir":"/w","User":"1:2","ExposedPorts":
        {{"80/tcp":{{}}}},"Volumes":null,"StopSignal":"SIGINT","Labels":{{"l":"m","L":"n"}},"OnBuild":null}},
        "container_config":{{}},"rootfs":{{"type":"layers","diff_ids":["{DIGEST}"]}},
        "history":[{{"created_by":"x","empty_layer":true}}]}}"#
    );
    let document = Document::new(media_type::DOCKER_CONFIG, json.into()).unwrap();
    let config = document.image_config(&Limits::default()).unwrap();
    assert_eq!(config.platform().variant.as_deref(), Some("v8"));
    assert_eq!(config.diff_ids.len(), 1);
    let expected = ProcessConfig {
        env: vec!["A=b".to_owned()],
        cmd: vec!["echo hi".to_owned()],
        working_dir: "/w".to_owned(),
        user: "1:2".to_owned(),
        exposed_ports: vec!["80/tcp".to_owned()],
        stop_signal: "SIGINT".to_owned(),
        labels: [("l".to_owned(), "m".to_owned()), ("L".to_owned(), "n".to_owned())].into(),
        ..ProcessConfig::default()
    };
    assert_eq!(config.config, expected);
    assert!(config.history[0].empty_layer);
    for bad in [
        r#"{"rootfs":{"type":"layers","diff_ids":["x"]}}"#,
        r#"{"rootfs":{"type":"zfs","diff_ids":[]}}"#,
        r#"{"architecture":"amd64"}"#,
        r#"{"rootfs":{},"rootfs":{}}"#,
        r#"{"rootfs":{},"config":{"Env":["A"],"Env":["B"]}}"#,
    ] {
        let document = Document::new(media_type::OCI_CONFIG, bad.into()).unwrap();
        assert!(matches!(document.image_config(&Limits::default()), Err(Error::Invalid { .. })), "{bad}");
    }
}
