//! fanotify's records, as bytes: what a read of the group gives, and what answers it.
//!
//! Pure. The layouts are those of the kernel's `include/uapi/linux/fanotify.h`; neither libc nor rustix has the range
//! record or the event for reads that are about to happen, which came with Linux 6.14.

use std::ops::Range;

use rustix::io::Errno;

/// "A file is about to be read": the reader waits for our answer.
pub const FAN_PRE_ACCESS: u64 = 0x0010_0000;
/// The kind of record that says which bytes.
const INFO_TYPE_RANGE: u8 = 6;
/// The version of the event's own layout.
const METADATA_VERSION: u8 = 3;
/// Bytes of the event without the records behind it.
pub(super) const METADATA_LENGTH: usize = 24;
/// Bytes of the record of a range: 4 of header, 4 of padding, offset, count.
const RANGE_LENGTH: usize = 24;

/// One event: a reader that waits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// What happened, `FAN_` bits.
    pub mask: u64,
    /// The number of a descriptor of the file, which the kernel has opened for the process that read the event. The
    /// number is also the name by which the event is answered. Negative where the kernel could not open one.
    pub descriptor: i32,
    /// The process that reads.
    pub process: i32,
    /// The bytes that are about to be read. Without a record, all of the file.
    pub range: Range<u64>,
}

/// Why bytes are no event.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EventError {
    /// Fewer bytes than the event says it has.
    #[error("an event of {length} bytes in {found} bytes")]
    Short {
        /// What it says.
        length: usize,
        /// What is there.
        found: usize,
    },
    /// A layout that a newer kernel may have.
    #[error("an event of version {version}, where 3 is understood")]
    Version {
        /// What it says.
        version: u8,
    },
}

impl Event {
    /// Reads one event. What stands behind it is not looked at; records of unknown kinds are passed over.
    ///
    /// # Errors
    /// Where the bytes are cut off or of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self, EventError> {
        let short = |length| EventError::Short { length, found: bytes.len() };
        let fixed: &[u8; METADATA_LENGTH] = bytes.first_chunk().ok_or(short(METADATA_LENGTH))?;
        let length = number(fixed, 0) as usize;
        let version = fixed[4];
        if version != METADATA_VERSION {
            return Err(EventError::Version { version });
        }
        let fixed_length = usize::from(u16::from_ne_bytes([fixed[6], fixed[7]]));
        let event = bytes.get(..length).filter(|_| length >= METADATA_LENGTH).ok_or(short(length))?;
        let mut records = event.get(fixed_length.max(METADATA_LENGTH)..).ok_or(short(fixed_length))?;
        let mut range = 0..u64::MAX;
        while let Some(header) = records.first_chunk::<4>() {
            let record_length = usize::from(u16::from_ne_bytes([header[2], header[3]]));
            let record = records.get(..record_length).filter(|record| record.len() >= 4);
            let record = record.ok_or(short(length))?;
            if header[0] == INFO_TYPE_RANGE && record.len() >= RANGE_LENGTH {
                let start = long(record, 8);
                range = start..start.saturating_add(long(record, 16));
            }
            records = &records[record_length..];
        }
        Ok(Self {
            mask: long(fixed, 8),
            descriptor: number(fixed, 16).cast_signed(),
            process: number(fixed, 20).cast_signed(),
            range,
        })
    }
}

/// What a reader is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Go on.
    Allow,
    /// The read fails. The kernel passes `EIO`, `EAGAIN`, `EBUSY`, `ETXTBSY`, `ENOSPC`, `EDQUOT` and `EPERM` on;
    /// a file system in between may turn all of them into `EIO`.
    Deny(Errno),
}

impl Answer {
    /// Returns the bytes to be written to the group.
    pub(super) fn to_bytes(self, descriptor: i32) -> [u8; 8] {
        /// Where the errno stands in a denial.
        const ERRNO_SHIFT: u32 = 24;
        let response = match self {
            Self::Allow => libc::FAN_ALLOW,
            Self::Deny(errno) => libc::FAN_DENY | (errno.raw_os_error().cast_unsigned() << ERRNO_SHIFT),
        };
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&descriptor.to_ne_bytes());
        bytes[4..].copy_from_slice(&response.to_ne_bytes());
        bytes
    }
}

fn number(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(value)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(value)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn event(descriptor: i32, records: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&u32::try_from(METADATA_LENGTH + records.len()).unwrap().to_ne_bytes());
        bytes.extend_from_slice(&[METADATA_VERSION, 0]);
        bytes.extend_from_slice(&24_u16.to_ne_bytes());
        bytes.extend_from_slice(&FAN_PRE_ACCESS.to_ne_bytes());
        bytes.extend_from_slice(&descriptor.to_ne_bytes());
        bytes.extend_from_slice(&77_i32.to_ne_bytes());
        bytes.extend_from_slice(records);
        bytes
    }

    fn record(kind: u8, length: u16, rest: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind, 0];
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(rest);
        bytes
    }

    fn range(start: u64, count: u64) -> Vec<u8> {
        record(INFO_TYPE_RANGE, 24, &[&[0; 4], &start.to_ne_bytes()[..], &count.to_ne_bytes()].concat())
    }

    #[test]
    fn events_are_read() {
        let cases = [
            (
                event(5, &range(4096, 131_072)),
                Event { mask: FAN_PRE_ACCESS, descriptor: 5, process: 77, range: 4096..135_168 },
            ),
            (event(5, &[]), Event { mask: FAN_PRE_ACCESS, descriptor: 5, process: 77, range: 0..u64::MAX }),
            // Another record before it; a range that ends beyond all numbers.
            (
                event(-1, &[record(4, 8, &[1; 4]), range(u64::MAX - 1, 9)].concat()),
                Event { mask: FAN_PRE_ACCESS, descriptor: -1, process: 77, range: u64::MAX - 1..u64::MAX },
            ),
            // Something else behind it.
            (
                [event(6, &range(0, 1)), vec![9; 7]].concat(),
                Event { mask: FAN_PRE_ACCESS, descriptor: 6, process: 77, range: 0..1 },
            ),
        ];
        for (bytes, expected) in cases {
            assert_eq!(Event::parse(&bytes).unwrap(), expected);
        }
    }

    #[test]
    fn what_is_no_event_is_refused() {
        let mut newer = event(5, &[]);
        newer[4] = 4;
        let mut longer = event(5, &[]);
        longer[0] = 25;
        let mut shorter = event(5, &[]);
        shorter[0] = 23;
        let cases: [(&[u8], EventError); 6] = [
            (&[], EventError::Short { length: 24, found: 0 }),
            (&event(5, &[])[..23], EventError::Short { length: 24, found: 23 }),
            (&newer, EventError::Version { version: 4 }),
            (&longer, EventError::Short { length: 25, found: 24 }),
            (&shorter, EventError::Short { length: 23, found: 24 }),
            // A record without length must not be walked for ever.
            (&event(5, &record(6, 0, &[0; 20])), EventError::Short { length: 48, found: 48 }),
        ];
        for (bytes, expected) in cases {
            assert_eq!(Event::parse(bytes).unwrap_err(), expected, "{bytes:?}");
        }
    }

    #[test]
    fn answers_have_the_kernels_form() {
        assert_eq!(Answer::Allow.to_bytes(3), [3_u32.to_ne_bytes(), 1_u32.to_ne_bytes()].concat()[..]);
        let deny = Answer::Deny(Errno::IO).to_bytes(3);
        assert_eq!(deny, [3_u32.to_ne_bytes(), (2_u32 | 5 << 24).to_ne_bytes()].concat()[..]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Event::parse(&bytes);
        }

        #[test]
        fn hostile_records_do_not_either(rest in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Event::parse(&event(1, &rest));
        }
    }
}
