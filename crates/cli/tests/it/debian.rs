//! A large image: a root file system of Debian packages, at least 300 MB in four layers, with whiteouts.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use crate::{
    harness::{cached, have, mounted_in, peer, run_within},
    image::umoci,
};

/// How long it may take to download and unpack the packages.
const LIMIT: Duration = Duration::from_secs(900);
/// Enough of them that the image is large.
const PACKAGES: &str = "python3,perl,vim-runtime,locales";

/// Returns the image's OCI layout, tag `t`; `None` where it can't be made here, which has then been said.
pub fn large(test: &str) -> Option<&'static Path> {
    if !loris_testkit::require_root(test) || !have(test, &["umoci", "debootstrap", "tar", "unshare"]) {
        return None;
    }
    static MADE: OnceLock<Option<PathBuf>> = OnceLock::new();
    let made = MADE.get_or_init(|| {
        let mirror = mirror()?;
        Some(cached("debian-image", include_str!("debian.rs"), |directory| build(directory, &mirror)))
    });
    if made.is_none() {
        loris_testkit::skip(test, "a mirror of Debian in /etc/apt");
    }
    made.as_deref()
}

/// The mirror that this machine's own packages come from.
fn mirror() -> Option<String> {
    let listed = fs::read_dir("/etc/apt/sources.list.d").ok()?.filter_map(Result::ok).map(|entry| entry.path());
    let mut files: Vec<PathBuf> = listed.filter(|path| path.extension().is_some_and(|end| end == "sources")).collect();
    files.sort();
    files.push("/etc/apt/sources.list".into());
    let texts: Vec<String> = files.iter().filter_map(|file| fs::read_to_string(file).ok()).collect();
    texts.iter().flat_map(|text| text.lines()).find_map(|line| {
        let mut words = line.split_whitespace();
        let mirror = match words.next()? {
            "URIs:" => words.next(),
            "deb" => words.find(|word| word.contains("://")),
            _ => None,
        };
        mirror.map(str::to_owned)
    })
}

fn suite() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap();
    let name = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.expect("a name of the release").to_owned()
}

fn build(directory: &Path, mirror: &str) {
    let layout = directory.join("layout");
    let image = format!("{}:t", layout.display());
    let (bundle, debian) = (directory.join("bundle"), directory.join("debian"));
    let root = bundle.join("rootfs");
    // It mounts /proc in what it makes; a namespace of its own takes that along even where it is killed.
    let mut debootstrap = peer("unshare");
    // That has copies of the mounts of other tests, which would keep those in use for as long as this takes.
    let alone = r#"for at in $(awk '/loris/ { print $5 }' /proc/self/mountinfo); do umount -l "$at"; done; exec "$@""#;
    debootstrap.args(["--mount", "--propagation=private", "sh", "-c", alone, "sh", "debootstrap"]);
    debootstrap.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    debootstrap.args(["--variant=minbase", &format!("--include={PACKAGES}"), &suite()]).arg(&debian).arg(mirror);
    run_within(LIMIT, &mut debootstrap).succeeded();
    assert_eq!(mounted_in(&debian), Vec::<PathBuf>::new());
    umoci(&["init", "--layout", layout.to_str().unwrap()]);
    umoci(&["new", "--image", &image]);
    umoci(&["config", "--image", &image, "--config.cmd", "/usr/bin/python3", "--config.env", "PATH=/usr/bin:/bin"]);
    umoci(&["unpack", "--image", &image, bundle.to_str().unwrap()]);
    let repack = || umoci(&["repack", "--refresh-bundle", "--image", &image, bundle.to_str().unwrap()]);

    // The first layer lacks what the second brings.
    let later = ["usr/lib/python3", "usr/lib/python3.11", "usr/share/vim", "usr/share/perl"];
    let later: Vec<_> = later.iter().filter(|path| debian.join(path).exists()).collect();
    let aside = directory.join("aside");
    fs::create_dir(&aside).unwrap();
    for (number, path) in later.iter().enumerate() {
        fs::rename(debian.join(path), aside.join(number.to_string())).unwrap();
    }
    for entry in fs::read_dir(&debian).unwrap().map(|entry| entry.unwrap()) {
        fs::rename(entry.path(), root.join(entry.file_name())).unwrap();
    }
    repack();
    for (number, path) in later.iter().enumerate() {
        fs::rename(aside.join(number.to_string()), root.join(path)).unwrap();
    }
    repack();
    // The third takes away, as an image that cleans up does.
    fs::remove_dir_all(root.join("var/cache/debconf")).unwrap();
    fs::remove_dir_all(root.join("usr/share/doc/python3")).unwrap();
    fs::write(root.join("etc/hostname"), "large\n").unwrap();
    repack();
    // The fourth hides a whole directory behind an opaque one, and another behind a file.
    let top = directory.join("top");
    fs::create_dir_all(top.join("usr/share/doc/bash")).unwrap();
    fs::write(top.join("usr/share/doc/bash/.wh..wh..opq"), "").unwrap();
    fs::write(top.join("usr/share/doc/bash/only"), "this").unwrap();
    fs::create_dir_all(top.join("var/lib/apt")).unwrap();
    fs::write(top.join("var/lib/apt/lists"), "a file now").unwrap();
    let archive = directory.join("layer.tar");
    let mut tar = peer("tar");
    tar.args(["--format=posix", "--sort=name", "-C"])
        .arg(&top)
        .arg("-cf")
        .arg(&archive)
        .args(["usr/share/doc/bash", "var/lib/apt/lists"]);
    run_within(LIMIT, &mut tar).succeeded();
    umoci(&["raw", "add-layer", "--image", &image, archive.to_str().unwrap()]);
}
