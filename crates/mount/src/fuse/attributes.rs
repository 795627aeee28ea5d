//! An inode of the tree in the words of stat(2).

use std::time::{Duration, SystemTime};

use loris_format::{
    index::Timestamp,
    tree::{Inode, InodeKind},
};

/// The unit of `st_blocks`, in bytes.
const SECTOR: u64 = 512;
/// What directories say about their size, in bytes, as on ext4.
const DIRECTORY_BYTES: u64 = 4096;

/// Returns `st_size`: content, or the length of a link's target.
pub(super) fn size(inode: &Inode) -> u64 {
    match &inode.kind {
        InodeKind::Regular { size, .. } => *size,
        InodeKind::Symlink { target } => target.len() as u64,
        InodeKind::Directory => DIRECTORY_BYTES,
        InodeKind::CharDevice { .. } | InodeKind::BlockDevice { .. } | InodeKind::Fifo => 0,
    }
}

/// Returns `st_blocks`. Files count as full: how much of them is here changes, and the tree does not.
pub(super) fn blocks(inode: &Inode) -> u64 {
    match inode.kind {
        InodeKind::Regular { size, .. } => size.div_ceil(SECTOR),
        InodeKind::Directory => DIRECTORY_BYTES / SECTOR,
        _ => 0,
    }
}

/// Returns `st_rdev`; 0 for what is no device.
pub(super) fn device(inode: &Inode) -> u32 {
    match inode.kind {
        InodeKind::CharDevice { major, minor } | InodeKind::BlockDevice { major, minor } => encode(major, minor),
        _ => 0,
    }
}

/// Encodes a device number as the kernel does (`new_encode_dev`): 12 bits of major, 20 of minor. More do not exist on
/// Linux, and what an image says beyond them is cut off.
fn encode(major: u32, minor: u32) -> u32 {
    let (major, minor) = (major & 0xfff, minor & 0xf_ffff);
    (minor & 0xff) | major << 8 | (minor & !0xff) << 12
}

/// Returns a time. One that the system cannot express becomes the epoch.
pub(super) fn time(time: Timestamp) -> SystemTime {
    let whole = match u64::try_from(time.seconds) {
        Ok(seconds) => SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)),
        Err(_) => SystemTime::UNIX_EPOCH.checked_sub(Duration::from_secs(time.seconds.unsigned_abs())),
    };
    whole
        .and_then(|whole| whole.checked_add(Duration::from_nanos(u64::from(time.nanoseconds))))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers() {
        for (major, minor) in [(1, 3), (123, 456), (0, 0), (4095, (1 << 20) - 1), (8, 0x12345)] {
            let encoded = u64::from(encode(major, minor));
            // The C library's encoding agrees with the kernel's where the numbers fit.
            assert_eq!(encoded, rustix::fs::makedev(major, minor), "{major}:{minor}");
        }
        assert_eq!(encode(4096, 1 << 20), 0);
    }

    #[test]
    fn times() {
        let cases: [(i64, u32, i128); 6] = [
            (0, 0, 0),
            (1_600_000_000, 123_456_789, 1_600_000_000_123_456_789),
            (-1, 0, -1_000_000_000),
            (-1, 999_999_999, -1),
            (i64::MAX, 0, i128::from(i64::MAX) * 1_000_000_000),
            (i64::MIN, 1, i128::from(i64::MIN) * 1_000_000_000 + 1),
        ];
        for (seconds, nanoseconds, expected) in cases {
            let nanoseconds_since = |time: SystemTime| match time.duration_since(SystemTime::UNIX_EPOCH) {
                Ok(since) => since.as_nanos().cast_signed(),
                Err(error) => -error.duration().as_nanos().cast_signed(),
            };
            assert_eq!(
                nanoseconds_since(time(Timestamp { seconds, nanoseconds })),
                expected,
                "{seconds}.{nanoseconds}"
            );
        }
    }
}
