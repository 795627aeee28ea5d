//! Sparse files: maps that say which pieces of a file's content the archive holds; the rest reads as zeros.
//!
//! Four spellings of one map. Old GNU: binary entries in the header (type `S`) and in extension blocks behind it. PAX
//! 0.0 and 0.1: records. PAX 1.0: decimal lines at the start of the content. GNU tar manual, section "Storing Sparse
//! Files".

use super::header::{self, Block};

/// A piece of a file's content that the archive holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Segment {
    /// Where it stands in the file.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// A file's content in pieces: sorted, without overlap, none empty, all inside the file.
#[derive(Debug)]
pub(super) struct Map {
    segments: Vec<Segment>,
    size: u64,
}

impl Map {
    /// Checks a map. `size` is the file's, holes included.
    pub fn new(mut segments: Vec<Segment>, size: u64) -> Result<Self, &'static str> {
        let mut end = 0;
        for segment in &segments {
            if segment.offset < end {
                return Err("pieces overlap or are out of order");
            }
            end =
                segment.offset.checked_add(segment.length).filter(|&end| end <= size).ok_or("a piece lies outside")?;
        }
        // GNU tar marks the end of a file that ends in a hole with an empty piece.
        segments.retain(|segment| segment.length > 0);
        Ok(Self { segments, size })
    }

    /// Returns how many bytes the archive holds.
    pub fn stored(&self) -> u64 {
        self.segments.iter().map(|segment| segment.length).sum()
    }
}

/// What comes next in a sparse file's content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Piece {
    /// So many zeros that the archive does not hold.
    Hole(u64),
    /// So many bytes that it holds.
    Data(u64),
    /// Nothing.
    End,
}

/// A place in a sparse file's content.
#[derive(Debug)]
pub(super) struct Cursor {
    map: Map,
    next: usize,
    position: u64,
}

impl Cursor {
    pub fn new(map: Map) -> Self {
        Self { map, next: 0, position: 0 }
    }

    /// Returns the size of the file, holes included.
    pub fn size(&self) -> u64 {
        self.map.size
    }

    /// Returns what stands here.
    pub fn piece(&self) -> Piece {
        match self.map.segments.get(self.next) {
            Some(segment) if self.position < segment.offset => Piece::Hole(segment.offset - self.position),
            Some(segment) => Piece::Data(segment.offset + segment.length - self.position),
            None if self.position < self.map.size => Piece::Hole(self.map.size - self.position),
            None => Piece::End,
        }
    }

    /// Goes on by so many bytes, at most the length of the piece here.
    pub fn advance(&mut self, bytes: u64) {
        self.position += bytes;
        if self.map.segments.get(self.next).is_some_and(|segment| segment.offset + segment.length <= self.position) {
            self.next += 1;
        }
    }
}

/// Entries in the header of an old GNU sparse file, its size, and whether an extension block follows.
pub(super) fn old_header(block: &Block) -> Result<(Vec<Segment>, u64, bool), &'static str> {
    let mut segments = Vec::new();
    old_entries(&block[386..482], &mut segments)?;
    let size = field(&block[483..495])?;
    Ok((segments, size, block[482] != 0))
}

/// Takes the entries of an extension block, and says whether another one follows.
pub(super) fn old_extension(block: &Block, segments: &mut Vec<Segment>) -> Result<bool, &'static str> {
    old_entries(&block[..504], segments)?;
    Ok(block[504] != 0)
}

fn old_entries(entries: &[u8], segments: &mut Vec<Segment>) -> Result<(), &'static str> {
    for entry in entries.chunks_exact(24) {
        let (offset, length) = entry.split_at(12);
        // Unused entries, which only the last block has, are NULs.
        if offset[0] == 0 || length[0] == 0 {
            break;
        }
        segments.push(Segment { offset: field(offset)?, length: field(length)? });
    }
    Ok(())
}

fn field(bytes: &[u8]) -> Result<u64, &'static str> {
    header::number(bytes).ok().and_then(|number| u64::try_from(number).ok()).ok_or("not a number of bytes")
}

/// Reads the map at the start of a PAX 1.0 sparse file's content, block by block: the number of entries, then offset
/// and length of each, one number a line.
#[derive(Debug, Default)]
pub(super) struct LineParser {
    /// Entries announced, once that is known.
    count: Option<u64>,
    digits: u64,
    has_digits: bool,
    offset: Option<u64>,
    segments: Vec<Segment>,
}

impl LineParser {
    /// Takes the next block; `true` when the map is complete. What is behind it in its last block is padding.
    pub fn push(&mut self, block: &Block) -> Result<bool, &'static str> {
        for &byte in block {
            match byte {
                b'0'..=b'9' => {
                    let digits = self.digits.checked_mul(10).and_then(|ten| ten.checked_add(u64::from(byte - b'0')));
                    self.digits = digits.ok_or("a number is too large")?;
                    self.has_digits = true;
                }
                b'\n' if self.has_digits => {
                    let number = std::mem::take(&mut self.digits);
                    self.has_digits = false;
                    if self.take(number) {
                        return Ok(true);
                    }
                }
                _ => return Err("not a list of decimal lines"),
            }
        }
        Ok(false)
    }

    pub fn into_segments(self) -> Vec<Segment> {
        self.segments
    }

    fn take(&mut self, number: u64) -> bool {
        let count = match self.count {
            None => *self.count.insert(number),
            Some(count) => {
                match self.offset.take() {
                    None => self.offset = Some(number),
                    Some(offset) => self.segments.push(Segment { offset, length: number }),
                }
                count
            }
        };
        self.offset.is_none() && self.segments.len() as u64 >= count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar::BLOCK_BYTES;

    fn segments(pairs: &[(u64, u64)]) -> Vec<Segment> {
        pairs.iter().map(|&(offset, length)| Segment { offset, length }).collect()
    }

    #[test]
    fn maps_are_checked() {
        type Case<'a> = (&'a [(u64, u64)], u64, Result<u64, &'a str>);
        let cases: &[Case<'_>] = &[
            (&[], 0, Ok(0)),
            (&[], 10, Ok(0)),
            (&[(0, 10)], 10, Ok(10)),
            (&[(2, 3), (5, 0), (5, 2), (10, 0)], 10, Ok(5)),
            (&[(0, 0), (0, 1)], 1, Ok(1)),
            (&[(0, 11)], 10, Err("a piece lies outside")),
            (&[(11, 0)], 10, Err("a piece lies outside")),
            (&[(u64::MAX, 2)], 10, Err("a piece lies outside")),
            (&[(0, 5), (4, 1)], 10, Err("pieces overlap or are out of order")),
            (&[(5, 1), (0, 1)], 10, Err("pieces overlap or are out of order")),
        ];
        for (pairs, size, expected) in cases {
            assert_eq!(Map::new(segments(pairs), *size).map(|map| map.stored()), *expected, "{pairs:?} of {size}");
        }
    }

    #[test]
    fn a_cursor_tells_holes_from_data() {
        let mut cursor = Cursor::new(Map::new(segments(&[(2, 3), (5, 1), (8, 1)]), 10).unwrap());
        let mut pieces = Vec::new();
        loop {
            let piece = cursor.piece();
            pieces.push(piece);
            match piece {
                Piece::End => break,
                Piece::Hole(_) | Piece::Data(_) => cursor.advance(1),
            }
        }
        use Piece::{Data, End, Hole};
        let expected = [Hole(2), Hole(1), Data(3), Data(2), Data(1), Data(1), Hole(2), Hole(1), Data(1), Hole(1), End];
        assert_eq!(pieces, expected);
    }

    #[test]
    fn lines_may_be_cut_by_blocks() {
        let text = format!("2\n0\n1\n{}123\n7\n", "0".repeat(BLOCK_BYTES - 7));
        let mut bytes = text.into_bytes();
        bytes.resize(2 * BLOCK_BYTES, 0);
        let mut parser = LineParser::default();
        let blocks: Vec<&Block> = bytes.chunks_exact(BLOCK_BYTES).map(|block| block.try_into().unwrap()).collect();
        assert_eq!(parser.push(blocks[0]), Ok(false));
        assert_eq!(parser.push(blocks[1]), Ok(true));
        assert_eq!(parser.into_segments(), segments(&[(0, 1), (123, 7)]));
    }

    #[test]
    fn bad_lines_are_refused() {
        for (text, expected) in [
            ("0\n", Ok(true)),
            ("1\n5\n6\n", Ok(true)),
            ("1\n5\n", Err("not a list of decimal lines")),
            ("\n", Err("not a list of decimal lines")),
            ("-1\n", Err("not a list of decimal lines")),
            ("18446744073709551616\n", Err("a number is too large")),
        ] {
            let mut block = [0; BLOCK_BYTES];
            block[..text.len()].copy_from_slice(text.as_bytes());
            assert_eq!(LineParser::default().push(&block), expected, "{text:?}");
        }
    }
}
