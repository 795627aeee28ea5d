//! How much of a connection may be under way, and since when there has been room for more.
//!
//! It knows moments that it is told, and no clock.

use std::time::Instant;

/// Bytes under way at the beginning of a connection: ten segments (RFC 6928).
const INITIAL_BYTES: usize = 10 * 1460;

/// The receiver has taken bytes, which the sender learns at a moment.
#[derive(Clone, Copy, Debug)]
pub struct Acknowledgement {
    /// When the sender learns of it.
    pub arrives: Instant,
    /// How many bytes were taken.
    pub bytes: usize,
}

/// What the sender of one direction may do.
#[derive(Debug)]
pub struct Window {
    bytes: usize,
    most: usize,
    /// Taken at a time, unless the window is smaller.
    chunk: usize,
    under_way: usize,
    /// The moment from which on the sender could have sent what it sends next.
    free_since: Option<Instant>,
}

impl Window {
    /// Returns the window of a new connection, which grows to `most` bytes and is used in steps of `chunk` bytes.
    pub fn new(most: usize, chunk: usize, slow_start: bool) -> Self {
        let bytes = if slow_start { INITIAL_BYTES.min(most) } else { most };
        Self { bytes, most, chunk, under_way: 0, free_since: None }
    }

    /// Returns how many bytes may be sent next: a chunk, or the whole window where that is less. 0: an acknowledgement has
    /// to be waited for.
    pub fn room(&self) -> usize {
        let step = self.chunk.min(self.bytes);
        if self.bytes.saturating_sub(self.under_way) < step { 0 } else { step }
    }

    /// Takes an acknowledgement whose moment has come.
    pub fn acknowledge(&mut self, acknowledgement: Acknowledgement) {
        if self.room() == 0 {
            self.free_since = self.free_since.max(Some(acknowledgement.arrives));
        }
        self.under_way = self.under_way.saturating_sub(acknowledgement.bytes);
        self.bytes = self.bytes.saturating_add(acknowledgement.bytes).min(self.most);
    }

    /// Takes note of bytes that were sent. The last of them leaves at a moment, which may have passed.
    pub fn sent(&mut self, bytes: usize, leaves: Instant) {
        self.under_way = self.under_way.saturating_add(bytes);
        self.free_since = Some(leaves);
    }

    /// Returns since when there has been room for the next bytes, where that is known.
    pub fn free_since(&self) -> Option<Instant> {
        self.free_since
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, time::Duration};

    use proptest::prelude::*;

    use super::*;
    use crate::link::{
        LinkOptions,
        direction::AHEAD,
        shaper::{CREDIT, LATENESS, Shaper},
    };

    #[test]
    fn a_window_opens_with_what_is_acknowledged() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut window = Window::new(40_000, 10_000, true);
        assert_eq!((window.room(), window.free_since()), (10_000, None));
        window.sent(10_000, at(1));
        // 4,600 are left of the window, which is less than a chunk.
        assert_eq!((window.room(), window.free_since()), (0, Some(at(1))));
        window.acknowledge(Acknowledgement { arrives: at(5), bytes: 10_000 });
        assert_eq!((window.room(), window.free_since()), (10_000, Some(at(5))));
        window.sent(10_000, at(6));
        assert_eq!(window.room(), 10_000);
        // What is acknowledged while there is room makes nobody wait.
        window.acknowledge(Acknowledgement { arrives: at(9), bytes: 5_000 });
        assert_eq!(window.free_since(), Some(at(6)));
        // It grows to its bound, and a chunk may be larger than it is.
        let mut small = Window::new(3_000, 10_000, true);
        assert_eq!(small.room(), 3_000);
        small.sent(3_000, at(1));
        small.acknowledge(Acknowledgement { arrives: at(2), bytes: 3_000 });
        assert_eq!(small.room(), 3_000);
        assert_eq!(Window::new(40_000, 10_000, false).bytes, 40_000);
    }

    /// One sender that always has something to send, and wakes up late.
    struct Sender {
        window: Window,
        acknowledgements: VecDeque<Acknowledgement>,
        wakes: Instant,
        left: usize,
    }

    impl Sender {
        /// Does what `Direction::send` does at one moment, and returns when the last byte that it has sent leaves.
        fn step(&mut self, shaper: &Shaper, delay: Duration, late: &mut impl FnMut() -> Duration) -> Option<Instant> {
            let now = self.wakes;
            while let Some(next) = self.acknowledgements.pop_front_if(|next| next.arrives <= now) {
                self.window.acknowledge(next);
            }
            let room = self.window.room();
            if room == 0 {
                self.wakes = self.acknowledgements[0].arrives + late();
                return None;
            }
            let bytes = room.min(self.left);
            let leaves = shaper.reserve_at(bytes, self.window.free_since(), now);
            self.window.sent(bytes, leaves);
            self.acknowledgements.push_back(Acknowledgement { arrives: leaves + 2 * delay, bytes });
            self.left -= bytes;
            if leaves.saturating_duration_since(now) > AHEAD {
                self.wakes = leaves - AHEAD / 2 + late();
            }
            Some(leaves)
        }
    }

    /// Sends `bytes` over each of `connections`, and returns the time until the last byte has left.
    fn simulate(
        bits_per_second: u64,
        delay: Duration,
        (connections, bytes): (usize, usize),
        mut late: impl FnMut() -> Duration,
    ) -> Duration {
        let options = LinkOptions { slow_start: false, ..LinkOptions::symmetric(bits_per_second, delay) };
        let shaper = Shaper::new(options.down_bits_per_second);
        let start = Instant::now() + Duration::from_secs(3600);
        let most = options.window_bytes(options.down_bits_per_second);
        let sender = || Sender {
            window: Window::new(most, shaper.chunk_bytes(), false),
            acknowledgements: VecDeque::new(),
            wakes: start,
            left: bytes,
        };
        let mut senders: Vec<_> = std::iter::repeat_with(sender).take(connections).collect();
        let mut last = start;
        while let Some(next) = senders.iter_mut().filter(|sender| sender.left > 0).min_by_key(|sender| sender.wakes) {
            last = last.max(next.step(&shaper, delay, &mut late).unwrap_or(last));
        }
        last - start
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// A busy machine lets us wake up late. That cost the link's capacity for as long: at 100 Mbit/s, a tenth of it
        /// for waking up a third of a millisecond late.
        #[test]
        fn waking_up_late_costs_no_capacity(
            megabits in 1_u64..1000,
            delay in 0_u64..50,
            connections in 1_usize..5,
            lateness in proptest::collection::vec(0_u64..60_000, 1..50),
        ) {
            let mut late = lateness.into_iter().cycle().map(Duration::from_micros);
            let rate = megabits * 1_000_000;
            let bytes = usize::try_from(rate / 8).unwrap() / connections;
            let time = simulate(rate, Duration::from_millis(delay), (connections, bytes), || late.next().unwrap());
            let ideal = Duration::from_secs_f64((bytes * connections) as f64 * 8.0 / rate as f64);
            prop_assert!(time + CREDIT >= ideal, "faster than the link: {time:?} instead of {ideal:?}");
            prop_assert!(time <= ideal + ideal / 100, "slower than the link: {time:?} instead of {ideal:?}");
        }
    }

    #[test]
    fn a_machine_that_stands_still_is_not_made_up_for_without_bound() {
        let mut once = Some(Duration::from_secs(2));
        let time = simulate(8_000_000, Duration::ZERO, (1, 1_000_000), || once.take().unwrap_or_default());
        let lost = Duration::from_secs(2) - LATENESS;
        assert!(time >= Duration::from_secs(1) + lost - CREDIT - AHEAD, "{time:?}");
    }
}
