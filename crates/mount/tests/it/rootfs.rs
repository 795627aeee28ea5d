//! Root file systems: assembled, written to, taken down by whom it may be.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path, process::Command};

use loris_mount::{
    MountError,
    engine::Engine,
    mounts::Unmounted,
    rootfs::{Access, RootFs, RootFsOptions, unmount_at},
};
use loris_testkit::tree::{Ignore, differences, facts};

use crate::{
    assert_nothing_mounted, engines,
    image::{TestImage, directory, file, noise, three_layers},
    options,
};

fn assemble(image: &TestImage, options: &RootFsOptions) -> RootFs {
    RootFs::assemble(&image.layers, options, image.runtime.handle()).unwrap()
}

/// Nothing is left of a root file system: no mount, no scratch directory.
fn assert_nothing_left(image: &TestImage) {
    assert_nothing_mounted(image.directory.path());
    let left: Vec<_> = fs::read_dir(image.directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("loris"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

fn can_overlay(test: &str) -> bool {
    let overlay = loris_mount::probe::probe().overlay;
    if !overlay.is_present() {
        loris_testkit::skip(test, &overlay.to_string());
    }
    overlay.is_present()
}

#[test]
fn read_only_and_writable_show_the_same() {
    let test = "read_only_and_writable_show_the_same";
    if !can_overlay(test) {
        return;
    }
    for engine in engines(test) {
        let image = TestImage::new(&three_layers());
        let given = image.mountpoint("given");
        let read_only = assemble(&image, &options(engine, &image, Access::ReadOnly, Some(&given)));
        assert_eq!(read_only.path(), given);
        let writable = assemble(&image, &options(engine, &image, Access::Discard, None));
        // The root's time is that of the upper directory.
        let ignore = Ignore { directory_times: false, root: true, ..Ignore::default() };
        let (left, right) = (facts(read_only.path(), ignore).unwrap(), facts(writable.path(), ignore).unwrap());
        assert_eq!(differences(&left, &right, 10), Vec::<String>::new());
        let root = fs::metadata(writable.path()).unwrap();
        assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o751, 3, 4));
        assert_eq!(writable.unmount().unwrap(), Unmounted::Whole);
        assert_eq!(read_only.unmount().unwrap(), Unmounted::Whole);
        assert_nothing_left(&image);
    }
}

#[test]
fn changes_are_discarded_or_kept() {
    let test = "changes_are_discarded_or_kept";
    if !can_overlay(test) {
        return;
    }
    for engine in engines(test) {
        let image = TestImage::new(&[vec![directory("d"), file("d/big", noise(1, 100_000)), file("d/gone", "x")]]);
        let kept = image.directory.path().join("kept");
        for (access, stays) in [(Access::Discard, false), (Access::Keep(kept.clone()), true)] {
            let options = options(engine, &image, access, Some(&image.mountpoint(&format!("at-{stays}"))));
            for round in 0..2 {
                let rootfs = assemble(&image, &options);
                let big = rootfs.path().join("d/big");
                let expected = if round == 1 && stays { 100_004 } else { 100_000 };
                assert_eq!(fs::metadata(&big).unwrap().len(), expected);
                assert_eq!(rootfs.path().join("d/gone").exists(), round == 0 || !stays);
                if round == 0 {
                    // Copies up what was never read.
                    let mut open = fs::OpenOptions::new().append(true).open(&big).unwrap();
                    std::io::Write::write_all(&mut open, b"more").unwrap();
                    drop(open);
                    fs::remove_file(rootfs.path().join("d/gone")).unwrap();
                    fs::rename(rootfs.path().join("d/big"), rootfs.path().join("d/moved")).unwrap();
                    fs::rename(rootfs.path().join("d/moved"), rootfs.path().join("d/big")).unwrap();
                }
                let content = fs::read(&big).unwrap();
                assert!(content[..100_000] == noise(1, 100_000), "{stays} {round}");
                drop(rootfs);
                assert_nothing_left(&image);
            }
        }
        assert!(kept.join("upper/d/big").exists());
    }
}

#[test]
fn another_process_takes_it_down() {
    let test = "another_process_takes_it_down";
    if !can_overlay(test) {
        return;
    }
    for engine in engines(test) {
        let image = TestImage::new(&[vec![file("f", "x")]]);
        for access in [Access::ReadOnly, Access::Discard] {
            let mountpoint = image.mountpoint(&format!("{access:?}"));
            let rootfs = assemble(&image, &options(engine, &image, access, Some(&mountpoint)));
            assert_eq!(unmount_at(&mountpoint).unwrap(), Unmounted::Whole);
            assert_nothing_mounted(image.directory.path());
            image.runtime.block_on(rootfs.ended());
            // Its owner tidies up.
            assert_eq!(rootfs.unmount().unwrap(), Unmounted::Absent);
            assert_nothing_left(&image);
            assert!(matches!(unmount_at(&mountpoint), Err(MountError::NotOurs { .. })));
        }
    }
}

#[test]
fn what_is_mounted_inside_is_not_removed() {
    let test = "what_is_mounted_inside_is_not_removed";
    if !can_overlay(test) {
        return;
    }
    for engine in engines(test) {
        let image = TestImage::new(&[vec![directory("volume")]]);
        let precious = image.mountpoint("precious");
        fs::write(precious.join("file"), "precious").unwrap();
        let rootfs = assemble(&image, &options(engine, &image, Access::Discard, None));
        rustix::mount::mount_bind(&precious, rootfs.path().join("volume")).unwrap();
        assert_eq!(fs::read(rootfs.path().join("volume/file")).unwrap(), b"precious");
        assert_eq!(rootfs.unmount().unwrap(), Unmounted::Detached);
        assert_eq!(fs::read(precious.join("file")).unwrap(), b"precious");
        assert_nothing_left(&image);
    }
}

/// Mounts and dies without a word.
#[test]
fn child_that_dies() {
    let Some(base) = std::env::var_os("LORIS_TEST_DIES_AT") else { return };
    let base = Path::new(&base);
    let engine = std::env::var("LORIS_TEST_ENGINES").unwrap().parse().unwrap();
    let image = TestImage::new(&[vec![file("f", "x"), file("unread", noise(1, 100_000))]]);
    for (name, access) in [("read-only", Access::ReadOnly), ("writable", Access::Discard)] {
        let options =
            RootFsOptions { scratch: base.to_owned(), ..options(engine, &image, access, Some(&base.join(name))) };
        let rootfs = assemble(&image, &options);
        assert_eq!(fs::read(rootfs.path().join("f")).unwrap(), b"x");
        std::mem::forget(rootfs);
    }
    fs::remove_dir_all(image.directory.path()).unwrap();
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_dead_mount_is_named_and_removed() {
    let test = "a_dead_mount_is_named_and_removed";
    if !can_overlay(test) {
        return;
    }
    for engine in engines(test) {
        let image = TestImage::new(&[vec![file("f", "x")]]);
        let (read_only, writable) = (image.mountpoint("read-only"), image.mountpoint("writable"));
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "rootfs::child_that_dies", "--nocapture"])
            .env("LORIS_TEST_DIES_AT", image.directory.path())
            .env("LORIS_TEST_ENGINES", engine.name())
            // Not a pipe: its keepers would hold the other end for as long as something is mounted.
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(!child.success(), "{child:?}");
        for mountpoint in [&read_only, &writable] {
            // Right, where a process or the kernel still knows it; never zeros.
            match fs::read(mountpoint.join("unread")) {
                Ok(content) => assert!(content == noise(1, 100_000), "{engine}"),
                Err(error) => {
                    assert!(matches!(error.raw_os_error(), Some(libc::EIO | libc::ENOTCONN)), "{engine}: {error}");
                }
            }
        }
        let again = options(engine, &image, Access::ReadOnly, Some(&read_only));
        let error = RootFs::assemble(&image.layers, &again, image.runtime.handle()).unwrap_err();
        if engine == Engine::Fuse {
            assert!(matches!(error, MountError::DeadMount { .. }), "{error}");
            assert!(error.to_string().contains(&format!("umount -l {}", read_only.display())), "{error}");
        } else {
            assert!(matches!(error, MountError::AlreadyMounted { .. }), "{error}");
        }

        unmount_at(&read_only).unwrap();
        unmount_at(&writable).unwrap();
        assert_nothing_left(&image);
        let rootfs = assemble(&image, &again);
        assert_eq!(fs::read(rootfs.path().join("f")).unwrap(), b"x");
    }
}

/// Both orders: a file before the marker below it, and after it.
#[test]
fn a_marker_below_a_file_hides_nothing() {
    if !loris_testkit::require_root("a_marker_below_a_file_hides_nothing") {
        return;
    }
    let file = [&crate::image::header("a", 1)[..], b"x", &[0; 511]].concat();
    let markers = [crate::image::header("a/.wh.x", 0), crate::image::header("a/.wh..wh..opq", 0)].concat();
    for archive in [[&file[..], &markers].concat(), [&markers[..], &file].concat()] {
        let archive = [&archive[..], &[0; 1024]].concat();
        let directory = tempfile::tempdir().unwrap();
        let limits = loris_format::limits::Limits::default();
        let style = loris_format::tree::OpaqueStyle::Trusted;
        loris_mount::unpack::unpack_layer(&mut &archive[..], directory.path(), style, &limits).unwrap();
        assert_eq!(fs::read(directory.path().join("a")).unwrap(), b"x");
    }
}
