//! Readers that go on where they stopped.
//!
//! Whoever reads a large file from its beginning to its end should wait for the link once and not at every step. A few
//! readers of a layer are remembered by where each would go on; one that does so gets as much fetched ahead as it has
//! read in sequence, so that no more is ever fetched in vain than was of use. A reader that jumps about is never taken for
//! one: its reads stay small. Nor is a program that loads a few small files that stand side by side.
//!
//! Pure: positions in, ranges out. Files lie in the data file in the order of the layer, so that whoever reads one file
//! after another (`tar`, `cp -r`) goes through it in sequence too.

use loris_format::position::{DataOffset, DataRange};

/// Readers that are remembered.
const READERS: usize = 8;
/// How far a reader may leap forward, or look back, and be taken for the same one: the kernel's own read-ahead asks in
/// pieces that may overtake each other, and between files there is padding.
const LEAP_BYTES: u64 = 128 << 10;
/// What must have been read in sequence before anything is fetched ahead.
const FIRST_BYTES: u64 = 256 << 10;

/// The readers of one layer.
#[derive(Debug, Default)]
pub(crate) struct Sequences {
    readers: Vec<Reader>,
}

#[derive(Clone, Copy, Debug)]
struct Reader {
    /// Where it would go on.
    next: u64,
    /// The end of what was fetched ahead.
    ahead: u64,
    /// Bytes that were read in sequence.
    read: u64,
}

impl Sequences {
    /// Takes note of a read, and returns what is to be fetched ahead of it, at most `most` bytes.
    pub(crate) fn read(&mut self, range: &DataRange, most: u64) -> Option<DataRange> {
        let (start, end) = (range.start.0, range.end.0);
        let near = |reader: &Reader| {
            start >= reader.next.saturating_sub(LEAP_BYTES) && start <= reader.next.saturating_add(LEAP_BYTES)
        };
        let Some(place) = self.readers.iter().position(near) else {
            self.readers.truncate(READERS - 1);
            self.readers.insert(0, Reader { next: end, ahead: end, read: end.saturating_sub(start) });
            return None;
        };
        let mut reader = self.readers.remove(place);
        if end > reader.next {
            reader.read = reader.read.saturating_add(end - reader.next.max(start));
            reader.next = end;
        }
        reader.ahead = reader.ahead.max(reader.next);
        let mut ahead = None;
        // Before the reader comes to the end of what is there.
        let window = reader.read.min(most);
        if reader.read >= FIRST_BYTES && reader.ahead - reader.next <= window / 2 {
            let to = reader.next.saturating_add(window);
            if to > reader.ahead {
                ahead = Some(DataOffset(reader.ahead)..DataOffset(to));
                reader.ahead = to;
            }
        }
        self.readers.insert(0, reader);
        ahead
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const K: u64 = 1 << 10;

    fn range(start: u64, end: u64) -> DataRange {
        DataOffset(start)..DataOffset(end)
    }

    /// Reads from `start` on in steps, and returns how much was fetched ahead at each.
    fn steps(sequences: &mut Sequences, start: u64, step: u64, count: u64, most: u64) -> Vec<u64> {
        (0..count)
            .map(|number| start + number * step)
            .map(|at| sequences.read(&range(at, at + step), most).map_or(0, |ahead| ahead.end.0 - ahead.start.0))
            .collect()
    }

    #[test]
    fn a_reader_that_goes_on_gets_more_and_more() {
        let fetched = steps(&mut Sequences::default(), 0, 64 * K, 64, 4096 * K);
        assert_eq!(fetched[..4], [0, 0, 0, 256 * K]);
        let positive: Vec<u64> = fetched.iter().copied().filter(|&bytes| bytes > 0).collect();
        assert!(positive.iter().any(|&bytes| bytes >= 512 * K), "{positive:?}");
        // The reader never reaches the end of what is fetched ahead again.
        let mut ahead = 0;
        for (number, bytes) in fetched.iter().enumerate().skip(3) {
            let at = (number as u64 + 1) * 64 * K;
            ahead = if ahead == 0 { at + bytes } else { ahead + bytes };
            assert!(ahead > at, "step {number}");
        }
    }

    #[test]
    fn a_reader_that_jumps_gets_nothing() {
        let mut sequences = Sequences::default();
        for number in 0..100u64 {
            let at = (number * 7919 % 1000) * 4096 * K;
            assert_eq!(sequences.read(&range(at, at + 128 * K), 8192 * K), None);
        }
    }

    #[test]
    fn two_readers_do_not_disturb_each_other() {
        let mut sequences = Sequences::default();
        let mut fetched = [0, 0];
        for number in 0..32u64 {
            for (reader, start) in [0, 1 << 30].into_iter().enumerate() {
                let at = start + number * 128 * K;
                fetched[reader] +=
                    sequences.read(&range(at, at + 128 * K), 1024 * K).map_or(0, |ahead| ahead.end.0 - ahead.start.0);
            }
        }
        assert_eq!(fetched[0], fetched[1]);
        assert!(fetched[0] > 2048 * K);
    }

    proptest! {
        #[test]
        fn what_is_ahead_is_bounded_and_never_overflows(
            reads in proptest::collection::vec((any::<u64>(), any::<u32>()), 1..200),
            most in 0u64..(1 << 40),
        ) {
            let mut sequences = Sequences::default();
            for (start, length) in reads {
                let end = start.saturating_add(u64::from(length));
                if let Some(ahead) = sequences.read(&range(start, end), most) {
                    prop_assert!(ahead.start < ahead.end);
                    prop_assert!(ahead.end.0 - ahead.start.0 <= most);
                }
                prop_assert!(sequences.readers.len() <= READERS);
            }
        }
    }
}
