//! OCI layouts looked into and changed by hand.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::harness::{ok, peer};

/// The annotation that vouches for a layer's table of contents.
pub const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";

/// Returns `sha256:...` of bytes.
pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// Returns where a layout keeps a blob.
pub fn blob_path(layout: &Path, digest: &str) -> PathBuf {
    layout.join("blobs").join(digest.replace(':', "/"))
}

/// Returns the manifest of a layout's only image.
pub fn manifest(layout: &Path) -> Value {
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let digest = index["manifests"][0]["digest"].as_str().unwrap();
    serde_json::from_slice(&fs::read(blob_path(layout, digest)).unwrap()).unwrap()
}

/// Returns the digests of the layers, the lowest first.
pub fn layers(layout: &Path) -> Vec<String> {
    let manifest = manifest(layout);
    let layers = manifest["layers"].as_array().unwrap();
    layers.iter().map(|layer| layer["digest"].as_str().unwrap().to_owned()).collect()
}

/// Changes the manifest of a layout's only image, and points the index at the new one.
pub fn edit_manifest(layout: &Path, edit: impl FnOnce(&mut Value)) {
    let mut manifest = manifest(layout);
    edit(&mut manifest);
    let bytes = serde_json::to_vec(&manifest).unwrap();
    let file = layout.join("index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    index["manifests"][0]["digest"] = store(layout, &bytes).into();
    index["manifests"][0]["size"] = bytes.len().into();
    fs::write(file, serde_json::to_vec(&index).unwrap()).unwrap();
}

/// Puts a layer in another's place, with the digest of its table of contents.
pub fn replace_layer(layout: &Path, number: usize, blob: &[u8], toc: &str) {
    let digest = store(layout, blob);
    edit_manifest(layout, |manifest| {
        let layer = &mut manifest["layers"][number];
        layer["digest"] = digest.into();
        layer["size"] = blob.len().into();
        layer["annotations"][TOC_DIGEST] = toc.into();
    });
}

fn store(layout: &Path, bytes: &[u8]) -> String {
    let digest = digest(bytes);
    fs::write(blob_path(layout, &digest), bytes).unwrap();
    digest
}

/// Copies a layout, to be changed.
pub fn copy(layout: &Path, to: &Path) {
    ok(Command::new("cp").arg("-r").arg(layout).arg(to));
}

/// Unpacks a layout's image with umoci, and returns the root file system.
pub fn unpack(layout: &Path, tag: &str, bundle: &Path) -> PathBuf {
    // Layers may put files below links to directories, as Debian's merged /usr has them.
    ok(peer("umoci")
        .args(["unpack", "--keep-dirlinks", "--image"])
        .arg(format!("{}:{tag}", layout.display()))
        .arg(bundle));
    bundle.join("rootfs")
}
