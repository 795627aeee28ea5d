//! One direction of one connection: bytes leave at the link's rate and arrive a delay later.

use std::{
    io,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::tcp::{OwnedReadHalf, OwnedWriteHalf},
    sync::mpsc,
};

use super::{
    alarm::Alarm,
    chance::Chance,
    shaper::Shaper,
    window::{Acknowledgement, Window},
};

/// How far ahead of the link bytes are taken from the sender. It covers the time that waking up takes.
pub const AHEAD: Duration = Duration::from_millis(2);
/// Pieces under way, at most. It bounds memory if a sender sends single bytes.
const PIECES: usize = 8192;

/// What takes longer has waited for the other side, and not for us.
const PROMPT: Duration = Duration::from_millis(1);

/// What one direction of a connection does to bytes.
///
/// It tells times as the link would keep them, and not by when we come to look at them: where the bytes or the room for
/// them were there, being late delays nothing that follows.
#[derive(Clone, Copy)]
pub struct Direction<'a> {
    /// The rate, shared with all connections.
    pub shaper: &'a Shaper,
    /// The rate of this connection alone.
    pub own: &'a Shaper,
    /// From one end to the other.
    pub delay: Duration,
    /// How much later than that bytes may arrive.
    pub jitter: Duration,
    /// Most bytes under way.
    pub window_bytes: usize,
    /// Whether the window begins small.
    pub slow_start: bool,
    /// How many bytes are carried before the connection is cut.
    pub cut_after: Option<u64>,
}

/// Why a connection ends that was to be cut.
#[derive(Debug, thiserror::Error)]
#[error("the link has cut the connection, as it was told to")]
struct IsCut;

/// Says whether that is why a connection has ended.
pub fn is_cut(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|cause| cause.is::<IsCut>())
}

/// Bytes under way. No bytes are the end.
struct Piece {
    arrives: Instant,
    bytes: Box<[u8]>,
}

impl Direction<'_> {
    /// Carries all bytes from `from` to `to`, and then the end.
    ///
    /// # Errors
    /// One of the sockets broke, or the connection was cut.
    pub async fn carry(self, from: OwnedReadHalf, to: OwnedWriteHalf, chance: Chance) -> io::Result<()> {
        let (pieces, arriving) = mpsc::channel(PIECES);
        // As many acknowledgements as pieces at most, and the sender reads them before it sends more.
        let (acknowledged, acknowledgements) = mpsc::unbounded_channel();
        tokio::try_join!(self.send(from, pieces, acknowledgements, chance), self.receive(to, arriving, acknowledged))?;
        Ok(())
    }

    async fn send(
        self,
        mut from: OwnedReadHalf,
        pieces: mpsc::Sender<Piece>,
        mut acknowledgements: mpsc::UnboundedReceiver<Acknowledgement>,
        mut chance: Chance,
    ) -> io::Result<()> {
        let mut alarm = Alarm::new()?;
        let chunk_bytes = self.shaper.chunk_bytes().min(self.own.chunk_bytes());
        let jitter_nanos = u64::try_from(self.jitter.as_nanos()).unwrap_or(u64::MAX);
        let mut arrived: Option<Instant> = None;
        let mut buffer = vec![0; chunk_bytes];
        let mut window = Window::new(self.window_bytes, chunk_bytes, self.slow_start);
        let mut next: Option<Acknowledgement> = None;
        loop {
            // Learn what has arrived: all that is known by now, and more if the window is full.
            loop {
                let full = window.room() == 0;
                if next.is_none() {
                    next = if full { acknowledgements.recv().await } else { acknowledgements.try_recv().ok() };
                }
                match next.take() {
                    Some(acknowledgement) if acknowledgement.arrives <= Instant::now() => {
                        window.acknowledge(acknowledgement);
                    }
                    Some(acknowledgement) if full => {
                        alarm.until(acknowledgement.arrives).await?;
                        next = Some(acknowledgement);
                    }
                    // The receiving half has failed; it reports why.
                    None if full => return Ok(()),
                    later => {
                        next = later;
                        break;
                    }
                }
            }
            let asked = Instant::now();
            let count = from.read(&mut buffer[..window.room()]).await?;
            // Bytes that came only now have not waited for the link.
            let were_there = asked.elapsed() < PROMPT;
            let waiting_since = window.free_since().filter(|_| were_there);
            let leaves = self.shaper.reserve(count, waiting_since).max(self.own.reserve(count, waiting_since));
            let late = Duration::from_nanos(chance.up_to(jitter_nanos));
            // In order: who is late holds up what follows.
            let arrives = arrived.max(Some(leaves + self.delay + late)).unwrap_or(leaves);
            arrived = Some(arrives);
            let piece = Piece { arrives, bytes: buffer[..count].into() };
            if pieces.send(piece).await.is_err() || count == 0 {
                return Ok(());
            }
            window.sent(count, leaves);
            if leaves.saturating_duration_since(Instant::now()) > AHEAD {
                alarm.until(leaves.checked_sub(AHEAD / 2).unwrap_or(leaves)).await?;
            }
        }
    }

    async fn receive(
        self,
        mut to: OwnedWriteHalf,
        mut arriving: mpsc::Receiver<Piece>,
        acknowledged: mpsc::UnboundedSender<Acknowledgement>,
    ) -> io::Result<()> {
        let mut alarm = Alarm::new()?;
        let mut left = self.cut_after;
        while let Some(piece) = arriving.recv().await {
            alarm.until(piece.arrives).await?;
            if piece.bytes.is_empty() {
                return to.shutdown().await;
            }
            if let Some(left) = &mut left {
                if let Some(part) = piece.bytes.get(..usize::try_from(*left).unwrap_or(usize::MAX)) {
                    to.write_all(part).await?;
                    return cut(to);
                }
                *left -= piece.bytes.len() as u64;
            }
            let began = Instant::now();
            to.write_all(&piece.bytes).await?;
            let ended = Instant::now();
            let taken = if ended - began < PROMPT { piece.arrives } else { ended };
            let arrives = taken + self.delay;
            // The sender may have ended; then nobody needs to know.
            let _ = acknowledged.send(Acknowledgement { arrives, bytes: piece.bytes.len() });
        }
        Ok(())
    }
}

/// Resets a connection.
fn cut(to: OwnedWriteHalf) -> io::Result<()> {
    to.as_ref().set_zero_linger()?;
    // Without that it would say first that all is well and nothing more comes.
    to.forget();
    Err(io::Error::other(IsCut))
}
