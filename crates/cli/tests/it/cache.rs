//! What is kept of images: found by content, bounded, listed, checked, pruned; by several processes at once.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};

use loris_testkit::{registry::FaultRegistry, require_fuse};

use crate::{
    bad_input::name_of,
    harness::{Place, have, ok, run},
    image::{self, BIG},
    layout,
    ours_to_peers::convert,
};

/// The data file of the layer that holds some content, and where it is in it.
fn find(place: &Place, content: &[u8]) -> (PathBuf, u64) {
    let listed = ok(&mut place.loris("cache ls --json")).json();
    for layer in listed.as_array().unwrap() {
        let data = Path::new(layer["directory"].as_str().unwrap()).join("data");
        let bytes = fs::read(&data).unwrap();
        if let Some(at) = bytes.windows(64).position(|window| window == &content[..64]) {
            return (data, at as u64);
        }
    }
    panic!("not in the cache");
}

fn flip(data: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(data).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

/// Bytes of the blocks of everything below a directory.
fn allocated(path: &Path) -> u64 {
    let Ok(metadata) = path.symlink_metadata() else { return 0 };
    let below = fs::read_dir(path).into_iter().flatten().filter_map(Result::ok);
    metadata.blocks() * 512 + below.map(|entry| allocated(&entry.path())).sum::<u64>()
}

#[test]
fn the_cache_is_listed_checked_and_pruned() {
    let test = "the_cache_is_listed_checked_and_pruned";
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    let name = name_of(&converted);
    let cat = |options: &str| run(place.loris(&format!("fs cat{options}")).arg(&name).arg(BIG));
    let expected = cat("").succeeded().stdout;

    let listed = ok(&mut place.loris("cache ls --json")).json();
    let layers = listed.as_array().unwrap();
    assert_eq!(layers.len(), layout::layers(&converted).len());
    assert!(layers.iter().all(|layer| layer["images"][0] == name.as_str() && layer["in_use"] == false));
    let digest = layout::layers(&converted)[0].clone();
    let of = |digest: &str| layers.iter().find(|layer| layer["digest"] == digest).unwrap();
    assert!(of(&digest)["extents_filled"].as_u64().unwrap() >= 3);
    assert!(ok(&mut place.loris("cache ls")).text().contains(&digest[7..19]));
    let du = ok(&mut place.loris("cache du --json")).json();
    assert_eq!(du["total_bytes"], allocated(&place.join("cache")));
    assert_eq!(du["layers"], layers.len());

    // A flipped byte is found by `verify`, and fetched again.
    ok(&mut place.loris("cache verify"));
    let (data, at) = find(&place, &expected);
    flip(&data, at + 100);
    let found = run(&mut place.loris("cache verify")).failed(1, &["1 wrong"]);
    let said = format!("error: layer {digest}: /{BIG} at offset 0:");
    assert!(found.text().starts_with(&said), "{found}");
    assert_eq!(ok(place.loris("cache verify --json").arg(&digest)).json()["faults"], 0);
    assert!(cat("").succeeded().stdout == expected);
    // And by reads that believe nothing.
    flip(&data, at + 200);
    assert!(cat("").succeeded().stdout != expected);
    let paranoid = cat(" --paranoid").succeeded();
    assert!(paranoid.stdout == expected && paranoid.stderr.contains(&format!("/{BIG}")), "{paranoid}");
    assert!(cat("").succeeded().stdout == expected);

    ok(place.loris("cache pin").arg(&digest[..15]));
    let would = ok(&mut place.loris("cache prune --all --dry-run")).text();
    assert!(would.contains("would free") && !would.contains(&digest[7..19]), "{would}");
    ok(&mut place.loris("cache prune --all"));
    let left = ok(&mut place.loris("cache ls --json")).json();
    assert_eq!((left.as_array().unwrap().len(), &left[0]["digest"]), (1, &digest.as_str().into()));
    ok(place.loris("cache unpin").arg(&name));
    ok(&mut place.loris("cache prune --older-than 1h"));
    ok(&mut place.loris("cache prune --keep-bytes 0"));
    assert_eq!(ok(&mut place.loris("cache ls --json")).json().as_array().unwrap().len(), 0);
    run(place.loris("cache pin").arg(&name)).failed(1, &["is no image or layer in the cache"]);
    for usage in ["cache prune --all --keep-bytes 1G", "cache prune --keep-bytes lots", "cache pin"] {
        run(&mut place.loris(usage)).failed(2, &[]);
    }
    place.assert_clean();
}

#[test]
fn a_quota_is_kept_and_what_is_mounted_stays() {
    let test = "a_quota_is_kept_and_what_is_mounted_stays";
    let Some(small) = image::small(test) else { return };
    if !require_fuse(test) {
        return;
    }
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    let name = name_of(&converted);
    let mounted =
        place.try_mount_with("mount --engine fuse --cache-quota 4M", &name).unwrap_or_else(|ran| panic!("{ran}"));
    let mut cat = place.command("cat");
    run(cat.env("LC_ALL", "C").arg(mounted.at.join(BIG))).failed(1, &["No space left on device"]);
    assert!(allocated(&place.join("cache")) <= 4 << 20);
    assert_eq!(fs::read_to_string(mounted.at.join("data/noted")).unwrap(), "noted", "others go on");
    ok(&mut place.loris("cache prune --all"));
    let listed = ok(&mut place.loris("cache ls --json")).json();
    assert_eq!(listed.as_array().unwrap().len(), layout::layers(&converted).len());
    assert!(listed.as_array().unwrap().iter().all(|layer| layer["in_use"] == true));
    // What a verb without a mount wants does not go into what is in use.
    let mut cat = place.loris("fs cat --cache-quota 4M");
    run(cat.arg(&name).arg(BIG)).failed(1, &["quota of 4194304 bytes", "--cache-quota"]);
    mounted.unmount();
    place.assert_clean();
}

/// Two read, one is killed again and again, and a fourth prunes and checks what they read.
#[test]
fn processes_that_prune_check_and_die_disturb_no_reader() {
    let test = "processes_that_prune_check_and_die_disturb_no_reader";
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    let name = name_of(&converted);
    let files = [BIG, "data/zeros", "links/a", "changes", "bin/sh"];
    let cat = || {
        let mut command = place.loris("fs cat");
        command.arg(&name).args(files);
        command
    };
    let expected = ok(&mut cat()).stdout;
    let (reading, pruned) = (AtomicBool::new(true), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| (0..8).for_each(|_| assert!(ok(&mut cat()).stdout == expected, "wrong bytes"))))
            .collect();
        scope.spawn(|| {
            for delay in (0..).map(|round| 5 + round * 37 % 120) {
                let mut victim = cat().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
                std::thread::sleep(Duration::from_millis(delay));
                victim.kill().unwrap();
                victim.wait().unwrap();
                if !reading.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        scope.spawn(|| {
            while reading.load(Ordering::Relaxed) {
                let gone = ok(&mut place.loris("cache prune --all --json")).json();
                pruned.fetch_add(gone["layers"].as_array().unwrap().len(), Ordering::Relaxed);
                ok(&mut place.loris("cache verify"));
            }
        });
        // Also where one has failed, the others must end.
        let ended: Vec<_> = readers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        reading.store(false, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok), "a reader failed");
    });
    assert!(pruned.load(Ordering::Relaxed) > 0, "nothing was ever pruned");
    ok(&mut place.loris("cache verify"));
    place.assert_clean();
}

/// Ten files of an image, in layers of so many files each, of which every fifth is its own.
fn image_of(place: &Place, name: &str, own: u64, layers: &[std::ops::Range<u64>]) -> PathBuf {
    let (layout, bundle) = (place.join(&format!("{name}-source")), place.join(&format!("{name}-bundle")));
    let image = format!("{}:t", layout.display());
    image::umoci(&["init", "--layout", layout.to_str().unwrap()]);
    image::umoci(&["new", "--image", &image]);
    image::umoci(&["unpack", "--image", &image, bundle.to_str().unwrap()]);
    for files in layers {
        for file in files.clone() {
            let seed = if file % 5 == 0 { own + file } else { file };
            fs::write(bundle.join(format!("rootfs/f{file}")), image::noise(seed + 1, 1_500_000)).unwrap();
        }
        image::umoci(&["repack", "--refresh-bundle", "--image", &image, bundle.to_str().unwrap()]);
    }
    convert(place, &layout, name, &[])
}

#[test]
fn of_an_image_of_which_most_is_here_little_crosses_the_link() {
    let test = "of_an_image_of_which_most_is_here_little_crosses_the_link";
    if !loris_testkit::require_root(test) || !have(test, &["umoci"]) {
        return;
    }
    let place = Place::new();
    let one = image_of(&place, "one", 100, &[0..4, 4..10]);
    let two = image_of(&place, "two", 200, &[5..10, 3..5, 0..3]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let registry = runtime.block_on(FaultRegistry::start());
    let push = |layout: &Path, tag: &str| {
        ok(place.loris("push --quiet").arg(layout).arg(registry.reference(tag)));
        registry.reference(tag)
    };
    let images = [push(&one, "one"), push(&two, "two")];
    let read = |image: &str| {
        registry.forget_requests();
        let mut command = place.loris("fs cat");
        let content = ok(command.arg(image).args((0..10).map(|file| format!("f{file}")))).stdout;
        let ranges = registry.requests().into_iter().filter(|request| request.path.contains("/blobs/"));
        let length = |range: &str| {
            let (start, end) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
            end.parse::<u64>().unwrap() + 1 - start.parse::<u64>().unwrap()
        };
        let bytes: u64 = ranges.filter_map(|request| request.header("range").map(length)).sum();
        (content, bytes)
    };
    let size = |layout: &Path| -> u64 {
        let manifest = layout::manifest(layout);
        manifest["layers"].as_array().unwrap().iter().map(|layer| layer["size"].as_u64().unwrap()).sum()
    };
    let (content, bytes) = read(&images[0]);
    assert!(content.len() == 15_000_000 && bytes > 15_000_000);
    let (content, bytes) = read(&images[1]);
    let expected: Vec<u8> =
        (0..10).flat_map(|file| image::noise(if file % 5 == 0 { 200 + file } else { file } + 1, 1_500_000)).collect();
    assert!(content == expected);
    assert!(bytes * 100 <= size(&two) * 22, "{bytes} of {}", size(&two));
    place.assert_clean();
}
