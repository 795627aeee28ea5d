//! Where gzip members begin and end.
//!
//! The new tar is never made as a whole: its bytes are described as [`Piece`]s of a spool (where the driver put headers
//! and content) and of memory, and grouped into [`Member`]s, each of which is then read, compressed and written.

use std::{iter::FusedIterator, ops::Range};

/// Bytes of headers in one member, at most. Members may be as long as they like, but whole members are held in memory
/// to be compressed, and a layer of a million empty files has 500 MB of headers.
const HEADER_RUN_BYTES: u64 = 512 << 10;

/// Bytes of the new tar, and where they are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Piece {
    /// In the driver's spool.
    Spooled {
        /// Where they begin there.
        offset: u64,
        /// How many.
        length: u64,
    },
    /// Made for the purpose.
    Made(Box<[u8]>),
}

impl Piece {
    fn length(&self) -> u64 {
        match self {
            Self::Spooled { length, .. } => *length,
            Self::Made(bytes) => bytes.len() as u64,
        }
    }
}

/// An entry of the new tar, in the order of the blob.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EntryBytes {
    /// Its headers.
    pub header: Piece,
    /// Its content, [padded](crate::tar::padding) to whole blocks; `None` where it has none.
    pub content: Option<Piece>,
    /// Bytes of its content, without padding.
    pub size: u64,
}

/// One gzip member, uncompressed: `[chunk of content][padding][headers of the entries that follow]`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Member {
    /// What it holds.
    pub pieces: Vec<Piece>,
    /// Bytes of all pieces together.
    pub length: u64,
    /// How many bytes of content it begins with; 0 where it begins with headers.
    pub chunk: u64,
    /// Where in the member each entry's headers are.
    pub headers: Vec<Range<u64>>,
}

impl Member {
    fn push(&mut self, piece: Piece) {
        self.length += piece.length();
        match (self.pieces.last_mut(), &piece) {
            (Some(Piece::Spooled { offset: last, length }), Piece::Spooled { offset, length: more })
                if *last + *length == *offset =>
            {
                *length += more;
            }
            _ => self.pieces.push(piece),
        }
    }
}

/// Groups the bytes of entries into members.
pub struct Members<I> {
    entries: I,
    chunk_bytes: u64,
    open: Member,
    /// An entry that waits for a member of its own.
    waiting: Option<EntryBytes>,
    /// What is left of the content of the entry before: with padding, and bytes without.
    content: Option<(Piece, u64)>,
}

impl<I: Iterator<Item = EntryBytes>> Members<I> {
    /// Takes entries in the order of the blob. Content is cut into chunks of `chunk_bytes` (at least 1).
    pub fn new(entries: I, chunk_bytes: u64) -> Self {
        Self { entries, chunk_bytes: chunk_bytes.max(1), open: Member::default(), waiting: None, content: None }
    }

    /// Begins a member with the next chunk of content, of which `left` bytes are to come.
    fn begin_chunk(&mut self, content: Piece, left: u64) {
        if left <= self.chunk_bytes {
            self.open.chunk = left;
            self.open.push(content);
            return;
        }
        let (chunk, rest) = split(content, self.chunk_bytes);
        self.open.chunk = self.chunk_bytes;
        self.open.push(chunk);
        self.content = rest.map(|rest| (rest, left - self.chunk_bytes));
    }
}

fn split(piece: Piece, at: u64) -> (Piece, Option<Piece>) {
    if piece.length() <= at {
        return (piece, None);
    }
    match piece {
        Piece::Spooled { offset, length } => (
            Piece::Spooled { offset, length: at },
            // `at` is below `length`, so the end of the piece is where it was.
            Some(Piece::Spooled { offset: offset + at, length: length - at }),
        ),
        Piece::Made(bytes) => {
            let (head, tail) = bytes.split_at(usize::try_from(at).unwrap_or(bytes.len()));
            (Piece::Made(head.into()), Some(Piece::Made(tail.into())))
        }
    }
}

impl<I: Iterator<Item = EntryBytes>> Iterator for Members<I> {
    type Item = Member;

    fn next(&mut self) -> Option<Member> {
        loop {
            if self.content.is_some() && self.open.length > 0 {
                return Some(std::mem::take(&mut self.open));
            }
            if let Some((content, left)) = self.content.take() {
                self.begin_chunk(content, left);
                continue;
            }
            let Some(entry) = self.waiting.take().or_else(|| self.entries.next()) else {
                return (self.open.length > 0).then(|| std::mem::take(&mut self.open));
            };
            let header = entry.header.length();
            let run = self.open.headers.last().map_or(0, |last| last.end - self.open.headers[0].start);
            if run > 0 && run + header > HEADER_RUN_BYTES {
                self.waiting = Some(entry);
                return Some(std::mem::take(&mut self.open));
            }
            self.open.headers.push(self.open.length..self.open.length + header);
            self.open.push(entry.header);
            self.content = entry.content.filter(|_| entry.size > 0).map(|content| (content, entry.size));
        }
    }
}

impl<I: Iterator<Item = EntryBytes>> FusedIterator for Members<I> where I: FusedIterator {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar;

    fn spooled(offset: u64, length: u64) -> Piece {
        Piece::Spooled { offset, length }
    }

    fn entry(offset: u64, size: u64) -> EntryBytes {
        let padded = size + tar::padding(size).len() as u64;
        EntryBytes { header: spooled(offset, 512), content: Some(spooled(offset + 512, padded)), size }
    }

    /// Returns each member as `chunk+headers=length`.
    fn members(entries: Vec<EntryBytes>, chunk: u64) -> Vec<String> {
        Members::new(entries.into_iter(), chunk)
            .map(|member| format!("{}+{}={}", member.chunk, member.headers.len(), member.length))
            .collect()
    }

    #[test]
    fn members_begin_at_content_and_chunks() {
        assert_eq!(members(vec![], 4), [""; 0]);
        assert_eq!(members(vec![entry(0, 0), entry(512, 0)], 4), ["0+2=1024"]);
        assert_eq!(members(vec![entry(0, 5), entry(1024, 0)], 9), ["0+1=512", "5+1=1024"]);
        assert_eq!(members(vec![entry(0, 9), entry(1024, 1)], 4), ["0+1=512", "4+0=4", "4+0=4", "1+1=1016", "1+0=512"]);
        assert_eq!(members(vec![entry(0, 8)], 4), ["0+1=512", "4+0=4", "4+0=508"]);
        assert_eq!(members(vec![entry(0, 512), entry(1024, 0)], 512), ["0+1=512", "512+1=1024"]);
    }

    #[test]
    fn neighbours_in_the_spool_are_one_piece() {
        let mut all = Members::new(vec![entry(0, 0), entry(512, 512), entry(1536, 0)].into_iter(), 4 << 20);
        assert_eq!(all.next().unwrap().pieces, [spooled(0, 1024)]);
        let second = all.next().unwrap();
        assert_eq!(second.pieces, [spooled(1024, 1024)]);
        assert_eq!(second.headers, std::slice::from_ref(&(512..1024)));
        assert!(all.next().is_none());
    }

    #[test]
    fn runs_of_headers_are_cut() {
        let count = HEADER_RUN_BYTES / 512 * 2 + 1;
        let all = members((0..count).map(|at| entry(at * 512, 0)).collect(), 4);
        assert_eq!(all, ["0+1024=524288", "0+1024=524288", "0+1=512"]);
    }

    #[test]
    fn made_content_is_cut_too() {
        let content = Some(Piece::Made((*b"abcde\0\0\0").into()));
        let made = EntryBytes { header: spooled(0, 512), content, size: 5 };
        let cut: Vec<Member> = Members::new(std::iter::once(made), 3).collect();
        assert_eq!(cut[1].pieces, [Piece::Made((*b"abc").into())]);
        assert_eq!(cut[2].pieces, [Piece::Made((*b"de\0\0\0").into())]);
        assert_eq!((cut[2].chunk, cut[2].length), (2, 5));
    }
}
