//! The rate of one direction of a link, shared by all its connections.

use std::{
    num::NonZeroU64,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// How far the link catches up after it was idle. A thread that wakes up late would otherwise lose capacity that the
/// link had. It is also the largest burst: that many milliseconds' worth of bytes.
pub const CREDIT: Duration = Duration::from_millis(2);
/// How far a connection may catch up whose bytes have waited for the link, and not the link for them. A busy machine may
/// leave us without a processor for that long.
pub const LATENESS: Duration = Duration::from_millis(250);
/// Bytes taken from a connection at a time, at most. Large enough for 1 Gbit/s with few wake-ups.
const LARGEST_CHUNK_BYTES: usize = 64 << 10;
/// Bytes taken at a time, at least: one segment.
const SMALLEST_CHUNK_BYTES: usize = 1460;

/// Tells when bytes have left. It is a token bucket, kept as the moment at which all that was promised has left.
pub struct Shaper {
    bits_per_second: Option<NonZeroU64>,
    free_from: Mutex<Instant>,
    bytes: AtomicU64,
}

impl Shaper {
    /// Returns an idle link's direction.
    pub fn new(bits_per_second: Option<NonZeroU64>) -> Self {
        Self { bits_per_second, free_from: Mutex::new(Instant::now()), bytes: AtomicU64::new(0) }
    }

    /// Returns how many bytes a connection should hand over at a time: about a millisecond's worth, so that connections
    /// take fair turns.
    pub fn chunk_bytes(&self) -> usize {
        let Some(rate) = self.bits_per_second else { return LARGEST_CHUNK_BYTES };
        usize::try_from(rate.get() / 8000)
            .unwrap_or(LARGEST_CHUNK_BYTES)
            .clamp(SMALLEST_CHUNK_BYTES, LARGEST_CHUNK_BYTES)
    }

    /// Puts bytes in line, and returns when the last of them has left. `waiting_since` is the moment from which on they
    /// have waited for the link, where they have; if we come late to take them, the link has been carrying them since.
    pub fn reserve(&self, bytes: usize, waiting_since: Option<Instant>) -> Instant {
        self.reserve_at(bytes, waiting_since, Instant::now())
    }

    /// [`reserve`](Self::reserve), at a moment that is given.
    pub fn reserve_at(&self, bytes: usize, waiting_since: Option<Instant>, now: Instant) -> Instant {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let Some(rate) = self.bits_per_second else { return now };
        let nanoseconds = (bytes as u128 * 8_000_000_000).div_ceil(u128::from(rate.get()));
        let time = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        // A moment is whole at any time.
        let mut free_from = self.free_from.lock().unwrap_or_else(PoisonError::into_inner);
        let before = |time| now.checked_sub(time).unwrap_or(now);
        let earliest = waiting_since.map_or(before(CREDIT), |since| since.clamp(before(LATENESS), now));
        let start = earliest.max(*free_from);
        // A wait beyond what the clock can tell is as good as none that ends.
        *free_from = start.checked_add(time).unwrap_or(start);
        // What came only now leaves no earlier, also on credit.
        if waiting_since.is_some() { *free_from } else { (*free_from).max(now) }
    }

    /// Returns how many bytes have been put in line.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Forgets how many bytes have been put in line.
    pub fn reset(&self) {
        self.bytes.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate() {
        // 8 Mbit/s is a byte a microsecond.
        let shaper = Shaper::new(NonZeroU64::new(8_000_000));
        let start = Instant::now() + Duration::from_secs(1);
        let after = Duration::from_micros;
        assert_eq!(shaper.reserve_at(2000, None, start), start, "a burst");
        assert_eq!(shaper.reserve_at(500, None, start), start + after(500));
        assert_eq!(shaper.reserve_at(1, None, start + after(100)), start + after(501));
        let later = start + Duration::from_secs(1);
        assert_eq!(shaper.reserve_at(3000, None, later), later + after(1000), "idle time is not saved up");
        let late = later + after(101_000);
        assert_eq!(shaper.reserve_at(500, Some(later), late), later + after(1500), "time without us is made up for");
        assert_eq!(shaper.reserve_at(500, Some(late + after(1)), late), late + after(500), "not before it waited");
        let much = late + Duration::from_secs(1);
        assert_eq!(shaper.reserve_at(1, Some(late), much), much - LATENESS + after(1));
        let idle = much + Duration::from_secs(1);
        assert_eq!(shaper.reserve_at(1, None, idle), idle, "nothing leaves before it comes");
        assert_eq!(shaper.bytes(), 6503);
        shaper.reset();
        assert_eq!(shaper.bytes(), 0);
    }

    #[test]
    fn chunks() {
        for (rate, bytes) in [(1, 1460), (25_000_000, 3125), (1_000_000_000, 64 << 10), (0, 64 << 10)] {
            assert_eq!(Shaper::new(NonZeroU64::new(rate)).chunk_bytes(), bytes, "{rate}");
        }
        let unlimited = Shaper::new(None);
        let now = Instant::now();
        assert_eq!(unlimited.reserve_at(1 << 30, None, now), now);
    }
}
