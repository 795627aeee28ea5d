//! What a header says beyond what an [`super::Entry`] keeps, for those who must tell of it as it is.

use super::{BLOCK_BYTES, header, pax};
use crate::index::Timestamp;

/// Fields as they stand there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Raw {
    /// The whole mode field, with whatever bits beyond the permissions.
    pub mode: i64,
    /// Access time.
    pub accessed: Option<Timestamp>,
    /// Change time.
    pub changed: Option<Timestamp>,
}

impl Raw {
    /// Reads all headers of one entry, which were read as an entry before: the last block is its own header.
    #[must_use]
    pub fn read(headers: &[u8]) -> Self {
        let (blocks, _) = headers.as_chunks::<BLOCK_BYTES>();
        let mut raw = Self::default();
        let Some((own, mut before)) = blocks.split_last() else { return raw };
        raw.mode = header::number(&own[header::MODE]).unwrap_or_default();
        if header::dialect(own) == header::Dialect::Gnu {
            let time = |field: &[u8]| {
                let seconds = header::number(field).ok().filter(|_| field[0] != 0)?;
                Some(Timestamp { seconds, nanoseconds: 0 })
            };
            raw.accessed = time(&own[header::GNU_ATIME]);
            raw.changed = time(&own[header::GNU_CTIME]);
        }
        while let Some((block, rest)) = before.split_first() {
            let size = header::number(&block[header::SIZE]).ok().and_then(|size| usize::try_from(size).ok());
            let size = size.unwrap_or_default();
            let (content, behind) = rest.split_at(size.div_ceil(BLOCK_BYTES).min(rest.len()));
            if block[header::TYPE_FLAG] == b'x' {
                let content = content.as_flattened();
                raw.records(&content[..size.min(content.len())]);
            }
            before = behind;
        }
        raw
    }

    fn records(&mut self, mut records: &[u8]) {
        while let Some(space) = records.iter().position(|byte| *byte == b' ') {
            let length = pax::decimal(&records[..space]).and_then(|length| usize::try_from(length).ok());
            let Some(record) = length.and_then(|length| records.get(space + 1..length)) else { return };
            records = &records[space + 1 + record.len()..];
            let time = |value: &[u8]| pax::time("time", value.strip_suffix(b"\n").unwrap_or(value)).ok().flatten();
            if let Some(value) = record.strip_prefix(b"atime=") {
                self.accessed = time(value).or(self.accessed);
            } else if let Some(value) = record.strip_prefix(b"ctime=") {
                self.changed = time(value).or(self.changed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_modes_are_found() {
        let mut own = [0; BLOCK_BYTES];
        own[header::MODE].copy_from_slice(b"0100644\0");
        own[header::MAGIC].copy_from_slice(b"ustar\x0000");
        let records = b"22 atime=1700000000.5\n20 ctime=1700000001\n";
        let mut first = own;
        first[header::TYPE_FLAG] = b'x';
        first[header::SIZE].copy_from_slice(format!("{:011o}\0", records.len()).as_bytes());
        let mut content = [0; BLOCK_BYTES];
        content[..records.len()].copy_from_slice(records);
        let raw = Raw::read(&[first, content, own].concat());
        assert_eq!(raw.mode, 0o100_644);
        assert_eq!(raw.accessed, Some(Timestamp { seconds: 1_700_000_000, nanoseconds: 500_000_000 }));
        assert_eq!(raw.changed, Some(Timestamp { seconds: 1_700_000_001, nanoseconds: 0 }));
        assert_eq!(Raw::read(&own), Raw { mode: 0o100_644, ..Raw::default() });
        let mut gnu = own;
        gnu[header::MAGIC].copy_from_slice(b"ustar  \0");
        gnu[header::GNU_ATIME].copy_from_slice(b"14524535400\0");
        assert_eq!(Raw::read(&gnu).accessed.map(|time| time.seconds), Some(0o14_524_535_400));
        assert_eq!(Raw::read(&gnu).changed, None);
        assert_eq!(Raw::read(b"short"), Raw::default());
    }
}
