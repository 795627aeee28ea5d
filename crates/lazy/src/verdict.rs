//! What was found out about a whole layer, as one image sees it; and who finds it out, when.
//!
//! The finding itself is the layer's, in [`crate::shared`]; how it is made is [`crate::proof`]'s affair.

use std::{
    sync::{Arc, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use loris_format::digest::DiffId;
use tokio::{runtime::Handle, time::Instant};

use crate::{
    error::EnsureError,
    layer::{Counters, FIRST_PAUSE, LONGEST_PAUSE, LazyLayer},
    proof::{Finding, Verdict, is_another, other_diff_id, prove},
};

/// Between attempts of a proof that needs a source which is away or has something else; twice as long each time.
const PROOF_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PROOF_PAUSE: Duration = Duration::from_hours(1);
/// Attempts of a proof after which nobody waits for it any more.
const PROOF_ATTEMPTS: u32 = 4;

/// Proofs that came to nothing.
#[derive(Debug, Default)]
pub(crate) struct Proofs {
    failed: u32,
    error: Option<EnsureError>,
    not_before: Option<Instant>,
}

impl LazyLayer {
    /// Returns what was found out about the layer once it was whole, in the light of what the image claims; `None` before.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        if !self.shared.is_known() {
            return None;
        }
        self.judge(&self.shared.finding()?)
    }

    /// Returns the DiffID that the image's configuration has for the layer, where it is known.
    #[must_use]
    pub fn claimed(&self) -> Option<&DiffId> {
        self.claimed.get()
    }

    /// Says whether the layer is not served any more.
    #[must_use]
    pub fn is_condemned(&self) -> bool {
        matches!(self.verdict(), Some(Verdict::Condemned(_)))
    }

    pub(crate) fn check_verdict(&self) -> Result<(), EnsureError> {
        match self.verdict() {
            Some(Verdict::Condemned(reason)) => Err(EnsureError::Condemned { layer: self.digest, reason }),
            _ => Ok(()),
        }
    }

    /// Takes in a DiffID that the image claims. An image that claims another than is found is served nothing.
    pub fn claim_diff_id(&self, claimed: &DiffId) {
        if self.claimed.get_or_init(|| *claimed) != claimed {
            let _ = self.also_claimed.set(*claimed);
        }
    }

    /// Says what a finding means for this image; `None` where one has to look more closely.
    pub(crate) fn judge(&self, finding: &Finding) -> Option<Verdict> {
        let Verdict::Sound(found) = &finding.verdict else { return Some(finding.verdict.clone()) };
        let claims = self.claimed.get().into_iter().chain(self.also_claimed.get());
        match claims.into_iter().find(|claimed| is_another(claimed, found)) {
            Some(claimed) => finding.of_blob.then(|| Verdict::Condemned(other_diff_id(&found.0, &claimed.0))),
            None => Some(finding.verdict.clone()),
        }
    }

    /// Takes in what was found out.
    fn pronounce(&self, finding: Finding) {
        self.shared.find(finding);
        if let Some(Verdict::Condemned(reason)) = self.verdict() {
            Counters::add(&self.counters.errors, 1);
            tracing::error!(layer = %self.digest, source = %self.source.name(), %reason,
                "the layer is not what it claims to be, and is not served any more");
        }
    }

    /// Begins to find out what the layer is, where it is whole and nobody has begun.
    pub(crate) fn prove_when_whole(self: &Arc<Self>) {
        if !self.is_whole()
            || self.landing.load(Ordering::Acquire) > 0
            || self.verdict().is_some()
            || self.proofs().not_before.is_some_and(|time| Instant::now() < time)
        {
            return;
        }
        let Some(proving) = self.shared.begin_proof() else { return };
        let layer = Arc::clone(self);
        tokio::spawn(async move {
            let place = layer.schedule.prover().await;
            let (proven, runtime) = (Arc::clone(&layer), Handle::current());
            let work = move || {
                let proof = prove(&proven, &runtime);
                drop(place);
                proof
            };
            let proof = tokio::task::spawn_blocking(work).await;
            match proof.unwrap_or(Err(EnsureError::Interrupted { layer: layer.digest })) {
                Ok(finding) => layer.pronounce(finding),
                // Found damaged, and forgotten: it will be whole another time.
                Err(EnsureError::Mismatch { .. }) => {}
                Err(error) => layer.put_off_proof(error),
            }
            drop(proving);
        });
    }

    /// Tries again later to prove the layer, for as long as somebody has it open. Whoever else has it open need not wait:
    /// his source may be a better one.
    fn put_off_proof(self: &Arc<Self>, error: EnsureError) {
        tracing::debug!(%error, "a layer can't be proven at the moment");
        let pause = {
            let mut proofs = self.proofs();
            let pause = PROOF_PAUSE.saturating_mul(1 << proofs.failed.min(16)).min(LONGEST_PROOF_PAUSE);
            proofs.failed = proofs.failed.saturating_add(1);
            proofs.error = Some(error);
            proofs.not_before = Some(Instant::now() + pause);
            pause
        };
        let layer = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            if let Some(layer) = layer.upgrade() {
                layer.prove_when_whole();
            }
        });
    }

    fn proofs(&self) -> MutexGuard<'_, Proofs> {
        // Fields that are set one after the other, none of which says much of another.
        self.proofs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until everything is there and nothing was found wrong with it, which may be never. What other processes fill
    /// counts only once this one has heard of it.
    ///
    /// # Panics
    /// As [`LazyLayer::ensure`].
    pub async fn completed(self: &Arc<Self>) {
        loop {
            self.cache.completed().await;
            match self.proven().await {
                Ok(Some(Verdict::Condemned(_))) => std::future::pending().await,
                Ok(Some(_)) => return,
                // It was damaged, and is not whole any more.
                Ok(None) => tokio::time::sleep(FIRST_PAUSE).await,
                Err(_) => tokio::time::sleep(LONGEST_PAUSE).await,
            }
        }
    }

    /// Waits for what is found out about a layer that is whole; `None` where it is not.
    ///
    /// # Errors
    /// Why it can't be found out, after some attempts. There will be more.
    pub(crate) async fn proven(self: &Arc<Self>) -> Result<Option<Verdict>, EnsureError> {
        let mut findings = self.shared.findings();
        loop {
            findings.mark_unchanged();
            if let Some(verdict) = self.verdict() {
                return Ok(Some(verdict));
            }
            if !self.is_whole() {
                return Ok(None);
            }
            self.prove_when_whole();
            let error = {
                let proofs = self.proofs();
                proofs.error.clone().filter(|_| proofs.failed >= PROOF_ATTEMPTS)
            };
            if let Some(error) = error {
                return Err(error);
            }
            let _ = tokio::time::timeout(FIRST_PAUSE, findings.changed()).await;
        }
    }
}
