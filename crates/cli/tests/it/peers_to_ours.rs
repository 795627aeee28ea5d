//! What stargz's own tools write, we read, verify and mount.

use std::{fs, os::unix::ffi::OsStrExt as _, path::Path};

use loris_testkit::{require_fuse, skip};

use crate::{
    containerd::Containerd,
    harness::{Place, have, ok, run},
    image, layout,
    ours_to_peers::{assert_same, unpacked_facts},
};

/// How the image's file begins whose name is not UTF-8.
const NOT_UTF8: &str = "names/not-utf8-";

#[test]
fn images_of_stargz_tools_are_lazy_sound_and_the_same() {
    let test = "images_of_stargz_tools_are_lazy_sound_and_the_same";
    let Some(small) = image::small(test) else { return };
    if !require_fuse(test) || !have(test, &["skopeo"]) {
        return;
    }
    let place = Place::new();
    let Some(containerd) = Containerd::start(test, &place) else { return };
    containerd.import(small, "t", "localhost/small");
    let source = "localhost/small:t";
    let record = place.join("record.json");
    let optimized = optimize(test, &containerd, source, &record);
    if !optimized {
        // What it would have recorded.
        fs::write(&record, "{\"path\":\"bin/sh\",\"layerIndex\":0}\n{\"path\":\"data/big\",\"layerIndex\":0}\n")
            .unwrap();
    }
    let recorded = record.to_str().unwrap();
    for (name, options) in [
        ("plain", &[][..]),
        ("level", &["--estargz-compression-level", "1"]),
        ("chunks", &["--estargz-chunk-size", "1048576"]),
        ("recorded", &["--estargz-record-in", recorded]),
    ] {
        let mut command = containerd.ctr_remote();
        command.args(["images", "convert", "--estargz", "--oci"]).args(options);
        ok(command.args([source, &format!("localhost/small:{name}")]));
        is_read(&place, &containerd, name);
    }
    if optimized {
        is_read(&place, &containerd, "optimized");
    }
    let mut command = containerd.ctr_remote();
    command.args(["images", "convert", "--zstdchunked", "--oci", source, "localhost/small:zstd"]);
    ok(&mut command);
    let exported = place.join("zstd");
    containerd.export("localhost/small:zstd", &exported);
    let image = format!("oci:{}", exported.display());
    let report = ok(place.loris("inspect --json").arg(&image)).json();
    assert_eq!(report["lazy"], true, "{report}");
    for layer in report["layers"].as_array().unwrap() {
        assert_eq!(layer["format"], "zstd:chunked (stargz-snapshotter)", "{layer}");
    }
    let verified = run(place.loris("verify --quiet").arg(&image));
    for line in verified.text().lines() {
        assert!(line.contains(NOT_UTF8), "{verified}");
    }
}

/// Runs the image and has it laid out as it was read; says why where containers can't run here.
fn optimize(test: &str, containerd: &Containerd, source: &str, record: &Path) -> bool {
    let mut command = containerd.ctr_remote();
    command.args(["images", "optimize", "--oci", "--period", "1", "--record-out"]).arg(record);
    let ran = run(command.args([source, "localhost/small:optimized"]));
    if !ran.status.success() {
        let reason = ran.stderr.lines().last().unwrap_or_default();
        skip(test, &format!("a machine where ctr-remote optimizes: {reason}"));
    }
    ran.status.success()
}

/// An image in containerd is sound, lazy, and mounted as it is unpacked.
fn is_read(place: &Place, containerd: &Containerd, name: &str) {
    let exported = place.join(name);
    containerd.export(&format!("localhost/small:{name}"), &exported);
    let image = format!("oci:{}", exported.display());
    let report = ok(place.loris("inspect --json").arg(&image)).json();
    assert_eq!(report["lazy"], true, "{name}: {report}");
    for layer in report["layers"].as_array().unwrap() {
        assert_eq!(layer["format"], "eStargz", "{name}: {layer}");
    }
    // Go's JSON has no names that are not UTF-8: a table of contents of theirs lists the file under another name.
    let verified = run(place.loris("verify --quiet").arg(&image));
    assert!(matches!(verified.status.code(), Some(0 | 1)), "{verified}");
    for line in verified.text().lines() {
        assert!(line.contains(NOT_UTF8), "{verified}");
    }
    let tag = fs::read_to_string(exported.join("index.json")).unwrap();
    let tag: serde_json::Value = serde_json::from_str(&tag).unwrap();
    let tag = tag["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"].as_str().unwrap().to_owned();
    let unpacked = layout::unpack(&exported, &tag, &place.join(&format!("{name}-bundle")));
    let mounted = place.mount(&image);
    let [expected, shown] = [&unpacked, &mounted.at].map(|root| {
        let mut all = unpacked_facts(root);
        let before = all.len();
        all.retain(|path, _| !path.as_os_str().as_bytes().starts_with(NOT_UTF8.as_bytes()));
        assert_eq!(all.len(), before - 1, "the one file with such a name");
        // Their tables of contents have times to the nearest second.
        for facts in all.values_mut() {
            let (seconds, nanoseconds) = facts.mtime;
            facts.mtime = (seconds + i64::from(nanoseconds >= 500_000_000), 0);
        }
        all
    });
    assert_same(&expected, &shown);
    let top: Vec<_> = fs::read_dir(&mounted.at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let added = crate::ours_to_peers::ADDED.iter().find(|added| top.iter().any(|name| name == *added));
    assert_eq!(added, None, "{name}: shown in the mount");
    ok(place.loris("umount").arg(&mounted.at));
}
