//! The pager without any file system over it: whoever opens a marked data file is its reader.

use std::{fs::File, io::Read as _, os::unix::fs::FileExt as _, path::PathBuf, time::Duration};

use loris_format::position::DataOffset;
use loris_lazy::LazyLayer;
use loris_mount::pager::{OnDeath, Pager, PagerOptions, group::Group};

use crate::image::{CHUNK, TestImage, directory, file, noise};

/// A pager whose keeper, should it come to that, has nothing to take down.
pub fn pager(image: &TestImage, patience: Duration) -> Pager {
    Pager::start(&pager_options(image, patience), image.runtime.handle()).unwrap()
}

fn pager_options(image: &TestImage, patience: Duration) -> PagerOptions {
    PagerOptions {
        patience,
        register: image.directory.path().join("mounts"),
        on_death: OnDeath::Clean(vec!["/bin/true".into()]),
        keeper: Some(PathBuf::from(env!("CARGO_BIN_EXE_mount-keeper"))),
        log: None,
        note: None,
    }
}

/// Whether data files of this machine's temporary folder can be marked; says so where not.
pub fn can_page(test: &str) -> bool {
    if !loris_testkit::require_root(test) {
        return false;
    }
    let file = tempfile::tempfile().unwrap();
    let marked = Group::new().and_then(|group| group.mark(&file));
    if let Err(error) = &marked {
        loris_testkit::skip(test, &format!("pre-content events of fanotify ({error})"));
    }
    marked.is_ok()
}

fn one_layer() -> (TestImage, Vec<u8>) {
    let content = noise(7, 40 * CHUNK + 11);
    let image = TestImage::new(&[vec![directory("d"), file("d/big", content.clone()), file("d/small", "small")]]);
    (image, content)
}

/// Opens the data file as the kernel does when it mounts: after it was marked.
fn reader(layer: &LazyLayer) -> File {
    File::open(layer.directory().join("data")).unwrap()
}

fn data_of(layer: &LazyLayer, path: &str) -> u64 {
    let node = layer.index().lookup(path.as_bytes()).unwrap();
    match &layer.index().node(node).kind {
        loris_format::index::NodeKind::Regular(content) => content.data.0,
        other => panic!("{other:?}"),
    }
}

#[test]
fn readers_wait_until_their_bytes_are_there() {
    if !can_page("readers_wait_until_their_bytes_are_there") {
        return;
    }
    let (image, content) = one_layer();
    let layer = &image.layers[0];
    let pager = pager(&image, Duration::from_secs(10));
    let watch = pager.watch(&image.layers).unwrap();
    let file = reader(layer);
    let at = data_of(layer, "d/big");
    assert_eq!(layer.statistics().extents_filled, 0);
    assert!(is_marked(layer));
    let mut bytes = vec![0; 100];
    file.read_exact_at(&mut bytes, at + 3 * CHUNK as u64).unwrap();
    assert_eq!(bytes, content[3 * CHUNK..3 * CHUNK + 100]);
    let filled = layer.statistics().extents_filled;
    assert!(filled > 0 && filled < layer.statistics().extents_total, "{filled}");

    // Many at once, everywhere.
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (file, content) = (&file, &content);
            scope.spawn(move || {
                for number in 0..40 {
                    let chunk = (number * 7 + thread * 5) % 40;
                    let mut bytes = vec![0; CHUNK];
                    file.read_exact_at(&mut bytes, at + (chunk * CHUNK) as u64).unwrap();
                    assert_eq!(bytes, content[chunk * CHUNK..(chunk + 1) * CHUNK]);
                }
            });
        }
    });
    drop(watch);
}

#[test]
fn a_complete_layer_needs_nobody() {
    if !can_page("a_complete_layer_needs_nobody") {
        return;
    }
    let (image, content) = one_layer();
    let layer = &image.layers[0];
    let pager = pager(&image, Duration::from_secs(10));
    let watch = pager.watch(&image.layers).unwrap();
    let mut file = reader(layer);
    let mut all = Vec::new();
    file.read_to_end(&mut all).unwrap();
    let at = usize::try_from(data_of(layer, "d/big")).unwrap();
    assert_eq!(all[at..at + content.len()], content);
    image.runtime.block_on(layer.completed());
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while is_marked(layer) {
        assert!(std::time::Instant::now() < end, "a complete layer is still marked");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop((watch, pager));
    let mut again = vec![0; content.len()];
    file.read_exact_at(&mut again, at as u64).unwrap();
    assert_eq!(again, content);
}

/// What is in no bitmap on the disk may be gone after an error of the disk: until it is, the kernel has to ask.
#[test]
fn a_complete_layer_is_marked_until_it_is_on_the_disk() {
    if !can_page("a_complete_layer_is_marked_until_it_is_on_the_disk") {
        return;
    }
    let (image, content) = one_layer();
    let layer = &image.layers[0];
    image.runtime.block_on(async {
        layer.ensure(DataOffset(0)..DataOffset(layer.index().data_length())).await.unwrap();
        layer.completed().await;
    });
    assert!(layer.is_complete() && !layer.is_on_disk());
    // What the pager does beside its threads is done when this is driven, and not before.
    let driven = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let pager = Pager::start(&pager_options(&image, Duration::from_secs(10)), driven.handle()).unwrap();
    let _watch = pager.watch(&image.layers).unwrap();
    assert!(is_marked(layer));
    let (file, at) = (reader(layer), data_of(layer, "d/big"));
    let mut bytes = vec![0; CHUNK];
    file.read_exact_at(&mut bytes, at).unwrap();
    assert_eq!(bytes, content[..CHUNK]);
    driven.block_on(async {
        let until_unmarked = async {
            while is_marked(layer) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), until_unmarked).await.expect("it stays marked");
    });
    assert!(layer.is_on_disk());
    // The next one has nothing to ask for.
    let other = pager.watch(&image.layers).unwrap();
    assert!(!is_marked(layer));
    drop(other);
}

/// Whether any group of this process is asked for a layer's reads.
fn is_marked(layer: &LazyLayer) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let wanted = format!("fanotify ino:{:x} ", layer.data_file().metadata().unwrap().ino());
    let infos = std::fs::read_dir("/proc/self/fdinfo").unwrap().filter_map(Result::ok);
    infos.filter_map(|info| std::fs::read_to_string(info.path()).ok()).any(|info| info.contains(&wanted))
}

#[test]
fn what_cannot_be_had_is_an_error_and_comes_back() {
    if !can_page("what_cannot_be_had_is_an_error_and_comes_back") {
        return;
    }
    let (image, content) = one_layer();
    let layer = &image.layers[0];
    let pager = pager(&image, Duration::from_millis(300));
    let _watch = pager.watch(&image.layers).unwrap();
    let (file, at) = (reader(layer), data_of(layer, "d/big"));
    let mut bytes = vec![0; CHUNK];
    image.source.fail();
    let error = file.read_exact_at(&mut bytes, at).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    image.source.heal();
    file.read_exact_at(&mut bytes, at).unwrap();
    assert_eq!(bytes, content[..CHUNK]);

    // A registry that is away for less than the patience is not noticed.
    image.source.fail();
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut bytes = vec![0; CHUNK];
            file.read_exact_at(&mut bytes, at + 30 * CHUNK as u64).map(|()| bytes)
        });
        std::thread::sleep(Duration::from_millis(50));
        image.source.heal();
        assert_eq!(reading.join().unwrap().unwrap(), content[30 * CHUNK..31 * CHUNK]);
    });
}

#[test]
fn a_data_file_that_a_stranger_cut_is_repaired() {
    if !can_page("a_data_file_that_a_stranger_cut_is_repaired") {
        return;
    }
    let (image, content) = one_layer();
    let layer = &image.layers[0];
    let pager = pager(&image, Duration::from_secs(10));
    let _watch = pager.watch(&image.layers).unwrap();
    let (file, at) = (reader(layer), data_of(layer, "d/big"));
    let mut bytes = vec![0; CHUNK];
    file.read_exact_at(&mut bytes, at).unwrap();
    layer.data_file().set_len(at).unwrap();
    file.read_exact_at(&mut bytes, at).unwrap();
    assert_eq!(bytes, content[..CHUNK]);
}

#[test]
fn two_watches_of_one_layer_are_one_mark() {
    if !can_page("two_watches_of_one_layer_are_one_mark") {
        return;
    }
    let (image, content) = one_layer();
    let layer = &image.layers[0];
    let pager = pager(&image, Duration::from_secs(10));
    let (one, other) = (pager.watch(&image.layers).unwrap(), pager.watch(&image.layers).unwrap());
    let (file, at) = (reader(layer), data_of(layer, "d/big"));
    drop(one);
    let mut bytes = vec![0; CHUNK];
    file.read_exact_at(&mut bytes, at).unwrap();
    assert_eq!(bytes, content[..CHUNK]);
    drop(other);
    // Nothing is mounted, so that nobody has to be kept from the holes any more.
    file.read_exact_at(&mut bytes, at + 20 * CHUNK as u64).unwrap();
    assert_eq!(bytes, vec![0; CHUNK]);
}

#[test]
fn the_keeper_is_started_again_when_it_is_killed() {
    if !can_page("the_keeper_is_started_again_when_it_is_killed") {
        return;
    }
    let (image, content) = one_layer();
    let layer = &image.layers[0];
    let pager = pager(&image, Duration::from_secs(10));
    let _watch = pager.watch(&image.layers).unwrap();
    let (file, at) = (reader(layer), data_of(layer, "d/big"));
    let mut before = keepers(&image);
    assert_eq!(before.len(), 1);
    for chunk in 0..3 {
        rustix::process::kill_process(before[0], rustix::process::Signal::KILL).unwrap();
        let mut bytes = vec![0; CHUNK];
        file.read_exact_at(&mut bytes, at + (chunk * 10 * CHUNK) as u64).unwrap();
        assert_eq!(bytes, content[chunk * 10 * CHUNK..][..CHUNK]);
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while keepers(&image).is_empty() || keepers(&image) == before {
            assert!(std::time::Instant::now() < deadline, "no keeper came back");
            std::thread::sleep(Duration::from_millis(5));
        }
        before = keepers(&image);
    }
}

/// The keepers of an image's pager that are alive: the register's path is in their arguments.
fn keepers(image: &TestImage) -> Vec<rustix::process::Pid> {
    use std::os::unix::ffi::OsStrExt as _;
    let mark = image.directory.path().as_os_str().as_bytes();
    let path = format!("/proc/{}/task", std::process::id());
    let children = std::fs::read_dir(path)
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("children")).ok());
    let children: Vec<String> = children.collect();
    children
        .iter()
        .flat_map(|children| children.split_whitespace())
        .filter_map(|child| rustix::process::Pid::from_raw(child.parse().unwrap()))
        .filter(|child| {
            let line = std::fs::read(format!("/proc/{}/cmdline", child.as_raw_nonzero())).unwrap_or_default();
            line.windows(mark.len()).any(|window| window == mark)
        })
        .collect()
}

#[test]
fn another_process_fills_what_is_watched_without_having_it_fetched_twice() {
    if !can_page("another_process_fills_what_is_watched_without_having_it_fetched_twice") {
        return;
    }
    let (image, _) = one_layer();
    let pager = pager(&image, Duration::from_secs(10));
    let watch = pager.watch(&image.layers).unwrap();
    let before = image.layers[0].statistics();
    // A store of its own, as in another process.
    let others = image.opened_again();
    assert!(others[0].is_open_elsewhere() && !image.layers[0].is_open_elsewhere());
    loris_mount::pager::fill_unasked(&others).unwrap();
    image.runtime.block_on(loris_lazy::complete(&others[0])).unwrap();
    assert_eq!(image.layers[0].statistics().requests, before.requests);
    drop(watch);
}

#[test]
fn what_one_image_claims_wrongly_is_not_held_against_the_readers_of_another() {
    if !can_page("what_one_image_claims_wrongly_is_not_held_against_the_readers_of_another") {
        return;
    }
    let (image, content) = one_layer();
    let pager = pager(&image, Duration::from_secs(10));
    image.runtime.block_on(loris_lazy::complete(&image.layers[0])).unwrap();
    let liar = image.claiming(loris_format::digest::DiffId(loris_format::digest::Digest::sha256_of(b"another")));
    let honest = pager.watch(&image.layers).unwrap();
    let lying = pager.watch(&liar).unwrap();
    let file = reader(&image.layers[0]);
    let at = data_of(&image.layers[0], "d/big");
    let mut bytes = vec![0; 100];
    for _ in 0..2 {
        file.read_exact_at(&mut bytes, at).unwrap();
        assert_eq!(bytes, content[..100]);
        image.runtime.block_on(loris_lazy::complete(&liar[0])).unwrap_err();
    }
    drop((honest, lying));
}
