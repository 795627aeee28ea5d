//! What is known of the way to the place that serves an image's bytes: how long an answer takes to begin, and how fast
//! it runs once it has. Schedulers size and order their requests by it. It knows nothing of requests or registries.

use std::time::Duration;

/// An estimate of the way to the host that serves bytes, from what passed over it lately.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Link {
    /// The time from a small request to the first byte of its answer on a connection that is open already.
    pub round_trip: Duration,
    /// How many bytes a second arrive while bodies stream, all connections to the host together; at least 1.
    pub bytes_per_second: u64,
}
