//! The 512-byte header block: where its fields are and how numbers are written in them.
//!
//! ```text
//! field     at  bytes   V7  USTAR  STAR  GNU         field      at  bytes   USTAR   STAR   GNU
//! name       0    100   x   x      x     x           magic     257      6   ustar0  ustar0 "ustar "
//! mode     100      8   x   x      x     x           version   263      2   00      00     " " NUL
//! uid      108      8   x   x      x     x           uname     265     32   x       x      x
//! gid      116      8   x   x      x     x           gname     297     32   x       x      x
//! size     124     12   x   x      x     x           devmajor  329      8   x       x      x
//! mtime    136     12   x   x      x     x           devminor  337      8   x       x      x
//! chksum   148      8   x   x      x     x           prefix    345    155   x       131 B  (atime 12, ctime 12, ...)
//! typeflag 156      1   x   x      x     x           sparse    386     96                  x
//! linkname 157    100   x   x      x     x           tar magic 508      4           "tar" NUL
//! ```

use std::ops::Range;

use super::BLOCK_BYTES;

pub(super) type Block = [u8; BLOCK_BYTES];

pub(super) const NAME: Range<usize> = 0..100;
pub(super) const MODE: Range<usize> = 100..108;
pub(super) const UID: Range<usize> = 108..116;
pub(super) const GID: Range<usize> = 116..124;
pub(super) const SIZE: Range<usize> = 124..136;
pub(super) const MTIME: Range<usize> = 136..148;
pub(super) const CHECKSUM: Range<usize> = 148..156;
pub(super) const TYPE_FLAG: usize = 156;
pub(super) const LINK: Range<usize> = 157..257;
/// Magic and version together.
pub(super) const MAGIC: Range<usize> = 257..265;
pub(super) const USER_NAME: Range<usize> = 265..297;
pub(super) const GROUP_NAME: Range<usize> = 297..329;
pub(super) const DEVICE_MAJOR: Range<usize> = 329..337;
pub(super) const DEVICE_MINOR: Range<usize> = 337..345;
pub(super) const PREFIX: Range<usize> = 345..500;
const STAR_PREFIX: Range<usize> = 345..476;
const STAR_MAGIC: Range<usize> = 508..512;
pub(super) const GNU_ATIME: Range<usize> = 345..357;
pub(super) const GNU_CTIME: Range<usize> = 357..369;

/// Which fields a header has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Dialect {
    /// Up to `linkname`.
    V7,
    /// POSIX; also every PAX header.
    Ustar,
    /// POSIX with a shorter prefix.
    Star,
    /// GNU, without prefix.
    Gnu,
}

/// A field that should be a number and is not, or is one beyond 63 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct NotANumber;

pub(super) fn dialect(block: &Block) -> Dialect {
    match &block[MAGIC] {
        b"ustar  \0" => Dialect::Gnu,
        // The version is not looked at, as in Go and GNU tar: writers disagree about it.
        magic if magic.starts_with(b"ustar\0") => {
            if &block[STAR_MAGIC] == b"tar\0" {
                Dialect::Star
            } else {
                Dialect::Ustar
            }
        }
        _ => Dialect::V7,
    }
}

/// Says whether the block's checksum is that of its bytes. Old writers summed signed bytes, POSIX has unsigned ones.
pub(super) fn checksum_is_right(block: &Block) -> bool {
    let Ok(stated) = number(&block[CHECKSUM]) else { return false };
    let (unsigned, signed) = checksums(block);
    stated == i64::from(unsigned) || stated == i64::from(signed)
}

/// Returns the sum of the block's bytes with the checksum taken as spaces: of unsigned and of signed bytes.
pub(super) fn checksums(block: &Block) -> (u32, i32) {
    let mut unsigned = 0_u32;
    let mut negative = 0_i32;
    for (place, &byte) in block.iter().enumerate() {
        let byte = if CHECKSUM.contains(&place) { b' ' } else { byte };
        unsigned += u32::from(byte);
        negative += i32::from(byte >> 7);
    }
    // At most 512 * 255, far from any overflow.
    (unsigned, unsigned.cast_signed() - 256 * negative)
}

/// Returns a field's text: up to the first NUL, or all of it.
pub(super) fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    &field[..end]
}

/// Reads a number: octal digits between spaces or NULs, or base-256 (first bit set; two's complement in the rest).
pub(super) fn number(field: &[u8]) -> Result<i64, NotANumber> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => base_256(field),
        _ => octal(field),
    }
}

fn octal(field: &[u8]) -> Result<i64, NotANumber> {
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let Some(start) = field.iter().position(|byte| !blank(byte)) else { return Ok(0) };
    let end = field.iter().rposition(|byte| !blank(byte)).map_or(start, |last| last + 1);
    text(&field[start..end]).iter().try_fold(0_i64, |value, &digit| match digit {
        b'0'..=b'7' if value >> 60 == 0 => Ok(value << 3 | i64::from(digit - b'0')),
        _ => Err(NotANumber),
    })
}

fn base_256(field: &[u8]) -> Result<i64, NotANumber> {
    let mut bytes = field.iter();
    // The first bit only marks the form, the next one is the sign.
    let first = bytes.next().map_or(0, |first| first & 0x7f);
    let mut value = if first & 0x40 == 0 { i128::from(first) } else { i128::from(first) - 0x80 };
    for &byte in bytes {
        value = value << 8 | i128::from(byte);
        // Once beyond 64 bits it never comes back, and i128 must not overflow.
        if i64::try_from(value).is_err() {
            return Err(NotANumber);
        }
    }
    i64::try_from(value).map_err(|_| NotANumber)
}

/// Returns the path of a header: prefix, where the dialect has one, and name.
pub(super) fn path(block: &Block) -> Vec<u8> {
    let prefix = match dialect(block) {
        Dialect::V7 => &[],
        Dialect::Ustar => text(&block[PREFIX]),
        Dialect::Star => text(&block[STAR_PREFIX]),
        Dialect::Gnu => gnu_prefix(block),
    };
    let name = text(&block[NAME]);
    if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
}

/// Returns the prefix of a GNU header, which should have none.
///
/// Go before 1.8, which wrote the layers of those years, marked headers with large numbers as GNU and put a prefix
/// in nevertheless (golang.org/issue/12594). As Go does since then: if the times that belong there are no numbers and
/// the text is ASCII, it is a prefix.
fn gnu_prefix(block: &Block) -> &[u8] {
    let is_time = |field: &[u8]| field[0] == 0 || number(field).is_ok();
    if is_time(&block[GNU_ATIME]) && is_time(&block[GNU_CTIME]) {
        return &[];
    }
    let prefix = text(&block[PREFIX]);
    if prefix.is_ascii() { prefix } else { &[] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        let cases: &[(&[u8], Result<i64, NotANumber>)] = &[
            (b"", Ok(0)),
            (b"\0\0\0\0\0\0\0\0", Ok(0)),
            (b"        ", Ok(0)),
            (b"0000644\0", Ok(0o644)),
            (b"000644 \0", Ok(0o644)),
            (b"  644 \0\0", Ok(0o644)),
            (b"\0 644\0 \0", Ok(0o644)),
            (b"77777777", Ok(0o77_777_777)),
            (b"777777777777", Ok(0o777_777_777_777)),
            (b"644\x009999", Ok(0o644)),
            (b"0000648\0", Err(NotANumber)),
            (b"644 755\0", Err(NotANumber)),
            (b"-000001\0", Err(NotANumber)),
            (b"0x12", Err(NotANumber)),
            (b"777777777777777777777", Ok(i64::MAX)),
            (b"1000000000000000000000", Err(NotANumber)),
            (b"\x80\0\0\0\0\0\0\x01", Ok(1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Ok(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Ok(-2)),
            (b"\x80\0\0\0\0\0\0\x02\0\0\0\0", Ok(8 << 30)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Ok(i64::MAX)),
            (b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0", Ok(i64::MIN)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", Err(NotANumber)),
            (b"\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff", Err(NotANumber)),
            (b"\x81\0\0\0\0\0\0\0\0\0\0\0", Err(NotANumber)),
            (b"\xc0\0\0\0\0\0\0\0\0\0\0\0", Err(NotANumber)),
            (b"\x80", Ok(0)),
            (b"\xff", Ok(-1)),
        ];
        for (field, expected) in cases {
            assert_eq!(number(field), *expected, "{}", field.escape_ascii());
        }
    }

    #[test]
    fn checksum_of_signed_bytes_is_accepted_too() {
        let mut block = [0; BLOCK_BYTES];
        block[..4].copy_from_slice(b"na\xefv");
        let (unsigned, signed) = checksums(&block);
        assert_eq!(i64::from(unsigned) - i64::from(signed), 256);
        for (sum, right) in [(unsigned, true), (signed.cast_unsigned(), true), (unsigned + 1, false)] {
            block[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            assert_eq!(checksum_is_right(&block), right, "{sum}");
        }
        block[CHECKSUM].copy_from_slice(b"12345x\0 ");
        assert!(!checksum_is_right(&block));
    }

    #[test]
    fn go_before_1_8_wrote_prefixes_into_gnu_headers() {
        let mut block = [0; BLOCK_BYTES];
        block[..4].copy_from_slice(b"file");
        block[MAGIC].copy_from_slice(b"ustar  \0");
        assert_eq!(path(&block), b"file");
        block[345..354].copy_from_slice(b"directory");
        assert_eq!(path(&block), b"directory/file");
        block[345] = 0xe4;
        assert_eq!(path(&block), b"file");
        block[GNU_ATIME].copy_from_slice(b"12345670123\0");
        assert_eq!(path(&block), b"file");
    }
}
