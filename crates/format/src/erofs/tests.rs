//! What the kernel makes of images is tested where it can be asked, in `crates/mount`.

use std::{
    collections::{BTreeMap, HashMap},
    io,
};

use proptest::prelude::*;

use super::{
    reader::{File, Image},
    *,
};
use crate::{
    digest::Digest,
    index::{
        LayerIndex, Timestamp,
        builder::{Attributes, IndexBuilder, MissingDigest, NewChunk, NewKind},
    },
    limits::Limits,
    position::{BlobOffset, FileOffset},
    tree::{Inode, InodeKind, LayerNumber, OpaqueStyle},
};

/// Bounds beyond those of EROFS.
fn wide() -> Limits {
    Limits { name_bytes: 1 << 12, file_bytes: 1 << 50, xattr_bytes: 1 << 30, ..Limits::default() }
}

fn layer(entries: &[(&[u8], NewKind<'_>, Attributes)]) -> LayerIndex {
    const CHUNK: u64 = 256 << 20;
    let mut builder = IndexBuilder::new(BlobOffset(1 << 50), MissingDigest::Allow, wide());
    let mut frame = 0;
    for (number, (path, kind, attributes)) in (0..).zip(entries) {
        builder.push(number, path, attributes.clone(), *kind).unwrap();
        if let NewKind::Regular { size, .. } = *kind {
            for at in (0..size).step_by(CHUNK as usize) {
                let (file_offset, length) = (FileOffset(at), CHUNK.min(size - at));
                let chunk = NewChunk { file_offset, length, frame: BlobOffset(frame), frame_offset: 0, digest: None };
                builder.chunk(number, chunk).unwrap();
                frame += 1 << 20;
            }
        }
    }
    builder.finish().unwrap()
}

fn plain() -> Attributes {
    Attributes { permissions: 0o640, ..Attributes::default() }
}

fn xattrs(list: impl IntoIterator<Item = (String, Vec<u8>)>) -> Attributes {
    let xattrs = list.into_iter().map(|(name, value)| (name.into_bytes().into(), value.into())).collect();
    Attributes { xattrs, ..plain() }
}

fn write(tree: &Tree, devices: &[u64]) -> Result<(Bootstrap, Vec<u8>), BootstrapError> {
    let mut bytes = Vec::new();
    let bootstrap = write_bootstrap(tree, devices, *b"0123456789abcdef", &mut bytes)?;
    Ok((bootstrap, bytes))
}

/// Writes a tree, reads it again, and compares. Returns what was written.
fn verify(tree: &Tree, devices: &[u64]) -> Bootstrap {
    let (bootstrap, bytes) = write(tree, devices).unwrap();
    assert_eq!(bootstrap.length, bytes.len() as u64);
    assert!(write(tree, devices).unwrap().1 == bytes, "the same tree, other bytes");
    let image = Image::open(&bytes);
    assert_eq!(image.devices, devices.iter().map(|length| length.div_ceil(4096) as u32).collect::<Vec<_>>());
    assert_eq!((image.inodes, bootstrap.inodes), (tree.inodes().count() as u64, image.inodes));
    let mut numbers = HashMap::from([(InodeId::ROOT, image.root)]);
    let mut waiting = vec![InodeId::ROOT];
    while let Some(id) = waiting.pop() {
        let (inode, file) = (tree.inode(id).unwrap(), image.file(numbers[&id]));
        compare(inode, &file);
        if inode.kind != InodeKind::Directory {
            continue;
        }
        let mut entries = Image::entries(&file.content);
        for (name, inode) in [(&b"."[..], id), (b"..", tree.parent(id))] {
            let place = entries.iter().position(|(entry, ..)| entry == name).unwrap();
            assert_eq!(entries.remove(place), (name.to_vec(), numbers[&inode], 2));
        }
        let children = tree.children(id);
        assert_eq!(entries.len(), children.len());
        for ((name, number, file_type), (expected, child)) in entries.iter().zip(children) {
            assert_eq!(**name, **expected);
            let types = [(0o10, 1), (0o4, 2), (0o2, 3), (0o6, 4), (0o1, 5), (0o12, 7)];
            assert!(types.contains(&(image.file(*number).mode >> 12, *file_type)));
            if *numbers.entry(*child).or_insert(*number) == *number {
                waiting.push(*child);
            } else {
                panic!("two inodes where there is one");
            }
        }
    }
    assert_eq!(numbers.len() as u64, image.inodes);
    bootstrap
}

fn compare(inode: &Inode, file: &File) {
    let expected = match &inode.kind {
        InodeKind::Directory => 0o4,
        InodeKind::Regular { .. } => 0o10,
        InodeKind::Symlink { .. } => 0o12,
        InodeKind::CharDevice { .. } => 0o2,
        InodeKind::BlockDevice { .. } => 0o6,
        InodeKind::Fifo => 0o1,
    };
    assert_eq!(file.mode, expected << 12 | inode.permissions);
    assert_eq!((file.links, file.owner), (inode.link_count, (inode.uid, inode.gid)));
    assert_eq!(file.mtime, (inode.mtime.seconds, inode.mtime.nanoseconds));
    let mut device_number = 0;
    match &inode.kind {
        InodeKind::Directory | InodeKind::Fifo => {}
        InodeKind::Symlink { target } => assert_eq!(*file.content, **target),
        InodeKind::CharDevice { major, minor } | InodeKind::BlockDevice { major, minor } => {
            device_number = (minor >> 8) << 20 | major << 8 | minor & 0xff;
        }
        InodeKind::Regular { size: 0, .. } => assert_eq!((file.size, file.chunk), (0, None)),
        InodeKind::Regular { layer, size, data, .. } => {
            assert_eq!(file.size, *size);
            let (device, block, bits) = file.chunk.unwrap();
            assert_eq!((u32::from(device), u64::from(block) * 4096), (layer.0 + 1, data.0));
            assert!(4096 << bits >= *size && (bits == 0 || 4096 << (bits - 1) < *size), "{bits} {size}");
        }
    }
    assert_eq!(file.device_number, device_number);
    let expected: BTreeMap<Vec<u8>, Vec<u8>> =
        inode.xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
    assert_eq!(file.xattrs, expected);
}

#[test]
fn what_does_not_fit_is_refused() {
    let name = [b'n'; 256];
    let target = [b't'; 4096];
    let file = |size| NewKind::Regular { size, digest: None };
    let many = (0..300).map(|number| (format!("user.{number}"), vec![number as u8; 2000]));
    let cases: [(NewKind<'_>, Attributes, &[u8], &str); 5] = [
        (NewKind::Fifo, plain(), &name, "\"/a\": holds a name of 256 bytes; EROFS takes 1 to 255"),
        (
            NewKind::Symlink { target: &target },
            plain(),
            b"b",
            "\"/a/b\": symbolic link to 4096 bytes; Linux takes at most 4095",
        ),
        (
            NewKind::Fifo,
            xattrs([("user.x".to_owned(), vec![0; 65_536])]),
            b"b",
            "\"/a/b\": extended attribute \"user.x\" of 65536 bytes; EROFS takes at most 65535",
        ),
        (
            NewKind::Directory,
            xattrs(many),
            b"b",
            "\"/a/b\": extended attributes of 345900 bytes; EROFS takes at most 262148 beside those that are shared",
        ),
        (
            file((8 << 40) + 1),
            plain(),
            b"b",
            "\"/a/b\": file of 8796093022209 bytes; the largest that can be written is 8 TiB",
        ),
    ];
    for (kind, attributes, name, expected) in cases {
        let path = [b"a/", name].concat();
        let index = layer(&[(b"0", NewKind::Fifo, plain()), (&path, kind, attributes)]);
        let refused = write(&Tree::merged(&[&index]), &[index.data_length()]).unwrap_err();
        assert_eq!(refused.to_string(), expected);
    }
}

#[test]
fn devices_are_checked() {
    let index = layer(&[(b"d/f", NewKind::Regular { size: 5000, digest: None }, plain())]);
    let tree = Tree::merged(&[&LayerIndex::clone(&layer(&[])), &index]);
    verify(&tree, &[0, 5000]);
    for devices in [&[0, 4999][..], &[5000], &[]] {
        let refused = write(&tree, devices).unwrap_err().to_string();
        assert_eq!(refused, "\"/d/f\": its content, 5000 bytes at 0 of layer 1, is not in the layer's data file");
    }
    let refused = write(&tree, &[0, 1 << 44]).unwrap_err().to_string();
    let most = "17592186040320";
    assert_eq!(
        refused,
        format!("the data file of layer 1 has 17592186044416 bytes; EROFS takes at most {most} of a device")
    );
    verify(&tree, &[0, (1 << 44) - 4096]);
    // The root's number has 16 bits, and stays small behind a table of 8 MiB.
    verify(&tree, &vec![5000; 65_535]);
    let refused = write(&tree, &vec![5000; 65_536]).unwrap_err().to_string();
    assert_eq!(refused, "the image has 65536 layers; EROFS takes at most 65535 devices");
}

#[test]
fn attributes_that_cannot_be_named_are_left_out() {
    let names = ["user.", "system.nfs4_acl", "com.apple.quarantine", "posix_acl_access", "user"];
    let mut list: Vec<_> = names.iter().map(|name| ((*name).to_owned(), b"v".to_vec())).collect();
    let only_bad = list.clone();
    list.push(("user.good".to_owned(), b"v".to_vec()));
    let index = layer(&[(b"both", NewKind::Fifo, xattrs(list)), (b"only", NewKind::Fifo, xattrs(only_bad))]);
    let (bootstrap, bytes) = write(&Tree::merged(&[&index]), &[0]).unwrap();
    assert_eq!(bootstrap.left_out_attributes, 2 * names.len() as u64);
    let image = Image::open(&bytes);
    let entries = Image::entries(&image.file(image.root).content);
    let shown = |name: &str| {
        let (_, number, _) = entries.iter().find(|(entry, ..)| entry == name.as_bytes()).unwrap();
        image.file(*number).xattrs
    };
    assert_eq!(shown("both"), BTreeMap::from([(b"user.good".to_vec(), b"v".to_vec())]));
    assert_eq!(shown("only"), BTreeMap::new());
}

#[test]
fn the_time_of_most_files_is_written_once() {
    let mtime = Timestamp { seconds: -7, nanoseconds: 9 };
    let same = Attributes { mtime, ..plain() };
    let mut entries: Vec<(&[u8], NewKind<'_>, Attributes)> = vec![
        (b"", NewKind::Directory, same.clone()),
        (b"a", NewKind::Fifo, same.clone()),
        (b"b", NewKind::Fifo, plain()),
        (b"c", NewKind::Fifo, Attributes { uid: 65_536, ..same.clone() }),
        (b"d", NewKind::Regular { size: 1 << 32, digest: None }, same.clone()),
    ];
    entries.push((b"e", NewKind::Regular { size: (1 << 32) - 1, digest: None }, same));
    let index = layer(&entries);
    let tree = Tree::merged(&[&index]);
    verify(&tree, &[index.data_length()]);
    let (_, bytes) = write(&tree, &[index.data_length()]).unwrap();
    let image = Image::open(&bytes);
    let root = image.file(image.root);
    let compact: Vec<bool> = Image::entries(&root.content)
        .into_iter()
        .filter(|(name, ..)| name[0] != b'.')
        .map(|(_, number, _)| image.file(number).is_compact)
        .collect();
    assert_eq!((root.is_compact, compact), (true, vec![true, false, false, false, true]));
}

/// Bootstraps are kept, and known by a version: whoever changes what is written here changes it there too (`VERSION`
/// in `crates/mount/src/erofs/bootstrap.rs`), and `docs/formats/erofs.md`.
#[test]
fn the_bytes_stay_the_same() {
    let target = [b't'; 4060];
    let large: Vec<_> = ('a'..='y').map(|name| (format!("trusted.{name}"), vec![1; 300])).collect();
    let index = layer(&[
        (b"d", NewKind::Directory, xattrs([("user.a".to_owned(), b"value".to_vec())])),
        (b"d/f", NewKind::Regular { size: 70_000, digest: None }, xattrs([("user.a".to_owned(), b"value".to_vec())])),
        (b"d/g", NewKind::HardLink { target: b"d/f" }, plain()),
        (b"l", NewKind::Symlink { target: &target }, plain()),
        (b"c", NewKind::CharDevice { major: 8, minor: 1000 }, Attributes { uid: 70_000, ..plain() }),
        (b"p", NewKind::Fifo, xattrs(large)),
        (b"d/.wh.gone", NewKind::Regular { size: 0, digest: None }, plain()),
        (b"e/.wh..wh..opq", NewKind::Regular { size: 0, digest: None }, plain()),
    ]);
    let tree = Tree::of_layer(&index, LayerNumber(0), OpaqueStyle::Both);
    verify(&tree, &[index.data_length()]);
    let (_, bytes) = write(&tree, &[index.data_length()]).unwrap();
    assert_eq!(
        Digest::sha256_of(&bytes).to_string(),
        "sha256:ba2c6c2692af91afa85a8fd9c85c96b2d19ddaf5fd464d88606b6072a90defc8"
    );
}

#[test]
fn a_failing_output_is_told() {
    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.0 == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let some = bytes.len().min(self.0);
            self.0 -= some;
            Ok(some)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let paths: Vec<String> = (0..4000).map(|number| format!("d{number}/{number}")).collect();
    let entries: Vec<_> = paths.iter().map(|path| (path.as_bytes(), NewKind::Fifo, plain())).collect();
    let tree = Tree::merged(&[&layer(&entries)]);
    let length = verify(&tree, &[]).length;
    for room in [0, 1000, 200_000, length - 1] {
        let refused = write_bootstrap(&tree, &[], [0; 16], &mut Full(room as usize)).unwrap_err();
        assert!(matches!(refused, BootstrapError::Write(error) if error.kind() == io::ErrorKind::StorageFull));
    }
    write_bootstrap(&tree, &[], [0; 16], &mut Full(length as usize)).unwrap();
}

/// Names of all lengths, types, attributes; a path may come twice, and the first one stays.
fn any_entries() -> impl Strategy<Value = Vec<(Vec<u8>, u8, u32, Attributes)>> {
    let name = prop_oneof![
        3 => "[ab+.-]{1,3}".prop_map(String::into_bytes),
        1 => proptest::collection::vec(1..=255_u8, 1..256),
    ]
    .prop_filter("a name", |name| !name.contains(&b'/') && !name.starts_with(b".wh.") && name != b"." && name != b"..");
    let path = proptest::collection::vec(name, 1..3).prop_map(|names| names.join(&b'/'));
    let value = prop_oneof![Just(vec![7; 30]), proptest::collection::vec(any::<u8>(), 0..700)];
    let xattr =
        (prop_oneof!["user\\.[a-c]{1,9}", "trusted\\.[a-c]", Just("system.posix_acl_access".to_owned())], value);
    let attributes = (0..0o10_000_u16, any::<u32>(), 0..3_i64, proptest::collection::vec(xattr, 0..4));
    let attributes = attributes.prop_map(|(permissions, uid, seconds, list)| Attributes {
        permissions,
        uid: if uid % 2 == 0 { uid } else { 0 },
        gid: uid % 70_000,
        mtime: Timestamp { seconds: seconds - 1, nanoseconds: 0 },
        xattrs: xattrs(list).xattrs,
    });
    proptest::collection::vec((path, 0..6_u8, any::<u32>(), attributes), 0..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn an_image_holds_its_tree(entries in any_entries()) {
        let mut standing: BTreeMap<Vec<u8>, u8> = BTreeMap::new();
        let mut kept = Vec::new();
        let targets: Vec<Vec<u8>> = entries.iter().map(|(_, _, number, _)| vec![b't'; 1 + *number as usize % 4095]).collect();
        for ((path, kind, number, attributes), target) in entries.iter().zip(&targets) {
            let below = |path: &[u8], above: &[u8]| path.starts_with(above) && path.get(above.len()) == Some(&b'/');
            if standing.iter().any(|(other, kind)| other == path || below(other, path) || *kind != 0 && below(path, other)) {
                continue;
            }
            standing.insert(path.clone(), *kind);
            kept.push((path.as_slice(), match kind {
                0 => NewKind::Directory,
                1 => NewKind::Regular { size: u64::from(*number) >> (*number % 32), digest: None },
                2 => NewKind::Symlink { target },
                3 => NewKind::CharDevice { major: number % 4096, minor: number >> 12 },
                4 => NewKind::BlockDevice { major: number % 4096, minor: number >> 12 },
                _ => NewKind::Fifo,
            }, attributes.clone()));
        }
        let index = layer(&kept);
        verify(&Tree::merged(&[&index]), &[index.data_length()]);
        verify(&Tree::of_layer(&index, LayerNumber(0), OpaqueStyle::Trusted), &[index.data_length()]);
    }
}
