use proptest::prelude::*;

use super::*;
use crate::{limits::Limits, tar::Reader};

pub(in crate::tar) fn entry(path: &[u8], kind: EntryKind) -> Entry {
    Entry { path: path.to_vec(), kind, permissions: 0o644, ..Entry::default() }
}

/// Reads back the one entry that `bytes` are the headers of; its places are set to nothing.
fn read_back(bytes: &[u8]) -> Entry {
    let mut reader = Reader::new(bytes, &Limits::default());
    let mut entry = reader.next_entry().unwrap().unwrap();
    assert_eq!(reader.position(), bytes.len() as u64, "the headers end where the content begins");
    assert_eq!(entry.header_offset + 512, bytes.len() as u64);
    entry.header_offset = 0;
    assert_eq!(entry.content_offset.take(), (entry.kind == EntryKind::Regular).then_some(bytes.len() as u64));
    entry
}

#[test]
fn what_fits_is_plain_ustar() {
    let long = [vec![b'd'; 155], vec![b'n'; 100]].join(&b'/');
    let cases = [
        Entry { size: 0o77_777_777_777, ..entry(b"a/b", EntryKind::Regular) },
        entry(&[b'x'; 100], EntryKind::Regular),
        entry(&long, EntryKind::Regular),
        entry(&[vec![b'd'; 155], vec![b'n'; 99], vec![]].join(&b'/'), EntryKind::Directory),
        Entry { uid: 0o7_777_777, gid: 0o7_777_777, permissions: 0o7777, ..entry(b"a/", EntryKind::Directory) },
        Entry { link: vec![b'l'; 100], ..entry(b"a", EntryKind::Symlink) },
        Entry { link: b"../b c\n".to_vec(), ..entry(b"a", EntryKind::HardLink) },
        Entry { device: (0o7_777_777, 0o7_777_777), ..entry(b"a", EntryKind::CharDevice) },
        Entry { device: (8, 1), ..entry(b"a", EntryKind::BlockDevice) },
        Entry { user_name: vec![b'u'; 31], group_name: b"wheel".to_vec(), ..entry(b"a", EntryKind::Fifo) },
        Entry { mtime: Timestamp { seconds: 0o77_777_777_777, nanoseconds: 0 }, ..entry(b"", EntryKind::Directory) },
    ];
    for entry in cases {
        let bytes = encode_header(&entry).unwrap();
        assert_eq!(bytes.len(), BLOCK_BYTES, "{entry:?}");
        assert_eq!(read_back(&bytes), entry);
    }
}

#[test]
fn what_does_not_fit_is_in_records() {
    let regular = || entry(b"a", EntryKind::Regular);
    let too_long = [vec![b'd'; 156], vec![b'n'; 100]].join(&b'/');
    let mtime = |seconds, nanoseconds| Entry { mtime: Timestamp { seconds, nanoseconds }, ..regular() };
    let cases: &[(Entry, &str)] = &[
        (Entry { size: 1 << 33, ..regular() }, "19 size=8589934592\n"),
        (Entry { uid: 1 << 21, ..regular() }, "15 uid=2097152\n"),
        (Entry { gid: u32::MAX, ..regular() }, "18 gid=4294967295\n"),
        (Entry { device: (1 << 21, 0), ..entry(b"d", EntryKind::BlockDevice) }, "27 SCHILY.devmajor=2097152\n"),
        (Entry { user_name: vec![b'u'; 32], ..regular() }, "42 uname=uuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuu\n"),
        (entry("\u{e4}".as_bytes(), EntryKind::Regular), "11 path=\u{e4}\n"),
        (Entry { link: vec![b'l'; 101], ..entry(b"a", EntryKind::Symlink) }, "115 linkpath=lll"),
        (entry(&too_long, EntryKind::Regular), "267 path=ddd"),
        (entry(&[b'x'; 101], EntryKind::Directory), "111 path=xxx"),
        (entry(&[&b"/"[..], &[b'x'; 100]].concat(), EntryKind::Regular), "111 path=/xxx"),
        (mtime(1, 500_000_000), "13 mtime=1.5\n"),
        (mtime(1, 1), "21 mtime=1.000000001\n"),
        (mtime(-1, 0), "12 mtime=-1\n"),
        (mtime(-1, 750_000_000), "15 mtime=-0.25\n"),
        (mtime(-2, 999_999_999), "22 mtime=-1.000000001\n"),
        (mtime(1 << 33, 0), "20 mtime=8589934592\n"),
        (mtime(i64::MIN, 1), "40 mtime=-9223372036854775807.999999999\n"),
        (
            Entry {
                xattrs: vec![
                    (b"security.capability"[..].into(), b"\x01\0=\n"[..].into()),
                    (b"user.a=%3D"[..].into(), b""[..].into()),
                ],
                ..regular()
            },
            "41 SCHILY.xattr.security.capability=\u{1}\0=\n\n32 SCHILY.xattr.user.a%3D%253D=\n",
        ),
    ];
    for (entry, records) in cases {
        let bytes = encode_header(entry).unwrap();
        let found = &bytes[512..][..records.len()];
        assert_eq!(found.escape_ascii().to_string(), records.as_bytes().escape_ascii().to_string());
        assert_eq!(&bytes[..13], b"PaxHeaders.0/");
        assert_eq!(read_back(&bytes), *entry);
    }
    assert_eq!(encode_header(&regular()).unwrap(), encode_header(&regular()).unwrap());
}

#[test]
fn names_that_are_not_utf_8_are_marked() {
    let bytes = encode_header(&entry(b"\xff\xfe", EntryKind::Regular)).unwrap();
    assert!(bytes[512..].starts_with(b"21 hdrcharset=BINARY\n11 path=\xff\xfe\n"), "{}", bytes[512..].escape_ascii());
    assert_eq!(read_back(&bytes).path, b"\xff\xfe");
}

#[test]
fn large_sizes_are_the_same_in_header_and_record() {
    let entry = Entry { size: 1 << 40, ..entry(b"big", EntryKind::Regular) };
    let bytes = encode_header(&entry).unwrap();
    let block: &Block = bytes.last_chunk().unwrap();
    assert_eq!(header::number(&block[header::SIZE]), Ok(1 << 40));
    // And where no one knows PAX, the entry is right in all but what a header cannot hold.
    assert_eq!(read_back(block), entry);
}

#[test]
fn the_header_of_a_cut_name_is_no_directory() {
    let path = [vec![b'd'; 99], vec![b'n'; 160]].join(&b'/');
    let bytes = encode_header(&entry(&path, EntryKind::Regular)).unwrap();
    let block: &Block = bytes.last_chunk().unwrap();
    assert_eq!(header::path(block), vec![b'd'; 99]);
    assert_eq!(read_back(&bytes).path, path);
}

#[test]
fn what_cannot_be_written_is_refused() {
    let regular = || entry(b"a", EntryKind::Regular);
    let xattr = |name: &[u8]| (Box::from(name), Box::from(&b"v"[..]));
    for bad in [
        entry(b"a\0b", EntryKind::Regular),
        Entry { link: b"\0".to_vec(), ..entry(b"a", EntryKind::Symlink) },
        Entry { user_name: b"\0".to_vec(), ..regular() },
        entry(b"a/", EntryKind::Regular),
        Entry { size: 1, ..entry(b"a", EntryKind::Directory) },
        Entry { size: 1 << 63, ..regular() },
        Entry { permissions: 0o10_000, ..regular() },
        Entry { mtime: Timestamp { seconds: 0, nanoseconds: 1_000_000_000 }, ..regular() },
        Entry { xattrs: vec![xattr(b"")], ..regular() },
        Entry { xattrs: vec![xattr(b"b"), xattr(b"a")], ..regular() },
        Entry { xattrs: vec![xattr(b"a"), xattr(b"a")], ..regular() },
    ] {
        assert!(encode_header(&bad).is_err(), "{bad:?}");
    }
}

#[test]
fn record_lengths_count_themselves() {
    for length in [0, 1, 4, 5, 6, 90, 91, 92, 93, 94, 95, 986, 987, 988, 989, 990, 991, 992, 9_985, 9_986, 9_987] {
        let record = pax_record(b"k", &vec![b'v'; length]);
        let stated = record.split(|&byte| byte == b' ').next().unwrap();
        assert_eq!(str::from_utf8(stated).unwrap(), record.len().to_string());
    }
}

#[test]
fn padding_fills_blocks() {
    for (size, expected) in [(0, 0), (1, 511), (511, 1), (512, 0), (513, 511), (u64::MAX, 1)] {
        assert_eq!(padding(size).len(), expected, "{size}");
    }
}

fn name(most: usize) -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![8 => Just(b'n'), 2 => Just(b'/'), 1 => 1_u8..=255];
    prop_oneof![
        prop::collection::vec(byte.clone(), 0..20),
        prop::collection::vec(byte, 0..most),
        "[a-z/]{90,110}".prop_map(String::into_bytes)
    ]
}

pub(in crate::tar) fn any_entry() -> impl Strategy<Value = Entry> {
    use EntryKind::{BlockDevice, CharDevice, Directory, Fifo, HardLink, Regular, Symlink};
    let kind = prop::sample::select(vec![Regular, HardLink, Symlink, CharDevice, BlockDevice, Directory, Fifo]);
    let number = || prop_oneof![0..3_000_u32, any::<u32>()];
    let seconds = prop_oneof![0..2_000_000_000_i64, any::<i64>()];
    let time = (seconds, prop_oneof![Just(0), 0..1_000_000_000_u32]);
    let xattrs = prop::collection::btree_map(
        prop::collection::vec(1_u8..=255, 1..20),
        prop::collection::vec(any::<u8>(), 0..40),
        0..3,
    );
    let names = (name(400), name(200), name(40), name(40));
    (kind, names, (number(), number(), number(), number()), 0..0o10_000_u16, time, xattrs, 0..(1_u64 << 40)).prop_map(
        |(kind, (mut path, link, user_name, group_name), (uid, gid, major, minor), permissions, time, xattrs, size)| {
            if kind == Regular {
                path.push(b'f');
            }
            Entry {
                path,
                kind,
                link: if matches!(kind, HardLink | Symlink) { link } else { Vec::new() },
                size: if kind == Regular { size } else { 0 },
                permissions,
                uid,
                gid,
                user_name,
                group_name,
                mtime: Timestamp { seconds: time.0, nanoseconds: time.1 },
                device: if matches!(kind, CharDevice | BlockDevice) { (major, minor) } else { (0, 0) },
                xattrs: xattrs.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
                ..Entry::default()
            }
        },
    )
}

proptest! {
    #[test]
    fn what_is_written_is_read(entry in any_entry()) {
        prop_assert_eq!(read_back(&encode_header(&entry).unwrap()), entry);
    }
}
