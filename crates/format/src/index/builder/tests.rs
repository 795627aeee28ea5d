use proptest::prelude::*;

use super::*;
use crate::index::{Codec, Frame, FrameId, NodeId, NodeKind};

const PAYLOAD: u64 = 1 << 30;

fn digest() -> Option<Digest> {
    Some(Digest::Sha256([7; 32]))
}

fn builder() -> IndexBuilder {
    with_limits(Limits::default())
}

fn with_limits(limits: Limits) -> IndexBuilder {
    IndexBuilder::new(BlobOffset(PAYLOAD), MissingDigest::Refuse, limits)
}

fn attributes(permissions: u16) -> Attributes {
    Attributes { permissions, ..Attributes::default() }
}

fn file(size: u64) -> NewKind<'static> {
    NewKind::Regular { size, digest: None }
}

fn symlink(target: &str) -> NewKind<'_> {
    NewKind::Symlink { target: target.as_bytes() }
}

fn link(target: &str) -> NewKind<'_> {
    NewKind::HardLink { target: target.as_bytes() }
}

fn chunk(file_offset: u64, length: u64, frame: u64, frame_offset: u64) -> NewChunk {
    NewChunk { file_offset: FileOffset(file_offset), length, frame: BlobOffset(frame), frame_offset, digest: digest() }
}

/// Pushes entries; files with content get one chunk, in frames of 1000 bytes. Permissions are the entry's number.
fn push(builder: &mut IndexBuilder, entries: &[(&str, NewKind<'_>)]) -> Result<(), IndexError> {
    for (number, (name, kind)) in (0_u16..).zip(entries) {
        builder.push(number.into(), name.as_bytes(), attributes(number), *kind)?;
        if let NewKind::Regular { size: size @ 1.., .. } = kind {
            builder.chunk(number.into(), chunk(0, *size, u64::from(number) * 1000, 0))?;
        }
    }
    Ok(())
}

fn build(entries: &[(&str, NewKind<'_>)]) -> Result<LayerIndex, IndexError> {
    let mut builder = builder();
    push(&mut builder, entries)?;
    builder.finish()
}

/// One line for each name: path, kind, links, number of the entry (`-` for implied directories).
fn dump(index: &LayerIndex) -> Vec<String> {
    let mut lines = Vec::new();
    let mut waiting = vec![(String::new(), NodeId::ROOT)];
    while let Some((path, id)) = waiting.pop() {
        let node = index.node(id);
        let entry = if index.is_implied(id) { "-".into() } else { node.permissions.to_string() };
        let kind = match &node.kind {
            NodeKind::Directory { .. } => "dir".into(),
            NodeKind::Regular(content) => format!("reg:{}", content.size),
            NodeKind::Symlink { target } => format!("symlink:{}", target.escape_ascii()),
            NodeKind::CharDevice { major, minor } => format!("char:{major}:{minor}"),
            NodeKind::BlockDevice { major, minor } => format!("block:{major}:{minor}"),
            NodeKind::Fifo => "fifo".into(),
        };
        lines.push(format!("{} {kind} {} {entry}", if path.is_empty() { "/" } else { &path }, node.link_count));
        for (name, child) in index.children(id).iter().rev() {
            waiting.push((format!("{path}/{}", name.escape_ascii()), *child));
        }
    }
    lines
}

#[track_caller]
fn check(entries: &[(&str, NewKind<'_>)], expected: &[&str]) {
    let index = build(entries).unwrap();
    assert_eq!(dump(&index), expected);
    check_sound(&index);
}

#[track_caller]
fn refused(entries: &[(&str, NewKind<'_>)]) -> (u64, Problem) {
    let error = build(entries).unwrap_err();
    (error.entry, error.problem)
}

/// What the documentation of [`LayerIndex`] promises.
#[track_caller]
fn check_sound(index: &LayerIndex) {
    for (number, node) in (0..).zip(index.nodes()) {
        let NodeKind::Regular(content) = &node.kind else { continue };
        let end = content.data.checked_add(content.size).unwrap();
        let mut covered = 0;
        for extent in &index.extents()[index.extents_in(&(content.data..end))] {
            assert_eq!((extent.node, extent.file_offset.0), (NodeId(number), covered));
            assert_eq!(extent.data.0, content.data.0 + covered);
            assert!(extent.length > 0);
            covered += extent.length;
        }
        assert_eq!(covered, content.size);
        assert_eq!(content.data.0 % crate::position::DATA_ALIGNMENT, 0);
    }
    for pair in index.extents().windows(2) {
        assert!(pair[0].data.0 + pair[0].length <= pair[1].data.0);
    }
    for pair in index.frames().windows(2) {
        assert!(pair[0].range.end() <= pair[1].range.start);
    }
    let mut seen = 0;
    for (number, frame) in (0..).zip(index.frames()) {
        assert!(frame.range.length > 0 && frame.range.end().0 <= PAYLOAD);
        let extents: Vec<_> = index.extents_of(FrameId(number)).iter().map(|n| &index.extents()[*n as usize]).collect();
        assert!(index.extents_of(FrameId(number)).is_sorted());
        assert!(extents.iter().all(|extent| extent.frame == FrameId(number)));
        assert_eq!(extents.iter().map(|extent| extent.frame_offset + extent.length).max(), Some(frame.decoded_length));
        seen += extents.len();
    }
    assert_eq!(seen, index.extents().len());
}

#[test]
fn nothing_is_a_root() {
    check(&[], &["/ dir 2 -"]);
    for root in ["", "/", "./", ".", "..", "a/.."] {
        check(&[("x", file(0)), (root, NewKind::Directory)], &["/ dir 2 1", "/x reg:0 1 0"]);
        assert_eq!(refused(&[(root, file(0))]), (0, Problem::RootNotDirectory));
        assert_eq!(refused(&[("x", file(0)), (root, link("x"))]), (1, Problem::RootNotDirectory));
    }
}

#[test]
fn parents_are_made_and_marked() {
    check(
        &[("./a/b/c", file(5)), ("/a/d", symlink("b")), ("../a/b/../b/e/", NewKind::Directory)],
        &["/ dir 3 -", "/a dir 3 -", "/a/b dir 3 -", "/a/b/c reg:5 1 0", "/a/b/e dir 2 2", "/a/d symlink:b 1 1"],
    );
    let index = build(&[("a/b", file(0))]).unwrap();
    let made = index.node(index.lookup(b"a").unwrap());
    assert_eq!((made.permissions, made.uid, made.gid, made.mtime), (0o755, 0, 0, Timestamp::default()));
    // A later entry describes it.
    check(&[("a/b", file(0)), ("a", NewKind::Directory)], &["/ dir 3 -", "/a dir 2 1", "/a/b reg:0 1 0"]);
}

#[test]
fn the_last_of_equal_names_counts() {
    check(&[("a", file(1)), ("./a", file(2))], &["/ dir 2 -", "/a reg:2 1 1"]);
    check(
        &[("a", NewKind::Directory), ("a/b", file(1)), ("a/", NewKind::Directory), ("a/c", file(1))],
        &["/ dir 3 -", "/a dir 2 2", "/a/b reg:1 1 1", "/a/c reg:1 1 3"],
    );
    // A directory takes its content with it, also when it comes back.
    check(&[("a/b", file(1)), ("a", file(3))], &["/ dir 2 -", "/a reg:3 1 1"]);
    check(
        &[("a/b/c", file(1)), ("a", file(0)), ("a", NewKind::Directory), ("a/d", file(1))],
        &["/ dir 3 -", "/a dir 2 2", "/a/d reg:1 1 3"],
    );
    assert_eq!(refused(&[("a", file(0)), ("a/b", file(0))]), (1, Problem::ParentNotDirectory { at: "a".into() }));
    assert_eq!(
        refused(&[("a/b", file(0)), ("a", file(0)), ("a/c", file(0))]),
        (2, Problem::ParentNotDirectory { at: "a".into() })
    );
}

/// umoci, asked to store a directory that became a file, writes the file and a whiteout of each name that was in the
/// directory: `a`, `a/.wh.x`. We converted such layers, and then refused to read the result.
#[test]
fn markers_below_a_file_hide_nothing() {
    for marker in ["a/.wh.x", "a/.wh..wh..opq", "./a/.wh..wh.plnk", "a/b/c/.wh.x", "a/./.wh.x"] {
        for size in [0, 5] {
            check(
                &[("a", file(3)), (marker, file(size)), ("b", file(0))],
                &["/ dir 2 -", "/a reg:3 1 0", "/b reg:0 1 2"],
            );
            check(
                &[(marker, file(size)), ("a", file(3)), ("b", file(0))],
                &["/ dir 2 -", "/a reg:3 1 1", "/b reg:0 1 2"],
            );
        }
    }
    // Neither the kind of the marker nor that of what it is below matters, and a link is no directory.
    for kind in
        [NewKind::Directory, symlink("b"), link("b"), link("nowhere"), NewKind::CharDevice { major: 0, minor: 0 }]
    {
        check(&[("a", NewKind::Fifo), ("a/.wh.x", kind)], &["/ dir 2 -", "/a fifo 1 0"]);
    }
    check(
        &[("f", file(0)), ("l", symlink("f")), ("l/.wh.x", file(0)), ("h", link("f")), ("h/.wh.x", file(0))],
        &["/ dir 2 -", "/f reg:0 2 0", "/h reg:0 2 0", "/l symlink:f 1 1"],
    );
    // A directory keeps its markers; with the directory that is replaced they go.
    check(
        &[("a/.wh.x", file(0)), ("a/y", file(0)), ("a", NewKind::Directory)],
        &["/ dir 3 -", "/a dir 2 2", "/a/.wh.x reg:0 1 0", "/a/y reg:0 1 1"],
    );
    // Everything else below a file is the error that it was, and a marker must still be sound.
    for other in ["a/x", "a/.wh.x/y", "a/.wh", "a/wh.x"] {
        let problem = Problem::ParentNotDirectory { at: "a".into() };
        assert_eq!(refused(&[("a", file(0)), (other, file(0))]), (1, problem), "{other}");
    }
    assert_eq!(refused(&[("a", file(0)), ("a/.wh.x", symlink(""))]), (1, Problem::Target { target: String::new() }));
    assert!(matches!(refused(&[("a", file(0)), ("a/.wh.x", file(u64::MAX))]).1, Problem::FileTooLarge { .. }));
}

#[test]
fn content_of_replaced_files_is_left_out() {
    let index = build(&[("a", file(10)), ("b", file(20)), ("a", file(30))]).unwrap();
    check_sound(&index);
    assert_eq!(index.extents().len(), 2);
    // The frame of the first one still tells where the second one's ends.
    let ranges: Vec<_> = index.frames().iter().map(|frame| (frame.range.start.0, frame.range.length)).collect();
    assert_eq!(ranges, [(1000, 1000), (2000, PAYLOAD - 2000)]);
}

#[test]
fn hard_links_are_one_node() {
    let linked = &["/ dir 2 -", "/a reg:4 3 0", "/b reg:4 3 0", "/c reg:4 3 0"];
    check(&[("a", file(4)), ("b", link("a")), ("c", link("./b"))], linked);
    // Before the target, and in any order among themselves.
    check(
        &[("x", file(0)), ("c", link("b")), ("b", link("/a")), ("a", file(4))],
        &["/ dir 2 -", "/a reg:4 3 3", "/b reg:4 3 3", "/c reg:4 3 3", "/x reg:0 1 0"],
    );
    check(&[("s", symlink("x")), ("t", link("s"))], &["/ dir 2 -", "/s symlink:x 2 0", "/t symlink:x 2 0"]);
    // The node stays, whatever becomes of its first name.
    check(&[("a", file(4)), ("b", link("a")), ("a", file(1))], &["/ dir 2 -", "/a reg:1 1 2", "/b reg:4 1 0"]);
    check(&[("d/a", file(4)), ("b", link("d/a")), ("d", file(0))], &["/ dir 2 -", "/b reg:4 1 0", "/d reg:0 1 2"]);
    // A link that is replaced may have led nowhere.
    check(&[("a", link("nowhere")), ("a", file(0))], &["/ dir 2 -", "/a reg:0 1 1"]);
}

#[test]
fn hard_links_must_lead_to_a_file() {
    let target = |target: &str| target.to_string();
    assert_eq!(refused(&[("a", link("b"))]), (0, Problem::LinkToNothing { target: target("b") }));
    assert_eq!(refused(&[("x", file(0)), ("a", link("x/y"))]), (1, Problem::LinkToNothing { target: target("x/y") }));
    assert_eq!(refused(&[("a", link("a"))]), (0, Problem::LinkCycle { target: target("a") }));
    assert_eq!(refused(&[("a", file(0)), ("a", link("./a"))]), (1, Problem::LinkCycle { target: target("a") }));
    assert_eq!(
        refused(&[("d", NewKind::Directory), ("a", link("d"))]).1,
        Problem::LinkToDirectory { target: target("d") }
    );
    assert_eq!(refused(&[("a", link("d")), ("d/x", file(0))]), (0, Problem::LinkToDirectory { target: target("d") }));
    assert_eq!(refused(&[("a", link("/"))]), (0, Problem::LinkToDirectory { target: String::new() }));
    let (_, problem) = refused(&[("a", link("b")), ("b", link("c")), ("c", link("a"))]);
    assert!(matches!(problem, Problem::LinkCycle { .. }), "{problem}");
    // One of a chain that leads into a circle.
    let (_, problem) = refused(&[("x", link("a")), ("a", link("b")), ("b", link("a"))]);
    assert!(matches!(problem, Problem::LinkCycle { .. }), "{problem}");
    let (_, problem) = refused(&[("d/a", link("d/a/x")), ("d/a/x", file(0))]);
    assert!(matches!(problem, Problem::ParentNotDirectory { .. }), "{problem}");
}

#[test]
fn long_chains_of_links_need_no_stack() {
    let mut builder = builder();
    let names: Vec<String> = (0..20_000).map(|number| format!("l{number}")).collect();
    for (number, pair) in (0..).zip(names.windows(2)) {
        builder.push(number, pair[0].as_bytes(), attributes(0), link(&pair[1])).unwrap();
    }
    builder.push(20_000, b"l19999", attributes(7), file(0)).unwrap();
    let index = builder.finish().unwrap();
    assert_eq!((index.nodes().len(), index.node(NodeId(1)).link_count), (2, 20_000));
}

#[test]
fn symbolic_links_on_the_way_are_followed_inside_the_layer() {
    check(
        &[("usr/lib", NewKind::Directory), ("lib", symlink("usr/lib")), ("lib/x", file(1)), ("usr/lib/y", file(0))],
        &[
            "/ dir 3 -",
            "/lib symlink:usr/lib 1 1",
            "/usr dir 3 -",
            "/usr/lib dir 2 0",
            "/usr/lib/x reg:1 1 2",
            "/usr/lib/y reg:0 1 3",
        ],
    );
    // Absolute, upwards beyond the root, and to a directory that is not there yet.
    check(
        &[("a/l", symlink("/../d")), ("a/l/x", file(0))],
        &["/ dir 4 -", "/a dir 2 -", "/a/l symlink:/../d 1 0", "/d dir 2 -", "/d/x reg:0 1 1"],
    );
    check(
        &[("d/e/f", file(0)), ("l", symlink("d/e")), ("h", link("l/f"))],
        &["/ dir 3 -", "/d dir 3 -", "/d/e dir 2 -", "/d/e/f reg:0 2 0", "/h reg:0 2 0", "/l symlink:d/e 1 1"],
    );
    let (entry, problem) = refused(&[("a", symlink("b")), ("b", symlink("a")), ("a/x", file(0))]);
    assert_eq!((entry, matches!(problem, Problem::TooManySymlinks { .. })), (2, true));
}

#[test]
fn impossible_values_are_refused() {
    let cases: &[(&str, NewKind<'_>, Problem)] = &[
        ("a", symlink(""), Problem::Target { target: String::new() }),
        ("a", symlink("x\0y"), Problem::Target { target: "x\\x00y".into() }),
        ("a", link("x\0y"), Problem::Target { target: "x\\x00y".into() }),
        ("a", NewKind::CharDevice { major: 4096, minor: 0 }, Problem::Device { major: 4096, minor: 0 }),
        ("a", NewKind::BlockDevice { major: 0, minor: 1 << 20 }, Problem::Device { major: 0, minor: 1 << 20 }),
        ("a", file(u64::MAX), Problem::FileTooLarge { size: u64::MAX, limit: 1 << 40 }),
    ];
    for (name, kind, problem) in cases {
        assert_eq!(refused(&[(name, *kind)]), (0, problem.clone()));
    }
    assert!(matches!(refused(&[("a\0b", file(0))]).1, Problem::Path(_)));
    assert!(matches!(refused(&[(&"n".repeat(256), file(0))]).1, Problem::Path(_)));
    assert!(matches!(refused(&[("a", symlink(&"n".repeat(20_000)))]).1, Problem::TargetTooLong { .. }));
    // A newline is a letter like others, and an error shows it escaped.
    let error = build(&[("a\nb", file(0)), ("a\nb/c\x1b[31m", file(0))]).unwrap_err();
    assert_eq!(error.to_string(), "entry 1 (\"a\\nb/c\\x1b[31m\"): \"a\\nb\" on the way to it is not a directory");
}

#[test]
fn attributes_are_kept_and_bounded() {
    let xattr = |name: &[u8], value: &[u8]| (Box::from(name), Box::from(value));
    let pushed = |attributes| {
        let mut builder = with_limits(Limits { xattr_bytes: 20, ..Limits::default() });
        builder.push(3, b"a", attributes, file(0)).map(|()| builder.finish().unwrap())
    };
    let given = Attributes {
        permissions: 0o107_755,
        uid: 1,
        gid: u32::MAX,
        mtime: Timestamp { seconds: -1, nanoseconds: 999_999_999 },
        xattrs: vec![xattr(b"b", b"1"), xattr(b"a", b""), xattr(b"b", b"2")],
    };
    let index = pushed(given).unwrap();
    let node = index.node(index.lookup(b"a").unwrap());
    assert_eq!((node.permissions, node.uid, node.gid), (0o7755, 1, u32::MAX));
    assert_eq!(node.mtime, Timestamp { seconds: -1, nanoseconds: 999_999_999 });
    assert_eq!(node.xattrs, [xattr(b"a", b""), xattr(b"b", b"2")]);
    for xattrs in [vec![xattr(b"", b"")], vec![xattr(b"x\0y", b"")], vec![xattr(b"x", &[0; 20])]] {
        assert_eq!(pushed(Attributes { xattrs, ..Attributes::default() }).unwrap_err().entry, 3);
    }
    let mtime = Timestamp { seconds: 0, nanoseconds: 1_000_000_000 };
    assert!(pushed(Attributes { mtime, ..Attributes::default() }).is_err());
}

#[test]
fn limits_hold_before_memory_is_taken() {
    let mut builder = with_limits(Limits { entries: 10, depth: 5, ..Limits::default() });
    let error = builder.push(0, b"a/b/c/d/e/f", attributes(0), file(0)).unwrap_err();
    assert!(matches!(error.problem, Problem::Path(_)));
    // Implied directories count.
    let mut builder = with_limits(Limits { entries: 10, ..Limits::default() });
    builder.push(0, b"1/2/3/4/5/6/7/8", attributes(0), file(0)).unwrap();
    let error = builder.push(1, b"1/x/y/z", attributes(0), file(0)).unwrap_err();
    assert_eq!(error.problem, Problem::TooManyEntries { limit: 10 });
    // Depth that comes together over symbolic links.
    let mut builder = with_limits(Limits { depth: 6, ..Limits::default() });
    builder.push(0, b"a/b/c/d", attributes(0), symlink(".")).unwrap();
    builder.push(1, b"l", attributes(0), symlink("a/b/c")).unwrap();
    builder.push(2, b"l/d/d/d/x/y", attributes(0), NewKind::Directory).unwrap();
    let error = builder.push(3, b"l/x/y/z/z", attributes(0), file(0)).unwrap_err();
    assert_eq!(error.problem, Problem::TooDeep { limit: 6 });
    // Chunks count.
    let mut builder = with_limits(Limits { entries: 10, ..Limits::default() });
    builder.push(0, b"a", attributes(0), file(100)).unwrap();
    for number in 0..10 {
        builder.chunk(0, chunk(number, 1, number, 0)).unwrap();
    }
    assert!(builder.chunk(0, chunk(10, 1, 10, 0)).is_err());
}

/// Gives one file of `size` bytes these chunks.
fn chunked(size: u64, chunks: &[NewChunk]) -> Result<LayerIndex, Problem> {
    let mut builder = builder();
    builder.push(0, b"f", attributes(0), file(size)).map_err(|error| error.problem)?;
    for chunk in chunks {
        builder.chunk(0, *chunk).map_err(|error| error.problem)?;
    }
    builder.finish().map_err(|error| error.problem)
}

#[test]
fn chunks_tile_their_file() {
    let index = chunked(10, &[chunk(0, 4, 0, 512), chunk(4, 4, 50, 0), chunk(8, 2, 90, 0)]).unwrap();
    check_sound(&index);
    let frame = |start, length, decoded_length| Frame {
        range: crate::position::BlobRange { start: BlobOffset(start), length },
        codec: Codec::Gzip,
        decoded_length,
    };
    assert_eq!(index.frames(), [frame(0, 50, 516), frame(50, 40, 4), frame(90, PAYLOAD - 90, 2)]);

    let out_of_place =
        |expected, found| Problem::ChunkOutOfPlace { expected: FileOffset(expected), found: FileOffset(found) };
    let length = |at, length, left| Problem::ChunkLength { at: FileOffset(at), length, left };
    let cases: &[(&[NewChunk], Problem)] = &[
        (&[], Problem::ContentMissing { covered: 0, size: 10 }),
        (&[chunk(0, 9, 0, 0)], Problem::ContentMissing { covered: 9, size: 10 }),
        (&[chunk(1, 9, 0, 0)], out_of_place(0, 1)),
        (&[chunk(0, 4, 0, 0), chunk(5, 5, 100, 0)], out_of_place(4, 5)),
        (&[chunk(0, 4, 0, 0), chunk(3, 7, 100, 0)], out_of_place(4, 3)),
        (&[chunk(0, 10, 0, 0), chunk(0, 10, 100, 0)], out_of_place(10, 0)),
        (&[chunk(0, 11, 0, 0)], length(0, 11, 10)),
        (&[chunk(0, 4, 0, 0), chunk(4, u64::MAX, 100, 0)], length(4, u64::MAX, 6)),
        (&[chunk(0, 10, 0, 0), chunk(10, 1, 100, 0)], length(10, 1, 0)),
        (&[chunk(0, 0, 0, 0)], length(0, 0, 10)),
        (&[chunk(0, 10, PAYLOAD, 0)], Problem::OutsideBlob { offset: BlobOffset(PAYLOAD), end: BlobOffset(PAYLOAD) }),
        (&[chunk(0, 10, u64::MAX, 0)], Problem::OutsideBlob { offset: BlobOffset(u64::MAX), end: BlobOffset(PAYLOAD) }),
        (&[chunk(0, 10, 0, u64::MAX)], Problem::FrameTooLarge { offset: BlobOffset(0), limit: 256 << 20 }),
        (&[chunk(0, 10, 0, 256 << 20)], Problem::FrameTooLarge { offset: BlobOffset(0), limit: 256 << 20 }),
        (&[chunk(0, 5, 0, 0), chunk(5, 5, 0, 4)], Problem::Overlap { offset: BlobOffset(0) }),
        (
            &[chunk(0, 5, 0, 1028), chunk(5, 5, 1, 0)],
            Problem::FrameTooDense { offset: BlobOffset(0), compressed: 1, decoded: 1033 },
        ),
    ];
    for (chunks, problem) in cases {
        assert_eq!(chunked(10, chunks).unwrap_err(), *problem);
    }
    assert_eq!(chunked(0, &[chunk(0, 1, 0, 0)]).unwrap_err(), length(0, 1, 0));
    assert!(chunked(0, &[]).is_ok());
}

#[test]
fn chunks_belong_to_files() {
    for kind in [NewKind::Directory, NewKind::Fifo, symlink("x")] {
        let mut builder = builder();
        builder.push(0, b"a", attributes(0), file(0)).unwrap();
        builder.push(1, b"b", attributes(0), kind).unwrap();
        assert_eq!(builder.chunk(2, chunk(0, 1, 0, 0)).unwrap_err().problem, Problem::ChunkWithoutFile);
    }
    assert_eq!(builder().chunk(0, chunk(0, 1, 0, 0)).unwrap_err().problem, Problem::ChunkWithoutFile);
    // The next entry, too, finds that content is missing, and the error is about the file.
    let mut builder = builder();
    builder.push(0, b"a", attributes(0), file(5)).unwrap();
    let error = builder.push(1, b"b", attributes(0), file(0)).unwrap_err();
    assert_eq!((error.entry, error.name.as_str()), (0, "a"));
}

#[test]
fn content_without_digest_needs_leave() {
    let build = |missing, file_digest, chunks: &[u64]| {
        let mut builder = IndexBuilder::new(BlobOffset(PAYLOAD), missing, Limits::default());
        let kind = NewKind::Regular { size: 4 * chunks.len() as u64, digest: file_digest };
        builder.push(0, b"a", attributes(0), kind)?;
        for at in chunks {
            builder.chunk(0, NewChunk { digest: None, ..chunk(*at, 4, *at * 10, 0) })?;
        }
        builder.finish()
    };
    let missing = Problem::NoDigest { at: FileOffset(0) };
    assert_eq!(build(MissingDigest::Refuse, None, &[0]).unwrap_err().problem, missing);
    assert_eq!(build(MissingDigest::Refuse, digest(), &[0, 4]).unwrap_err().problem, missing);
    // The whole file's digest is that of its only chunk.
    let index = build(MissingDigest::Refuse, digest(), &[0]).unwrap();
    assert_eq!(index.extents()[0].digest, digest());
    let index = build(MissingDigest::Allow, None, &[0, 4]).unwrap();
    assert_eq!(index.extents()[1].digest, None);
}

#[test]
fn files_that_share_a_frame_are_laid_out_in_its_order() {
    let mut builder = builder();
    for (number, name, frame, frame_offset) in [(0, "c", 500, 0), (1, "b", 0, 2000), (2, "a", 0, 512)] {
        builder.push(number, name.as_bytes(), attributes(0), file(100)).unwrap();
        builder.chunk(number, chunk(0, 100, frame, frame_offset)).unwrap();
    }
    let index = builder.finish().unwrap();
    check_sound(&index);
    assert_eq!(index.frames().len(), 2);
    let place = |name: &str| match &index.node(index.lookup(name.as_bytes()).unwrap()).kind {
        NodeKind::Regular(content) => content.data.0,
        _ => unreachable!(),
    };
    assert_eq!((place("a"), place("b"), place("c")), (0, 4096, 8192));
    assert_eq!(index.data_length(), 8192 + 100);
    assert_eq!(index.extents_of(FrameId(0)), [0, 1]);
    assert_eq!(index.frames()[0].decoded_length, 2100);
}

#[test]
fn a_data_file_larger_than_a_file_is_refused() {
    // Such sizes need a blob that could hold them.
    let limits = Limits { file_bytes: u64::MAX, frame_bytes: u64::MAX, ..Limits::default() };
    let mut builder = IndexBuilder::new(BlobOffset(1 << 62), MissingDigest::Refuse, limits);
    for number in 0..2 {
        builder.push(number, format!("f{number}").as_bytes(), attributes(0), file(1 << 62)).unwrap();
        builder.chunk(number, chunk(0, 1 << 62, number << 61, 0)).unwrap();
    }
    let error = builder.finish().unwrap_err();
    assert_eq!((error.entry, error.name.as_str(), error.problem), (1, "f1", Problem::DataTooLarge));
}

fn any_kind() -> impl Strategy<Value = (u8, u64, String)> {
    (0..8_u8, 0..20_u64, "[abc./]{0,6}")
}

proptest! {
    #[test]
    fn whatever_comes_is_sound_or_refused(
        entries in proptest::collection::vec(("[abc./]{0,8}", any_kind()), 0..40),
        chunks in proptest::collection::vec((0..30_u64, 0..30_u64), 0..40),
    ) {
        let mut builder = builder();
        let mut chunks = chunks.into_iter();
        let mut run = || {
            for (number, (name, (kind, size, target))) in (0..).zip(&entries) {
                let kind = match kind {
                    0 => NewKind::Directory,
                    1 => symlink(target),
                    2 => link(target),
                    3 => NewKind::Fifo,
                    _ => file(*size),
                };
                builder.push(number, name.as_bytes(), attributes(0), kind)?;
                if let NewKind::Regular { size: size @ 1.., .. } = kind {
                    let (first, gap) = chunks.next().unwrap_or((0, 0));
                    let first = first.clamp(1, size);
                    builder.chunk(number, chunk(0, first, number * 10 + gap, 0))?;
                    if first < size {
                        builder.chunk(number, chunk(first, size - first, number * 10 + gap, gap + first))?;
                    }
                }
            }
            Ok::<_, IndexError>(())
        };
        if run().is_ok()
            && let Ok(index) = builder.finish()
        {
            check_sound(&index);
            let lines = dump(&index);
            let names: usize = index.nodes().iter().map(|node| match &node.kind {
                // A directory has one name, the root none.
                NodeKind::Directory { .. } => 1,
                _ => node.link_count as usize,
            }).sum();
            prop_assert_eq!(lines.len(), names);
        }
    }
}
