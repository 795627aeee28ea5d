//! Indexes that this machine keeps: those that it has made itself, and those that it has from elsewhere.
//!
//! | path in the store | content |
//! |---|---|
//! | `indexes/v1/ztocs/ALGORITHM-HEX/ztoc` | a ztoc, as [`crate::windows`] keeps it; its digest is its name, and is checked |
//! | `indexes/v1/layers/ALGORITHM-HEX` | which ztoc a layer has: `DIGEST SIZE VOUCHER` |
//! | `indexes/v1/images/ALGORITHM-HEX` | what was found beside an image the last time: `LAYER DIGEST SIZE VOUCHER`, a line each |
//!
//! A layer that is opened has a link to the ztoc in its own directory. What is here stays when layers are removed.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
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
}

impl NodeIndexes {
    /// Looks nowhere yet.
    #[must_use]
    pub fn of(store: &Store) -> Self {
        Self { folder: store.root().join(INDEXES) }
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
        windows::save(&path, ztoc, &places)?;
        write(&name, format!("{beside}\n").as_bytes()).map_err(StoreError::file(&name))?;
        Ok(beside)
    }

    /// Returns the index of a layer.
    #[must_use]
    pub fn find(&self, layer: &Descriptor, trust: IndexTrust) -> Option<Beside> {
        let text = String::from_utf8(read(&self.path("layers", &layer.digest), LINE_BYTES).ok()?).ok()?;
        let beside: Beside = text.strip_suffix('\n')?.parse().ok()?;
        trust.admits(beside.voucher).then_some(beside)
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
