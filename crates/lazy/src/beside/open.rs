//! Opens a layer by the index beside it.

use std::{io::Write as _, sync::Arc};

use super::{NodeIndexes, node::INDEXES, soci::fetch_ztoc};
use crate::{
    cache::{Tail, create_private_directory},
    error::{LayerError, StoreError},
    kept,
    layer::{Counters, LazyLayer},
    open::{Indexed, LayerOpening, Trust},
    schedule::{Claim, Urgency},
    windows::{self, Windows},
};
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use loris_format::{
    estargz::footer::Kind,
    index::{Codec, LayerIndex},
    opening::{BESIDE_ANNOTATION, Beside, Opened, Promise, Voucher},
    position::{BlobOffset, BlobRange},
    soci::{self, WindowPlaces, manifest::INDEX_DIGEST},
};

/// How often a ztoc is held in memory while it is read: as it came, and without windows.
const COPIES: u64 = 2;
/// What of a layer is in memory while it is written to the disk.
const WRITTEN_BYTES: u64 = 1 << 20;

impl LayerOpening {
    /// Fetches all of a layer and makes an index of it, which is kept; what came fills the layer at once.
    pub(crate) async fn open_plain(mut self) -> Result<Arc<LazyLayer>, LayerError> {
        let layer = self.descriptor.digest;
        let in_store = |source| LayerError::Store { layer, source: Arc::new(source) };
        let folder = self.store.root().join(INDEXES);
        let failed = |error| in_store(StoreError::file(&folder)(error));
        let (size, room) = (self.descriptor.size, self.store.clone());
        let room = self.compute(move || room.room(size)).await?.map_err(in_store)?;
        let mut blob = create_private_directory(&folder)
            .and_then(|()| tempfile::Builder::new().prefix(".blob-").tempfile_in(&folder))
            .map_err(failed)?;
        let range = BlobRange { start: BlobOffset(0), length: self.descriptor.size };
        {
            let _turn = self.store.schedule().turn(Claim::new(Urgency::Demand, WRITTEN_BYTES)).await;
            let not_fetched = |source| LayerError::Fetch { layer, range, source: Arc::new(source) };
            Counters::add(&self.counters.requests, 1);
            let mut pieces = self.source.blob(&self.descriptor).await.map_err(not_fetched)?;
            // Verified as it passes.
            while let Some(piece) = pieces.try_next().await.map_err(not_fetched)? {
                Counters::add(&self.counters.fetched_bytes, piece.len() as u64);
                blob.write_all(&piece).map_err(failed)?;
            }
        }
        let read = blob.reopen().map_err(failed)?;
        let options = soci::BuildOptions { limits: self.options.limits.clone(), ..soci::BuildOptions::default() };
        let node = NodeIndexes::of(&self.store);
        let index = move || match soci::build(read, &options) {
            Ok(built) => Ok(node.keep(&layer, &built.ztoc, Voucher::Node)),
            Err(error) => Err(error.to_string()),
        };
        let made = self.compute(index).await?.map_err(|reason| LayerError::NotLazy { layer, reason })?;
        let beside = made.map_err(in_store)?;
        // It was just made: where it is no use, another one is none either.
        self.options.plain_bytes = 0;
        self.descriptor.annotations.insert(BESIDE_ANNOTATION.to_owned(), beside.to_string());
        let opened = self.open_beside(Promise { beside: Some(beside), ..Promise::default() }, beside).await?;
        let filled = Arc::clone(&opened);
        let fill = move || {
            let filling = filled.fill_from(blob.as_file());
            drop((blob, room));
            filling
        };
        let filling = tokio::task::spawn_blocking(fill);
        match filling.await {
            Ok(Ok(())) => opened.prove_when_whole(),
            Ok(Err(error)) => tracing::debug!(%error, "what was fetched for an index will be fetched again"),
            Err(_) => return Err(LayerError::Interrupted { layer }),
        }
        Ok(opened)
    }

    pub(crate) async fn open_beside(self, promise: Promise, beside: Beside) -> Result<Arc<LazyLayer>, LayerError> {
        let layer = self.descriptor.digest;
        if self.options.trust == Trust::Vouched && !self.options.index_trust.admits(beside.voucher) {
            return Err(LayerError::Unvouched { layer, annotation: INDEX_DIGEST });
        }
        let limit = self.options.limits.toc_bytes;
        if beside.size > limit {
            return Err(
                self.corrupt(format!("its index has {} bytes, which is beyond the limit of {limit}", beside.size))
            );
        }
        let vouched = super::IndexTrust::Manifest.admits(beside.voucher);
        let name = self.source.name();
        let directory = self.store.directory(&layer, &beside.digest, (!vouched).then_some(&name));
        let (size, limits) = (self.descriptor.size, self.options.limits.clone());
        let known = {
            let (directory, limits, store) = (directory.clone(), limits.clone(), self.store.clone());
            let promise = promise.clone();
            self.compute(move || {
                let load = || windows::load(&directory, &beside.digest, &limits);
                let kept = load().or_else(|| {
                    let node = NodeIndexes::of(&store);
                    // The promise first: whoever finds a ztoc takes it to be there.
                    let is_lent = node.has(&beside)
                        && kept::save_promise(&directory, size, &promise).is_ok()
                        && node.lend(&beside, &directory);
                    is_lent.then(load).flatten()
                })?;
                // The very ztoc that was meant: nobody has a better one.
                Some(soci::open(&kept.ztoc, size, &limits).map(|index| (index, kept.windows)))
            })
            .await?
        };
        let (index, windows) = match known {
            Some(Ok(known)) => known,
            Some(Err(problem)) if beside.voucher == Voucher::Node => {
                let reason = format!("the index that was made of it can't be used: {problem}");
                return Err(LayerError::NotLazy { layer, reason });
            }
            Some(Err(problem)) => return Err(self.corrupt(problem.to_string())),
            None => {
                let turn = self.store.schedule().turn(Claim::new(Urgency::Demand, beside.size * COPIES)).await;
                let ztoc = match self.ztoc(&beside).await {
                    Ok(ztoc) => ztoc,
                    Err(_) if matches!(beside.voucher, Voucher::Node | Voucher::Elsewhere) => {
                        drop(turn);
                        return Box::pin(self.without_index(beside, &directory)).await;
                    }
                    Err(error) => return Err(error),
                };
                let (index, places, ztoc) = {
                    let limits = limits.clone();
                    let read = move || -> Result<(LayerIndex, WindowPlaces, Bytes), String> {
                        let index = soci::open(&ztoc, size, &limits).map_err(|error| error.to_string())?;
                        Ok((index, windows::places(&ztoc, &limits)?, ztoc))
                    };
                    self.compute(read).await?.map_err(|problem| self.corrupt(problem))?
                };
                (index, self.keep(&directory, ztoc, places, &promise, &beside).await?)
            }
        };
        let has_frames = index.frames().first().is_some_and(|frame| frame.codec == Codec::Zstd);
        if has_frames && beside.voucher != Voucher::Node {
            return Err(self.corrupt("its index is of frames of zstd, which only this machine may make".to_owned()));
        }
        let opened = Opened {
            kind: Kind::Soci,
            identity: beside.digest,
            toc_digest: beside.digest,
            vouched,
            toc_range: BlobRange { start: BlobOffset(0), length: 0 },
            payload_end: BlobOffset(size),
            toc_bytes: beside.size,
            entries: index.nodes().len() as u64,
        };
        let indexed = Indexed { index, opened, promise, tail: Tail::default(), fresh: false, windows: Some(windows) };
        self.finish(indexed).await
    }

    /// Opens a layer whose index was on this machine and is lost or damaged: as if there had been none.
    async fn without_index(
        mut self,
        beside: Beside,
        directory: &std::path::Path,
    ) -> Result<Arc<LazyLayer>, LayerError> {
        let layer = self.descriptor.digest;
        NodeIndexes::of(&self.store).forget(&layer, &beside, directory);
        self.descriptor.annotations.remove(BESIDE_ANNOTATION);
        if self.descriptor.size <= self.options.plain_bytes {
            return self.open_plain().await;
        }
        let reason = "the index that this machine had of it is lost or damaged; make another one with `loris index`";
        Err(LayerError::NotLazy { layer, reason: reason.to_owned() })
    }

    /// Keeps a ztoc in the layer's directory; windows are read from there.
    async fn keep(
        &self,
        directory: &std::path::Path,
        ztoc: Bytes,
        places: WindowPlaces,
        promise: &Promise,
        beside: &Beside,
    ) -> Result<Windows, LayerError> {
        let (layer, size, limits) = (self.descriptor.digest, self.descriptor.size, self.options.limits.clone());
        let (directory, promise, beside, store) = (directory.to_owned(), promise.clone(), *beside, self.store.clone());
        let work = move || -> Result<Windows, StoreError> {
            let _room = store.room(ztoc.len() as u64)?;
            kept::save_promise(&directory, size, &promise)?;
            windows::save(&directory, &ztoc, &places)?;
            drop(ztoc);
            let kept = windows::load(&directory, &beside.digest, &limits);
            kept.map(|kept| kept.windows).ok_or(StoreError::NoTableOfContents { path: directory })
        };
        let saved = self.compute(work).await?;
        saved.map_err(|source| LayerError::Store { layer, source: Arc::new(source) })
    }

    /// Fetches a ztoc.
    async fn ztoc(&self, beside: &Beside) -> Result<Bytes, LayerError> {
        let range = BlobRange { start: BlobOffset(0), length: beside.size };
        let failed = |source| LayerError::Fetch { layer: self.descriptor.digest, range, source: Arc::new(source) };
        Counters::add(&self.counters.requests, 1);
        let ztoc = fetch_ztoc(&*self.source, beside).await.map_err(failed)?;
        Counters::add(&self.counters.fetched_bytes, ztoc.len() as u64);
        Ok(ztoc.into())
    }
}
