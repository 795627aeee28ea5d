//! What is made out of layers, and kept so that it need not be made again.
//!
//! | path | content |
//! |---|---|
//! | `bootstraps/v1/KEY.erofs` | an EROFS image without content, over the data files of layers |
//! | `bootstraps/v1/KEY.layers` | their directories, relative to the store, one a line: with one of them it goes |
//!
//! `KEY` is the SHA-256, in hexadecimal digits, of all that the content depends on. So a file that is there is right,
//! or has been cut short by a power failure (they are not synced, since they can be made again): whoever uses one looks
//! whether it is whole. Nothing unfinished ever has a name.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::{ffi::OsStrExt as _, fs::OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use loris_format::digest::Digest;
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags},
    io::Errno,
};
use tempfile::NamedTempFile;

use crate::{
    cache::{NO_FOLLOW, create_private_directory},
    error::StoreError,
    store::Store,
};

/// The folder of bootstraps below the root of a store.
pub const BOOTSTRAPS: &str = "bootstraps/v1";

impl Store {
    /// Returns where the bootstrap of a key is, or would be.
    #[must_use]
    pub fn bootstrap_path(&self, key: &Digest) -> PathBuf {
        self.root().join(BOOTSTRAPS).join(format!("{}.erofs", key.hex()))
    }

    /// Begins a bootstrap over layers with these directories: where one of them is evicted, the bootstrap goes too. Blocks
    /// for some system calls.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub fn begin_bootstrap<'a>(
        &self,
        key: &Digest,
        layers: impl IntoIterator<Item = &'a Path>,
    ) -> Result<UnfinishedFile, StoreError> {
        let path = self.bootstrap_path(key);
        let unfinished = UnfinishedFile::begin(path.clone(), self)?;
        let mut text = Vec::new();
        for directory in layers {
            let relative = directory.strip_prefix(self.root()).unwrap_or(directory);
            text.extend_from_slice(relative.as_os_str().as_encoded_bytes());
            text.push(b'\n');
        }
        let (folder, path) = (self.root().join(BOOTSTRAPS), path.with_extension(LAYERS));
        let write = || {
            let mut file = tempfile::Builder::new().prefix(".layers-").tempfile_in(&folder)?;
            file.write_all(&text)?;
            file.persist(&path).map_err(|error| error.error)
        };
        write().map_err(StoreError::file(&path))?;
        Ok(unfinished)
    }
}

/// The ending of a list of layers.
const LAYERS: &str = "layers";
/// Most bytes of such a list that are read: more than any image has layers.
const LAYERS_BYTES: u64 = 1 << 20;

/// Returns bootstraps, with their lists, of which a layer is not there or is one of those `gone`. `unknown_for` adds those
/// without a list that are older.
pub(crate) fn orphans(root: &Path, gone: &[&Path], unknown_for: Option<Duration>) -> Vec<PathBuf> {
    let lives = |name: &[u8]| {
        let path = root.join(OsStr::from_bytes(name));
        !gone.contains(&&*path) && path.join("lock").symlink_metadata().is_ok()
    };
    let read = |path: &Path| {
        let mut text = Vec::new();
        let file = File::options().read(true).custom_flags(NO_FOLLOW).open(path)?;
        file.take(LAYERS_BYTES).read_to_end(&mut text)?;
        io::Result::Ok(text)
    };
    let is_older = |path: &Path, than: Duration| {
        let made = path.symlink_metadata().and_then(|metadata| metadata.modified());
        made.is_ok_and(|made| made.elapsed().is_ok_and(|age| age > than))
    };
    let mut orphans = Vec::new();
    for entry in std::fs::read_dir(root.join(BOOTSTRAPS)).into_iter().flatten().filter_map(Result::ok) {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "erofs") {
            continue;
        }
        let list = path.with_extension(LAYERS);
        match read(&list) {
            Ok(text) if text.split(|&byte| byte == b'\n').filter(|name| !name.is_empty()).all(lives) => {}
            Ok(_) => orphans.extend([path, list]),
            Err(_) if unknown_for.is_some_and(|than| is_older(&path, than)) => orphans.push(path),
            Err(_) => {}
        }
    }
    orphans
}

/// A file that is being written. Where it is dropped, nothing stays of it.
#[derive(Debug)]
pub struct UnfinishedFile {
    file: Written,
    path: PathBuf,
    store: Store,
}

#[derive(Debug)]
enum Written {
    /// Without a name: nothing stays even where this process is killed.
    Nameless(File),
    /// On file systems that know no files without a name.
    Named(NamedTempFile),
}

impl UnfinishedFile {
    fn begin(path: PathBuf, store: &Store) -> Result<Self, StoreError> {
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
        Ok(Self { file, path, store: store.clone() })
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
    /// Where the store can't be written, or its quota has no room for it.
    pub fn finish(self) -> Result<PathBuf, StoreError> {
        let Self { file, path, store } = self;
        let written = match &file {
            Written::Nameless(file) => file.metadata(),
            Written::Named(file) => file.as_file().metadata(),
        };
        let _room = store.room(written.map_err(StoreError::file(&path))?.len())?;
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
    use super::*;

    #[test]
    fn a_bootstrap_has_a_name_once_it_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let key = Digest::sha256_of(b"key");
        let path = store.bootstrap_path(&key);
        let layer = store.root().join("layers/b/t");
        assert!(path.ends_with(format!("bootstraps/v1/{}.erofs", key.hex())), "{}", path.display());
        let count = || std::fs::read_dir(path.parent().unwrap()).unwrap().count();

        let mut dropped = store.begin_bootstrap(&key, [layer.as_path()]).unwrap();
        dropped.file().write_all(b"half").unwrap();
        drop(dropped);
        assert_eq!(count(), 1, "its list of layers");
        // The second takes the place of the first.
        for content in [&b"whole"[..], b"anew"] {
            let mut file = store.begin_bootstrap(&key, [layer.as_path()]).unwrap();
            file.file().write_all(content).unwrap();
            assert_eq!(file.finish().unwrap(), path);
            assert_eq!(std::fs::read(&path).unwrap(), content);
            assert_eq!(count(), 2);
        }
    }

    #[test]
    fn a_bootstrap_goes_with_its_layers() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let root = store.root();
        let layers = ["layers/b/1", "layers/b/2", "layers/b/3"].map(|name| root.join(name));
        for layer in &layers {
            std::fs::create_dir_all(layer).unwrap();
            std::fs::write(layer.join("lock"), "").unwrap();
        }
        let make = |name: &str, layers: &[&Path]| {
            let unfinished = store.begin_bootstrap(&Digest::sha256_of(name.as_bytes()), layers.iter().copied());
            unfinished.unwrap().finish().unwrap()
        };
        let (one, both) = (make("one", &[&layers[0]]), make("both", &[&layers[1], &layers[2]]));
        let unknown = make("unknown", &[]);
        std::fs::remove_file(unknown.with_extension(LAYERS)).unwrap();
        let lists = |paths: &[&Path]| -> std::collections::BTreeSet<PathBuf> {
            paths.iter().flat_map(|path| [path.to_path_buf(), path.with_extension(LAYERS)]).collect()
        };
        let found = |gone: &[&Path]| orphans(root, gone, None).into_iter().collect::<std::collections::BTreeSet<_>>();
        assert_eq!(found(&[]), lists(&[]));
        assert_eq!(found(&[&layers[1]]), lists(&[&both]));
        std::fs::remove_dir_all(&layers[0]).unwrap();
        assert_eq!(found(&[]), lists(&[&one]));
        assert!(orphans(root, &[], Some(Duration::ZERO)).contains(&unknown));
    }
}
