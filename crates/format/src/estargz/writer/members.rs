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
    /// Whether a member must begin with its content, whatever is in the one before: readers prefetch up to the landmark's.
    pub begins_member: bool,
}

/// One gzip member, uncompressed: `[chunk of content][padding][headers of the entries that follow]`, once or repeatedly.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Member {
    /// What it holds.
    pub pieces: Vec<Piece>,
    /// Bytes of all pieces together.
    pub length: u64,
    /// Where in the member chunks of content are: one, with which it begins, or none, or as many as were asked for.
    pub chunks: Vec<Range<u64>>,
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
    /// A member is not ended by content before it has so many bytes.
    least_bytes: u64,
    open: Member,
    /// An entry that waits for a member of its own.
    waiting: Option<EntryBytes>,
    /// What is left of the content of the entry before.
    content: Option<Content>,
}

struct Content {
    /// With padding.
    piece: Piece,
    /// Bytes without padding.
    left: u64,
    begins_member: bool,
}

impl<I: Iterator<Item = EntryBytes>> Members<I> {
    /// Takes entries in the order of the blob. Content is cut into chunks of `chunk_bytes` (at least 1).
    pub fn new(entries: I, chunk_bytes: u64) -> Self {
        Self {
            entries,
            chunk_bytes: chunk_bytes.max(1),
            least_bytes: 0,
            open: Member::default(),
            waiting: None,
            content: None,
        }
    }

    /// Puts chunks into the member before them while that has fewer than `bytes`, and has no more with them than `bytes` or
    /// than a chunk may have: whoever reads or makes the layer holds a whole member in memory.
    #[must_use]
    pub fn with_least_bytes(self, bytes: u64) -> Self {
        Self { least_bytes: bytes, ..self }
    }

    /// Says whether the next chunk of content goes where the one before went.
    fn joins(&self, content: &Content) -> bool {
        let length = self.open.length + content.left.min(self.chunk_bytes);
        self.open.length < self.least_bytes
            && length <= self.least_bytes.max(self.chunk_bytes)
            && !content.begins_member
    }

    /// Puts the next chunk of content into the open member.
    fn add_chunk(&mut self, content: Content) {
        let Content { piece, left, .. } = content;
        let start = self.open.length;
        self.open.chunks.push(start..start + left.min(self.chunk_bytes));
        if left <= self.chunk_bytes {
            self.open.push(piece);
            return;
        }
        let (chunk, rest) = split(piece, self.chunk_bytes);
        self.open.push(chunk);
        self.content = rest.map(|piece| Content { piece, left: left - self.chunk_bytes, begins_member: false });
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
            if let Some(content) = &self.content
                && self.open.length > 0
                && !self.joins(content)
            {
                return Some(std::mem::take(&mut self.open));
            }
            if let Some(content) = self.content.take() {
                self.add_chunk(content);
                continue;
            }
            let Some(entry) = self.waiting.take().or_else(|| self.entries.next()) else {
                return (self.open.length > 0).then(|| std::mem::take(&mut self.open));
            };
            let header = entry.header.length();
            let behind = self.open.chunks.last().map_or(0, |chunk| chunk.end);
            let first = self.open.headers.iter().rev().take_while(|header| header.start >= behind).last();
            let run = first.map_or(0, |first| self.open.length - first.start);
            if run > 0 && run + header > HEADER_RUN_BYTES {
                self.waiting = Some(entry);
                return Some(std::mem::take(&mut self.open));
            }
            self.open.headers.push(self.open.length..self.open.length + header);
            self.open.push(entry.header);
            let EntryBytes { content, size, begins_member, .. } = entry;
            self.content = content.filter(|_| size > 0).map(|piece| Content { piece, left: size, begins_member });
        }
    }
}

impl<I: Iterator<Item = EntryBytes>> FusedIterator for Members<I> where I: FusedIterator {}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "members often have one chunk")]
mod tests {
    use super::*;
    use crate::tar;

    fn spooled(offset: u64, length: u64) -> Piece {
        Piece::Spooled { offset, length }
    }

    fn entry(offset: u64, size: u64) -> EntryBytes {
        let padded = size + tar::padding(size).len() as u64;
        EntryBytes {
            header: spooled(offset, 512),
            content: Some(spooled(offset + 512, padded)),
            size,
            begins_member: false,
        }
    }

    /// Returns each member as `chunk+headers=length`.
    fn members(entries: Vec<EntryBytes>, chunk: u64) -> Vec<String> {
        Members::new(entries.into_iter(), chunk)
            .map(|member| {
                assert!(member.chunks.len() <= 1 && member.chunks.iter().all(|chunk| chunk.start == 0));
                let chunk = member.chunks.first().map_or(0, |chunk| chunk.end);
                format!("{chunk}+{}={}", member.headers.len(), member.length)
            })
            .collect()
    }

    #[test]
    fn members_are_filled_up_to_what_is_asked_for() {
        let joined = |entries: Vec<EntryBytes>, chunk, least| -> Vec<(Vec<Range<u64>>, usize, u64)> {
            Members::new(entries.into_iter(), chunk)
                .with_least_bytes(least)
                .map(|member| (member.chunks, member.headers.len(), member.length))
                .collect()
        };
        let three = || vec![entry(0, 10), entry(1024, 20), entry(2048, 30)];
        // The second file comes at 1536, the third at 2560.
        assert_eq!(joined(three(), 4096, 4096), [(vec![512..522, 1536..1556, 2560..2590], 3, 3072)]);
        assert_eq!(joined(three(), 4096, 1536), [(vec![512..522], 2, 1536), (vec![0..20, 1024..1054], 1, 1536)]);
        assert_eq!(joined(three(), 4096, 1), joined(three(), 4096, 0));
        assert_eq!(
            joined(three(), 4096, 513),
            [(vec![512..522], 2, 1536), (vec![0..20], 1, 1024), (vec![0..30], 0, 512)]
        );
        // Neither least nor chunk may be passed.
        assert_eq!(
            joined(three(), 520, 520),
            [(vec![], 1, 512), (vec![0..10], 1, 1024), (vec![0..20], 1, 1024), (vec![0..30], 0, 512)]
        );
        // Chunks of one file share members, too.
        assert_eq!(joined(vec![entry(0, 9)], 4, 600), [(vec![512..516, 516..520, 520..521], 1, 1024)]);
        let mut landmark = three();
        landmark[1].begins_member = true;
        assert_eq!(joined(landmark, 4096, 4096), [(vec![512..522], 2, 1536), (vec![0..20, 1024..1054], 1, 1536)]);
        // Runs of headers are cut in them, too.
        let empty = (0..3000).map(|at| entry(at * 512, 0)).collect();
        assert!(joined(empty, 4 << 20, 64 << 20).iter().all(|(_, headers, _)| *headers <= 1024));
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
        let made = EntryBytes { header: spooled(0, 512), content, size: 5, begins_member: false };
        let cut: Vec<Member> = Members::new(std::iter::once(made), 3).collect();
        assert_eq!(cut[1].pieces, [Piece::Made((*b"abc").into())]);
        assert_eq!(cut[2].pieces, [Piece::Made((*b"de\0\0\0").into())]);
        assert_eq!((&cut[2].chunks[..], cut[2].length), (&[0..2][..], 5));
    }
}
