//! A whole root file system of Debian: from a registry through FUSE, against the same image unpacked; containers in it.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::Path,
    process::Command,
    time::Duration,
};

use loris_testkit::{
    peer,
    registry::{DockerRegistry, DockerRegistryOptions},
    require_fuse,
};
use rustix::fs::{FileType, Mode};

use crate::{
    debian,
    harness::{LORIS, Place, containers, have, ok, run, run_within},
    image, layout,
    ours_to_peers::{assert_same, convert, unpacked_facts},
};

/// Reading hundreds of megabytes by a build without optimisation on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);

#[test]
fn a_large_image_is_read_from_a_registry_file_by_file() {
    let test = "a_large_image_is_read_from_a_registry_file_by_file";
    if !require_fuse(test) {
        return;
    }
    let Some(large) = debian::large(test) else { return };
    let Some(registry) = DockerRegistry::start(test, &DockerRegistryOptions::default()).unwrap() else { return };
    let place = Place::new();
    let name = format!("{}/large:t", registry.address());
    let mut command = place.loris("convert --estargz --quiet --estargz-compression-level 1");
    run_within(LIMIT, command.arg(format!("oci:{}:t", large.display())).arg(&name)).succeeded();
    let root = layout::unpack(large, "t", &place.join("bundle"));
    let expected = unpacked_facts(&root);
    let bytes: u64 = expected.values().map(|facts| facts.size).sum();
    assert!(bytes >= 300 << 20, "a large image of {bytes} bytes");

    every_path_is_listed(&place, &name, expected.keys().map(|path| path.as_path()));
    for path in ["etc/os-release", "usr/share/doc/bash/only", "var/lib/apt/lists", "usr/bin/perl"] {
        let printed = ok(place.loris("fs cat").arg(&name).arg(path));
        assert!(printed.stdout == fs::read(root.join(path)).unwrap(), "{path}");
    }
    // What nobody reads is not wanted here.
    let mount = || place.try_mount_with("mount --complete never", &name).unwrap_or_else(|ran| panic!("{ran}"));
    let mounted = mount();
    assert_same(&expected, &unpacked_facts(&mounted.at));
    mounted.unmount();

    // The second time, everything is in the cache.
    let report = ok(place.loris("inspect --json").arg(&name)).json();
    assert_eq!(report["lazy"], true, "{report}");
    assert_eq!(report["layers"].as_array().unwrap().len(), 4);
    for layer in report["layers"].as_array().unwrap() {
        let [cached, all] = ["cached_extents", "extents"].map(|key| layer["contents"][key].as_u64().unwrap());
        // Landmarks and what higher layers hide were not read.
        assert!(cached <= all && all - cached <= 32, "{layer}");
    }
    let digests = report["layers"].as_array().unwrap().iter().map(|layer| layer["digest"].as_str().unwrap().to_owned());
    let digests: Vec<String> = digests.collect();
    let of_layers = || {
        let requests = registry.requests();
        requests.into_iter().filter(|request| digests.iter().any(|digest| request.contains(digest))).count()
    };
    // A layer of which next to nothing is missing is completed and proven behind its readers, for which tar headers are
    // fetched: here as long as it takes, so that nothing is left to be done.
    run_within(LIMIT, place.loris("warm --quiet").arg(&name)).succeeded();
    let before = of_layers();
    assert!(before > 0, "the registry's log shows no requests: {:?}", registry.requests());
    let mounted = mount();
    assert_same(&expected, &unpacked_facts(&mounted.at));
    mounted.unmount();
    assert_eq!(of_layers(), before, "content was fetched again");
}

fn every_path_is_listed<'a>(place: &Place, image: &str, expected: impl Iterator<Item = &'a Path>) {
    let listed = ok(place.loris("fs ls -R --json").arg(image)).json();
    let listed: BTreeSet<String> =
        listed.as_array().unwrap().iter().map(|line| line["path"].as_str().unwrap().to_owned()).collect();
    let expected: BTreeSet<String> = expected
        .filter(|path| !path.as_os_str().is_empty())
        .map(|path| String::from_utf8(path.as_os_str().as_bytes().to_vec()).expect("Debian's names are UTF-8"))
        .collect();
    let missing: Vec<_> = expected.difference(&listed).take(5).collect();
    // The root of a lower layer still has the landmark that its own table of contents lists.
    let more: Vec<_> = listed.difference(&expected).take(5).collect();
    assert!(missing.is_empty() && more.is_empty(), "missing {missing:?}, more {more:?}");
}

#[test]
fn containers_run_over_the_large_image() {
    let test = "containers_run_over_the_large_image";
    if !require_fuse(test) {
        return;
    }
    let Some(large) = debian::large(test) else { return };
    let _alone = containers();
    let place = Place::new();
    let converted = place.join("converted");
    let to = format!("oci:{}:t", converted.display());
    let mut command = place.loris("convert --estargz --quiet --estargz-compression-level 1");
    run_within(LIMIT, command.arg(format!("oci:{}:t", large.display())).arg(&to)).succeeded();
    let volume = place.make("volume");
    fs::write(volume.join("in"), "from outside").unwrap();
    let state = Path::new("/run/loris/containers");
    let states = || fs::read_dir(state).map_or(0, |entries| entries.count());
    let (before, mounts) = (states(), fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count());
    let start = |options: &[&str], arguments: &[&str]| {
        let mut command = place.loris("run --net none");
        command.args(options).arg(&to).args(arguments);
        run(&mut command)
    };
    let shared = format!("{}:/shared", volume.display());
    for (options, arguments, code, printed) in [
        (&[][..], &["/usr/bin/python3", "-c", "import json; print(json.dumps([1, 2]))"][..], 0, "[1, 2]\n"),
        (&[], &["sh", "-c", "exit 42"], 42, ""),
        (&["-e", "NAME=value"], &["sh", "-c", "echo $NAME"], 0, "value\n"),
        (&["-v", &shared], &["sh", "-c", "cat /shared/in; echo back > /shared/out"], 0, "from outside"),
        (&["-w", "/usr/share"], &["pwd"], 0, "/usr/share\n"),
        (&["-u", "33:44"], &["sh", "-c", "id -u; id -g"], 0, "33\n44\n"),
        (&["-u", "www-data"], &["id", "-un"], 0, "www-data\n"),
        (&[], &["sh", "-c", "echo new > /etc/new; rm /etc/issue; cat /etc/new; ls /etc/issue || true"], 0, "new\n"),
        (&["--read-only"], &["sh", "-c", "echo new > /etc/new || echo no"], 0, "no\n"),
        (&[], &["/no/such/program"], 127, ""),
    ] {
        let ran = start(options, arguments);
        assert_eq!(ran.status.code(), Some(code), "{ran}");
        assert_eq!(ran.text(), printed, "{ran}");
    }
    assert_eq!(fs::read_to_string(volume.join("out")).unwrap(), "back\n");
    place.assert_clean();
    assert_eq!(states(), before, "left in {}", state.display());
    let after = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!after.contains("fuse.loris") || after.lines().count() <= mounts, "left mounted: {after}");
}

/// What the user below does: mounts, reads, unmounts. In a mount namespace of its own, in which `/dev/fuse` is open to
/// all, as udev makes it where there is a udev.
const AS_USER: &str = r#"
set -eu
device=$1 loris=$2 image=$3 at=$4 unpacked=$5
shift 5
mount --bind "$device" /dev/fuse
as_user() { setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }
sums() {
    as_user sh -c 'cd "$1" && shift && find "$@" -type f -readable -print0 | LC_ALL=C sort -z | xargs -0 sha256sum' \
        sh "$@"
}
as_user "$loris" mount "$image" "$at"
sums "$at" "$@" > mounted.sums
as_user "$loris" umount "$at"
! grep -q " $at " /proc/self/mountinfo
sums "$unpacked" "$@" > unpacked.sums
"#;

#[test]
fn a_user_without_privileges_mounts_and_reads_the_same() {
    let test = "a_user_without_privileges_mounts_and_reads_the_same";
    if !require_fuse(test) || !have(test, &["setpriv", "unshare", "fusermount3"]) {
        return;
    }
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    let unpacked = layout::unpack(small, "t", &place.join("bundle"));
    fs::set_permissions(place.join("bundle"), fs::Permissions::from_mode(0o755)).unwrap();
    let home = place.make("home");
    let at = place.make("home/mnt");
    // The build's directory may be closed to others.
    fs::copy(LORIS, home.join("loris")).unwrap();
    ok(Command::new("chown").args(["-R", "65534:65534"]).args([&home, &converted, &place.join("tmp")]));
    let device = place.join("fuse");
    let number = fs::metadata("/dev/fuse").unwrap().rdev();
    rustix::fs::mknodat(rustix::fs::CWD, &device, FileType::CharacterDevice, Mode::empty(), number).unwrap();
    fs::set_permissions(&device, fs::Permissions::from_mode(0o666)).unwrap();

    let mut command = place.command(peer("unshare").unwrap());
    command.args(["--mount", "--propagation=private", "sh", "-c", AS_USER, "sh"]).args([&device, &home.join("loris")]);
    command.arg(format!("oci:{}:t", converted.display())).args([&at, &unpacked]);
    command.args(["bin", "data", "links", "names", "becomes-directory", "opaque", "times", "changes"]);
    ok(command.env("HOME", &home).env("LORIS_CACHE_DIR", home.join("cache")));
    let sums = ["mounted.sums", "unpacked.sums"].map(|name| fs::read(place.join(name)).unwrap());
    let sums = sums.map(|sums| String::from_utf8_lossy(&sums).into_owned());
    assert!(sums[1].lines().count() > 10, "{sums:?}");
    assert_eq!(sums[0], sums[1]);
    place.assert_clean();
}
