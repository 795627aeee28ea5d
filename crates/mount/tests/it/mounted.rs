//! What a mounted tree looks like.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{DirEntryExt as _, MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use loris_mount::{
    MountError,
    engine::Engine,
    fuse::{FuseMount, FuseOptions},
    mounts::{self, Unmounted},
    overlay::{OverlayMount, OverlayOptions},
    rootfs::{Access, RootFs, RootFsOptions},
};
use loris_testkit::tree::{Ignore, differences, facts};
use rustix::io::Errno;

use crate::{
    assert_nothing_mounted, can_mount_as_root, engines,
    image::{Kind, TestImage, directory, entry, file, three_layers, unpack},
    mount, mount_over_fuse,
};

#[test]
fn a_tree_is_what_was_put_in() {
    for engine in engines("a_tree_is_what_was_put_in") {
        let layers = three_layers();
        let image = TestImage::new(&layers);
        let (unpacked, mountpoint) = (image.mountpoint("unpacked"), image.mountpoint("mounted"));
        unpack(&layers, &unpacked);
        let mounted = mount(engine, &image, &mountpoint);
        let expected = facts(&unpacked, Ignore::default()).unwrap();
        assert!(expected.len() > 30, "{}", expected.len());
        let found = facts(&mountpoint, Ignore::default()).unwrap();
        assert_eq!(differences(&expected, &found, 10), Vec::<String>::new());

        // What the comparison does not look at.
        for path in expected.keys() {
            let (left, right) =
                (unpacked.join(path).symlink_metadata().unwrap(), mountpoint.join(path).symlink_metadata());
            let right = right.unwrap();
            assert_eq!(left.nlink(), right.nlink(), "{}", path.display());
            assert_eq!(right.blksize(), 4096);
            if right.is_file() {
                // EROFS counts whole blocks.
                let unit = if engine == Engine::Fuse { 512 } else { 4096 };
                assert_eq!(right.blocks(), right.size().div_ceil(unit) * unit / 512, "{}", path.display());
            }
            assert_eq!((right.atime(), right.ctime()), (right.mtime(), right.mtime()));
        }
        let whole = rustix::fs::statfs(&mountpoint).unwrap();
        assert_eq!((whole.f_bsize, whole.f_bavail, whole.f_namelen), (4096, 0, 255));
        if engine == Engine::Fuse {
            assert_eq!(whole.f_files, image.merged().inodes().count() as u64);
            assert!(whole.f_blocks * 4096 >= 8 * crate::image::CHUNK as u64);
        }

        assert_eq!(mounted.unmount().unwrap(), Unmounted::Whole);
        assert_nothing_mounted(image.directory.path());
        assert_eq!(fs::read_dir(&mountpoint).unwrap().count(), 0);
    }
}

#[test]
fn layers_under_overlayfs_are_the_merged_tree() {
    if !can_mount_as_root("layers_under_overlayfs_are_the_merged_tree") {
        return;
    }
    let image = TestImage::new(&three_layers());
    let merged_at = image.mountpoint("merged");
    let _merged = mount_over_fuse(&image, image.merged(), &merged_at);
    let mut lower = Vec::new();
    let mut mounts = Vec::new();
    for (number, layer) in image.layers.iter().enumerate() {
        let mountpoint = image.mountpoint(&format!("layer-{number}"));
        let options = FuseOptions::default();
        let tree = image.one_layer(number);
        mounts
            .push(FuseMount::mount(tree, vec![layer.clone()], &mountpoint, &options, image.runtime.handle()).unwrap());
        lower.insert(0, mountpoint);
    }
    let whiteout = image.directory.path().join("layer-1/etc/goes").symlink_metadata().unwrap();
    assert_eq!((whiteout.mode() & 0o170_000, whiteout.rdev()), (0o020_000, 0));

    let overlay_at = image.mountpoint("overlay");
    let options = OverlayOptions { lower, ..OverlayOptions::default() };
    let overlay = OverlayMount::mount(&options, &overlay_at).unwrap();
    // The root is that of the uppermost layer, whether or not it says something of it.
    let ignore = Ignore { root: true, ..Ignore::default() };
    let (expected, found) = (facts(&merged_at, ignore).unwrap(), facts(&overlay_at, ignore).unwrap());
    assert!(found.len() > 30);
    assert_eq!(differences(&expected, &found, 10), Vec::<String>::new());
    drop(overlay);
    drop(mounts);
}

#[test]
fn a_large_directory() {
    for engine in engines("a_large_directory") {
        const COUNT: usize = 5000;
        let mut entries = vec![directory("big")];
        entries.extend((0..COUNT).map(|number| file(format!("big/entry-{number}"), format!("{number}"))));
        let image = TestImage::new(&[entries]);
        let mountpoint = image.mountpoint("mounted");
        let mounted = mount(engine, &image, &mountpoint);
        // Twice: the second listing comes out of the kernel's cache.
        for _ in 0..2 {
            let mut numbers = BTreeSet::new();
            let mut names = BTreeSet::new();
            for entry in fs::read_dir(mountpoint.join("big")).unwrap() {
                let entry = entry.unwrap();
                let metadata = entry.metadata().unwrap();
                assert_eq!(metadata.ino(), entry.ino());
                assert!(entry.file_type().unwrap().is_file());
                assert!(numbers.insert(metadata.ino()), "listed twice: {entry:?}");
                names.insert(entry.file_name().into_string().unwrap());
            }
            assert_eq!(names, (0..COUNT).map(|number| format!("entry-{number}")).collect());
        }
        let dots = std::process::Command::new("ls").arg("-fa").arg(mountpoint.join("big")).output().unwrap();
        let dots = String::from_utf8(dots.stdout).unwrap();
        assert_eq!(dots.lines().take(3).collect::<Vec<_>>(), [".", "..", "entry-0"]);
        assert_eq!(dots.lines().count(), COUNT + 2);
        // A directory that is read in the middle, by its cookie, which EROFS counts in bytes.
        if engine != Engine::Fuse {
            assert_eq!(mounted.unmount().unwrap(), Unmounted::Whole);
            continue;
        }
        let big = fs::File::open(mountpoint.join("big")).unwrap();
        let mut buffer = Vec::with_capacity(1 << 10);
        let mut first = rustix::fs::RawDir::new(&big, buffer.spare_capacity_mut());
        let cookie =
            std::iter::from_fn(|| first.next().map(|entry| entry.unwrap().next_entry_cookie())).nth(10).unwrap();
        rustix::fs::seek(&big, rustix::fs::SeekFrom::Start(cookie)).unwrap();
        let mut again = rustix::fs::RawDir::new(&big, buffer.spare_capacity_mut());
        let name = again.next().unwrap().unwrap().file_name().to_owned();
        let sorted: BTreeSet<_> = (0..COUNT).map(|number| format!("entry-{number}")).collect();
        // The eleventh entry is the ninth behind the dots; the next one comes after it.
        assert_eq!(name.to_str().unwrap(), sorted.iter().nth(9).unwrap());
        drop(big);
        assert_eq!(mounted.unmount().unwrap(), Unmounted::Whole);
    }
}

#[test]
fn extended_attributes() {
    for engine in engines("extended_attributes") {
        let image = TestImage::new(&[vec![
            file("a", "x").xattr("user.b", "beta").xattr("user.a", "").xattr("trusted.overlay.opaque", "y"),
            file("none", "x"),
        ]]);
        let mountpoint = image.mountpoint("mounted");
        let _mounted = mount(engine, &image, &mountpoint);
        let (a, none) = (mountpoint.join("a"), mountpoint.join("none"));
        let value = |path: &Path, name: &str, room: usize| {
            let mut buffer = vec![0; room];
            rustix::fs::lgetxattr(path, name, &mut buffer[..]).map(|length| buffer[..length].to_vec())
        };
        type Case<'a> = (&'a Path, &'a str, usize, Result<&'a [u8], Errno>);
        let cases: [Case<'_>; 8] = [
            (&a, "user.b", 16, Ok(b"beta")),
            (&a, "user.b", 4, Ok(b"beta")),
            (&a, "user.b", 3, Err(Errno::RANGE)),
            (&a, "user.a", 16, Ok(b"")),
            (&a, "user.c", 16, Err(Errno::NODATA)),
            (&a, "trusted.overlay.opaque", 16, Err(Errno::NODATA)),
            (&none, "user.a", 16, Err(Errno::NODATA)),
            (&a, "security.capability", 16, Err(Errno::NODATA)),
        ];
        for (path, name, room, expected) in cases {
            assert_eq!(value(path, name, room), expected.map(<[u8]>::to_vec), "{} {name} {room}", path.display());
        }
        assert_eq!(rustix::fs::lgetxattr_query(&a, "user.b"), Ok(4));
        let list = |path: &Path, room: usize| {
            let mut buffer = vec![0; room];
            rustix::fs::llistxattr(path, &mut buffer[..]).map(|length| buffer[..length].to_vec())
        };
        assert_eq!(list(&a, 64), Ok(b"user.a\0user.b\0".to_vec()));
        assert_eq!(list(&a, 13), Err(Errno::RANGE));
        assert_eq!(rustix::fs::llistxattr_query(&a), Ok(14));
        assert_eq!(list(&none, 64), Ok(Vec::new()));
    }
}

#[test]
fn a_tree_without_extended_attributes() {
    if !can_mount_as_root("a_tree_without_extended_attributes") {
        return;
    }
    let image = TestImage::new(&[vec![file("a", "x")]]);
    let mountpoint = image.mountpoint("mounted");
    let _mounted = mount_over_fuse(&image, image.merged(), &mountpoint);
    let path = mountpoint.join("a");
    // Twice: the kernel does not ask the second time.
    for _ in 0..2 {
        assert_eq!(rustix::fs::lgetxattr_query(&path, "user.a"), Err(Errno::OPNOTSUPP));
        assert_eq!(rustix::fs::llistxattr_query(&path), Err(Errno::OPNOTSUPP));
    }
}

/// Version 2, and a sixteen-bit tag, sixteen bits of permissions and an id for each entry (`linux/posix_acl_xattr.h`).
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&permissions.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

#[test]
fn permissions_are_checked() {
    let test = "permissions_are_checked";
    let Some(setpriv) = loris_testkit::require_peer(test, "setpriv") else { return };
    const NOBODY: u32 = u32::MAX;
    for engine in engines(test) {
        // Owner rw, user 65534 r, group nothing, mask r, others nothing.
        let let_in = acl(&[(1, 6, NOBODY), (2, 4, 65534), (4, 0, NOBODY), (0x10, 4, NOBODY), (0x20, 0, NOBODY)]);
        let image = TestImage::new(&[vec![
            file("public", "public"),
            file("private", "private").mode(0o600),
            file("theirs", "theirs").mode(0o400).owner(65534, 0),
            file("by-list", "by-list").mode(0o640).xattr("system.posix_acl_access", let_in),
            directory("closed").mode(0o700),
            file("closed/file", "x"),
        ]]);
        fs::set_permissions(image.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mountpoint = image.mountpoint("mounted");
        let _mounted = mount(engine, &image, &mountpoint);
        let cases = [("public", true), ("private", false), ("theirs", true), ("by-list", true), ("closed/file", false)];
        for (name, allowed) in cases {
            let output = std::process::Command::new(&setpriv)
                .args(["--reuid=65534", "--regid=65534", "--clear-groups", "cat"])
                .arg(mountpoint.join(name))
                .output()
                .unwrap();
            assert_eq!(output.status.success(), allowed, "{name}: {output:?}");
            assert_eq!(output.stdout, if allowed { name.as_bytes() } else { b"" }, "{name}");
        }
    }
}

#[test]
fn nothing_can_be_written() {
    for engine in engines("nothing_can_be_written") {
        let image =
            TestImage::new(&[vec![directory("d"), file("d/f", "x"), entry("null", Kind::Char(1, 3)).mode(0o666)]]);
        let mountpoint = image.mountpoint("mounted");
        let _mounted = mount(engine, &image, &mountpoint);
        let f = mountpoint.join("d/f");
        let attempts: [(&str, io::Result<()>); 7] = [
            ("write", fs::write(&f, "y")),
            ("append", fs::OpenOptions::new().append(true).open(&f).map(drop)),
            ("create", fs::File::create(mountpoint.join("new")).map(drop)),
            ("remove", fs::remove_file(&f)),
            ("rename", fs::rename(&f, mountpoint.join("g"))),
            ("mkdir", fs::create_dir(mountpoint.join("e"))),
            ("chmod", fs::set_permissions(&f, fs::Permissions::from_mode(0o777))),
        ];
        for (what, result) in attempts {
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem, "{what}");
        }
        // Devices are plain names, unless they are asked for: a container's root file system has some.
        assert_eq!(fs::read(mountpoint.join("null")).unwrap_err().kind(), io::ErrorKind::PermissionDenied, "{engine}");
        let with_devices = image.mountpoint("with-devices");
        let options = RootFsOptions {
            special: loris_mount::Special::ALL,
            ..crate::options(engine, &image, Access::ReadOnly, Some(&with_devices))
        };
        let _with_devices = RootFs::assemble(&image.layers, &options, image.runtime.handle()).unwrap();
        assert_eq!(fs::read(with_devices.join("null")).unwrap(), b"");
        fs::write(with_devices.join("null"), "gone").unwrap();
        let missing = fs::metadata(mountpoint.join("d/missing")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let info = mounts::find(&mountpoint).unwrap().unwrap();
        assert_eq!(info.file_system, if engine == Engine::Fuse { "fuse.loris" } else { "erofs" });
        assert!(info.is_loris() && !info.is_dead(), "{info:?}");
    }
}

#[test]
fn places_that_cannot_be_mounted_at() {
    if !can_mount_as_root("places_that_cannot_be_mounted_at") {
        return;
    }
    let image = TestImage::new(&[vec![file("f", "x")], vec![file("g", "x")]]);
    let (used, plain) = (image.mountpoint("used"), image.directory.path().join("plain"));
    fs::write(&plain, "").unwrap();
    let mounted = mount_over_fuse(&image, image.merged(), &used);
    let attempt = |path: &Path, layers: usize| {
        let options = FuseOptions::default();
        let layers = image.layers[..layers].to_vec();
        FuseMount::mount(image.merged(), layers, path, &options, image.runtime.handle()).unwrap_err()
    };
    assert!(matches!(attempt(&used, 2), MountError::AlreadyMounted { .. }));
    assert!(matches!(attempt(&plain, 2), MountError::NotADirectory { .. }));
    assert!(matches!(attempt(&plain.with_file_name("missing"), 2), MountError::MountPoint { .. }));
    let other = image.mountpoint("other");
    assert!(matches!(attempt(&other, 1), MountError::LayerMissing { layer: 1, layers: 1 }));
    drop(mounted);
    assert_nothing_mounted(image.directory.path());
}

#[test]
fn another_mount_on_top_is_left_alone() {
    for engine in engines("another_mount_on_top_is_left_alone") {
        let image = TestImage::new(&[vec![file("f", "x")]]);
        let mountpoint = image.mountpoint("mounted");
        let mounted = mount(engine, &image, &mountpoint);
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", &mountpoint, "tmpfs", flags, None).unwrap();
        let error = mounted.unmount().unwrap_err();
        assert!(matches!(&error, MountError::Unmount { source, .. } if source.kind() == io::ErrorKind::ResourceBusy));
        assert_eq!(mounts::unmount(&mountpoint).unwrap(), Unmounted::Whole);
        assert_eq!(mounts::unmount(&mountpoint).unwrap(), Unmounted::Whole);
        assert_nothing_mounted(image.directory.path());
    }
}
