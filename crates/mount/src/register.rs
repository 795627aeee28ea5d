//! Which mounts a process has up, for those who come after it was killed.
//!
//! Each pager has a file in one folder, locked (`flock`) by it and by its keeper together. A file that nobody locks
//! belongs to a pager that was killed together with its keeper: its mounts read zeros where nothing was filled, and must
//! be taken down before anybody reads from them again ([`sweep`]). One that is *whole* has nothing that was not filled:
//! the kernel serves it without us, and it is left alone.
//!
//! A mount that somebody uses goes on existing out of sight. Its data files are marked anew, which holds for what the kernel
//! has open too, and reads are refused from then on, until it is gone; but where a living pager has claimed (`pager::claim`) the same layer,
//! which is asked too. What the kernel had cached of it is dropped. What was read as zeros before that cannot be
//! taken back, nor what is mapped into a program's memory.
//!
//! | bytes | content |
//! |---|---|
//! | first line | `loris mounts 1` |
//! | then | names, each ended by a NUL; NULs in the place of one that is gone |
//!
//! A name is the path of a mount point; or `=` and such a path: that mount is whole; or `@` and the directory of a layer that
//! is marked. Whoever does not know the latter two takes them for places where nothing is mounted.
//!
//! Beside it, with the ending `note`, may lie what a successor of the process has to know; its form is its writer's.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, FileExt as _},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use crate::{mounts::Unmounted, rootfs};

mod refusal;

use refusal::Refusal;

const VERSION: &[u8] = b"loris mounts 1\n";
/// How the names of files begin that are not locked yet.
const NEW: &str = ".new-";
const SUFFIX: &str = ".mounts";
/// Stands before the path of a mount that is whole.
const WHOLE: u8 = b'=';
/// Stands before the directory of a layer.
const LAYER: u8 = b'@';
/// So that a reader does not meet what was cached before reads were refused. Clean pages of the whole machine go.
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";
/// More is not read: nobody has so many mounts.
const MOST_BYTES: u64 = 4 << 20;

/// The register cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("register of mounts {}: {source}", path.display())]
pub struct RegisterError {
    /// The file or folder.
    pub path: PathBuf,
    /// Why not.
    pub source: io::Error,
}

impl RegisterError {
    fn at(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self { path: path.to_owned(), source }
    }
}

/// The register of one pager.
#[derive(Debug)]
pub(crate) struct Register {
    path: PathBuf,
    file: File,
}

impl Register {
    /// Makes a register in a folder, which is made too.
    pub(crate) fn create(folder: &Path) -> Result<Self, RegisterError> {
        let make = || {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
            let mut new = tempfile::Builder::new().prefix(NEW).tempfile_in(folder)?;
            new.write_all(VERSION)?;
            // Locked before it has its name, so that nobody takes it for a dead one's.
            flock(new.as_file(), FlockOperation::NonBlockingLockExclusive)?;
            let name = new.path().file_name().and_then(OsStr::to_str).unwrap_or_default().trim_start_matches(NEW);
            let path = folder.join(format!("{}-{name}{SUFFIX}", std::process::id()));
            let file = new.persist_noclobber(&path).map_err(|error| error.error)?;
            Ok(Self { path, file })
        };
        make().map_err(RegisterError::at(folder))
    }

    /// Takes over the register of an earlier process, with its lock.
    pub(crate) fn attach(folder: &Path, register: OwnedFd) -> Result<Self, RegisterError> {
        let path = std::fs::read_link(format!("/proc/self/fd/{}", register.as_raw_fd()));
        let path = path.map_err(RegisterError::at(folder))?;
        Ok(Self { path, file: register.into() })
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts a note beside it, whole or not at all.
    pub(crate) fn note(&self, note: &[u8]) -> Result<(), RegisterError> {
        let path = note_of(&self.path);
        let write = || {
            let folder = path.parent().unwrap_or(Path::new("."));
            let mut file = tempfile::Builder::new().prefix(NEW).tempfile_in(folder)?;
            file.write_all(note)?;
            file.persist(&path).map_err(|error| error.error).map(drop)
        };
        write().map_err(RegisterError::at(&path))
    }

    /// Notes a mount. The one who is killed in the middle of it leaves a name that is cut off, which is passed over.
    pub(crate) fn add(&mut self, mountpoint: &Path) -> Result<(), RegisterError> {
        self.write_name(mountpoint.as_os_str().as_bytes())
    }

    /// Notes that a mount is whole from now on: nothing of it is missing, and nobody is asked before it is read.
    pub(crate) fn set_whole(&mut self, mountpoint: &Path) -> Result<(), RegisterError> {
        self.write_name(&prefixed(WHOLE, mountpoint))
    }

    /// Notes a layer that is marked.
    pub(crate) fn add_layer(&mut self, directory: &Path) -> Result<(), RegisterError> {
        self.write_name(&prefixed(LAYER, directory))
    }

    /// Takes one out that is not marked any more.
    pub(crate) fn forget_layer(&mut self, directory: &Path) -> Result<(), RegisterError> {
        self.erase(|name| name == prefixed(LAYER, directory))
    }

    /// Takes that back.
    pub(crate) fn clear_whole(&mut self, mountpoint: &Path) -> Result<(), RegisterError> {
        self.erase(|name| name == prefixed(WHOLE, mountpoint))
    }

    /// Takes a mount that is gone out.
    pub(crate) fn forget(&mut self, mountpoint: &Path) -> Result<(), RegisterError> {
        let path = mountpoint.as_os_str().as_bytes();
        self.erase(|name| name.strip_prefix(&[WHOLE]).unwrap_or(name) == path)
    }

    fn write_name(&mut self, name: &[u8]) -> Result<(), RegisterError> {
        let mut write = || {
            let bytes = self.read()?;
            let names = names(&bytes).ok_or_else(other_version)?;
            if names.into_iter().any(|known| known == name) {
                return Ok(());
            }
            let Some(free) = room_for(&bytes, name.len()) else {
                self.file.seek(SeekFrom::End(0))?;
                return self.file.write_all(&[name, &[0]].concat());
            };
            // The first byte last: until it stands there, what does is no absolute path.
            self.file.write_all_at(&name[1..], free as u64 + 1)?;
            self.file.write_all_at(&name[..1], free as u64)
        };
        write().map_err(RegisterError::at(&self.path))
    }

    /// Writes NULs over names: who is killed in the middle of it leaves one that nothing is mounted at.
    fn erase(&mut self, is_meant: impl Fn(&[u8]) -> bool) -> Result<(), RegisterError> {
        let mut write = || {
            let bytes = self.read()?;
            let mut at = VERSION.len();
            for name in bytes.get(at..).unwrap_or_default().split(|&byte| byte == 0) {
                if !name.is_empty() && is_meant(name) {
                    self.file.write_all_at(&vec![0; name.len()], at as u64)?;
                }
                at += name.len() + 1;
            }
            Ok(())
        };
        write().map_err(RegisterError::at(&self.path))
    }

    fn mounts(&mut self) -> io::Result<Vec<Noted>> {
        parse(&self.read()?).ok_or_else(other_version)
    }

    /// The directories of all layers that are marked.
    fn layers(&mut self) -> io::Result<Vec<PathBuf>> {
        let bytes = self.read()?;
        let names = names(&bytes).ok_or_else(other_version)?;
        Ok(names
            .iter()
            .filter_map(|name| name.strip_prefix(&[LAYER]))
            .map(|path| OsStr::from_bytes(path).into())
            .collect())
    }

    fn read(&mut self) -> io::Result<Vec<u8>> {
        self.file.rewind()?;
        let mut bytes = Vec::new();
        (&self.file).take(MOST_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Removes it, with what its owner has put beside it (`NAME.*`): nothing is mounted any more.
    pub(crate) fn remove(&self) {
        let stem = self.path.file_stem().map(|stem| [stem.as_bytes(), b"."].concat()).unwrap_or_default();
        let beside = self.path.parent().and_then(|folder| std::fs::read_dir(folder).ok()).into_iter().flatten();
        let beside = beside.filter_map(|entry| entry.ok()).map(|entry| entry.path());
        let beside = beside.filter(|path| path.file_name().is_some_and(|name| name.as_bytes().starts_with(&stem)));
        for path in beside.filter(|path| *path != self.path).chain([self.path.clone()]) {
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(file = %path.display(), %error, "the register of mounts stays");
            }
        }
    }
}

fn note_of(register: &Path) -> PathBuf {
    register.with_extension("note")
}

/// Returns the note beside a register.
pub(crate) fn noted(register: &Path) -> io::Result<Vec<u8>> {
    let mut note = Vec::new();
    File::open(note_of(register))?.take(MOST_BYTES).read_to_end(&mut note)?;
    Ok(note)
}

/// A mount that a register names.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Noted {
    mountpoint: PathBuf,
    is_whole: bool,
}

fn other_version() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it is of another version of loris")
}

fn prefixed(prefix: u8, path: &Path) -> Vec<u8> {
    [&[prefix], path.as_os_str().as_bytes()].concat()
}

/// Finds a place for a name and the NUL behind it where names are gone.
fn room_for(bytes: &[u8], length: usize) -> Option<usize> {
    let mut free = 0;
    for (at, &byte) in bytes.iter().enumerate().skip(VERSION.len()) {
        free = if byte == 0 { free + 1 } else { 0 };
        // Behind the NUL of the name before it, and its own.
        let needed = length + 1 + usize::from(at + 1 - free > VERSION.len());
        if free == needed {
            return Some(at - length);
        }
    }
    None
}

/// Returns all names of a register; `None` where it is of another version.
fn names(bytes: &[u8]) -> Option<Vec<&[u8]>> {
    let rest = bytes.strip_prefix(VERSION)?;
    let end = rest.iter().rposition(|&byte| byte == 0).map_or(0, |last| last + 1);
    Some(rest[..end].split(|&byte| byte == 0).filter(|name| !name.is_empty()).collect())
}

fn parse(bytes: &[u8]) -> Option<Vec<Noted>> {
    let names = names(bytes)?;
    let whole: HashSet<&[u8]> = names.iter().filter_map(|name| name.strip_prefix(&[WHOLE])).collect();
    let paths = names.iter().filter(|name| !matches!(name.first(), Some(&(WHOLE | LAYER))));
    let noted =
        paths.map(|name| Noted { mountpoint: PathBuf::from(OsStr::from_bytes(name)), is_whole: whole.contains(name) });
    Some(noted.collect())
}

/// What was done about the mounts of pagers that are dead.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Swept {
    /// Taken down.
    pub mountpoints: Vec<PathBuf>,
    /// Those of them that somebody uses, who may have read zeros.
    pub in_use: Vec<PathBuf>,
}

/// Takes down the mounts of all pagers that were killed together with their keeper. Must run before anything is mounted,
/// so that nobody is served from such a mount. What is whole stays; reads of what is in use are refused from now on.
///
/// `keeper` is the program that does that, as in [`PagerOptions`](crate::pager::PagerOptions). A register of another version of Loris is left alone.
///
/// # Errors
/// Where the folder cannot be read. What cannot be unmounted is logged and tried again the next time.
pub fn sweep(folder: &Path, keeper: Option<&Path>) -> Result<Swept, RegisterError> {
    let mut swept = Swept::default();
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(swept),
        Err(error) => return Err(RegisterError::at(folder)(error)),
    };
    for entry in entries {
        let path = entry.map_err(RegisterError::at(folder))?.path();
        let is_register = path.as_os_str().as_bytes().ends_with(SUFFIX.as_bytes());
        let Some(file) = is_register.then(|| File::options().read(true).write(true).open(&path).ok()).flatten() else {
            continue;
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => continue,
            Err(errno) => return Err(RegisterError::at(&path)(errno.into())),
            Ok(()) => clean(Register { path, file }, Spare::Whole { keeper }, &mut swept)?,
        }
    }
    Ok(swept)
}

/// Takes down the mounts of one register, whose keeper refuses their reads meanwhile and holds its lock.
///
/// # Errors
/// Where it cannot be read.
pub fn sweep_one(path: &Path) -> Result<Swept, RegisterError> {
    let file = File::options().read(true).write(true).open(path).map_err(RegisterError::at(path))?;
    let mut swept = Swept::default();
    clean(Register { path: path.to_owned(), file }, Spare::Nothing, &mut swept)?;
    Ok(swept)
}

/// Which mounts of the dead stay.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Spare<'a> {
    /// Those that are whole. Nobody refuses reads of the others so far.
    Whole {
        keeper: Option<&'a Path>,
    },
    Nothing,
}

fn clean(mut register: Register, spare: Spare<'_>, swept: &mut Swept) -> Result<(), RegisterError> {
    let Ok(mounts) = register.mounts() else {
        tracing::warn!(file = %register.path.display(), "the register is not understood, and left alone");
        return Ok(());
    };
    let mut stays = false;
    let spares = |noted: &Noted| noted.is_whole && spare != Spare::Nothing && rootfs::is_up(&noted.mountpoint);
    let (spared, gone): (Vec<_>, Vec<_>) = mounts.into_iter().partition(spares);
    stays |= !spared.is_empty();
    let refusal = match spare {
        Spare::Whole { keeper } if !gone.is_empty() => Refusal::prepare(&mut register, &gone, keeper),
        _ => None,
    };
    let in_use = swept.in_use.len();
    for Noted { mountpoint, .. } in gone {
        match rootfs::unmount_of_the_dead(&mountpoint) {
            Ok(unmounted) => {
                if unmounted == Unmounted::Detached && spare != Spare::Nothing {
                    swept.in_use.push(mountpoint.clone());
                }
                swept.mountpoints.push(mountpoint);
            }
            Err(crate::MountError::NotOurs { .. }) => {}
            Err(error) => {
                stays = true;
                tracing::error!(%error, "a mount whose server was killed stays; do not read from it");
            }
        }
    }
    if swept.in_use.len() > in_use {
        // It says what is refused for as long as that is, by its lock.
        stays = true;
        let problem = match refusal.map(|refusal| refusal.begin(&register)) {
            Some(Ok(())) => None,
            Some(Err(error)) => Some(error.to_string()),
            None => Some("its layers are not known, or cannot be marked".to_owned()),
        };
        if let Some(problem) = problem {
            tracing::error!(%problem, "a mount whose server was killed is in use, and may read zeros");
        }
        if let Err(error) = std::fs::write(DROP_CACHES, "1") {
            tracing::warn!(%error, "what was cached of a mount whose server was killed may be read still");
        }
    }
    if !stays {
        register.remove();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_dead_are_told_from_the_living() {
        let folder = tempfile::tempdir().unwrap();
        let mut living = Register::create(folder.path()).unwrap();
        living.add(Path::new("/nowhere/at all")).unwrap();
        living.add(Path::new("/nowhere/at all")).unwrap();
        living.add(Path::new("/nowhere")).unwrap();
        let entry = |path: &str, is_whole| Noted { mountpoint: path.into(), is_whole };
        assert_eq!(living.mounts().unwrap(), [entry("/nowhere/at all", false), entry("/nowhere", false)]);
        living.set_whole(Path::new("/nowhere")).unwrap();
        living.set_whole(Path::new("/nowhere")).unwrap();
        assert_eq!(living.mounts().unwrap(), [entry("/nowhere/at all", false), entry("/nowhere", true)]);
        living.clear_whole(Path::new("/nowhere")).unwrap();
        assert_eq!(living.mounts().unwrap(), [entry("/nowhere/at all", false), entry("/nowhere", false)]);
        living.set_whole(Path::new("/nowhere")).unwrap();
        living.forget(Path::new("/nowhere")).unwrap();
        assert_eq!(living.mounts().unwrap(), [entry("/nowhere/at all", false)]);
        living.set_whole(Path::new("/nowhere/at all")).unwrap();
        sweep(folder.path(), None).unwrap();
        assert!(living.path().exists());

        // Its keeper holds it too.
        let keeper = living.file.try_clone().unwrap();
        let path = living.path().to_owned();
        drop(living);
        sweep(folder.path(), None).unwrap();
        assert!(path.exists());
        let attached = Register::attach(folder.path(), keeper.into()).unwrap();
        assert_eq!(attached.path(), path);
        attached.note(b"beside it").unwrap();
        assert_eq!(noted(&path).unwrap(), b"beside it");
        drop(attached);
        assert_eq!(sweep(folder.path(), None).unwrap(), Swept::default(), "nothing is mounted there");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_register_of_another_version_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("1.mounts");
        std::fs::write(&path, "loris mounts 2\n/\0").unwrap();
        sweep(folder.path(), None).unwrap();
        assert!(path.exists());
        assert!(sweep(&folder.path().join("missing"), None).is_ok());
    }

    #[test]
    fn the_place_of_a_name_is_used_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut register = Register::create(folder.path()).unwrap();
        register.add(Path::new("/first")).unwrap();
        for _ in 0..1000 {
            register.add_layer(Path::new("/store/layers/some layer")).unwrap();
            register.add(Path::new("/mnt/somewhere")).unwrap();
            register.add(Path::new("/mnt/else")).unwrap();
            assert_eq!(register.mounts().unwrap().len(), 3);
            assert_eq!(register.layers().unwrap(), [Path::new("/store/layers/some layer")]);
            register.forget(Path::new("/mnt/somewhere")).unwrap();
            register.forget_layer(Path::new("/store/layers/some layer")).unwrap();
            register.forget(Path::new("/mnt/else")).unwrap();
        }
        assert_eq!(register.mounts().unwrap(), [Noted { mountpoint: "/first".into(), is_whole: false }]);
        assert!(register.file.metadata().unwrap().len() < 200);
        // Just enough room, at the beginning and behind another name.
        for (bytes, length, at) in [
            (&b"\0\0\0"[..], 2, Some(0)),
            (b"\0\0", 2, None),
            (b"/a\0\0\0", 1, Some(3)),
            (b"/a\0\0", 1, None),
            (b"\0\0/a\0", 1, Some(0)),
            (b"/\0\0/\0\0\0", 1, Some(5)),
        ] {
            let found = room_for(&[VERSION, bytes].concat(), length).map(|at| at - VERSION.len());
            assert_eq!(found, at, "{}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn names_are_read_whole() {
        let parsed = parse(b"loris mounts 1\n/a\nb\0=/c\0@/layer\0/c\0\0\0=/gone\0/cut").unwrap();
        let parsed: Vec<_> = parsed.iter().map(|noted| (noted.mountpoint.to_str().unwrap(), noted.is_whole)).collect();
        assert_eq!(parsed, [("/a\nb", false), ("/c", true)]);
        assert!(parse(b"loris mounts 1\n").unwrap().is_empty());
        assert_eq!(parse(b"something"), None);
    }
}
