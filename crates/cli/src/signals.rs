//! Signals that end a verb which would leave something behind: its work is dropped, and with it its temporary files.
//!
//! What is ignored when we start stays ignored: SIGHUP under `nohup`, SIGINT in the background of a script.

use std::{future::Future, task::Poll};

use anyhow::Context as _;
use rustix::process::Signal;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::failure::{self, Outcome};

/// What users and systems end programs with.
const ENDING: [Signal; 4] = [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT];

/// Signals that were ignored when this program started, as the kernel's mask.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ignored(u64);

impl Ignored {
    /// Asks the kernel; to be called before handlers are installed.
    pub(crate) fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self::of_status(&status)
    }

    /// Reads `/proc/PID/status`: proc_pid_status(5).
    fn of_status(status: &str) -> Self {
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        Self(mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0))
    }

    fn has(self, signal: Signal) -> bool {
        self.0 & (1 << (signal.as_raw() - 1)) != 0
    }
}

/// Returns the exit status of a program that a signal has ended, as shells have it.
fn status(signal: Signal) -> u8 {
    128 | u8::try_from(signal.as_raw()).unwrap_or(0)
}

/// Does a verb's work until it is done or a signal comes; what is not done then is dropped.
pub(crate) async fn unless_signalled(work: impl Future<Output = failure::Result>) -> failure::Result {
    let ignored = Ignored::now();
    let mut streams = Vec::new();
    // A core is wanted of SIGQUIT.
    for ending in ENDING.into_iter().filter(|ending| *ending != Signal::QUIT && !ignored.has(*ending)) {
        streams.push((ending, signal(SignalKind::from_raw(ending.as_raw())).context("taking signals")?));
    }
    let signalled = std::future::poll_fn(|context| {
        let came =
            streams.iter_mut().find_map(|(ending, stream)| stream.poll_recv(context).is_ready().then_some(*ending));
        came.map_or(Poll::Pending, Poll::Ready)
    });
    tokio::select! {
        biased;
        outcome = work => outcome,
        ending = signalled => Ok(Outcome::Interrupted(status(ending))),
    }
}

/// Waits for a signal that is to end us, and returns the exit status for it. Others have nobody yet to be meant for.
pub(crate) async fn ending(signals: &mut mpsc::Receiver<Signal>, ignored: Ignored) -> u8 {
    loop {
        match signals.recv().await {
            Some(signal) if ENDING.contains(&signal) && !ignored.has(signal) => return status(signal),
            Some(_) => {}
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_mask_is_read() {
        let ignored = Ignored::of_status("Name:\tx\nSigBlk:\tffff\nSigIgn:\t0000000000001001\nSigCgt:\tffff\n");
        assert!(ignored.has(Signal::HUP) && ignored.has(Signal::PIPE));
        assert!(!ignored.has(Signal::INT) && !ignored.has(Signal::TERM));
        assert!(!Ignored::of_status("").has(Signal::HUP));
    }

    #[test]
    fn statuses_are_those_of_shells() {
        assert_eq!([Signal::HUP, Signal::INT, Signal::TERM].map(status), [129, 130, 143]);
    }
}
