//! What passes over the way to one host, measured as it passes.
//!
//! The round trip is the shortest of the last times from a request to the first byte of its answer: connections that had
//! to be made first, and answers that a server had to think about, took longer. It follows a way that has become longer
//! after as many answers as are remembered.
//!
//! The bandwidth is what arrives while ranges and documents stream, all of them together. Whole blobs are counted along
//! with them, and not by themselves: they are read at the pace of whoever takes them, which says nothing of the way. One
//! slow measurement has many causes (a connection that has just begun, a short body), a fast one has none but the way:
//! the estimate rises fast and falls slowly.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::link::Link;

/// How many times are remembered.
const REMEMBERED: usize = 16;
/// A measurement of bandwidth ends after this time, and another begins.
const WINDOW: Duration = Duration::from_millis(200);
/// Fewer bytes say nothing of bandwidth: they came along with the answer's head.
const LEAST_BYTES: u64 = 64 << 10;
/// As short a time can't be measured.
const LEAST_TIME: Duration = Duration::from_micros(100);

/// Measures one host.
#[derive(Debug, Default)]
pub(super) struct Meter(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    times: VecDeque<Duration>,
    /// How many bodies are streaming that are read as fast as they come.
    streaming: u32,
    window: Option<Window>,
    bytes_per_second: Option<f64>,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    bytes: u64,
}

impl Meter {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of the time that an answer took to begin.
    pub(super) fn answered(&self, after: Duration) {
        let mut state = self.state();
        if state.times.len() >= REMEMBERED {
            state.times.pop_front();
        }
        state.times.push_back(after);
    }

    /// Takes note that a body begins to stream which is read as fast as it comes.
    pub(super) fn begin(&self, now: Instant) {
        let mut state = self.state();
        state.streaming += 1;
        state.window.get_or_insert(Window { since: now, bytes: 0 });
    }

    /// Takes note of bytes of any body.
    pub(super) fn arrived(&self, bytes: usize, now: Instant) {
        let mut state = self.state();
        let Some(window) = &mut state.window else { return };
        window.bytes += bytes as u64;
        if now.saturating_duration_since(window.since) >= WINDOW {
            state.close(now);
            state.window = Some(Window { since: now, bytes: 0 });
        }
    }

    /// Takes note that a body which had begun has ended.
    pub(super) fn end(&self, now: Instant) {
        let mut state = self.state();
        state.streaming = state.streaming.saturating_sub(1);
        if state.streaming == 0 {
            state.close(now);
        }
    }

    /// Returns what is known; `None` before both have been measured.
    pub(super) fn link(&self) -> Option<Link> {
        let state = self.state();
        let round_trip = state.times.iter().min().copied()?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is not negative")]
        let bytes_per_second = state.bytes_per_second? as u64;
        Some(Link { round_trip, bytes_per_second: bytes_per_second.max(1) })
    }
}

impl State {
    fn close(&mut self, now: Instant) {
        /// How much a faster and a slower measurement count.
        const RISE: f64 = 0.5;
        const FALL: f64 = 0.125;
        let Some(Window { since, bytes }) = self.window.take() else { return };
        if bytes < LEAST_BYTES {
            return;
        }
        let time = now.saturating_duration_since(since).max(LEAST_TIME);
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let measured = bytes as f64 / time.as_secs_f64();
        self.bytes_per_second = Some(match self.bytes_per_second {
            None => measured,
            Some(known) => known + (measured - known) * if measured > known { RISE } else { FALL },
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(meter: &Meter) -> u64 {
        meter.link().map_or(0, |link| link.bytes_per_second)
    }

    #[test]
    fn parallel_bodies_are_measured_together() {
        let meter = Meter::default();
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        meter.answered(Duration::from_millis(30));
        meter.answered(Duration::from_millis(20));
        assert_eq!(meter.link(), None);
        // A whole blob alone says nothing.
        meter.arrived(10 << 20, at(0));
        assert_eq!(meter.link(), None);
        meter.begin(at(0));
        meter.begin(at(0));
        meter.arrived(50_000, at(50));
        meter.arrived(50_000, at(90));
        meter.end(at(90));
        meter.end(at(100));
        assert_eq!(meter.link(), Some(Link { round_trip: Duration::from_millis(20), bytes_per_second: 1_000_000 }));
    }

    #[test]
    fn the_estimate_rises_fast_and_falls_slowly() {
        let meter = Meter::default();
        meter.answered(Duration::from_millis(1));
        let mut now = Instant::now();
        let mut stream = |bytes: usize| {
            meter.begin(now);
            now += Duration::from_millis(100);
            meter.arrived(bytes, now);
            meter.end(now);
            rate(&meter)
        };
        assert_eq!(stream(100_000), 1_000_000);
        assert_eq!(stream(300_000), 2_000_000);
        assert_eq!(stream(100_000), 1_875_000);
        // Too little to tell.
        assert_eq!(stream(100), 1_875_000);
    }

    #[test]
    fn the_shortest_of_the_last_times_counts() {
        let meter = Meter::default();
        let start = Instant::now();
        meter.begin(start);
        meter.arrived(1 << 20, start);
        meter.end(start + Duration::from_secs(1));
        for milliseconds in [50, 10, 40] {
            meter.answered(Duration::from_millis(milliseconds));
        }
        let round_trip = || meter.link().map(|link| link.round_trip);
        assert_eq!(round_trip(), Some(Duration::from_millis(10)));
        for _ in 0..REMEMBERED {
            meter.answered(Duration::from_millis(80));
        }
        assert_eq!(round_trip(), Some(Duration::from_millis(80)));
    }
}
