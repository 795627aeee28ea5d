//! Inflates deflate streams block by block, from any bit on: what an index over a gzip layer is made and read with.
//!
//! The decoders elsewhere in this folder are faster and don't say where a block ends, or begin in the middle of a byte;
//! zlib's interface that does (`Z_BLOCK`, `inflatePrime`) needs `unsafe`, which this crate has none of. RFC 1951 is short.
//!
//! A stream is refused where zlib refuses it: codes that are over-subscribed or, but for a single one, incomplete; no code
//! for the end of a block; distances beyond what came before.

#![allow(clippy::cast_possible_truncation)] // bits taken out of a wider number, masked to what fits

/// What a match may reach back: the size of a window.
pub(crate) const WINDOW_BYTES: usize = 32 << 10;
/// The longest match.
const LONGEST_MATCH: usize = 258;
/// Room behind the output that a copy may write before it is cut.
const SLACK_BYTES: usize = 16;
/// How much room an output needs to have for [`Inflater::run`] to go on.
pub(crate) const ROOM_BYTES: usize = LONGEST_MATCH + SLACK_BYTES;
/// How much input must be there, where there is more to come, for [`Inflater::run`] to go on: the longest description of a
/// block's codes has 570 bytes.
pub(crate) const AHEAD_BYTES: usize = 1 << 10;
/// Bytes that a symbol with its match and the bit buffer may take.
const SYMBOL_BYTES: usize = 16;

const LITERAL_BITS: u32 = 11;
const DISTANCE_BITS: u32 = 8;
const CODE_BITS: u32 = 7;
const LONGEST_CODE: usize = 15;

/// Why [`Inflater::run`] came back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stop {
    /// A block has ended, and another follows: all of its output is there, and nothing of the next one was read.
    BlockEnd,
    /// The last block has ended.
    StreamEnd,
    /// There are fewer than [`AHEAD_BYTES`] of input.
    Input,
    /// There is less than [`ROOM_BYTES`] of room.
    Output,
}

/// Input and how far it was taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Input<'a> {
    /// The bytes that are here.
    pub bytes: &'a [u8],
    /// How many of them are in the bit buffer or used up.
    pub at: usize,
    /// Whether nothing comes behind them.
    pub is_last: bool,
}

impl Input<'_> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Header,
    Stored(usize),
    Codes,
    Ended,
}

/// A decoder of one stream after the other.
pub(crate) struct Inflater {
    bits: u64,
    count: u32,
    state: State,
    is_last_block: bool,
    /// Whether the tables are those that the format fixes.
    is_fixed: bool,
    literals: Table,
    distances: Table,
}

const CUT_OFF: &str = "ends in the middle of a block";

impl Inflater {
    pub(crate) fn new() -> Self {
        Self {
            bits: 0,
            count: 0,
            state: State::Header,
            is_last_block: false,
            is_fixed: false,
            literals: Table::default(),
            distances: Table::default(),
        }
    }

    /// Begins another stream, with the `count` upper bits of a byte (0 to 7) that precede the input.
    pub(crate) fn begin(&mut self, byte: u8, count: u8) {
        let count = u32::from(count.min(7));
        (self.bits, self.count) = if count == 0 { (0, 0) } else { (u64::from(byte >> (8 - count)), count) };
        self.state = State::Header;
        self.is_last_block = false;
    }

    /// Gives whole bytes in the bit buffer back to the input, and returns how many bits of the byte before are unused.
    pub(crate) fn settle(&mut self, input: &mut Input<'_>) -> u8 {
        let bytes = (self.count / 8) as usize;
        input.at -= bytes.min(input.at);
        self.count %= 8;
        self.bits &= (1 << self.count) - 1;
        // Below 8.
        u8::try_from(self.count).unwrap_or_default()
    }

    /// Throws away what is left of a byte: what follows a stream begins at the next.
    pub(crate) fn align(&mut self) {
        (self.bits, self.count) = (0, 0);
    }

    /// Decodes behind `output[..filled]`, whose end is what matches reach back into, until something is to be done.
    pub(crate) fn run(
        &mut self,
        input: &mut Input<'_>,
        output: &mut [u8],
        filled: &mut usize,
    ) -> Result<Stop, &'static str> {
        loop {
            match self.state {
                State::Header => {
                    if !input.is_last && input.left() < AHEAD_BYTES {
                        return Ok(Stop::Input);
                    }
                    self.header(input)?;
                }
                State::Stored(left) => {
                    let room = output.len().saturating_sub(SLACK_BYTES).saturating_sub(*filled);
                    let length = left.min(input.left()).min(room);
                    output[*filled..*filled + length].copy_from_slice(&input.bytes[input.at..input.at + length]);
                    *filled += length;
                    input.at += length;
                    if length == left {
                        return Ok(self.end_block());
                    }
                    self.state = State::Stored(left - length);
                    if input.left() > 0 {
                        return Ok(Stop::Output);
                    }
                    return if input.is_last { Err(CUT_OFF) } else { Ok(Stop::Input) };
                }
                State::Codes => {
                    if let Some(stop) = self.codes(input, output, filled)? {
                        return Ok(stop);
                    }
                    return Ok(self.end_block());
                }
                State::Ended => return Ok(Stop::StreamEnd),
            }
        }
    }

    fn end_block(&mut self) -> Stop {
        if self.is_last_block {
            self.state = State::Ended;
            return Stop::StreamEnd;
        }
        self.state = State::Header;
        Stop::BlockEnd
    }

    fn header(&mut self, input: &mut Input<'_>) -> Result<(), &'static str> {
        self.is_last_block = self.take(input, 1)? == 1;
        self.state = match self.take(input, 2)? {
            0 => {
                self.settle(input);
                self.align();
                let header = input.bytes.get(input.at..input.at + 4).ok_or(CUT_OFF)?;
                let (length, inverse) = ([header[0], header[1]], [!header[2], !header[3]]);
                if length != inverse {
                    return Err("a stored block's length is damaged");
                }
                input.at += 4;
                State::Stored(usize::from(u16::from_le_bytes(length)))
            }
            1 => {
                self.fixed()?;
                State::Codes
            }
            2 => {
                self.dynamic(input)?;
                State::Codes
            }
            _ => return Err("a block is of no known type"),
        };
        Ok(())
    }

    /// Makes the tables that the format fixes. An empty block has ten bits: not anew for each of them.
    fn fixed(&mut self) -> Result<(), &'static str> {
        if self.is_fixed {
            return Ok(());
        }
        let mut lengths = [8; 288];
        lengths[144..256].fill(9);
        lengths[256..280].fill(7);
        self.literals.build(&lengths, LITERAL_BITS, Alphabet::Literals)?;
        self.distances.build(&[5; 32], DISTANCE_BITS, Alphabet::Distances)?;
        self.is_fixed = true;
        Ok(())
    }

    fn dynamic(&mut self, input: &mut Input<'_>) -> Result<(), &'static str> {
        const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
        let literals = self.take(input, 5)? as usize + 257;
        let distances = self.take(input, 5)? as usize + 1;
        let codes = self.take(input, 4)? as usize + 4;
        if literals > 286 || distances > 30 {
            return Err("a block has too many codes");
        }
        let mut lengths = [0_u8; 19];
        for &place in &ORDER[..codes] {
            lengths[place] = self.take(input, 3)? as u8;
        }
        // The tables are made anew anyway.
        self.is_fixed = false;
        self.distances.build(&lengths, CODE_BITS, Alphabet::Lengths)?;
        let mut all = [0_u8; 286 + 30];
        let mut at = 0;
        while at < literals + distances {
            self.refill(input);
            let entry = self.distances.find(self.bits, CODE_BITS);
            self.consume(entry, input)?;
            let symbol = entry.base();
            if symbol < 16 {
                all[at] = symbol as u8;
                at += 1;
                continue;
            }
            let (value, count) = match symbol {
                16 if at == 0 => return Err("a block repeats a code length before the first"),
                16 => (all[at - 1], 3 + self.take(input, 2)? as usize),
                17 => (0, 3 + self.take(input, 3)? as usize),
                _ => (0, 11 + self.take(input, 7)? as usize),
            };
            let end = at + count;
            all.get_mut(at..end)
                .filter(|_| end <= literals + distances)
                .ok_or("a block has too many code lengths")?
                .fill(value);
            at = end;
        }
        if all[256] == 0 {
            return Err("a block has no code for its end");
        }
        self.literals.build(&all[..literals], LITERAL_BITS, Alphabet::Literals)?;
        self.distances.build(&all[literals..literals + distances], DISTANCE_BITS, Alphabet::Distances)
    }

    /// Decodes symbols; `None` at the end of the block.
    fn codes(
        &mut self,
        input: &mut Input<'_>,
        output: &mut [u8],
        filled: &mut usize,
    ) -> Result<Option<Stop>, &'static str> {
        let most = output.len().saturating_sub(ROOM_BYTES);
        let fast_until = input.bytes.len().saturating_sub(SYMBOL_BYTES);
        loop {
            if *filled > most {
                return Ok(Some(Stop::Output));
            }
            if input.at > fast_until && !input.is_last {
                return Ok(Some(Stop::Input));
            }
            self.refill(input);
            // 56 bits are here, but at the end: two literals have 30 at most, a match with its distance 48.
            let mut entry = self.literals.find(self.bits, LITERAL_BITS);
            if entry.is_literal() {
                self.consume(entry, input)?;
                output[*filled] = entry.base() as u8;
                *filled += 1;
                entry = self.literals.find(self.bits, LITERAL_BITS);
                if entry.is_literal() {
                    self.consume(entry, input)?;
                    output[*filled] = entry.base() as u8;
                    *filled += 1;
                    continue;
                }
                if self.count < 48 {
                    self.refill(input);
                }
            }
            self.consume(entry, input)?;
            if entry.is_end() {
                return Ok(None);
            }
            let length = entry.base() as usize + self.extra(entry)?;
            let entry = self.distances.find(self.bits, DISTANCE_BITS);
            self.consume(entry, input)?;
            let distance = entry.base() as usize + self.extra(entry)?;
            if distance > *filled {
                return Err("a match reaches back beyond the beginning");
            }
            copy(output, *filled, distance, length);
            *filled += length;
        }
    }

    #[inline(always)]
    fn refill(&mut self, input: &mut Input<'_>) {
        if let Some(next) = input.bytes.get(input.at..input.at + 8) {
            let next = u64::from_le_bytes(next.try_into().unwrap_or_default());
            self.bits |= next << self.count;
            input.at += ((63 - self.count) / 8) as usize;
            self.count |= 56;
            // Above `count`, there may be bits of a byte that is not counted: they come again.
            self.bits &= (1 << self.count) - 1;
        } else {
            while self.count <= 56 && input.at < input.bytes.len() {
                self.bits |= u64::from(input.bytes[input.at]) << self.count;
                self.count += 8;
                input.at += 1;
            }
        }
    }

    fn take(&mut self, input: &mut Input<'_>, count: u32) -> Result<u32, &'static str> {
        if self.count < count {
            self.refill(input);
        }
        if self.count < count {
            return Err(CUT_OFF);
        }
        let value = self.bits & ((1 << count) - 1);
        self.bits >>= count;
        self.count -= count;
        // At most 7 bits.
        Ok(value as u32)
    }

    #[inline(always)]
    fn consume(&mut self, entry: Entry, input: &Input<'_>) -> Result<(), &'static str> {
        let length = entry.length();
        if entry.is_bad() || self.count < length {
            // What is missing reads as zeros, which may be no code.
            return Err(if self.count < 15 && input.left() == 0 { CUT_OFF } else { "there is no such code" });
        }
        self.bits >>= length;
        self.count -= length;
        Ok(())
    }

    #[inline(always)]
    fn extra(&mut self, entry: Entry) -> Result<usize, &'static str> {
        let count = entry.extra();
        if self.count < count {
            return Err(CUT_OFF);
        }
        let value = self.bits & ((1 << count) - 1);
        self.bits >>= count;
        self.count -= count;
        // At most 13 bits.
        Ok(value as usize)
    }
}

/// Repeats what stands `distance` before `at`; there is room for [`SLACK_BYTES`] more than `length`.
#[inline(always)]
fn copy(output: &mut [u8], at: usize, distance: usize, length: usize) {
    const STEP: usize = 16;
    let from = at - distance;
    if distance >= STEP {
        let mut done = 0;
        while done < length {
            let piece: [u8; STEP] = output[from + done..from + done + STEP].try_into().unwrap_or_default();
            output[at + done..at + done + STEP].copy_from_slice(&piece);
            done += STEP;
        }
    } else if distance == 1 {
        let byte = output[from];
        output[at..at + length].fill(byte);
    } else {
        let output = &mut output[from..at + length];
        for place in 0..length {
            output[distance + place] = output[place];
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Alphabet {
    Literals,
    Distances,
    Lengths,
}

/// What a code means: `base` (16 bits), flags (3), bits behind it (4), bits of its own (5).
#[derive(Clone, Copy, Default, Debug)]
struct Entry(u32);

impl Entry {
    const LITERAL: u32 = 1 << 12;
    const END: u32 = 1 << 13;
    const BAD: u32 = 1 << 14;
    const MORE: u32 = 1 << 15;

    fn length(self) -> u32 {
        self.0 & 0xf
    }

    fn extra(self) -> u32 {
        self.0 >> 4 & 0xf
    }

    fn base(self) -> u32 {
        self.0 >> 16
    }

    fn is_literal(self) -> bool {
        self.0 & Self::LITERAL != 0
    }

    fn is_end(self) -> bool {
        self.0 & Self::END != 0
    }

    fn is_bad(self) -> bool {
        self.0 & Self::BAD != 0
    }

    /// A code's meaning, without its length.
    fn of(symbol: u32, alphabet: Alphabet) -> Self {
        const LENGTHS: [(u32, u32); 29] = bases::<29>(3, 4, 8);
        const DISTANCES: [(u32, u32); 30] = bases::<30>(1, 2, 4);
        let with_extra = |(base, extra): (u32, u32)| base << 16 | extra << 4;
        Self(match (alphabet, symbol) {
            (Alphabet::Lengths, _) => symbol << 16,
            (Alphabet::Distances, 0..30) => with_extra(DISTANCES[symbol as usize]),
            (Alphabet::Literals, 0..256) => symbol << 16 | Self::LITERAL,
            (Alphabet::Literals, 256) => Self::END,
            // The longest match has a code of its own.
            (Alphabet::Literals, 285) => 258 << 16,
            (Alphabet::Literals, 257..285) => with_extra(LENGTHS[symbol as usize - 257]),
            _ => Self::BAD,
        })
    }
}

/// Returns the first value and the extra bits of each code: a few codes without, then `group` codes for each number of
/// bits.
const fn bases<const N: usize>(first: u32, group: usize, plain: usize) -> [(u32, u32); N] {
    let mut bases = [(0, 0); N];
    let (mut base, mut code) = (first, 0);
    while code < N {
        let extra = if code < plain { 0 } else { ((code - plain) / group + 1) as u32 };
        bases[code] = (base, extra);
        base += 1 << extra;
        code += 1;
    }
    bases
}

/// Codes by the bits that stand next: a first table, and further ones for those that are longer.
#[derive(Default)]
struct Table(Vec<Entry>);

impl Table {
    #[inline(always)]
    fn find(&self, bits: u64, first_bits: u32) -> Entry {
        let entry = self.0[(bits & ((1 << first_bits) - 1)) as usize];
        if entry.0 & Entry::MORE == 0 {
            return entry;
        }
        let place = (bits >> first_bits) & ((1 << entry.extra()) - 1);
        self.0[entry.base() as usize + place as usize]
    }

    /// Makes the table of a canonical code, whose lengths are given by symbol.
    fn build(&mut self, lengths: &[u8], first_bits: u32, alphabet: Alphabet) -> Result<(), &'static str> {
        let mut counts = [0_u32; LONGEST_CODE + 1];
        for &length in lengths {
            counts[usize::from(length)] += 1;
        }
        counts[0] = 0;
        self.check(&counts, alphabet)?;
        let mut next = [0_u32; LONGEST_CODE + 2];
        for length in 1..=LONGEST_CODE {
            next[length + 1] = (next[length] + counts[length]) << 1;
        }
        self.0.clear();
        self.0.resize(1 << first_bits, Entry(Entry::BAD));
        let codes = (0_u32..).zip(lengths).filter(|(_, length)| **length > 0).map(|(symbol, &length)| {
            let length = u32::from(length);
            let code = next[length as usize];
            next[length as usize] += 1;
            (symbol, length, code.reverse_bits() >> (32 - length))
        });
        let mut long: Vec<(u32, u32, u32)> = Vec::new();
        for (symbol, length, code) in codes {
            if length > first_bits {
                long.push((symbol, length, code));
                continue;
            }
            let entry = Entry(Entry::of(symbol, alphabet).0 | length);
            for place in (code as usize..1 << first_bits).step_by(1 << length) {
                self.0[place] = entry;
            }
        }
        self.build_long(&long, first_bits, alphabet);
        Ok(())
    }

    fn build_long(&mut self, codes: &[(u32, u32, u32)], first_bits: u32, alphabet: Alphabet) {
        let mask = (1 << first_bits) - 1;
        let mut most = [0_u8; 1 << LITERAL_BITS];
        for &(_, length, code) in codes {
            let most = &mut most[(code & mask) as usize];
            *most = (*most).max((length - first_bits) as u8);
        }
        for &(symbol, length, code) in codes {
            let prefix = (code & mask) as usize;
            let bits = u32::from(most[prefix]);
            if self.0[prefix].0 & Entry::MORE == 0 {
                // There are fewer than 2^16 entries: at most 286 tables of 16.
                self.0[prefix] = Entry((self.0.len() as u32) << 16 | Entry::MORE | bits << 4);
                self.0.resize(self.0.len() + (1 << bits), Entry(Entry::BAD));
            }
            let start = self.0[prefix].base() as usize;
            let entry = Entry(Entry::of(symbol, alphabet).0 | length);
            for place in ((code >> first_bits) as usize..1 << bits).step_by(1 << (length - first_bits)) {
                self.0[start + place] = entry;
            }
        }
    }

    fn check(&self, counts: &[u32; LONGEST_CODE + 1], alphabet: Alphabet) -> Result<(), &'static str> {
        let mut left = 1_i64;
        for &count in &counts[1..] {
            left = (left << 1) - i64::from(count);
            if left < 0 {
                return Err("a block's codes are over-subscribed");
            }
        }
        let longest = counts.iter().rposition(|&count| count > 0).unwrap_or(0);
        // None at all fails where one is needed.
        if left > 0 && longest > 0 && (alphabet == Alphabet::Lengths || longest != 1) {
            return Err("a block's codes are incomplete");
        }
        Ok(())
    }
}
