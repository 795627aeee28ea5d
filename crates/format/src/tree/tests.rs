use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    digest::Digest,
    index::builder::{Attributes, IndexBuilder, MissingDigest, NewChunk, NewKind},
    limits::Limits,
    position::{BlobOffset, FileOffset},
};

/// What an entry of a test's layer is.
#[derive(Clone, PartialEq, Eq, Debug)]
enum What {
    Dir,
    /// With content of so many bytes.
    File(u64),
    Symlink(&'static str),
    Link(String),
    Char(u32, u32),
}

/// Permissions tell layer and entry.
fn layer(number: u16, entries: &[(String, What)]) -> LayerIndex {
    let mut builder = IndexBuilder::new(BlobOffset(1 << 20), MissingDigest::Refuse, Limits::default());
    for (entry, (name, what)) in (0_u16..).zip(entries) {
        let kind = match what {
            What::Dir => NewKind::Directory,
            What::File(size) => NewKind::Regular { size: *size, digest: None },
            What::Symlink(target) => NewKind::Symlink { target: target.as_bytes() },
            What::Link(target) => NewKind::HardLink { target: target.as_bytes() },
            What::Char(major, minor) => NewKind::CharDevice { major: *major, minor: *minor },
        };
        let attributes = Attributes { permissions: number * 256 + entry, ..Attributes::default() };
        builder.push(entry.into(), name.as_bytes(), attributes, kind).unwrap();
        if let What::File(size @ 1..) = what {
            let chunk = NewChunk {
                file_offset: FileOffset(0),
                length: *size,
                frame: BlobOffset(u64::from(entry) * 100),
                frame_offset: 0,
                digest: Some(Digest::Sha256([0; 32])),
            };
            builder.chunk(entry.into(), chunk).unwrap();
        }
    }
    builder.finish().unwrap()
}

fn layer_of(number: u16, entries: &[(&str, What)]) -> LayerIndex {
    layer(number, &entries.iter().map(|(name, what)| ((*name).into(), what.clone())).collect::<Vec<_>>())
}

/// One line for each name: path, kind, links, permissions; and attributes where there are any.
fn dump(tree: &Tree) -> Vec<String> {
    let mut lines = Vec::new();
    let mut waiting = vec![(String::new(), InodeId::ROOT)];
    while let Some((path, id)) = waiting.pop() {
        let inode = tree.inode(id).unwrap();
        let kind = match &inode.kind {
            InodeKind::Directory => "dir".into(),
            InodeKind::Regular { layer, size, .. } => format!("reg:{}:{size}", layer.0),
            InodeKind::Symlink { target } => format!("symlink:{}", target.escape_ascii()),
            InodeKind::CharDevice { major, minor } => format!("char:{major}:{minor}"),
            InodeKind::BlockDevice { major, minor } => format!("block:{major}:{minor}"),
            InodeKind::Fifo => "fifo".into(),
        };
        let xattrs: String = inode.xattrs.iter().map(|(name, _)| format!(" {}", name.escape_ascii())).collect();
        let path_shown = if path.is_empty() { "/" } else { &path };
        lines.push(format!("{path_shown} {kind} {} {:x}{xattrs}", inode.link_count, inode.permissions));
        for (name, child) in tree.children(id).iter().rev() {
            if tree.inode(*child).unwrap().kind == InodeKind::Directory {
                assert_eq!(tree.parent(*child), id);
            }
            assert_eq!(tree.child(id, name), Some(*child));
            waiting.push((format!("{path}/{}", name.escape_ascii()), *child));
        }
    }
    lines
}

const EMPTY: What = What::File(0);

#[test]
fn a_layer_shows_whiteouts_as_overlayfs_wants_them() {
    let index = layer_of(
        1,
        &[
            ("gone/.wh.x", EMPTY),
            ("same/.wh.x", EMPTY),
            ("same/x", What::File(5)),
            ("opaque/.wh..wh..opq", EMPTY),
            ("opaque/y", EMPTY),
            ("dir/.wh.d", EMPTY),
            ("dir/d/z", EMPTY),
        ],
    );
    let expected = [
        "/ dir 6 1ed",
        "/dir dir 3 1ed",
        "/dir/d dir 2 1ed trusted.overlay.opaque",
        "/dir/d/z reg:3:0 1 106",
        "/gone dir 2 1ed",
        "/gone/x char:0:0 1 0",
        "/opaque dir 2 1ed trusted.overlay.opaque",
        "/opaque/y reg:3:0 1 104",
        "/same dir 2 1ed",
        "/same/x reg:3:5 1 102",
    ];
    assert_eq!(dump(&Tree::of_layer(&index, LayerNumber(3), OpaqueStyle::Trusted)), expected);
    for (style, names) in
        [(OpaqueStyle::User, "user.overlay.opaque"), (OpaqueStyle::Both, "trusted.overlay.opaque user.overlay.opaque")]
    {
        let expected = expected.map(|line| line.replace("trusted.overlay.opaque", names));
        assert_eq!(dump(&Tree::of_layer(&index, LayerNumber(3), style)), expected);
    }
}

#[test]
fn names_and_attributes_that_steer_are_hidden() {
    let index = layer_of(
        0,
        &[
            (".prefetch.landmark", What::File(1)),
            (".no.prefetch.landmark", What::File(1)),
            ("stargz.index.json", EMPTY),
            ("foo/.prefetch.landmark", What::File(1)),
            ("foo/stargz.index.json", EMPTY),
            (".wh..wh.plnk/12.34", EMPTY),
            (".wh..wh.aufs", EMPTY),
            (".wh.", EMPTY),
            (".wh..", EMPTY),
            (".wh...", EMPTY),
        ],
    );
    let expected =
        ["/ dir 3 1ed", "/foo dir 2 1ed", "/foo/.prefetch.landmark reg:0:1 1 3", "/foo/stargz.index.json reg:0:0 1 4"];
    assert_eq!(dump(&Tree::merged(&[&index])), expected);
    assert_eq!(dump(&Tree::of_layer(&index, LayerNumber(0), OpaqueStyle::Both)), expected);

    let mut builder = IndexBuilder::new(BlobOffset(1), MissingDigest::Refuse, Limits::default());
    let xattrs = ["user.overlay.opaque", "user.z", "trusted.overlay.whiteout", "trusted.a", "user.overlayfs"];
    let xattrs = xattrs.map(|name| (name.as_bytes().into(), (*b"y").into())).into();
    builder.push(0, b"d", Attributes { xattrs, ..Attributes::default() }, NewKind::Directory).unwrap();
    let index = builder.finish().unwrap();
    let expected = ["/ dir 3 1ed", "/d dir 2 0 trusted.a user.overlayfs user.z"];
    assert_eq!(dump(&Tree::merged(&[&index])), expected);
    assert_eq!(dump(&Tree::of_layer(&index, LayerNumber(0), OpaqueStyle::Both)), expected);
}

#[test]
fn a_device_of_the_image_is_no_whiteout() {
    let index = layer_of(
        0,
        &[("null", What::Char(0, 0)), ("tty", What::Char(5, 0)), (".wh.x", EMPTY), ("x", What::Char(0, 0))],
    );
    assert_eq!(
        dump(&Tree::of_layer(&index, LayerNumber(0), OpaqueStyle::Both)),
        ["/ dir 2 1ed", "/tty char:5:0 1 1", "/x char:0:0 1 0",]
    );
    assert_eq!(
        dump(&Tree::merged(&[&index])),
        ["/ dir 2 1ed", "/null char:0:0 1 0", "/tty char:5:0 1 1", "/x char:0:0 1 3",]
    );
}

#[track_caller]
fn merges(layers: &[&[(&str, What)]], expected: &[&str]) {
    let indexes: Vec<_> = (0..).zip(layers).map(|(number, entries)| layer_of(number, entries)).collect();
    assert_eq!(dump(&Tree::merged(&indexes.iter().collect::<Vec<_>>())), expected);
}

#[test]
fn nothing_is_an_empty_root() {
    merges(&[], &["/ dir 2 1ed"]);
    merges(&[&[]], &["/ dir 2 1ed"]);
    // The root, too, is described by the highest layer that describes it.
    merges(
        &[&[("/", What::Dir)], &[("x", EMPTY), ("./", What::Dir)], &[("y", EMPTY)]],
        &["/ dir 2 101", "/x reg:1:0 1 100", "/y reg:2:0 1 200"],
    );
}

#[test]
fn whiteouts_remove_from_lower_layers() {
    merges(
        &[
            &[("a/x", EMPTY), ("a/y/z", EMPTY), ("b", EMPTY)],
            &[("a/.wh.x", EMPTY), ("a/.wh.y", EMPTY), (".wh.b", EMPTY)],
        ],
        &["/ dir 3 1ed", "/a dir 2 1ed"],
    );
    // Not from their own, in whatever order; nor from higher ones; nor what isn't there.
    merges(
        &[&[(".wh.x", EMPTY), ("x", EMPTY), (".wh.nothing", EMPTY)], &[("y", EMPTY), (".wh.y", EMPTY)]],
        &["/ dir 2 1ed", "/x reg:0:0 1 1", "/y reg:1:0 1 100"],
    );
    // A directory that replaces a removed one has nothing of it.
    merges(
        &[&[("d/x", EMPTY)], &[(".wh.d", EMPTY), ("d/y", EMPTY)]],
        &["/ dir 3 1ed", "/d dir 2 1ed", "/d/y reg:1:0 1 101"],
    );
    merges(
        &[&[("d/x", EMPTY)], &[(".wh.d", EMPTY)], &[("d/y", EMPTY)]],
        &["/ dir 3 1ed", "/d dir 2 1ed", "/d/y reg:2:0 1 200"],
    );
}

#[test]
fn opaque_directories_hide_lower_ones() {
    merges(
        &[&[("d/x", EMPTY), ("d/s/x", EMPTY)], &[("d/y", EMPTY), ("d/.wh..wh..opq", EMPTY), ("d/s/z", EMPTY)]],
        &["/ dir 3 1ed", "/d dir 3 1ed", "/d/s dir 2 1ed", "/d/s/z reg:1:0 1 102", "/d/y reg:1:0 1 100"],
    );
    merges(&[&[("x", EMPTY)], &[(".wh..wh..opq", EMPTY)]], &["/ dir 2 1ed"]);
}

#[test]
fn higher_layers_replace() {
    merges(
        &[&[("f", EMPTY), ("d/x", EMPTY)], &[("f/y", EMPTY), ("d", What::Symlink("f"))]],
        &["/ dir 3 1ed", "/d symlink:f 1 101", "/f dir 2 1ed", "/f/y reg:1:0 1 100"],
    );
    // A directory keeps its content and gets new attributes, but not made-up ones.
    merges(
        &[&[("d", What::Dir), ("d/x", EMPTY)], &[("d", What::Dir)], &[("d/y", EMPTY)]],
        &["/ dir 3 1ed", "/d dir 2 100", "/d/x reg:0:0 1 1", "/d/y reg:2:0 1 200"],
    );
}

#[test]
fn hard_links_stay_one_inode() {
    let link = |target: &str| What::Link(target.into());
    merges(
        &[
            &[("a", What::File(3)), ("b", link("a")), ("d/c", link("a"))],
            &[(".wh.a", EMPTY)],
            &[("b", What::File(4)), ("e", link("b"))],
        ],
        &["/ dir 3 1ed", "/b reg:2:4 2 200", "/d dir 2 1ed", "/d/c reg:0:3 1 0", "/e reg:2:4 2 200"],
    );
    let index = layer_of(0, &[("a", What::File(3)), ("b", link("a")), (".wh..wh.c", link("a"))]);
    let tree = Tree::of_layer(&index, LayerNumber(0), OpaqueStyle::Both);
    assert_eq!(tree.lookup(b"a"), tree.lookup(b"/./b"));
    assert_eq!(tree.inode(tree.lookup(b"a").unwrap()).unwrap().link_count, 2);
}

#[test]
fn paths_resolve_inside_the_tree() {
    let index = layer_of(
        0,
        &[
            ("usr/lib/f", EMPTY),
            ("lib", What::Symlink("usr/lib")),
            ("usr/up", What::Symlink("../../../lib/./f")),
            ("usr/root", What::Symlink("/")),
            ("slash", What::Symlink("lib/f/")),
            ("loop", What::Symlink("loop")),
            ("dangling", What::Symlink("usr/nothing")),
        ],
    );
    let tree = Tree::merged(&[&index]);
    let file = tree.lookup(b"usr/lib/f").unwrap();
    for path in ["usr/lib/f", "/lib/f", "lib/../lib/f", "../usr/up", "usr/root/usr/root/lib//f", "./usr/./up"] {
        assert_eq!(tree.resolve(path.as_bytes()), Ok(file), "{path}");
    }
    assert_eq!(tree.resolve(b"lib/.."), Ok(tree.lookup(b"usr").unwrap()));
    assert_eq!(tree.resolve(b""), Ok(InodeId::ROOT));
    assert_eq!(tree.lookup(b"lib/f"), None);
    let name = |name: &str| name.to_string();
    for (path, error) in [
        ("nothing", ResolveError::NotFound { name: name("nothing") }),
        ("usr/nothing/x", ResolveError::NotFound { name: name("nothing") }),
        ("dangling", ResolveError::NotFound { name: name("nothing") }),
        ("lib/f/x", ResolveError::NotADirectory { name: name("f") }),
        ("lib/f/..", ResolveError::NotADirectory { name: name("f") }),
        ("slash", ResolveError::NotADirectory { name: name("f") }),
        ("loop", ResolveError::TooManyLinks { name: name("loop") }),
    ] {
        assert_eq!(tree.resolve(path.as_bytes()), Err(error), "{path}");
    }
}

#[test]
fn foreign_numbers_lead_nowhere() {
    let tree = Tree::merged(&[&layer_of(0, &[("a/b", EMPTY)])]);
    for id in [0, 4, u64::MAX].map(InodeId) {
        assert_eq!((tree.inode(id), tree.children(id).len(), tree.parent(id)), (None, 0, InodeId::ROOT));
        assert_eq!(tree.child(id, b"a"), None);
    }
    let ids: Vec<_> = tree.inodes().map(|(id, inode)| (id.0, inode.kind == InodeKind::Directory)).collect();
    assert_eq!(ids, [(1, true), (2, true), (3, false)]);
}

/// A naive model: the paths of a file system, to which layers are applied one after the other.
#[derive(Clone, PartialEq, Debug)]
struct ModelFile {
    /// Equal for the names of one inode.
    identity: (u16, u16),
    directory: bool,
    permissions: u16,
}

type Model = BTreeMap<String, ModelFile>;

fn is_below(path: &str, directory: &str) -> bool {
    directory.is_empty() || path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))
}

fn parents(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

fn apply(model: &mut Model, number: u16, entries: &[(String, What)]) {
    // Markers first: they act on lower layers only.
    for (path, _) in entries {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let join = |name: &str| if directory.is_empty() { name.into() } else { format!("{directory}/{name}") };
        if name == ".wh..wh..opq" {
            model.retain(|path, _| !is_below(path, directory));
        } else if let Some(removed) = name.strip_prefix(".wh.") {
            let removed = join(removed);
            model.retain(|path, _| *path != removed && !is_below(path, &removed));
        }
    }
    let mut files = Model::new();
    for (entry, (path, what)) in (0_u16..).zip(entries) {
        for parent in parents(path) {
            let replaced = model.get(parent).is_none_or(|standing| !standing.directory);
            if replaced {
                let made = ModelFile { identity: (number, 1000 + entry), directory: true, permissions: 0o755 };
                model.insert(parent.into(), made);
            }
        }
        let permissions = number * 256 + entry;
        let file = match what {
            What::Link(target) => files[target].clone(),
            What::Dir => ModelFile { identity: (number, entry), directory: true, permissions },
            _ => ModelFile { identity: (number, entry), directory: false, permissions },
        };
        files.insert(path.clone(), file.clone());
        if path.rsplit('/').next().unwrap().starts_with(".wh.") {
            continue;
        }
        if !file.directory {
            model.retain(|other, _| !is_below(other, path));
        }
        model.insert(path.clone(), file);
    }
}

/// Makes a list of entries that a builder takes out of any list: no entry below a file, links to files only, no name
/// twice.
fn sound(entries: &[(String, u8, usize)]) -> Vec<(String, What)> {
    let mut sound: Vec<(String, What)> = Vec::new();
    for (path, kind, target) in entries {
        let clashes = sound.iter().any(|(other, what)| {
            other == path || (is_below(path, other) && *what != What::Dir) || is_below(other, path)
        });
        if clashes {
            continue;
        }
        let targets: Vec<_> = sound.iter().filter(|(_, what)| matches!(what, What::File(_))).collect();
        let what = match kind {
            0 | 1 => What::Dir,
            2 if !targets.is_empty() => What::Link(targets[target % targets.len()].0.clone()),
            _ => What::File(*target as u64 % 3),
        };
        let is_marker = path.rsplit('/').next().unwrap().starts_with(".wh.");
        sound.push((path.clone(), if is_marker { EMPTY } else { what }));
    }
    sound
}

fn any_layer() -> impl Strategy<Value = Vec<(String, What)>> {
    let name = prop_oneof![
        4 => "[abc]",
        1 => "\\.wh\\.[abc]",
        1 => Just(".wh..wh..opq".to_string()),
    ];
    let path = (proptest::collection::vec("[abc]", 0..3), name).prop_map(|(mut directories, name)| {
        directories.push(name);
        directories.join("/")
    });
    proptest::collection::vec((path, 0..6_u8, 0..10_usize), 0..12).prop_map(|entries| sound(&entries))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn merging_is_applying_layer_after_layer(layers in proptest::collection::vec(any_layer(), 0..5)) {
        let indexes: Vec<_> = (0..).zip(&layers).map(|(number, entries)| layer(number, entries)).collect();
        let tree = Tree::merged(&indexes.iter().collect::<Vec<_>>());
        let mut model = Model::new();
        for (number, entries) in (0..).zip(&layers) {
            apply(&mut model, number, entries);
        }
        let mut paths = BTreeMap::new();
        let mut waiting = vec![(String::new(), InodeId::ROOT)];
        while let Some((path, id)) = waiting.pop() {
            for (name, child) in tree.children(id) {
                let name = std::str::from_utf8(name).unwrap();
                let path = if path.is_empty() { name.into() } else { format!("{path}/{name}") };
                paths.insert(path.clone(), *child);
                waiting.push((path, *child));
            }
        }
        prop_assert_eq!(paths.keys().collect::<Vec<_>>(), model.keys().collect::<Vec<_>>());
        for (path, id) in &paths {
            let (inode, expected) = (tree.inode(*id).unwrap(), &model[path]);
            prop_assert_eq!(inode.kind == InodeKind::Directory, expected.directory, "{}", path);
            prop_assert_eq!(inode.permissions, expected.permissions, "{}", path);
            let links = if expected.directory {
                let below = model.iter().filter(|(other, file)| {
                    file.directory && other.rsplit_once('/').is_some_and(|(parent, _)| parent == path)
                });
                2 + below.count()
            } else {
                let names: Vec<_> = model.iter().filter(|(_, file)| file.identity == expected.identity).collect();
                prop_assert!(names.iter().all(|(name, _)| paths[*name] == *id));
                names.len()
            };
            prop_assert_eq!(inode.link_count as usize, links, "{}", path);
        }
        // Every inode has a name.
        let named: std::collections::BTreeSet<_> = paths.values().collect();
        prop_assert_eq!(named.len() + 1, tree.inodes().count());
    }
}
