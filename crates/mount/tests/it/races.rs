//! Things that happen at the same time, and resources that run out, by every engine: the right bytes or an error.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use loris_mount::{
    MountError,
    engine::Engine,
    mounts::Unmounted,
    pager::Pager,
    rootfs::{Access, Paging, RootFs},
};

use crate::{
    assert_nothing_mounted, engines,
    image::{CHUNK, Entry, TestImage, file, noise},
    mount, options,
};

/// Files of some chunks, and what is in them.
fn files(count: usize, chunks: usize) -> (Vec<Entry>, Vec<Vec<u8>>) {
    let contents: Vec<Vec<u8>> = (0..count).map(|number| noise(number as u64 + 1, chunks * CHUNK + number)).collect();
    let entries = contents.iter().enumerate().map(|(number, content)| file(format!("f{number}"), content.clone()));
    (entries.collect(), contents)
}

/// What a reader of a file that may be taken away finds: right bytes, an error, or nothing at all.
fn check(path: &Path, content: &[u8], seed: usize) -> io::Result<()> {
    let open = File::open(path)?;
    for step in 0..4 {
        let at = (seed * 31 + step * 7919) % content.len();
        let mut bytes = vec![0; (content.len() - at).min(3000)];
        open.read_exact_at(&mut bytes, at as u64)?;
        assert!(bytes == content[at..at + bytes.len()], "wrong bytes of {} at {at}", path.display());
    }
    Ok(())
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn unmounting_under_readers() {
    for engine in engines("unmounting_under_readers") {
        let (entries, contents) = files(40, 3);
        let image = TestImage::new(&[entries]);
        let at = image.mountpoint("at");
        let (stop, right) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for reader in 0..6 {
                let (at, contents, stop, right) = (&at, &contents, &stop, &right);
                scope.spawn(move || {
                    let mut turn = reader;
                    while !stop.load(Ordering::Relaxed) {
                        turn += 1;
                        let number = turn * 13 % contents.len();
                        match check(&at.join(format!("f{number}")), &contents[number], turn) {
                            Ok(()) => drop(right.fetch_add(1, Ordering::Relaxed)),
                            Err(error) => assert!(
                                matches!(
                                    error.raw_os_error(),
                                    Some(libc::EIO | libc::ENOENT | libc::ENOTCONN | libc::ECONNABORTED)
                                ),
                                "{engine}: {error}"
                            ),
                        }
                    }
                });
            }
            // Also where this fails, so that the readers end.
            let _stop = StopAtEnd(&stop);
            for _ in 0..8 {
                let mounted = mount(engine, &image, &at);
                std::thread::sleep(Duration::from_millis(15));
                mounted.unmount().unwrap();
            }
        });
        assert!(right.load(Ordering::Relaxed) > 0, "{engine}: nobody read anything");
        assert_nothing_mounted(image.directory.path());
    }
}

#[test]
fn what_was_detached_reads_right_or_not_at_all() {
    for engine in engines("what_was_detached_reads_right_or_not_at_all") {
        let (entries, contents) = files(4, 8);
        let image = TestImage::new(&[entries]);
        let mounted = mount(engine, &image, &image.mountpoint("at"));
        let open: Vec<File> = (0..4).map(|n| File::open(mounted.path().join(format!("f{n}"))).unwrap()).collect();
        let mut byte = [0];
        open[0].read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(mounted.unmount().unwrap(), Unmounted::Detached, "{engine}");
        for (number, open) in open.iter().enumerate() {
            let mut bytes = vec![0; contents[number].len()];
            match open.read_exact_at(&mut bytes, 0) {
                Ok(()) => assert!(bytes == contents[number], "{engine}: wrong bytes of f{number}"),
                Err(error) => assert!(
                    matches!(error.raw_os_error(), Some(libc::EIO | libc::ENOTCONN | libc::ECONNABORTED)),
                    "{engine}: {error}"
                ),
            }
        }
        assert_nothing_mounted(image.directory.path());
    }
}

/// One is put up while the other one is taken down: of the same layers, at the same directory or beside it, by one pager or
/// by two. The marks of the one must not go with the other.
#[test]
fn mounting_while_unmounting() {
    for engine in engines("mounting_while_unmounting") {
        let (entries, contents) = files(30, 2);
        let image = TestImage::new(&[entries]);
        let shared = options(engine, &image, Access::ReadOnly, None).pager;
        let shared = match (engine, shared) {
            (Engine::Fanotify, Paging::Own(own)) => {
                Some(Paging::Shared(Arc::new(Pager::start(&own, image.runtime.handle()).unwrap())))
            }
            _ => None,
        };
        let (same, refused) = (image.mountpoint("same"), AtomicUsize::new(0));
        for pager in [Some(None), shared.map(Some)].into_iter().flatten() {
            std::thread::scope(|scope| {
                for worker in 0..4 {
                    let (pager, image, same, contents, refused) = (pager.clone(), &image, &same, &contents, &refused);
                    // Two of them meet at one directory, and the others have one of their own.
                    let own = image.mountpoint(&format!("own-{worker}-{}", pager.is_some()));
                    scope.spawn(move || {
                        for turn in 0..6 {
                            let at = if worker < 2 { same } else { &own };
                            let mut options = options(engine, image, Access::ReadOnly, Some(at));
                            if let Some(pager) = &pager {
                                options.pager = pager.clone();
                            }
                            let mounted = match RootFs::assemble(&image.layers, &options, image.runtime.handle()) {
                                Ok(mounted) => mounted,
                                // The other one stands there.
                                Err(MountError::AlreadyMounted { .. }) if worker < 2 => {
                                    refused.fetch_add(1, Ordering::Relaxed);
                                    continue;
                                }
                                Err(error) => panic!("{engine}: {error}"),
                            };
                            for step in 0..5 {
                                let number = (worker * 7 + turn * 5 + step) % contents.len();
                                let read = check(&at.join(format!("f{number}")), &contents[number], turn);
                                // At a directory that is shared, the other one may have stood above, and be gone.
                                match read {
                                    Err(error) if worker < 2 => assert!(
                                        matches!(error.raw_os_error(), Some(libc::EIO | libc::ENOENT | libc::ENOTCONN)),
                                        "{engine}: {error}"
                                    ),
                                    read => read.unwrap(),
                                }
                            }
                            drop(mounted);
                        }
                    });
                }
            });
        }
        println!("{engine}: {} met another one", refused.load(Ordering::Relaxed));
        assert_nothing_mounted(image.directory.path());
    }
}

/// The same layer in two mounts, which come and go by themselves: once by one pager, once by two.
#[test]
fn two_mounts_of_one_layer() {
    for engine in engines("two_mounts_of_one_layer") {
        let (entries, contents) = files(20, 4);
        let image = TestImage::new(&[entries]);
        let shared = options(engine, &image, Access::ReadOnly, None).pager;
        let shared = match (engine, shared) {
            (Engine::Fanotify, Paging::Own(own)) => {
                Some(Paging::Shared(Arc::new(Pager::start(&own, image.runtime.handle()).unwrap())))
            }
            _ => None,
        };
        for pager in [Some(None), shared.map(Some)].into_iter().flatten() {
            let mount_at = |name: &str| {
                let mut options = options(engine, &image, Access::ReadOnly, Some(&image.mountpoint(name)));
                if let Some(pager) = &pager {
                    options.pager = pager.clone();
                }
                RootFs::assemble(&image.layers, &options, image.runtime.handle()).unwrap()
            };
            let suffix = if pager.is_some() { "shared" } else { "own" };
            let (one, other) = (mount_at(&format!("one-{suffix}")), mount_at(&format!("other-{suffix}")));
            std::thread::scope(|scope| {
                for at in [one.path(), other.path()] {
                    let contents = &contents;
                    scope.spawn(move || {
                        for (number, content) in contents.iter().enumerate().take(10) {
                            check(&at.join(format!("f{number}")), content, number).unwrap();
                        }
                    });
                }
            });
            one.unmount().unwrap();
            for (number, content) in contents.iter().enumerate() {
                check(&other.path().join(format!("f{number}")), content, number).unwrap();
            }
            other.unmount().unwrap();
        }
        assert_nothing_mounted(image.directory.path());
    }
}

#[test]
fn a_data_file_that_a_stranger_deleted() {
    for engine in engines("a_data_file_that_a_stranger_deleted") {
        let (entries, contents) = files(6, 3);
        let image = TestImage::new(&[entries]);
        let mounted = mount(engine, &image, &image.mountpoint("at"));
        check(&mounted.path().join("f0"), &contents[0], 1).unwrap();
        fs::remove_file(image.layers[0].directory().join("data")).unwrap();
        for (number, content) in contents.iter().enumerate() {
            check(&mounted.path().join(format!("f{number}")), content, number).unwrap();
        }
        mounted.unmount().unwrap();
    }
}

/// A file system of its own for the store, so small that it is full before everything is there.
struct Small {
    at: tempfile::TempDir,
    mounted: bool,
}

impl Small {
    fn new(mebibytes: u64) -> Option<Self> {
        let at = tempfile::tempdir().unwrap();
        let (image, directory) = (at.path().join("image"), at.path().join("store"));
        File::create(&image).unwrap().set_len(mebibytes << 20).unwrap();
        fs::create_dir(&directory).unwrap();
        let done = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        let made = done(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-m", "0"]).arg(&image));
        let mounted = made && done(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&directory));
        mounted.then_some(Self { at, mounted })
    }

    fn path(&self) -> std::path::PathBuf {
        self.at.path().join("store")
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        if self.mounted {
            let end = Instant::now() + Duration::from_secs(10);
            while rustix::mount::unmount(self.path(), rustix::mount::UnmountFlags::empty()).is_err() {
                if Instant::now() > end {
                    let _ = rustix::mount::unmount(self.path(), rustix::mount::UnmountFlags::DETACH);
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

#[test]
fn a_full_disk_is_an_error_and_no_zeros() {
    let test = "a_full_disk_is_an_error_and_no_zeros";
    for engine in engines(test) {
        let Some(small) = Small::new(8) else {
            loris_testkit::skip(test, "a loop device with ext4");
            return;
        };
        let (entries, contents) = files(40, 40);
        let image = TestImage::new_in(&[entries], &small.path().join("store"));
        let mounted = mount(engine, &image, &image.mountpoint("at"));
        let mut failed = 0;
        for (number, content) in contents.iter().enumerate() {
            match fs::read(mounted.path().join(format!("f{number}"))) {
                Ok(read) => assert!(read == *content, "{engine}: wrong bytes of f{number}"),
                Err(error) => {
                    assert!(matches!(error.raw_os_error(), Some(libc::EIO | libc::ENOSPC)), "{engine}: {error}");
                    failed += 1;
                }
            }
        }
        assert!(failed > 0 && failed < contents.len(), "{engine}: {failed} of {} failed", contents.len());
        mounted.unmount().unwrap();
        drop(image);
    }
}

#[test]
fn readers_in_a_small_memory_cgroup() {
    let test = "readers_in_a_small_memory_cgroup";
    let Some(group) = MemoryGroup::new(24 << 20) else {
        loris_testkit::skip(test, "a memory cgroup that can be made");
        return;
    };
    for engine in engines(test) {
        let (entries, contents) = files(30, 100);
        let image = TestImage::new(&[entries]);
        let mounted = mount(engine, &image, &image.mountpoint("at"));
        // More than the group may have in its page cache.
        let expected: usize = contents.iter().map(Vec::len).sum();
        assert!(expected > 40 << 20);
        let script = format!("echo $$ > {}/cgroup.procs && cat f* | cksum", group.0.display());
        let output = Command::new("sh").args(["-c", &script]).current_dir(mounted.path()).output().unwrap();
        assert!(output.status.success(), "{engine}: {}", String::from_utf8_lossy(&output.stderr));
        let direct = {
            let mut names: Vec<usize> = (0..contents.len()).collect();
            // As the shell sorts names.
            names.sort_by_key(|number| format!("f{number}"));
            let all: Vec<u8> = names.iter().flat_map(|number| contents[*number].iter().copied()).collect();
            let path = image.directory.path().join("all");
            fs::write(&path, all).unwrap();
            Command::new("cksum").stdin(File::open(path).unwrap()).output().unwrap()
        };
        assert_eq!(output.stdout, direct.stdout, "{engine}");
        mounted.unmount().unwrap();
    }
}

/// A memory cgroup of either version.
struct MemoryGroup(std::path::PathBuf);

impl MemoryGroup {
    fn new(limit: u64) -> Option<Self> {
        for (base, file) in [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")] {
            let path = Path::new(base).join(format!("loris-test-{}", std::process::id()));
            if !Path::new(base).join("cgroup.procs").exists() || fs::create_dir(&path).is_err() {
                continue;
            }
            let group = Self(path);
            if fs::write(group.0.join(file), limit.to_string()).is_ok() {
                return Some(group);
            }
        }
        None
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let end = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.0).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
