//! Memory that outlives its process: which events are unanswered, and which mounts are up.
//!
//! The kernel writes an event straight into a slot of memory that the keeper holds too, so that there is no moment at
//! which it is known only to a process that may be killed. A slot is free while its first word is zero.
//!
//! ```text
//!  0        magic, version, slots, generation, last generation that was given out
//!  64..     watch descriptors of mounts, one i32 each, 0 for none        MOUNTS of them
//!  4096..   slots of 128 bytes: the event as the kernel writes it (88), the file's key (8)
//! ```
//!
//! The order in which a slot is used is what makes a restart safe; `model` tests all of it:
//! 1. the kernel fills the slot (and gives its event a descriptor number that no open file of this process has);
//! 2. the file's key is noted;
//! 3. the event is answered;
//! 4. the slot is cleared;
//! 5. the descriptor is closed, after which the kernel may give its number to another event.
//!
//! What this module must not know: what an event means.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering},
};

use rustix::{
    fs::{MemfdFlags, SealFlags},
    mm::{MapFlags, ProtFlags},
};

const MAGIC: u64 = u64::from_le_bytes(*b"LORISJNL");
/// Version of the layout. Only processes of one machine and one boot share it.
const VERSION: u32 = 1;
/// Mounts that one pager can have up at a time.
pub(crate) const MOUNTS: usize = 960;
const MOUNTS_AT: usize = 64;
const HEADER: usize = 4096;
const SLOT: usize = 128;
/// What the kernel may write: one event with its range takes 48 bytes. Less than two of them, so that a read of the
/// group never gives more than one.
const EVENT: usize = 88;
const KEY_AT: usize = 88;
/// Most slots of a journal.
const MAX_SLOTS: u32 = 1 << 16;

/// The shared memory.
#[derive(Debug)]
pub(crate) struct Journal {
    start: NonNull<u8>,
    length: usize,
    slots: u32,
    memory: OwnedFd,
}

// SAFETY: what `start` points to is mapped for as long as the journal lives, and is only touched through atomics, or
// inside a slot by the one thread that has claimed it (see `Slots` in the parent).
unsafe impl Send for Journal {}
// SAFETY: as above.
unsafe impl Sync for Journal {}

impl Journal {
    /// Makes an empty journal.
    pub(crate) fn create(slots: u32) -> io::Result<Self> {
        let slots = slots.clamp(1, MAX_SLOTS);
        let memory = rustix::fs::memfd_create("loris-journal", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let length = HEADER + SLOT * slots as usize;
        rustix::fs::ftruncate(&memory, length as u64)?;
        // Nobody can cut it under the feet of another process.
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let journal = Self::map(memory, length, slots)?;
        journal.word64(0).store(MAGIC, Ordering::Relaxed);
        journal.word32(8).store(VERSION, Ordering::Relaxed);
        journal.word32(12).store(slots, Ordering::Release);
        Ok(journal)
    }

    /// Takes over the journal of another process.
    pub(crate) fn attach(memory: OwnedFd) -> io::Result<Self> {
        let length = usize::try_from(rustix::fs::fstat(&memory)?.st_size).unwrap_or_default();
        if length < HEADER + SLOT {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the journal of the keeper is too short"));
        }
        let mut journal = Self::map(memory, length, 1)?;
        let slots = journal.word32(12).load(Ordering::Acquire);
        let version = journal.word32(8).load(Ordering::Relaxed);
        if journal.word64(0).load(Ordering::Relaxed) != MAGIC || version != VERSION {
            let problem = format!("the journal of the keeper is of version {version}, and {VERSION} is understood");
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        if slots == 0 || slots > MAX_SLOTS || HEADER + SLOT * slots as usize != length {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the journal of the keeper is damaged"));
        }
        journal.slots = slots;
        Ok(journal)
    }

    fn map(memory: OwnedFd, length: usize, slots: u32) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; the file is sealed against being cut.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED | MapFlags::POPULATE,
                &memory,
                0,
            )
        }?;
        // A page fault inside the kernel's copy, while this process is being killed, would make it deny the event. Where
        // locking is not allowed, this is left to chance.
        // SAFETY: locks what was just mapped.
        let _ = unsafe { rustix::mm::mlock(start, length) };
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { start, length, slots, memory })
    }

    /// The memory, to be handed to the keeper.
    pub(crate) fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    pub(crate) fn slots(&self) -> u32 {
        self.slots
    }

    /// Which keeper is in charge. One of another generation has nothing to keep any more, or not yet.
    pub(crate) fn generation(&self) -> &AtomicU32 {
        self.word32(16)
    }

    /// Returns a generation for another keeper: never the same twice, since one whose daemon was killed before it was in
    /// charge may look at the journal late. Called by the one daemon that lives.
    pub(crate) fn next_generation(&self) -> u32 {
        let last = self.word32(20);
        let next = last.load(Ordering::Acquire).max(self.generation().load(Ordering::Acquire)).wrapping_add(1);
        last.store(next, Ordering::Release);
        next
    }

    /// The table of mounts.
    pub(crate) fn mounts(&self) -> impl Iterator<Item = &AtomicI32> {
        // SAFETY: inside the header, which is mapped; aligned, since the mapping is; an atomic may be shared.
        (0..MOUNTS).map(|number| unsafe { AtomicI32::from_ptr(self.at(MOUNTS_AT + 4 * number).cast()) })
    }

    /// Whether any mount is up.
    pub(crate) fn has_mounts(&self) -> bool {
        self.mounts().any(|mount| mount.load(Ordering::Acquire) != 0)
    }

    /// Takes a mount that is gone out of the table.
    pub(crate) fn forget_mount(&self, watch: i32) {
        if let Some(mount) = self.mounts().find(|mount| mount.load(Ordering::Relaxed) == watch) {
            mount.store(0, Ordering::Release);
        }
    }

    /// Lets the kernel write one event into a slot that this thread has claimed.
    pub(crate) fn read_event(&self, slot: u32, group: impl AsFd) -> io::Result<usize> {
        // SAFETY: the bytes are mapped, and by the claim nobody else reads or writes them.
        let buffer = unsafe { std::slice::from_raw_parts_mut(self.slot(slot), EVENT) };
        Ok(rustix::io::read(group, buffer)?)
    }

    /// Copies what the kernel wrote.
    pub(crate) fn event(&self, slot: u32) -> [u8; EVENT] {
        let mut bytes = [0; EVENT];
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(self.slot(slot), bytes.as_mut_ptr(), EVENT) };
        bytes
    }

    /// Whether a slot holds no event.
    pub(crate) fn is_free(&self, slot: u32) -> bool {
        self.first_word(slot).load(Ordering::Acquire) == 0
    }

    /// Frees a slot: its event was answered.
    pub(crate) fn clear(&self, slot: u32) {
        self.key(slot).store(0, Ordering::Relaxed);
        self.first_word(slot).store(0, Ordering::Release);
    }

    /// The key of the file that the event is about; 0 while it is not known.
    pub(crate) fn key(&self, slot: u32) -> &AtomicU64 {
        // SAFETY: inside the slot, aligned to 8 bytes; an atomic may be shared.
        unsafe { AtomicU64::from_ptr(self.slot(slot).add(KEY_AT).cast()) }
    }

    fn first_word(&self, slot: u32) -> &AtomicU32 {
        // SAFETY: the start of a slot, aligned to 128 bytes.
        unsafe { AtomicU32::from_ptr(self.slot(slot).cast()) }
    }

    fn slot(&self, slot: u32) -> *mut u8 {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        self.at(HEADER + SLOT * slot as usize)
    }

    fn word32(&self, at: usize) -> &AtomicU32 {
        debug_assert!(at + 4 <= MOUNTS_AT && at.is_multiple_of(4));
        // SAFETY: inside the header, aligned.
        unsafe { AtomicU32::from_ptr(self.at(at).cast()) }
    }

    fn word64(&self, at: usize) -> &AtomicU64 {
        debug_assert!(at + 8 <= MOUNTS_AT && at.is_multiple_of(8));
        // SAFETY: inside the header, aligned.
        unsafe { AtomicU64::from_ptr(self.at(at).cast()) }
    }

    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < self.length);
        // SAFETY: callers stay inside of the mapping: they add constants below `HEADER`, or a checked slot.
        unsafe { self.start.as_ptr().add(offset) }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // SAFETY: mapped by us, with this length, and nothing that was borrowed from `self` is left.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn another_process_finds_what_was_left() {
        let journal = Journal::create(3).unwrap();
        assert!((0..3).all(|slot| journal.is_free(slot)));
        let (read, write) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&write, b"an event").unwrap();
        assert_eq!(journal.read_event(1, &read).unwrap(), 8);
        journal.key(1).store(77, Ordering::Relaxed);
        journal.mounts().nth(MOUNTS - 1).unwrap().store(9, Ordering::Relaxed);
        journal.generation().store(3, Ordering::Relaxed);
        assert_eq!(journal.next_generation(), 4);
        journal.generation().store(4, Ordering::Relaxed);
        assert_eq!(journal.next_generation(), 5);

        let copy = rustix::io::fcntl_dupfd_cloexec(journal.memory(), 0).unwrap();
        drop(journal);
        let journal = Journal::attach(copy).unwrap();
        assert_eq!(journal.slots(), 3);
        assert!(journal.event(1).starts_with(b"an event"));
        assert_eq!(journal.key(1).load(Ordering::Relaxed), 77);
        assert_eq!(journal.mounts().nth(MOUNTS - 1).unwrap().load(Ordering::Relaxed), 9);
        assert_eq!(journal.generation().load(Ordering::Relaxed), 4);
        assert_eq!(journal.next_generation(), 6, "5 was given out");
        assert!(journal.is_free(0) && !journal.is_free(1));
        journal.clear(1);
        assert!(journal.is_free(1));
    }

    #[test]
    fn what_is_no_journal_is_refused() {
        let memory = |length: u64| {
            let memory = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&memory, length).unwrap();
            memory
        };
        assert!(Journal::attach(memory(100)).is_err());
        assert!(Journal::attach(memory(8192)).is_err());
        let journal = Journal::create(3).unwrap();
        for (at, value) in [(8, VERSION + 1), (12, 0), (12, 4)] {
            let before = journal.word32(at).swap(value, Ordering::Relaxed);
            let copy = rustix::io::fcntl_dupfd_cloexec(journal.memory(), 0).unwrap();
            assert!(Journal::attach(copy).is_err(), "{value} at {at}");
            journal.word32(at).store(before, Ordering::Relaxed);
        }
    }
}
