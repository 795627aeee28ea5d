//! An everyday network link in front of a server on loopback: a rate, a delay, and what else goes wrong on the way.
//!
//! A [`Link`] accepts TCP connections and forwards them to one address. All connections share one rate per direction, as
//! they share a cable; each byte arrives one delay after it has left; and a new connection waits one round trip before
//! its first byte is taken, since the handshake that loopback does at once would have taken that long. With
//! [`LinkOptions::slow_start`], a connection begins with ten segments under way and doubles each round trip, as TCP does.
//!
//! The rate is that of the payload: the headers of TCP/IP over Ethernet would take another 4 to 5 %. No packet is lost.
//!
//! On request it does what else links and servers do: bytes are late by chance ([`LinkOptions::jitter`], in order all the
//! same); each connection has a rate of its own, as object stores give it ([`LinkOptions::connection_bits_per_second`]);
//! connections are cut ([`LinkOptions::cut`]). Chance begins with [`LinkOptions::seed`] and depends on nothing but the
//! number of the connection, so that what happened happens again.
//!
//! It runs on one thread of its own, with timers of the kernel's resolution: Tokio's, which are to the millisecond,
//! would add a tenth to a delay of ten. Memory is bounded by the bytes that a connection may have under way:
//! [`LinkOptions::window_bytes`].

use std::{
    io,
    net::SocketAddr,
    num::NonZeroU64,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Semaphore, oneshot},
    task::JoinSet,
};

mod alarm;
mod chance;
mod direction;
mod shaper;
mod window;

use self::{alarm::Alarm, chance::Chance, direction::Direction, shaper::Shaper};

/// Most connections at a time; further ones wait in the kernel's backlog.
const CONNECTIONS: usize = 1024;
/// What the sockets' own buffers may hold, in bytes. The kernel would let them grow to megabytes, which would be read
/// from the server without ever having passed the link.
const SOCKET_BUFFER_BYTES: u32 = 64 << 10;
/// How long a link may be late in taking the next bytes before its capacity is lost.
const SLACK: Duration = Duration::from_millis(10);

/// What kind of link it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkOptions {
    /// Payload bits per second from the server to its clients. `None` is as fast as the machine can.
    pub down_bits_per_second: Option<NonZeroU64>,
    /// Payload bits per second from the clients to the server.
    pub up_bits_per_second: Option<NonZeroU64>,
    /// How long a byte takes from one end to the other: half of the round trip.
    pub one_way_delay: Duration,
    /// Whether connections begin slowly, as TCP's do.
    pub slow_start: bool,
    /// How much later than that bytes may arrive, by chance.
    pub jitter: Duration,
    /// Payload bits per second from the server that one connection carries at most.
    pub connection_bits_per_second: Option<NonZeroU64>,
    /// When connections are cut.
    pub cut: Option<Cut>,
    /// What chance begins with.
    pub seed: u64,
}

/// When a connection is cut: it is reset after it has carried so many bytes from the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// After exactly so many.
    After(u64),
    /// After so many on the average: anything from nothing to twice as many.
    About(u64),
}

impl LinkOptions {
    /// A link with the same rate in both directions, and connections that begin slowly. A rate of 0 is no limit.
    #[must_use]
    pub fn symmetric(bits_per_second: u64, one_way_delay: Duration) -> Self {
        let rate = NonZeroU64::new(bits_per_second);
        Self {
            down_bits_per_second: rate,
            up_bits_per_second: rate,
            one_way_delay,
            slow_start: true,
            jitter: Duration::ZERO,
            connection_bits_per_second: None,
            cut: None,
            seed: 0,
        }
    }

    /// Returns how many bytes a connection may have under way in a direction of that rate: what fills the link for a
    /// round trip, and some for being late.
    #[must_use]
    pub fn window_bytes(&self, bits_per_second: Option<NonZeroU64>) -> usize {
        /// Without a rate, as much as the kernel would allow.
        const UNLIMITED: usize = 6 << 20;
        let Some(rate) = bits_per_second else { return UNLIMITED };
        let time = self.one_way_delay.saturating_mul(2).saturating_add(self.jitter).saturating_add(SLACK);
        let bytes = u128::from(rate.get()).saturating_mul(time.as_micros()) / 8_000_000;
        // A satellite at 10 Gbit/s still has a bounded window.
        usize::try_from(bytes).unwrap_or(usize::MAX).saturating_add(SOCKET_BUFFER_BYTES as usize).min(256 << 20)
    }
}

/// What has passed a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStatistics {
    /// Bytes from the server to its clients.
    pub bytes_down: u64,
    /// Bytes from the clients to the server.
    pub bytes_up: u64,
    /// Connections that have been made.
    pub connections: u64,
    /// Those of them that were cut.
    pub cut: u64,
}

/// A link that runs. It ends when it is stopped or dropped, and its connections with it.
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

struct Shared {
    options: LinkOptions,
    upstream: SocketAddr,
    down: Shaper,
    up: Shaper,
    connections: AtomicU64,
    cut: AtomicU64,
    /// Counts connections too, and is never reset: chance goes by it.
    numbers: AtomicU64,
}

impl Link {
    /// Starts a link from a free port of loopback to `upstream`.
    ///
    /// # Errors
    /// No port can be had, or no thread.
    pub fn start(options: LinkOptions, upstream: SocketAddr) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // Entered, not blocked on: the caller may be in a runtime of its own.
        let listener = {
            let _entered = runtime.enter();
            listen()?
        };
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            options,
            upstream,
            down: Shaper::new(options.down_bits_per_second),
            up: Shaper::new(options.up_bits_per_second),
            connections: AtomicU64::new(0),
            cut: AtomicU64::new(0),
            numbers: AtomicU64::new(0),
        });
        let (stop, stopped) = oneshot::channel();
        let running = Arc::clone(&shared);
        let thread = thread::Builder::new().name("link".to_owned()).spawn(move || {
            runtime.block_on(accept(&running, listener, stopped));
            // Nothing of a link blocks, so nothing is waited for here.
            runtime.shutdown_background();
        })?;
        Ok(Self { address, shared, stop: Some(stop), thread: Some(thread) })
    }

    /// Returns the address that stands for the upstream one.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns what has passed since the start, or since [`reset`](Self::reset).
    #[must_use]
    pub fn statistics(&self) -> LinkStatistics {
        LinkStatistics {
            bytes_down: self.shared.down.bytes(),
            bytes_up: self.shared.up.bytes(),
            connections: self.shared.connections.load(Ordering::Relaxed),
            cut: self.shared.cut.load(Ordering::Relaxed),
        }
    }

    /// Sets the statistics to zero.
    pub fn reset(&self) {
        self.shared.down.reset();
        self.shared.up.reset();
        self.shared.connections.store(0, Ordering::Relaxed);
        self.shared.cut.store(0, Ordering::Relaxed);
    }

    /// Closes all connections and ends the link's thread.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(address = %self.address, "the link's thread ended badly");
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.end();
    }
}

fn listen() -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    // Accepted connections inherit it.
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    socket.listen(1024)
}

async fn accept(shared: &Arc<Shared>, listener: TcpListener, mut stopped: oneshot::Receiver<()>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            _ = &mut stopped => return,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = async {
                // The semaphore is never closed.
                let place = Arc::clone(&places).acquire_owned().await.ok();
                (listener.accept().await, place)
            } => accepted,
        };
        match accepted {
            (Ok((client, _)), place) => {
                shared.connections.fetch_add(1, Ordering::Relaxed);
                let shared = Arc::clone(shared);
                connections.spawn(async move {
                    let _place = place;
                    if let Err(error) = forward(&shared, client).await {
                        tracing::debug!(%error, upstream = %shared.upstream, "a connection broke");
                    }
                });
            }
            (Err(error), _) => {
                tracing::warn!(%error, "failed to accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Forwards one connection until both sides have ended it, or one has broken it.
async fn forward(shared: &Shared, client: TcpStream) -> io::Result<()> {
    let options = &shared.options;
    let established = Instant::now() + options.one_way_delay.saturating_mul(2);
    let socket = if shared.upstream.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    let server = socket.connect(shared.upstream).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    Alarm::new()?.until(established).await?;

    let mut chance = Chance::new(options.seed, shared.numbers.fetch_add(1, Ordering::Relaxed));
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let own = Shaper::new(options.connection_bits_per_second);
    let down = Direction {
        shaper: &shared.down,
        own: &own,
        delay: options.one_way_delay,
        jitter: options.jitter,
        window_bytes: options.window_bytes(options.down_bits_per_second),
        slow_start: options.slow_start,
        cut_after: options.cut.map(|cut| match cut {
            Cut::After(bytes) => bytes,
            Cut::About(bytes) => chance.up_to(bytes.saturating_mul(2)),
        }),
    };
    let unlimited = Shaper::new(None);
    let up = Direction {
        shaper: &shared.up,
        own: &unlimited,
        window_bytes: options.window_bytes(options.up_bits_per_second),
        cut_after: None,
        ..down
    };
    let (down_chance, up_chance) = (chance.part(), chance.part());
    // The first error drops the other direction too, and with it both sockets.
    let carried = tokio::try_join!(
        down.carry(server_read, client_write, down_chance),
        up.carry(client_read, server_write, up_chance)
    );
    if carried.as_ref().is_err_and(direction::is_cut) {
        shared.cut.fetch_add(1, Ordering::Relaxed);
    }
    carried.map(drop)
}

#[cfg(test)]
mod tests;
