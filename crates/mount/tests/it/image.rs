//! Images for tests: entries, the eStargz blobs and lazy layers made of them, and the same tree unpacked on disk.
//!
//! The blobs follow the format's description and not our own writer (but for the headers of the tar inside, which are of
//! other tests' concern), and unpacking is done in the naive way, so that a mistake of ours is not made twice.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::Engine as _;
use bytes::Bytes;
use loris_format::{
    digest::{DiffId, Digest},
    index::{Timestamp, Xattrs},
    tar,
    tree::{LayerNumber, OpaqueStyle, Tree},
};
use loris_lazy::{
    LazyLayer, OpenOptions, Store,
    open::{open_all_layers, open_layer},
};
use loris_oci::{Descriptor, document::Manifest};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::source::TestSource;

/// Uncompressed bytes of a chunk.
pub const CHUNK: usize = 16 << 10;

#[derive(Clone)]
pub enum Kind {
    Directory,
    File(Vec<u8>),
    Symlink(&'static str),
    HardLink(&'static str),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

#[derive(Clone)]
pub struct Entry {
    pub path: String,
    pub kind: Kind,
    pub mode: u16,
    pub owner: (u32, u32),
    pub mtime: (i64, u32),
    pub xattrs: Vec<(&'static str, Vec<u8>)>,
}

pub fn entry(path: impl Into<String>, kind: Kind) -> Entry {
    let mode = if matches!(kind, Kind::Directory) { 0o755 } else { 0o644 };
    Entry { path: path.into(), kind, mode, owner: (0, 0), mtime: (1_600_000_000, 0), xattrs: Vec::new() }
}

pub fn directory(path: impl Into<String>) -> Entry {
    entry(path, Kind::Directory)
}

pub fn file(path: impl Into<String>, content: impl Into<Vec<u8>>) -> Entry {
    entry(path, Kind::File(content.into()))
}

impl Entry {
    pub fn mode(self, mode: u16) -> Self {
        Self { mode, ..self }
    }

    pub fn owner(self, uid: u32, gid: u32) -> Self {
        Self { owner: (uid, gid), ..self }
    }

    pub fn mtime(self, seconds: i64, nanoseconds: u32) -> Self {
        Self { mtime: (seconds, nanoseconds), ..self }
    }

    pub fn xattr(mut self, name: &'static str, value: impl Into<Vec<u8>>) -> Self {
        self.xattrs.push((name, value.into()));
        self
    }
}

/// Content that does not compress and is nowhere the same.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Lazy layers in a store of their own, the lowest first, over a source that does what it is told.
pub struct TestImage {
    pub source: Arc<TestSource>,
    pub layers: Vec<Arc<LazyLayer>>,
    pub runtime: Runtime,
    pub store: Store,
    pub directory: tempfile::TempDir,
}

impl TestImage {
    pub fn new(layers: &[Vec<Entry>]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = directory.path().join("store");
        Self::made(layers, directory, &store)
    }

    /// With the store somewhere else.
    pub fn new_in(layers: &[Vec<Entry>], store: &Path) -> Self {
        Self::made(layers, tempfile::tempdir().unwrap(), store)
    }

    fn made(layers: &[Vec<Entry>], directory: tempfile::TempDir, store: &Path) -> Self {
        let blobs: Vec<_> = layers.iter().map(|entries| blob(entries)).collect();
        let source = Arc::new(TestSource::new(blobs.iter().map(|(bytes, _)| bytes.clone())));
        let store = Store::open(store).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let options = OpenOptions::default();
        let open = |descriptor: &Descriptor| {
            runtime.block_on(open_layer(source.clone(), descriptor, &store, &options)).unwrap()
        };
        let layers = blobs.iter().map(|(_, descriptor)| open(descriptor)).collect();
        Self { source, layers, runtime, store, directory }
    }

    /// Opens the layers in a store of its own in the same directory, as another process would.
    pub fn opened_again(&self) -> Vec<Arc<LazyLayer>> {
        self.open(&Store::open(self.store.root()).unwrap(), &[])
    }

    /// Opens the layers as an image does that claims something about them.
    pub fn claiming(&self, claimed: DiffId) -> Vec<Arc<LazyLayer>> {
        self.open(&self.store, &vec![claimed; self.layers.len()])
    }

    fn open(&self, store: &Store, claimed: &[DiffId]) -> Vec<Arc<LazyLayer>> {
        let layers = self.layers.iter().map(|layer| layer.descriptor().clone()).collect();
        let manifest = Manifest {
            schema_version: 2,
            media_type: String::new(),
            artifact_type: None,
            config: self.layers[0].descriptor().clone(),
            layers,
            subject: None,
            annotations: BTreeMap::new(),
        };
        let options = OpenOptions::default();
        let opening = open_all_layers(self.source.clone(), &manifest, store, &options, claimed);
        self.runtime.block_on(opening).unwrap()
    }

    pub fn merged(&self) -> Arc<Tree> {
        Arc::new(Tree::merged(&self.layers.iter().map(|layer| layer.index()).collect::<Vec<_>>()))
    }

    pub fn one_layer(&self, number: usize) -> Arc<Tree> {
        // The only layer that is given to the mount.
        Arc::new(Tree::of_layer(self.layers[number].index(), LayerNumber(0), OpaqueStyle::Trusted))
    }

    /// A new directory to mount at.
    pub fn mountpoint(&self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    }
}

/// Writes an eStargz blob: a gzip member for each chunk, and one for what stands between two files.
fn blob(layer: &[Entry]) -> (Bytes, Descriptor) {
    let mut blob = Vec::new();
    let mut entries = Vec::new();
    let mut between = Vec::new();
    for entry in layer {
        let content = if let Kind::File(content) = &entry.kind { content.as_slice() } else { &[] };
        let mut toc = toc_entry(entry);
        between.extend(tar::encode_header(&tar_entry(entry)).unwrap());
        if !content.is_empty() {
            member(&mut blob, &std::mem::take(&mut between));
        }
        for (number, chunk) in content.chunks(CHUNK).enumerate() {
            if number > 0 {
                toc = json!({ "name": entry.path, "type": "chunk", "chunkOffset": number * CHUNK });
            }
            toc["offset"] = json!(blob.len());
            toc["chunkSize"] = json!(chunk.len());
            toc["chunkDigest"] = json!(Digest::sha256_of(chunk).to_string());
            entries.push(std::mem::take(&mut toc));
            member(&mut blob, chunk);
        }
        between.extend(tar::padding(content.len() as u64));
        if content.is_empty() {
            entries.push(toc);
        }
    }
    if !between.is_empty() {
        member(&mut blob, &between);
    }
    let toc_offset = blob.len();
    let toc = serde_json::to_vec(&json!({ "version": 1, "entries": entries })).unwrap();
    let mut tail = header("stargz.index.json", toc.len()).to_vec();
    tail.extend_from_slice(&toc);
    tail.resize(tail.len().next_multiple_of(512) + 1024, 0);
    member(&mut blob, &tail);
    blob.extend_from_slice(&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0]);
    blob.extend_from_slice(format!("{toc_offset:016x}STARGZ").as_bytes());
    blob.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);

    let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
    let mut descriptor = Descriptor::new(media_type, Digest::sha256_of(&blob), blob.len() as u64);
    let annotation = "containerd.io/snapshot/stargz/toc.digest";
    descriptor.annotations.insert(annotation.to_owned(), Digest::sha256_of(&toc).to_string());
    (blob.into(), descriptor)
}

/// Stored, not compressed, so that tests find the bytes that they want to flip.
fn member(blob: &mut Vec<u8>, bytes: &[u8]) {
    let mut encoder = flate2::write::GzEncoder::new(blob, flate2::Compression::none());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap();
}

fn tar_entry(entry: &Entry) -> tar::Entry {
    let slash = if matches!(entry.kind, Kind::Directory) { "/" } else { "" };
    let (mut link, mut device, mut size) = ("", (0, 0), 0);
    let kind = match &entry.kind {
        Kind::Directory => tar::EntryKind::Directory,
        Kind::File(content) => {
            size = content.len() as u64;
            tar::EntryKind::Regular
        }
        Kind::Symlink(target) => {
            link = target;
            tar::EntryKind::Symlink
        }
        Kind::HardLink(target) => {
            link = target;
            tar::EntryKind::HardLink
        }
        Kind::Char(major, minor) => {
            device = (*major, *minor);
            tar::EntryKind::CharDevice
        }
        Kind::Block(major, minor) => {
            device = (*major, *minor);
            tar::EntryKind::BlockDevice
        }
        Kind::Fifo => tar::EntryKind::Fifo,
    };
    let mut xattrs: Xattrs =
        entry.xattrs.iter().map(|(name, value)| (name.as_bytes().into(), value.as_slice().into())).collect();
    xattrs.sort();
    tar::Entry {
        path: format!("./{}{slash}", entry.path).into_bytes(),
        kind,
        link: link.into(),
        size,
        permissions: entry.mode,
        uid: entry.owner.0,
        gid: entry.owner.1,
        mtime: Timestamp { seconds: entry.mtime.0, nanoseconds: entry.mtime.1 },
        device,
        xattrs,
        ..tar::Entry::default()
    }
}

fn toc_entry(entry: &Entry) -> Value {
    let kind = match entry.kind {
        Kind::Directory => "dir",
        Kind::File(_) => "reg",
        Kind::Symlink(_) => "symlink",
        Kind::HardLink(_) => "hardlink",
        Kind::Char(..) => "char",
        Kind::Block(..) => "block",
        Kind::Fifo => "fifo",
    };
    let slash = if matches!(entry.kind, Kind::Directory) { "/" } else { "" };
    let mut toc = json!({
        "name": format!("{}{slash}", entry.path),
        "type": kind,
        "modtime": rfc3339(entry.mtime),
        "mode": entry.mode,
        "uid": entry.owner.0,
        "gid": entry.owner.1,
    });
    match &entry.kind {
        Kind::File(content) => toc["size"] = json!(content.len()),
        Kind::Symlink(target) | Kind::HardLink(target) => toc["linkName"] = json!(target),
        Kind::Char(major, minor) | Kind::Block(major, minor) => {
            toc["devMajor"] = json!(major);
            toc["devMinor"] = json!(minor);
        }
        Kind::Directory | Kind::Fifo => {}
    }
    for (name, value) in &entry.xattrs {
        toc["xattrs"][name] = json!(base64::engine::general_purpose::STANDARD.encode(value));
    }
    toc
}

/// Writes a time as TOCs have it. Days are counted in the years from March to February, whose leap day comes last.
fn rfc3339((seconds, nanoseconds): (i64, u32)) -> String {
    let (days, second) = (seconds.div_euclid(86_400) + 719_468, seconds.rem_euclid(86_400));
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = year + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanoseconds:09}Z")
}

/// The header of a regular file.
pub fn header(name: &str, length: usize) -> [u8; 512] {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[124..136].copy_from_slice(format!("{length:011o}\0").as_bytes());
    header[148..156].copy_from_slice(b"        ");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// Unpacks layers over one another, as a container engine does. Needs root.
pub fn unpack(layers: &[Vec<Entry>], root: &Path) {
    let mut times = BTreeMap::new();
    for layer in layers {
        for entry in layer {
            let path = root.join(&entry.path);
            let name = path.file_name().unwrap().to_str().unwrap();
            if name == ".wh..wh..opq" {
                for child in fs::read_dir(path.parent().unwrap()).unwrap() {
                    remove(&child.unwrap().path());
                }
            } else if let Some(gone) = name.strip_prefix(".wh.") {
                remove(&path.with_file_name(gone));
            }
        }
        for entry in layer.iter().filter(|entry| !entry.path.contains(".wh.")) {
            create(entry, root);
            times.insert(root.join(&entry.path), entry.mtime);
        }
    }
    for (path, (seconds, nanoseconds)) in times.into_iter().rev().filter(|(path, _)| path.symlink_metadata().is_ok()) {
        let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

fn create(entry: &Entry, root: &Path) {
    let path = root.join(&entry.path);
    if !matches!((&entry.kind, path.is_dir()), (Kind::Directory, true)) && path != root {
        remove(&path);
    }
    let node = |kind, device| rustix::fs::mknodat(CWD, &path, kind, Mode::empty(), device).unwrap();
    match &entry.kind {
        Kind::Directory => fs::create_dir_all(&path).unwrap(),
        Kind::File(content) => fs::write(&path, content).unwrap(),
        Kind::Symlink(target) => symlink(target, &path).unwrap(),
        Kind::HardLink(target) => return fs::hard_link(root.join(target), &path).unwrap(),
        Kind::Char(major, minor) => node(FileType::CharacterDevice, rustix::fs::makedev(*major, *minor)),
        Kind::Block(major, minor) => node(FileType::BlockDevice, rustix::fs::makedev(*major, *minor)),
        Kind::Fifo => node(FileType::Fifo, 0),
    }
    std::os::unix::fs::lchown(&path, Some(entry.owner.0), Some(entry.owner.1)).unwrap();
    if !matches!(entry.kind, Kind::Symlink(_)) {
        fs::set_permissions(&path, fs::Permissions::from_mode(entry.mode.into())).unwrap();
    }
    for (name, value) in &entry.xattrs {
        rustix::fs::lsetxattr(&path, *name, value, XattrFlags::empty()).unwrap();
    }
}

fn remove(path: &Path) {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
}

/// Three layers with everything that a tree can have.
pub fn three_layers() -> Vec<Vec<Entry>> {
    let big = noise(1, 5 * CHUNK + 77);
    vec![
        vec![
            directory("").mode(0o751).owner(3, 4).mtime(1_500_000_000, 5),
            directory("bin").mtime(1_600_000_001, 1),
            file("bin/su", noise(2, 3000)).mode(0o4755).xattr("user.note", "first"),
            entry("bin/hard", Kind::HardLink("bin/su")),
            entry("bin/third", Kind::HardLink("bin/hard")),
            entry("bin/link", Kind::Symlink("../etc/../bin/su")).owner(7, 8).mtime(-1_000_000, 999_999_999),
            entry("bin/dangling", Kind::Symlink("/no/such")),
            directory("dev"),
            entry("dev/null", Kind::Char(1, 3)).mode(0o666),
            entry("dev/big", Kind::Block(259, 70_000)).mode(0o660).owner(0, 6),
            entry("dev/pipe", Kind::Fifo).mode(0o600),
            directory("etc"),
            file("etc/empty", ""),
            file("etc/one", "1"),
            file("etc/shadow", "secret").mode(0o600).owner(0, 42),
            file("etc/goes", "away"),
            file("etc/changes", "before"),
            file("etc/name with spaces, and: more\\", "odd"),
            file("etc/\u{e9}\u{4e16}", "not ascii"),
            directory("opaque"),
            file("opaque/hidden", "hidden"),
            directory("opaque/below"),
            file("opaque/below/hidden", "hidden"),
            directory("removed"),
            directory("removed/deep"),
            file("removed/deep/file", "x"),
            directory("turns"),
            file("turns/into-file", "x"),
            file("becomes-directory", "x"),
            directory("tmp").mode(0o1777),
            directory("group").mode(0o2775).owner(0, 50),
        ],
        vec![
            directory("etc").mtime(1_600_000_002, 2),
            file("etc/.wh.goes", ""),
            file("etc/changes", "after").mtime(1_234_567_890, 123_456_789),
            directory("opaque").mode(0o700),
            file("opaque/.wh..wh..opq", ""),
            file("opaque/new", "new"),
            file(".wh.removed", ""),
            file("turns", "a file now"),
            directory("becomes-directory"),
            file("becomes-directory/file", "y"),
            directory("lib"),
            file("lib/big", big).mtime(1_700_000_000, 7),
            directory("lib/.hidden"),
        ],
        vec![
            directory("lib").mode(0o711),
            file("lib/exact", noise(3, CHUNK)),
            file("lib/two", noise(4, 2 * CHUNK)).xattr("user.empty", "").xattr("trusted.mine", [0, 255, 10]),
            directory("removed"),
            file("removed/again", "back"),
            file("bin-x", "sorts between"),
        ],
    ]
}
