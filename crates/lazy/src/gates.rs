//! What bounds the work of a process: bytes in memory, requests on the wire, decoders on the processor.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// One permit's worth of memory. Semaphores count in 32 bits; pages of 4 KiB reach to 16 TiB.
const PAGE_BYTES: u64 = 4 << 10;

/// What nobody waits for takes at most this part of the requests, so that a read on demand finds a place at once.
const BACKGROUND_PART: usize = 4;

/// The bounds that all layers of a [`crate::Store`] share. Every wait is first come, first served.
#[derive(Debug)]
pub(crate) struct Gates {
    memory: Arc<Semaphore>,
    pages: u32,
    requests: Arc<Semaphore>,
    decoders: Arc<Semaphore>,
    background: Arc<Semaphore>,
}

/// A place behind a gate, given back when dropped.
pub(crate) type Pass = OwnedSemaphorePermit;

impl Gates {
    pub(crate) fn new(memory_bytes: u64, requests: usize, decoders: usize) -> Self {
        // A semaphore holds at most usize::MAX >> 3 permits; u32 pages are below that on 64-bit machines.
        let pages = u32::try_from(memory_bytes.div_ceil(PAGE_BYTES)).unwrap_or(u32::MAX).clamp(1, 1 << 28);
        Self {
            memory: Arc::new(Semaphore::new(pages as usize)),
            pages,
            requests: Arc::new(Semaphore::new(requests.max(1))),
            decoders: Arc::new(Semaphore::new(decoders.max(1))),
            background: Arc::new(Semaphore::new((requests / BACKGROUND_PART).max(1))),
        }
    }

    /// Waits until `bytes` more may be held. What is larger than the whole bound waits until nothing else is held.
    pub(crate) async fn memory(&self, bytes: u64) -> Pass {
        let pages = u32::try_from(bytes.div_ceil(PAGE_BYTES)).unwrap_or(u32::MAX).min(self.pages);
        pass(&self.memory, pages).await
    }

    /// Waits for a place among the requests.
    pub(crate) async fn request(&self) -> Pass {
        pass(&self.requests, 1).await
    }

    /// Waits for the turn of something that nobody waits for. Taken before the other gates.
    pub(crate) async fn background(&self) -> Pass {
        pass(&self.background, 1).await
    }

    /// Waits for a place among the decoders.
    pub(crate) async fn decoder(&self) -> Pass {
        pass(&self.decoders, 1).await
    }
}

async fn pass(gate: &Arc<Semaphore>, permits: u32) -> Pass {
    match Arc::clone(gate).acquire_many_owned(permits).await {
        Ok(pass) => pass,
        Err(closed) => unreachable!("no gate is ever closed: {closed}"),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn more_than_everything_waits_for_everything() {
        let gates = Gates::new(8 << 10, 1, 1);
        let one = gates.memory(1).await;
        let mut all = Box::pin(gates.memory(u64::MAX));
        assert!((&mut all).now_or_never().is_none());
        drop(one);
        let all = all.await;
        assert_eq!(all.num_permits(), 2);
        assert!(gates.memory(1).now_or_never().is_none());
    }
}
