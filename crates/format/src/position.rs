//! Positions, one type for each thing that has positions, so that they cannot be mixed up.

use std::{fmt, ops::Range};

macro_rules! position {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
        pub struct $name(pub u64);

        impl $name {
            /// Returns the position `length` bytes further, or `None` where no such position exists.
            #[must_use]
            pub fn checked_add(self, length: u64) -> Option<Self> {
                self.0.checked_add(length).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

position! {
    /// A byte's place in a layer's blob: compressed bytes, as the registry holds them.
    BlobOffset
}
position! {
    /// A byte's place in a file of the layer: uncompressed bytes, as a program reads them.
    FileOffset
}
position! {
    /// A byte's place in a layer's data file: uncompressed content of all files, each at a multiple of
    /// [`DATA_ALIGNMENT`].
    DataOffset
}

/// Every file's content starts at a multiple of this in the data file, so that EROFS can map it. Bytes.
pub const DATA_ALIGNMENT: u64 = 4 << 10;

/// Bytes of a blob.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BlobRange {
    /// The first byte.
    pub start: BlobOffset,
    /// How many, in compressed bytes.
    pub length: u64,
}

/// A part of a blob that is compressed by itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Packed {
    /// Its compressed bytes.
    pub range: BlobRange,
    /// How many bytes that is uncompressed.
    pub uncompressed: u64,
}

impl BlobRange {
    /// Returns the position behind the last byte.
    ///
    /// # Panics
    /// Where that is beyond 2^64; ranges made by a parser were checked against the blob's size.
    #[must_use]
    pub fn end(&self) -> BlobOffset {
        BlobOffset(self.start.0 + self.length)
    }
}

impl fmt::Display for BlobRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.length)
    }
}

/// Bytes of a data file: half open, as [`Range`] is.
pub type DataRange = Range<DataOffset>;
