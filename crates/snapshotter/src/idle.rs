//! What is done when nothing is fetched any more: memory goes back to the kernel, for a node has better use for it.
//!
//! What this module must not know: which images they are, and why they rest.

use std::time::Duration;

use crate::ahead::Ahead;

/// How often it is looked at what is fetched. Nothing was for that long, when memory is given back.
const LOOK: Duration = Duration::from_secs(10);

/// Gives memory back each time that fetching has come to rest. Never ends.
pub(crate) async fn give_memory_back(ahead: &Ahead) {
    let (mut seen, mut given_back) = (0, 0);
    loop {
        tokio::time::sleep(LOOK).await;
        let fetched = ahead.fetched_bytes();
        if fetched == seen && fetched != given_back {
            given_back = fetched;
            let _ = tokio::task::spawn_blocking(loris_mount::memory::give_back).await;
        }
        seen = fetched;
    }
}
