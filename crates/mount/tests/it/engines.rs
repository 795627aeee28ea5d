//! The same tree by every engine, used in all the ways in which programs use files.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    process::Command,
};

use loris_mount::{
    MountError,
    engine::{self, Engine},
    erofs::{DetachedErofs, ErofsMount, ErofsOptions, Form, cached_bootstrap},
    mounts::{self, Unmounted},
    overlay::{OverlayMount, OverlayOptions},
    rootfs::{Access, RootFs, unmount_at},
};
use loris_testkit::tree::{Ignore, differences, facts};

use crate::{
    assert_nothing_mounted, engines,
    image::{CHUNK, Entry, TestImage, file, noise, three_layers},
    mount, mount_over_fuse, options,
};

#[test]
fn all_engines_show_the_same() {
    let layers = three_layers();
    let image = TestImage::new(&layers);
    let mut shown: Vec<(Engine, RootFs)> = Vec::new();
    for engine in engines("all_engines_show_the_same") {
        let mounted = mount(engine, &image, &image.mountpoint(engine.name()));
        assert_eq!(mounted.engine(), engine);
        shown.push((engine, mounted));
    }
    let Some(((_, first), others)) = shown.split_first() else { return };
    let expected = facts(first.path(), Ignore::default()).unwrap();
    assert!(expected.len() > 30, "{}", expected.len());
    for (engine, other) in others {
        let found = facts(other.path(), Ignore::default()).unwrap();
        assert_eq!(differences(&expected, &found, 10), Vec::<String>::new(), "{engine}");
    }
}

/// What programs do to read a file.
type Way = fn(&Path) -> io::Result<Vec<u8>>;

fn mapped(path: &Path, flags: i32) -> io::Result<Vec<u8>> {
    let open = File::open(path)?;
    let length = usize::try_from(open.metadata()?.len()).unwrap();
    let protection = if flags == libc::MAP_PRIVATE { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    // SAFETY: a new mapping of a file that is open, at an address that the kernel chooses.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, open.as_raw_fd(), 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping has `length` bytes, lives until `munmap` below, and nobody writes to the file.
    let copy = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), length) }.to_vec();
    if flags == libc::MAP_PRIVATE {
        // SAFETY: as above, and this is the only reference now; the change stays in this process.
        unsafe { start.cast::<u8>().write(!copy[0]) };
    }
    // SAFETY: mapped above, and not used any more.
    assert_eq!(unsafe { libc::munmap(start, length) }, 0);
    Ok(copy)
}

fn sent(path: &Path) -> io::Result<Vec<u8>> {
    let open = File::open(path)?;
    let length = usize::try_from(open.metadata()?.len()).unwrap();
    let mut target = tempfile::tempfile()?;
    let mut count = 0;
    while count < length {
        match rustix::fs::sendfile(&target, &open, None, length - count)? {
            0 => break,
            more => count += more,
        }
    }
    let mut content = Vec::new();
    io::Seek::rewind(&mut target)?;
    target.read_to_end(&mut content)?;
    Ok(content)
}

fn spliced(path: &Path) -> io::Result<Vec<u8>> {
    let open = File::open(path)?;
    let (mut reader, writer) = io::pipe()?;
    let flags = rustix::pipe::SpliceFlags::empty();
    let mut content = Vec::new();
    loop {
        let count = rustix::pipe::splice(&open, None, &writer, None, 16 << 10, flags)?;
        if count == 0 {
            return Ok(content);
        }
        let mut buffer = vec![0; count];
        reader.read_exact(&mut buffer)?;
        content.extend(buffer);
    }
}

fn direct(path: &Path) -> io::Result<Vec<u8>> {
    let open = File::options().read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let length = usize::try_from(open.metadata()?.len()).unwrap();
    // Aligned as direct reads must be.
    let mut buffer = vec![0; length.next_multiple_of(4096) + 4096];
    let start = buffer.as_ptr().align_offset(4096);
    let aligned = &mut buffer[start..start + length.next_multiple_of(4096)];
    let mut count = 0;
    while count < length {
        match open.read_at(&mut aligned[count..], count as u64)? {
            0 => break,
            more => count += more,
        }
    }
    Ok(aligned[..count].to_vec())
}

/// Several reads at a time, by the kernel's own queues.
fn queued(path: &Path) -> io::Result<Vec<u8>> {
    const PIECE: usize = 10_000;
    let open = File::open(path)?;
    let length = usize::try_from(open.metadata()?.len()).unwrap();
    let mut content = vec![0; length];
    let mut ring = io_uring::IoUring::new(64)?;
    let mut pieces: Vec<(usize, &mut [u8])> = content.chunks_mut(PIECE).enumerate().collect();
    let mut left = 0;
    for (number, piece) in &mut pieces {
        let (start, length) = (piece.as_mut_ptr(), u32::try_from(piece.len()).unwrap());
        let read = io_uring::opcode::Read::new(io_uring::types::Fd(open.as_raw_fd()), start, length)
            .offset((*number * PIECE) as u64)
            .build()
            .user_data(*number as u64);
        // SAFETY: file and buffer live until all reads have ended, which is waited for below.
        unsafe { ring.submission().push(&read) }.unwrap();
        left += 1;
    }
    let mut results = vec![0; left];
    while left > 0 {
        ring.submit_and_wait(1)?;
        for entry in ring.completion() {
            results[usize::try_from(entry.user_data()).unwrap()] = entry.result();
            left -= 1;
        }
    }
    for ((_, piece), result) in pieces.iter().zip(results) {
        match usize::try_from(result) {
            Ok(count) => assert_eq!(count, piece.len(), "a short read"),
            Err(_) => return Err(io::Error::from_raw_os_error(-result)),
        }
    }
    Ok(content)
}

/// Whether this machine lets this process have queues; says so where not.
fn can_queue(test: &str) -> bool {
    let ring = io_uring::IoUring::new(1);
    if let Err(error) = &ring {
        loris_testkit::skip(test, &format!("io_uring ({error})"));
    }
    ring.is_ok()
}

#[test]
fn files_are_read_in_every_way() {
    let test = "files_are_read_in_every_way";
    const WAYS: [(&str, Way); 8] = [
        ("read", |path| fs::read(path)),
        ("mapped, shared", |path| mapped(path, libc::MAP_SHARED)),
        ("mapped, private", |path| mapped(path, libc::MAP_PRIVATE)),
        ("sendfile", sent),
        ("splice", spliced),
        ("O_DIRECT", direct),
        ("io_uring", queued),
        ("copy_file_range", |path| {
            let target = tempfile::NamedTempFile::new()?;
            fs::copy(path, target.path())?;
            fs::read(target.path())
        }),
    ];
    let sizes = [1, 4096, 4097, CHUNK + 5, 300_001];
    let can_queue = can_queue(test);
    for engine in engines(test) {
        // An image for each, so that every way meets content that is not here; the second time it is.
        for (name, way) in WAYS.into_iter().filter(|(name, _)| can_queue || *name != "io_uring") {
            let entries = sizes.iter().map(|&size| file(format!("{size}"), noise(size as u64, size))).collect();
            let image = TestImage::new(&[entries]);
            let mountpoint = image.mountpoint("mounted");
            let mounted = mount(engine, &image, &mountpoint);
            for round in 0..2 {
                for size in sizes {
                    let content = match way(&mountpoint.join(size.to_string())) {
                        // EROFS over plain files has no direct reads, as little as tmpfs once had.
                        Err(error) if name == "O_DIRECT" && !matches!(engine, Engine::ErofsLoop | Engine::Fuse) => {
                            assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{engine}");
                            continue;
                        }
                        content => content.unwrap(),
                    };
                    assert!(content == noise(size as u64, size), "{engine}, {name}, {size} bytes, round {round}");
                }
            }
            assert_eq!(mounted.unmount().unwrap(), Unmounted::Whole, "{engine}, {name}");
        }
    }
}

#[test]
fn a_part_of_an_unread_file_is_written_over() {
    for engine in engines("a_part_of_an_unread_file_is_written_over") {
        let image = TestImage::new(&[vec![file("f", noise(1, 200_000)).xattr("user.a", "b").mode(0o640)]]);
        let options = options(engine, &image, Access::Discard, None);
        let rootfs = RootFs::assemble(&image.layers, &options, image.runtime.handle()).unwrap();
        let path = rootfs.path().join("f");
        let open = File::options().write(true).open(&path).unwrap();
        open.write_all_at(b"changed", 100_000).unwrap();
        drop(open);
        let mut expected = noise(1, 200_000);
        expected[100_000..100_007].copy_from_slice(b"changed");
        assert!(fs::read(&path).unwrap() == expected, "{engine}");
        let mut value = [0; 8];
        assert_eq!(rustix::fs::getxattr(&path, "user.a", &mut value[..]), Ok(1));
        assert_eq!(rootfs.unmount().unwrap(), Unmounted::Whole);
        assert_nothing_mounted(image.directory.path());
    }
}

/// EROFS knows a bootstrap again, and does not look into the layers for it.
#[test]
fn a_bootstrap_is_written_once() {
    if engines("a_bootstrap_is_written_once").iter().all(|&engine| engine == Engine::Fuse) {
        return;
    }
    let image = TestImage::new(&three_layers());
    let path = cached_bootstrap(&image.store, &image.layers, Form::Merged).unwrap();
    let written = fs::read(&path).unwrap();
    let time = fs::metadata(&path).unwrap().modified().unwrap();
    assert_eq!(cached_bootstrap(&image.store, &image.layers, Form::Merged).unwrap(), path);
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), time);
    // Another image, another bootstrap.
    let style = loris_format::tree::OpaqueStyle::Trusted;
    let others = [
        cached_bootstrap(&image.store, &image.layers[..2], Form::Merged).unwrap(),
        cached_bootstrap(&image.store, &image.layers[..1], Form::Merged).unwrap(),
        cached_bootstrap(&image.store, &image.layers[..1], Form::Layer(style)).unwrap(),
    ];
    assert!(!others.contains(&path) && others[1] != others[2], "{others:?}");
    // What a power failure leaves of one is not used.
    for length in [0, 100, 1024 + 40, written.len() as u64 - 1] {
        File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
        assert_eq!(cached_bootstrap(&image.store, &image.layers, Form::Merged).unwrap(), path);
        assert!(fs::read(&path).unwrap() == written, "cut to {length}");
    }
    fs::write(&path, vec![0; written.len()]).unwrap();
    cached_bootstrap(&image.store, &image.layers, Form::Merged).unwrap();
    assert!(fs::read(&path).unwrap() == written);
}

#[test]
fn layers_as_erofs_under_overlayfs_are_the_merged_tree() {
    let test = "layers_as_erofs_under_overlayfs_are_the_merged_tree";
    if !engines(test).contains(&Engine::ErofsFuse) {
        return;
    }
    let image = TestImage::new(&three_layers());
    let merged_at = image.mountpoint("merged");
    let _merged = mount_over_fuse(&image, image.merged(), &merged_at);
    let (mut lower, mut layers) = (Vec::new(), Vec::new());
    for (number, layer) in image.layers.iter().enumerate() {
        image.runtime.block_on(loris_lazy::complete(layer)).unwrap();
        let form = Form::Layer(loris_format::tree::OpaqueStyle::Trusted);
        let bootstrap = cached_bootstrap(&image.store, std::slice::from_ref(layer), form).unwrap();
        let at = image.mountpoint(&format!("layer-{number}"));
        let device = layer.directory().join("data");
        layers.push(ErofsMount::mount(&bootstrap, &[device], &at, &ErofsOptions::default()).unwrap());
        lower.insert(0, at);
    }
    let overlay_at = image.mountpoint("overlay");
    let overlay = OverlayMount::mount(&OverlayOptions { lower, ..OverlayOptions::default() }, &overlay_at).unwrap();
    let ignore = Ignore { root: true, ..Ignore::default() };
    let (expected, found) = (facts(&merged_at, ignore).unwrap(), facts(&overlay_at, ignore).unwrap());
    assert!(found.len() > 30);
    assert_eq!(differences(&expected, &found, 10), Vec::<String>::new());
    drop(overlay);
    drop(layers);
    assert_nothing_mounted(&overlay_at);
}

/// Of 500, which is more than overlayfs takes, by the kernel's own count: one for the bootstrap and one for each layer.
#[test]
fn more_layers_than_one_page_of_options_takes() {
    const COUNT: usize = 500;
    let layers: Vec<Vec<Entry>> = (0..COUNT)
        .map(|number| {
            vec![file(format!("only-{number}"), noise(number as u64, 5000)), file("same", format!("{number}"))]
        })
        .collect();
    for engine in engines("more_layers_than_one_page_of_options_takes") {
        let image = TestImage::new(&layers);
        let mountpoint = image.mountpoint("mounted");
        let mounted = mount(engine, &image, &mountpoint);
        assert_eq!(fs::read_dir(&mountpoint).unwrap().count(), COUNT + 1);
        assert_eq!(fs::read_to_string(mountpoint.join("same")).unwrap(), (COUNT - 1).to_string());
        for number in [0, 1, 100, COUNT - 1] {
            let content = fs::read(mountpoint.join(format!("only-{number}"))).unwrap();
            assert!(content == noise(number as u64, 5000), "{engine} {number}");
        }
        assert_eq!(mounted.unmount().unwrap(), Unmounted::Whole);
        assert_nothing_mounted(image.directory.path());
    }
}

/// Nothing of ours is on the way of what is complete, and so nothing is missed when it goes.
#[test]
fn a_complete_image_needs_no_server() {
    for engine in engines("a_complete_image_needs_no_server").into_iter().filter(|&engine| engine != Engine::Fuse) {
        let image = TestImage::new(&[vec![file("f", noise(1, 100_000))], vec![file("g", noise(2, 100_000))]]);
        for layer in &image.layers {
            image.runtime.block_on(loris_lazy::complete(layer)).unwrap();
        }
        image.source.fail();
        let mountpoint = image.mountpoint("mounted");
        let mounted = mount(engine, &image, &mountpoint);
        image.runtime.block_on(async {
            let ended = tokio::time::timeout(std::time::Duration::from_millis(100), mounted.ended()).await;
            assert!(ended.is_err(), "{engine}: it has not ended");
        });
        std::mem::forget(mounted);
        assert!(fs::read(mountpoint.join("f")).unwrap() == noise(1, 100_000), "{engine}");
        assert!(fs::read(mountpoint.join("g")).unwrap() == noise(2, 100_000), "{engine}");
        assert_eq!(unmount_at(&mountpoint).unwrap(), Unmounted::Whole);
        assert_nothing_mounted(image.directory.path());
    }
}

#[test]
fn long_paths_of_devices() {
    if !engines("long_paths_of_devices").contains(&Engine::ErofsFuse) {
        return;
    }
    let image = TestImage::new(&[vec![file("f", noise(1, 10_000))]]);
    image.runtime.block_on(loris_lazy::complete(&image.layers[0])).unwrap();
    let bootstrap = cached_bootstrap(&image.store, &image.layers, Form::Merged).unwrap();
    let deep = image.directory.path().join("d".repeat(200)).join("e".repeat(200));
    fs::create_dir_all(&deep).unwrap();
    let device = deep.join("data");
    fs::copy(image.layers[0].directory().join("data"), &device).unwrap();
    let mountpoint = image.mountpoint("mounted");
    let mounted = ErofsMount::mount(&bootstrap, &[device], &mountpoint, &ErofsOptions::default()).unwrap();
    assert!(fs::read(mountpoint.join("f")).unwrap() == noise(1, 10_000));
    drop(mounted);
    let long = deep.join("image.erofs");
    fs::copy(&bootstrap, &long).unwrap();
    let error = ErofsMount::mount(&long, &[], &mountpoint, &ErofsOptions::default()).unwrap_err();
    assert!(matches!(error, MountError::Refused { .. }) && error.to_string().contains("255 bytes"), "{error}");
}

#[test]
fn what_is_no_bootstrap_is_refused() {
    if !engines("what_is_no_bootstrap_is_refused").contains(&Engine::ErofsFuse) {
        return;
    }
    let image = TestImage::new(&[vec![file("f", noise(1, 10_000))]]);
    let bootstrap = cached_bootstrap(&image.store, &image.layers, Form::Merged).unwrap();
    let mountpoint = image.mountpoint("mounted");
    let zeros = image.directory.path().join("zeros");
    File::create(&zeros).unwrap().write_all(&[0; 8192]).unwrap();
    let missing = [PathBuf::from("/no/such/device")];
    for (source, devices) in [(zeros.as_path(), &[][..]), (Path::new("/no/such/image"), &[]), (&bootstrap, &missing)] {
        let error = DetachedErofs::create(source, devices, &ErofsOptions::default()).unwrap_err();
        assert!(matches!(error, MountError::Refused { what: "EROFS", .. }), "{error}");
    }
    assert_nothing_mounted(&mountpoint);
}

#[test]
fn a_forced_engine_that_is_not_there_is_an_error() {
    if !loris_testkit::require_root("a_forced_engine_that_is_not_there_is_an_error") {
        return;
    }
    // Neither fanotify nor a second kind of file system can be stacked on tmpfs that is an overlay's.
    let image = TestImage::new(&[vec![file("f", "x")]]);
    let report = engine::probe(image.store.root());
    for engine in Engine::ALL {
        let options = options(engine, &image, Access::ReadOnly, None);
        let result = RootFs::assemble(&image.layers, &options, image.runtime.handle());
        match (report.ability(engine).is_present(), result) {
            (true, Ok(rootfs)) => assert_eq!(rootfs.engine(), engine),
            (false, Err(MountError::Engine { engine: refused, .. })) => assert_eq!(refused, engine),
            (false, Err(MountError::Unable { .. })) if engine == Engine::Fuse => {}
            (present, result) => panic!("{engine}: present: {present}, but {result:?}"),
        }
    }
}

/// Mounts that others make with files of ours are told from those of ours by the place of the bootstrap.
#[test]
fn the_kernel_names_the_bootstrap() {
    for engine in engines("the_kernel_names_the_bootstrap").into_iter().filter(|&engine| engine != Engine::Fuse) {
        let image = TestImage::new(&[vec![file("f", "x")]]);
        let mountpoint = image.mountpoint("mounted");
        let mounted = mount(engine, &image, &mountpoint);
        let info = mounts::find(&mountpoint).unwrap().unwrap();
        assert_eq!(info.file_system, "erofs");
        assert!(info.is_loris() && !info.is_fuse() && !info.is_dead(), "{info:?}");
        let listed: BTreeMap<_, _> =
            mounts::list().unwrap().into_iter().map(|mount| (mount.mountpoint, mount.file_system)).collect();
        let here: Vec<_> = listed.keys().filter(|path| path.starts_with(image.directory.path())).collect();
        assert_eq!(here, [&mountpoint], "{engine}: there is one mount for all to see");
        drop(mounted);
    }
}

#[test]
fn another_user_reads() {
    let test = "another_user_reads";
    let Some(setpriv) = loris_testkit::require_peer(test, "setpriv") else { return };
    for engine in engines(test) {
        let image = TestImage::new(&[vec![file("f", noise(1, 100_000))]]);
        let mountpoint = image.mountpoint("mounted");
        let public = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(image.directory.path(), public).unwrap();
        let mounted = mount(engine, &image, &mountpoint);
        let mut command = Command::new(&setpriv);
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "cat"]).arg(mountpoint.join("f"));
        let output = command.output().unwrap();
        assert!(output.status.success() && output.stdout == noise(1, 100_000), "{engine}: {:?}", output.stderr);
        assert_eq!(mounted.unmount().unwrap(), Unmounted::Whole);
    }
}
