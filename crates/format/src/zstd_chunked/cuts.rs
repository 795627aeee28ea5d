//! Where content is cut into chunks, by what it is: as containers/storage cuts it, so that equal content has equal chunks.
//!
//! A rolling sum over the last 64 bytes cuts where its low 16 bits are all ones, which is every 64 KiB on average; it is
//! `bup`'s. It begins anew with each file and is not reset by a cut. 1024 zeros and more are a hole, which is a chunk of its
//! own; zeros of holes are in the sum, but nothing is cut within them.

const WINDOW: u32 = 64;
const OFFSET: u32 = 31;
const MASK: u32 = 0xffff;
/// So many zeros are a hole.
const HOLE_BYTES: u64 = 1 << 10;

/// A chunk of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    /// Its uncompressed bytes.
    pub length: u64,
    /// Whether they are all zero.
    pub hole: bool,
}

/// Cuts the content of one file.
#[derive(Debug)]
pub struct Cutter {
    sum: RollSum,
    most: u64,
    /// Zeros that came last, and are in no chunk yet.
    zeros: u64,
    /// Bytes of the chunk that is open.
    open: u64,
    cuts: Vec<Cut>,
}

impl Cutter {
    /// Begins a file. No chunk has more than `most` bytes (at least 1): readers hold a chunk in memory.
    #[must_use]
    pub fn new(most: u64) -> Self {
        Self { sum: RollSum::new(), most: most.max(1), zeros: 0, open: 0, cuts: Vec::new() }
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == 0 {
                self.zeros += 1;
                continue;
            }
            if self.zeros > 0 {
                self.end_zeros();
            }
            self.data(byte);
        }
    }

    /// Ends the file. Its chunks are as long as all bytes together.
    #[must_use]
    pub fn finish(mut self) -> Vec<Cut> {
        self.end_zeros();
        self.cut();
        self.cuts
    }

    #[inline]
    fn data(&mut self, byte: u8) {
        self.sum.roll(byte);
        self.open += 1;
        if self.sum.is_cut() || self.open == self.most {
            self.cut();
        }
    }

    fn end_zeros(&mut self) {
        let zeros = std::mem::take(&mut self.zeros);
        if zeros < HOLE_BYTES {
            (0..zeros).for_each(|_| self.data(0));
            return;
        }
        self.cut();
        self.sum.roll_zeros(zeros);
        let mut left = zeros;
        while left > 0 {
            let length = left.min(self.most);
            self.cuts.push(Cut { length, hole: true });
            left -= length;
        }
    }

    fn cut(&mut self) {
        if self.open > 0 {
            self.cuts.push(Cut { length: self.open, hole: false });
            self.open = 0;
        }
    }
}

#[derive(Debug)]
struct RollSum {
    one: u32,
    two: u32,
    window: [u8; WINDOW as usize],
    at: usize,
}

impl RollSum {
    fn new() -> Self {
        let (one, two) = (WINDOW * OFFSET, WINDOW * (WINDOW - 1) * OFFSET);
        Self { one, two, window: [0; WINDOW as usize], at: 0 }
    }

    #[inline]
    fn roll(&mut self, byte: u8) {
        let dropped = u32::from(std::mem::replace(&mut self.window[self.at], byte));
        self.at = (self.at + 1) % self.window.len();
        self.one = self.one.wrapping_add(u32::from(byte)).wrapping_sub(dropped);
        self.two = self.two.wrapping_add(self.one).wrapping_sub(WINDOW * (dropped + OFFSET));
    }

    /// A window of zeros changes the first sum no more, and the second by the same each time; where in it the next byte goes
    /// makes no difference.
    fn roll_zeros(&mut self, count: u64) {
        let first = count.min(u64::from(WINDOW));
        (0..first).for_each(|_| self.roll(0));
        let step = self.one.wrapping_sub(WINDOW * OFFSET);
        // Modulo 2^32, as all of it is.
        let rest = u32::try_from((count - first) & u64::from(u32::MAX)).unwrap_or_default();
        self.two = self.two.wrapping_add(step.wrapping_mul(rest));
    }

    #[inline]
    fn is_cut(&self) -> bool {
        self.two & MASK == MASK
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cuts(content: &[u8], most: u64) -> Vec<(u64, bool)> {
        let mut cutter = Cutter::new(most);
        cutter.update(content);
        cutter.finish().into_iter().map(|cut| (cut.length, cut.hole)).collect()
    }

    #[test]
    fn holes_are_chunks_and_short_runs_are_not() {
        assert_eq!(cuts(b"", 100), []);
        assert_eq!(cuts(b"abc", 100), [(3, false)]);
        assert_eq!(cuts(&[0; 1023], 4096), [(1023, false)]);
        assert_eq!(cuts(&[0; 1024], 4096), [(1024, true)]);
        let around = [b"a".as_slice(), &[0; 2000], b"b"].concat();
        assert_eq!(cuts(&around, 4096), [(1, false), (2000, true), (1, false)]);
        let around = [b"a".as_slice(), &[0; 1000], b"b"].concat();
        assert_eq!(cuts(&around, 4096), [(1002, false)]);
        assert_eq!(cuts(&[0; 5000], 2000), [(2000, true), (2000, true), (1000, true)]);
        assert_eq!(cuts(b"abcdefg", 3), [(3, false), (3, false), (1, false)]);
    }

    proptest! {
        #[test]
        fn zeros_may_be_rolled_at_once(before in proptest::collection::vec(any::<u8>(), 0..200), count in 0..5000_u64) {
            let (mut one, mut other) = (RollSum::new(), RollSum::new());
            before.iter().for_each(|&byte| one.roll(byte));
            before.iter().for_each(|&byte| other.roll(byte));
            (0..count).for_each(|_| one.roll(0));
            other.roll_zeros(count);
            for byte in *b"what follows is the same, if only the window is" {
                one.roll(byte);
                other.roll(byte);
                prop_assert_eq!((one.one, one.two), (other.one, other.two));
            }
        }

        #[test]
        fn chunks_have_all_bytes_however_they_come(
            pieces in proptest::collection::vec((any::<u8>(), 0..3000_usize), 0..20), most in 1..3000_u64, step in 1..5000_usize
        ) {
            let content: Vec<u8> = pieces.iter().flat_map(|(byte, length)| vec![byte / 128 * byte; *length]).collect();
            let whole = cuts(&content, most);
            let mut cutter = Cutter::new(most);
            content.chunks(step).for_each(|piece| cutter.update(piece));
            let in_pieces: Vec<_> = cutter.finish().into_iter().map(|cut| (cut.length, cut.hole)).collect();
            prop_assert_eq!(&whole, &in_pieces);
            prop_assert_eq!(whole.iter().map(|cut| cut.0).sum::<u64>(), content.len() as u64);
            let mut at = 0;
            for (length, hole) in whole {
                let end = at + usize::try_from(length).unwrap();
                prop_assert!(length >= 1 && length <= most);
                prop_assert!(!hole || content[at..end].iter().all(|byte| *byte == 0));
                at = end;
            }
        }
    }
}
