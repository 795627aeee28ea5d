//! Any bytes as a manifest, an index or a configuration: a view that keeps its bounds, or an error; and a view that was
//! read is the same when it is written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use loris_format::limits::Limits;
use loris_oci::document::{Document, Kind, media_type};

fuzz_target!(|bytes: &[u8]| {
    // The first byte chooses what is said elsewhere about the document.
    let [choice, bytes @ ..] = bytes else { return };
    let said =
        ["", media_type::OCI_INDEX, media_type::OCI_MANIFEST, media_type::DOCKER_INDEX, media_type::DOCKER_MANIFEST];
    let said = said[usize::from(*choice) % said.len()];
    let limits = Limits { layers: 20, manifest_bytes: 64 << 10, config_bytes: 64 << 10, ..Limits::default() };

    if let Ok(document) = Document::new(said, bytes.to_vec().into())
        && let Ok(kind) = document.parse_kind(&limits)
    {
        assert!(kind.subject().is_none_or(|subject| subject.size <= i64::MAX as u64));
        let again = match &kind {
            Kind::Manifest(manifest) => {
                assert!(manifest.layers.len() <= limits.layers);
                assert!(media_type::is_manifest(&document.media_type));
                manifest
                    .layers
                    .iter()
                    .for_each(|layer| assert!(layer.inline().is_none_or(|data| layer.digest.matches(&data))));
                manifest.to_document()
            }
            Kind::Index(index) => {
                assert!(index.manifests.len() <= limits.layers);
                assert!(media_type::is_index(&document.media_type));
                index.to_document()
            }
        };
        let wide = Limits { manifest_bytes: 1 << 20, ..limits.clone() };
        assert_eq!(again.expect("a view is a document").parse_kind(&wide).expect("and reads"), kind);
    }
    let config = Document::new(media_type::OCI_CONFIG, bytes.to_vec().into()).expect("any bytes are a configuration's");
    if let Ok(config) = config.image_config(&limits) {
        assert!(config.diff_ids.len() <= limits.layers);
        let _ = config.platform().rank_on(&loris_oci::Platform::host());
    }
});
