//! A small image, lazily pullable, in a registry.

use std::{fs, path::Path, process::Command};

use loris_convert::{
    image::{ConvertOptions, convert_image},
    progress::Silent,
};
use loris_format::digest::Digest;
use loris_oci::{
    ImageSource as _, OpenOptions, Reference, open_source,
    registry::{Client, Config},
};
use serde_json::json;

/// The file in it.
pub const FILE: &str = "data/greeting";
/// Its content.
pub const CONTENT: &[u8] = b"hello from a layer\n";

/// Makes it, in a directory that is left to the caller, and pushes it.
pub async fn push(directory: &Path, config: Config, reference: &Reference) {
    push_with(directory, config, reference, &[]).await;
}

/// Does that with programs of this machine in it, and what they are linked with. It waits for ever, unless it is told to do
/// something else.
pub async fn push_with(directory: &Path, config: Config, reference: &Reference, programs: &[&str]) {
    let layout = layout(directory, programs);
    let name = format!("oci:{}:t", layout.display()).parse().unwrap();
    let client = Client::new(config).unwrap();
    let source = open_source(&name, &OpenOptions::new(client.clone())).await.unwrap();
    let options = ConvertOptions { work_directory: directory.to_owned(), ..ConvertOptions::default() };
    convert_image(&*source, &client.sink(reference), &options, &Silent).await.unwrap();
    assert!(client.source(reference).root().await.is_ok());
}

fn layout(directory: &Path, programs: &[&str]) -> std::path::PathBuf {
    let root = directory.join("image-root");
    fs::create_dir_all(root.join("data")).unwrap();
    for program in programs {
        let linked = Command::new("ldd").arg(program).output().unwrap().stdout;
        let linked = String::from_utf8(linked).unwrap();
        let libraries = linked.split_whitespace().filter(|word| word.starts_with('/'));
        for file in libraries.chain([*program]) {
            let to = root.join(file.trim_start_matches('/'));
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(file, to).unwrap();
        }
    }
    fs::write(root.join(FILE), CONTENT).unwrap();
    let tar = directory.join("layer.tar");
    let made = Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg(".").status().unwrap();
    assert!(made.success());
    let layout = directory.join("layout");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |media_type: &str, bytes: &[u8]| {
        let digest = Digest::sha256_of(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
    };
    let layer = put("application/vnd.oci.image.layer.v1.tar", &fs::read(tar).unwrap());
    let config = json!({
        "architecture": if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" },
        "os": "linux",
        "config": {"Entrypoint": ["/bin/sleep", "infinity"]},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    });
    let config = put("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer]});
    let mut manifest = put(media_type, manifest.to_string().as_bytes());
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "t"});
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    fs::write(layout.join("index.json"), json!({"schemaVersion": 2, "manifests": [manifest]}).to_string()).unwrap();
    layout
}
