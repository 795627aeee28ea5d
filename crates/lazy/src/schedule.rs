//! Who goes first: the order in which all layers of a store use memory, the link and the processor.
//!
//! Whatever is fetched waits here for its turn, with an [`Urgency`]. What somebody waits for goes first; what nobody
//! waits for takes only a part of the requests and of the memory, so that a read on demand finds a place at once.
//! Completion keeps away altogether while reads on demand come in quick succession, because it would take bandwidth
//! from them; but only for as long as its caller can afford it, see [`Claim::quiet_until`].
//!
//! Knows numbers of bytes and points in time; no layers, no sources.

use std::{
    collections::BTreeSet,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

/// Requests under way for which nobody waits. Enough to keep a link full while the next one's round trip passes, and few
/// enough that a read on demand gets its share at once.
const BACKGROUND_REQUESTS: usize = 4;
/// Of these, guesses beside those who read on demand.
const GUESSES: usize = 2;
/// Completion stays away for this many round trips after a read on demand: a program that reads one file after another
/// needs about one from one read to the next.
const QUIET_ROUND_TRIPS: u32 = 4;
/// And for this long: a program computes for a while between its reads. With 50 ms, completion used a third of the link
/// while node and Python started, and each of its requests held a read up.
const QUIET: Duration = Duration::from_secs(1);

/// Proofs that are made at the same time, at least: each holds a thread, and waits for the source where something is
/// missing.
const PROVERS: usize = 8;

/// How soon bytes are needed; the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Urgency {
    /// Somebody waits for them.
    Demand,
    /// They were marked as needed by the start of the workload.
    Prefetch,
    /// A reader goes in their direction.
    ReadAhead,
    /// Something hints at them.
    Guess,
    /// They belong to the layer.
    Completion,
}

impl Urgency {
    pub(crate) const COUNT: usize = 5;

    fn is_background(self) -> bool {
        self != Self::Demand
    }
}

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    pub(crate) urgency: Urgency,
    /// Bytes that will be held in memory until the [`Turn`] is dropped.
    pub(crate) bytes: u64,
    /// For completion: from when on it goes on although others read on demand. `None`: it waits until they don't.
    pub(crate) quiet_until: Option<Instant>,
}

impl Claim {
    pub(crate) fn new(urgency: Urgency, bytes: u64) -> Self {
        Self { urgency, bytes, quiet_until: None }
    }
}

/// The order of a store.
#[derive(Debug)]
pub(crate) struct Schedule {
    bounds: Bounds,
    state: Mutex<State>,
    /// Whenever something may have become possible.
    changed: Notify,
    decoders: Arc<Semaphore>,
    background_decoders: Arc<Semaphore>,
    provers: Arc<Semaphore>,
}

#[derive(Clone, Copy, Debug)]
struct Bounds {
    memory: u64,
    requests: usize,
}

#[derive(Debug)]
struct State {
    waiting: BTreeSet<(Urgency, u64)>,
    next: u64,
    running: [usize; Urgency::COUNT],
    memory: u64,
    /// When the last read on demand began or ended.
    demanded: Option<Instant>,
    round_trip: Duration,
}

/// Whether a claim has its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Now,
    /// When somebody else has ended.
    Later,
    /// When nobody has read on demand until then.
    At(Instant),
}

impl State {
    fn verdict(&self, claim: &Claim, key: (Urgency, u64), bounds: Bounds, now: Instant) -> Verdict {
        // First come, first served: else what is large would wait for ever.
        if self.waiting.first().is_some_and(|first| first.0 < key.0) || self.first_of(key.0) != Some(key) {
            return Verdict::Later;
        }
        let background: usize = self.running[1..].iter().sum();
        let (requests, memory) = match claim.urgency.is_background() {
            true => (background < BACKGROUND_REQUESTS.min(bounds.requests), bounds.memory / 4 * 3),
            false => (self.running[0] < bounds.requests, bounds.memory),
        };
        // What needs more than there is goes alone.
        let fits = self.memory.saturating_add(claim.bytes) <= memory || self.memory == 0;
        if !requests || !fits {
            return Verdict::Later;
        }
        if claim.urgency == Urgency::Guess
            && self.running[Urgency::Guess as usize] >= GUESSES
            && let Some(quiet) = self.quiet_from(now, self.quiet())
        {
            return Verdict::At(quiet);
        }
        if claim.urgency == Urgency::Completion {
            if let Some(quiet) = self.quiet_from(now, self.quiet())
                && claim.quiet_until.is_none_or(|until| now < until)
            {
                return Verdict::At(claim.quiet_until.map_or(quiet, |until| until.min(quiet)));
            }
            // Beside those who read on demand, or may soon again, one at a time: they keep half of the link at least.
            if let Some(quiet) = self.quiet_from(now, self.quiet())
                && self.running[Urgency::Completion as usize] > 0
            {
                return Verdict::At(quiet);
            }
        }
        Verdict::Now
    }

    fn quiet(&self) -> Duration {
        QUIET.max(self.round_trip * QUIET_ROUND_TRIPS)
    }

    /// Returns when nobody will have read on demand for as long as `quiet`; `None` where that is so now.
    fn quiet_from(&self, now: Instant, quiet: Duration) -> Option<Instant> {
        // Asked again when a read ends, which is a change.
        let last = if self.running[Urgency::Demand as usize] > 0 { Some(now) } else { self.demanded };
        last.map(|last| last + quiet).filter(|&end| end > now)
    }

    fn first_of(&self, urgency: Urgency) -> Option<(Urgency, u64)> {
        self.waiting.range((urgency, 0)..).next().copied()
    }
}

impl Schedule {
    pub(crate) fn new(memory_bytes: u64, requests: usize, decoders: usize) -> Self {
        let state = State {
            waiting: BTreeSet::new(),
            next: 0,
            running: [0; Urgency::COUNT],
            memory: 0,
            demanded: None,
            round_trip: Duration::ZERO,
        };
        Self {
            bounds: Bounds { memory: memory_bytes, requests: requests.max(1) },
            state: Mutex::new(state),
            changed: Notify::new(),
            decoders: Arc::new(Semaphore::new(decoders.max(1))),
            background_decoders: Arc::new(Semaphore::new(decoders.max(1))),
            provers: Arc::new(Semaphore::new(decoders.max(PROVERS))),
        }
    }

    /// Waits for a turn. What is larger than all the memory waits until nothing else is held.
    pub(crate) async fn turn(self: &Arc<Self>, claim: Claim) -> Turn {
        let waiting = Waiting::begin(self, claim.urgency);
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let verdict = {
                let mut state = self.state();
                let verdict = state.verdict(&claim, waiting.key, self.bounds, Instant::now());
                if verdict == Verdict::Now {
                    state.running[claim.urgency as usize] += 1;
                    state.memory = state.memory.saturating_add(claim.bytes);
                    if claim.urgency == Urgency::Demand {
                        state.demanded = Some(Instant::now());
                    }
                }
                verdict
            };
            match verdict {
                Verdict::Now => return Turn { schedule: Arc::clone(self), claim, on_the_wire: true },
                Verdict::Later => changed.await,
                Verdict::At(time) => {
                    let _ = tokio::time::timeout_at(time, changed).await;
                }
            }
        }
    }

    /// Waits for a place among the decoders. What nobody waits for has places of its own, so that it is never waited for.
    pub(crate) fn decoder(&self, urgency: Urgency) -> impl Future<Output = OwnedSemaphorePermit> + use<> {
        let places = if urgency.is_background() { &self.background_decoders } else { &self.decoders };
        place_of(places)
    }

    /// Waits for a place among those who prove layers.
    pub(crate) fn prover(&self) -> impl Future<Output = OwnedSemaphorePermit> + use<> {
        place_of(&self.provers)
    }

    /// Waits until there is memory for something that is not fetched and nobody waits for.
    pub(crate) async fn memory(self: &Arc<Self>, bytes: u64) -> Turn {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut state = self.state();
                if state.memory == 0 || state.memory.saturating_add(bytes) <= self.bounds.memory / 4 * 3 {
                    state.memory = state.memory.saturating_add(bytes);
                    let claim = Claim::new(Urgency::Completion, bytes);
                    return Turn { schedule: Arc::clone(self), claim, on_the_wire: false };
                }
            }
            changed.await;
        }
    }

    /// Says whether somebody reads on demand, or has lately.
    pub(crate) fn is_demanded(&self) -> bool {
        let state = self.state();
        state.quiet_from(Instant::now(), state.quiet()).is_some()
    }

    /// Takes in what is known of the link: the longest round trip counts for as long as it is the latest.
    pub(crate) fn note_round_trip(&self, round_trip: Duration) {
        self.state().round_trip = round_trip;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is a few numbers: nothing is half done where a holder panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn place_of(places: &Arc<Semaphore>) -> impl Future<Output = OwnedSemaphorePermit> + use<> {
    let place = Arc::clone(places).acquire_owned();
    async move {
        match place.await {
            Ok(place) => place,
            Err(closed) => unreachable!("the semaphore is never closed: {closed}"),
        }
    }
}

/// A place in the order, given up when dropped.
struct Waiting {
    schedule: Arc<Schedule>,
    key: (Urgency, u64),
}

impl Waiting {
    fn begin(schedule: &Arc<Schedule>, urgency: Urgency) -> Self {
        let mut state = schedule.state();
        let key = (urgency, state.next);
        state.next += 1;
        state.waiting.insert(key);
        drop(state);
        Self { schedule: Arc::clone(schedule), key }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.schedule.state().waiting.remove(&self.key);
        self.schedule.changed.notify_waiters();
    }
}

/// The right to make one request and to hold what it brings; given back when dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    schedule: Arc<Schedule>,
    claim: Claim,
    on_the_wire: bool,
}

impl Turn {
    pub(crate) fn urgency(&self) -> Urgency {
        self.claim.urgency
    }

    /// Gives back the place among the requests: the answer is here, and the link must not stand idle while it is decoded.
    pub(crate) fn landed(&mut self) {
        if std::mem::take(&mut self.on_the_wire) {
            let mut state = self.schedule.state();
            state.running[self.claim.urgency as usize] -= 1;
            if self.claim.urgency == Urgency::Demand {
                state.demanded = Some(Instant::now());
            }
            drop(state);
            self.schedule.changed.notify_waiters();
        }
    }

    /// Holds other memory than was claimed, from now on.
    pub(crate) fn resize(&mut self, bytes: u64) {
        let mut state = self.schedule.state();
        state.memory = state.memory.saturating_sub(self.claim.bytes).saturating_add(bytes);
        self.claim.bytes = bytes;
        drop(state);
        self.schedule.changed.notify_waiters();
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.landed();
        self.resize(0);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn schedule(memory: u64, requests: usize) -> Arc<Schedule> {
        Arc::new(Schedule::new(memory, requests, 1))
    }

    fn claim(urgency: Urgency, bytes: u64) -> Claim {
        Claim::new(urgency, bytes)
    }

    #[tokio::test]
    async fn more_than_everything_waits_for_everything_and_holds_up_its_followers() {
        let schedule = schedule(8, 9);
        let one = schedule.turn(claim(Urgency::Demand, 1)).await;
        let mut all = Box::pin(schedule.turn(claim(Urgency::Demand, u64::MAX)));
        assert!((&mut all).now_or_never().is_none());
        let mut small = Box::pin(schedule.turn(claim(Urgency::Demand, 1)));
        assert!((&mut small).now_or_never().is_none(), "what came later went first");
        drop(one);
        let all = all.await;
        assert!((&mut small).now_or_never().is_none());
        drop(all);
        small.await;
    }

    #[tokio::test]
    async fn what_nobody_waits_for_leaves_room() {
        let schedule = schedule(100, 16);
        let mut turns = Vec::new();
        for urgency in [Urgency::Prefetch, Urgency::ReadAhead, Urgency::Completion, Urgency::Prefetch] {
            turns.push(schedule.turn(claim(urgency, 10)).await);
        }
        assert!(schedule.turn(claim(Urgency::Prefetch, 1)).now_or_never().is_none(), "a fifth request");
        turns.pop();
        assert!(schedule.turn(claim(Urgency::Prefetch, 46)).now_or_never().is_none(), "more than three quarters");
        let demand = schedule.turn(claim(Urgency::Demand, 70)).now_or_never().unwrap();
        assert!(schedule.turn(claim(Urgency::Demand, 1)).now_or_never().is_none(), "more than all");
        drop(demand);
        schedule.turn(claim(Urgency::Prefetch, 45)).now_or_never().unwrap();
    }

    #[tokio::test]
    async fn the_more_urgent_goes_first_however_late_it_comes() {
        let schedule = schedule(1000, 1);
        let holder = schedule.turn(claim(Urgency::Prefetch, 1)).await;
        let order = [Urgency::Completion, Urgency::ReadAhead, Urgency::Prefetch];
        let mut waiting: Vec<_> = order.iter().map(|&urgency| Box::pin(schedule.turn(claim(urgency, 1)))).collect();
        for turn in &mut waiting {
            assert!(turn.now_or_never().is_none());
        }
        drop(holder);
        for number in (0..waiting.len()).rev() {
            for turn in &mut waiting[..number] {
                assert!(turn.now_or_never().is_none());
            }
            assert!((&mut waiting[number]).now_or_never().is_some());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn completion_keeps_away_from_readers_while_it_can_afford_it() {
        let schedule = schedule(1000, 16);
        schedule.note_round_trip(Duration::from_millis(100));
        let began = Instant::now();
        let mut demand = schedule.turn(claim(Urgency::Demand, 1)).await;
        demand.landed();
        assert!(schedule.turn(claim(Urgency::Completion, 1)).now_or_never().is_none());
        schedule.turn(claim(Urgency::Completion, 1)).await;
        assert_eq!(began.elapsed().as_millis(), 1000);

        let _demand = schedule.turn(claim(Urgency::Demand, 1)).await;
        let until = Some(Instant::now() + Duration::from_millis(1700));
        let began = Instant::now();
        let _one = schedule.turn(Claim { quiet_until: until, ..claim(Urgency::Completion, 1) }).await;
        assert_eq!(began.elapsed().as_millis(), 1700);
        // And then goes on beside them, but takes no more than half of the link.
        assert!(schedule.turn(Claim { quiet_until: until, ..claim(Urgency::Completion, 1) }).now_or_never().is_none());
    }

    #[tokio::test]
    async fn who_gives_up_waiting_holds_nobody_up() {
        let schedule = schedule(10, 1);
        let turn = schedule.turn(claim(Urgency::Demand, 1)).await;
        let mut first = Box::pin(schedule.turn(claim(Urgency::Demand, 1)));
        let mut second = Box::pin(schedule.turn(claim(Urgency::Demand, 1)));
        assert!((&mut first).now_or_never().is_none());
        assert!((&mut second).now_or_never().is_none());
        drop(first);
        drop(turn);
        assert!((&mut second).now_or_never().is_some());
    }
}
