//! The table of contents, handed out entry by entry.
//!
//! Its reader calls back for each entry; the comparison wants to pull. So the reader runs on a thread of its own and is
//! at most a few entries ahead.

use std::{sync::mpsc, thread};

use loris_format::{
    estargz::toc::{self, Entry, EntryType, TocError},
    limits::Limits,
};

/// Entries that may wait.
const AHEAD: usize = 256;

/// The entries of a table of contents, in order.
pub(super) struct Entries<'json> {
    entries: mpsc::Receiver<Result<Entry<'json>, TocError>>,
    next: Option<Entry<'json>>,
    /// What stopped the reader, until it is told.
    failure: Option<TocError>,
}

impl<'json> Entries<'json> {
    /// Starts to read.
    pub(super) fn read<'scope>(
        scope: &'scope thread::Scope<'scope, '_>,
        json: &'json [u8],
        limits: &'scope Limits,
    ) -> Self
    where
        'json: 'scope,
    {
        let (sender, entries) = mpsc::sync_channel(AHEAD);
        scope.spawn(move || {
            let outcome = toc::read(json, limits, |_, entry| {
                // Where nobody takes them, the comparison has ended early.
                sender.send(Ok(entry)).map_err(|_| Stop::Unwanted)
            });
            if let Err(Stop::Invalid(error)) = outcome {
                let _ = sender.send(Err(error));
            }
        });
        Self { entries, next: None, failure: None }
    }

    fn fill(&mut self) {
        if self.next.is_none() && self.failure.is_none() {
            match self.entries.recv() {
                Ok(Ok(entry)) => self.next = Some(entry),
                Ok(Err(error)) => self.failure = Some(error),
                Err(mpsc::RecvError) => {}
            }
        }
    }

    /// Returns the next entry that is not a further chunk of a file.
    pub(super) fn entry(&mut self) -> Option<Entry<'json>> {
        self.fill();
        self.next.take_if(|entry| entry.entry_type != EntryType::Chunk)
    }

    /// Returns the next entry if it is a further chunk.
    pub(super) fn chunk(&mut self) -> Option<Entry<'json>> {
        self.fill();
        self.next.take_if(|entry| entry.entry_type == EntryType::Chunk)
    }

    /// Returns what stopped the reader, if anything did.
    pub(super) fn failure(&mut self) -> Option<TocError> {
        self.failure.take()
    }
}

enum Stop {
    Unwanted,
    Invalid(TocError),
}

impl From<TocError> for Stop {
    fn from(error: TocError) -> Self {
        Self::Invalid(error)
    }
}
