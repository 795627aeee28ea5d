//! A list of what is needed first: its bytes come first, in its order.

use std::{
    fs,
    time::{Duration, Instant},
};

use loris_testkit::{registry::FaultRegistry, require_fuse};

use crate::{
    bad_input::name_of,
    harness::{LIMIT, Place, ok},
    image::{noise, umoci},
    ours_to_peers::convert,
};

/// Longer than what is asked for at once, so that no request is about two files.
const FILE_BYTES: usize = 4_500_000;
/// Files, in an order in which nobody would fetch them by chance.
const ORDER: [usize; 7] = [3, 6, 2, 5, 1, 4, 0];
/// Requests under way for which nobody waits, less one: as far may one overtake another on its way to the server.
const BESIDE: usize = 3;

#[test]
fn files_of_a_list_come_first_and_in_its_order() {
    let test = "files_of_a_list_come_first_and_in_its_order";
    if !loris_testkit::require_root(test) || !require_fuse(test) || loris_testkit::require_peer(test, "umoci").is_none()
    {
        return;
    }
    let place = Place::new();
    let (layout, bundle) = (place.join("layout"), place.join("bundle"));
    let image = format!("{}:t", layout.display());
    umoci(&["init", "--layout", layout.to_str().unwrap()]);
    umoci(&["new", "--image", &image]);
    umoci(&["unpack", "--image", &image, bundle.to_str().unwrap()]);
    for number in 0..ORDER.len() {
        fs::write(bundle.join(format!("rootfs/file-{number}")), noise(number as u64, FILE_BYTES)).unwrap();
    }
    umoci(&["repack", "--image", &image, bundle.to_str().unwrap()]);
    let converted = convert(&place, &layout, "converted", &[]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let registry = runtime.block_on(FaultRegistry::start());
    let reference = registry.reference("t");
    ok(place.loris("push --quiet").arg(name_of(&converted)).arg(&reference));
    registry.forget_requests();

    let list = place.join("list");
    let lines = ORDER.map(|number| format!("/file-{number}\t0-{FILE_BYTES}\n/not-there-{number}\n"));
    fs::write(&list, lines.concat()).unwrap();
    let verb = format!("mount --complete never --prefetch-list {}", list.display());
    let mounted = place.try_mount_with(&verb, &reference).unwrap_or_else(|ran| panic!("{ran}"));
    // The files stand in the blob in the order of their names, and the noise in them does not shrink: from where a long
    // range begins follows which file it is of.
    let files = || -> Vec<usize> {
        let ranges =
            registry.requests().iter().filter_map(|request| range(request.header("range")?)).collect::<Vec<_>>();
        let long = ranges.into_iter().filter(|(start, end)| end - start > FILE_BYTES / 2);
        long.map(|(start, _)| start / FILE_BYTES).collect()
    };
    let end = Instant::now() + LIMIT;
    while files().len() < ORDER.len() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    let files = files();
    for (wanted, number) in ORDER.iter().enumerate() {
        let came = files.iter().position(|file| file == number).unwrap_or(usize::MAX);
        assert!(came.abs_diff(wanted) <= BESIDE, "file {number} came as number {came}: {files:?}");
    }
    for number in ORDER {
        let read = fs::read(mounted.at.join(format!("file-{number}"))).unwrap();
        assert!(read == noise(number as u64, FILE_BYTES), "file-{number}");
    }
    let asked: Vec<_> = registry.requests().iter().filter_map(|request| range(request.header("range")?)).collect();
    let mut starts: Vec<_> = asked.iter().map(|(start, _)| start).collect();
    starts.sort_unstable();
    starts.dedup();
    assert_eq!(starts.len(), asked.len(), "asked for again: {asked:?}");
    mounted.unmount();
}

/// Reads `bytes=FIRST-LAST`.
fn range(header: &str) -> Option<(usize, usize)> {
    let (first, last) = header.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse::<usize>().ok()? + 1))
}
