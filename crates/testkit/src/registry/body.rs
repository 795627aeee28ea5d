//! The body of an answer, which can break off, pause or lie about its length.

use std::{
    io,
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

/// Frames are small, so that what arrives before a fault arrives in several pieces.
const FRAME_BYTES: usize = 16 << 10;

/// How long a body waits before it breaks off.
const FLUSH: Duration = Duration::from_millis(20);

/// How a body ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Ending {
    /// As it should.
    #[default]
    Whole,
    /// After so many bytes the connection is closed.
    Close(u64),
    /// After so many bytes the connection is reset.
    Reset(u64),
}

/// Bytes that are sent with a fault.
pub(super) struct FaultyBody {
    rest: Bytes,
    sent: u64,
    ending: Ending,
    stall: Option<(u64, Duration)>,
    /// After the first stall there is one before every byte.
    drips: bool,
    sleep: Option<Pin<Box<tokio::time::Sleep>>>,
    length_known: bool,
    flushed: bool,
    connection: Connection,
}

/// A connection that can be made to end in a reset. Holds a duplicate of the socket, which outlives the server's own.
#[derive(Clone)]
pub(super) struct Connection(Option<Arc<OwnedFd>>);

impl Connection {
    pub(super) fn new(socket: &tokio::net::TcpStream) -> Self {
        use std::os::fd::AsFd as _;
        Self(socket.as_fd().try_clone_to_owned().ok().map(Arc::new))
    }

    /// Lets the connection's close send RST: an unsent rest is thrown away and lingering is off.
    pub(super) fn reset_at_close(&self) {
        if let Some(socket) = &self.0 {
            let _ = rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO));
        }
    }
}

impl FaultyBody {
    pub(super) fn new(content: Bytes, connection: Connection) -> Self {
        Self {
            rest: content,
            sent: 0,
            ending: Ending::Whole,
            stall: None,
            drips: false,
            sleep: None,
            length_known: true,
            flushed: false,
            connection,
        }
    }

    pub(super) fn ending(mut self, ending: Ending) -> Self {
        self.ending = ending;
        self
    }

    pub(super) fn stall(mut self, stall: Option<(u64, Duration)>) -> Self {
        self.stall = stall;
        self
    }

    pub(super) fn drips(mut self, drips: bool) -> Self {
        self.drips = drips;
        self
    }

    pub(super) fn length_known(mut self, known: bool) -> Self {
        self.length_known = known;
        self
    }

    fn next_stop(&self) -> u64 {
        let end = match self.ending {
            Ending::Whole => u64::MAX,
            Ending::Close(at) | Ending::Reset(at) => at,
        };
        end.min(self.stall.map_or(u64::MAX, |(at, _)| at))
    }
}

impl Body for FaultyBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = self.get_mut();
        loop {
            if let Some(sleep) = &mut this.sleep {
                std::task::ready!(sleep.as_mut().poll(cx));
                this.sleep = None;
            }
            if let Some((at, time)) = this.stall
                && this.sent >= at
            {
                this.stall = this.drips.then_some((at + 1, time));
                this.sleep = Some(Box::pin(tokio::time::sleep(time)));
                continue;
            }
            match this.ending {
                Ending::Close(at) | Ending::Reset(at) if this.sent >= at => {
                    if !std::mem::replace(&mut this.flushed, true) {
                        // An error makes the server drop what it has buffered: what counts as sent goes out first.
                        this.sleep = Some(Box::pin(tokio::time::sleep(FLUSH)));
                        continue;
                    }
                    if matches!(this.ending, Ending::Reset(_)) {
                        this.connection.reset_at_close();
                    }
                    return Poll::Ready(Some(Err(io::Error::other("fault: the body breaks off"))));
                }
                _ => {}
            }
            if this.rest.is_empty() {
                return Poll::Ready(None);
            }
            let until_stop = usize::try_from(this.next_stop() - this.sent).unwrap_or(usize::MAX);
            let frame = this.rest.split_to(FRAME_BYTES.min(this.rest.len()).min(until_stop));
            this.sent += frame.len() as u64;
            return Poll::Ready(Some(Ok(Frame::data(frame))));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.stall.is_none() && self.ending == Ending::Whole
    }

    fn size_hint(&self) -> SizeHint {
        if self.length_known { SizeHint::with_exact(self.rest.len() as u64) } else { SizeHint::default() }
    }
}
