//! Other tools push and pull.

use std::{path::Path, process::Command};

use loris_format::digest::Digest;
use serde_json::{Value, json};

use super::Served;

/// Writes an OCI layout with one image of one layer, by hand.
fn layout(directory: &Path) -> Digest {
    let blobs = directory.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let write = |bytes: &[u8]| {
        let digest = Digest::sha256_of(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        (digest, bytes.len())
    };
    // An empty tar archive, and some content that no tool looks into.
    let layer: Vec<u8> = vec![0; 3 << 20];
    let (layer, layer_size) = write(&layer);
    let config = json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [layer] } });
    let (config, config_size) = write(config.to_string().as_bytes());
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size },
        "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer, "size": layer_size }],
    });
    let (digest, size) = write(manifest.to_string().as_bytes());
    let index = json!({ "schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": size,
        "annotations": { "org.opencontainers.image.ref.name": "tag" },
    }] });
    std::fs::write(directory.join("index.json"), index.to_string()).unwrap();
    std::fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    digest
}

#[tokio::test(flavor = "multi_thread")]
async fn skopeo_pushes_and_pulls() {
    let Some(skopeo) = loris_testkit::require_peer("skopeo_pushes_and_pulls", "skopeo") else { return };
    let served = Served::start();
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("from"), directory.path().join("to"));
    std::fs::create_dir(&from).unwrap();
    let digest = layout(&from);
    let run = |args: Vec<String>| {
        let mut command = Command::new(&skopeo);
        command.arg("--insecure-policy").args(args);
        tokio::task::spawn_blocking(move || {
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        })
    };
    let image = format!("docker://{}/library/test:tag", served.server.address());
    let strings = |args: &[&str]| args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
    let source = format!("oci:{}:tag", from.display());
    run(strings(&["copy", "--preserve-digests", "--dest-tls-verify=false", &source, &image])).await.unwrap();
    let other = image.replace("library/test", "library/other");
    let both = ["copy", "--src-tls-verify=false", "--dest-tls-verify=false", "--preserve-digests", &image, &other];
    run(strings(&both)).await.unwrap();
    let target = format!("oci:{}:tag", to.display());
    run(strings(&["copy", "--preserve-digests", "--src-tls-verify=false", &other, &target])).await.unwrap();
    let raw = run(strings(&["inspect", "--raw", "--tls-verify=false", &other])).await.unwrap();
    assert!(digest.matches(raw.as_bytes()));
    let index: Value = serde_json::from_slice(&std::fs::read(to.join("index.json")).unwrap()).unwrap();
    assert_eq!(index["manifests"][0]["digest"], digest.to_string());
    let blobs = std::fs::read_dir(to.join("blobs/sha256")).unwrap().count();
    assert_eq!(blobs, 3);
    run(strings(&["delete", "--tls-verify=false", &other])).await.unwrap();
    served.server.stop().await;
}
