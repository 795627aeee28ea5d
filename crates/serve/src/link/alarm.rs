//! A timer to the kernel's resolution, where the runtime's is a millisecond.

use std::{io, os::fd::OwnedFd, time::Instant};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::{Interest, unix::AsyncFd};

/// Waits until moments in time.
pub struct Alarm {
    timer: AsyncFd<OwnedFd>,
}

impl Alarm {
    /// Returns a timer of the current runtime.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe for types that may close their descriptor; OwnedFd can't"
        )]
        let timer = AsyncFd::with_interest(timer, Interest::READABLE)?;
        Ok(Self { timer })
    }

    /// Returns at `moment`, or at once if it has passed.
    pub async fn until(&mut self, moment: Instant) -> io::Result<()> {
        loop {
            let left = moment.saturating_duration_since(Instant::now());
            let Ok(value) = Timespec::try_from(left) else { return Err(io::ErrorKind::InvalidInput.into()) };
            if left.is_zero() {
                return Ok(());
            }
            let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
            rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
            let mut expirations = [0; 8];
            self.timer.async_io(Interest::READABLE, |timer| Ok(rustix::io::read(timer, &mut expirations)?)).await?;
        }
    }
}
