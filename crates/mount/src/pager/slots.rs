//! Which slots of the journal are whose.
//!
//! A slot is claimed by one thread, given to the task that answers its event, and comes back when that was done.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Condvar, Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use super::{event::Event, journal::Journal};

/// The free slots.
#[derive(Debug)]
pub(super) struct Slots {
    free: Mutex<Free>,
    changed: Condvar,
}

#[derive(Debug)]
struct Free {
    slots: Vec<u32>,
    stopped: bool,
}

impl Slots {
    /// All slots but the `occupied` ones are free.
    pub(super) fn new(count: u32, occupied: &[u32]) -> Self {
        // The first ones are used first: the others' memory stays cold.
        let slots = (0..count).rev().filter(|slot| !occupied.contains(slot)).collect();
        Self { free: Mutex::new(Free { slots, stopped: false }), changed: Condvar::new() }
    }

    /// Waits for a free slot; `None` when the pager stops.
    pub(super) fn claim(&self) -> Option<u32> {
        let free = self.lock();
        let mut free = self
            .changed
            .wait_while(free, |free| free.slots.is_empty() && !free.stopped)
            .unwrap_or_else(PoisonError::into_inner);
        if free.stopped { None } else { free.slots.pop() }
    }

    /// Makes a slot free for others. It must be clear.
    pub(super) fn give_back(&self, slot: u32) {
        self.lock().slots.push(slot);
        self.changed.notify_one();
    }

    /// Wakes everyone who waits for a slot.
    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An event that a killed process has read and perhaps not answered.
#[derive(Debug)]
pub(crate) struct Left {
    pub(super) slot: u32,
    pub(super) event: Event,
    /// The key of its file; 0 where the process was killed before it had noted it.
    pub(super) key: u64,
    /// Stands on the event's descriptor number, so that the kernel can't give it to another event before this one is
    /// answered.
    pub(super) placeholder: OwnedFd,
}

/// Returns what stands in the slots of a journal that was taken over. Must come before any event is read.
///
/// The numbers of unanswered events must be free or taken for good: `Inherited` moves what it was sent out of the way.
///
/// What cannot be understood is cleared: no kernel of this boot wrote it.
pub(crate) fn left_behind(journal: &Journal) -> io::Result<Vec<Left>> {
    let mut left = Vec::new();
    for (slot, event) in unanswered(journal) {
        let key = journal.key(slot).load(Ordering::Relaxed);
        let placeholder = park(event.descriptor)?;
        left.push(Left { slot, event, key, placeholder });
    }
    Ok(left)
}

/// Returns the events that stand in a journal, with their slots.
pub(crate) fn unanswered(journal: &Journal) -> Vec<(u32, Event)> {
    let mut found = Vec::new();
    for slot in (0..journal.slots()).filter(|&slot| !journal.is_free(slot)) {
        match Event::parse(&journal.event(slot)) {
            Ok(event) if event.descriptor >= 0 => found.push((slot, event)),
            _ => journal.clear(slot),
        }
    }
    found
}

/// Puts something on a descriptor number, unless a file of this process stands there already: then the number can't be
/// given to an event either, and what is returned stands elsewhere.
fn park(number: i32) -> io::Result<OwnedFd> {
    let nothing = OwnedFd::from(std::fs::File::open("/dev/null")?);
    // It may stand there by itself: closed at the end of this, it would leave the number free.
    if nothing.as_raw_fd() == number {
        return Ok(nothing);
    }
    // The lowest free number that is not below `number`.
    Ok(rustix::io::fcntl_dupfd_cloexec(&nothing, number)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn slots_go_round() {
        let slots = Slots::new(4, &[1]);
        assert_eq!([slots.claim(), slots.claim(), slots.claim()], [Some(0), Some(2), Some(3)]);
        slots.give_back(2);
        assert_eq!(slots.claim(), Some(2));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| slots.claim());
            slots.stop();
            assert_eq!(waiting.join().unwrap(), None);
        });
    }

    /// Found by killing a daemon 50 times under eight readers: the descriptor that was to be put on the number stood on it
    /// by chance, and was closed; the next event got the number, and the answer that was meant for the older one.
    #[test]
    fn the_lowest_free_number_is_taken_too() {
        // Other tests of this process open and close files meanwhile, one of which may have been on the number: tried again
        // then. Tried for many numbers, the lowest free one is met.
        let is_taken = |number: i32| {
            let parked = park(number).unwrap();
            // SAFETY: only asks whether the number is in use.
            let taken = unsafe { libc::fcntl(number, libc::F_GETFD) } >= 0;
            drop(parked);
            taken
        };
        for number in 3..200 {
            assert!((0..200).any(|_| is_taken(number)), "{number} is free after it was parked");
        }
    }

    #[test]
    fn a_number_is_taken() {
        let free = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 700).unwrap().as_raw_fd();
        let parked = park(free).unwrap();
        assert_eq!(parked.as_raw_fd(), free);
        // Twice: another file stands there, and the second one goes elsewhere.
        assert_ne!(park(free).unwrap().as_raw_fd(), free);
    }
}
