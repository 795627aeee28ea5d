//! Reads images for tests, by the letter of the format and with nothing of the writer's: what it finds wrong, it panics
//! about.

use std::collections::BTreeMap;

const BLOCK: usize = 4096;

/// An image in memory.
pub(super) struct Image<'a> {
    bytes: &'a [u8],
    inodes_at: usize,
    shared_at: usize,
    epoch: (i64, u32),
    pub(super) root: u64,
    pub(super) inodes: u64,
    /// Blocks of each device.
    pub(super) devices: Vec<u32>,
}

/// A file of an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct File {
    pub(super) mode: u16,
    pub(super) links: u32,
    pub(super) owner: (u32, u32),
    pub(super) mtime: (i64, u32),
    pub(super) size: u64,
    pub(super) device_number: u32,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Of links and directories.
    pub(super) content: Vec<u8>,
    /// Device, block, and the logarithm of the blocks of a chunk: of other files that are not empty.
    pub(super) chunk: Option<(u16, u32, u32)>,
    pub(super) is_compact: bool,
}

impl<'a> Image<'a> {
    pub(super) fn open(bytes: &'a [u8]) -> Self {
        let image = Self {
            bytes,
            inodes_at: word(bytes, 1024 + 40) as usize * BLOCK,
            shared_at: word(bytes, 1024 + 44) as usize * BLOCK,
            epoch: (long(bytes, 1024 + 24).cast_signed(), word(bytes, 1024 + 32)),
            root: half(bytes, 1024 + 14).into(),
            inodes: long(bytes, 1024 + 16),
            devices: (0..half(bytes, 1024 + 86))
                .map(|number| word(bytes, (usize::from(half(bytes, 1024 + 88)) + usize::from(number)) * 128 + 64))
                .collect(),
        };
        assert_eq!(word(bytes, 1024), 0xe0f5_e1e2);
        assert_eq!(bytes[1024 + 12], 12);
        assert_eq!(word(bytes, 1024 + 36) as usize * BLOCK, bytes.len());
        assert_eq!(word(bytes, 1024 + 80), if image.devices.is_empty() { 0 } else { 0xc });
        image
    }

    pub(super) fn file(&self, number: u64) -> File {
        let at = self.inodes_at + number as usize * 32;
        let (half, word, long) =
            (|n| half(self.bytes, at + n), |n| word(self.bytes, at + n), |n| long(self.bytes, at + n));
        let (format, units, mode) = (half(0), half(2) as usize, half(4));
        assert_eq!(format & !0xf, 0);
        let is_compact = format & 1 == 0;
        let head = if is_compact { 32 } else { 64 };
        let body = if units == 0 { 0 } else { 12 + 4 * (units - 1) };
        let size = if is_compact { word(8).into() } else { long(8) };
        let behind = at + head + body;
        let is_device = matches!(mode >> 12, 0o2 | 0o6);
        let mut file = File {
            mode,
            links: if is_compact { half(6).into() } else { word(44) },
            owner: if is_compact { (half(24).into(), half(26).into()) } else { (word(24), word(28)) },
            mtime: if is_compact { self.epoch } else { (long(32).cast_signed(), word(40)) },
            size,
            device_number: if is_device { word(16) } else { 0 },
            xattrs: self.xattrs(at + head, body),
            content: Vec::new(),
            chunk: None,
            is_compact,
        };
        let plain = word(16) as usize * BLOCK;
        let size = size as usize;
        let end = match format >> 1 {
            0 if size == 0 => behind,
            0 => {
                file.content = self.bytes[plain..plain + size].to_vec();
                behind
            }
            2 => {
                let (full, tail) = (size / BLOCK * BLOCK, size % BLOCK);
                assert_eq!(at / BLOCK, (behind + tail - 1) / BLOCK, "what stands behind an inode crosses a block");
                file.content = [&self.bytes[plain..plain + full], &self.bytes[behind..behind + tail]].concat();
                behind + tail
            }
            4 => {
                let index = behind.next_multiple_of(8);
                let format = word(16);
                assert_eq!((format & 0xffff_ffe0, self.bytes[index]), (0x20, 0));
                let [device, block] = [index + 2, index + 4];
                file.chunk = Some((self::half(self.bytes, device), self::word(self.bytes, block), format & 0x1f));
                index + 8
            }
            other => panic!("layout {other}"),
        };
        if end - at <= BLOCK {
            assert_eq!(at / BLOCK, (end - 1) / BLOCK, "an inode crosses a block");
        }
        file
    }

    fn xattrs(&self, at: usize, length: usize) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut found = BTreeMap::new();
        if length == 0 {
            return found;
        }
        let shared: usize = self.bytes[at + 4].into();
        let places = (0..shared).map(|number| word(self.bytes, at + 12 + 4 * number) as usize * 4 + self.shared_at);
        let (mut next, end) = (at + 12 + 4 * shared, at + length);
        for place in places {
            self.xattr(place, &mut found);
        }
        while next < end {
            next = self.xattr(next, &mut found);
        }
        assert_eq!(next, end);
        found
    }

    fn xattr(&self, at: usize, found: &mut BTreeMap<Vec<u8>, Vec<u8>>) -> usize {
        let (name, value) = (usize::from(self.bytes[at]), usize::from(half(self.bytes, at + 2)));
        let prefix: &[u8] = match self.bytes[at + 1] {
            1 => b"user.",
            2 => b"system.posix_acl_access",
            3 => b"system.posix_acl_default",
            4 => b"trusted.",
            6 => b"security.",
            other => panic!("prefix {other}"),
        };
        let name_at = at + 4;
        let value_at = name_at + name;
        let name = [prefix, &self.bytes[name_at..value_at]].concat();
        assert_eq!(found.insert(name, self.bytes[value_at..value_at + value].to_vec()), None);
        (value_at + value).next_multiple_of(4)
    }

    /// Takes a directory's content apart: names, inodes' numbers, types.
    pub(super) fn entries(content: &[u8]) -> Vec<(Vec<u8>, u64, u8)> {
        let mut entries = Vec::new();
        for block in content.chunks(BLOCK) {
            let count = usize::from(half(block, 8)) / 12;
            for number in 0..count {
                let at = number * 12;
                let name_at = half(block, at + 8).into();
                let name_end = if number + 1 < count {
                    half(block, at + 20).into()
                } else {
                    block[name_at..].iter().position(|&byte| byte == 0).map_or(block.len(), |length| name_at + length)
                };
                entries.push((block[name_at..name_end].to_vec(), long(block, at), block[at + 10]));
            }
        }
        assert!(entries.is_sorted());
        entries
    }
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
