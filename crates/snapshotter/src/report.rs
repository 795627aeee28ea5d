//! What the snapshotter knows of images and containers, for `loris explain`.
//!
//! What this module must not know: how it is shown.

use std::{collections::BTreeMap, io, path::Path, sync::Arc};

use loris_lazy::LazyLayer;
use serde::{Deserialize, Serialize};

use crate::{
    handover, labels,
    metadata::{Kind, Snapshot},
};

/// All that is known.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Every snapshot, by number: parents come before children.
    pub snapshots: Vec<SnapshotReport>,
}

/// What is known of a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Its name.
    pub name: String,
    /// Its parent's.
    pub parent: Option<String>,
    /// Whether it is a container's (or a view), and no layer.
    pub is_in_use: bool,
    /// The image that the client named.
    pub image: Option<String>,
    /// The layer's digest.
    pub layer: Option<String>,
    /// Whether it is lazy.
    pub is_lazy: bool,
    /// Why it is not, where it was to be.
    pub fallback: Option<String>,
    /// Milliseconds until the manifest was here, and until the layer was opened.
    pub opening_ms: Option<(u64, u64)>,
    /// What happened to the lazy layer since it was opened by this process.
    pub activity: Option<LayerReport>,
}

/// What happened to a lazy layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerReport {
    /// Compressed bytes of the blob.
    pub size: u64,
    /// Extents that are here, and that there are.
    pub extents: (u64, u64),
    /// Compressed bytes that came because somebody waited, ...
    pub demand_bytes: u64,
    /// ... were marked as needed by the start, ...
    pub prefetch_bytes: u64,
    /// ... were ahead of a reader, ...
    pub read_ahead_bytes: u64,
    /// ... or came behind everything else.
    pub completion_bytes: u64,
    /// Reads that waited.
    pub waits: u64,
    /// How long, all together, in milliseconds.
    pub waited_ms: u64,
    /// Requests to the registry.
    pub requests: u64,
    /// Requests, frames and extents that failed.
    pub errors: u64,
    /// What was found out once it was whole.
    pub verdict: Option<String>,
}

impl Report {
    pub(crate) fn of(snapshots: &[Snapshot], open: impl Fn(u64) -> Option<Arc<LazyLayer>>) -> Self {
        let by_id: BTreeMap<u64, &Snapshot> = snapshots.iter().map(|snapshot| (snapshot.id, snapshot)).collect();
        Self {
            snapshots: by_id
                .into_values()
                .map(|snapshot| SnapshotReport::of(snapshot, open(snapshot.id).as_deref()))
                .collect(),
        }
    }

    /// Asks the process that serves a root directory. Blocks.
    ///
    /// # Errors
    /// Where none does.
    pub fn ask(root: &Path) -> io::Result<Self> {
        let answer = handover::ask_for_report(root)?;
        serde_json::from_slice(&answer).map_err(io::Error::other)
    }

    /// Returns the chain of a snapshot's layers, the lowest first.
    #[must_use]
    pub fn chain<'a>(&'a self, top: &'a SnapshotReport) -> Vec<&'a SnapshotReport> {
        let mut chain = vec![top];
        while let Some(parent) = chain.last().and_then(|last| last.parent.as_deref()) {
            match self.snapshots.iter().find(|snapshot| snapshot.name == parent) {
                Some(parent) if chain.len() <= self.snapshots.len() => chain.push(parent),
                _ => break,
            }
        }
        chain.reverse();
        chain
    }
}

impl SnapshotReport {
    fn of(snapshot: &Snapshot, layer: Option<&LazyLayer>) -> Self {
        let remote = snapshot.remote.as_ref();
        let (image, digest) = labels::image_and_layer(&snapshot.labels);
        Self {
            name: snapshot.name.clone(),
            parent: snapshot.parent.clone(),
            is_in_use: snapshot.kind != Kind::Committed,
            image: remote.map(|remote| remote.reference.clone()).or(image),
            layer: remote.map(|remote| remote.descriptor.digest.to_string()).or(digest),
            is_lazy: remote.is_some(),
            fallback: snapshot.fallback.clone(),
            opening_ms: remote.map(|remote| (remote.opening.manifest_ms, remote.opening.layer_ms)),
            activity: layer.map(LayerReport::of),
        }
    }
}

impl LayerReport {
    fn of(layer: &LazyLayer) -> Self {
        let statistics = layer.statistics();
        Self {
            size: layer.descriptor().size,
            extents: (statistics.extents_filled, statistics.extents_total),
            demand_bytes: statistics.demand_bytes,
            prefetch_bytes: statistics.prefetch_bytes,
            read_ahead_bytes: statistics.read_ahead_bytes,
            completion_bytes: statistics.completion_bytes,
            waits: statistics.waits,
            waited_ms: u64::try_from(statistics.waited.as_millis()).unwrap_or(u64::MAX),
            requests: statistics.requests,
            errors: statistics.errors,
            verdict: layer.verdict().map(|verdict| verdict.to_string()),
        }
    }
}
