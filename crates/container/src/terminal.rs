//! Our terminal, while a container uses it.

use std::{io, os::fd::AsFd};

use rustix::termios::{OptionalActions, Termios, Winsize, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

/// The settings of a terminal, given back when this is dropped.
pub struct Saved<T: AsFd> {
    terminal: T,
    settings: Termios,
}

impl<T: AsFd> Saved<T> {
    /// Remembers the settings of `terminal`; what isn't one is `None`.
    pub fn save(terminal: T) -> io::Result<Option<Self>> {
        if !isatty(&terminal) {
            return Ok(None);
        }
        let settings = tcgetattr(&terminal)?;
        Ok(Some(Self { terminal, settings }))
    }

    /// Makes the terminal pass every byte on as it is.
    pub fn make_raw(&self) -> io::Result<()> {
        let mut raw = self.settings.clone();
        raw.make_raw();
        Ok(tcsetattr(&self.terminal, OptionalActions::Flush, &raw)?)
    }
}

impl<T: AsFd> Drop for Saved<T> {
    fn drop(&mut self) {
        // A terminal that is gone needs no settings.
        let _ = tcsetattr(&self.terminal, OptionalActions::Drain, &self.settings);
    }
}

/// Gives `to` the window size of `from`, if that is a terminal.
pub fn copy_size(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    match tcgetwinsize(from) {
        Ok(Winsize { ws_row: 0, ws_col: 0, .. }) | Err(rustix::io::Errno::NOTTY) => Ok(()),
        Ok(size) => Ok(tcsetwinsize(to, size)?),
        Err(errno) => Err(errno.into()),
    }
}
