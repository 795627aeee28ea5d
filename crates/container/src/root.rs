//! A container's root directory, looked into from outside.
//!
//! Everything in it is an attacker's, symbolic links above all. Every path is resolved by the kernel with the directory
//! as its root (`openat2` with `RESOLVE_IN_ROOT`, Linux 5.6), so no link leads out.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

/// A directory that is some container's `/`.
#[derive(Debug)]
pub struct Root {
    directory: OwnedFd,
    path: PathBuf,
}

impl Root {
    /// Opens a directory as a root.
    ///
    /// # Errors
    /// It isn't a directory, or can't be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        Ok(Self { directory, path: path.to_owned() })
    }

    /// Returns the path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads a regular file of at most `limit` bytes. One that isn't there is `None`.
    ///
    /// # Errors
    /// It can't be read, is longer, or is no regular file.
    pub fn read(&self, path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
        // A FIFO must not make us wait for a writer.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = match self.resolve(path, flags) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let mut bytes = Vec::new();
        file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {limit} bytes")));
        }
        Ok(Some(bytes))
    }

    /// Says whether a file or directory can be mounted at `path`: what is there is of that kind, or it can be created.
    #[must_use]
    pub fn takes_mount(&self, path: &Path, directory: bool) -> bool {
        match self.resolve(path, OFlags::PATH | OFlags::CLOEXEC) {
            Ok(found) => rustix::fs::fstat(&found)
                .is_ok_and(|stat| (FileType::from_raw_mode(stat.st_mode) == FileType::Directory) == directory),
            Err(Errno::NOENT) => self.is_writable() && !self.is_dangling(path),
            Err(_) => false,
        }
    }

    /// Creates a directory and those above it, with mode 0755, and owned by who creates it.
    ///
    /// # Errors
    /// A component is no directory, or can't be created.
    pub fn create_directories(&self, path: &Path) -> io::Result<()> {
        let mut parent = self.resolve(Path::new("/"), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC)?;
        let mut so_far = PathBuf::from("/");
        for component in path.components() {
            let Component::Normal(name) = component else { continue };
            so_far.push(name);
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            parent = match self.resolve(&so_far, flags) {
                Err(Errno::NOENT) => {
                    rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755))?;
                    self.resolve(&so_far, flags)?
                }
                other => other?,
            };
        }
        Ok(())
    }

    fn resolve(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.directory, path, flags, Mode::empty(), resolve)
    }

    fn is_writable(&self) -> bool {
        rustix::fs::accessat(&self.directory, ".", rustix::fs::Access::WRITE_OK, AtFlags::EACCESS).is_ok()
    }

    /// Says whether `path`, which leads nowhere, is itself a link: a runtime won't create through it.
    fn is_dangling(&self, path: &Path) -> bool {
        self.resolve(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn links_do_not_lead_out() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "outside").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::create_dir(path.join("etc")).unwrap();
        symlink(outside.path().join("secret"), path.join("etc/absolute")).unwrap();
        symlink("../../../../../../../../etc/passwd", path.join("etc/relative")).unwrap();
        symlink(outside.path(), path.join("out")).unwrap();
        fs::write(path.join("etc/passwd"), "inside").unwrap();

        let root = Root::open(path).unwrap();
        let read = |name: &str| root.read(Path::new(name), 100).unwrap();
        assert_eq!(read("/etc/absolute"), None);
        assert_eq!(read("/etc/relative").unwrap(), b"inside");
        assert_eq!(read("../../etc/passwd").unwrap(), b"inside");
        assert_eq!(read("/out/secret"), None);
        assert_eq!(read("/etc/passwd/x"), None);
        assert!(root.read(Path::new("/etc/passwd"), 5).is_err());
        assert!(root.read(Path::new("/etc"), 5).is_err());

        root.create_directories(Path::new("/a/b/../c")).unwrap();
        assert!(path.join("a/b/c").is_dir());
        assert!(root.create_directories(Path::new("/out/x")).is_err());
        assert!(root.create_directories(Path::new("/etc/passwd/x")).is_err());
        assert!(!outside.path().join("x").exists());

        assert!(root.takes_mount(Path::new("/etc/passwd"), false));
        assert!(root.takes_mount(Path::new("/etc/hosts"), false));
        assert!(root.takes_mount(Path::new("/etc"), true));
        assert!(!root.takes_mount(Path::new("/etc"), false));
        assert!(!root.takes_mount(Path::new("/etc/absolute"), false), "a dangling link");
    }
}
