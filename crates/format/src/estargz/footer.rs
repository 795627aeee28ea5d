//! Footers: the last bytes of a blob, which tell where its table of contents is.
//!
//! An eStargz footer is an empty gzip member whose extra field (RFC 1952, section 2.3.1.1) holds the offset of the table
//! of contents as 16 hexadecimal digits and the word `STARGZ`. All integers are little endian.
//!
//! | kind | bytes | extra field |
//! |---|---|---|
//! | eStargz | 51 | `S` `G`, length 22, digits, `STARGZ` |
//! | legacy stargz | 47 | digits, `STARGZ`, without the subfield's head that RFC 1952 wants |
//! | external table of contents | 46 | `S` `G`, length 17, `STARGZEXTERNALTOC` |
//!
//! Around the extra field stand a gzip header of 10 bytes, its length (2), an empty stored block (5), and checksum and
//! size, which are 0 (8).
//!
//! The two dialects of zstd:chunked have a skippable frame there, of little-endian numbers of 64 bits and a word of 8 bytes:
//! offset, compressed and uncompressed size of the table of contents, 1, and for the second dialect offset, compressed and
//! uncompressed size of the `tar-split`.
//!
//! | kind | bytes | word |
//! |---|---|---|
//! | stargz-snapshotter; containers/storage until 2023 | 8 + 40 | `GnUlInUx` |
//! | containers/storage | 8 + 64 | `GNUlInUx` |
//!
//! A blob may end in both, the first one last: either reader finds its own.
//!
//! No digest covers a footer: it says where to look, the digest of what is found there decides.

use crate::position::{BlobOffset, BlobRange, Packed};

/// Size of an eStargz footer, in bytes.
pub const FOOTER_BYTES: usize = 51;

/// Size of a legacy stargz footer, in bytes.
pub const LEGACY_FOOTER_BYTES: usize = 47;

/// Size of the footer of a blob whose table of contents is elsewhere, in bytes.
pub const EXTERNAL_TOC_FOOTER_BYTES: usize = 46;

/// As many bytes of a blob's end as [`detect`] looks at, at most.
pub const DETECT_BYTES: usize = 2 * SKIPPABLE_HEAD_BYTES + ZSTD_STARGZ_BYTES + ZSTD_CONTAINERS_BYTES;

/// Magic, method deflate, and the flag for an extra field. Behind them stand a time and two bytes about compressor and
/// system, which mean nothing to a reader.
const GZIP_HEAD: &[u8] = &[0x1f, 0x8b, 0x08, 0x04];
const GZIP_REST_OF_HEAD: &[u8] = &[0, 0, 0, 0, 0, 0xff];
const GZIP_HEAD_BYTES: usize = 10;
/// An empty stored block that is the last one; checksum and size of nothing.
const GZIP_TAIL: &[u8] = &[0x01, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];

const SUBFIELD: &[u8] = b"SG";
const MAGIC: &[u8] = b"STARGZ";
const EXTERNAL_MAGIC: &[u8] = b"STARGZEXTERNALTOC";
const DIGITS: usize = 16;

/// A zstd skippable frame (RFC 8878, section 3.1.2) with the magic number that both dialects use, and its length.
pub const SKIPPABLE_HEAD_BYTES: usize = 8;
const SKIPPABLE_MAGIC: &[u8] = &[0x50, 0x2a, 0x4d, 0x18];
/// The one form of a table of contents that there is.
const ZSTD_FORM: u64 = 1;
const ZSTD_STARGZ_BYTES: usize = 40;
const ZSTD_STARGZ_MAGIC: &[u8] = b"GnUlInUx";
const ZSTD_CONTAINERS_BYTES: usize = 64;
const ZSTD_CONTAINERS_MAGIC: &[u8] = b"GNUlInUx";

/// What the end of a blob says that the blob is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// eStargz.
    Estargz,
    /// stargz, the ancestor, without digests.
    LegacyStargz,
    /// eStargz whose table of contents is in another image.
    ExternalToc,
    /// zstd:chunked as stargz-snapshotter writes it (and containers/storage did until 2022).
    ZstdChunkedStargz,
    /// zstd:chunked as containers/storage writes it: Podman, Buildah, Skopeo.
    ZstdChunkedContainers,
    /// An ordinary layer beside which there is a SOCI index. Its bytes don't tell.
    Soci,
}

impl Kind {
    /// Says whether the blob is made of zstd frames.
    #[must_use]
    pub fn is_zstd(self) -> bool {
        matches!(self, Self::ZstdChunkedStargz | Self::ZstdChunkedContainers)
    }

    /// Returns the name for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Estargz => "eStargz",
            Self::LegacyStargz => "stargz (legacy)",
            Self::ExternalToc => "eStargz with external table of contents",
            Self::ZstdChunkedStargz => "zstd:chunked (stargz-snapshotter)",
            Self::ZstdChunkedContainers => "zstd:chunked (containers/storage)",
            Self::Soci => "tar with a SOCI index",
        }
    }
}

/// A footer that was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Footer {
    /// The table of contents is a gzip member in the blob.
    Toc {
        /// [`Kind::Estargz`] or [`Kind::LegacyStargz`].
        kind: Kind,
        /// Where the table of contents starts. Content ends there too.
        offset: BlobOffset,
        /// Size of the footer, in bytes. The table of contents ends before it.
        footer_bytes: usize,
    },
    /// The table of contents is a zstd frame within a skippable frame.
    Zstd {
        /// [`Kind::ZstdChunkedStargz`] or [`Kind::ZstdChunkedContainers`].
        kind: Kind,
        /// The table of contents, without the head of the skippable frame. Content ends before that.
        toc: Packed,
        /// The other bytes of the tar, as `tar-split` keeps them.
        tar_split: Option<Packed>,
    },
    /// The table of contents is in another image.
    External,
}

/// A blob's end that is a footer by its form but lies, or none at all.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FooterError {
    /// No footer.
    #[error("the blob ends in no eStargz footer")]
    NoFooter,
    /// A table of contents that is not in the blob.
    #[error("footer at {footer} of the blob says that the table of contents is at {offset}, which is not before it")]
    OffsetOutside {
        /// Where the footer starts.
        footer: BlobOffset,
        /// Where the table of contents should start.
        offset: BlobOffset,
    },
    /// A part of a zstd:chunked blob that is not in it.
    #[error(
        "footer at {footer} of the blob says that {length} bytes of the table of contents or of the tar stand at {offset}, \
         which is not before it"
    )]
    Outside {
        /// What the footer says that the blob is.
        kind: Kind,
        /// Where the footer starts.
        footer: BlobOffset,
        /// Where the part should start.
        offset: BlobOffset,
        /// And its length.
        length: u64,
    },
    /// A form of table of contents that nobody knows.
    #[error("footer at {footer} of the blob says that the table of contents is of form {form}; only 1 is known")]
    Form {
        /// Where the footer starts.
        footer: BlobOffset,
        /// The number.
        form: u64,
    },
    /// An offset that is not written as 16 hexadecimal digits.
    #[error("footer at {footer} of the blob has an offset that is no hexadecimal number: \"{digits}\"")]
    OffsetMalformed {
        /// Where the footer starts.
        footer: BlobOffset,
        /// What stands there, escaped.
        digits: String,
    },
}

/// Writes the footer of zstd:chunked as stargz-snapshotter reads it, skippable frame and all.
#[must_use]
pub fn write_zstd_stargz(toc: Packed) -> Vec<u8> {
    let numbers = [toc.range.start.0, toc.range.length, toc.uncompressed, ZSTD_FORM];
    zstd_frame(&numbers, ZSTD_STARGZ_MAGIC)
}

/// Writes the footer of zstd:chunked as containers/storage writes it, skippable frame and all.
#[must_use]
pub fn write_zstd_containers(toc: Packed, tar_split: Packed) -> Vec<u8> {
    let Packed { range, uncompressed } = tar_split;
    let (offset, length) = (range.start.0, range.length);
    let numbers = [toc.range.start.0, toc.range.length, toc.uncompressed, ZSTD_FORM, offset, length, uncompressed];
    zstd_frame(&numbers, ZSTD_CONTAINERS_MAGIC)
}

fn zstd_frame(numbers: &[u64], magic: &[u8]) -> Vec<u8> {
    let content: Vec<u8> =
        numbers.iter().flat_map(|number| number.to_le_bytes()).chain(magic.iter().copied()).collect();
    // A footer is 64 bytes, at most.
    let head = skippable_head(u32::try_from(content.len()).unwrap_or(u32::MAX));
    [&head, content.as_slice()].concat()
}

/// Writes the 46 bytes of the footer of a blob whose table of contents is elsewhere.
#[must_use]
pub fn write_external() -> [u8; EXTERNAL_TOC_FOOTER_BYTES] {
    let mut extra = SUBFIELD.to_vec();
    extra.extend_from_slice(&[17, 0]);
    extra.extend_from_slice(EXTERNAL_MAGIC);
    gzip_member(&extra)
}

/// Writes the 51 bytes of an eStargz footer.
#[must_use]
pub fn write(toc: BlobOffset) -> [u8; FOOTER_BYTES] {
    let mut extra = Vec::with_capacity(FOOTER_BYTES);
    extra.extend_from_slice(SUBFIELD);
    // 16 digits and 6 letters.
    extra.extend_from_slice(&[22, 0]);
    extra.extend_from_slice(format!("{:016x}", toc.0).as_bytes());
    extra.extend_from_slice(MAGIC);
    gzip_member(&extra)
}

/// Writes the 47 bytes of a legacy stargz footer.
#[must_use]
pub fn write_legacy(toc: BlobOffset) -> [u8; LEGACY_FOOTER_BYTES] {
    let mut extra = format!("{:016x}", toc.0).into_bytes();
    extra.extend_from_slice(MAGIC);
    gzip_member(&extra)
}

/// Returns an empty member with an extra field, which is as long as `N` wants it.
fn gzip_member<const N: usize>(extra: &[u8]) -> [u8; N] {
    let length = [u8::try_from(extra.len()).unwrap_or(u8::MAX), 0];
    let parts = [GZIP_HEAD, GZIP_REST_OF_HEAD, &length, extra, GZIP_TAIL];
    let mut member = [0; N];
    member.iter_mut().zip(parts.into_iter().flatten()).for_each(|(to, from)| *to = *from);
    member
}

/// Reads the footer of a blob of `blob_size` bytes. `tail` are its last bytes: [`DETECT_BYTES`] or more, or all.
///
/// # Errors
/// Where there is no footer, or one whose offset is not before it.
pub fn read(tail: &[u8], blob_size: u64) -> Result<Footer, FooterError> {
    if let Some(extra) = gzip_extra(tail, FOOTER_BYTES)
        && let Some(digits) = subfield(extra).and_then(|field| field.strip_suffix(MAGIC))
    {
        return with_offset(Kind::Estargz, digits, FOOTER_BYTES, blob_size);
    }
    if let Some(extra) = gzip_extra(tail, LEGACY_FOOTER_BYTES)
        && let Some(digits) = extra.strip_suffix(MAGIC)
    {
        return with_offset(Kind::LegacyStargz, digits, LEGACY_FOOTER_BYTES, blob_size);
    }
    if let Some(extra) = gzip_extra(tail, EXTERNAL_TOC_FOOTER_BYTES)
        && subfield(extra) == Some(EXTERNAL_MAGIC)
    {
        return Ok(Footer::External);
    }
    if let Some(numbers) = zstd_footer(tail, ZSTD_STARGZ_BYTES, ZSTD_STARGZ_MAGIC) {
        let before = &tail[..tail.len() - SKIPPABLE_HEAD_BYTES - ZSTD_STARGZ_BYTES];
        let both = zstd_footer(before, ZSTD_CONTAINERS_BYTES, ZSTD_CONTAINERS_MAGIC);
        let tar_split = both.filter(|other| other[..4] == numbers[..]).map(|other| [other[4], other[5], other[6]]);
        return zstd(Kind::ZstdChunkedStargz, &numbers, tar_split, ZSTD_STARGZ_BYTES, blob_size);
    }
    if let Some(numbers) = zstd_footer(tail, ZSTD_CONTAINERS_BYTES, ZSTD_CONTAINERS_MAGIC) {
        let tar_split = Some([numbers[4], numbers[5], numbers[6]]);
        return zstd(Kind::ZstdChunkedContainers, &numbers, tar_split, ZSTD_CONTAINERS_BYTES, blob_size);
    }
    Err(FooterError::NoFooter)
}

/// Says what the end of a blob says that it is; `None` where it says nothing. For those who only want to know: a footer
/// that lies is recognised too. `tail` as for [`read`].
#[must_use]
pub fn detect(tail: &[u8], blob_size: u64) -> Option<Kind> {
    match read(tail, blob_size) {
        Ok(Footer::Toc { kind, .. } | Footer::Zstd { kind, .. }) => Some(kind),
        Ok(Footer::External) => Some(Kind::ExternalToc),
        Err(FooterError::NoFooter) => None,
        Err(FooterError::Outside { kind, .. }) => Some(kind),
        Err(FooterError::Form { .. }) if zstd_footer(tail, ZSTD_STARGZ_BYTES, ZSTD_STARGZ_MAGIC).is_some() => {
            Some(Kind::ZstdChunkedStargz)
        }
        Err(FooterError::Form { .. }) => Some(Kind::ZstdChunkedContainers),
        // Only these two have an offset that can be wrong; the longer one was tried first.
        Err(_) if gzip_extra(tail, FOOTER_BYTES).is_some() => Some(Kind::Estargz),
        Err(_) => Some(Kind::LegacyStargz),
    }
}

/// Returns the extra field of the gzip member of `bytes` bytes that `tail` ends in.
fn gzip_extra(tail: &[u8], bytes: usize) -> Option<&[u8]> {
    let member = &tail[tail.len().checked_sub(bytes)?..];
    let rest = member.strip_prefix(GZIP_HEAD)?.get(GZIP_HEAD_BYTES - GZIP_HEAD.len()..)?;
    let (length, extra) = rest.strip_suffix(GZIP_TAIL)?.split_first_chunk()?;
    (usize::from(u16::from_le_bytes(*length)) == extra.len()).then_some(extra)
}

fn subfield(extra: &[u8]) -> Option<&[u8]> {
    let (length, field) = extra.strip_prefix(SUBFIELD)?.split_first_chunk()?;
    (usize::from(u16::from_le_bytes(*length)) == field.len()).then_some(field)
}

fn with_offset(kind: Kind, digits: &[u8], footer_bytes: usize, blob_size: u64) -> Result<Footer, FooterError> {
    // The caller may not have the blob that it says it has.
    let footer = BlobOffset(blob_size.saturating_sub(footer_bytes as u64));
    let malformed = || FooterError::OffsetMalformed { footer, digits: digits.escape_ascii().to_string() };
    if digits.len() != DIGITS {
        return Err(malformed());
    }
    let offset = digits.iter().try_fold(0_u64, |value, digit| {
        let digit = char::from(*digit).to_digit(16)?;
        // 16 digits of 4 bits.
        Some(value << 4 | u64::from(digit))
    });
    let offset = BlobOffset(offset.ok_or_else(malformed)?);
    if offset >= footer {
        return Err(FooterError::OffsetOutside { footer, offset });
    }
    Ok(Footer::Toc { kind, offset, footer_bytes })
}

/// Returns the numbers of the zstd:chunked footer of `bytes` bytes that `tail` ends in.
fn zstd_footer(tail: &[u8], bytes: usize, magic: &[u8]) -> Option<Vec<u64>> {
    let frame = &tail[tail.len().checked_sub(SKIPPABLE_HEAD_BYTES + bytes)?..];
    let numbers = skippable(frame, u32::try_from(bytes).ok()?)?.strip_suffix(magic)?;
    Some(numbers.as_chunks().0.iter().map(|number| u64::from_le_bytes(*number)).collect())
}

/// Returns what stands in the skippable frame that `bytes` begin with, if it is as long as `length` says.
#[must_use]
pub fn skippable(bytes: &[u8], length: u32) -> Option<&[u8]> {
    bytes.strip_prefix(SKIPPABLE_MAGIC)?.strip_prefix(&length.to_le_bytes())
}

/// Returns the head of a skippable frame with `length` bytes in it.
#[must_use]
pub fn skippable_head(length: u32) -> [u8; SKIPPABLE_HEAD_BYTES] {
    let mut head = [0; SKIPPABLE_HEAD_BYTES];
    let (magic, size) = head.split_at_mut(SKIPPABLE_MAGIC.len());
    magic.copy_from_slice(SKIPPABLE_MAGIC);
    size.copy_from_slice(&length.to_le_bytes());
    head
}

fn zstd(
    kind: Kind,
    numbers: &[u64],
    tar_split: Option<[u64; 3]>,
    footer_bytes: usize,
    blob_size: u64,
) -> Result<Footer, FooterError> {
    let footer = BlobOffset(blob_size.saturating_sub((SKIPPABLE_HEAD_BYTES + footer_bytes) as u64));
    let [offset, length, uncompressed, form, ..] = *numbers else { return Err(FooterError::NoFooter) };
    if form != ZSTD_FORM {
        return Err(FooterError::Form { footer, form });
    }
    let packed = |[offset, length, uncompressed]: [u64; 3]| {
        let offset = BlobOffset(offset);
        let outside = FooterError::Outside { kind, footer, offset, length };
        let is_inside =
            offset.0 >= SKIPPABLE_HEAD_BYTES as u64 && offset.checked_add(length).is_some_and(|end| end <= footer);
        if !is_inside || length == 0 {
            return Err(outside);
        }
        Ok(Packed { range: BlobRange { start: offset, length }, uncompressed })
    };
    let toc = packed([offset, length, uncompressed])?;
    // A footer of 64 bytes without one has zeros there.
    let tar_split = tar_split.filter(|numbers| numbers[0] != 0).map(packed).transpose()?;
    Ok(Footer::Zstd { kind, toc, tar_split })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn toc(kind: Kind, offset: u64, footer_bytes: usize) -> Result<Footer, FooterError> {
        Ok(Footer::Toc { kind, offset: BlobOffset(offset), footer_bytes })
    }

    /// A footer of the reference's form, byte by byte as its documents have it.
    fn reference(extra: &[u8]) -> Vec<u8> {
        let mut footer = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff".to_vec();
        footer.extend_from_slice(&u16::try_from(extra.len()).unwrap().to_le_bytes());
        footer.extend_from_slice(extra);
        footer.extend_from_slice(b"\x01\0\0\xff\xff\0\0\0\0\0\0\0\0");
        footer
    }

    #[test]
    fn footers_round_trip() {
        for offset in (0..200_000).step_by(1023) {
            let blob_size = offset + 1000;
            let mut tail = vec![0x55; 80];
            let footer = write(BlobOffset(offset));
            assert_eq!(footer[..], reference(format!("SG\x16\0{offset:016x}STARGZ").as_bytes())[..]);
            tail.extend_from_slice(&footer);
            assert_eq!(read(&tail, blob_size), toc(Kind::Estargz, offset, 51));
            assert_eq!(read(&footer, blob_size), toc(Kind::Estargz, offset, 51));
            let footer = write_legacy(BlobOffset(offset));
            assert_eq!(footer[..], reference(format!("{offset:016x}STARGZ").as_bytes())[..]);
            tail.extend_from_slice(&footer);
            assert_eq!(read(&tail, blob_size), toc(Kind::LegacyStargz, offset, 47));
        }
    }

    fn packed(start: u64, length: u64, uncompressed: u64) -> Packed {
        Packed { range: BlobRange { start: BlobOffset(start), length }, uncompressed }
    }

    #[test]
    fn an_external_table_is_recognised() {
        let external = reference(b"SG\x11\0STARGZEXTERNALTOC");
        assert_eq!(external, write_external());
        let padded = [vec![0; 30], external.clone()].concat();
        for tail in [&external, &padded] {
            assert_eq!(read(tail, 1000), Ok(Footer::External));
            assert_eq!(detect(tail, 1000), Some(Kind::ExternalToc));
        }
        assert_eq!(read(&external[1..], 1000), Err(FooterError::NoFooter));
    }

    #[test]
    fn zstd_footers_are_read_and_written() {
        let mut stargz = b"\x50\x2a\x4d\x18\x28\0\0\0".to_vec();
        for number in [100_u64, 20, 200, 1] {
            stargz.extend_from_slice(&number.to_le_bytes());
        }
        stargz.extend_from_slice(&[0x47, 0x6e, 0x55, 0x6c, 0x49, 0x6e, 0x55, 0x78]);
        let mut containers = b"\x50\x2a\x4d\x18\x40\0\0\0".to_vec();
        for number in [100_u64, 20, 200, 1, 128, 9, 99] {
            containers.extend_from_slice(&number.to_le_bytes());
        }
        containers.extend_from_slice(&[0x47, 0x4e, 0x55, 0x6c, 0x49, 0x6e, 0x55, 0x78]);
        let (toc, tar_split) = (packed(100, 20, 200), packed(128, 9, 99));
        assert_eq!(stargz, write_zstd_stargz(toc));
        assert_eq!(containers, write_zstd_containers(toc, tar_split));
        let both = [containers.clone(), stargz.clone()].concat();
        for (tail, kind, tar_split) in [
            (stargz, Kind::ZstdChunkedStargz, None),
            (containers, Kind::ZstdChunkedContainers, Some(tar_split)),
            (both, Kind::ZstdChunkedStargz, Some(tar_split)),
        ] {
            let padded = [vec![0; 30], tail.clone()].concat();
            for tail in [&tail, &padded] {
                assert_eq!(read(tail, 1000), Ok(Footer::Zstd { kind, toc, tar_split }));
                assert_eq!(detect(tail, 1000), Some(kind));
            }
        }
    }

    #[test]
    fn zstd_footers_that_lie_are_refused() {
        for toc in
            [packed(100, 0, 0), packed(7, 20, 200), packed(952, 1, 1), packed(900, 53, 1), packed(u64::MAX, 1, 1)]
        {
            let tail = write_zstd_stargz(toc);
            assert!(matches!(read(&tail, 1000), Err(FooterError::Outside { .. })), "{toc:?}");
            assert_eq!(detect(&tail, 1000), Some(Kind::ZstdChunkedStargz));
        }
        let tail = write_zstd_containers(packed(100, 20, 200), packed(900, 100, 200));
        assert!(matches!(read(&tail, 1000), Err(FooterError::Outside { .. })));
        let tail = zstd_frame(&[100, 20, 200, 2], ZSTD_STARGZ_MAGIC);
        assert!(matches!(read(&tail, 1000), Err(FooterError::Form { form: 2, .. })));
        assert_eq!(detect(&tail, 1000), Some(Kind::ZstdChunkedStargz));
    }

    #[test]
    fn malformed_extra_fields_are_no_footers() {
        for extra in [
            &b""[..],
            b"S",
            b"SG",
            b"SG\x16",
            b"SG\x16\0",
            b"XX\x16\x000000000000000000STARGZ",
            b"SG\x15\x000000000000000000STARGZ",
            b"SG\x17\x000000000000000000STARGZ",
            b"SG\x16\x000000000000000000STARGA",
            b"SG\x16\x00000000000000000STARGZ",
            b"0000000000000000STARGA",
            b"000000000000000STARGZ",
            b"SG\x11\0STARGZEXTERNALTOX",
        ] {
            let tail = [vec![0; 100], reference(extra)].concat();
            assert_eq!(detect(&tail, 1000), None, "{}", extra.escape_ascii());
        }
        assert_eq!(detect(b"", 0), None);
    }

    #[test]
    fn offsets_are_bound_to_the_blob() {
        let footer = BlobOffset(949);
        for offset in [949, 950, 1000, u64::MAX, i64::MAX as u64] {
            let error = FooterError::OffsetOutside { footer, offset: BlobOffset(offset) };
            assert_eq!(read(&write(BlobOffset(offset)), 1000), Err(error));
            assert_eq!(detect(&write(BlobOffset(offset)), 1000), Some(Kind::Estargz));
        }
        assert_eq!(read(&write(BlobOffset(948)), 1000), toc(Kind::Estargz, 948, 51));
        assert!(read(&write(BlobOffset(0)), 51).is_err());
        assert!(read(&write_legacy(BlobOffset(1000)), 1000).is_err());
        assert_eq!(detect(&write_legacy(BlobOffset(1000)), 1000), Some(Kind::LegacyStargz));
        for digits in ["000000000000000g", "+00000000000000f", "-00000000000000f", "               0"] {
            let tail = reference(format!("SG\x16\0{digits}STARGZ").as_bytes());
            assert_eq!(read(&tail, 1000), Err(FooterError::OffsetMalformed { footer, digits: digits.into() }));
        }
        // The reference takes digits of either case.
        assert_eq!(read(&reference(b"SG\x16\x0000000000000000aBSTARGZ"), 1000), toc(Kind::Estargz, 0xab, 51));
    }

    proptest! {
        #[test]
        fn a_changed_bit_is_refused_or_only_moves_the_offset(bit in 0..FOOTER_BYTES * 8, offset in 0..10_000_u64) {
            let mut footer = write(BlobOffset(offset));
            footer[bit / 8] ^= 1 << (bit % 8);
            match read(&footer, 20_000) {
                Ok(found) => {
                    let Footer::Toc { kind: Kind::Estargz, offset: found, footer_bytes: 51 } = found else {
                        return Err(TestCaseError::fail(format!("{found:?}")));
                    };
                    // A digit, or the header's time, system and compressor, which say nothing.
                    prop_assert!((16..32).contains(&(bit / 8)) || (found.0 == offset && (4..10).contains(&(bit / 8))));
                }
                Err(_) => prop_assert!(!(4..10).contains(&(bit / 8))),
            }
        }

        #[test]
        fn no_bytes_panic(tail in proptest::collection::vec(any::<u8>(), 0..100), blob_size in any::<u64>()) {
            let _ = detect(&tail, blob_size);
        }
    }
}
