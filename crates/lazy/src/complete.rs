//! Reading ahead of anyone who asks.
//!
//! Both functions go through the same flights as everyone else, and take only a part of the requests of all layers
//! together, so that a read on demand finds a place beside them. Nothing waits for them: spawn them, and let reads overtake.

use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use loris_format::index::{FrameId, Prefetch};

use crate::{
    error::EnsureError,
    layer::LazyLayer,
    plan::{FetchPolicy, fetched_range},
};

/// Requests that one layer's prefetch or completion has under way.
const WINDOWS: usize = 3;
/// Compressed bytes of one request. Large enough that a round trip is small beside it, and small enough that a request
/// that fails costs little.
const WINDOW_BYTES: u64 = 2 << 20;

/// Fills what the writer of the layer marked as worth fetching first (eStargz's landmark), in the order of the blob.
/// Does nothing for a layer without such a mark.
///
/// # Errors
/// The first that occurred, after everything else was tried.
pub async fn prefetch(layer: &Arc<LazyLayer>) -> Result<(), EnsureError> {
    match layer.index().prefetch() {
        Prefetch::Unspecified | Prefetch::Nothing => Ok(()),
        Prefetch::Until(end) => {
            let count = layer.index().frames().partition_point(|frame| frame.range.start < end);
            fill_first(layer, count).await
        }
    }
}

/// Fills all of a layer, in the order of the blob, and makes it durable: the source is not needed any more.
///
/// # Errors
/// The first that occurred, after everything else was tried.
pub async fn complete(layer: &Arc<LazyLayer>) -> Result<(), EnsureError> {
    fill_first(layer, layer.index().frames().len()).await?;
    layer.sync().await
}

/// Fills the first `count` frames.
async fn fill_first(layer: &Arc<LazyLayer>, count: usize) -> Result<(), EnsureError> {
    let policy = FetchPolicy { gap_bytes: WINDOW_BYTES / 8, max_request_bytes: WINDOW_BYTES, read_ahead_bytes: 0 };
    layer.refresh()?;
    let missing = (0..).map(FrameId).take(count).filter(|&frame| !layer.has_frame(frame)).collect::<Vec<_>>();
    // Owned, so that this can be spawned.
    let windows = missing.chunk_by(|&a, &b| window(layer, a) == window(layer, b)).map(<[FrameId]>::to_vec);
    stream::iter(windows.collect::<Vec<_>>())
        .map(|window| {
            let layer = Arc::clone(layer);
            async move {
                let _turn = layer.gates.background().await;
                layer.fill(&window, &policy).await
            }
        })
        .buffered(WINDOWS)
        // Where there is no room for one window, there is none for the next.
        .map(|filled| if filled.as_ref().is_err_and(EnsureError::is_no_space) { Err(filled) } else { Ok(filled) })
        .try_fold(Ok(()), |first, next| std::future::ready(Ok(Result::and(first, next))))
        .await
        .unwrap_or_else(|no_room| no_room)
}

fn window(layer: &LazyLayer, frame: FrameId) -> u64 {
    fetched_range(&layer.index().frames()[frame.0 as usize]).end().0 / WINDOW_BYTES
}
