use std::{
    io::{self, Read, Write},
    num::NonZeroUsize,
};

use loris_format::{
    estargz::footer::{self, Footer},
    index::{LayerIndex, NodeKind},
    opening::{Opening, Promise, Step, Trust},
    position::BlobRange,
    tar::{Entry, EntryKind},
};
use proptest::prelude::*;

use super::{archive::Archive, *};

pub(super) fn convert_with(
    source: &[u8],
    options: &LayerOptions,
    threads: usize,
) -> Result<(ConvertedLayer, Vec<u8>), Error> {
    let workers =
        Workers::start(NonZeroUsize::new(threads).unwrap(), options.piece_bytes(), DEFAULT_MEMORY_BYTES).unwrap();
    let mut blob = Vec::new();
    let watch = Watch::default();
    let layer = convert_layer(source, options, &workers, &watch, &std::env::temp_dir(), &mut blob)?;
    assert_eq!((watch.bytes_read(), watch.bytes_written()), (layer.source_size, layer.uncompressed_size));
    Ok((layer, blob))
}

pub(super) fn convert(source: &[u8], options: &LayerOptions) -> (ConvertedLayer, Vec<u8>) {
    convert_with(source, options, 2).unwrap()
}

fn options(chunk_bytes: u64, prioritised: &[&str]) -> LayerOptions {
    let prioritised = prioritised.iter().map(|name| name.as_bytes().to_vec()).collect();
    LayerOptions { chunk_bytes, prioritised, ..LayerOptions::default() }
}

pub(super) fn gunzip(blob: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    flate2::read::MultiGzDecoder::new(blob).read_to_end(&mut text).unwrap();
    text
}

/// Returns where gzip members begin, which is where one of them can be decoded after the one before ended.
fn member_starts(blob: &[u8]) -> Vec<u64> {
    let mut starts = Vec::new();
    let mut rest = blob;
    while !rest.is_empty() {
        starts.push((blob.len() - rest.len()) as u64);
        let mut member = flate2::bufread::GzDecoder::new(rest);
        io::copy(&mut member, &mut io::sink()).unwrap();
        rest = member.into_inner();
    }
    starts
}

fn open(blob: &[u8], layer: &ConvertedLayer) -> LayerIndex {
    let read = |range: BlobRange| &blob[range.start.0 as usize..range.end().0 as usize];
    let size = blob.len() as u64;
    let (mut opening, mut range) =
        Opening::new(size, Promise::estargz(Some(layer.toc_digest)), Trust::Required, &Limits::default()).unwrap();
    loop {
        match opening.supply(read(range)).unwrap() {
            Step::Read(next, next_range) => (opening, range) = (next, next_range),
            Step::Done(index, _) => return index,
        }
    }
}

/// Reads a file of the blob through its index, as a lazy reader does, and checks every digest.
fn content(index: &LayerIndex, blob: &[u8], path: &str) -> Option<Vec<u8>> {
    let node = index.lookup(path.as_bytes())?;
    let NodeKind::Regular(file) = &index.node(node).kind else { return None };
    let mut bytes = Vec::new();
    for extent in index.extents().iter().filter(|extent| extent.node == node) {
        let frame = &index.frames()[extent.frame.0 as usize];
        let range = frame.range.start.0 as usize..frame.range.end().0 as usize;
        let decoded = gunzip(&blob[range]);
        let begin = extent.frame_offset as usize;
        let piece = &decoded[begin..begin + extent.length as usize];
        assert!(extent.digest.unwrap().matches(piece), "{path}");
        bytes.extend_from_slice(piece);
    }
    assert_eq!(bytes.len() as u64, file.size, "{path}");
    assert!(file.digest.unwrap().matches(&bytes), "{path}");
    Some(bytes)
}

/// Returns the paths of the new tar, in order, as they are written there.
fn names(blob: &[u8]) -> Vec<String> {
    let text = gunzip(blob);
    let mut reader = tar::Reader::new(text.as_slice(), &Limits::default());
    let mut names = Vec::new();
    while let Some(entry) = reader.next_entry().unwrap() {
        names.push(String::from_utf8_lossy(&entry.path).into_owned());
    }
    names
}

#[test]
fn what_is_reported_is_what_was_written() {
    let source = Archive::default().directory("d/").file("d/a", b"hello").file("empty", b"").end();
    let (layer, blob) = convert(&source, &LayerOptions::default());
    assert_eq!(layer.blob_digest, Digest::sha256_of(&blob));
    assert_eq!(layer.blob_size, blob.len() as u64);
    let text = gunzip(&blob);
    assert_eq!(layer.diff_id, DiffId(Digest::sha256_of(&text)));
    assert_eq!(layer.uncompressed_size, text.len() as u64);
    assert_eq!(layer.source_diff_id, DiffId(Digest::sha256_of(&source)));
    assert_eq!((layer.entries, layer.source_size), (4, source.len() as u64));
    assert!(layer.missing.is_empty() && layer.dangling_links.is_empty());
    assert_eq!(
        layer.annotations(),
        [
            ("containerd.io/snapshot/stargz/toc.digest".to_owned(), layer.toc_digest.to_string()),
            ("io.containers.estargz.uncompressed-size".to_owned(), text.len().to_string()),
        ]
    );
    let index = open(&blob, &layer);
    assert_eq!(content(&index, &blob, "d/a").unwrap(), b"hello");
    assert_eq!(content(&index, &blob, "empty").unwrap(), b"");
    assert_eq!(names(&blob), [".no.prefetch.landmark", "d/", "d/a", "empty", "stargz.index.json"]);
}

#[test]
fn members_begin_where_the_format_says() {
    for (name, source, chunk, members) in [
        // Top, landmark's content, table of contents, footer.
        ("nothing", Archive::default().end(), 4, 4),
        ("directory and empty file", Archive::default().directory("foo/").file("foo/bar", b"").end(), 4, 4),
        ("one chunk", Archive::default().file("foo", b"abcd").end(), 4, 5),
        ("six chunks", Archive::default().file("foo", b"This is such a big file").end(), 4, 10),
        ("two files", Archive::default().file("foo", b"a").directory("d/").file("bar", b"b").end(), 4, 6),
    ] {
        let (layer, blob) = convert(&source, &options(chunk, &[]));
        let starts = member_starts(&blob);
        assert_eq!(starts.len(), members, "{name}");
        let Footer::Toc { offset, .. } = footer::read(&blob, blob.len() as u64).unwrap() else { panic!("{name}") };
        assert_eq!(starts[members - 2], offset.0, "{name}");
        assert_eq!(starts[members - 1], blob.len() as u64 - 51, "{name}");
        for frame in open(&blob, &layer).frames() {
            assert!(starts.contains(&frame.range.start.0), "{name}: {frame:?}");
        }
    }
}

#[test]
fn compression_of_the_source_makes_no_difference() {
    let plain = Archive::default().file("a", &[7; 3000]).file("b", b"x").end();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let gzip = gzip.finish().unwrap();
    let mut members = gzip.clone();
    let mut rest = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    rest.write_all(&[0; 100]).unwrap();
    members.extend(rest.finish().unwrap());
    let mut zstd = vec![0; 10_000];
    let length = zstd_safe::compress(zstd.as_mut_slice(), &plain, 3).unwrap();
    zstd.truncate(length);
    let (want, blob) = convert(&plain, &LayerOptions::default());
    for source in [&gzip, &zstd] {
        assert_eq!(convert(source, &LayerOptions::default()), (want.clone(), blob.clone()));
    }
    // Zeros behind the end of the archive belong to the source's DiffID and not to the new layer.
    let (longer, same) = convert(&members, &LayerOptions::default());
    assert_eq!(same, blob);
    let with_zeros = [plain.as_slice(), &[0; 100]].concat();
    assert_eq!(longer.source_diff_id, DiffId(Digest::sha256_of(&with_zeros)));
}

#[test]
fn prioritised_files_come_first() {
    let source = Archive::default()
        .file("z", b"z")
        .file("./x/y", b"y")
        .directory("./x/")
        .link("l", "/z")
        .file(".prefetch.landmark", b"old")
        .file("stargz.index.json", b"old")
        .file("rest", b"rest");
    let source = source.end();
    let (layer, blob) = convert(&source, &options(4, &["/x/y", "./l"]));
    let want = ["./x/", "./x/y", "z", "l", ".prefetch.landmark", "rest", "stargz.index.json"];
    assert_eq!(names(&blob), want);
    let index = open(&blob, &layer);
    assert_eq!(index.lookup(b"l"), index.lookup(b"z"));
    assert_eq!(content(&index, &blob, "x/y").unwrap(), b"y");

    let missing = options(4, &["x/y", "no/such"]);
    let error = convert_with(&source, &missing, 1).unwrap_err();
    assert!(matches!(&error, Error::Missing { count: 1, first } if first == "no/such"), "{error}");
    let (layer, blob) = convert(&source, &LayerOptions { allow_missing: true, ..missing });
    assert_eq!(layer.missing, [b"no/such".to_vec()]);
    assert_eq!(names(&blob)[..3], ["./x/", "./x/y", ".prefetch.landmark"]);
    // Our own output is a source as any other; its landmark is not the new one.
    let (_, again) = convert(&blob, &options(4, &[]));
    assert_eq!(names(&again), [".no.prefetch.landmark", "./x/", "./x/y", "z", "l", "rest", "stargz.index.json"]);
}

#[test]
fn links_to_a_file_that_is_replaced_keep_it() {
    let source = Archive::default().file("a", b"old").link("l", "a").link("m", "a").file("a", b"newer").end();
    let (layer, blob) = convert(&source, &LayerOptions::default());
    let index = open(&blob, &layer);
    assert_eq!(content(&index, &blob, "a").unwrap(), b"newer");
    assert_eq!(content(&index, &blob, "l").unwrap(), b"old");
    assert_eq!(index.lookup(b"l"), index.lookup(b"m"));
    assert_eq!(index.node(index.lookup(b"l").unwrap()).permissions, 0o644);
}

#[test]
fn links_that_lead_nowhere_are_told() {
    let source = Archive::default().link("l", "in/a/lower/layer").end();
    let (layer, _) = convert(&source, &LayerOptions::default());
    assert_eq!(layer.dangling_links, [b"l".to_vec()]);
    let circle = Archive::default().link("l", "m").link("m", "l").end();
    let error = convert_with(&circle, &LayerOptions::default(), 1).unwrap_err();
    assert!(matches!(error, Error::Format(writer::Error::LinkCircle { .. })), "{error}");
}

/// A layer with enough of everything that batches end in all places.
fn mixed(files: usize) -> Vec<u8> {
    let mut archive = Archive::default();
    let mut state = 1_u64;
    for number in 0..files {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let size = [0, 1, 511, 512, 5000, 70_000, 300_000][(state >> 40) as usize % 7];
        let bytes: Vec<u8> = (0..size).map(|at| if at % 3 == 0 { (state >> (at % 50)) as u8 } else { 7 }).collect();
        archive = archive.file(&format!("d{}/f{number}", number % 10), &bytes);
    }
    archive.end()
}

#[test]
fn the_number_of_threads_makes_no_difference() {
    let source = mixed(200);
    for chunk in [1000, 100_000, 4 << 20] {
        let one = convert_with(&source, &options(chunk, &["d3/f13", "d0/f0"]), 1).unwrap();
        for threads in [2, 7] {
            assert!(convert_with(&source, &options(chunk, &["d3/f13", "d0/f0"]), threads).unwrap() == one);
        }
    }
}

#[test]
fn files_share_members_where_that_is_asked_for() {
    let source = mixed(200);
    let alone = convert(&source, &options(1 << 20, &["d3/f13", "d0/f0"]));
    let tree = open(&alone.1, &alone.0);
    let mut sizes = vec![alone.1.len()];
    for least in [1, 10_000, 200_000, 4 << 20] {
        let wanted = LayerOptions { min_member_bytes: least, ..options(1 << 20, &["d3/f13", "d0/f0"]) };
        let (layer, blob) = convert(&source, &wanted);
        assert!(convert_with(&source, &wanted, 5).unwrap() == (layer.clone(), blob.clone()), "{least}");
        assert_eq!(names(&blob), names(&alone.1));
        let index = open(&blob, &layer);
        let mut files = 0;
        for name in names(&blob) {
            let found = content(&index, &blob, &name);
            assert!(found == content(&tree, &alone.1, &name), "{least}: {name}");
            files += usize::from(found.is_some());
        }
        assert!(files > 100);
        // Whoever prefetches gets the two files and no other.
        let before = |index: &LayerIndex| match index.prefetch() {
            loris_format::index::Prefetch::Until(end) => index
                .extents()
                .iter()
                .filter(|extent| index.frames()[extent.frame.0 as usize].range.start < end)
                .count(),
            other => panic!("{other:?}"),
        };
        assert_eq!(before(&index), before(&tree));
        assert_eq!(least > 1, index.frames().len() < tree.frames().len(), "{least}");
        sizes.push(blob.len());
    }
    assert!(sizes.is_sorted_by(|less, more| less >= more), "{sizes:?}");
    let error = convert_with(&source, &LayerOptions { min_member_bytes: 65 << 20, ..LayerOptions::default() }, 1);
    assert!(matches!(error, Err(Error::MemberSize { .. })));
}

#[test]
fn layers_share_workers() {
    let workers = Workers::start(NonZeroUsize::new(2).unwrap(), 1 << 20, 0).unwrap();
    let source = mixed(60);
    let alone = convert(&source, &LayerOptions::default()).1;
    std::thread::scope(|scope| {
        let layers: Vec<_> = (0..4)
            .map(|number| {
                let (source, workers) = (&source, &workers);
                scope.spawn(move || {
                    let mut blob = Vec::new();
                    let watch = Watch::default();
                    // Every other one fails half way, and must give back what it holds.
                    let sink: &mut dyn Write = &mut blob;
                    let sink = Bounded { sink, left: if number % 2 == 0 { u64::MAX } else { 20_000 } };
                    let options = LayerOptions::default();
                    let done = convert_layer(source.as_slice(), &options, workers, &watch, &std::env::temp_dir(), sink);
                    (done.map(|_| blob), number)
                })
            })
            .collect();
        for layer in layers {
            match layer.join().unwrap() {
                (Ok(blob), number) => assert!(number % 2 == 0 && blob == alone),
                (Err(error), number) => assert!(number % 2 == 1 && matches!(error, Error::Output(_)), "{error}"),
            }
        }
    });
    let slots: Vec<_> = std::iter::from_fn(|| workers.try_slot()).collect();
    assert_eq!(slots.len(), 2);
}

struct Bounded<'a> {
    sink: &'a mut dyn Write,
    left: u64,
}

impl Write for Bounded<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or(io::ErrorKind::StorageFull)?;
        self.sink.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn bad_sources_are_refused() {
    let good = mixed(20);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&good).unwrap();
    let gzip = gzip.finish().unwrap();
    let mut flipped = gzip.clone();
    let last = flipped.len() - 6;
    flipped[last] ^= 1;
    let small = LayerOptions { max_uncompressed_bytes: 10_000, ..LayerOptions::default() };
    let few = Limits { entries: 3, ..Limits::default() };
    let few = LayerOptions { limits: few, ..LayerOptions::default() };
    let tiny = Limits { toc_bytes: 1000, ..Limits::default() };
    let tiny = LayerOptions { limits: tiny, ..LayerOptions::default() };
    let plain = LayerOptions::default();
    let nul = Archive::default().end();
    for (name, source, options, want) in [
        ("truncated tar", &good[..good.len() / 2], &plain, "cut off"),
        ("truncated gzip", &gzip[..gzip.len() / 2], &plain, ""),
        ("flipped checksum", &flipped, &plain, ""),
        ("not a layer", b"hello, world: this is no tar at all", &plain, ""),
        ("too large", &good, &small, "exceeds the limit of 10000 bytes"),
        ("too many entries", &good, &few, "exceeds the limit of 3"),
        ("table of contents too large", &good, &tiny, "table of contents exceeds the limit of 1000 bytes"),
        ("chunk", &nul, &LayerOptions { chunk_bytes: 0, ..plain.clone() }, "chunk size must be from 1 to"),
    ] {
        let error = convert_with(source, options, 2).expect_err(name).to_string();
        assert!(error.contains(want), "{name}: {error}");
    }
}

#[test]
fn it_stops_when_told() {
    let workers = Workers::start(NonZeroUsize::MIN, 4 << 20, 0).unwrap();
    let watch = Watch::default();
    watch.stop();
    let source = mixed(5);
    let options = LayerOptions::default();
    let error =
        convert_layer(source.as_slice(), &options, &workers, &watch, &std::env::temp_dir(), io::sink()).unwrap_err();
    assert!(matches!(error, Error::Stopped), "{error}");
}

fn any_entry() -> impl Strategy<Value = (Entry, Vec<u8>)> {
    let name = prop::sample::select(vec!["a", "b", "c", "d", "lib", "x.so", "\u{fc}ml\u{e4}ut"]);
    let path = prop::collection::vec(name, 1..4).prop_map(|names| names.join("/"));
    let content = prop_oneof![
        Just(Vec::new()),
        prop::collection::vec(any::<u8>(), 1..40),
        (1_usize..3000, any::<u8>()).prop_map(|(length, byte)| vec![byte; length]),
    ];
    let kind = prop::sample::select(vec![EntryKind::Regular, EntryKind::Regular, EntryKind::Symlink, EntryKind::Fifo]);
    (path, kind, 0_u16..0o7777, 0_u32..70_000, -5_i64..2_000_000_000, 0_u32..3, content).prop_map(
        |(path, kind, permissions, uid, seconds, fraction, content)| {
            let regular = kind == EntryKind::Regular;
            let link = if kind == EntryKind::Symlink { b"../somewhere else".to_vec() } else { Vec::new() };
            let mtime = loris_format::index::Timestamp { seconds, nanoseconds: fraction * 123_456_789 };
            let xattrs = if fraction == 1 { vec![((*b"user.x").into(), (*b"\xff\0=\n").into())] } else { Vec::new() };
            let path = path.into_bytes();
            let entry = Entry { path, kind, link, permissions, uid, gid: uid / 2, mtime, xattrs, ..Entry::default() };
            (entry, if regular { content } else { Vec::new() })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever tree goes in, the index of what comes out has it, with all attributes and content.
    #[test]
    fn the_tree_stays_the_same(entries in prop::collection::vec(any_entry(), 0..30), chunk in 1_u64..50) {
        // A name in which another one would have to be a directory makes a tree that cannot be.
        let mut kept: Vec<(Entry, Vec<u8>)> = Vec::new();
        for (entry, content) in entries {
            let below = |one: &[u8], other: &[u8]| one.starts_with(&[other, b"/"].concat());
            let clash = |(other, _): &(Entry, Vec<u8>)| {
                other.path == entry.path || below(&other.path, &entry.path) || below(&entry.path, &other.path)
            };
            if !kept.iter().any(clash) {
                kept.push((entry, content));
            }
        }
        let archive = kept.iter().fold(Archive::default(), |archive, (entry, content)| archive.entry(entry, content));
        let first: Vec<Vec<u8>> = kept.iter().rev().take(3).map(|(entry, _)| entry.path.clone()).collect();
        let options = LayerOptions { chunk_bytes: chunk, prioritised: first, ..LayerOptions::default() };
        let (layer, blob) = convert(&archive.end(), &options);
        let index = open(&blob, &layer);
        for (entry, bytes) in &kept {
            let node = index.node(index.lookup(&entry.path).unwrap());
            prop_assert_eq!(node.permissions, entry.permissions);
            prop_assert_eq!((node.uid, node.gid), (entry.uid, entry.gid));
            prop_assert_eq!(node.mtime, entry.mtime);
            prop_assert_eq!(&node.xattrs, &entry.xattrs);
            match &node.kind {
                NodeKind::Symlink { target } => prop_assert_eq!(target.as_ref(), entry.link.as_slice()),
                NodeKind::Fifo => prop_assert_eq!(entry.kind, EntryKind::Fifo),
                _ => {
                    let path = std::str::from_utf8(&entry.path).unwrap();
                    prop_assert_eq!(&content(&index, &blob, path).unwrap(), bytes);
                }
            }
        }
    }
}
