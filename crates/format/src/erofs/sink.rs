//! Bytes on their way out, which know how far they have come.

use std::io::{self, Write};

use super::disk::BLOCK;

/// Bytes that are written at once.
const PIECE: usize = 128 << 10;

/// A writer for small pieces.
pub(super) struct Sink<'a> {
    output: &'a mut dyn Write,
    waiting: Vec<u8>,
    written: u64,
}

impl<'a> Sink<'a> {
    pub(super) fn new(output: &'a mut dyn Write) -> Self {
        Self { output, waiting: Vec::with_capacity(PIECE + PIECE / 2), written: 0 }
    }

    /// How many bytes were put.
    pub(super) fn position(&self) -> u64 {
        self.written + self.waiting.len() as u64
    }

    pub(super) fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= PIECE { self.hand_over() } else { Ok(()) }
    }

    /// Puts zeros up to a position, which must not be passed already.
    pub(super) fn pad_to(&mut self, position: u64) -> io::Result<()> {
        debug_assert!(position >= self.position(), "{position} lies behind {}", self.position());
        let mut missing = position.saturating_sub(self.position());
        while missing > 0 {
            let some = missing.min(BLOCK);
            self.put(&[0; BLOCK as usize][..some as usize])?;
            missing -= some;
        }
        Ok(())
    }

    /// Puts zeros up to a multiple of `unit`.
    pub(super) fn align(&mut self, unit: u64) -> io::Result<()> {
        self.pad_to(self.position().next_multiple_of(unit))
    }

    /// Hands over what is left, and returns how many bytes were put in all.
    pub(super) fn finish(mut self) -> io::Result<u64> {
        self.hand_over()?;
        Ok(self.written)
    }

    fn hand_over(&mut self) -> io::Result<()> {
        self.output.write_all(&self.waiting)?;
        self.written += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }
}
