use std::{collections::HashMap, fmt::Write as _};

use super::*;
use crate::{
    index::Timestamp,
    tar::{END_OF_ARCHIVE, EntryKind, padding, writer},
};

const V7: &[u8] = b"\0\0\0\0\0\0\0\0";
const USTAR: &[u8] = b"ustar\x0000";
const GNU: &[u8] = b"ustar  \0";

/// A header made by hand: fields as they stand, the checksum put right.
#[derive(Clone)]
struct Raw(Block);

impl Raw {
    fn new(magic: &[u8], type_flag: u8, name: &[u8]) -> Self {
        let mut block = [0; BLOCK_BYTES];
        block[header::TYPE_FLAG] = type_flag;
        block[header::MAGIC].copy_from_slice(magic);
        Self(block)
            .at(header::NAME.start, name)
            .at(header::MODE.start, b"0000644\0")
            .at(header::UID.start, b"0001750\0")
            .at(header::GID.start, b"0001751\0")
            .at(header::MTIME.start, b"12345670123\0")
            .size(0)
    }

    fn at(mut self, place: usize, bytes: &[u8]) -> Self {
        self.0[place..place + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn size(self, size: usize) -> Self {
        self.at(header::SIZE.start, format!("{size:011o}\0").as_bytes())
    }

    fn link(self, link: &[u8]) -> Self {
        self.at(header::LINK.start, link)
    }

    fn bytes(mut self) -> Vec<u8> {
        let (sum, _) = header::checksums(&self.0);
        self.0[header::CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.to_vec()
    }

    /// The header, the content, and its padding; the size is set.
    fn with(self, content: &[u8]) -> Vec<u8> {
        [&self.size(content.len()).bytes(), content, padding(content.len() as u64)].concat()
    }
}

fn file(name: &[u8], content: &[u8]) -> Vec<u8> {
    Raw::new(USTAR, b'0', name).with(content)
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let data: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value.as_bytes())).collect();
    Raw::new(USTAR, b'x', b"PaxHeaders/x").with(&data)
}

fn record(keyword: &str, value: &[u8]) -> Vec<u8> {
    writer::pax_record(keyword.as_bytes(), value)
}

fn limits() -> Limits {
    Limits { tar_metadata_bytes: 8 << 10, xattr_bytes: 1 << 10, ..Limits::default() }
}

/// Reads everything.
fn read(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, String> {
    read_with(archive, &limits())
}

fn read_with(archive: &[u8], limits: &Limits) -> Result<Vec<(Entry, Vec<u8>)>, String> {
    let mut reader = Reader::new(archive, limits);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry().map_err(|error| error.to_string())? {
        let mut content = Vec::new();
        reader.content().read_to_end(&mut content).map_err(|error| error.to_string())?;
        assert_eq!(content.len() as u64, entry.size);
        entries.push((entry, content));
    }
    Ok(entries)
}

/// Everything as text: kind, path, link or content.
fn listing(archive: &[u8]) -> Result<String, String> {
    let mut text = String::new();
    for (entry, content) in read(archive)? {
        let shown = if entry.kind == EntryKind::Regular { content } else { entry.link };
        writeln!(text, "{:?} {} {}", entry.kind, entry.path.escape_ascii(), shown.escape_ascii()).unwrap();
    }
    Ok(text)
}

fn one(archive: &[u8]) -> Entry {
    let mut entries = read(archive).unwrap();
    assert_eq!(entries.len(), 1);
    entries.remove(0).0
}

#[test]
fn every_dialect_is_read() {
    let [name, link, prefix, star] =
        [("Regular ", 100, " \n"), ("Symlink a ", 100, "\n"), ("Regular ", 155, "/b \n"), ("Regular ", 131, "/b \n")]
            .map(|(before, length, behind)| format!("{before}{}{behind}", "n".repeat(length)));
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("v7 file", Raw::new(V7, 0, b"a/b").with(b"x"), "Regular a/b x\n"),
        ("v7 directory", Raw::new(V7, 0, b"a/").bytes(), "Directory a/ \n"),
        ("v7 directory of type 0", Raw::new(V7, b'0', b"a/").bytes(), "Directory a/ \n"),
        ("v7 has no prefix", Raw::new(V7, 0, b"a").at(345, b"p").with(b""), "Regular a \n"),
        ("v7 hard link", Raw::new(V7, b'1', b"a").link(b"b").bytes(), "HardLink a b\n"),
        ("full name", Raw::new(V7, 0, &[b'n'; 100]).with(b""), &name),
        ("full link", Raw::new(V7, b'2', b"a").link(&[b'n'; 100]).bytes(), &link),
        ("ustar prefix", Raw::new(USTAR, b'0', b"b").at(345, b"a").with(b"x"), "Regular a/b x\n"),
        ("ustar full prefix", Raw::new(USTAR, b'0', b"b").at(345, &[b'n'; 155]).with(b""), &prefix),
        ("ustar without version", Raw::new(b"ustar\0\0\0", b'0', b"b").at(345, b"a").with(b""), "Regular a/b \n"),
        (
            "star prefix ends before its times",
            Raw::new(USTAR, b'0', b"b").at(345, &[b'n'; 131]).at(476, b"12345670123 ").at(508, b"tar\0").with(b""),
            &star,
        ),
        ("contiguous file", Raw::new(USTAR, b'7', b"a").with(b"x"), "Regular a x\n"),
        ("symbolic link", Raw::new(USTAR, b'2', b"a").link(b"../x").bytes(), "Symlink a ../x\n"),
        ("fifo", Raw::new(USTAR, b'6', b"a").bytes(), "Fifo a \n"),
        ("directory without slash", Raw::new(USTAR, b'5', b"a").bytes(), "Directory a \n"),
        ("a regular file's link means nothing", Raw::new(USTAR, b'0', b"a").link(b"b").with(b""), "Regular a \n"),
        (
            "gnu long name and link, with and without NUL",
            [
                Raw::new(GNU, b'K', b"././@LongLink").with(b"../link\0"),
                Raw::new(GNU, b'L', b"././@LongLink").with(b"name"),
                Raw::new(GNU, b'2', b"na").link(b"../li").bytes(),
            ]
            .concat(),
            "Symlink name ../link\n",
        ),
        (
            "gnu long name before pax path",
            [
                pax(&[("path", "pax")]),
                Raw::new(GNU, b'L', b"././@LongLink").with(b"gnu\0x"),
                Raw::new(GNU, b'0', b"header").with(b""),
            ]
            .concat(),
            "Regular gnu \n",
        ),
        ("pax path", [pax(&[("path", "a=b\n"), ("comment", "x")]), file(b"c", b"x")].concat(), "Regular a=b\\n x\n"),
        (
            "pax path of bytes",
            [
                Raw::new(USTAR, b'x', b"x").with(&[record("hdrcharset", b"BINARY"), record("path", b"\xff")].concat()),
                file(b"c", b""),
            ]
            .concat(),
            "Regular \\xff \n",
        ),
        (
            "pax linkpath",
            [pax(&[("linkpath", "over")]), Raw::new(USTAR, b'1', b"a").link(b"b").bytes()].concat(),
            "HardLink a over\n",
        ),
        (
            "pax path makes a directory of an old file",
            [pax(&[("path", "d/")]), Raw::new(USTAR, 0, b"d").bytes()].concat(),
            "Directory d/ \n",
        ),
        (
            "the second local header replaces the first",
            [
                pax(&[("path", "one"), ("linkpath", "kept?")]),
                pax(&[("path", "two")]),
                Raw::new(USTAR, b'2', b"h").link(b"link").bytes(),
            ]
            .concat(),
            "Symlink two link\n",
        ),
        (
            "solaris' extended header",
            [Raw::new(USTAR, b'X', b"x").with(&record("path", b"solaris")), file(b"a", b"")].concat(),
            "Regular solaris \n",
        ),
        (
            "records are for one entry",
            [pax(&[("path", "one")]), file(b"a", b"x"), file(b"b", b"y")].concat(),
            "Regular one x\nRegular b y\n",
        ),
        ("an empty archive", vec![], ""),
        ("an empty path", Raw::new(USTAR, b'5', b"").bytes(), "Directory  \n"),
        (
            "sizes of entries without content mean nothing",
            [b'2', b'3', b'4', b'5', b'6']
                .into_iter()
                .flat_map(|flag| Raw::new(USTAR, flag, b"a").size(513).bytes())
                .collect(),
            "Symlink a \nCharDevice a \nBlockDevice a \nDirectory a \nFifo a \n",
        ),
    ];
    for (name, archive, expected) in cases {
        assert_eq!(listing(&archive).as_deref(), Ok(expected), "{name}");
        let ended = [&archive[..], &END_OF_ARCHIVE].concat();
        assert_eq!(listing(&ended).as_deref(), Ok(expected), "{name}");
    }
}

#[test]
fn all_fields_are_read() {
    let raw = Raw::new(USTAR, b'3', b"dev/null")
        .at(header::USER_NAME.start, b"root")
        .at(header::GROUP_NAME.start, &[b'g'; 32])
        .at(header::DEVICE_MAJOR.start, b"0000001\0")
        .at(header::DEVICE_MINOR.start, b"0000003\0");
    let plain = Entry {
        path: b"dev/null".to_vec(),
        kind: EntryKind::CharDevice,
        permissions: 0o644,
        uid: 1000,
        gid: 1001,
        user_name: b"root".to_vec(),
        group_name: vec![b'g'; 32],
        mtime: Timestamp { seconds: 0o12_345_670_123, nanoseconds: 0 },
        device: (1, 3),
        ..Entry::default()
    };
    assert_eq!(one(&raw.clone().bytes()), plain);
    let records = [
        ("SCHILY.devmajor", "2097152"),
        ("SCHILY.devminor", "4294967295"),
        ("uid", "4294967294"),
        ("gid", "-2"),
        ("uname", "Ursula"),
        ("gname", "\u{e4}"),
        ("mtime", "-1.25"),
        ("SCHILY.xattr.user.b", "2"),
        ("SCHILY.xattr.user.a", "1"),
        ("SCHILY.ino", "17"),
        ("atime", "not looked at"),
    ];
    let extended = Entry {
        uid: u32::MAX - 1,
        gid: u32::MAX - 1,
        user_name: b"Ursula".to_vec(),
        group_name: "\u{e4}".into(),
        mtime: Timestamp { seconds: -2, nanoseconds: 750_000_000 },
        device: (1 << 21, u32::MAX),
        xattrs: vec![(b"user.a"[..].into(), b"1"[..].into()), (b"user.b"[..].into(), b"2"[..].into())],
        header_offset: 1024,
        ..plain
    };
    assert_eq!(one(&[pax(&records), raw.bytes()].concat()), extended);
}

#[test]
fn numbers_may_be_base_256_and_negative() {
    let raw = Raw::new(GNU, b'0', b"a")
        .at(header::UID.start, b"\x80\0\0\0\xff\xff\xff\xfe")
        .at(header::GID.start, b"\xff\xff\xff\xff\xff\xff\xff\xfe")
        .at(header::MTIME.start, &[0xff; 12])
        .at(header::SIZE.start, b"\x80\0\0\0\0\0\0\x02\0\0\0\0");
    let mut reader = Reader::new(std::io::Cursor::new(raw.bytes()), &limits());
    let entry = reader.next_entry().unwrap().unwrap();
    assert_eq!((entry.uid, entry.gid, entry.mtime.seconds, entry.size), (u32::MAX - 1, u32::MAX - 1, -1, 8 << 30));
    assert!(matches!(reader.next_entry(), Err(Error::Truncated { offset: 512, part: "content" })));
    assert!(matches!(reader.next_entry(), Err(Error::GivenUp { offset: 512 })));
    assert!(reader.content().read(&mut [0]).is_err());
}

#[test]
fn global_records_are_for_all_that_follow() {
    let global = |records: &[(&str, &str)]| {
        let data: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value.as_bytes())).collect();
        Raw::new(USTAR, b'g', b"pax_global_header").with(&data)
    };
    let archive = [
        file(b"before", b""),
        global(&[("comment", "52d1"), ("uid", "7"), ("gname", "all"), ("mtime", "1.5")]),
        file(b"global", b""),
        pax(&[("uid", "8"), ("mtime", "")]),
        file(b"local", b""),
        global(&[("gname", "")]),
        file(b"taken back", b""),
    ]
    .concat();
    let found: Vec<_> = read(&archive)
        .unwrap()
        .into_iter()
        .map(|(entry, _)| (entry.uid, entry.group_name, entry.mtime.nanoseconds))
        .collect();
    let all = || b"all".to_vec();
    assert_eq!(found, [(1000, vec![], 0), (7, all(), 500_000_000), (8, all(), 0), (7, vec![], 500_000_000)]);
    // A global header alone is an archive too: `git archive` of nothing.
    assert_eq!(listing(&global(&[("comment", "x")])).unwrap(), "");
    assert!(listing(&[global(&[("size", "0")]), file(b"a", b"x")].concat()).unwrap_err().contains("global PAX record"));
}

/// The bytes of an entry's content look like entries. Who takes the wrong one of two sizes sees them as such
/// (CVE-2025-62518 and its kin).
#[test]
fn content_is_never_taken_for_entries() {
    let smuggled = file(b"smuggled", b"evil");
    let size = smuggled.len().to_string();
    let visible = format!("Regular outer {}\nRegular after x\n", smuggled.escape_ascii());
    let after = file(b"after", b"x");

    // The record's size is right, the header's is 0 or beyond.
    for stated in [0, 512, 1 << 30] {
        let outer = Raw::new(USTAR, b'0', b"outer").size(stated).bytes();
        let archive = [&pax(&[("size", &size)]), &outer, &smuggled[..], &after].concat();
        assert_eq!(listing(&archive), Ok(visible.clone()), "{stated}");
    }
    // A size record before a long name is for the file, not for the name.
    let name = Raw::new(GNU, b'L', b"././@LongLink").with(b"outer\0");
    let outer = Raw::new(GNU, b'0', b"x").bytes();
    let archive = [&pax(&[("size", &size)]), &name, &outer, &smuggled[..], &after].concat();
    assert_eq!(listing(&archive), Ok(visible));
    // A directory or link has no content, in whichever place a size is stated.
    for (flag, kind) in [(b'5', "Directory"), (b'2', "Symlink"), (b'1', "HardLink")] {
        let outer = Raw::new(USTAR, flag, b"outer").size(smuggled.len()).bytes();
        let expected = format!("{kind} outer \nRegular smuggled evil\nRegular after x\n");
        assert_eq!(listing(&[&outer, &smuggled[..], &after].concat()).as_deref(), Ok(&expected[..]));
        let outer = Raw::new(USTAR, flag, b"outer").bytes();
        assert_eq!(
            listing(&[&pax(&[("size", &size)]), &outer, &smuggled[..], &after].concat()).as_deref(),
            Ok(&expected[..])
        );
    }
    // A directory by its slash with content: programs disagree what follows.
    for flag in [0, b'0'] {
        let archive = [Raw::new(USTAR, flag, b"dir/").with(&smuggled), after.clone()].concat();
        assert!(listing(&archive).unwrap_err().contains("directory"), "{flag}");
    }
}

#[test]
fn hard_links_may_have_content() {
    let after = file(b"after", b"x");
    let expected = "HardLink a b\nRegular after x\n";
    for content in [&b"content"[..], &[b'c'; 512], &[b'c'; 513], &[b'c'; 100_000]] {
        // Stated and there; stated and not there, before an entry and before the end.
        let there = Raw::new(USTAR, b'1', b"a").link(b"b").with(content);
        assert_eq!(listing(&[&there[..], &after].concat()).as_deref(), Ok(expected));
        assert_eq!(listing(&[&there[..], &END_OF_ARCHIVE].concat()).as_deref(), Ok("HardLink a b\n"));
        let absent = Raw::new(USTAR, b'1', b"a").link(b"b").size(content.len()).bytes();
        assert_eq!(listing(&[&absent[..], &after].concat()).as_deref(), Ok(expected));
        assert_eq!(listing(&[&absent[..], &END_OF_ARCHIVE, &[0; 9000]].concat()).as_deref(), Ok("HardLink a b\n"));
        assert_eq!(listing(&absent).as_deref(), Ok("HardLink a b\n"));
    }
    // Content that begins like an end of the archive.
    let zeros = Raw::new(USTAR, b'1', b"a").link(b"b").with(&[0; 1024]);
    assert!(listing(&[&zeros[..], &after].concat()).unwrap_err().contains("programs disagree"));
    let cut = Raw::new(USTAR, b'1', b"a").link(b"b").size(1024).bytes();
    let cut = [&cut[..], &[b'c'; 1000]].concat();
    assert_eq!(listing(&cut).unwrap_err(), "tar archive is cut off at offset 1512, in content of a hard link");
}

fn old_sparse(segments: &[(u64, u64)], size: u64, content: &[u8]) -> Vec<u8> {
    let entry = |(offset, length): &(u64, u64)| format!("{offset:011o}\0{length:011o}\0").into_bytes();
    let mut raw = Raw::new(GNU, b'S', b"sparse").size(content.len()).at(483, format!("{size:011o}\0").as_bytes());
    for (place, segment) in segments.iter().take(4).enumerate() {
        raw = raw.at(386 + 24 * place, &entry(segment));
    }
    let rest = segments.get(4..).unwrap_or_default();
    let mut bytes = raw.at(482, &[u8::from(!rest.is_empty())]).bytes();
    for (place, chunk) in rest.chunks(21).enumerate() {
        let mut block: Vec<u8> = chunk.iter().flat_map(entry).collect();
        block.resize(BLOCK_BYTES, 0);
        block[504] = u8::from(21 * (place + 1) < rest.len());
        bytes.extend(block);
    }
    bytes.extend_from_slice(content);
    bytes.extend_from_slice(padding(content.len() as u64));
    bytes
}

fn pax_sparse(version: (u64, u64), segments: &[(u64, u64)], size: u64, content: &[u8]) -> Vec<u8> {
    let mut records = Vec::new();
    let mut data = Vec::new();
    let text = size.to_string();
    match version {
        (1, 0) => {
            for (key, value) in [("major", "1"), ("minor", "0"), ("name", "sparse"), ("realsize", &text)] {
                records.extend(record(&format!("GNU.sparse.{key}"), value.as_bytes()));
            }
            let numbers = segments.iter().flat_map(|&(offset, length)| [offset, length]);
            data = format!("{}\n", segments.len()).into_bytes();
            numbers.for_each(|number| data.extend(format!("{number}\n").bytes()));
            data.extend_from_slice(padding(data.len() as u64));
        }
        (0, 1) => {
            let map: Vec<_> = segments.iter().map(|(offset, length)| format!("{offset},{length}")).collect();
            let blocks = segments.len().to_string();
            for (key, value) in
                [("size", &text), ("numblocks", &blocks), ("name", &"sparse".into()), ("map", &map.join(","))]
            {
                records.extend(record(&format!("GNU.sparse.{key}"), value.as_bytes()));
            }
        }
        _ => {
            records.extend(record("GNU.sparse.size", text.as_bytes()));
            for (offset, length) in segments {
                records.extend(record("GNU.sparse.offset", offset.to_string().as_bytes()));
                records.extend(record("GNU.sparse.numbytes", length.to_string().as_bytes()));
            }
            records.extend(record("path", b"sparse"));
        }
    }
    data.extend_from_slice(content);
    [Raw::new(USTAR, b'x', b"x").with(&records), Raw::new(USTAR, b'0', b"GNUSparseFile.0/x").with(&data)].concat()
}

#[test]
fn sparse_files_are_expanded() {
    let many: Vec<(u64, u64)> = (0..60).map(|place| (10 * place + 3, 2)).collect();
    let maps: &[(&[(u64, u64)], u64)] = &[
        (&[(0, 5)], 5),
        (&[(0, 5), (600, 1), (1000, 0)], 1000),
        (&[(1000, 0)], 1000),
        (&[(3, 2), (5, 2), (2000, 513)], 2513),
        (&many, 700),
        (&many[..4], 700),
        (&many[..5], 700),
        (&many[..25], 700),
        (&many[..26], 700),
    ];
    for (segments, size) in maps {
        let stored: u64 = segments.iter().map(|(_, length)| length).sum();
        let content: Vec<u8> = (0..stored).map(|place| b'a' + u8::try_from(place % 26).unwrap()).collect();
        let mut expected = vec![0; usize::try_from(*size).unwrap()];
        let mut rest = &content[..];
        for &(offset, length) in *segments {
            let (offset, length) = (usize::try_from(offset).unwrap(), usize::try_from(length).unwrap());
            let (piece, behind) = rest.split_at(length);
            expected[offset..offset + length].copy_from_slice(piece);
            rest = behind;
        }
        let forms = [
            ("old", old_sparse(segments, *size, &content)),
            ("0.0", pax_sparse((0, 0), segments, *size, &content)),
            ("0.1", pax_sparse((0, 1), segments, *size, &content)),
            ("1.0", pax_sparse((1, 0), segments, *size, &content)),
        ];
        for (form, sparse) in forms {
            let archive = [sparse, file(b"after", b"x")].concat();
            let entries = read(&archive).unwrap_or_else(|error| panic!("{form} {segments:?}: {error}"));
            let [(entry, found), (after, _)] = &entries[..] else { panic!("{form}: {} entries", entries.len()) };
            assert_eq!(after.path, b"after");
            assert_eq!(entry.path, b"sparse");
            assert_eq!((entry.size, entry.sparse, entry.content_offset), (*size, true, None), "{form} {segments:?}");
            assert!(*found == expected, "{form} {segments:?}");
            // Passed over without being read.
            let mut reader = Reader::new(&archive[..], &limits());
            reader.next_entry().unwrap();
            reader.content().read_exact(&mut vec![0; expected.len() / 2]).unwrap();
            assert_eq!(reader.next_entry().unwrap().unwrap().path, b"after");
        }
    }
}

#[test]
fn bad_sparse_maps_are_refused() {
    let with = |records: &[(&str, &str)], content: &[u8]| [pax(records), file(b"a", content)].concat();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("overlap", old_sparse(&[(0, 2), (1, 2)], 10, b"1234")),
        ("beyond the size", old_sparse(&[(0, 2), (9, 2)], 10, b"1234")),
        ("more data than in the map", old_sparse(&[(0, 2)], 10, b"123")),
        ("less data than in the map", pax_sparse((0, 1), &[(0, 2)], 10, b"1")),
        ("less data than in the map of 1.0", pax_sparse((1, 0), &[(0, 2)], 10, b"1")),
        ("map without end", with(&[("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")], &[b'1'; 512])),
        ("map cut", with(&[("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")], b"1\n0\n")),
        ("unknown version", with(&[("GNU.sparse.major", "2"), ("GNU.sparse.minor", "0")], b"")),
        ("half a version", with(&[("GNU.sparse.major", "1")], b"0\n")),
        ("no map", with(&[("GNU.sparse.major", "0"), ("GNU.sparse.minor", "1")], b"")),
        ("half a map", with(&[("GNU.sparse.map", "1")], b"")),
        ("sparse directory", [pax(&[("GNU.sparse.map", "0,0")]), Raw::new(USTAR, b'5', b"d").bytes()].concat()),
        ("two maps", [pax(&[("GNU.sparse.map", "0,0")]), old_sparse(&[(0, 0)], 0, b"")].concat()),
        ("too large", old_sparse(&[(0, 1)], (1 << 33) - 1, b"1")),
        ("extension missing", old_sparse(&[(1, 0); 5], 10, b"")[..512].to_vec()),
        ("too many extensions", old_sparse(&[(1, 0); 400], 10, b"")),
    ];
    let limits = Limits { file_bytes: 1 << 20, ..limits() };
    for (name, archive) in cases {
        let found = read_with(&archive, &limits);
        assert!(found.is_err(), "{name}: {found:?}");
    }
}

#[test]
fn the_end_may_be_missing_or_followed_by_anything() {
    let entry = file(b"a", b"x");
    let end = &END_OF_ARCHIVE[..];
    for tail in [
        &b""[..],
        &[0; 100],
        &[0; 512],
        &[0; 612],
        end,
        &[end, &[0; 100]].concat(),
        &[end, &[0; 9 << 10]].concat(),
        &[end, b"garbage"].concat(),
        &[end, &file(b"hidden", b"")].concat(),
    ] {
        let archive = [&entry[..], tail].concat();
        let mut reader = Reader::new(&archive[..], &limits());
        assert_eq!(reader.next_entry().unwrap().unwrap().content_offset, Some(512));
        for _ in 0..2 {
            assert!(reader.next_entry().unwrap().is_none(), "{}", tail.len());
        }
        assert_eq!(reader.position(), 1024 + tail.len().min(1024) as u64);
        assert_eq!(reader.into_inner().len(), tail.len().saturating_sub(1024));
    }
    for (tail, expected) in [
        (b"garbage".to_vec(), "tar archive is cut off at offset 1031, in a header"),
        ([&[0; 512][..], &file(b"b", b"")].concat(), "tar entry at offset 1024 is corrupt: header: one block of zeros"),
        ([&[0; 512][..], b"x"].concat(), "tar archive is cut off at offset 1537, in a header"),
        (vec![b'x'; 512], "tar entry at offset 1024 is corrupt: header: checksum does not match"),
        (pax(&[("path", "b")]), "tar archive is cut off at offset 2048, in metadata without an entry"),
        (Raw::new(GNU, b'L', b"l").with(b"name"), "tar archive is cut off at offset 2048, in metadata without"),
    ] {
        let error = listing(&[&entry[..], &tail].concat()).unwrap_err();
        assert!(error.starts_with(expected), "{error}");
        let ended = [&entry[..], &tail, end].concat();
        assert!(listing(&ended).is_err());
    }
}

#[test]
fn what_no_layer_can_hold_is_named() {
    for (flag, expected) in [
        (b'V', "tar entry at offset 0 is not supported: a volume label (type flag 'V')"),
        (
            b'M',
            "tar entry at offset 0 is not supported: the rest of a file that began in another volume (type flag 'M')",
        ),
        (b'D', "tar entry at offset 0 is not supported: a directory of an incremental backup (type flag 'D')"),
        (b'A', "tar entry at offset 0 is not supported: an unknown kind of entry (type flag 'A')"),
        (0xff, "tar entry at offset 0 is not supported: an unknown kind of entry (type flag '\\xff')"),
    ] {
        assert_eq!(listing(&Raw::new(GNU, flag, b"a").bytes()).unwrap_err(), expected);
    }
}

#[test]
fn bad_fields_are_refused() {
    let cases: Vec<(&str, Raw)> = vec![
        ("mode", Raw::new(USTAR, b'0', b"a").at(header::MODE.start, b"rw-r--r-")),
        ("uid", Raw::new(USTAR, b'0', b"a").at(header::UID.start, b"999")),
        ("uid", Raw::new(USTAR, b'0', b"a").at(header::UID.start, b"\x80\0\0\x01\0\0\0\0")),
        ("gid", Raw::new(USTAR, b'0', b"a").at(header::GID.start, b"\xff\xff\xff\xff\0\0\0\0")),
        ("size", Raw::new(USTAR, b'0', b"a").at(header::SIZE.start, &[0xff; 12])),
        ("size", Raw::new(USTAR, b'5', b"a").at(header::SIZE.start, b"\x90")),
        ("mtime", Raw::new(USTAR, b'0', b"a").at(header::MTIME.start, b"1.5")),
        ("device major number", Raw::new(USTAR, b'3', b"a").at(header::DEVICE_MAJOR.start, b"x")),
        ("device minor number", Raw::new(USTAR, b'4', b"a").at(header::DEVICE_MINOR.start, &[0xff; 8])),
    ];
    for (part, raw) in cases {
        let error = listing(&raw.bytes()).unwrap_err();
        assert!(error.starts_with(&format!("tar entry at offset 0 is corrupt: {part}: ")), "{error}");
    }
    // Only of devices are device numbers looked at: old writers leave anything there.
    assert!(listing(&Raw::new(USTAR, b'0', b"a").at(header::DEVICE_MAJOR.start, b"x").bytes()).is_ok());
}

#[test]
fn limits_hold() {
    let limits = Limits {
        entries: 2,
        path_bytes: 10,
        file_bytes: 1000,
        tar_metadata_bytes: 4096,
        xattr_bytes: 100,
        ..Limits::default()
    };
    let long = "x".repeat(11);
    let value = "v".repeat(100);
    let global = Raw::new(USTAR, b'g', b"g").with(&record("comment", &[b'c'; 2000]));
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("number of entries", file(b"a", b"").repeat(3)),
        ("bytes of the path", file(long.as_bytes(), b"")),
        ("bytes of the path", [pax(&[("path", &long)]), file(b"a", b"")].concat()),
        ("bytes of the path", [Raw::new(GNU, b'L', b"l").with(long.as_bytes()), file(b"a", b"")].concat()),
        ("bytes of the link", Raw::new(USTAR, b'2', b"a").link(long.as_bytes()).bytes()),
        ("bytes of the user name", [pax(&[("uname", &long)]), file(b"a", b"")].concat()),
        ("bytes of the group name", Raw::new(USTAR, b'0', b"a").at(297, long.as_bytes()).bytes()),
        ("bytes of content", Raw::new(USTAR, b'0', b"a").size(1001).bytes()),
        ("bytes of content", [pax(&[("size", "9223372036854775807")]), file(b"a", b"")].concat()),
        ("bytes of metadata", Raw::new(USTAR, b'x', b"x").size(4096).bytes()),
        ("bytes of metadata", Raw::new(GNU, b'L', b"x").at(header::SIZE.start, b"\x80\0\0\0\x7f\xff\xff\xff").bytes()),
        ("bytes of metadata", pax(&[("comment", "x")]).repeat(8)),
        ("bytes of metadata", global.repeat(2)),
        ("total bytes of extended attributes", pax(&[("SCHILY.xattr.user.a", &value)])),
    ];
    for (part, archive) in cases {
        let error = read_with(&archive, &limits).unwrap_err();
        assert!(error.contains(&format!("{part} exceeds the limit of ")), "{part}: {error}");
    }
    assert!(read_with(&[global, file(&[b'n'; 10], &[b'c'; 1000]), file(b"a", b"")].concat(), &limits).is_ok());
}

#[test]
fn errors_of_the_source_come_through() {
    struct Failing;
    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::new(io::ErrorKind::TimedOut, "slow link"))
        }
    }
    let archive = file(b"a", &[b'c'; 2000]);
    let mut reader = Reader::new((&archive[..600]).chain(Failing), &limits());
    reader.next_entry().unwrap();
    let error = reader.content().read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert_eq!(error.to_string(), "tar archive cannot be read at offset 600: slow link");
    assert!(matches!(reader.next_entry(), Err(Error::GivenUp { .. })));

    let mut reader = Reader::new(&archive[..600], &limits());
    reader.next_entry().unwrap();
    let error = reader.content().read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(error.to_string(), "tar archive is cut off at offset 600, in content");
}

/// An archive with something of everything.
pub(in crate::tar) fn specimen() -> Vec<u8> {
    [
        Raw::new(USTAR, b'g', b"g").with(&record("uname", b"global")),
        Raw::new(V7, 0, b"old/").bytes(),
        file(b"plain", b"content"),
        pax(&[("path", "d/\u{e4}"), ("mtime", "-1.5"), ("SCHILY.xattr.user.a", "1")]),
        file(b"x", &[b'c'; 600]),
        Raw::new(GNU, b'L', b"././@LongLink").with(&[b'n'; 120]),
        Raw::new(GNU, b'2', b"x").link(b"plain").bytes(),
        Raw::new(USTAR, b'1', b"hard").link(b"plain").with(b"content"),
        old_sparse(&[(1, 2), (4, 1), (6, 1), (8, 1), (10, 1)], 20, b"123456"),
        pax_sparse((0, 1), &[(3, 2)], 9, b"12"),
        pax_sparse((1, 0), &[(3, 2)], 9, b"12"),
        Raw::new(USTAR, b'3', b"null").at(header::DEVICE_MAJOR.start, b"0000001\0").bytes(),
        END_OF_ARCHIVE.to_vec(),
    ]
    .concat()
}

#[test]
fn truncation_is_noticed_at_every_offset() {
    let archive = specimen();
    let whole = read(&archive).unwrap();
    assert_eq!(whole.len(), 9);
    // Where an archive may end: before an entry and its metadata, after the last one, and anywhere in zeros.
    let mut ends: HashMap<usize, usize> = HashMap::from([(0, 0)]);
    let mut reader = Reader::new(&archive[..], &limits());
    let mut count = 0;
    while reader.next_entry().unwrap().is_some() {
        count += 1;
        let mut sink = Vec::new();
        reader.content().read_to_end(&mut sink).unwrap();
        ends.insert(usize::try_from(reader.position()).unwrap().next_multiple_of(512), count);
    }
    // The content of the hard link counts once it is passed over, and need not be there.
    let hard = usize::try_from(whole[4].0.header_offset).unwrap();
    assert_eq!(whole[4].0.kind, EntryKind::HardLink);
    ends.insert(hard + 1024, 5);
    // A global header alone is whole too.
    ends.insert(1024, 0);
    let tail = archive.len() - 1024;
    for length in 0..archive.len() {
        match read(&archive[..length]) {
            Ok(entries) => {
                let expected = if length > tail { Some(&9) } else { ends.get(&length) };
                assert_eq!(Some(&entries.len()), expected, "cut at {length}");
            }
            Err(error) => assert!(!ends.contains_key(&length), "cut at {length}: {error}"),
        }
    }
}

#[test]
fn flipped_bytes_never_panic() {
    let archive = specimen();
    let mut headers = 0;
    for place in 0..archive.len() {
        for bits in [0x01, 0x80, 0xff] {
            let mut flipped = archive.clone();
            flipped[place] ^= bits;
            headers += usize::from(read(&flipped).is_err());
        }
    }
    // At least the checksums of the 17 headers noticed.
    assert!(headers > 17 * 400, "{headers}");
}
