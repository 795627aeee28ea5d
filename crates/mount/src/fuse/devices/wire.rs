//! The few messages of FUSE that serving devices takes, as bytes; and a connection over which they go.
//!
//! Of our own, and not of the FUSE crate, since a connection must be taken over here in the middle of its life: by a
//! successor, which finds the handshake done, and by the keeper, which refuses what nobody answers.
//!
//! Layouts and numbers are those of the kernel's `include/uapi/linux/fuse.h`, which never change. Integers are the
//! machine's.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{fs::OFlags, io::Errno};

/// Bytes of a request's header: length, opcode, unique, node, user, group, process, and lengths of what is not used.
const IN_HEADER: usize = 40;
/// Bytes of an answer's header: length, error, unique.
const OUT_HEADER: usize = 16;
/// The kernel reads into no smaller buffer. No request that is served here is longer.
pub(crate) const REQUEST_BYTES: usize = 8192;
/// The major version that is spoken.
const MAJOR: u32 = 7;
/// Of this minor version on, the handshake is as it is written here.
const OLDEST_MINOR: u32 = 23;
/// The newest minor version whose messages were looked at: that of [`HAS_RESEND`].
const NEWEST_MINOR: u32 = 40;

const ASYNC_READ: u64 = 1;
const ASYNC_DIO: u64 = 1 << 15;
const MAX_PAGES: u64 = 1 << 22;
const INIT_EXT: u64 = 1 << 30;
const HAS_RESEND: u64 = 1 << 39;
/// The number of a notification that asks for all requests which were read and not answered.
const NOTIFY_RESEND: i32 = 7;
const OPEN_DIRECT_IO: u32 = 1;
/// The kernel's page: what `max_pages` counts. Larger ones only make that bound larger.
const PAGE: u32 = 4096;

/// What the kernel asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Question<'a> {
    /// The handshake.
    Init {
        major: u32,
        minor: u32,
        readahead: u32,
        flags: u64,
    },
    /// A name in a directory.
    Lookup(&'a [u8]),
    Attributes,
    /// Open a file with these flags of open(2).
    Open(u32),
    Read {
        offset: u64,
        size: u32,
    },
    /// A file is closed, or the connection.
    Release,
    /// What wants no answer.
    Notice,
    /// What has no place here.
    Other,
}

/// A request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Request<'a> {
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) question: Question<'a>,
}

impl<'a> Request<'a> {
    /// Parses a request. An error is the kernel's, or the reader's of the device.
    pub(super) fn parse(bytes: &'a [u8]) -> io::Result<Self> {
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "a request of FUSE is damaged");
        if bytes.len() < IN_HEADER || u32_at(bytes, 0) as usize != bytes.len() {
            return Err(damaged());
        }
        let body = &bytes[IN_HEADER..];
        let long = |least: usize| if body.len() < least { Err(damaged()) } else { Ok(body) };
        let question = match u32_at(bytes, 4) {
            1 => Question::Lookup(body.strip_suffix(&[0]).ok_or_else(damaged)?),
            // FORGET, INTERRUPT, BATCH_FORGET
            2 | 36 | 42 => Question::Notice,
            3 => Question::Attributes,
            14 => Question::Open(u32_at(long(8)?, 0)),
            15 => {
                let body = long(40)?;
                Question::Read { offset: u64_at(body, 8), size: u32_at(body, 16) }
            }
            // RELEASE, DESTROY
            18 | 38 => Question::Release,
            26 => {
                let body = long(16)?;
                let low = u64::from(u32_at(body, 12));
                let high = if low & INIT_EXT != 0 { u64::from(u32_at(long(20)?, 16)) } else { 0 };
                let (major, minor, readahead) = (u32_at(body, 0), u32_at(body, 4), u32_at(body, 8));
                Question::Init { major, minor, readahead, flags: high << 32 | low }
            }
            _ => Question::Other,
        };
        Ok(Self { unique: u64_at(bytes, 8), node: u64_at(bytes, 16), question })
    }
}

/// What stands at a node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes {
    pub(super) node: u64,
    pub(super) size: u64,
    /// Type and permissions.
    pub(super) mode: u32,
    pub(super) links: u32,
}

/// For ever: nothing that is served here changes.
const VALID: u64 = u32::MAX as u64;

impl Attributes {
    fn put(self, out: &mut Vec<u8>) {
        put64(out, &[self.node, self.size, self.size.div_ceil(512), 0, 0, 0]);
        put32(out, &[0, 0, 0, self.mode, self.links, 0, 0, 0, PAGE, 0]);
    }

    /// The answer to a lookup.
    pub(super) fn entry(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        put64(&mut out, &[self.node, 0, VALID, VALID]);
        put32(&mut out, &[0, 0]);
        self.put(&mut out);
        out
    }

    /// The answer to a question for them.
    pub(super) fn answer(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(104);
        put64(&mut out, &[VALID]);
        put32(&mut out, &[0, 0]);
        self.put(&mut out);
        out
    }
}

/// The answer to an open: read past the page cache, which EROFS has one of its own in front of.
pub(super) fn opened() -> Vec<u8> {
    let mut out = Vec::with_capacity(16);
    put64(&mut out, &[0]);
    put32(&mut out, &[OPEN_DIRECT_IO, 0]);
    out
}

/// What was agreed upon in the handshake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Agreed {
    /// Requests that a killed process has read can be asked for again.
    pub(super) resend: bool,
}

/// Answers the handshake: `None` where the kernel is to ask again with a version that is spoken here.
fn agree(
    (major, minor, readahead, offered): (u32, u32, u32, u64),
    most_read: u32,
    background: u16,
) -> io::Result<(Vec<u8>, Option<Agreed>)> {
    if major < MAJOR || (major == MAJOR && minor < OLDEST_MINOR) {
        let problem =
            format!("the kernel speaks version {major}.{minor} of FUSE; {MAJOR}.{OLDEST_MINOR} is the oldest");
        return Err(io::Error::new(io::ErrorKind::Unsupported, problem));
    }
    let flags = offered & (ASYNC_READ | ASYNC_DIO | MAX_PAGES | INIT_EXT | HAS_RESEND);
    let resend = flags & INIT_EXT != 0 && flags & HAS_RESEND != 0;
    let [low, high] = [flags & u64::from(u32::MAX), flags >> 32].map(|half| u32::try_from(half).unwrap_or(0));
    let mut out = Vec::with_capacity(64);
    put32(&mut out, &[MAJOR, if major == MAJOR { minor.min(NEWEST_MINOR) } else { NEWEST_MINOR }, readahead, low]);
    put16(&mut out, &[background, background / 4 * 3]);
    // Bytes of a write, which nobody makes; the unit of times.
    put32(&mut out, &[PAGE, 1]);
    put16(&mut out, &[u16::try_from(most_read / PAGE).unwrap_or(u16::MAX), 0]);
    put32(&mut out, &[high, 0, 0, 0, 0, 0, 0, 0]);
    Ok((out, (major == MAJOR).then_some(Agreed { resend })))
}

/// The device over which the kernel and this process talk.
#[derive(Debug)]
pub(crate) struct Connection(OwnedFd);

impl Connection {
    pub(crate) fn new(device: OwnedFd) -> Self {
        Self(device)
    }

    /// Agrees with the kernel about the protocol: must come first, and once in the life of a connection.
    pub(super) fn handshake(&self, most_read: u32, background: u16) -> io::Result<Agreed> {
        let mut buffer = [0; REQUEST_BYTES];
        loop {
            let length = retry(|| rustix::io::read(&self.0, &mut buffer))?;
            let request = Request::parse(&buffer[..length])?;
            let Question::Init { major, minor, readahead, flags } = request.question else {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel began without a handshake"));
            };
            let (answer, agreed) = agree((major, minor, readahead, flags), most_read, background)?;
            self.answer(request.unique, Ok(&answer))?;
            if let Some(agreed) = agreed {
                return Ok(agreed);
            }
        }
    }

    /// Waits for a request; `None` when the connection has ended.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match rustix::io::read(&self.0, &mut *buffer) {
                Ok(length) => return Ok(Some(length)),
                // Its reader was killed.
                Err(Errno::NOENT | Errno::INTR) => {}
                // Set by a keeper that was killed in the middle of its work; nobody else is alive.
                Err(Errno::AGAIN) => self.set_blocking(true)?,
                Err(Errno::NODEV | Errno::CONNABORTED) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Answers a request. One whose reader was killed is gone: that is no error.
    pub(super) fn answer(&self, unique: u64, answer: Result<&[u8], Errno>) -> io::Result<()> {
        let (bytes, error) = match answer {
            Ok(bytes) => (bytes, 0),
            Err(errno) => (&[][..], -errno.raw_os_error()),
        };
        self.write(unique, error, bytes)
    }

    fn write(&self, unique: u64, error: i32, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(OUT_HEADER + bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut header = [0; OUT_HEADER];
        header[..4].copy_from_slice(&length.to_ne_bytes());
        header[4..8].copy_from_slice(&error.to_ne_bytes());
        header[8..].copy_from_slice(&unique.to_ne_bytes());
        match retry(|| rustix::io::writev(&self.0, &[IoSlice::new(&header), IoSlice::new(bytes)])) {
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Asks for all requests again that a killed process has read and not answered. No such process may be alive.
    pub(crate) fn resend(&self) -> io::Result<()> {
        self.write(0, NOTIFY_RESEND, &[])
    }

    /// Refuses everything that waits, and what was read and not answered; without allocating. Nobody else may serve.
    pub(crate) fn refuse_waiting(&self, buffer: &mut [u8; REQUEST_BYTES]) {
        if self.resend().is_err() || self.set_blocking(false).is_err() {
            return;
        }
        loop {
            match rustix::io::read(&self.0, &mut buffer[..]) {
                Ok(length) => {
                    if let Ok(request) = Request::parse(&buffer[..length])
                        && request.question != Question::Notice
                    {
                        let _ = self.answer(request.unique, Err(Errno::IO));
                    }
                }
                Err(Errno::NOENT | Errno::INTR) => {}
                Err(_) => break,
            }
        }
        let _ = self.set_blocking(true);
    }

    fn set_blocking(&self, blocking: bool) -> io::Result<()> {
        let mut flags = rustix::fs::fcntl_getfl(&self.0)?;
        flags.set(OFlags::NONBLOCK, !blocking);
        Ok(rustix::fs::fcntl_setfl(&self.0, flags)?)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// The caller has looked at the length.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(value)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(value)
}

fn put64(out: &mut Vec<u8>, values: &[u64]) {
    values.iter().for_each(|value| out.extend(value.to_ne_bytes()));
}

fn put32(out: &mut Vec<u8>, values: &[u32]) {
    values.iter().for_each(|value| out.extend(value.to_ne_bytes()));
}

fn put16(out: &mut Vec<u8>, values: &[u16]) {
    values.iter().for_each(|value| out.extend(value.to_ne_bytes()));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put32(&mut bytes, &[u32::try_from(IN_HEADER + body.len()).unwrap(), opcode]);
        put64(&mut bytes, &[77, 5]);
        put32(&mut bytes, &[0, 0, 0, 0]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn requests_are_understood() {
        let mut read = Vec::new();
        put64(&mut read, &[0, 8192]);
        put32(&mut read, &[4096, 0]);
        put64(&mut read, &[0]);
        put32(&mut read, &[0, 0]);
        let mut init = Vec::new();
        put32(&mut init, &[7, 41, 65536, 1 << 30 | 1, 1 << 7]);
        let flags = INIT_EXT | ASYNC_READ | HAS_RESEND;
        let cases: [(u32, &[u8], Question<'_>); 7] = [
            (1, b"12\0", Question::Lookup(b"12")),
            (2, &[0; 8], Question::Notice),
            (3, &[0; 16], Question::Attributes),
            (14, &[0; 8], Question::Open(0)),
            (15, &read, Question::Read { offset: 8192, size: 4096 }),
            (26, &init, Question::Init { major: 7, minor: 41, readahead: 65536, flags }),
            (28, &[0; 40], Question::Other),
        ];
        for (opcode, body, question) in cases {
            let bytes = request(opcode, body);
            assert_eq!(Request::parse(&bytes).unwrap(), Request { unique: 77, node: 5, question });
        }
        for damaged in [&b""[..], &[0; 40], &request(15, &[0; 39]), &request(14, &[]), &request(1, b"no end")] {
            assert!(Request::parse(damaged).is_err(), "{damaged:?}");
        }
    }

    #[test]
    fn an_agreement_is_reached_or_not() {
        let (answer, agreed) = agree((7, 41, 1, INIT_EXT | HAS_RESEND | 1 << 35), 1 << 20, 512).unwrap();
        assert_eq!((answer.len(), agreed), (64, Some(Agreed { resend: true })));
        assert_eq!(u32_at(&answer, 4), NEWEST_MINOR);
        assert_eq!(u32_at(&answer, 32), 1 << 7, "nothing is promised that was not thought of");
        // Where the upper half can't be told, it is not taken for told.
        assert_eq!(agree((7, 31, 1, ASYNC_DIO | HAS_RESEND), 1 << 20, 512).unwrap().1, Some(Agreed { resend: false }));
        assert_eq!(agree((8, 0, 1, 0), 1 << 20, 512).unwrap().1, None, "asked again");
        for (major, minor) in [(6, 99), (7, 22)] {
            assert!(agree((major, minor, 0, 0), 1 << 20, 512).is_err());
        }
    }

    #[test]
    fn answers_have_the_lengths_of_the_kernel() {
        let attributes = Attributes { node: 2, size: 4096, mode: 0o100_400, links: 1 };
        assert_eq!([attributes.entry().len(), attributes.answer().len(), opened().len()], [128, 104, 16]);
    }

    proptest! {
        #[test]
        fn no_request_panics(opcode in 0_u32..64, body in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Request::parse(&request(opcode, &body));
            let _ = Request::parse(&body);
        }
    }
}
