//! The mounts of this process's mount namespace, as the kernel lists them, and the way to take one away.
//!
//! The list (`/proc/self/mountinfo`, described in proc(5)) holds names that others chose: it is read as bytes, and a
//! line that makes no sense is passed over.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    mount::{UnmountFlags, unmount as umount2},
};

use crate::{MOUNT_NAME, MountError, fuse::fusermount, loop_device, probe};

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// One mount.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MountInfo {
    /// The kernel's number for it, unique while it is mounted.
    pub id: u32,
    /// The number of the mount that it stands on.
    pub parent: u32,
    /// Where it stands.
    pub mountpoint: PathBuf,
    /// Kind of file system, with a subtype behind a dot: `fuse.loris`, `overlay`.
    pub file_system: OsString,
    /// What was mounted; any text for file systems without a device.
    pub source: OsString,
    /// Options of the file system, as the kernel prints them (still escaped).
    pub options: OsString,
}

impl MountInfo {
    /// Whether Loris made it: a tree over FUSE, an EROFS with a bootstrap of ours, or an overlay.
    #[must_use]
    pub fn is_loris(&self) -> bool {
        match self.file_system.as_bytes() {
            b"fuse.loris" => true,
            // A kernel or a helper may leave the subtype out.
            b"fuse" | b"overlay" => self.source == MOUNT_NAME,
            b"erofs" => {
                let source = Path::new(&self.source);
                is_bootstrap(source) || loop_device::backing_file(source).is_some_and(|file| is_bootstrap(&file))
            }
            _ => false,
        }
    }

    /// Whether it is a FUSE mount, of whomever.
    #[must_use]
    pub fn is_fuse(&self) -> bool {
        let kind = self.file_system.as_bytes();
        kind == b"fuse" || kind.starts_with(b"fuse.")
    }

    /// Whether it is a FUSE mount whose server has ended.
    ///
    /// `statfs` is asked, since the kernel answers a `stat` of the root out of its cache.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.is_fuse() && matches!(rustix::fs::statfs(&self.mountpoint), Err(Errno::NOTCONN | Errno::CONNABORTED))
    }

    /// Returns the lower directories of an overlay, uppermost first; nothing for other mounts.
    #[must_use]
    pub fn lower_directories(&self) -> Vec<PathBuf> {
        if self.file_system != "overlay" {
            return Vec::new();
        }
        let options = self.options.as_bytes().split(|&byte| byte == b',');
        options
            .filter_map(|option| match option.strip_prefix(b"lowerdir+=") {
                Some(one) => Some(vec![unescape_octal(one)]),
                None => option.strip_prefix(b"lowerdir=").map(|all| split_lower(&unescape_octal(all))),
            })
            .flatten()
            .map(|path| PathBuf::from(OsString::from_vec(path)))
            .collect()
    }
}

/// Whether a path is that of a bootstrap in a store: `.../bootstraps/v1/KEY.erofs`, with a key of 64 hexadecimal digits.
fn is_bootstrap(path: &Path) -> bool {
    let key = path.extension().filter(|extension| *extension == "erofs").and_then(|_| path.file_stem());
    key.is_some_and(|key| key.len() == 64 && key.as_bytes().iter().all(u8::is_ascii_hexdigit))
        && path.parent().is_some_and(|folder| folder.ends_with(loris_lazy::derived::BOOTSTRAPS))
}

/// Whether a mount is gone altogether or only out of sight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unmounted {
    /// Nothing is left of it.
    Whole,
    /// It was in use: no path leads to it any more, and it goes when its last user does.
    Detached,
    /// There was nothing to unmount.
    Absent,
}

/// Returns all mounts of this process's namespace, in the order in which they were made.
///
/// # Errors
/// Where `/proc` is not mounted.
pub fn list() -> Result<Vec<MountInfo>, MountError> {
    let text = std::fs::read(MOUNTINFO).map_err(|source| MountError::MountInfo { source })?;
    Ok(parse(&text))
}

/// Returns the mount at a directory: the uppermost one, where several stand on one another. The directory itself is
/// not touched, so that this also works where the mount is dead.
///
/// # Errors
/// Where `/proc` is not mounted.
pub fn find(mountpoint: &Path) -> Result<Option<MountInfo>, MountError> {
    let wanted = resolve(mountpoint);
    Ok(list()?.into_iter().rfind(|mount| mount.mountpoint == wanted))
}

/// Takes away the uppermost mount at a directory: as usual, or where it is in use, by detaching it. A FUSE mount that
/// belongs to a user without privileges goes through `fusermount3`.
///
/// # Errors
/// [`MountError::Unmount`] where the kernel refuses.
pub fn unmount(mountpoint: &Path) -> Result<Unmounted, MountError> {
    let refused = |errno: Errno| MountError::Unmount { path: mountpoint.to_owned(), source: errno.into() };
    match umount2(mountpoint, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(Unmounted::Whole),
        Err(Errno::INVAL | Errno::NOENT) => Ok(Unmounted::Absent),
        Err(Errno::BUSY) => match umount2(mountpoint, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
            Ok(()) => Ok(Unmounted::Detached),
            // Its last user and somebody who unmounts it were faster.
            Err(Errno::INVAL) => Ok(Unmounted::Whole),
            Err(errno) => Err(refused(errno)),
        },
        Err(Errno::PERM) => fusermount::unmount(mountpoint),
        Err(errno) => Err(refused(errno)),
    }
}

/// Checks that something can be mounted at a directory, and returns its path without symbolic links.
pub(crate) fn check_mountpoint(path: &Path) -> Result<PathBuf, MountError> {
    let resolved = resolve(path);
    let mounts = list()?;
    let around = mounts.iter().rfind(|mount| mount.is_fuse() && resolved.starts_with(&mount.mountpoint));
    if let Some(dead) = around.filter(|mount| mount.is_dead()) {
        let command = if probe::probe().is_admin() { "umount -l" } else { "fusermount3 -uz" };
        let remedy = format!("{command} {}", dead.mountpoint.display());
        return Err(MountError::DeadMount { path: path.to_owned(), remedy });
    }
    if mounts.iter().any(|mount| mount.is_loris() && mount.mountpoint == resolved) {
        return Err(MountError::AlreadyMounted { path: path.to_owned() });
    }
    match std::fs::metadata(&resolved) {
        Ok(metadata) if metadata.is_dir() => Ok(resolved),
        Ok(_) => Err(MountError::NotADirectory { path: path.to_owned() }),
        Err(source) => Err(MountError::MountPoint { path: path.to_owned(), source }),
    }
}

/// One mount that was made by this process, to be told from what others do at the same directory.
#[derive(Clone, Debug)]
pub(crate) struct OwnMount {
    id: u32,
    mountpoint: PathBuf,
}

impl OwnMount {
    /// Takes note of what has just been mounted at `mountpoint`. Where that fails, it is unmounted.
    pub(crate) fn note(mountpoint: &Path) -> Result<Self, MountError> {
        let gone = || MountError::Unmount { path: mountpoint.to_owned(), source: io::ErrorKind::NotFound.into() };
        let found = find(mountpoint).and_then(|found| found.ok_or_else(gone)).inspect_err(|_| {
            // The error at hand says more than a second one.
            let _ = unmount(mountpoint);
        })?;
        Ok(Self { id: found.id, mountpoint: found.mountpoint })
    }

    /// Where it stands, without symbolic links.
    pub(crate) fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Takes it away where it is still there. What somebody else mounted at the same place is left alone.
    pub(crate) fn unmount(&self) -> Result<Unmounted, MountError> {
        let here: Vec<_> = list()?.into_iter().filter(|mount| mount.mountpoint == self.mountpoint).collect();
        match here.last() {
            Some(top) if top.id == self.id => unmount(&self.mountpoint),
            Some(_) if here.iter().any(|mount| mount.id == self.id) => Err(MountError::Unmount {
                path: self.mountpoint.clone(),
                source: io::Error::new(io::ErrorKind::ResourceBusy, "another mount stands on top of it"),
            }),
            _ => Ok(Unmounted::Absent),
        }
    }
}

/// Resolves symbolic links, but does not step onto the last component where that fails, as it does for dead mounts.
fn resolve(path: &Path) -> PathBuf {
    if let Ok(resolved) = path.canonicalize() {
        return resolved;
    }
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    match (absolute.parent().map(Path::canonicalize), absolute.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => absolute,
    }
}

fn parse(text: &[u8]) -> Vec<MountInfo> {
    text.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

/// Parses `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`, where any number of words
/// stands before the dash.
fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut words = line.split(|&byte| byte == b' ');
    let id = number(words.next()?)?;
    let parent = number(words.next()?)?;
    let _device = words.next()?;
    let _root = words.next()?;
    let mountpoint = unescape_octal(words.next()?);
    let mut words = words.skip_while(|word| *word != b"-").skip(1);
    let file_system = unescape_octal(words.next()?);
    let source = unescape_octal(words.next()?);
    let options = words.next().unwrap_or_default();
    Some(MountInfo {
        id,
        parent,
        mountpoint: OsString::from_vec(mountpoint).into(),
        file_system: OsString::from_vec(file_system),
        source: OsString::from_vec(source),
        options: OsStr::from_bytes(options).to_owned(),
    })
}

fn number(word: &[u8]) -> Option<u32> {
    std::str::from_utf8(word).ok()?.parse().ok()
}

/// Undoes the kernel's escaping of bytes as `\` and three octal digits. A backslash that begins no such thing stands
/// for itself.
fn unescape_octal(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, behind)) = rest.split_first() {
        match (byte, behind) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = &behind[3..];
            }
            _ => {
                plain.push(byte);
                rest = behind;
            }
        }
    }
    plain
}

/// Splits overlayfs' list of lower directories at colons that no backslash protects.
fn split_lower(text: &[u8]) -> Vec<Vec<u8>> {
    let mut paths = vec![Vec::new()];
    let mut bytes = text.iter().copied();
    while let Some(byte) = bytes.next() {
        match (byte, paths.last_mut()) {
            (b'\\', Some(path)) => path.extend(bytes.next()),
            (b':', _) => paths.push(Vec::new()),
            (_, Some(path)) => path.push(byte),
            (_, None) => {}
        }
    }
    // `::` separates the directories which hold only data.
    paths.retain(|path| !path.is_empty());
    paths
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lines_are_parsed() {
        let text = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n\
            40 36 0:51 / /a\\040b\\134\\011c ro - fuse.loris loris ro,user_id=0\n\
            41 36 0:52 / /caf\xe9 rw - overlay loris rw,lowerdir=/l1:/l2\\134:x,upperdir=/u\n\
            junk\n\
            42 36 0:53 / /x rw shared:1\n\
            x 36 0:53 / /x rw - tmpfs tmpfs rw\n\
            43 36 0:54 / /y rw - tmpfs tmpfs\n";
        let mounts = parse(text);
        let seen: Vec<_> = mounts
            .iter()
            .map(|m| (m.id, m.mountpoint.as_os_str().as_bytes(), m.file_system.as_bytes(), m.is_loris()))
            .collect();
        assert_eq!(
            seen,
            [
                (36, &b"/mnt2"[..], &b"ext3"[..], false),
                (40, b"/a b\\\tc", b"fuse.loris", true),
                (41, b"/caf\xe9", b"overlay", true),
                (43, b"/y", b"tmpfs", false),
            ]
        );
        assert_eq!(mounts[2].lower_directories(), [Path::new("/l1"), Path::new("/l2:x")]);
    }

    #[test]
    fn others_mounts_are_not_ours() {
        let key = "0123456789abcdef".repeat(4);
        let bootstrap = format!("/var/lib/loris/bootstraps/v1/{key}.erofs");
        let cases: [(&str, &str, bool); 11] = [
            ("erofs", &bootstrap, true),
            ("ext4", &bootstrap, false),
            ("erofs", &bootstrap.replace("v1", "v2"), false),
            ("erofs", &bootstrap.replace(".erofs", ""), false),
            ("erofs", "/srv/image.erofs", false),
            ("fuse.loris", "x", true),
            ("fuse", "loris", true),
            ("fuse", "sshfs", false),
            ("fuse.lorisx", "loris", false),
            ("overlay", "overlay", false),
            ("tmpfs", "loris", false),
        ];
        for (file_system, source, ours) in cases {
            let mount = MountInfo {
                id: 1,
                parent: 0,
                mountpoint: "/m".into(),
                file_system: file_system.into(),
                source: source.into(),
                options: OsString::new(),
            };
            assert_eq!(mount.is_loris(), ours, "{file_system} {source}");
        }
    }

    #[test]
    fn octal_escapes() {
        let cases: [(&[u8], &[u8]); 6] = [
            (b"plain", b"plain"),
            (b"a\\040b", b"a b"),
            (b"\\134\\012", b"\\\n"),
            (b"end\\", b"end\\"),
            (b"\\04", b"\\04"),
            (b"\\777", b"\\777"),
        ];
        for (escaped, plain) in cases {
            assert_eq!(unescape_octal(escaped), plain, "{}", escaped.escape_ascii());
        }
    }

    #[test]
    fn the_root_is_listed() {
        let root = find(Path::new("/")).unwrap().unwrap();
        assert_eq!(root.mountpoint, Path::new("/"));
        assert!(!root.is_loris());
        assert!(find(Path::new("/proc/self/no-such-thing")).unwrap().is_none());
    }

    #[test]
    fn what_is_no_mount_is_absent() {
        let directory = tempfile::tempdir().unwrap();
        // Without privileges the kernel does not even look.
        if crate::probe::probe().is_admin() {
            assert_eq!(unmount(directory.path()).unwrap(), Unmounted::Absent);
        }
    }
}
