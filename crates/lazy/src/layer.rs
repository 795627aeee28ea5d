//! A layer that is read before it is here.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use loris_format::{
    digest::{DiffId, Digest},
    index::{Extent, FrameId, LayerIndex, NodeId, NodeKind},
    limits::Limits,
    opening::Opened,
    position::{DataOffset, DataRange, FileOffset},
};
use loris_oci::{Descriptor, ImageSource, link::Link};
use tokio::runtime::Handle;

use crate::{
    cache::LayerCache,
    error::{EnsureError, ReadError, path_of},
    fetch::{Flight, Flights, Landed, Wish},
    foresight::Watcher,
    plan::{FetchPolicy, fetched_range, go_on, plan, small_window_bytes, window, window_bytes, windows, without_gap},
    proof::Verdict,
    recorded::Recorder,
    schedule::{Claim, Schedule, Turn, Urgency},
    sequence::Sequences,
    shared::{Flying, Shared},
    verdict::Proofs,
    windows::Windows,
};

/// Between attempts of [`LazyLayer::ensure_within`]. The source has waited between its own attempts already.
pub(crate) const FIRST_PAUSE: Duration = Duration::from_millis(100);
pub(crate) const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// What is guessed at stands here and there: what lies between is fetched where it is no more than this.
const GUESSED_GAP: u64 = 4 << 10;
/// Requests for that at a time, of those that wait for their turn.
const GUESSED_REQUESTS: usize = 4;
/// How often what another image was fetching is fetched by this one where that has failed.
const FOREIGN_FAILURES: usize = 2;

/// A layer: its index, where its blob is, and the local data file that holds what was needed so far.
///
/// Used behind an [`Arc`]: a fetch belongs to the layer and not to who asked for it, and lives on where that one goes
/// away. All methods may be called from any number of threads.
///
/// In memory it holds the index and two bits for each extent.
pub struct LazyLayer {
    pub(crate) digest: Digest,
    pub(crate) descriptor: Descriptor,
    pub(crate) index: Arc<LayerIndex>,
    pub(crate) opened: Opened,
    pub(crate) vouched: bool,
    pub(crate) cache: Arc<LayerCache>,
    /// Where its frames are spans of a compressed layer.
    pub(crate) windows: Option<Windows>,
    pub(crate) source: Arc<dyn ImageSource>,
    pub(crate) schedule: Arc<Schedule>,
    pub(crate) policy: FetchPolicy,
    pub(crate) limits: Limits,
    /// What it has in common with others of the same layer, and its number among them.
    pub(crate) shared: Arc<Shared>,
    pub(crate) number: usize,
    pub(crate) landing: Arc<AtomicUsize>,
    pub(crate) sequences: Mutex<Sequences>,
    /// Who takes note of what is read, and the layer's number for it.
    pub(crate) recorder: OnceLock<(usize, Arc<Recorder>)>,
    /// Who is told of what somebody waits for.
    pub(crate) watchers: Mutex<Vec<Watcher>>,
    /// The DiffID that the image's configuration has for the layer, where that was read; and another one, where the image
    /// has the layer twice.
    pub(crate) claimed: OnceLock<DiffId>,
    pub(crate) also_claimed: OnceLock<DiffId>,
    pub(crate) proofs: Mutex<Proofs>,
    pub(crate) counters: Counters,
}

/// By what right frames are fetched.
enum Admission {
    /// Somebody waits for them: they take their turns.
    Demanded,
    /// The turn of one request has come.
    Granted(Turn),
}

/// What a layer did since it was opened, and what it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerStatistics {
    /// Compressed bytes that came from the source, those of the table of contents included.
    pub fetched_bytes: u64,
    /// Requests to the source, failed ones included.
    pub requests: u64,
    /// Bytes of content that came from other layers of the store.
    pub copied_bytes: u64,
    /// Bytes that frames decoded to.
    pub decoded_bytes: u64,
    /// Extents that are in the data file, also from earlier.
    pub extents_filled: u64,
    /// Extents of the layer.
    pub extents_total: u64,
    /// Of the fetched bytes, those that came because somebody waited for them, ...
    pub demand_bytes: u64,
    /// ... those that were marked as needed by the start, or guessed to be, ...
    pub prefetch_bytes: u64,
    /// ... those ahead of a reader, ...
    pub read_ahead_bytes: u64,
    /// ... and those of completion. The rest is tables of contents, and what a proof lacked.
    pub completion_bytes: u64,
    /// Calls of [`LazyLayer::ensure`] that had to wait for a fetch.
    pub waits: u64,
    /// How long they waited, all together.
    pub waited: Duration,
    /// Fetches, frames and extents that failed.
    pub errors: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) fetched_bytes: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) copied_bytes: AtomicU64,
    pub(crate) decoded_bytes: AtomicU64,
    pub(crate) by_urgency: [AtomicU64; Urgency::COUNT],
    pub(crate) waits: AtomicU64,
    pub(crate) waited_nanos: AtomicU64,
    pub(crate) errors: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, amount: u64) {
        counter.fetch_add(amount, Ordering::Relaxed);
    }
}

impl LazyLayer {
    /// Returns what the layer holds.
    #[must_use]
    pub fn index(&self) -> &LayerIndex {
        &self.index
    }

    /// Returns the digest of the compressed blob.
    #[must_use]
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Returns the layer's descriptor in the manifest that it was opened from.
    #[must_use]
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// Returns what was learnt of the layer's table of contents.
    #[must_use]
    pub fn opened(&self) -> &Opened {
        &self.opened
    }

    /// Says whether a chain of digests leads from the manifest to every byte.
    #[must_use]
    pub fn is_vouched(&self) -> bool {
        self.vouched
    }

    /// Returns the layer's directory in the store: the data file is `data` in it. An absolute path.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.cache.directory()
    }

    /// Returns the data file: [`LayerIndex::data_length`] bytes and zeros to a multiple of 4 KiB, sparse, open for reading and writing. Only what is
    /// [filled](LazyLayer::is_filled) may be read from it.
    #[must_use]
    pub fn data_file(&self) -> &File {
        self.cache.data()
    }

    /// Returns a hash of where everything stands in the data file and what it must be: what was derived from the data
    /// file's layout fits for as long as this is the same.
    #[must_use]
    pub fn layout(&self) -> &[u8; 32] {
        self.cache.layout()
    }

    /// Says whether a range of the data file is there and may be read. Takes no lock but where something was found out about
    /// the layer. Padding between files is always there.
    #[must_use]
    pub fn is_filled(&self, range: &DataRange) -> bool {
        // In this order: what is condemned elsewhere is heard of in the first.
        self.cache.has(self.index.extents_in(range)) && !self.is_condemned()
    }

    /// Says whether every extent is there.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.cache.is_complete()
    }

    /// Says whether everything is there and nothing was found wrong with it: neither the source nor we are needed any
    /// more.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.is_whole() && matches!(self.verdict(), Some(Verdict::Sound(_) | Verdict::Unproven(_)))
    }

    /// Says whether that outlives the machine too: until then, a disk that fails may take some of it back.
    #[must_use]
    pub fn is_on_disk(&self) -> bool {
        self.is_complete() && self.is_durable()
    }

    /// Says whether all that is here is on the disk, and survives a power failure.
    #[must_use]
    pub fn is_durable(&self) -> bool {
        self.cache.filled().volatile().is_empty()
    }

    /// Fills a range of the data file: fetches what is missing, decodes and verifies it, writes it, publishes it. When it
    /// returns without an error, the range is filled and right.
    ///
    /// Frames that are on their way already are waited for, not fetched again. Dropping the future abandons the wait and
    /// not the fetch.
    ///
    /// # Errors
    /// Where an extent in the range can't be had. Others in the range may have been filled. Nothing is remembered of a
    /// failure: the next call tries again.
    ///
    /// # Panics
    /// Where it is polled outside of a Tokio runtime, which the fetch runs on.
    pub async fn ensure(self: &Arc<Self>, range: DataRange) -> Result<(), EnsureError> {
        self.check_verdict()?;
        if self.shared.is_known() {
            // Something else may have been found than this image claims.
            self.prove_when_whole();
        }
        self.touched(&range, &Handle::current());
        let extents = self.index.extents_in(&range);
        if self.cache.has(extents.clone()) {
            return self.check_verdict();
        }
        let missing = extents.clone().filter(|&extent| !self.cache.filled().contains(extent));
        // Another process may have fetched it.
        self.cache.refresh(missing).map_err(|error| self.file_error(error))?;
        self.recheck(extents.clone()).await?;
        let frames = self.missing_frames(extents.clone());
        if frames.is_empty() {
            return Ok(());
        }
        Counters::add(&self.counters.waits, 1);
        self.tell(&range);
        let began = Instant::now();
        let mut outcome = self.filled(&frames, &extents).await;
        for _ in 0..FOREIGN_FAILURES {
            if !matches!(outcome, Err((_, by)) if by != self.number) {
                break;
            }
            // Another image's source is not this one's.
            outcome = self.filled(&frames, &extents).await;
        }
        let is_wrong = |(error, _): &(EnsureError, usize)| {
            matches!(error, EnsureError::Mismatch { .. } | EnsureError::Decode { .. })
        };
        if outcome.as_ref().is_err_and(is_wrong) && self.distrust(&frames) {
            // Somebody else may have the right bytes.
            outcome = self.filled(&frames, &extents).await;
        }
        let waited = began.elapsed().as_nanos();
        Counters::add(&self.counters.waited_nanos, u64::try_from(waited).unwrap_or(u64::MAX));
        outcome.map_err(|(error, _)| error)?;
        self.check_verdict()
    }

    /// Tells the source that what it sent of some frames is wrong; says whether it can ask somebody else.
    fn distrust(&self, frames: &[FrameId]) -> bool {
        let bad = frames.iter().filter(|frame| !self.has_frame(**frame));
        bad.fold(false, |is_choice, frame| {
            let range = fetched_range(&self.index.frames()[frame.0 as usize]);
            self.source.distrust_range(&self.descriptor, range.start.0..range.end().0) || is_choice
        })
    }

    /// Waits for frames; what is refused in them is an error only in `extents`. An error comes with the number of whoever
    /// was to bring the frame.
    async fn filled(
        self: &Arc<Self>,
        frames: &[FrameId],
        extents: &std::ops::Range<usize>,
    ) -> Result<(), (EnsureError, usize)> {
        for (flight, by) in self.take_off(frames).map_err(|error| (error, self.number))? {
            let landed = self.landing(flight).await.map_err(|error| (error, by))?;
            if let Some(refusal) = landed.refused.iter().find(|refusal| extents.contains(&refusal.extent)) {
                return Err((self.refused(refusal), by));
            }
        }
        Ok(())
    }

    /// Takes note that somebody reads a range of the data file, also where it is there already: where readers go on in
    /// sequence, what lies ahead of them is fetched, on `runtime`. [`LazyLayer::ensure`] does it by itself.
    pub fn touched(self: &Arc<Self>, range: &DataRange, runtime: &Handle) {
        if let Some((number, recorder)) = self.recorder.get() {
            recorder.note(*number, self.index.extents_in(range));
        }
        if self.policy.sequential_bytes == 0 || self.is_whole() {
            return;
        }
        // Whoever finds it taken is not held up: the next read of the sequence tells as much.
        let Ok(mut sequences) = self.sequences.try_lock() else { return };
        let Some(ahead) = sequences.read(range, self.policy.sequential_bytes) else { return };
        drop(sequences);
        let frames = self.missing_frames(self.index.extents_in(&ahead));
        for window in windows(self.index.frames(), &frames, self.policy.max_request_bytes) {
            let layer = Arc::clone(self);
            runtime.spawn(async move {
                let turn = layer.schedule.turn(layer.claim(&window, Urgency::ReadAhead)).await;
                if let Err(error) = layer.bring(&window, turn).await {
                    tracing::debug!(%error, "nothing was read ahead");
                }
            });
        }
    }

    /// Tells those who guess what may be wanted next that somebody waits for the first file of a range.
    fn tell(&self, range: &DataRange) {
        let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        if !watchers.is_empty()
            && let Some(first) = self.index.extents_in(range).next()
        {
            let node = self.extent(first).node;
            watchers.retain(|watcher| watcher.tell(node));
        }
    }

    /// Has somebody told from now on of what is waited for.
    pub(crate) fn watch(&self, watcher: Watcher) {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner).push(watcher);
    }

    /// Returns how many of `frames` one request for what is guessed at asks for, as the link and its readers are now.
    fn guessed_window(&self, frames: &[FrameId]) -> usize {
        let link = self.link();
        let bytes = if self.schedule.is_demanded() { small_window_bytes(link) } else { window_bytes(link) };
        let all = self.index.frames();
        without_gap(all, &frames[..window(all, frames, bytes)], GUESSED_GAP)
    }

    /// Fills ranges of the data file ahead of anyone who asks for them.
    pub(crate) async fn prefetched(
        self: &Arc<Self>,
        ranges: &[DataRange],
        urgency: Urgency,
    ) -> Result<(), EnsureError> {
        let extents = ranges.iter().flat_map(|range| self.index.extents_in(range));
        let missing = extents.clone().filter(|&extent| !self.cache.filled().contains(extent));
        self.cache.refresh(missing).map_err(|error| self.file_error(error))?;
        let mut frames: Vec<FrameId> =
            ranges.iter().flat_map(|range| self.missing_frames(self.index.extents_in(range))).collect();
        frames.sort_unstable();
        frames.dedup();
        let mut rest = &frames[..];
        let mut under_way = FuturesUnordered::new();
        loop {
            while !rest.is_empty() && under_way.len() < GUESSED_REQUESTS {
                let (window, behind) = rest.split_at(self.guessed_window(rest));
                rest = behind;
                under_way.push(async {
                    let turn = self.schedule.turn(self.claim(window, urgency)).await;
                    self.bring(window, turn).await
                });
            }
            match under_way.next().await {
                Some(outcome) => outcome?,
                None => break,
            }
        }
        drop(under_way);
        // Those that were on their way for others.
        let flights: Vec<Flight> = {
            let flights = self.flights();
            frames.iter().filter_map(|frame| flights.get(frame)).map(|flying| flying.flight.clone()).collect()
        };
        for flight in flights {
            self.landing(flight).await?;
        }
        Ok(())
    }

    /// Does what [`LazyLayer::ensure`] does, and tries again for as long as `patience` where the error is one that passes
    /// (a registry that is away). The last attempt may be under way when `patience` ends, and is abandoned then.
    ///
    /// # Errors
    /// The last error; [`EnsureError::Interrupted`] where not even the first attempt came to an end.
    pub async fn ensure_within(self: &Arc<Self>, range: DataRange, patience: Duration) -> Result<(), EnsureError> {
        let mut last = EnsureError::Interrupted { layer: self.digest };
        let trying = async {
            let mut pause = FIRST_PAUSE;
            loop {
                match self.ensure(range.clone()).await {
                    Err(error) if error.is_transient() => last = error,
                    outcome => return outcome,
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        };
        match tokio::time::timeout(patience, trying).await {
            Ok(outcome) => outcome,
            Err(_) => Err(last),
        }
    }

    /// Checks that the data file is as long as it should be. Where someone has cut it, what is gone is forgotten, to be
    /// fetched again when it is needed, and the file is made as long again.
    ///
    /// # Errors
    /// Where the file can't be looked at or repaired.
    pub fn check_length(&self) -> Result<(), EnsureError> {
        self.cache.check_length(&self.index).map_err(|error| self.file_error(error))
    }

    /// Fills the data file through another descriptor of it from now on: one for whose writes nobody is asked, where a
    /// pager watches the file. Only the first one that is offered is taken.
    ///
    /// # Errors
    /// Where it is another file.
    pub fn fill_through(&self, data: File) -> io::Result<()> {
        self.cache.fill_through(data)
    }

    /// Says whether another process had the layer open when this one opened it. It may have its data file watched, and be
    /// asked before each write to it unless that is [done otherwise](LazyLayer::fill_through).
    #[must_use]
    pub fn is_open_elsewhere(&self) -> bool {
        self.cache.is_beside()
    }

    /// Returns the files that hold the layer's place in the store while its process is away: the data file, and the lock
    /// that keeps others from making it anew. Whoever keeps both open may hand the former back with [`Store::adopt`].
    ///
    /// [`Store::adopt`]: crate::Store::adopt
    #[must_use]
    pub fn kept_files(&self) -> [&File; 2] {
        [self.cache.data(), self.cache.lock()]
    }

    /// Reads from the data file, and returns the number of bytes, which is less than asked for only where the file ends.
    /// Blocks for the disk. The range must have been [ensured](LazyLayer::ensure): elsewhere there are zeros.
    ///
    /// # Errors
    /// As `pread(2)`.
    pub fn read_filled(&self, at: DataOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let mut length = 0;
        while length < buffer.len() {
            match self.data_file().read_at(&mut buffer[length..], at.0.saturating_add(length as u64)) {
                Ok(0) => break,
                Ok(count) => length += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(length)
    }

    /// Reads from a regular file of the layer, filling what is missing, and returns the number of bytes: as many as the
    /// buffer takes, less only at the file's end.
    ///
    /// # Errors
    /// Where the node is no regular file, or its bytes can't be had.
    ///
    /// # Panics
    /// Where `node` is not of this layer's index; where it is polled outside of a Tokio runtime.
    pub async fn read(self: &Arc<Self>, node: NodeId, at: FileOffset, buffer: &mut [u8]) -> Result<usize, ReadError> {
        let NodeKind::Regular(content) = &self.index.node(node).kind else {
            return Err(ReadError::NotRegular { layer: self.digest, path: path_of(&self.index, node) });
        };
        let rest = content.size.saturating_sub(at.0);
        let length = usize::try_from(rest).map_or(buffer.len(), |rest| rest.min(buffer.len()));
        if length == 0 {
            return Ok(0);
        }
        // The builder of the index has checked that the file's place in the data file ends below 2^64.
        let start = DataOffset(content.data.0 + at.0);
        let range = start..DataOffset(start.0 + length as u64);
        // More often than once only where the data file is cut or its disk fails behind our back.
        for _ in 0..3 {
            self.ensure(range.clone()).await?;
            let count = self.read_filled(start, &mut buffer[..length]).map_err(|error| self.file_error(error))?;
            if count < length {
                self.cache.check_length(&self.index).map_err(|error| self.file_error(error))?;
            } else if self.is_filled(&range) {
                return Ok(length);
            }
        }
        let path = path_of(&self.index, node);
        Err(ReadError::Unstable { layer: self.digest, path, store: self.directory().to_owned() })
    }

    /// Makes everything that was filled so far survive a power failure. Until then it survives the end of the process and
    /// not that of the machine. Long-lived users call it when they unmount.
    ///
    /// # Errors
    /// Where the disk fails; what was not on it is fetched again when it is needed.
    pub async fn sync(self: &Arc<Self>) -> Result<(), EnsureError> {
        let layer = Arc::clone(self);
        match tokio::task::spawn_blocking(move || layer.cache.sync()).await {
            Ok(result) => result.map_err(|error| self.file_error(error)),
            Err(_) => Err(EnsureError::Interrupted { layer: self.digest }),
        }
    }

    /// Returns what the layer did since it was opened, and what it has.
    #[must_use]
    pub fn statistics(&self) -> LayerStatistics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LayerStatistics {
            fetched_bytes: get(&self.counters.fetched_bytes),
            requests: get(&self.counters.requests),
            copied_bytes: get(&self.counters.copied_bytes),
            decoded_bytes: get(&self.counters.decoded_bytes),
            extents_filled: self.cache.filled().count() as u64,
            extents_total: self.index.extents().len() as u64,
            demand_bytes: get(&self.counters.by_urgency[Urgency::Demand as usize]),
            prefetch_bytes: [Urgency::Prefetch, Urgency::Guess]
                .map(|urgency| get(&self.counters.by_urgency[urgency as usize]))
                .iter()
                .sum(),
            read_ahead_bytes: get(&self.counters.by_urgency[Urgency::ReadAhead as usize]),
            completion_bytes: get(&self.counters.by_urgency[Urgency::Completion as usize]),
            waits: get(&self.counters.waits),
            waited: Duration::from_nanos(get(&self.counters.waited_nanos)),
            errors: get(&self.counters.errors),
        }
    }

    /// Takes over what other processes have filled meanwhile.
    pub(crate) fn refresh(&self) -> Result<(), EnsureError> {
        self.cache.refresh(0..self.index.extents().len()).map_err(|error| self.file_error(error))
    }

    /// Returns the frames that hold what is missing of `extents`, sorted.
    pub(crate) fn missing_frames(&self, extents: std::ops::Range<usize>) -> Vec<FrameId> {
        let missing = extents.filter(|&extent| !self.cache.filled().contains(extent));
        let mut frames: Vec<FrameId> = missing.map(|extent| self.extent(extent).frame).collect();
        frames.sort_unstable();
        frames.dedup();
        frames
    }

    /// Says whether nothing is missing of a frame.
    pub(crate) fn has_frame(&self, frame: FrameId) -> bool {
        self.index.extents_of(frame).iter().all(|&extent| self.cache.filled().contains(extent as usize))
    }

    /// Returns what is known of the link to the source.
    pub(crate) fn link(&self) -> Option<Link> {
        self.source.link()
    }

    /// Waits for those of the first `count` frames that are on their way. Returns the first error, after all have come
    /// down.
    pub(crate) async fn landed(&self, count: usize) -> Result<(), EnsureError> {
        let flights: Vec<Flight> = {
            let flights = self.flights();
            let of_first = flights.iter().filter(|(frame, _)| (frame.0 as usize) < count);
            of_first.map(|(_, flying)| flying.flight.clone()).collect()
        };
        let mut result = Ok(());
        for flight in flights {
            result = result.and(self.landing(flight).await.map(drop));
        }
        result
    }

    /// Returns what fetching frames (not none) will claim.
    pub(crate) fn claim(&self, frames: &[FrameId], urgency: Urgency) -> Claim {
        let parts = frames.iter().map(|frame| &self.index.frames()[frame.0 as usize]);
        let fetched = parts.clone().map(|frame| fetched_range(frame).length).fold(0, u64::saturating_add);
        // Frames are decoded one after the other: what is held is the request and the largest of them.
        let decoded = parts.map(|frame| frame.decoded_length).max().unwrap_or(0);
        Claim::new(urgency, fetched.saturating_add(decoded))
    }

    /// Fetches those of `frames` (sorted, without repetition) that are neither here nor on their way, for nobody who
    /// waits. Returns the first error, after all have come down.
    pub(crate) async fn bring(self: &Arc<Self>, frames: &[FrameId], turn: Turn) -> Result<(), EnsureError> {
        let policy = FetchPolicy { read_ahead_bytes: 0, ..self.policy.adapted(self.source.link()) };
        let mut result = Ok(());
        let wanted = {
            let flights = self.flights();
            let wanted = |&frame: &FrameId| !flights.contains_key(&frame) && !self.has_frame(frame);
            let mut wanted: Vec<FrameId> = frames.iter().copied().filter(wanted).collect();
            wanted.retain(|&frame| match self.check_size(frame) {
                Ok(()) => true,
                Err(error) => {
                    result = Err(error);
                    false
                }
            });
            wanted
        };
        for (flight, _) in self.send(&wanted, &policy, Admission::Granted(turn)) {
            let outcome = self.landing(flight).await.and_then(|landed| match landed.refused.first() {
                Some(refusal) => Err(self.refused(refusal)),
                None => Ok(()),
            });
            result = result.and(outcome);
        }
        result
    }

    /// Sends off what has to be fetched for `frames` (sorted, without repetition), for somebody who waits, and returns a
    /// flight to wait for for each that is not here.
    fn take_off(self: &Arc<Self>, frames: &[FrameId]) -> Result<VecDeque<(Flight, usize)>, EnsureError> {
        for &frame in frames {
            self.check_size(frame)?;
        }
        let mut policy = self.policy.adapted(self.source.link());
        if frames.last().is_some_and(|&last| self.is_inside_file(last)) {
            // Whoever reads a large file in sequence is noticed; whoever does not, does not want what comes next.
            policy.read_ahead_bytes = 0;
        }
        Ok(self.send(frames, &policy, Admission::Demanded))
    }

    /// Says whether the file of a frame goes on in the next one.
    fn is_inside_file(&self, frame: FrameId) -> bool {
        let node = |extent: Option<&u32>| extent.map(|&extent| self.extent(extent as usize).node);
        let next = FrameId(frame.0 + 1);
        (next.0 as usize) < self.index.frames().len()
            && node(self.index.extents_of(frame).last()) == node(self.index.extents_of(next).first())
    }

    fn send(
        self: &Arc<Self>,
        frames: &[FrameId],
        policy: &FetchPolicy,
        admission: Admission,
    ) -> VecDeque<(Flight, usize)> {
        let mut awaited = VecDeque::new();
        let mut requests = Vec::new();
        let is_demand = matches!(admission, Admission::Demanded);
        {
            let mut flights = self.flights();
            let mut wanted = Vec::new();
            for &frame in frames {
                if let Some(flying) = flights.get(&frame) {
                    if is_demand {
                        flying.flight.hurry();
                    }
                    awaited.push_back((flying.flight.clone(), flying.by));
                } else if !self.has_frame(frame) {
                    // Whoever lands a frame publishes it before it gives up its place, so that it can't be missed.
                    wanted.push(frame);
                }
            }
            let fetchable =
                |frame| !flights.contains_key(&frame) && !self.has_frame(frame) && self.check_size(frame).is_ok();
            let mut planned = plan(self.index.frames(), &wanted, fetchable, policy);
            let mut waited = go_on(&mut planned, &wanted);
            let count = planned.len();
            for (number, request) in planned.into_iter().enumerate() {
                let mut tickets = VecDeque::with_capacity(request.frames.len());
                let mut is_wanted = false;
                let wish = Wish::default();
                for &frame in &request.frames {
                    let (ticket, flight) = Flight::new(frame, &wish);
                    if wanted.binary_search(&frame).is_ok() {
                        awaited.push_back((flight.clone(), self.number));
                        is_wanted = true;
                    }
                    flights.insert(frame, Flying { flight, by: self.number });
                    tickets.push_back(ticket);
                }
                let waited = if number + 1 == count { waited.take() } else { None };
                let flights = Flights::new(Arc::clone(self), tickets, wish, waited.unwrap_or(request.range.length));
                requests.push((request, flights, is_wanted));
            }
        }
        let (urgency, mut turn) = match admission {
            Admission::Demanded => (Urgency::Demand, None),
            Admission::Granted(turn) => (turn.urgency(), Some(turn)),
        };
        for (request, flights, is_wanted) in requests {
            let claim = self.claim(&request.frames, if is_wanted { urgency } else { Urgency::ReadAhead });
            tokio::spawn(flights.run(request.range, claim, turn.take()));
        }
        awaited
    }

    async fn landing(&self, flight: Flight) -> Result<Arc<Landed>, EnsureError> {
        flight.landing().await.unwrap_or(Err(EnsureError::Interrupted { layer: self.digest }))
    }

    /// Refuses a frame that must not be held in memory.
    pub(crate) fn check_size(&self, frame: FrameId) -> Result<(), EnsureError> {
        let parts = &self.index.frames()[frame.0 as usize];
        let needed = parts.decoded_length.max(fetched_range(parts).length);
        let limit = self.limits.frame_bytes;
        if needed <= limit {
            return Ok(());
        }
        let first = self.index.extents_of(frame).first();
        let path = first.map_or_else(String::new, |&extent| path_of(&self.index, self.extent(extent as usize).node));
        Err(EnsureError::TooLarge { layer: self.digest, path, range: parts.range, needed, limit })
    }

    pub(crate) fn extent(&self, number: usize) -> &Extent {
        &self.index.extents()[number]
    }

    pub(crate) fn flights(&self) -> MutexGuard<'_, HashMap<FrameId, Flying>> {
        // Each change of the map is one insertion or removal: nothing is half done where a holder panics.
        self.shared.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn file_error(&self, source: io::Error) -> EnsureError {
        EnsureError::file(self.digest, self.directory().to_owned(), source)
    }
}

impl std::fmt::Debug for LazyLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LazyLayer")
            .field("digest", &self.digest)
            .field("source", &self.source.name())
            .field("statistics", &self.statistics())
            .finish_non_exhaustive()
    }
}
