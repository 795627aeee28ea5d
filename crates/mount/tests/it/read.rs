//! Content through a mount: right or an error, whatever happens beside it.

use std::{
    collections::BTreeMap, fs, io, os::unix::fs::FileExt as _, path::Path, process::Command, sync::mpsc, thread,
    time::Duration,
};

use loris_mount::mounts::Unmounted;

use crate::{
    assert_nothing_mounted, engines,
    image::{CHUNK, TestImage, directory, file, noise},
    mount,
};

fn is_eio(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EIO)
}

#[test]
fn a_failing_source_is_an_error_and_then_forgotten() {
    for engine in engines("a_failing_source_is_an_error_and_then_forgotten") {
        let image = TestImage::new(&[vec![file("a", noise(1, 50_000)), file("b", noise(2, 50_000))]]);
        let mountpoint = image.mountpoint("mounted");
        let _mounted = mount(engine, &image, &mountpoint);
        assert_eq!(fs::read(mountpoint.join("a")).unwrap(), noise(1, 50_000));
        image.source.fail();
        let error = fs::read(mountpoint.join("b")).unwrap_err();
        assert!(is_eio(&error), "{error}");
        assert_eq!(fs::read(mountpoint.join("a")).unwrap(), noise(1, 50_000), "what is here is served");
        image.source.heal();
        assert_eq!(fs::read(mountpoint.join("b")).unwrap(), noise(2, 50_000));
    }
}

#[test]
fn a_flipped_byte_fails_its_file_alone() {
    for engine in engines("a_flipped_byte_fails_its_file_alone") {
        // Too large to come along with the table of contents.
        const LENGTH: usize = 200_000;
        let image = TestImage::new(&[vec![
            file("before", noise(1, LENGTH)),
            file("bad", noise(2, LENGTH)),
            file("after", noise(3, LENGTH)),
        ]]);
        let mountpoint = image.mountpoint("mounted");
        let _mounted = mount(engine, &image, &mountpoint);
        // The blob holds its bytes as they are.
        let bad = noise(2, LENGTH);
        image.source.fault(move |_, bytes| {
            let mut bytes = bytes.to_vec();
            if let Some(place) = bytes.windows(100).position(|window| window == &bad[..100]) {
                bytes[place + 50] ^= 1;
            }
            Ok(bytes.into())
        });
        for (name, seed, right) in [("before", 1, true), ("bad", 2, false), ("after", 3, true), ("bad", 2, false)] {
            match fs::read(mountpoint.join(name)) {
                Ok(content) => assert!(right && content == noise(seed, LENGTH), "{name}"),
                Err(error) => assert!(!right && is_eio(&error), "{name}: {error}"),
            }
        }
    }
}

#[test]
fn unmounting_does_not_wait_for_a_read() {
    for engine in engines("unmounting_does_not_wait_for_a_read") {
        let image = TestImage::new(&[vec![file("here", "here"), file("slow", noise(1, 50_000))]]);
        let mountpoint = image.mountpoint("mounted");
        let mounted = mount(engine, &image, &mountpoint);
        let here = fs::File::open(mountpoint.join("here")).unwrap();
        let mut buffer = [0; 8];
        assert_eq!(here.read_at(&mut buffer, 0).unwrap(), 4);
        image.source.hold();
        let slow = mountpoint.join("slow");
        let (sender, result) = mpsc::channel();
        let reader = thread::spawn(move || sender.send(fs::read(slow)).unwrap());
        image.runtime.block_on(image.source.held(1));
        assert_eq!(mounted.unmount().unwrap(), Unmounted::Detached);
        assert_nothing_mounted(image.directory.path());
        let error = result.recv_timeout(Duration::from_secs(20)).unwrap().unwrap_err();
        assert!(is_eio(&error), "{error}");
        reader.join().unwrap();
        assert_eq!(here.read_at(&mut buffer, 0).unwrap(), 4, "what is here can still be read");
        image.source.release();
    }
}

#[test]
fn a_runtime_that_is_gone_is_an_error() {
    for engine in engines("a_runtime_that_is_gone_is_an_error") {
        // More than one file that is left, which would be fetched to be done with the layer.
        let others = ["g", "h", "i", "j", "k"].map(|name| file(name, name));
        let image = TestImage::new(&[[vec![file("f", "x")], others.to_vec()].concat()]);
        let mountpoint = image.mountpoint("mounted");
        let mounted = mount(engine, &image, &mountpoint);
        assert_eq!(fs::read(mountpoint.join("f")).unwrap(), b"x");
        let TestImage { runtime, directory, .. } = image;
        runtime.shutdown_background();
        assert!(is_eio(&fs::read(mountpoint.join("g")).unwrap_err()));
        assert_eq!(fs::read(mountpoint.join("f")).unwrap(), b"x");
        drop(mounted);
        assert_nothing_mounted(directory.path());
    }
}

#[test]
fn many_readers_at_random() {
    for engine in engines("many_readers_at_random") {
        const FILES: u64 = 6;
        let contents: BTreeMap<_, _> = (0..FILES)
            .map(|number| (format!("file-{number}"), noise(number + 1, 300_000 + number as usize * 1111)))
            .collect();
        let image = TestImage::new(&[contents.iter().map(|(name, content)| file(name, content.clone())).collect()]);
        let mountpoint = image.mountpoint("mounted");
        let mounted = mount(engine, &image, &mountpoint);
        thread::scope(|scope| {
            for reader in 0..8 {
                let (contents, mountpoint) = (&contents, &mountpoint);
                scope.spawn(move || {
                    let places = noise(1000 + reader, 4 * 300);
                    for place in places.chunks(4) {
                        let (name, content) = contents.iter().nth(usize::from(place[0]) % contents.len()).unwrap();
                        let at = usize::from(u16::from_le_bytes([place[1], place[2]])) * 5 % content.len();
                        let mut buffer = vec![0; usize::from(place[3]) * 200 + 1];
                        let open = fs::File::open(mountpoint.join(name)).unwrap();
                        let length = open.read_at(&mut buffer, at as u64).unwrap();
                        let expected = &content[at..content.len().min(at + buffer.len())];
                        assert!(buffer[..length] == *expected, "{name} at {at}: {length} bytes");
                    }
                });
            }
        });
        assert_eq!(mounted.unmount().unwrap(), Unmounted::Whole);
    }
}

#[test]
fn ends_and_edges() {
    for engine in engines("ends_and_edges") {
        let sizes = [1, CHUNK / 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5];
        let entries = sizes.iter().map(|&size| file(format!("{size}"), noise(size as u64, size))).collect();
        let image = TestImage::new(&[entries]);
        let mountpoint = image.mountpoint("mounted");
        let _mounted = mount(engine, &image, &mountpoint);
        for size in sizes {
            let content = noise(size as u64, size);
            // The second round is answered by this process again, out of the data file.
            for direct in [false, true] {
                let open = fs::File::open(mountpoint.join(size.to_string())).unwrap();
                if direct {
                    rustix::fs::fadvise(&open, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                }
                let edges = [0, 1, size / 2, size - 1, size, size + 1, CHUNK - 1, CHUNK, 2 * CHUNK - 3];
                for (at, length) in edges.iter().flat_map(|&at| [1, 100, CHUNK, 4 * CHUNK].map(|length| (at, length))) {
                    let mut buffer = vec![0xaa; length];
                    let count = open.read_at(&mut buffer, at as u64).unwrap();
                    let expected = content.get(at..size.min(at + length)).unwrap_or_default();
                    assert!(buffer[..count] == *expected, "{size} bytes, at {at}, {length}: {count}");
                }
                let hole = rustix::fs::seek(&open, rustix::fs::SeekFrom::Hole(0)).unwrap();
                assert_eq!(hole, size as u64, "the only hole is behind the end");
            }
        }
    }
}

#[test]
fn a_data_file_cut_by_a_stranger() {
    for engine in engines("a_data_file_cut_by_a_stranger") {
        let image = TestImage::new(&[vec![file("f", noise(1, 100_000))]]);
        let mountpoint = image.mountpoint("mounted");
        let _mounted = mount(engine, &image, &mountpoint);
        let path = mountpoint.join("f");
        assert_eq!(fs::read(&path).unwrap(), noise(1, 100_000));
        image.layers[0].data_file().set_len(0).unwrap();
        let open = fs::File::open(&path).unwrap();
        rustix::fs::fadvise(&open, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        drop(open);
        match fs::read(&path) {
            Ok(content) => assert!(content == noise(1, 100_000), "not what was put in"),
            Err(error) => assert!(is_eio(&error), "{error}"),
        }
    }
}

#[test]
fn programs_run_and_map() {
    for engine in engines("programs_run_and_map") {
        let echo = fs::read("/bin/echo").unwrap();
        let image = TestImage::new(&[vec![
            directory("bin"),
            file("bin/echo", echo).mode(0o755),
            file("mapped", noise(5, 200_000)),
        ]]);
        let mountpoint = image.mountpoint("mounted");
        let mounted = mount(engine, &image, &mountpoint);
        // Cold, then warm.
        for _ in 0..2 {
            let output = Command::new(mountpoint.join("bin/echo")).arg("lazily").output().unwrap();
            assert_eq!(output.stdout, b"lazily\n", "{output:?}");
        }
        let content = noise(5, 200_000);
        for flags in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
            assert_mapped(&mountpoint.join("mapped"), flags, &content);
        }
        assert_eq!(mounted.unmount().unwrap(), Unmounted::Whole);
    }
}

fn assert_mapped(path: &Path, flags: i32, content: &[u8]) {
    use std::os::fd::AsRawFd as _;

    let open = fs::File::open(path).unwrap();
    // SAFETY: a new mapping of a file that is open, at an address that the kernel chooses.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), content.len(), libc::PROT_READ, flags, open.as_raw_fd(), 0) };
    assert_ne!(start, libc::MAP_FAILED);
    // SAFETY: the mapping has `content.len()` bytes, lives until `munmap` below, and nobody writes to the file.
    let mapped = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), content.len()) };
    // From the end, so that pages come by faults and not by readahead.
    for place in (0..content.len()).rev().step_by(5000) {
        assert_eq!(mapped[place], content[place], "at {place}");
    }
    // SAFETY: mapped above, and not used any more.
    assert_eq!(unsafe { libc::munmap(start, content.len()) }, 0);
}
