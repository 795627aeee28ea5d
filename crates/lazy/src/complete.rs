//! Reading ahead of anyone who asks: what the start needs, and then everything.
//!
//! Both go through the same flights as everyone else, behind them in the schedule. Nothing waits for
//! them: spawn them, and let reads overtake.
//!
//! Completion measures itself against an imaginary pull that began when it did and has the link for itself. While it is
//! less than an eighth behind that, it leaves the link to reads on demand, so that it costs a start nothing; then it goes on
//! beside them at full speed, so that everything is here not much later than a pull would have it. Readers who keep the
//! link busy themselves are left alone until it is a third behind: what they bring belongs to the layers too, and the
//! little that they leave of the link would be gained at the cost of their waiting.

use std::{num::NonZeroU64, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use loris_format::{
    index::{FrameId, Prefetch},
    position::DataRange,
};
use tokio::time::Instant;

use crate::{
    error::EnsureError,
    layer::LazyLayer,
    plan::{fetched_range, small_window_bytes, window, window_bytes, windows},
    proof::Verdict,
    schedule::{Claim, Urgency},
};

/// How far completion may fall behind an imaginary pull, as a part of all that was missing: 1 / `LAG`.
const LAG: u64 = 8;
/// The same beside readers who keep the link busy.
const BUSY_LAG: u64 = 3;
/// Who uses so many hundredths of a link keeps it busy.
const BUSY_PERCENT: u64 = 40;
/// How long the link is looked at for that, at least: a program computes for a while between its reads.
const LOOK: Duration = Duration::from_secs(1);
/// How long it keeps away from readers where nothing is known of the link.
const UNKNOWN_LAG: Duration = Duration::from_secs(2);
/// Between attempts at what failed for a reason that passes.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How layers are completed.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// Whether it waits until nobody reads on demand, however long that takes, rather than keep up with a pull.
    pub only_idle: bool,
    /// Most compressed bytes in a second, on the average.
    pub bytes_per_second: Option<NonZeroU64>,
    /// How long it goes on trying while the source is away, which has tried again itself.
    pub patience: Duration,
}

impl Default for Completion {
    fn default() -> Self {
        Self { only_idle: false, bytes_per_second: None, patience: Duration::ZERO }
    }
}

/// Fills what the writers of layers marked as worth fetching first (eStargz's landmark), in the order of the blobs, all
/// layers together. Does nothing for layers without such a mark.
///
/// # Errors
/// The first that occurred, after everything else was tried.
pub async fn prefetch(layers: &[Arc<LazyLayer>]) -> Result<(), EnsureError> {
    let marked = layers.iter().filter_map(|layer| match layer.index().prefetch() {
        Prefetch::Unspecified | Prefetch::Nothing => None,
        Prefetch::Until(end) => {
            Some((Arc::clone(layer), layer.index().frames().partition_point(|frame| frame.range.start < end)))
        }
    });
    Sweep { parts: marked.collect(), urgency: Urgency::Prefetch, options: Completion::default() }.run().await
}

/// Fills all of a layer and makes it durable: the source is not needed any more.
///
/// # Errors
/// As [`complete_all`].
pub async fn complete(layer: &Arc<LazyLayer>) -> Result<(), EnsureError> {
    complete_all(std::slice::from_ref(layer), &Completion::default()).await
}

/// Fills all of some layers, in the order of the blobs, all layers together, makes them durable, and waits for what is
/// found out about them then: the source is not needed any more.
///
/// # Errors
/// The first that occurred, after everything else was tried, for as long as [`Completion::patience`] where it may pass.
pub async fn complete_all(layers: &[Arc<LazyLayer>], options: &Completion) -> Result<(), EnsureError> {
    let parts = layers.iter().map(|layer| (Arc::clone(layer), layer.index().frames().len())).collect();
    let filled = Sweep { parts, urgency: Urgency::Completion, options: *options }.run().await;
    for layer in layers {
        layer.sync().await?;
    }
    filled?;
    for layer in layers {
        if let Some(Verdict::Condemned(reason)) = layer.proven().await? {
            return Err(EnsureError::Condemned { layer: *layer.digest(), reason });
        }
    }
    Ok(())
}

/// Fills ranges of layers in the order of the list, a few requests at once: what a workload is known to read first.
///
/// # Errors
/// The first that occurred, after everything else was tried.
pub async fn prefetch_in_order(wanted: &[(Arc<LazyLayer>, DataRange)]) -> Result<(), EnsureError> {
    let mut under_way = UnderWay::new();
    let mut rest = wanted;
    while let Some((first, _)) = rest.first() {
        // What is wanted at about the same time is fetched in the order of the blob, with as few requests as will do.
        let budget = window_bytes(first.link());
        let mut batch: Vec<(&Arc<LazyLayer>, Vec<FrameId>)> = Vec::new();
        let mut bytes = 0_u64;
        while let Some(((layer, range), behind)) = rest.split_first().filter(|_| bytes < budget) {
            rest = behind;
            let missing = layer.missing_frames(layer.index().extents_in(range));
            for frame in &missing {
                bytes = bytes.saturating_add(fetched_range(&layer.index().frames()[frame.0 as usize]).length);
            }
            match batch.iter_mut().find(|(known, _)| Arc::ptr_eq(known, layer)) {
                Some((_, frames)) => frames.extend(missing),
                None => batch.push((layer, missing)),
            }
        }
        for (layer, mut frames) in batch {
            frames.sort_unstable();
            frames.dedup();
            for window in windows(layer.index().frames(), &frames, budget.saturating_mul(4)) {
                let claim = layer.claim(&window, Urgency::Prefetch);
                under_way.begin(layer, window, claim).await?;
            }
        }
    }
    under_way.all().await
}

/// Windows that were asked for.
struct UnderWay {
    windows: FuturesUnordered<BoxFuture<'static, Result<(), EnsureError>>>,
    first: Result<(), EnsureError>,
}

impl UnderWay {
    fn new() -> Self {
        Self { windows: FuturesUnordered::new(), first: Ok(()) }
    }

    /// Asks for a window when its turn comes. Fails where there is no room for those before: there is none for it either.
    async fn begin(&mut self, layer: &Arc<LazyLayer>, window: Vec<FrameId>, claim: Claim) -> Result<(), EnsureError> {
        let mut turn = std::pin::pin!(layer.schedule.turn(claim));
        // What is under way has to be polled while we wait.
        let turn = loop {
            tokio::select! {
                biased;
                Some(landed) = self.windows.next() => {
                    self.first = std::mem::replace(&mut self.first, Ok(())).and(landed);
                    if self.first.as_ref().is_err_and(EnsureError::is_no_space) {
                        return self.first.clone();
                    }
                }
                turn = &mut turn => break turn,
            }
        };
        let layer = Arc::clone(layer);
        self.windows.push(Box::pin(async move { layer.bring(&window, turn).await }));
        Ok(())
    }

    /// Waits for all; returns the first error.
    async fn all(mut self) -> Result<(), EnsureError> {
        while let Some(landed) = self.windows.next().await {
            self.first = self.first.and(landed);
        }
        self.first
    }
}

/// Some layers, each as far as its first so many frames.
struct Sweep {
    parts: Vec<(Arc<LazyLayer>, usize)>,
    urgency: Urgency,
    options: Completion,
}

impl Sweep {
    async fn run(self) -> Result<(), EnsureError> {
        let mut pause = FIRST_PAUSE;
        let mut failing_since: Option<Instant> = None;
        loop {
            let before = self.missing_bytes();
            let outcome = self.pass().await;
            match outcome {
                Err(error) if error.is_transient() => {
                    if self.missing_bytes() < before {
                        (pause, failing_since) = (FIRST_PAUSE, None);
                    }
                    let since = *failing_since.get_or_insert_with(Instant::now);
                    if since.elapsed() + pause > self.options.patience {
                        return Err(error);
                    }
                    tracing::debug!(%error, "completion pauses");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                Err(error) => return Err(error),
                Ok(()) => {}
            }
            // What was on its way for others when the pass came by may have failed.
            if outcome_is_whole(&self.parts) {
                return Ok(());
            }
        }
    }

    /// Tries everything that is missing once, and waits for what others have under way.
    async fn pass(&self) -> Result<(), EnsureError> {
        let mut under_way = UnderWay::new();
        let mut pace = Pace::begin(self);
        for (layer, count) in &self.parts {
            layer.refresh()?;
            let missing = missing_frames(layer, *count);
            let mut rest = &missing[..];
            while !rest.is_empty() {
                pace.keep_to(self.options.bytes_per_second).await;
                let window = self.window(layer, &mut rest);
                let quiet_until = if self.options.only_idle { None } else { pace.quiet_until(layer, self) };
                let claim = Claim { quiet_until, ..layer.claim(&window, self.urgency) };
                pace.asked(layer, &window);
                under_way.begin(layer, window, claim).await?;
            }
        }
        let mut first = under_way.all().await;
        for (layer, count) in &self.parts {
            first = Result::and(first, layer.landed(*count).await);
        }
        first
    }

    /// Takes the frames of the next request, as the link and its readers are now.
    fn window(&self, layer: &LazyLayer, rest: &mut &[FrameId]) -> Vec<FrameId> {
        let is_shy = self.urgency == Urgency::Completion && layer.schedule.is_demanded();
        let bytes = if is_shy { small_window_bytes(layer.link()) } else { window_bytes(layer.link()) };
        let (next, behind) = rest.split_at(window(layer.index().frames(), rest, bytes));
        *rest = behind;
        next.to_vec()
    }

    fn missing_bytes(&self) -> u64 {
        self.parts.iter().map(|(layer, count)| missing_bytes(layer, *count)).fold(0, u64::saturating_add)
    }
}

fn outcome_is_whole(parts: &[(Arc<LazyLayer>, usize)]) -> bool {
    parts.iter().all(|(layer, count)| (0..).map(FrameId).take(*count).all(|frame| layer.has_frame(frame)))
}

fn missing_frames(layer: &LazyLayer, count: usize) -> Vec<FrameId> {
    (0..).map(FrameId).take(count).filter(|&frame| !layer.has_frame(frame)).collect()
}

fn missing_bytes(layer: &LazyLayer, count: usize) -> u64 {
    let missing = missing_frames(layer, count).into_iter();
    missing.map(|frame| fetched_range(&layer.index().frames()[frame.0 as usize]).length).fold(0, u64::saturating_add)
}

/// How completion stands against the imaginary pull, and against its bound.
struct Pace {
    began: Instant,
    /// Compressed bytes that were missing at the beginning.
    missing: u64,
    /// What the layers had fetched by then, for whomever.
    fetched: u64,
    /// What completion has asked for.
    asked: u64,
    /// When the link was last looked at, and what readers had fetched by then.
    looked: (Instant, u64),
    is_link_busy: bool,
}

impl Pace {
    fn begin(sweep: &Sweep) -> Self {
        let began = Instant::now();
        Self {
            began,
            missing: sweep.missing_bytes(),
            fetched: fetched(sweep),
            asked: 0,
            looked: (began, fetched_for_readers(sweep)),
            is_link_busy: false,
        }
    }

    /// Returns until when the imaginary pull is not so far ahead that reads on demand may not be left alone any more.
    fn quiet_until(&mut self, layer: &LazyLayer, sweep: &Sweep) -> Option<Instant> {
        let Some(link) = layer.link() else { return Some(self.began + UNKNOWN_LAG) };
        self.look(link.bytes_per_second, fetched_for_readers(sweep));
        let lag = if self.is_link_busy { BUSY_LAG } else { LAG };
        let allowed = (fetched(sweep) - self.fetched).saturating_add(self.missing / lag);
        let seconds = allowed as f64 / link.bytes_per_second.max(1) as f64;
        Some(self.began + Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX).min(Duration::from_hours(24)))
    }

    /// Finds out once in a while whether readers keep the link busy.
    fn look(&mut self, bytes_per_second: u64, for_readers: u64) {
        let (since, before) = self.looked;
        let elapsed = since.elapsed();
        if elapsed < LOOK {
            return;
        }
        let carried = u128::from(bytes_per_second) * elapsed.as_millis() / 1000;
        let used = u128::from(for_readers.saturating_sub(before));
        self.is_link_busy = used * 100 >= carried * u128::from(BUSY_PERCENT);
        self.looked = (Instant::now(), for_readers);
    }

    fn asked(&mut self, layer: &LazyLayer, window: &[FrameId]) {
        let frames = layer.index().frames();
        let bytes = window.iter().map(|frame| fetched_range(&frames[frame.0 as usize]).length);
        self.asked = bytes.fold(self.asked, u64::saturating_add);
    }

    async fn keep_to(&self, bytes_per_second: Option<NonZeroU64>) {
        let Some(rate) = bytes_per_second else { return };
        let seconds = self.asked as f64 / rate.get() as f64;
        let Ok(due) = Duration::try_from_secs_f64(seconds) else { return };
        if let Some(due) = self.began.checked_add(due) {
            tokio::time::sleep_until(due).await;
        }
    }
}

fn fetched(sweep: &Sweep) -> u64 {
    sweep.parts.iter().map(|(layer, _)| layer.statistics().fetched_bytes).fold(0, u64::saturating_add)
}

/// What came for those who read: all but what nobody asked for yet.
fn fetched_for_readers(sweep: &Sweep) -> u64 {
    let for_readers = |layer: &LazyLayer| {
        let statistics = layer.statistics();
        statistics.fetched_bytes.saturating_sub(statistics.completion_bytes)
    };
    sweep.parts.iter().map(|(layer, _)| for_readers(layer)).fold(0, u64::saturating_add)
}
