//! Threads that compress, shared by all layers that are converted at the same time, and the memory they may use.
//!
//! A *slot* is the buffers of one batch: taken by the thread that feeds a layer, filled and compressed by a worker,
//! given back when the batch is written. There are as many slots as memory allows, so that memory is bounded whatever
//! the number of cores, layers, or the speed of whoever takes the output.

use std::{
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
};

use loris_format::compression::{GzipCompressor, GzipLevel, ZstdCompressor};

/// Bytes of headers and small files that stand in a batch beside one chunk.
pub(super) const BATCH_BYTES: u64 = 1 << 20;

/// Memory that slots may use where nothing else is asked for. What a process needs beside it (decoders, the network,
/// the list of entries) fits into another 50 MB.
pub const DEFAULT_MEMORY_BYTES: u64 = 80 << 20;

/// The buffers of one batch.
#[derive(Default)]
pub(super) struct Slot {
    /// The uncompressed bytes of the members.
    pub(super) raw: Vec<u8>,
    /// The members, compressed, one behind the other.
    pub(super) packed: Vec<u8>,
}

/// What a worker keeps from batch to batch.
#[derive(Default)]
pub(super) struct Tools {
    gzip: Option<(GzipLevel, GzipCompressor)>,
    zstd: Option<(i32, ZstdCompressor)>,
}

/// How content is compressed.
#[derive(Clone, Copy)]
pub(super) enum Strength {
    Gzip(GzipLevel),
    Zstd(i32),
}

impl Tools {
    /// Puts `raw` at the end of `packed`, as a member or frame.
    pub(super) fn compress(&mut self, strength: Strength, raw: &[u8], packed: &mut Vec<u8>) {
        match strength {
            Strength::Gzip(level) => {
                self.gzip(level).compress_onto(raw, packed);
            }
            Strength::Zstd(level) => {
                let known = self.zstd.take().filter(|(known, _)| *known == level);
                let (_, compressor) = self.zstd.insert(known.unwrap_or_else(|| (level, ZstdCompressor::new(level))));
                packed.extend(compressor.compress(raw));
            }
        }
    }

    /// Returns a compressor of the level. Making one costs as much as compressing a small file.
    fn gzip(&mut self, level: GzipLevel) -> &mut GzipCompressor {
        let known = self.gzip.take().filter(|(known, _)| *known == level);
        &mut self.gzip.insert(known.unwrap_or_else(|| (level, GzipCompressor::new(level)))).1
    }
}

type Task = Box<dyn FnOnce(&mut Tools) + Send>;

/// Threads and buffers for compression.
pub struct Workers {
    tasks: Option<mpsc::Sender<Task>>,
    threads: Vec<thread::JoinHandle<()>>,
    slots: Mutex<Slots>,
    given_back: Condvar,
}

struct Slots {
    idle: Vec<Slot>,
    /// How many more may be made.
    unmade: usize,
}

impl Workers {
    /// Starts `threads` threads for chunks of up to `chunk_bytes`, with about `memory_bytes` of buffers (and at least
    /// two slots, whatever they need).
    ///
    /// # Errors
    /// Where the system has no more threads.
    pub fn start(threads: NonZeroUsize, chunk_bytes: u64, memory_bytes: u64) -> std::io::Result<Self> {
        let slot_bytes = chunk_bytes.saturating_add(BATCH_BYTES).saturating_mul(2);
        let affordable = usize::try_from(memory_bytes / slot_bytes.max(1)).unwrap_or(usize::MAX);
        // Two more than threads: one that is being written, one that is being put together.
        let slots = affordable.clamp(2, threads.get().saturating_add(2));
        let (tasks, queue) = mpsc::channel::<Task>();
        let queue = Arc::new(Mutex::new(queue));
        let mut workers = Self {
            tasks: Some(tasks),
            threads: Vec::new(),
            slots: Mutex::new(Slots { idle: Vec::new(), unmade: slots }),
            given_back: Condvar::new(),
        };
        for number in 0..threads.get().min(slots) {
            let queue = Arc::clone(&queue);
            let thread = thread::Builder::new().name(format!("compress-{number}")).spawn(move || work(&queue))?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    /// Has a worker run `task`. Tasks must not wait for other tasks or for slots.
    pub(super) fn run(&self, task: Task) {
        if let Some(tasks) = &self.tasks {
            // The queue outlives all senders. Were it gone, the task's own channel would tell whoever waits for it.
            let _ = tasks.send(task);
        }
    }

    /// Returns a slot if one is free.
    pub(super) fn try_slot(&self) -> Option<Slot> {
        take(&mut self.lock())
    }

    /// Waits for a slot. Whoever waits must hold no other slot that only it can give back.
    pub(super) fn slot(&self) -> Slot {
        let mut slots = self.lock();
        loop {
            if let Some(slot) = take(&mut slots) {
                return slot;
            }
            slots = self.given_back.wait(slots).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives a slot back; its buffers are used again. A slot that was lost is given back as a new one.
    pub(super) fn give_back(&self, slot: Option<Slot>) {
        let mut slots = self.lock();
        match slot {
            Some(slot) => slots.idle.push(slot),
            None => slots.unmade += 1,
        }
        drop(slots);
        self.given_back.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        // Nothing panics while it holds the lock; the counts are right in any case.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take(slots: &mut Slots) -> Option<Slot> {
    slots.idle.pop().or_else(|| {
        slots.unmade = slots.unmade.checked_sub(1)?;
        Some(Slot::default())
    })
}

fn work(queue: &Mutex<mpsc::Receiver<Task>>) {
    let mut tools = Tools::default();
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(task) = next else { return };
        // A task that panics drops its channel, which ends the layer it belongs to with an error and no other.
        if catch_unwind(AssertUnwindSafe(|| task(&mut tools))).is_err() {
            tools = Tools::default();
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.tasks = None;
        for thread in self.threads.drain(..) {
            // Its panics were caught.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workers(threads: usize, memory: u64) -> Workers {
        Workers::start(NonZeroUsize::new(threads).unwrap(), 4 << 20, memory).unwrap()
    }

    #[test]
    fn slots_are_bounded_by_memory_and_threads() {
        for (threads, memory, slots) in [(1, 80 << 20, 3), (64, 80 << 20, 8), (4, 0, 2), (2, 1 << 40, 4)] {
            let workers = workers(threads, memory);
            let taken: Vec<Slot> = std::iter::from_fn(|| workers.try_slot()).collect();
            assert_eq!(taken.len(), slots, "{threads} threads, {memory} bytes");
            workers.give_back(None);
            assert!(workers.try_slot().is_some());
            assert!(workers.try_slot().is_none());
        }
    }

    #[test]
    fn a_panic_ends_one_task() {
        let workers = workers(1, 0);
        let (sender, receiver) = mpsc::channel::<u32>();
        let lost = sender.clone();
        workers.run(Box::new(move |_| {
            let _lost = lost;
            std::panic::resume_unwind(Box::new("a task fails"));
        }));
        workers.run(Box::new(move |_| sender.send(7).unwrap()));
        assert_eq!(receiver.recv(), Ok(7));
        assert!(receiver.recv().is_err());
    }

    #[test]
    fn whoever_waits_for_a_slot_gets_it() {
        let workers = workers(1, 0);
        let (first, second) = (workers.slot(), workers.slot());
        thread::scope(|scope| {
            let waiting = scope.spawn(|| workers.slot().raw.capacity());
            workers.give_back(Some(Slot { raw: Vec::with_capacity(10), packed: Vec::new() }));
            assert!(waiting.join().unwrap() >= 10);
        });
        drop((first, second));
    }
}
