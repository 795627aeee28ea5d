//! A directory tree as facts that can be compared: what one tool unpacked against what another shows.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs, io,
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

/// What is known of one file. Equal facts mean that a program could not tell the files apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// `dir`, `file`, `link`, `char`, `block`, `fifo` or `socket`.
    pub kind: &'static str,
    /// The low twelve bits of `st_mode`; 0 for symbolic links, which have none.
    pub permissions: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Modification time, seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Bytes, of regular files and links.
    pub size: u64,
    /// Device number, of devices.
    pub device: u64,
    /// SHA-256 of a regular file's content, or a link's target.
    pub content: Vec<u8>,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path, in order, of the files that are one with this one; `None` where it has one name.
    pub link_group: Option<PathBuf>,
}

/// What to pass over, where tools are known to differ.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ignore {
    /// Modification times of directories (unpackers set or forget them).
    pub directory_times: bool,
    /// The part of a time below the second.
    pub nanoseconds: bool,
    /// All extended attributes.
    pub xattrs: bool,
    /// Attributes of the root directory.
    pub root: bool,
}

/// Reads a whole tree.
///
/// # Errors
/// The first file that can't be read, by name.
pub fn facts(root: &Path, ignore: Ignore) -> io::Result<BTreeMap<PathBuf, Facts>> {
    let mut all = BTreeMap::new();
    let mut groups: BTreeMap<(u64, u64), PathBuf> = BTreeMap::new();
    let mut open = vec![PathBuf::new()];
    let mut found = Vec::new();
    while let Some(relative) = open.pop() {
        for entry in fs::read_dir(root.join(&relative)).map_err(|error| named(&relative, &error))? {
            let entry = entry.map_err(|error| named(&relative, &error))?;
            let path = relative.join(entry.file_name());
            if entry.file_type().map_err(|error| named(&path, &error))?.is_dir() {
                open.push(path.clone());
            }
            found.push(path);
        }
    }
    if !ignore.root {
        found.push(PathBuf::new());
    }
    found.sort();
    for path in found {
        let facts = file_facts(root, &path, ignore, &mut groups).map_err(|error| named(&path, &error))?;
        all.insert(path, facts);
    }
    Ok(all)
}

fn file_facts(
    root: &Path,
    path: &Path,
    ignore: Ignore,
    groups: &mut BTreeMap<(u64, u64), PathBuf>,
) -> io::Result<Facts> {
    let full = root.join(path);
    let metadata = fs::symlink_metadata(&full)?;
    let kind = metadata.file_type();
    let name = match () {
        () if kind.is_dir() => "dir",
        () if kind.is_file() => "file",
        () if kind.is_symlink() => "link",
        () if kind.is_char_device() => "char",
        () if kind.is_block_device() => "block",
        () if kind.is_fifo() => "fifo",
        () => "socket",
    };
    let content = match name {
        "file" => {
            let mut hasher = Sha256::new();
            io::copy(&mut fs::File::open(&full)?, &mut HashWriter(&mut hasher))?;
            hasher.finalize().to_vec()
        }
        "link" => fs::read_link(&full)?.into_os_string().into_vec(),
        _ => Vec::new(),
    };
    let link_group = (!kind.is_dir() && metadata.nlink() > 1)
        .then(|| groups.entry((metadata.dev(), metadata.ino())).or_insert_with(|| path.to_owned()).clone());
    let ignored_time = ignore.directory_times && kind.is_dir();
    let nanoseconds = if ignore.nanoseconds { 0 } else { metadata.mtime_nsec() };
    Ok(Facts {
        kind: name,
        permissions: if kind.is_symlink() { 0 } else { metadata.mode() & 0o7777 },
        owner: (metadata.uid(), metadata.gid()),
        mtime: if ignored_time { (0, 0) } else { (metadata.mtime(), nanoseconds) },
        size: if kind.is_file() || kind.is_symlink() { metadata.len() } else { 0 },
        device: if kind.is_char_device() || kind.is_block_device() { metadata.rdev() } else { 0 },
        content,
        xattrs: if ignore.xattrs { BTreeMap::new() } else { xattrs(&full)? },
        link_group,
    })
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0; 64 << 10];
    let length = match rustix::fs::llistxattr(path, &mut names) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => return Ok(BTreeMap::new()),
        Err(errno) => return Err(errno.into()),
    };
    let mut found = BTreeMap::new();
    for name in names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 64 << 10];
        let length = rustix::fs::lgetxattr(path, std::ffi::OsStr::from_bytes(name), &mut value)?;
        value.truncate(length);
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}

/// Returns what differs between two trees, a line each, at most `most` lines; nothing where they are the same.
#[must_use]
pub fn differences(left: &BTreeMap<PathBuf, Facts>, right: &BTreeMap<PathBuf, Facts>, most: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for path in left.keys().chain(right.keys().filter(|path| !left.contains_key(*path))) {
        if lines.len() == most {
            lines.push("...".into());
            break;
        }
        let mut line = format!("{}: ", path.display());
        // Writing to a string does not fail.
        let _ = match (left.get(path), right.get(path)) {
            (Some(a), Some(b)) if a == b => continue,
            (Some(a), Some(b)) => write!(line, "{a:?} against {b:?}"),
            (Some(_), None) => write!(line, "only in the first"),
            (None, _) => write!(line, "only in the second"),
        };
        lines.push(line);
    }
    lines
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

struct HashWriter<'a>(&'a mut Sha256);

impl io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
