//! What all [`LazyLayer`]s of one layer have in common in this process: its index, the frames that are on their way, and
//! what was found out about it. Images with a layer in common fetch each frame once and prove the layer once, and none of
//! them is served what another one's proof condemned.
//!
//! Knows nothing of images: what one claims about a layer is its own [`LazyLayer`]'s.
//!
//! [`LazyLayer`]: crate::LazyLayer

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use loris_format::index::{FrameId, LayerIndex};
use tokio::sync::watch;

use crate::{fetch::Flight, proof::Finding};

/// A frame on its way, and the number of the [`LazyLayer`] whose source brings it.
///
/// [`LazyLayer`]: crate::LazyLayer
#[derive(Debug)]
pub(crate) struct Flying {
    pub(crate) flight: Flight,
    pub(crate) by: usize,
}

/// What is one for a layer, however many images have it.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) index: Arc<LayerIndex>,
    pub(crate) flights: Mutex<HashMap<FrameId, Flying>>,
    /// Requests that are being decoded: what the proof needs is written after what readers wait for.
    pub(crate) landing: Arc<AtomicUsize>,
    proving: AtomicBool,
    /// Whether there is a finding: looked at by each read.
    is_known: AtomicBool,
    finding: watch::Sender<Option<Finding>>,
    /// How many [`LazyLayer`]s there have been.
    ///
    /// [`LazyLayer`]: crate::LazyLayer
    users: AtomicUsize,
}

impl Shared {
    fn new(index: Arc<LayerIndex>) -> Self {
        Self {
            index,
            flights: Mutex::default(),
            landing: Arc::default(),
            proving: AtomicBool::new(false),
            is_known: AtomicBool::new(false),
            finding: watch::Sender::new(None),
            users: AtomicUsize::new(0),
        }
    }

    /// Returns a number that no other user of the layer has.
    pub(crate) fn number(&self) -> usize {
        self.users.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn is_known(&self) -> bool {
        self.is_known.load(Ordering::Acquire)
    }

    pub(crate) fn finding(&self) -> Option<Finding> {
        self.finding.borrow().clone()
    }

    /// Returns the end that hears of what is found out.
    pub(crate) fn findings(&self) -> watch::Receiver<Option<Finding>> {
        self.finding.subscribe()
    }

    /// Takes in what was found out. What is more certain stays.
    pub(crate) fn find(&self, finding: Finding) {
        self.finding.send_if_modified(|known| {
            let is_more = |known: &Finding| *known != finding && known.certainty() <= finding.certainty();
            let is_news = known.as_ref().is_none_or(is_more);
            if is_news {
                *known = Some(finding);
            }
            is_news
        });
        self.is_known.store(true, Ordering::Release);
    }

    /// Takes over what another process has found out, or this one at another time.
    pub(crate) fn hear(&self, directory: &Path) {
        if let Some(finding) = Finding::load(directory) {
            self.find(finding);
        }
    }

    /// Says that somebody begins to prove the layer; `None` where somebody is at it.
    pub(crate) fn begin_proof(self: &Arc<Self>) -> Option<Proving> {
        let is_free = !self.proving.swap(true, Ordering::AcqRel);
        is_free.then(|| Proving(Arc::clone(self)))
    }
}

/// A proof that is being made.
pub(crate) struct Proving(Arc<Shared>);

impl Drop for Proving {
    fn drop(&mut self) {
        self.0.proving.store(false, Ordering::Release);
    }
}

/// All that is shared of the layer in one directory. More than one only where somebody lies about the blob's size, so that
/// the same table of contents says something else.
#[derive(Debug, Default)]
pub(crate) struct AllShared(Mutex<Vec<Weak<Shared>>>);

impl AllShared {
    /// Returns what is shared of a layer that has this index, with what was found out about it.
    pub(crate) fn get(&self, index: LayerIndex, directory: &Path) -> Arc<Shared> {
        let shared = {
            let mut all = self.lock();
            let known = all.iter().filter_map(Weak::upgrade).find(|shared| *shared.index == index);
            known.unwrap_or_else(|| {
                let shared = Arc::new(Shared::new(Arc::new(index)));
                all.push(Arc::downgrade(&shared));
                shared
            })
        };
        shared.hear(directory);
        shared
    }

    /// Returns those that are in use.
    pub(crate) fn all(&self) -> Vec<Arc<Shared>> {
        let mut all = self.lock();
        all.retain(|shared| shared.strong_count() > 0);
        all.iter().filter_map(Weak::upgrade).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Weak<Shared>>> {
        // Each change is complete before the lock is given up.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
