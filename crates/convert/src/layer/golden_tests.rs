//! What we write, opened and compared by the reference's own library.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use loris_format::{
    estargz::{
        footer::{self, Footer},
        toc::{self, TocError},
    },
    index::Timestamp,
    tar::{Entry, EntryKind},
};
use tempfile::TempDir;

use super::{archive::Archive, tests::*, *};

const LIBRARY: &str = "/usr/share/gocode/src/github.com/containerd/stargz-snapshotter/estargz";

/// The reference's library behind a small program.
struct Reference {
    directory: TempDir,
    program: PathBuf,
}

impl Reference {
    fn build(test: &str) -> Option<Self> {
        let go = loris_testkit::require_peer(test, "go")?;
        if !Path::new(LIBRARY).is_dir() {
            loris_testkit::skip(test, "golang-github-containerd-stargz-snapshotter-dev");
            return None;
        }
        let directory = TempDir::new().unwrap();
        let program = directory.path().join("reference");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/reference/main.go");
        let built = Command::new(go)
            .args(["build", "-o"])
            .args([&program, &source])
            .env("GO111MODULE", "off")
            .env("GOPATH", "/usr/share/gocode")
            .env("GOFLAGS", "-p=1")
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        Some(Self { directory, program })
    }

    fn run(&self, arguments: &[&str]) -> String {
        // One processor: the reference writes owners' names once for each part that it builds side by side.
        let output = Command::new(&self.program)
            .args(arguments)
            .current_dir(self.directory.path())
            .env("GOMAXPROCS", "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn file(&self, name: &str, content: &[u8]) {
        std::fs::write(self.directory.path().join(name), content).unwrap();
    }

    /// Returns the tree as the reference sees it, after it has verified and read everything.
    fn open(&self, blob: &[u8], toc_digest: &str) -> String {
        self.file("blob", blob);
        self.run(&["open", "blob", toc_digest])
    }

    fn make(&self, tar: &[u8], chunk: u64, prioritised: &[&str]) -> (Vec<u8>, String) {
        self.file("tar", tar);
        let chunk = chunk.to_string();
        let digest = self.run(&[&["build", "tar", "made", &chunk], prioritised].concat());
        (std::fs::read(self.directory.path().join("made")).unwrap(), digest.trim().to_owned())
    }
}

/// Returns the entries of a blob's table of contents, without what depends on the compressor.
fn toc_entries(blob: &[u8]) -> Vec<String> {
    let Footer::Toc { offset, .. } = footer::read(blob, blob.len() as u64).unwrap() else { panic!("no footer") };
    let text = gunzip(&blob[offset.0 as usize..]);
    let mut reader = tar::Reader::new(text.as_slice(), &Limits::default());
    reader.next_entry().unwrap().unwrap();
    let mut json = Vec::new();
    reader.content().read_to_end(&mut json).unwrap();
    let mut entries = Vec::new();
    toc::read(&json, &Limits::default(), |_, mut entry| {
        (entry.offset, entry.inner_offset) = (0, 0);
        entries.push(format!("{entry:?}"));
        Ok::<_, TocError>(())
    })
    .unwrap();
    entries
}

/// Returns the entries of a blob's tar, with their content.
fn tar_entries(blob: &[u8]) -> Vec<(Entry, Vec<u8>)> {
    let text = gunzip(blob);
    let mut reader = tar::Reader::new(text.as_slice(), &Limits::default());
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry().unwrap() {
        let mut content = Vec::new();
        reader.content().read_to_end(&mut content).unwrap();
        // The two tables of contents differ in their offsets.
        if entry.path != b"stargz.index.json" {
            entries.push((Entry { header_offset: 0, content_offset: None, ..entry }, content));
        }
    }
    entries
}

fn xattr(name: &str, value: &[u8]) -> (Box<[u8]>, Box<[u8]>) {
    (name.as_bytes().into(), value.into())
}

fn special(path: String, kind: EntryKind, device: (u32, u32), link: &str) -> Entry {
    Entry { path: path.into(), kind, device, link: link.into(), permissions: 0o644, ..Entry::default() }
}

/// The archives, named, with names that begin with `prefix`.
fn archives(prefix: &str) -> Vec<(&'static str, Vec<u8>, &'static [&'static str])> {
    let p = |name: &str| format!("{prefix}{name}");
    let owner = |name: &str, uid: u32, user: &str| Entry {
        path: p(name).into(),
        uid,
        gid: uid + 1,
        user_name: user.into(),
        group_name: user.into(),
        permissions: 0o4751,
        mtime: Timestamp { seconds: 1_700_000_000 + i64::from(uid), nanoseconds: 0 },
        xattrs: vec![xattr("invalid-utf8", b"\xff\xfe\xfd"), xattr("user.test", b"sample")],
        ..Entry::default()
    };
    let mut empty = Archive::default();
    for number in 0..11 {
        empty = empty.file(&p(&format!("f{number}")), if number % 2 == 0 { b"tttttt" } else { b"" });
    }
    let various = Archive::default()
        .file(&p("baz.txt"), b"bazbazbazbazbazbazbaz")
        .file(&p("foo1.txt"), b"a")
        .file(&p("bar/foo2.txt"), b"b")
        .entry(&special(p("barlink"), EntryKind::Symlink, (0, 0), "test/bar.txt"), b"")
        .directory(&p("test/"))
        .entry(&special(p("dev/b"), EntryKind::BlockDevice, (3, 4), ""), b"")
        .entry(&special(p("fifo"), EntryKind::Fifo, (0, 0), ""), b"")
        .directory(&p("test2/"))
        .entry(&special(p("test2/c"), EntryKind::CharDevice, (5, 6), ""), b"")
        .entry(&owner("owned", 50, "somebody"), b"content of it")
        .entry(&owner("owned2", 50, "somebody"), b"")
        .entry(&owner("owned3", 51, "else"), b"more")
        .entry(&special(p("test2/bazlink"), EntryKind::HardLink, (0, 0), &p("baz.txt")), b"");
    let long = "l".repeat(120);
    let longer = format!("{}/{}", "d".repeat(90), "m".repeat(150));
    vec![
        ("nothing", Archive::default().end(), &[]),
        (
            "files and directories",
            Archive::default().file(&p("foo"), b"test1").directory(&p("foo2/")).file(&p("foo2/bar"), b"test2").end(),
            &["foo2/bar"],
        ),
        ("empty files", empty.end(), &["f3", "f4"]),
        ("various", various.end(), &["test2/bazlink", "fifo", "dev/../owned3", "barlink", "test2/c"]),
        (
            "long names",
            Archive::default().file(&p(&long), b"long").file(&p(&longer), b"longer").directory(&p("x/")).end(),
            &["x"],
        ),
        (
            "the same name twice",
            Archive::default()
                .file(&p("a"), b"one")
                .directory(&p("b/"))
                .file(&p("a"), b"two!")
                .directory(&p("b/"))
                .end(),
            &["b"],
        ),
        (
            "already converted",
            Archive::default()
                .file(&p(".prefetch.landmark"), b"\x0f")
                .file(&p("stargz.index.json"), b"{}")
                .file(&p("a"), &[b'x'; 5000])
                .file(&p("d/.no.prefetch.landmark"), b"an ordinary file")
                .end(),
            &["a"],
        ),
    ]
}

#[test]
fn the_reference_reads_and_writes_the_same() {
    let Some(reference) = Reference::build("the_reference_reads_and_writes_the_same") else { return };
    for prefix in ["", "./", "/", "../"] {
        let all = archives(prefix).into_iter();
        // Each case starts three processes; a prefix makes a difference to names and links only.
        for (name, tar, log) in
            all.filter(|(name, ..)| prefix.is_empty() || ["various", "already converted"].contains(name))
        {
            for (chunk, prioritised) in [(4, &[][..]), (4, log), (4 << 20, log)] {
                let case = format!("{name}, prefix {prefix:?}, chunk {chunk}, {prioritised:?}");
                let options = LayerOptions {
                    chunk_bytes: chunk,
                    prioritised: prioritised.iter().map(|name| name.as_bytes().to_vec()).collect(),
                    ..LayerOptions::default()
                };
                let (layer, ours) = convert(&tar, &options);
                let (theirs, digest) = reference.make(&tar, chunk, prioritised);
                assert_eq!(tar_entries(&ours), tar_entries(&theirs), "{case}");
                assert_eq!(toc_entries(&ours), toc_entries(&theirs), "{case}");
                let tree = reference.open(&ours, &layer.toc_digest.to_string());
                assert_eq!(tree, reference.open(&theirs, &digest), "{case}");
                assert!(tree.lines().count() >= 2, "{case}");
            }
        }
    }
}

#[test]
fn the_reference_reads_what_it_would_not_write() {
    let Some(reference) = Reference::build("the_reference_reads_what_it_would_not_write") else { return };
    let entry = Entry {
        path: b"a".to_vec(),
        mtime: Timestamp { seconds: 1_700_000_000, nanoseconds: 987_654_321 },
        ..Entry::default()
    };
    let old =
        Entry { path: b"old".to_vec(), mtime: Timestamp { seconds: -1, nanoseconds: 500_000_000 }, ..Entry::default() };
    let tar = Archive::default().entry(&entry, b"content").entry(&old, b"").link("l", "a").file("a", b"new").end();
    let (layer, blob) = convert(&tar, &LayerOptions::default());
    let tree = reference.open(&blob, &layer.toc_digest.to_string());
    // Times are neither rounded nor cut.
    assert!(tree.contains("\"l\" reg") && tree.contains("2023-11-14T22:13:20.987654321"), "{tree}");
    assert!(tree.contains("1969-12-31T23:59:59.5"), "{tree}");
}
