//! Bootstraps that `loris_format::erofs` writes, mounted by the kernel and compared with their trees entry by entry, and
//! checked by `fsck.erofs`.
//!
//! Nothing of ours stands between but the writer: the kernel is asked through its own interface, and data files are
//! filled with bytes that tell where they belong.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::OsStr,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            fs::{DirEntryExt as _, FileExt as _, FileTypeExt as _, MetadataExt as _},
        },
    },
    path::{Path, PathBuf},
    process::Command,
};

use loris_format::{
    digest::Digest,
    erofs::write_bootstrap,
    index::{
        LayerIndex, Timestamp, Xattrs,
        builder::{Attributes, IndexBuilder, MissingDigest, NewChunk, NewKind},
    },
    limits::Limits,
    position::{BlobOffset, FileOffset},
    tree::{Inode, InodeId, InodeKind, LayerNumber, OpaqueStyle, Tree},
};
use proptest::prelude::*;
use rustix::{
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount,
        fsopen,
    },
};

const BLOCK: u64 = 4096;
/// Files up to this size are compared whole, others at their ends and in the middle.
const COMPARED: u64 = 1 << 20;

/// Makes layer indexes.
struct Layer {
    builder: IndexBuilder,
    entries: u64,
    frame: u64,
}

impl Layer {
    fn new() -> Self {
        let builder = IndexBuilder::new(BlobOffset(1 << 50), MissingDigest::Refuse, Limits::default());
        Self { builder, entries: 0, frame: 0 }
    }

    fn put(&mut self, path: impl AsRef<[u8]>, kind: NewKind<'_>, attributes: Attributes) {
        const CHUNK: u64 = 128 << 20;
        self.builder.push(self.entries, path.as_ref(), attributes, kind).unwrap();
        if let NewKind::Regular { size, .. } = kind {
            for at in (0..size).step_by(CHUNK as usize) {
                let chunk = NewChunk {
                    file_offset: FileOffset(at),
                    length: CHUNK.min(size - at),
                    frame: BlobOffset(self.frame),
                    frame_offset: 0,
                    digest: Some(Digest::Sha256([0; 32])),
                };
                self.builder.chunk(self.entries, chunk).unwrap();
                self.frame += 1 << 20;
            }
        }
        self.entries += 1;
    }

    fn file(&mut self, path: impl AsRef<[u8]>, size: u64) {
        self.put(path, NewKind::Regular { size, digest: None }, mode(0o644));
    }

    fn directory(&mut self, path: impl AsRef<[u8]>) {
        self.put(path, NewKind::Directory, mode(0o755));
    }

    fn link(&mut self, path: impl AsRef<[u8]>, target: &[u8]) {
        self.put(path, NewKind::Symlink { target }, mode(0o777));
    }

    fn finish(self) -> LayerIndex {
        self.builder.finish().unwrap()
    }
}

fn mode(permissions: u16) -> Attributes {
    Attributes { permissions, ..Attributes::default() }
}

fn at(seconds: i64, nanoseconds: u32) -> Attributes {
    Attributes { mtime: Timestamp { seconds, nanoseconds }, ..mode(0o600) }
}

fn xattrs(list: &[(&str, &[u8])]) -> Attributes {
    let xattrs: Xattrs = list.iter().map(|(name, value)| (name.as_bytes().into(), (*value).into())).collect();
    Attributes { xattrs, ..mode(0o644) }
}

/// Bytes that stand nowhere else: of a layer's data file, from a place that is a multiple of 8.
fn noise(layer: u32, from: u64, length: usize) -> Vec<u8> {
    let word = |number: u64| {
        let mut z = (number ^ u64::from(layer) << 48).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb).to_le_bytes()
    };
    let mut bytes: Vec<u8> = (from / 8..).take(length.div_ceil(8)).flat_map(word).collect();
    bytes.truncate(length);
    bytes
}

/// The parts of a file that are written and compared: offsets and lengths.
fn parts(size: u64) -> Vec<(u64, usize)> {
    const PART: u64 = 64 << 10;
    if size <= COMPARED {
        return vec![(0, size as usize)];
    }
    let middle = (size / 2).next_multiple_of(BLOCK);
    let last = (size - PART) / BLOCK * BLOCK;
    vec![(0, PART as usize), (middle, PART as usize), (last, (size - last) as usize)]
}

/// A tree on disk: bootstrap and data files.
struct Image {
    directory: tempfile::TempDir,
    bootstrap: PathBuf,
    devices: Vec<PathBuf>,
}

impl Image {
    fn new(tree: &Tree, lengths: &[u64]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut bytes = Vec::new();
        let written = write_bootstrap(tree, lengths, *b"a file system's.", &mut bytes).unwrap();
        assert_eq!(written.length, bytes.len() as u64);
        assert_eq!(written.inodes, tree.inodes().count() as u64);
        let mut again = Vec::new();
        write_bootstrap(tree, lengths, *b"a file system's.", &mut again).unwrap();
        assert!(bytes == again, "the same tree, other bytes");
        let bootstrap = directory.path().join("bootstrap");
        fs::write(&bootstrap, bytes).unwrap();
        let devices: Vec<PathBuf> =
            (0..lengths.len()).map(|number| directory.path().join(format!("{number}.data"))).collect();
        for (device, length) in devices.iter().zip(lengths) {
            // The kernel reads whole blocks, and a short answer is an error to it.
            File::create(device).unwrap().set_len(length.next_multiple_of(BLOCK)).unwrap();
        }
        for (_, inode) in tree.inodes() {
            if let InodeKind::Regular { layer, size: size @ 1.., data, .. } = inode.kind {
                let file = File::options().write(true).open(&devices[layer.0 as usize]).unwrap();
                for (at, length) in parts(size) {
                    file.write_all_at(&noise(layer.0, data.0 + at, length), data.0 + at).unwrap();
                }
            }
        }
        Self { directory, bootstrap, devices }
    }

    /// Makes a mount that stands nowhere, and goes with its descriptor.
    fn mount(&self) -> Result<OwnedFd, Errno> {
        let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", &self.bootstrap)?;
        fsconfig_set_flag(&context, "ro")?;
        for device in &self.devices {
            fsconfig_set_string(&context, "device", device)?;
        }
        fsconfig_create(&context)?;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
    }

    /// Has `fsck.erofs` check it: its structures, and where all content is there, that it can be read.
    fn check(&self, test: &str) {
        /// Version 1.5 has so many places for open devices, and goes on without the others.
        const MOST_DEVICES: usize = 256;
        let Some(fsck) = loris_testkit::require_peer(test, "fsck.erofs") else { return };
        if self.devices.len() > MOST_DEVICES {
            return;
        }
        let mut command = Command::new(fsck);
        let mut bytes = 0;
        for device in &self.devices {
            bytes += fs::metadata(device).unwrap().len();
            command.arg(format!("--device={}", device.display()));
        }
        if bytes < 64 << 20 {
            command.arg("--extract");
        }
        let output = command.arg(&self.bootstrap).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "fsck.erofs: {}", String::from_utf8_lossy(&said));
    }
}

/// Whether this machine can do it.
fn can_mount(test: &str) -> bool {
    if !loris_testkit::require_root(test) {
        return false;
    }
    match Image::new(&Tree::merged(&[]), &[]).mount() {
        Ok(_) => true,
        Err(Errno::NODEV | Errno::NOTBLK | Errno::NOSYS) => {
            loris_testkit::skip(test, "EROFS over plain files (Linux 6.12, CONFIG_EROFS_FS_BACKED_BY_FILE)");
            false
        }
        Err(errno) => panic!("an empty image cannot be mounted: {errno}"),
    }
}

/// Mounts a tree and compares.
fn verify(test: &str, tree: &Tree, layers: &[&LayerIndex]) {
    let lengths: Vec<u64> = layers.iter().map(|layer| layer.data_length()).collect();
    let image = Image::new(tree, &lengths);
    let mount = image.mount().unwrap_or_else(|errno| panic!("{test}: {errno}"));
    compare(tree, &PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd())));
    drop(mount);
    image.check(test);
    drop(image.directory);
}

/// Compares what is mounted with the tree.
fn compare(tree: &Tree, root: &Path) {
    let mut numbers: HashMap<InodeId, u64> = HashMap::new();
    // `root` itself is a link of procfs: what is behind it is looked at.
    let mut waiting = vec![(root.join("."), InodeId::ROOT)];
    while let Some((path, id)) = waiting.pop() {
        let inode = tree.inode(id).unwrap();
        let first = !numbers.contains_key(&id);
        let found = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let number = *numbers.entry(id).or_insert(found.ino());
        assert_eq!(number, found.ino(), "{}", path.display());
        if !first {
            continue;
        }
        compare_file(&path, inode, &found);
        if inode.kind != InodeKind::Directory {
            continue;
        }
        let mut shown = BTreeMap::new();
        for entry in fs::read_dir(&path).unwrap() {
            let entry = entry.unwrap();
            let file_type = entry.file_type().unwrap();
            assert!(shown.insert(entry.file_name().into_vec(), (entry.ino(), file_type)).is_none());
        }
        let children = tree.children(id);
        let names: Vec<&[u8]> = children.iter().map(|(name, _)| &**name).collect();
        assert_eq!(shown.keys().map(Vec::as_slice).collect::<Vec<_>>(), names, "{}", path.display());
        for (name, child) in children {
            let path = path.join(OsStr::from_bytes(name));
            let found = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert_eq!(shown[&**name], (found.ino(), found.file_type()), "{}", path.display());
            waiting.push((path, *child));
        }
        assert!(fs::symlink_metadata(path.join("not there")).is_err());
    }
    let different: BTreeSet<u64> = numbers.values().copied().collect();
    assert_eq!(different.len(), tree.inodes().count());
}

fn compare_file(path: &Path, inode: &Inode, found: &fs::Metadata) {
    let shown = path.display();
    let kind = found.file_type();
    let mut device = (0, 0);
    match &inode.kind {
        InodeKind::Directory => assert!(kind.is_dir(), "{shown}"),
        InodeKind::Fifo => assert!(kind.is_fifo(), "{shown}"),
        InodeKind::CharDevice { major, minor } => {
            assert!(kind.is_char_device(), "{shown}");
            device = (*major, *minor);
        }
        InodeKind::BlockDevice { major, minor } => {
            assert!(kind.is_block_device(), "{shown}");
            device = (*major, *minor);
        }
        InodeKind::Symlink { target } => {
            assert!(kind.is_symlink(), "{shown}");
            assert_eq!(found.size(), target.len() as u64, "{shown}");
            let read = fs::read_link(path).unwrap_or_else(|error| panic!("{shown}: {error}"));
            assert!(read.as_os_str().as_bytes() == &**target, "{shown}");
        }
        InodeKind::Regular { layer, size, data, .. } => {
            assert!(kind.is_file(), "{shown}");
            assert_eq!(found.size(), *size, "{shown}");
            let file = File::open(path).unwrap_or_else(|error| panic!("{shown}: {error}"));
            for (at, length) in parts(*size) {
                let mut bytes = vec![0; length];
                file.read_exact_at(&mut bytes, at).unwrap_or_else(|error| panic!("{shown} at {at}: {error}"));
                assert!(bytes == noise(layer.0, data.0 + at, length), "{shown} at {at}");
            }
            assert_eq!(file.read_at(&mut [0], *size).unwrap(), 0, "{shown}");
        }
    }
    assert_eq!(found.rdev(), rustix::fs::makedev(device.0, device.1), "{shown}");
    assert_eq!(found.mode() & 0o7777, u32::from(inode.permissions), "{shown}");
    assert_eq!((found.uid(), found.gid()), (inode.uid, inode.gid), "{shown}");
    let mtime = (inode.mtime.seconds, i64::from(inode.mtime.nanoseconds));
    assert_eq!((found.mtime(), found.mtime_nsec()), mtime, "{shown}");
    assert_eq!(found.nlink(), u64::from(inode.link_count), "{shown}");
    let expected: BTreeMap<Vec<u8>, Vec<u8>> =
        inode.xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
    let attributes = read_xattrs(path).unwrap_or_else(|error| panic!("{shown}: {error}"));
    assert!(attributes == expected, "{shown}: {attributes:?}");
}

fn read_xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names)?;
    let mut found = BTreeMap::new();
    for name in names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 64 << 10];
        let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value)?;
        value.truncate(length);
        assert!(found.insert(name.to_vec(), value).is_none(), "an attribute is listed twice");
    }
    // One that is not there: a search to the end of all of them.
    let missing = rustix::fs::lgetxattr(path, "trusted.not.there", &mut [0; 8]);
    assert_eq!(missing, Err(Errno::NODATA));
    Ok(found)
}

/// Mounts one layer merged, and as a lower directory of overlayfs.
fn verify_layer(test: &str, layer: &LayerIndex) {
    verify(test, &Tree::merged(&[layer]), &[layer]);
    verify(test, &Tree::of_layer(layer, LayerNumber(0), OpaqueStyle::Both), &[layer]);
}

#[test]
fn every_type_of_file() {
    const TEST: &str = "erofs_bootstrap::every_type_of_file";
    if !can_mount(TEST) {
        return;
    }
    let mut layer = Layer::new();
    layer.put("", NewKind::Directory, Attributes { uid: 12, ..mode(0o1751) });
    for (number, size) in [0, 1, 4095, 4096, 4097, 8192, 12_345, COMPARED, 5 * COMPARED + 17].into_iter().enumerate() {
        layer.file(format!("file{number}"), size);
    }
    layer.put("setuid", NewKind::Regular { size: 10, digest: None }, mode(0o6755));
    layer.put("sticky", NewKind::Directory, mode(0o3777));
    layer.put("nothing", NewKind::Fifo, mode(0));
    let numbers = [(0, 0), (1, 3), (0, 256), (4095, 1_048_575), (8, 255), (259, 65_536), (255, 4095)];
    for (number, (major, minor)) in numbers.into_iter().enumerate() {
        layer.put(format!("char{number}"), NewKind::CharDevice { major, minor }, mode(0o620));
        layer.put(format!("block{number}"), NewKind::BlockDevice { major, minor }, mode(0o660));
    }
    layer.link("link", b"../../file1");
    layer.put("pipe", NewKind::Fifo, mode(0o600));
    for (number, (uid, gid)) in
        [(65_535, 0), (65_536, 0), (0, 65_536), (u32::MAX - 1, u32::MAX - 1)].into_iter().enumerate()
    {
        layer.put(format!("owner{number}"), NewKind::Fifo, Attributes { uid, gid, ..mode(0o600) });
    }
    let times = [(0, 1), (-1, 999_999_999), (-10_000_000_000, 5), (1 << 31, 0), (1 << 33, 123_456_789), (1 << 40, 7)];
    for (number, (seconds, nanoseconds)) in times.into_iter().enumerate() {
        layer.put(format!("time{number}"), NewKind::Fifo, at(seconds, nanoseconds));
    }
    for kind in ["file1", "link", "pipe", "char1"] {
        for number in 0..3 {
            let target = kind.as_bytes();
            layer.put(format!("sticky/{kind}-{number}"), NewKind::HardLink { target }, Attributes::default());
        }
    }
    verify_layer(TEST, &layer.finish());
}

#[test]
fn an_empty_root() {
    const TEST: &str = "erofs_bootstrap::an_empty_root";
    if can_mount(TEST) {
        verify(TEST, &Tree::merged(&[]), &[]);
        verify_layer(TEST, &Layer::new().finish());
    }
}

#[test]
fn directories_of_any_size() {
    const TEST: &str = "erofs_bootstrap::directories_of_any_size";
    if !can_mount(TEST) {
        return;
    }
    let mut layer = Layer::new();
    for number in 0..10_000 {
        layer.link(format!("many/{number}"), b"x");
    }
    // Names that sort before `.` and between `.` and `..`, and the longest ones.
    for name in ["!", "-", "+x", ".-", ".+", ".,x", "..-", "...", "..a", ".a", "a", "\u{7f}", "\u{e4}"] {
        layer.link(format!("odd/{name}"), b"x");
        layer.link(format!("odd/{}", name.repeat(255 / name.len())), b"x");
    }
    layer.put([b"odd/".as_slice(), &[0xff; 255]].concat(), NewKind::Fifo, mode(0));
    // Every size about a block, by the length of the last name; and about two.
    for (full, names) in [(0, 14), (1, 29)] {
        for length in 1..=255 {
            for number in 0..names {
                layer.link(format!("sizes/{full}-{length}/{number:0>255}"), b"x");
            }
            layer.link(format!("sizes/{full}-{length}/{}", "x".repeat(length)), b"x");
        }
    }
    for number in 0..300 {
        layer.directory(format!("directories/{number}"));
    }
    verify_layer(TEST, &layer.finish());
}

#[test]
fn links_of_every_length() {
    const TEST: &str = "erofs_bootstrap::links_of_every_length";
    if !can_mount(TEST) {
        return;
    }
    let target: Vec<u8> = (0..4095_u32).map(|at| b'a' + (at % 23) as u8).collect();
    // Neighbours of all sizes, with and without attributes, compact and extended.
    let mut layer = Layer::new();
    let mut order: Vec<usize> = (1..=4095).collect();
    for (number, length) in order.iter().copied().enumerate() {
        let mut attributes = if number % 2 == 0 { mode(0o777) } else { at(number as i64, 1) };
        if number % 3 == 0 {
            let value = vec![b'v'; number % 200];
            attributes.xattrs = vec![(b"trusted.some".as_slice().into(), value.into())];
        }
        layer.put(format!("rising/{length:04}"), NewKind::Symlink { target: &target[..length] }, attributes);
    }
    // Far apart in length, next to each other.
    order.sort_by_key(|length| length * 2654 % 4099);
    for (number, length) in order.iter().enumerate() {
        layer.link(format!("mixed/{number:04}"), &target[..*length]);
    }
    verify_layer(TEST, &layer.finish());
}

#[test]
fn attributes_many_and_large_and_shared() {
    const TEST: &str = "erofs_bootstrap::attributes_many_and_large_and_shared";
    if !can_mount(TEST) {
        return;
    }
    let mut layer = Layer::new();
    let regular = NewKind::Regular { size: 5, digest: None };
    // Version 2: owner rwx, a user r-x, group r--, mask rwx, others none; as the kernel stores it.
    let acl = [
        &2_u32.to_le_bytes()[..],
        &entry(1, 7, u32::MAX),
        &entry(2, 5, 1000),
        &entry(4, 4, u32::MAX),
        &entry(0x10, 7, u32::MAX),
        &entry(0x20, 0, u32::MAX),
    ]
    .concat();
    let mut with_acl = xattrs(&[("system.posix_acl_access", &acl), ("system.posix_acl_default", &acl)]);
    with_acl.permissions = 0o770;
    layer.put("acl", NewKind::Directory, with_acl.clone());
    with_acl.xattrs.truncate(1);
    layer.put("acl/file", regular, with_acl);
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for number in 0..200 {
        layer.put(format!("capable/{number}"), regular, xattrs(&[("security.capability", &capability)]));
    }
    for length in (0..=70).chain(200..=300).chain(4000..4200).chain([65_534, 65_535]) {
        let value: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
        let own = format!("own {length}");
        let list = [("user.large", &value[..]), ("trusted.own", own.as_bytes()), ("user.a", b"")];
        layer.put(format!("values/{length}"), regular, xattrs(&list));
        layer.put(format!("directories/{length}"), NewKind::Directory, xattrs(&list[1..]));
        layer.put(format!("links/{length}"), NewKind::Symlink { target: own.as_bytes() }, xattrs(&list[1..2]));
    }
    for count in [1, 2, 127, 128, 129, 130, 300, 1000] {
        let names: Vec<String> = (0..count).map(|number| format!("user.number.{number}")).collect();
        // Of their own, and the same for all.
        let values: Vec<String> = names.iter().map(|name| format!("{name} of {count}")).collect();
        let list: Vec<(&str, &[u8])> =
            names.iter().zip(&values).map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        layer.put(format!("many/own-{count}"), regular, xattrs(&list));
        let list: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), name.as_bytes())).collect();
        layer.put(format!("many/shared-{count}"), NewKind::Directory, xattrs(&list));
    }
    let long = format!("trusted.{}", "x".repeat(247));
    layer.put("long", NewKind::Fifo, xattrs(&[(&long, b"value"), ("security.x", b"\0\0")]));
    verify_layer(TEST, &layer.finish());
}

fn entry(tag: u16, permissions: u16, id: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..2].copy_from_slice(&tag.to_le_bytes());
    bytes[2..4].copy_from_slice(&permissions.to_le_bytes());
    bytes[4..].copy_from_slice(&id.to_le_bytes());
    bytes
}

#[test]
fn depth() {
    const TEST: &str = "erofs_bootstrap::depth";
    if can_mount(TEST) {
        let mut layer = Layer::new();
        layer.file(format!("{}file", "d/".repeat(500)), 100);
        verify_layer(TEST, &layer.finish());
    }
}

#[test]
fn files_beyond_32_bits() {
    const TEST: &str = "erofs_bootstrap::files_beyond_32_bits";
    if !can_mount(TEST) {
        return;
    }
    let mut layer = Layer::new();
    layer.file("before", 3);
    for (number, size) in [(1 << 32) - 1, 1 << 32, (1 << 32) + 1, (5 << 32) + 12_345].into_iter().enumerate() {
        layer.file(format!("large{number}"), size);
    }
    layer.file("after", 3);
    verify_layer(TEST, &layer.finish());
}

#[test]
fn layers_of_an_image() {
    const TEST: &str = "erofs_bootstrap::layers_of_an_image";
    if !can_mount(TEST) {
        return;
    }
    // More than one block of devices, and content of each of them.
    for count in [2, 200, 700_usize] {
        let layers: Vec<LayerIndex> = (0..count)
            .map(|number| {
                let mut layer = Layer::new();
                for file in 0..3 {
                    layer.file(format!("from/{number}/{file}"), 3000 * (file + 1) + number as u64);
                }
                layer.file("replaced by all", number as u64 + 1);
                layer.file(format!("from/{}/.wh.0", number.saturating_sub(1)), 0);
                layer.finish()
            })
            .collect();
        let layers: Vec<&LayerIndex> = layers.iter().collect();
        verify(TEST, &Tree::merged(&layers), &layers);
    }
}

#[test]
fn a_layer_over_others() {
    const TEST: &str = "erofs_bootstrap::a_layer_over_others";
    if !can_mount(TEST) {
        return;
    }
    let mut layer = Layer::new();
    layer.file("a/.wh.gone", 0);
    layer.file("b/.wh..wh..opq", 0);
    layer.file("b/new", 7);
    layer.file(".wh.c", 0);
    let layer = layer.finish();
    for style in [OpaqueStyle::Trusted, OpaqueStyle::User, OpaqueStyle::Both] {
        let tree = Tree::of_layer(&layer, LayerNumber(0), style);
        let gone = tree.lookup(b"a/gone").and_then(|id| tree.inode(id)).map(|inode| &inode.kind);
        assert_eq!(gone, Some(&InodeKind::CharDevice { major: 0, minor: 0 }));
        verify(TEST, &tree, &[&layer]);
    }
}

/// What a random entry is; the numbers are used as the type needs.
#[derive(Clone, Debug)]
struct Random {
    path: Vec<u8>,
    kind: u8,
    number: u32,
    attributes: Attributes,
}

fn random_layer(entries: &[Random]) -> LayerIndex {
    let mut layer = Layer::new();
    let mut standing: BTreeMap<Vec<u8>, u8> = BTreeMap::new();
    for Random { path, kind, number, attributes } in entries {
        let below = |path: &[u8], above: &[u8]| path.starts_with(above) && path.get(above.len()) == Some(&b'/');
        let clashes = standing
            .iter()
            .any(|(other, kind)| other == path || below(other, path) || *kind != 0 && below(path, other));
        if clashes {
            continue;
        }
        let target = vec![b't'; 1 + *number as usize % 4095];
        let links: Vec<&Vec<u8>> = standing.iter().filter(|(_, kind)| **kind != 0).map(|(path, _)| path).collect();
        let mut attributes = attributes.clone();
        let new = match kind {
            0 => NewKind::Directory,
            1 => NewKind::Regular { size: u64::from(*number) % 20_000, digest: None },
            2 => NewKind::Symlink { target: &target },
            3 => NewKind::CharDevice { major: number % 4096, minor: number >> 12 },
            4 => NewKind::BlockDevice { major: number % 4096, minor: number >> 12 },
            5 if !links.is_empty() => NewKind::HardLink { target: links[*number as usize % links.len()] },
            _ => NewKind::Fifo,
        };
        if !matches!(kind, 0 | 1) {
            // Linux shows those of nothing else to programs.
            attributes.xattrs.retain(|(name, _)| !name.starts_with(b"user."));
        }
        layer.put(path, new, attributes);
        standing.insert(path.clone(), *kind);
    }
    layer.finish()
}

fn any_entry() -> impl Strategy<Value = Random> {
    let name = prop_oneof![
        4 => "[ab+.-]{1,3}".prop_map(String::into_bytes),
        1 => proptest::collection::vec(1..=255_u8, 1..256),
    ]
    .prop_filter("a name", |name| !name.contains(&b'/') && name != b"." && name != b"..");
    let path = proptest::collection::vec(name, 1..4).prop_map(|names| names.join(&b'/'));
    let xattr = (prop_oneof!["user\\.[a-c]", "trusted\\.[a-c]{1,20}", "security\\.x"], 0..700_usize, any::<u8>());
    let xattrs = prop_oneof![
        3 => Just(Vec::new()),
        1 => proptest::collection::btree_map(xattr.clone().prop_map(|(name, ..)| name), (xattr.clone(), any::<bool>()), 1..6)
            .prop_map(|map| {
                let value = |((_, length, byte), same): ((String, usize, u8), bool)| {
                    if same { vec![b'='; 12] } else { vec![byte; length] }
                };
                map.into_iter().map(|(name, v)| (name.into_bytes().into(), value(v).into())).collect()
            }),
    ];
    let id = prop_oneof![Just(0), 0..70_000_u32, Just(u32::MAX - 1)];
    let mtime = prop_oneof![
        2 => Just(Timestamp { seconds: 1_700_000_000, nanoseconds: 5 }),
        1 => (-(1_i64 << 36)..1 << 36, 0..1_000_000_000_u32)
            .prop_map(|(seconds, nanoseconds)| Timestamp { seconds, nanoseconds }),
    ];
    let attributes = (0..0o10_000_u16, id.clone(), id, mtime, xattrs)
        .prop_map(|(permissions, uid, gid, mtime, xattrs)| Attributes { permissions, uid, gid, mtime, xattrs });
    (path, 0..7_u8, any::<u32>(), attributes).prop_map(|(path, kind, number, attributes)| Random {
        path,
        kind,
        number,
        attributes,
    })
}

#[test]
fn random_trees() {
    const TEST: &str = "erofs_bootstrap::random_trees";
    if !can_mount(TEST) {
        return;
    }
    let layers = proptest::collection::vec(proptest::collection::vec(any_entry(), 0..40), 1..4);
    proptest!(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) }, |(layers in layers)| {
        let layers: Vec<LayerIndex> = layers.iter().map(|entries| random_layer(entries)).collect();
        let layers: Vec<&LayerIndex> = layers.iter().collect();
        verify(TEST, &Tree::merged(&layers), &layers);
        verify(TEST, &Tree::of_layer(layers[0], LayerNumber(0), OpaqueStyle::Trusted), &layers[..1]);
    });
}
