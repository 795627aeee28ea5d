//! Indexes that this machine keeps: those that it has made itself, and those that it has from elsewhere.
//!
//! | path in the store | content |
//! |---|---|
//! | `indexes/v1/ztocs/ALGORITHM-HEX/ztoc` | a ztoc, as [`crate::windows`] keeps it; its digest is its name, and is checked |
//! | `indexes/v1/layers/ALGORITHM-HEX` | which ztoc a layer has: `DIGEST SIZE VOUCHER` |
//! | `indexes/v1/images/ALGORITHM-HEX` | what was found beside an image the last time: `LAYER DIGEST SIZE VOUCHER`, a line each |
//!
//! A layer that is opened has a link to the ztoc in its own directory. What is here stays when layers are removed, unless a
//! quota wants the room.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use loris_format::{
    digest::Digest,
    limits::Limits,
    opening::{Beside, Voucher},
};
use loris_oci::Descriptor;

use super::IndexTrust;
use crate::{
    cache::create_private_directory,
    documents::{read, write},
    error::StoreError,
    store::Store,
    windows,
};

/// The folder below the root of a store.
pub const INDEXES: &str = "indexes/v1";
/// Most bytes of a line.
const LINE_BYTES: u64 = 400;
/// Most layers of an image.
const MOST_LAYERS: u64 = 4096;

/// What a store has.
#[derive(Clone, Debug)]
pub struct NodeIndexes {
    folder: PathBuf,
    store: Store,
}

impl NodeIndexes {
    /// Looks nowhere yet.
    #[must_use]
    pub fn of(store: &Store) -> Self {
        Self { folder: store.root().join(INDEXES), store: store.clone() }
    }

    fn path(&self, what: &str, digest: &Digest) -> PathBuf {
        self.folder.join(what).join(format!("{}-{}", digest.algorithm(), digest.hex()))
    }

    /// Keeps the ztoc of a layer, of whose bytes it was made, or which has it from elsewhere.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub fn keep(&self, layer: &Digest, ztoc: &[u8], voucher: Voucher) -> Result<Beside, StoreError> {
        let beside = Beside { digest: Digest::sha256_of(ztoc), size: ztoc.len() as u64, voucher };
        let (path, name) = (self.path("ztocs", &beside.digest), self.path("layers", layer));
        let places = windows::places(ztoc, &Limits::default())
            .map_err(|problem| StoreError::file(&path)(io::Error::other(problem)))?;
        let _room = self.store.room(ztoc.len() as u64)?;
        windows::save(&path, ztoc, &places)?;
        // The note is no use without it.
        let kept = path.join("ztoc");
        File::open(&kept).and_then(|file| file.sync_all()).map_err(StoreError::file(&kept))?;
        write(&name, format!("{beside}\n").as_bytes()).map_err(StoreError::file(&name))?;
        Ok(beside)
    }

    /// Returns the index of a layer.
    #[must_use]
    pub fn find(&self, layer: &Descriptor, trust: IndexTrust) -> Option<Beside> {
        let text = String::from_utf8(read(&self.path("layers", &layer.digest), LINE_BYTES).ok()?).ok()?;
        let beside: Beside = text.strip_suffix('\n')?.parse().ok()?;
        (trust.admits(beside.voucher) && self.has(&beside)).then_some(beside)
    }

    /// Says whether the ztoc is here.
    pub(crate) fn has(&self, beside: &Beside) -> bool {
        self.path("ztocs", &beside.digest).join("ztoc").is_file()
    }

    /// Forgets the index of a layer, which is no use, and the layer's copy of it.
    pub(crate) fn forget(&self, layer: &Digest, beside: &Beside, directory: &Path) {
        let gone =
            [self.path("layers", layer), self.path("ztocs", &beside.digest).join("ztoc"), directory.join("ztoc")];
        for path in gone {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(%error, path = %path.display(), "a damaged index could not be removed");
                }
                _ => {}
            }
        }
    }

    /// Gives a layer's directory a ztoc that is here; says whether it is.
    pub(crate) fn lend(&self, beside: &Beside, directory: &Path) -> bool {
        let path = self.path("ztocs", &beside.digest).join("ztoc");
        let lent = create_private_directory(directory).and_then(|()| std::fs::hard_link(path, directory.join("ztoc")));
        lent.is_ok()
    }

    /// Notes what was found beside an image.
    pub(super) fn remember(&self, manifest: &Digest, found: &BTreeMap<Digest, Beside>) {
        let lines: Vec<String> = found.iter().map(|(layer, beside)| format!("{layer} {beside}\n")).collect();
        if let Err(error) = write(&self.path("images", manifest), lines.concat().as_bytes()) {
            tracing::debug!(%error, "what was found beside an image could not be noted");
        }
    }

    /// Returns what was found beside an image the last time.
    pub(super) fn remembered(&self, manifest: &Digest) -> BTreeMap<Digest, Beside> {
        let text = || -> io::Result<String> {
            let bytes = read(&self.path("images", manifest), MOST_LAYERS * LINE_BYTES)?;
            String::from_utf8(bytes).map_err(io::Error::other)
        };
        let line = |line: &str| {
            let (layer, beside) = line.split_once(' ')?;
            Some((layer.parse().ok()?, beside.parse().ok()?))
        };
        text().unwrap_or_default().lines().filter_map(line).collect()
    }
}

/// Removes ztocs of layers that are not here, the oldest first, until `excess` bytes are free; returns how many are.
pub(crate) fn make_room(root: &Path, excess: u64) -> u64 {
    let folder = root.join(INDEXES);
    let ztoc = |entry: std::fs::DirEntry| {
        let path = entry.path().join("ztoc");
        let metadata = path.symlink_metadata().ok()?;
        // A layer that has it has a link to it.
        let time = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        (metadata.nlink() == 1).then(|| (time, path, metadata.blocks().saturating_mul(512)))
    };
    let mut oldest: Vec<_> = entries(&folder.join("ztocs")).filter_map(ztoc).collect();
    oldest.sort();
    let mut freed = 0_u64;
    for (_, path, bytes) in oldest {
        if freed >= excess {
            break;
        }
        if std::fs::remove_file(&path).is_ok() {
            freed = freed.saturating_add(bytes);
            if let Some(folder) = path.parent() {
                // Not where somebody is about to write another.
                let _ = std::fs::remove_dir(folder);
            }
        }
    }
    if freed > 0 {
        remove_notes(&folder);
    }
    freed
}

/// Removes the notes of ztocs that are gone.
fn remove_notes(folder: &Path) {
    for entry in entries(&folder.join("layers")) {
        let path = entry.path();
        let Ok(text) = read(&path, LINE_BYTES) else { continue };
        let beside = String::from_utf8(text).ok().and_then(|text| text.trim_end().parse::<Beside>().ok());
        let Some(Beside { digest, .. }) = beside else { continue };
        if !folder.join("ztocs").join(format!("{}-{}", digest.algorithm(), digest.hex())).join("ztoc").exists() {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Folders in which a process that is killed may leave temporary files.
pub(crate) fn folders(root: &Path) -> impl Iterator<Item = PathBuf> {
    let folder = root.join(INDEXES);
    let ztocs = entries(&folder.join("ztocs")).map(|entry| entry.path());
    let others = [folder.join("layers"), folder.join("images"), folder];
    ztocs.chain(others)
}

fn entries(folder: &Path) -> impl Iterator<Item = std::fs::DirEntry> + use<> {
    std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok)
}
