//! Indexes that stand beside layers, which are as they always were: found, believed as far as is wished, opened.
//!
//! Where one may be: made by this machine and kept in the store ([`NodeIndexes`]); named by the image's manifest (SOCI, version 2); a
//! referrer of that manifest (version 1), in the image's repository or in another one. What was found becomes an annotation
//! of the layer's descriptor ([`BESIDE_ANNOTATION`]), so that whoever opens or keeps a layer needs nothing but that.
//!
//! An index says which bytes of the layer are which file, and what they hash to. Whoever can pass off another one can make
//! files of an image change places, lose bits of their mode, or vanish, until the layer is complete and its DiffID is known.

mod node;
mod open;
mod soci;

use std::collections::BTreeMap;

use loris_format::{
    digest::Digest,
    opening::{BESIDE_ANNOTATION, Beside, Promise, Voucher},
};
use loris_oci::{Descriptor, ImageSource, document::Manifest};

pub use node::NodeIndexes;
pub(crate) use node::{folders, make_room};
pub use soci::{fetch_from, index_manifest, prefetched};

use crate::{open::OpenOptions, store::Store};

/// Whose word counts for an index beside a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum IndexTrust {
    /// The manifest's, and this machine's own.
    #[default]
    Manifest,
    /// Also that of whoever may write to the image's repository.
    Repository,
    /// Anybody's.
    Any,
}

impl IndexTrust {
    /// Says whether an index with such a voucher is used.
    #[must_use]
    pub fn admits(self, voucher: Voucher) -> bool {
        match voucher {
            Voucher::Node | Voucher::Manifest => true,
            Voucher::Repository => self >= Self::Repository,
            Voucher::Elsewhere => self >= Self::Any,
        }
    }
}

/// Returns a view of an image's manifest, whose digest is given, in which layers without an index of their own have an
/// annotation for the one beside them, as far as there is one that counts. Asks the source only where there are such
/// layers; what can't be had is as if it were not there.
pub async fn with_indexes(
    source: &dyn ImageSource,
    mut manifest: Manifest,
    digest: &Digest,
    store: &Store,
    options: &OpenOptions,
) -> Manifest {
    if !manifest.layers.iter().any(is_open) {
        return manifest;
    }
    let node = NodeIndexes::of(store);
    annotate(&mut manifest, |layer| node.find(layer, IndexTrust::Manifest));
    if !manifest.layers.iter().any(is_open) {
        return manifest;
    }
    let found = match soci::find(source, &manifest, digest, options).await {
        Ok(found) => {
            if !found.is_empty() {
                node.remember(digest, &found);
            }
            found
        }
        Err(error) => {
            tracing::debug!(%error, "no index beside the image can be had; what was found the last time counts");
            node.remembered(digest)
        }
    };
    with_found(manifest, &found, &node, options)
}

/// Does the same with what is in the store, and asks nobody.
#[must_use]
pub fn with_known_indexes(mut manifest: Manifest, digest: &Digest, store: &Store, options: &OpenOptions) -> Manifest {
    let node = NodeIndexes::of(store);
    annotate(&mut manifest, |layer| node.find(layer, IndexTrust::Manifest));
    let found = node.remembered(digest);
    with_found(manifest, &found, &node, options)
}

/// Takes what was found beside the image, as far as it counts, and then what this machine has from elsewhere: whose word is
/// better comes first.
fn with_found(
    mut manifest: Manifest,
    found: &BTreeMap<Digest, Beside>,
    node: &NodeIndexes,
    options: &OpenOptions,
) -> Manifest {
    let admitted = |beside: &Beside| options.index_trust.admits(beside.voucher);
    annotate(&mut manifest, |layer| found.get(&layer.digest).copied().filter(admitted));
    annotate(&mut manifest, |layer| node.find(layer, options.index_trust));
    manifest
}

fn annotate(manifest: &mut Manifest, find: impl Fn(&Descriptor) -> Option<Beside>) {
    for layer in manifest.layers.iter_mut().filter(|layer| is_open(layer)) {
        if let Some(beside) = find(layer) {
            layer.annotations.insert(BESIDE_ANNOTATION.to_owned(), beside.to_string());
        }
    }
}

/// Says whether nothing is promised of a layer.
fn is_open(layer: &Descriptor) -> bool {
    Promise::read(&layer.annotations).is_ok_and(|promise| promise.identity().is_none())
}
