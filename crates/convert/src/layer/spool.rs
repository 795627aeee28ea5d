//! A file without a name: what does not fit into memory, gone with the process whatever happens.

use std::{
    fs::File,
    io::{self, Read, Write as _},
    os::unix::fs::FileExt as _,
    path::Path,
};

/// Bytes that are gathered before they are written.
const BUFFER_BYTES: usize = 256 << 10;

/// Appends to the file.
pub(super) struct SpoolWriter {
    file: File,
    buffer: Box<[u8]>,
    filled: usize,
    length: u64,
}

impl SpoolWriter {
    pub(super) fn create(directory: &Path) -> io::Result<Self> {
        let file = tempfile::tempfile_in(directory)?;
        Ok(Self { file, buffer: vec![0; BUFFER_BYTES].into(), filled: 0, length: 0 })
    }

    /// Returns how many bytes were appended.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.length += bytes.len() as u64;
        if self.filled + bytes.len() > BUFFER_BYTES {
            self.flush()?;
        }
        if bytes.len() >= BUFFER_BYTES {
            return self.file.write_all(bytes);
        }
        self.buffer[self.filled..self.filled + bytes.len()].copy_from_slice(bytes);
        self.filled += bytes.len();
        Ok(())
    }

    /// Appends everything that `source` has and returns how much that was. An error of the source is the inner one.
    pub(super) fn append_all(&mut self, source: &mut impl Read) -> io::Result<io::Result<u64>> {
        let begin = self.length;
        loop {
            if self.filled == BUFFER_BYTES {
                self.flush()?;
            }
            match source.read(&mut self.buffer[self.filled..]) {
                Ok(0) => return Ok(Ok(self.length - begin)),
                Ok(read) => {
                    self.filled += read;
                    self.length += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Ok(Err(error)),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all(&self.buffer[..self.filled])?;
        self.filled = 0;
        Ok(())
    }

    /// Ends writing.
    pub(super) fn finish(mut self) -> io::Result<Spool> {
        self.flush()?;
        Ok(Spool { file: self.file })
    }
}

/// A file that is complete; read by several threads at once.
pub(super) struct Spool {
    file: File,
}

impl Spool {
    /// Appends `length` bytes from `offset` to `out`.
    pub(super) fn read(&self, offset: u64, length: u64, out: &mut Vec<u8>) -> io::Result<()> {
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let begin = out.len();
        out.resize(begin + length, 0);
        self.file.read_exact_at(&mut out[begin..], offset)
    }

    /// Hands the first `length` bytes to `take`, in pieces of equal size but the last.
    pub(super) fn read_pieces<E>(
        &self,
        length: u64,
        wrap: impl Fn(io::Error) -> E,
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut done = 0;
        while done < length {
            let piece = usize::try_from(length - done).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
            self.file.read_exact_at(&mut buffer[..piece], done).map_err(&wrap)?;
            take(&buffer[..piece])?;
            done += piece as u64;
        }
        Ok(())
    }
}

/// A spool read from its beginning.
pub(super) struct SpoolReader<'a> {
    spool: &'a Spool,
    at: u64,
    length: u64,
}

impl<'a> SpoolReader<'a> {
    pub(super) fn new(spool: &'a Spool, length: u64) -> Self {
        Self { spool, at: 0, length }
    }
}

impl Read for SpoolReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.length - self.at).unwrap_or(buffer.len()).min(buffer.len());
        let read = self.spool.file.read_at(&mut buffer[..most], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_appended_is_read() {
        let mut spool = SpoolWriter::create(&std::env::temp_dir()).unwrap();
        let large: Vec<u8> = (0..BUFFER_BYTES * 3 + 5).map(|at| (at % 251) as u8).collect();
        spool.append(b"small").unwrap();
        spool.append(&large).unwrap();
        assert_eq!(spool.append_all(&mut large.as_slice()).unwrap().unwrap(), large.len() as u64);
        spool.append(b"end").unwrap();
        let want = [b"small".as_slice(), &large, &large, b"end"].concat();
        assert_eq!(spool.length(), want.len() as u64);
        let spool = spool.finish().unwrap();
        let mut found = Vec::new();
        spool.read(0, 100, &mut found).unwrap();
        spool.read(100, want.len() as u64 - 100, &mut found).unwrap();
        assert!(found == want);
        let mut pieces = Vec::new();
        let length = want.len() as u64 - 3;
        let mut take = |piece: &[u8]| -> io::Result<()> {
            pieces.extend_from_slice(piece);
            Ok(())
        };
        spool.read_pieces(length, |error| error, &mut take).unwrap();
        assert!(pieces == want[..want.len() - 3]);
        assert!(spool.read(1, want.len() as u64, &mut found).is_err());
    }

    #[test]
    fn an_error_of_the_source_is_told_apart() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("broken"))
            }
        }
        let mut spool = SpoolWriter::create(&std::env::temp_dir()).unwrap();
        assert!(spool.append_all(&mut Broken).unwrap().is_err());
        assert_eq!(spool.length(), 0);
    }
}
