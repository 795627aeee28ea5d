//! The same archives, read by us and by others: GNU tar, Python's `tarfile`, Go's `archive/tar`.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fmt::Write as _,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::Command,
};

use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};

use super::{END_OF_ARCHIVE, Entry, EntryKind, Reader, encode_header, padding, pax, writer};
use crate::limits::Limits;

/// Says whether programs can be run, and that a test is skipped where one cannot.
fn present(test: &str, programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| {
        let version = if **program == "go" { "version" } else { "--version" };
        !Command::new(program).arg(version).output().is_ok_and(|output| output.status.success())
    });
    if let Some(program) = missing {
        eprintln!("skipped: {test}: no {program}");
    }
    missing.is_none()
}

fn run(program: &str, arguments: &[&OsStr]) -> (Vec<u8>, String, bool) {
    let output = Command::new(program)
        .args(arguments)
        // Neither the user's settings nor the network have a say here.
        .envs([("GO111MODULE", "off"), ("GOTOOLCHAIN", "local"), ("LC_ALL", "C"), ("TAR_OPTIONS", "")])
        .output()
        .unwrap();
    (output.stdout, String::from_utf8_lossy(&output.stderr).into_owned(), output.status.success())
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/tar/peer_tests").join(name)
}

fn python(name: &str, arguments: &[&Path]) -> String {
    let script = script(name);
    let arguments: Vec<&OsStr> =
        std::iter::once(script.as_os_str()).chain(arguments.iter().map(|a| a.as_os_str())).collect();
    let (out, errors, success) = run("python3", &arguments);
    assert!(success, "{errors}");
    String::from_utf8(out).unwrap()
}

fn go(archives: &[&Path]) -> String {
    let script = script("view.go");
    let arguments: Vec<&OsStr> =
        [OsStr::new("run"), script.as_os_str()].into_iter().chain(archives.iter().map(|a| a.as_os_str())).collect();
    let (out, errors, success) = run("go", &arguments);
    assert!(success, "{errors}");
    String::from_utf8(out).unwrap()
}

fn hexed(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "-".to_owned();
    }
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// What the peers' scripts print, made from our own reading.
fn view(archives: &[&Path]) -> String {
    let mut text = String::new();
    for (place, path) in archives.iter().enumerate() {
        if view_of(place, path, &mut text).is_err() {
            writeln!(text, "{place} error").unwrap();
        }
    }
    text
}

fn view_of(place: usize, path: &Path, text: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let archive = fs::read(path)?;
    let mut reader = Reader::new(&archive[..], &Limits::default());
    while let Some(entry) = reader.next_entry()? {
        let mut content = Vec::new();
        reader.content().read_to_end(&mut content)?;
        if let Some(offset) = entry.content_offset {
            let offset = usize::try_from(offset)?;
            assert_eq!(archive[offset..offset + content.len()], content);
        }
        let trimmed = entry.path.iter().rposition(|&byte| byte != b'/').map_or(0, |last| last + 1);
        let mut xattrs: Vec<String> = entry
            .xattrs
            .iter()
            .map(|(name, value)| format!("{}={}", hexed(&pax::encode_xattr_name(name)), hexed(value)))
            .collect();
        xattrs.sort();
        let crc = libdeflater::crc32(&content);
        writeln!(
            text,
            "{place} {:?} {} {} {} {:o} {} {} {} {} {}.{:09} {} {} {crc} {}",
            entry.kind,
            hexed(&entry.path[..trimmed]),
            hexed(&entry.link),
            entry.size,
            entry.permissions,
            entry.uid,
            entry.gid,
            hexed(&entry.user_name),
            hexed(&entry.group_name),
            entry.mtime.seconds,
            entry.mtime.nanoseconds,
            entry.device.0,
            entry.device.1,
            if xattrs.is_empty() { "-".to_owned() } else { xattrs.join(",") },
        )?;
    }
    Ok(())
}

fn assert_alike(ours: &str, theirs: &str, archives: &[&Path]) {
    for (one, other) in ours.lines().zip(theirs.lines()) {
        assert_eq!(one, other, "of {archives:?}");
    }
    assert_eq!(ours.lines().count(), theirs.lines().count());
}

#[test]
fn archives_of_gnu_tar_are_read_alike() {
    if !present("archives_of_gnu_tar_are_read_alike", &["tar", "python3"]) {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let tree = place.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let said = python("tree.py", &[&tree]);
    if said.contains("no xattrs") {
        eprintln!("skipped: archives_of_gnu_tar_are_read_alike (the part with xattrs): the file system has none");
    }
    // Formats, options, and the least number of entries: two formats have no room for the long names.
    let forms: &[(&str, &[&str], usize)] = &[
        ("v7", &[], 16),
        ("oldgnu", &[], 25),
        ("gnu", &[], 25),
        ("ustar", &[], 20),
        ("posix", &[], 25),
        ("posix", &["--xattrs", "--xattrs-include=*"], 25),
        ("oldgnu", &["--sparse"], 25),
        ("gnu", &["--sparse"], 25),
        ("posix", &["--sparse", "--sparse-version=0.0"], 25),
        ("posix", &["--sparse", "--sparse-version=0.1"], 25),
        ("posix", &["--sparse", "--sparse-version=1.0"], 25),
    ];
    let archives: Vec<PathBuf> = (0..forms.len()).map(|form| place.path().join(format!("{form}.tar"))).collect();
    let mut sparse = Vec::new();
    for ((form, options, entries), archive) in forms.iter().zip(&archives) {
        let form = format!("--format={form}");
        let mut arguments: Vec<&OsStr> = ["--create", "--sort=name", &form, "--file"].map(OsStr::new).to_vec();
        arguments.push(archive.as_os_str());
        arguments.extend(options.iter().map(OsStr::new));
        arguments.extend([OsStr::new("--directory"), tree.as_os_str(), OsStr::new(".")]);
        // It fails for names without room, but writes the rest.
        run("tar", &arguments);
        let bytes = fs::read(archive).unwrap();
        let mut reader = Reader::new(&bytes[..], &Limits::default());
        let mut all = Vec::new();
        while let Some(entry) = reader.next_entry().unwrap_or_else(|error| panic!("{form} {options:?}: {error}")) {
            all.push(entry);
        }
        assert!(all.len() >= *entries, "{form} {options:?}: {} entries", all.len());
        sparse.push(all.iter().filter(|entry| entry.sparse).count());
    }
    if sparse[6..].contains(&0) {
        eprintln!("skipped: archives_of_gnu_tar_are_read_alike (the part with holes): the file system has none");
    }
    let archives: Vec<&Path> = archives.iter().map(PathBuf::as_path).collect();
    let ours = view(&archives);
    assert!(!ours.contains("error"));
    assert_alike(&ours, &python("view.py", &archives), &archives);
    if present("archives_of_gnu_tar_are_read_alike (the part with Go)", &["go"]) {
        assert_alike(&ours, &go(&archives), &archives);
    }
}

#[test]
fn archives_of_python_are_read_alike() {
    if !present("archives_of_python_are_read_alike", &["python3"]) {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    python("write.py", &[place.path()]);
    let archives = ["ustar.tar", "gnu.tar", "pax.tar"].map(|name| place.path().join(name));
    let archives: Vec<&Path> = archives.iter().map(PathBuf::as_path).collect();
    let ours = view(&archives);
    assert!(!ours.contains("error") && ours.lines().count() > 30, "{ours}");
    assert_alike(&ours, &python("view.py", &archives), &archives);
    if present("archives_of_python_are_read_alike (the part with Go)", &["go"]) {
        assert_alike(&ours, &go(&archives), &archives);
    }
}

/// A sample of entries that is the same every time, without what others have no word for.
fn sample() -> Vec<(Entry, Vec<u8>)> {
    let mut runner = TestRunner::deterministic();
    let entries = prop::collection::vec((writer::tests::any_entry(), prop::collection::vec(any::<u8>(), 0..1500)), 300);
    let mut sample = entries.new_tree(&mut runner).unwrap().current();
    for (entry, content) in &mut sample {
        if entry.kind == EntryKind::Regular {
            entry.size = content.len() as u64;
        } else {
            content.clear();
        }
        // Device numbers beyond a header's, and times beyond a file system's, are not portable.
        entry.device = (entry.device.0 & 0o7_777_777, entry.device.1 & 0o7_777_777);
        entry.mtime.seconds %= 1 << 35;
    }
    sample
}

#[test]
fn others_read_what_we_write() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("ours.tar");
    let mut archive = Vec::new();
    let mut contents = Vec::new();
    for (entry, content) in sample() {
        archive.extend(encode_header(&entry).unwrap());
        archive.extend_from_slice(&content);
        archive.extend_from_slice(padding(entry.size));
        contents.extend(content);
    }
    archive.extend(END_OF_ARCHIVE);
    fs::write(&path, &archive).unwrap();
    let archives = [path.as_path()];
    let ours = view(&archives);
    assert_eq!(ours.lines().count(), 300);
    if present("others_read_what_we_write (the part with Python)", &["python3"]) {
        assert_alike(&ours, &python("view.py", &archives), &archives);
    }
    if present("others_read_what_we_write (the part with Go)", &["go"]) {
        assert_alike(&ours, &go(&archives), &archives);
    }
    if present("others_read_what_we_write (the part with GNU tar)", &["tar"]) {
        let list = ["--list", "--quoting-style=escape", "--file"].map(OsStr::new);
        let (listed, errors, success) = run("tar", &[&list[..], &[path.as_os_str()]].concat());
        assert!(success, "{errors}");
        assert_eq!(listed.iter().filter(|&&byte| byte == b'\n').count(), 300);
        let extract = ["--extract", "--to-stdout", "--file"].map(OsStr::new);
        let (extracted, errors, _) = run("tar", &[&extract[..], &[path.as_os_str()]].concat());
        assert!(extracted == contents, "{errors}");
    }
}

/// Go's own test archives, good and bad.
#[test]
fn archives_of_go_are_read_alike() {
    const TEST: &str = "archives_of_go_are_read_alike";
    if !present(TEST, &["go"]) {
        return;
    }
    let (root, _, _) = run("go", &["env", "GOROOT"].map(OsStr::new));
    let root = String::from_utf8(root).unwrap();
    let Ok(files) = fs::read_dir(Path::new(root.trim_end()).join("src/archive/tar/testdata")) else {
        eprintln!("skipped: {TEST}: Go is installed without its test data");
        return;
    };
    let mut archives: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    // Those with "big" in the name have holes or headers of 16 to 60 GB.
    archives.retain(|path| path.extension() == Some(OsStr::new("tar")) && !path.to_string_lossy().contains("big"));
    archives.sort();
    let archives: Vec<&Path> = archives.iter().map(PathBuf::as_path).collect();
    let (ours, theirs) = (view(&archives), go(&archives));
    let lines = |view: &str| {
        let mut lines: HashMap<usize, Vec<String>> = HashMap::new();
        for line in view.lines() {
            let place = line.split(' ').next().unwrap().parse().unwrap();
            lines.entry(place).or_default().push(line.to_owned());
        }
        lines
    };
    let (ours, theirs) = (lines(&ours), lines(&theirs));
    let mut different = Vec::new();
    for (place, path) in archives.iter().enumerate() {
        if ours.get(&place) != theirs.get(&place) {
            different.push(path.file_name().unwrap().to_string_lossy().into_owned());
        }
    }
    // Global records, which Go passes over: those there would give every entry the same path, and are refused. And
    // records without an entry, which for Go are the end.
    assert_eq!(different, ["pax-global-records.tar", "pax-path-hdr.tar"]);
}
