//! What a layer's index is made of, kept beside its data: opening again needs no network, and replays the same checks.
//!
//! - `toc`, a [`Tail`]: the end of the blob as it was fetched.
//! - `promise`: what the manifest said of the layer, where that is more than the digest in the layer's name. The first line is
//!   `loris promise 1`, the second `size BYTES` of the blob; the others are annotations, `KEY VALUE`.

use std::{collections::BTreeMap, fmt::Write as _, io::Read as _, io::Write as _, path::Path};

use loris_format::{
    digest::Digest,
    index::LayerIndex,
    limits::Limits,
    opening::{Opened, Opening, Promise, Step, Trust},
    soci,
};

use crate::{
    cache::{Tail, create_private_directory, open_existing},
    error::StoreError,
    windows,
};

const VERSION: &str = "loris promise 1";
/// Most bytes of the file: annotations with a digest or a few numbers.
const MOST_BYTES: u64 = 64 << 10;

/// Opens a layer again out of what was kept of it. `None` where that is nothing, or nothing of use.
pub(crate) fn replay(
    directory: &Path,
    blob_size: u64,
    promise: Promise,
    trust: Trust,
    limits: &Limits,
) -> Option<(LayerIndex, Opened, Tail)> {
    let tail = Tail::load(directory, blob_size, limits.toc_bytes)?;
    let (mut opening, mut range) = Opening::new(blob_size, promise, trust, limits).ok()?;
    loop {
        match opening.supply(tail.get(range)?).ok()? {
            Step::Read(next, next_range) => (opening, range) = (next, next_range),
            Step::Done(index, opened) => return Some((index, opened, tail)),
        }
    }
}

/// Returns the index of a layer that is not open, whose name in the store has the digest `identity`.
pub(crate) fn saved_index(directory: &Path, identity: Digest, limits: &Limits) -> Option<LayerIndex> {
    let (size, promise) = match load_promise(directory) {
        Some((size, promise)) => (size, promise),
        None => (Tail::saved_size(directory)?, Promise::estargz(Some(identity))),
    };
    if promise.identity() != Some(identity) {
        return None;
    }
    if let Some(beside) = promise.index_beside() {
        let kept = windows::load(directory, &beside.digest, limits)?;
        return soci::open(&kept.ztoc, size, limits).ok();
    }
    replay(directory, size, promise, Trust::Required, limits).map(|(index, ..)| index)
}

/// Keeps what the manifest says, where the layer's name does not say as much.
pub(crate) fn save_promise(directory: &Path, blob_size: u64, promise: &Promise) -> Result<(), StoreError> {
    if promise.zstd_chunked.is_none() && promise.beside.is_none() {
        return Ok(());
    }
    let path = directory.join("promise");
    let mut text = format!("{VERSION}\nsize {blob_size}\n");
    for (key, value) in promise.annotations() {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{key} {value}");
    }
    let write = || {
        create_private_directory(directory)?;
        let mut file = tempfile::Builder::new().prefix(".promise-").tempfile_in(directory)?;
        file.write_all(text.as_bytes())?;
        file.persist(&path).map_err(|error| error.error)
    };
    write().map_err(StoreError::file(&path)).map(drop)
}

fn load_promise(directory: &Path) -> Option<(u64, Promise)> {
    let file = open_existing(&directory.join("promise")).ok()?;
    let mut text = String::new();
    file.take(MOST_BYTES).read_to_string(&mut text).ok()?;
    let mut lines = text.lines();
    if lines.next()? != VERSION {
        return None;
    }
    let size = lines.next()?.strip_prefix("size ")?.parse().ok()?;
    let annotations = lines.map(|line| line.split_once(' ').map(|(key, value)| (key.to_owned(), value.to_owned())));
    let annotations: BTreeMap<String, String> = annotations.collect::<Option<_>>()?;
    Some((size, Promise::read(&annotations).ok()?))
}
