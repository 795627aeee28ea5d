//! What is made out of layers, and kept so that it need not be made again.
//!
//! | path | content |
//! |---|---|
//! | `bootstraps/v1/KEY.erofs` | an EROFS image without content, over the data files of layers |
//!
//! `KEY` is the SHA-256, in hexadecimal digits, of all that the content depends on. So a file that is there is right,
//! or has been cut short by a power failure (they are not synced, since they can be made again): whoever uses one looks
//! whether it is whole. Nothing unfinished ever has a name.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use loris_format::digest::Digest;
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags},
    io::Errno,
};
use tempfile::NamedTempFile;

use crate::{cache::create_private_directory, error::StoreError, store::Store};

/// The folder of bootstraps below the root of a store.
pub const BOOTSTRAPS: &str = "bootstraps/v1";

impl Store {
    /// Returns where the bootstrap of a key is, or would be.
    #[must_use]
    pub fn bootstrap_path(&self, key: &Digest) -> PathBuf {
        self.root().join(BOOTSTRAPS).join(format!("{}.erofs", key.hex()))
    }

    /// Begins a bootstrap. Blocks for some system calls.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub fn begin_bootstrap(&self, key: &Digest) -> Result<UnfinishedFile, StoreError> {
        UnfinishedFile::begin(self.bootstrap_path(key))
    }
}

/// A file that is being written. Where it is dropped, nothing stays of it.
#[derive(Debug)]
pub struct UnfinishedFile {
    file: Written,
    path: PathBuf,
}

#[derive(Debug)]
enum Written {
    /// Without a name: nothing stays even where this process is killed.
    Nameless(File),
    /// On file systems that know no files without a name.
    Named(NamedTempFile),
}

impl UnfinishedFile {
    fn begin(path: PathBuf) -> Result<Self, StoreError> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        create_private_directory(folder).map_err(StoreError::file(folder))?;
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(CWD, folder, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => Written::Nameless(file.into()),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => {
                let file = tempfile::Builder::new().prefix(".unfinished-").tempfile_in(folder);
                Written::Named(file.map_err(StoreError::file(folder))?)
            }
            Err(errno) => return Err(StoreError::file(folder)(errno.into())),
        };
        Ok(Self { file, path })
    }

    /// Returns the file, to be written to.
    pub fn file(&mut self) -> &mut File {
        match &mut self.file {
            Written::Nameless(file) => file,
            Written::Named(file) => file.as_file_mut(),
        }
    }

    /// Gives the file its name, in the place of what had it, and returns its path.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub fn finish(self) -> Result<PathBuf, StoreError> {
        let Self { file, path } = self;
        match file {
            Written::Named(file) => drop(file.persist(&path).map_err(|error| StoreError::file(&path)(error.error))?),
            Written::Nameless(file) => name(&file, &path).map_err(StoreError::file(&path))?,
        }
        Ok(path)
    }
}

fn name(file: &File, path: &Path) -> io::Result<()> {
    let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
    // More often than once only where another process makes the same at the same time.
    for _ in 0..100 {
        match rustix::fs::linkat(CWD, &nameless, CWD, path, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => return Ok(()),
            Err(Errno::EXIST) => match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            },
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_bootstrap_has_a_name_once_it_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let key = Digest::sha256_of(b"key");
        let path = store.bootstrap_path(&key);
        assert!(path.ends_with(format!("bootstraps/v1/{}.erofs", key.hex())), "{}", path.display());
        let count = || std::fs::read_dir(path.parent().unwrap()).unwrap().count();

        let mut dropped = store.begin_bootstrap(&key).unwrap();
        dropped.file().write_all(b"half").unwrap();
        drop(dropped);
        assert_eq!(count(), 0);
        // The second takes the place of the first.
        for content in [&b"whole"[..], b"anew"] {
            let mut file = store.begin_bootstrap(&key).unwrap();
            file.file().write_all(content).unwrap();
            assert_eq!(file.finish().unwrap(), path);
            assert_eq!(std::fs::read(&path).unwrap(), content);
            assert_eq!(count(), 1);
        }
    }
}
