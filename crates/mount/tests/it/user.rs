//! Mounting without privileges.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    process::Command,
};

use loris_mount::{
    MountError,
    engine::Engine,
    mounts::{self, Unmounted},
    probe::{Wish, probe},
    rootfs::{Access, RootFs, RootFsOptions},
};

use rustix::fs::{FileType, Mode};

use crate::{
    assert_nothing_mounted,
    image::{TestImage, directory, file, noise},
};

const USER: u32 = 65534;

/// The body of the test below, run as a user without privileges.
#[test]
fn child_without_privileges() {
    if std::env::var_os("LORIS_TEST_AS_USER").is_none() {
        return;
    }
    let abilities = probe();
    assert!(!abilities.is_admin());
    assert_eq!(abilities.missing_for(Wish::ReadOnly), Vec::<&loris_mount::probe::Ability>::new());
    let image = TestImage::new(&[vec![
        directory("d"),
        file("d/big", noise(1, 100_000)).owner(USER, USER),
        file("d/su", "x").mode(0o4755),
    ]]);
    let mountpoint = image.mountpoint("mounted");
    let mut options = RootFsOptions {
        mountpoint: Some(mountpoint.clone()),
        access: Access::ReadOnly,
        scratch: image.directory.path().to_owned(),
        ..RootFsOptions::read_only(&image.store)
    };
    let assemble = |options: &RootFsOptions| RootFs::assemble(&image.layers, options, image.runtime.handle());
    for busy in [false, true] {
        let rootfs = assemble(&options).unwrap();
        assert_eq!(rootfs.engine(), Engine::Fuse);
        let info = mounts::find(&mountpoint).unwrap().unwrap();
        assert!(info.is_loris(), "{info:?}");
        assert_eq!(fs::read(mountpoint.join("d/big")).unwrap(), noise(1, 100_000));
        assert_eq!(fs::metadata(mountpoint.join("d/su")).unwrap().mode() & 0o7777, 0o4755);
        let held = busy.then(|| fs::File::open(mountpoint.join("d/big")).unwrap());
        let expected = if busy { Unmounted::Detached } else { Unmounted::Whole };
        assert_eq!(rootfs.unmount().unwrap(), expected);
        assert_nothing_mounted(image.directory.path());
        drop(held);
    }
    options.access = Access::Discard;
    let error = assemble(&options).unwrap_err();
    assert!(matches!(error, MountError::Unable { .. }), "{error}");
    // What is not the user's own cannot be mounted at, and fusermount3 says so.
    options.access = Access::ReadOnly;
    options.mountpoint = Some("/etc".into());
    let error = assemble(&options).unwrap_err();
    assert!(matches!(error, MountError::Fusermount { .. }), "{error}");
    println!("mounted without privileges");
}

#[test]
fn a_user_mounts_through_fusermount() {
    let test = "a_user_mounts_through_fusermount";
    if !loris_testkit::require_root(test)
        || loris_testkit::require_peer(test, "fusermount3").is_none()
        || !loris_testkit::require_fuse(test)
    {
        return;
    }
    let Some(unshare) = loris_testkit::require_peer(test, "unshare") else { return };
    if loris_testkit::require_peer(test, "setpriv").is_none() {
        return;
    }
    // The user may not be allowed to look into the directory that this program stands in.
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("child");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    chown(directory.path(), Some(USER), Some(USER)).unwrap();
    // Where udev has not opened the device to all users, that is made up for in a mount namespace of the test's own.
    let device = directory.path().join("fuse");
    let number = fs::metadata("/dev/fuse").unwrap().rdev();
    rustix::fs::mknodat(rustix::fs::CWD, &device, FileType::CharacterDevice, Mode::empty(), number).unwrap();
    fs::set_permissions(&device, fs::Permissions::from_mode(0o666)).unwrap();
    let script = "mount --bind \"$1\" /dev/fuse && shift \
        && exec setpriv --reuid=65534 --regid=65534 --clear-groups \"$@\"";
    let child = Command::new(unshare)
        .args(["--mount", "--propagation=private", "sh", "-c", script, "sh"])
        .args([&device, &program])
        .args(["--exact", "user::child_without_privileges", "--nocapture"])
        .env("LORIS_TEST_AS_USER", "1")
        .env("TMPDIR", directory.path())
        .env("HOME", directory.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && said.contains("mounted without privileges"), "{child:?}");
    assert_nothing_mounted(directory.path());
}

/// In a user namespace of one's own one is root, and mounts everything oneself: the way of rootless containers.
#[test]
fn a_user_namespace_mounts_by_itself() {
    let test = "a_user_namespace_mounts_by_itself";
    let Some(unshare) = loris_testkit::require_peer(test, "unshare") else { return };
    if !loris_testkit::require_fuse(test) {
        return;
    }
    let child = Command::new(unshare)
        .args(["--user", "--map-root-user", "--mount", "--propagation=private"])
        .arg(std::env::current_exe().unwrap())
        .env("LORIS_TEST_ENGINES", "fuse")
        .args(["--nocapture", "--exact", "read::many_readers_at_random", "rootfs::changes_are_discarded_or_kept"])
        .output()
        .unwrap();
    let (said, warned) = (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    if warned.contains("unshare failed") {
        loris_testkit::skip(test, "user namespaces");
        return;
    }
    assert!(child.status.success() && said.contains("2 passed") && !warned.contains("skipped"), "{child:?}");
}
