//! What headers say word for word: for those who write it down elsewhere.

use std::collections::BTreeMap;

use super::{
    Error,
    header::{self, Block, Dialect},
    pax,
    reader::number,
};

/// An entry's own header and the PAX records before it, as they stand in the archive. [`super::Entry`] is what they mean.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RawHeader {
    /// The mode, with whatever bits it has.
    pub mode: i64,
    /// The fields for a device's numbers, which entries have that are none, too.
    pub device: (i64, i64),
    /// The records of the last PAX header before the entry, by keyword; of equal keywords the last. Not the global ones.
    pub records: BTreeMap<Box<[u8]>, Box<[u8]>>,
}

impl RawHeader {
    /// Takes the records of a header that were found to be sound.
    pub(super) fn set_records(&mut self, records: &[u8]) {
        self.records.clear();
        let mut rest = records;
        while let Ok((keyword, value)) = pax::next(&mut rest) {
            self.records.insert(keyword.into(), value.into());
        }
    }

    pub(super) fn set_header(&mut self, block: &Block, offset: u64) -> Result<(), Error> {
        self.mode = number(&block[header::MODE], offset, "mode")?;
        self.device = (0, 0);
        if header::dialect(block) != Dialect::V7 {
            self.device.0 = number(&block[header::DEVICE_MAJOR], offset, "device major number")?;
            self.device.1 = number(&block[header::DEVICE_MINOR], offset, "device minor number")?;
        }
        Ok(())
    }
}
