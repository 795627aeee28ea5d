//! The two operations on whose order it depends what a power failure leaves: writing, and waiting for the disk.
//!
//! Everything that the store writes into data files and bitmaps goes through here, so that tests can record it and replay
//! it cut off at any point. Nothing here knows what is written.

use std::{fs::File, io, os::unix::fs::FileExt as _};

/// Does what `pwrite(2)` does, all of it.
pub(crate) fn write_all_at(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    #[cfg(test)]
    recording::note(file, |inode| recording::Operation::Write { inode, at, bytes: bytes.to_vec() });
    file.write_all_at(bytes, at)
}

/// Waits until all that was written to the file is on the disk.
pub(crate) fn sync_data(file: &File) -> io::Result<()> {
    #[cfg(test)]
    recording::note(file, |inode| recording::Operation::Sync { inode });
    file.sync_data()
}

#[cfg(test)]
pub(crate) mod recording {
    use std::{cell::RefCell, fs::File, os::unix::fs::MetadataExt as _};

    #[derive(Clone, Debug)]
    pub(crate) enum Operation {
        Write { inode: u64, at: u64, bytes: Vec<u8> },
        Sync { inode: u64 },
    }

    thread_local! {
        static RECORD: RefCell<Option<Vec<Operation>>> = const { RefCell::new(None) };
    }

    /// Records what this thread does meanwhile.
    pub(crate) fn record(work: impl FnOnce()) -> Vec<Operation> {
        RECORD.with_borrow_mut(|record| *record = Some(Vec::new()));
        work();
        RECORD.with_borrow_mut(Option::take).unwrap_or_default()
    }

    pub(super) fn note(file: &File, operation: impl FnOnce(u64) -> Operation) {
        RECORD.with_borrow_mut(|record| {
            if let Some(record) = record {
                record.push(operation(file.metadata().unwrap().ino()));
            }
        });
    }
}
