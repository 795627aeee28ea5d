//! What daemon and keeper say to each other: packets of 16 bytes, with descriptors.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recvmsg, sendmsg,
    },
};

/// Version of the packets. Both ends are of one binary, but for a successor that was upgraded.
pub(super) const VERSION: u32 = 1;
/// Most descriptors of a packet.
const DESCRIPTORS: usize = 4;
const LENGTH: usize = 16;

/// A packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Message {
    pub(super) kind: Kind,
    pub(super) number: u64,
}

/// What a packet says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Group, journal, inotify, register; the number is the generation.
    State = 1,
    /// Data file and lock of the layer whose key is the number.
    Keep = 2,
    /// They need not be kept any more.
    Forget = 3,
    /// Everything was said.
    End = 4,
    /// A successor asks for everything; the number is its version.
    Resume = 5,
    /// End.
    Dismiss = 6,
    /// Refuse all reads until all mounts are gone, and end.
    Refuse = 7,
    /// In the place of State: connection of FUSE, journal, register.
    Devices = 8,
}

impl Message {
    /// Sends it. Blocks.
    pub(super) fn send(self, socket: impl AsFd, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut bytes = [0; LENGTH];
        bytes[..4].copy_from_slice(&VERSION.to_ne_bytes());
        bytes[4..8].copy_from_slice(&(self.kind as u32).to_ne_bytes());
        bytes[8..].copy_from_slice(&self.number.to_ne_bytes());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        loop {
            match sendmsg(&socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Receives one with its descriptors. Blocks.
    pub(super) fn receive(socket: impl AsFd) -> io::Result<(Self, Vec<OwnedFd>)> {
        let mut received = Vec::new();
        let message = Self::receive_into(socket, |descriptor| received.push(descriptor))?;
        let message = message.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the other end is gone"))?;
        Ok((message, received))
    }

    /// Receives one without allocating; `None` where the other end is gone.
    pub(super) fn receive_into(socket: impl AsFd, mut take: impl FnMut(OwnedFd)) -> io::Result<Option<Self>> {
        let mut bytes = [0; LENGTH];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let (length, flags) = loop {
            match recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => break (received.bytes, received.flags),
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                descriptors.for_each(&mut take);
            }
        }
        // Descriptors were lost, since there is no room for them in this process.
        if flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        match length {
            0 => Ok(None),
            LENGTH => Self::parse(&bytes).map(Some),
            _ => Err(garbled()),
        }
    }

    fn parse(bytes: &[u8; LENGTH]) -> io::Result<Self> {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if word(0) != VERSION {
            return Err(garbled());
        }
        let kind = match word(4) {
            1 => Kind::State,
            2 => Kind::Keep,
            3 => Kind::Forget,
            4 => Kind::End,
            5 => Kind::Resume,
            6 => Kind::Dismiss,
            7 => Kind::Refuse,
            8 => Kind::Devices,
            _ => return Err(garbled()),
        };
        let mut number = [0; 8];
        number.copy_from_slice(&bytes[8..]);
        Ok(Self { kind, number: u64::from_ne_bytes(number) })
    }
}

/// The other end is no keeper or daemon of this version.
pub(super) fn garbled() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn packets_arrive_with_their_descriptors() {
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let sent = Message { kind: Kind::Keep, number: 0x0123_4567_89ab_cdef };
        sent.send(&one, &[one.as_fd(), other.as_fd()]).unwrap();
        Message { kind: Kind::Dismiss, number: 0 }.send(&one, &[]).unwrap();
        let (message, sent_along) = Message::receive(&other).unwrap();
        assert_eq!((message, sent_along.len()), (sent, 2));
        let (message, nothing) = Message::receive(&other).unwrap();
        assert_eq!((message.kind, nothing.len()), (Kind::Dismiss, 0));
        rustix::net::send(&one, b"short", SendFlags::NOSIGNAL).unwrap();
        assert!(Message::receive(&other).is_err());
        drop((one, sent_along));
        assert_eq!(Message::receive_into(&other, |_| ()).unwrap(), None, "nobody is there any more");
    }

    #[test]
    fn what_is_no_packet_is_refused() {
        let mut bytes = [0; LENGTH];
        assert!(Message::parse(&bytes).is_err());
        bytes[..4].copy_from_slice(&VERSION.to_ne_bytes());
        bytes[4] = 9;
        assert!(Message::parse(&bytes).is_err());
        bytes[4] = 3;
        assert_eq!(Message::parse(&bytes).unwrap(), Message { kind: Kind::Forget, number: 0 });
    }
}
