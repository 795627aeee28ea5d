//! What we write, others accept: skopeo, umoci, Podman, containerd with stargz's tools.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use loris_testkit::{
    registry::{DockerRegistry, DockerRegistryOptions},
    skip,
    tree::{Facts, Ignore, differences, facts},
};

use crate::{
    containerd::Containerd,
    harness::{Place, have, ok, peer, run},
    image::{self, GREETING},
    layout::{self, TOC_DIGEST},
    podman::podman,
};

/// Files that eStargz adds to a layer.
pub const ADDED: [&str; 3] = ["stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark"];

/// Converts a layout's image into another layout, tag `t`.
pub fn convert(place: &Place, layout: &Path, name: &str, options: &[&str]) -> PathBuf {
    let to = place.join(name);
    let from = format!("oci:{}:t", layout.display());
    ok(place.loris("convert --estargz --quiet").args(options).arg(from).arg(format!("oci:{}:t", to.display())));
    to
}

/// Reads an unpacked tree without what eStargz has added to it.
pub fn unpacked_facts(root: &Path) -> BTreeMap<PathBuf, Facts> {
    let mut all = facts(root, Ignore::default()).unwrap();
    all.retain(|path, _| !ADDED.iter().any(|added| path.as_path() == Path::new(added)));
    all
}

#[track_caller]
pub fn assert_same(left: &BTreeMap<PathBuf, Facts>, right: &BTreeMap<PathBuf, Facts>) {
    assert!(left.len() > 10, "a tree of {} files proves little", left.len());
    assert_eq!(differences(left, right, 10), Vec::<String>::new());
}

#[test]
fn converting_twice_gives_the_same_and_converting_ours_changes_nothing() {
    let Some(small) = image::small("converting_twice_gives_the_same_and_converting_ours_changes_nothing") else {
        return;
    };
    let place = Place::new();
    for (number, options) in
        [&[][..], &["--estargz-chunk-size", "65536", "--estargz-compression-level", "1"], &["--threads", "1"]]
            .into_iter()
            .enumerate()
    {
        let first = convert(&place, small, &format!("first-{number}"), options);
        let second = convert(&place, small, &format!("second-{number}"), options);
        assert_eq!(layout::manifest(&first), layout::manifest(&second), "{options:?}");
        assert_ne!(layout::layers(&first), layout::layers(small));
        let again = convert(&place, &first, &format!("again-{number}"), options);
        assert_eq!(layout::manifest(&again), layout::manifest(&first), "{options:?}");
    }
    let (many, one) = (place.join("first-0"), place.join("first-2"));
    assert_eq!(layout::manifest(&many), layout::manifest(&one), "threads change the output");
    place.assert_clean();
}

#[test]
fn umoci_unpacks_the_same_tree() {
    let Some(small) = image::small("umoci_unpacks_the_same_tree") else { return };
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    let original = layout::unpack(small, "t", &place.join("original-bundle"));
    let unpacked = layout::unpack(&converted, "t", &place.join("converted-bundle"));
    assert_same(&unpacked_facts(&original), &unpacked_facts(&unpacked));
}

#[test]
fn skopeo_copies_from_our_push_and_from_our_archive() {
    let test = "skopeo_copies_from_our_push_and_from_our_archive";
    let Some(small) = image::small(test) else { return };
    let Some(registry) = DockerRegistry::start(test, &DockerRegistryOptions::default()).unwrap() else { return };
    if !have(test, &["skopeo"]) {
        return;
    }
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    let name = format!("{}/small:converted", registry.address());
    let printed = ok(place.loris("push").arg(&converted).arg(&name)).text();
    let archive = place.join("archive.tar");
    ok(place.loris("copy").arg(&name).arg(format!("oci-archive:{}:t", archive.display())));
    let sources = [format!("docker://{name}"), format!("oci-archive:{}:t", archive.display())];
    for (number, source) in sources.into_iter().enumerate() {
        let copied = place.join(&format!("copied-{number}"));
        let mut skopeo = peer("skopeo");
        skopeo.args(["copy", "--quiet", "--preserve-digests", "--src-tls-verify=false", &source]);
        ok(skopeo.arg(format!("oci:{}:t", copied.display())));
        assert_eq!(layout::manifest(&copied), layout::manifest(&converted), "{source}");
        assert_eq!(layout::layers(&copied).len(), 3);
        for digest in layout::layers(&copied) {
            let bytes = std::fs::read(layout::blob_path(&copied, &digest)).unwrap();
            assert_eq!(layout::digest(&bytes), digest, "{source}");
        }
        let index = std::fs::read_to_string(copied.join("index.json")).unwrap();
        let digest = printed.trim().rsplit_once('@').expect("REF@DIGEST is printed").1;
        assert!(index.contains(digest), "{printed}");
    }
}

#[test]
fn podman_runs_it() {
    let test = "podman_runs_it";
    let Some(small) = image::small(test) else { return };
    if !have(test, &["podman", "runc"]) {
        return;
    }
    let _alone = crate::harness::containers();
    let place = Place::new();
    let podman = |image: &str| {
        let mut command = podman(&place);
        command.args(["--runtime", "runc", "run", "--rm", "--network", "none"]);
        command.args(["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", "--log-driver", "none"]);
        run(command.arg(image))
    };
    // Podman makes a name of the path that it is given, and names have no capitals.
    std::os::unix::fs::symlink(small, place.join("original")).unwrap();
    let ran = podman("oci:original:t");
    if !ran.status.success() {
        let reason = ran.stderr.lines().last().unwrap_or_default();
        skip(test, &format!("a machine where podman runs an image that nobody converted: {reason}"));
        return;
    }
    convert(&place, small, "converted", &[]);
    for (image, ran) in [("original", ran), ("converted", podman("oci:converted:t").succeeded())] {
        assert_eq!(ran.text(), GREETING, "{image}");
    }
}

#[test]
fn stargz_tools_read_our_tables_of_contents() {
    let test = "stargz_tools_read_our_tables_of_contents";
    let Some(small) = image::small(test) else { return };
    let Some(registry) = DockerRegistry::start(test, &DockerRegistryOptions::default()).unwrap() else { return };
    let place = Place::new();
    let Some(containerd) = Containerd::start(test, &place) else { return };
    for (tag, options) in [("plain", &[][..]), ("chunked", &["--estargz-chunk-size", "100000"])] {
        let converted = convert(&place, small, tag, options);
        let name = format!("{}/small:{tag}", registry.address());
        ok(place.loris("push").arg(&converted).arg(&name));
        let mut rpull = containerd.ctr_remote();
        ok(rpull.args(["images", "rpull", "--plain-http", "--snapshotter", "overlayfs", &name]));
        let mut toc_of_all = String::new();
        for layer in layout::manifest(&converted)["layers"].as_array().unwrap() {
            let digest = layer["digest"].as_str().unwrap();
            let toc = |options: &[&str]| {
                ok(containerd.ctr_remote().args(["images", "get-toc-digest"]).args(options).arg(digest)).text()
            };
            assert_eq!(toc(&[]).trim(), layer["annotations"][TOC_DIGEST].as_str().unwrap(), "{tag} {digest}");
            toc_of_all.push_str(&toc(&["--dump-toc"]));
        }
        // Times below the second are there, and were accepted.
        assert!(toc_of_all.contains("2020-09-13T12:26:40.123456789Z"), "{toc_of_all}");
        assert!(toc_of_all.contains("1969-12-31T23:59:55.999999999Z"), "{toc_of_all}");
    }
}

#[test]
fn zstd_chunked_keeps_the_layers_and_comes_back() {
    let test = "zstd_chunked_keeps_the_layers_and_comes_back";
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let to = |name: &str, from: &Path, flags: &str| {
        let to = place.join(name);
        let mut command = place.loris(&format!("convert --quiet {flags}"));
        ok(command.arg(format!("oci:{}:t", from.display())).arg(format!("oci:{}:t", to.display())));
        to
    };
    let plain = to("plain", small, "--uncompress");
    for (dialect, keeps) in [("containers", true), ("stargz", false)] {
        let flags = format!("--zstdchunked --zstdchunked-dialect {dialect}");
        let converted = to(dialect, small, &flags);
        ok(place.loris("verify --quiet").arg(format!("oci:{}:t", converted.display())));
        let report = ok(place.loris("inspect --json").arg(format!("oci:{}:t", converted.display()))).json();
        assert_eq!(report["lazy"], true, "{report}");
        for layer in report["layers"].as_array().unwrap() {
            assert!(layer["format"].as_str().unwrap().starts_with("zstd:chunked"), "{layer}");
        }
        let back = to(&format!("{dialect}-back"), &converted, "--uncompress");
        assert_eq!(layout::layers(&back) == layout::layers(&plain), keeps, "{dialect}");
        // Already as asked for.
        let again = to(&format!("{dialect}-again"), &converted, &flags);
        assert_eq!(layout::manifest(&again), layout::manifest(&converted));
        let unpacked = layout::unpack(&back, "t", &place.join(&format!("{dialect}-bundle")));
        let original = layout::unpack(&plain, "t", &place.join(&format!("{dialect}-original")));
        assert_same(&unpacked_facts(&original), &unpacked_facts(&unpacked));
    }
    place.assert_clean();
}
