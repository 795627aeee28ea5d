//! A layer as plain files: what a full pull does, and the way of layers that are not lazy.
//!
//! The result is a lower directory of overlayfs: whiteouts are character devices 0:0, opaque directories have overlayfs'
//! attribute. All names are resolved below the target (`openat2` with `RESOLVE_IN_ROOT`), so that no link in a layer leads
//! out of it.
//!
//! Must not know where a layer comes from; needs the privileges to change owners and to make device nodes.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use loris_format::{
    index::Timestamp,
    limits::Limits,
    tar::{Entry, EntryKind, Reader},
    tree::OpaqueStyle,
};
use rustix::{
    fs::{self as sys, AtFlags, FileType, Mode, OFlags, ResolveFlags, XattrFlags},
    io::Errno,
};

/// The names that mark deletions in a layer: OCI image specification, `layer.md`, section Whiteouts.
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What was unpacked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Entries, directories and links too.
    pub entries: u64,
    /// Content of regular files, in bytes.
    pub bytes: u64,
}

/// Why a layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// The layer is no tar archive that can be read.
    #[error(transparent)]
    Tar(#[from] loris_format::tar::Error),
    /// A name that can't be a path.
    #[error("entry {name:?} at offset {offset} of the uncompressed layer: {detail}")]
    Name {
        /// The name, escaped.
        name: String,
        /// Where its header stands.
        offset: u64,
        /// What is wrong with it.
        detail: String,
    },
    /// The system refused.
    #[error("entry {name:?}: {doing}: {source}")]
    System {
        /// The entry, escaped.
        name: String,
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Unpacks an uncompressed layer into an existing directory.
///
/// Blocking. What was written before an error stays; the caller removes the directory.
///
/// # Errors
/// Where the archive is broken, a name is no path, or the system refuses (no space, no privilege).
pub fn unpack_layer(
    layer: impl Read,
    target: &Path,
    style: OpaqueStyle,
    limits: &Limits,
) -> Result<Unpacked, UnpackError> {
    let root =
        sys::open(target, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
            UnpackError::System {
                name: target.display().to_string(),
                doing: "opening the target",
                source: errno.into(),
            }
        })?;
    let mut unpacking =
        Unpacking { root, style, limits, parent: None, directories: Vec::new(), done: Unpacked::default() };
    let mut reader = Reader::new(layer, limits);
    let mut buffer = vec![0; COPY_BYTES];
    while let Some(entry) = reader.next_entry()? {
        unpacking.entry(&entry, &mut reader.content(), &mut buffer)?;
    }
    unpacking.set_directory_times()?;
    Ok(unpacking.done)
}

/// How much content is copied at once. Large enough that the system calls do not count.
const COPY_BYTES: usize = 256 << 10;

struct Unpacking<'a> {
    root: OwnedFd,
    style: OpaqueStyle,
    limits: &'a Limits,
    /// The directory of the last entry: archives go directory by directory.
    parent: Option<(Vec<u8>, OwnedFd)>,
    /// Times of directories change while they are filled, so they are set at the end.
    directories: Vec<(Vec<u8>, Timestamp)>,
    done: Unpacked,
}

impl Unpacking<'_> {
    fn entry(&mut self, entry: &Entry, content: &mut impl Read, buffer: &mut [u8]) -> Result<(), UnpackError> {
        let path = self.clean(entry, &entry.path)?;
        self.done.entries += 1;
        let Some(name) = path.rsplit(|&byte| byte == b'/').next().filter(|name| !name.is_empty()) else {
            return self.root_entry(entry);
        };
        let parent_path = path[..path.len() - name.len()].strip_suffix(b"/").unwrap_or_default().to_vec();
        let parent = match self.parent(entry, parent_path) {
            // A marker below what is no directory hides nothing, as in `loris_format::tree`.
            Err(UnpackError::System { source, .. })
                if name.starts_with(WHITEOUT) && source.kind() == io::ErrorKind::NotADirectory =>
            {
                return Ok(());
            }
            parent => parent?,
        };
        let failed = |doing| move |errno: Errno| failure(&entry.path, doing, errno);
        if name == OPAQUE {
            let outcome = self.mark_opaque(&parent);
            self.parent = Some(parent);
            return outcome.map_err(failed("marking the directory as opaque"));
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            let outcome = whiteout(&parent.1, hidden);
            self.parent = Some(parent);
            return outcome.map_err(failed("making a whiteout"));
        }
        let created = self.create(entry, &parent.1, name, content, buffer);
        if entry.kind == EntryKind::Directory {
            self.directories.push((path.clone(), entry.mtime));
        }
        self.parent = Some(parent);
        created
    }

    fn clean(&self, entry: &Entry, name: &[u8]) -> Result<Vec<u8>, UnpackError> {
        loris_format::tar::path::clean(name, self.limits).map_err(|error| UnpackError::Name {
            name: name.escape_ascii().to_string(),
            offset: entry.header_offset,
            detail: error.to_string(),
        })
    }

    /// `./` and `/`: attributes of the layer's root.
    fn root_entry(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        if entry.kind != EntryKind::Directory {
            return Ok(());
        }
        let root = self.root.try_clone().map_err(|source| UnpackError::System {
            name: "/".into(),
            doing: "opening the root",
            source,
        })?;
        set_attributes(entry, &root, b".").map_err(|errno| failure(b"/", "setting its attributes", errno))?;
        self.directories.push((b".".to_vec(), entry.mtime));
        Ok(())
    }

    /// Returns the directory that an entry stands in, made where the layer does not list it.
    fn parent(&mut self, entry: &Entry, path: Vec<u8>) -> Result<(Vec<u8>, OwnedFd), UnpackError> {
        if let Some(known) = self.parent.take_if(|(known, _)| *known == path) {
            return Ok(known);
        }
        let failed = |errno| failure(&entry.path, "opening its directory", errno);
        match self.open_directory(&path) {
            Ok(directory) => return Ok((path, directory)),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(failed(errno)),
        }
        for (end, _) in path.iter().enumerate().filter(|(_, byte)| **byte == b'/').chain([(path.len(), &b'/')]) {
            let upper = &path[..end];
            let (above, name) = match upper.iter().rposition(|&byte| byte == b'/') {
                Some(slash) => (&upper[..slash], &upper[slash + 1..]),
                None => (&[][..], upper),
            };
            let directory = self.open_directory(above).map_err(failed)?;
            match sys::mkdirat(&directory, OsStr::from_bytes(name), Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        let directory = self.open_directory(&path).map_err(failed)?;
        Ok((path, directory))
    }

    fn open_directory(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        sys::openat2(
            &self.root,
            OsStr::from_bytes(path),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )
    }

    fn mark_opaque(&self, (_, directory): &(Vec<u8>, OwnedFd)) -> Result<(), Errno> {
        let path = descriptor_path(directory, b".");
        let names: &[&str] = match self.style {
            OpaqueStyle::Trusted => &["trusted.overlay.opaque"],
            OpaqueStyle::User => &["user.overlay.opaque"],
            OpaqueStyle::Both => &["trusted.overlay.opaque", "user.overlay.opaque"],
        };
        names.iter().try_for_each(|name| sys::lsetxattr(&path, *name, b"y", XattrFlags::empty()))
    }

    fn create(
        &mut self,
        entry: &Entry,
        parent: &OwnedFd,
        name: &[u8],
        content: &mut impl Read,
        buffer: &mut [u8],
    ) -> Result<(), UnpackError> {
        let failed = |doing| move |errno: Errno| failure(&entry.path, doing, errno);
        let file_name = OsStr::from_bytes(name);
        let make_way = || remove(parent, name, entry.kind == EntryKind::Directory);
        make_way().map_err(failed("replacing what an earlier entry made"))?;
        let node = |kind, device| {
            sys::mknodat(parent, file_name, kind, Mode::from_raw_mode(0o600), device).map_err(failed("making it"))
        };
        match entry.kind {
            EntryKind::Directory => match sys::mkdirat(parent, file_name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed("making it")(errno)),
            },
            EntryKind::Regular => self.write_file(entry, parent, file_name, content, buffer)?,
            EntryKind::Symlink => {
                sys::symlinkat(OsStr::from_bytes(&entry.link), parent, file_name).map_err(failed("making it"))?;
            }
            EntryKind::HardLink => return self.link(entry, parent, file_name),
            EntryKind::Fifo => node(FileType::Fifo, 0)?,
            EntryKind::CharDevice | EntryKind::BlockDevice => {
                let kind =
                    if entry.kind == EntryKind::CharDevice { FileType::CharacterDevice } else { FileType::BlockDevice };
                if kind == FileType::CharacterDevice && entry.device == (0, 0) {
                    // Overlayfs would take it for a whiteout, which only `.wh.` names may be.
                    return Err(UnpackError::Name {
                        name: entry.path.escape_ascii().to_string(),
                        offset: entry.header_offset,
                        detail: "a character device 0:0 is overlayfs' whiteout".into(),
                    });
                }
                node(kind, sys::makedev(entry.device.0, entry.device.1))?;
            }
        }
        set_attributes(entry, parent, name).map_err(failed("setting its attributes"))
    }

    fn write_file(
        &mut self,
        entry: &Entry,
        parent: &OwnedFd,
        name: &OsStr,
        content: &mut impl Read,
        buffer: &mut [u8],
    ) -> Result<(), UnpackError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let descriptor = sys::openat(parent, name, flags, Mode::from_raw_mode(0o600))
            .map_err(|errno| failure(&entry.path, "making it", errno))?;
        let mut file = File::from(descriptor);
        loop {
            let read = match content.read(buffer) {
                Ok(0) => return Ok(()),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(system(&entry.path, "reading its content", source)),
            };
            file.write_all(&buffer[..read]).map_err(|source| system(&entry.path, "writing its content", source))?;
            self.done.bytes += read as u64;
        }
    }

    fn link(&self, entry: &Entry, parent: &OwnedFd, name: &OsStr) -> Result<(), UnpackError> {
        let failed = |errno| failure(&entry.path, "linking it to its target", errno);
        let target = self.clean(entry, &entry.link)?;
        let (above, target_name) = match target.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => (&target[..slash], &target[slash + 1..]),
            None => (&[][..], &target[..]),
        };
        let directory = self.open_directory(above).map_err(failed)?;
        sys::linkat(&directory, OsStr::from_bytes(target_name), parent, name, AtFlags::empty()).map_err(failed)
    }

    fn set_directory_times(&mut self) -> Result<(), UnpackError> {
        self.parent = None;
        while let Some((path, mtime)) = self.directories.pop() {
            // A later entry may have replaced the directory; then it has a time of its own.
            let Ok(directory) = self.open_directory(&path) else { continue };
            sys::utimensat(&directory, ".", &times(mtime), AtFlags::empty())
                .map_err(|errno| failure(&path, "setting its time", errno))?;
        }
        Ok(())
    }
}

/// Owner, permissions, attributes and time; the owner first, since a change of owner takes set-user-ID away.
fn set_attributes(entry: &Entry, parent: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
    let file_name = OsStr::from_bytes(name);
    let owner = (sys::Uid::from_raw(entry.uid), sys::Gid::from_raw(entry.gid));
    sys::chownat(parent, file_name, Some(owner.0), Some(owner.1), AtFlags::SYMLINK_NOFOLLOW)?;
    if entry.kind != EntryKind::Symlink {
        sys::chmodat(parent, file_name, Mode::from_raw_mode(entry.permissions.into()), AtFlags::empty())?;
    }
    let path = descriptor_path(parent, name);
    for (key, value) in &entry.xattrs {
        if key.starts_with(b"trusted.overlay.") || key.starts_with(b"user.overlay.") {
            continue;
        }
        match sys::lsetxattr(&path, OsStr::from_bytes(key), value, XattrFlags::empty()) {
            // As containerd and Docker do: an attribute that this file system can't hold is not worth the image.
            Ok(()) | Err(Errno::NOTSUP | Errno::PERM) => {}
            Err(errno) => return Err(errno),
        }
    }
    sys::utimensat(parent, file_name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
}

fn times(mtime: Timestamp) -> sys::Timestamps {
    let time = sys::Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanoseconds.into() };
    sys::Timestamps { last_access: time, last_modification: time }
}

/// Makes way for an entry: a directory stays where a directory comes, anything else goes.
fn remove(parent: &OwnedFd, name: &[u8], for_directory: bool) -> Result<(), Errno> {
    let file_name = OsStr::from_bytes(name);
    let kind = match sys::statat(parent, file_name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(status) => FileType::from_raw_mode(status.st_mode),
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno),
    };
    if kind != FileType::Directory {
        return sys::unlinkat(parent, file_name, AtFlags::empty());
    }
    if for_directory {
        return Ok(());
    }
    crate::removal::remove_tree(Path::new(OsStr::from_bytes(&descriptor_path(parent, name))))
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// A whiteout hides what lower layers have; where this layer has a file of that name, the file wins.
fn whiteout(parent: &OwnedFd, hidden: &[u8]) -> Result<(), Errno> {
    if hidden.is_empty() || hidden == b"." || hidden == b".." || hidden.starts_with(WHITEOUT) {
        // `.wh..wh.plnk` and the like are aufs' own bookkeeping.
        return Ok(());
    }
    match sys::mknodat(parent, OsStr::from_bytes(hidden), FileType::CharacterDevice, Mode::empty(), 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// A path for the system calls that take no directory descriptor.
fn descriptor_path(directory: &OwnedFd, name: &[u8]) -> Vec<u8> {
    let mut path = format!("/proc/self/fd/{}/", directory.as_fd().as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    path
}

fn failure(name: &[u8], doing: &'static str, errno: Errno) -> UnpackError {
    system(name, doing, errno.into())
}

fn system(name: &[u8], doing: &'static str, source: io::Error) -> UnpackError {
    UnpackError::System { name: name.escape_ascii().to_string(), doing, source }
}
