//! SOCI's index manifests: where they are found, and what they say.

use std::{collections::BTreeMap, sync::Arc};

use futures_util::TryStreamExt as _;
use loris_format::{
    digest::Digest,
    limits::Limits,
    opening::{Beside, Voucher},
    position::{BlobOffset, BlobRange},
    soci::{
        manifest::{CONFIG_TYPE_V1, CONFIG_TYPE_V2, INDEX_DIGEST, LAYER_DIGEST, PREFETCH_TYPE, ZTOC_TYPE},
        prefetch::{PrefetchDocument, PrefetchSpans},
    },
};
use loris_oci::{Descriptor, Document, Error, ImageSource, document::Manifest};

use super::{IndexTrust, NodeIndexes, is_open};
use crate::{error::LayerError, open::OpenOptions, store::Store};

/// Finds the ztocs of an image's layers: in the index that the manifest names, else in a referrer of it.
pub(super) async fn find(
    source: &dyn ImageSource,
    image: &Manifest,
    digest: &Digest,
    options: &OpenOptions,
) -> Result<BTreeMap<Digest, Beside>, Error> {
    if let Some(named) = image.annotations.get(INDEX_DIGEST) {
        let named = named.parse().map_err(|error| Error::Invalid {
            what: format!("annotation {INDEX_DIGEST} of {digest}"),
            detail: format!("{error}"),
        })?;
        let document = source.manifest_named(&named).await?;
        let index = index_manifest(&document, &options.limits)?;
        return Ok(ztocs(&index, Voucher::Manifest));
    }
    if options.index_trust < IndexTrust::Repository {
        return Ok(BTreeMap::new());
    }
    referred(source, digest, Voucher::Repository, options).await
}

async fn referred(
    source: &dyn ImageSource,
    digest: &Digest,
    voucher: Voucher,
    options: &OpenOptions,
) -> Result<BTreeMap<Digest, Beside>, Error> {
    let referrers = source.referrers(digest, Some(CONFIG_TYPE_V1)).await?;
    // As the snapshotter of SOCI does, the first one counts.
    let Some(first) = referrers.first() else { return Ok(BTreeMap::new()) };
    let document = source.document(first).await?;
    let index = index_manifest(&document, &options.limits)?;
    Ok(ztocs(&index, voucher))
}

/// Fetches ztocs of an image's layers from a repository of indexes, those that this machine does not have, and keeps them.
///
/// # Errors
/// Where the repository fails, or the store.
pub async fn fetch_from(
    indexes: &dyn ImageSource,
    image: &Manifest,
    digest: &Digest,
    store: &Store,
    options: &OpenOptions,
) -> Result<(), LayerError> {
    let node = NodeIndexes::of(store);
    let is_missing = |layer: &&Descriptor| is_open(layer) && node.find(layer, IndexTrust::Any).is_none();
    let missing: Vec<&Descriptor> = image.layers.iter().filter(is_missing).collect();
    let Some(first) = missing.first() else { return Ok(()) };
    let failed = |layer: Digest, length| {
        let range = BlobRange { start: BlobOffset(0), length };
        move |source| LayerError::Fetch { layer, range, source: Arc::new(source) }
    };
    let found = referred(indexes, digest, Voucher::Elsewhere, options).await.map_err(failed(first.digest, 0))?;
    for layer in missing {
        let Some(beside) = found.get(&layer.digest) else { continue };
        if beside.size > options.limits.toc_bytes {
            continue;
        }
        let ztoc = fetch_ztoc(indexes, beside).await.map_err(failed(layer.digest, beside.size))?;
        let kept = node.keep(&layer.digest, &ztoc, Voucher::Elsewhere);
        kept.map_err(|source| LayerError::Store { layer: layer.digest, source: Arc::new(source) })?;
    }
    Ok(())
}

/// Fetches a ztoc, verified as it passes.
pub(super) async fn fetch_ztoc(source: &dyn ImageSource, beside: &Beside) -> Result<Vec<u8>, Error> {
    let descriptor = Descriptor::new(ZTOC_TYPE, beside.digest, beside.size);
    let stream = source.blob(&descriptor).await?;
    let ztoc = stream.try_fold(Vec::new(), |mut all, piece| async move {
        all.extend_from_slice(&piece);
        Ok(all)
    });
    ztoc.await
}

/// Reads an index manifest.
///
/// # Errors
/// Where the document is something else.
pub fn index_manifest(document: &Document, limits: &Limits) -> Result<Manifest, Error> {
    let manifest = document.manifest(limits)?;
    if [CONFIG_TYPE_V1, CONFIG_TYPE_V2].contains(&manifest.config.media_type.as_str()) {
        return Ok(manifest);
    }
    let detail = format!("its configuration is of type {:?}, not of a SOCI index", manifest.config.media_type);
    Err(Error::Invalid { what: format!("manifest {}", document.digest), detail })
}

fn ztocs(index: &Manifest, voucher: Voucher) -> BTreeMap<Digest, Beside> {
    let mut found = BTreeMap::new();
    for ztoc in index.layers.iter().filter(|entry| entry.media_type != PREFETCH_TYPE) {
        let Some(layer) = layer_of(ztoc) else { continue };
        let Descriptor { digest, size, .. } = *ztoc;
        found.entry(layer).or_insert(Beside { digest, size, voucher });
    }
    found
}

fn layer_of(entry: &Descriptor) -> Option<Digest> {
    entry.annotations.get(LAYER_DIGEST)?.parse().ok()
}

/// Reads a document of spans that are wanted first.
///
/// # Errors
/// A sentence.
pub fn prefetched(json: &[u8]) -> Result<Vec<PrefetchSpans>, String> {
    let document: PrefetchDocument = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    document.spans().map_err(|error| error.to_string())
}
