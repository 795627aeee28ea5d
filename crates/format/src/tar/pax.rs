//! PAX records: `length keyword=value newline`, which overrule the fields of the header that follows.
//!
//! Local records (type `x`, and Solaris' `X`) are for one entry, global ones (type `g`) for all that follow. Records
//! with keywords that mean nothing here are passed over; the others are taken apart at once, so that what is kept is
//! bounded by the limits and not by the number of records.

use std::collections::BTreeMap;

use base64::Engine as _;

use super::{Error, sparse::Segment};
use crate::{
    index::{Timestamp, Xattrs},
    limits::Limits,
};

/// Keyword of an extended attribute's raw value, as star and GNU tar write it; its name follows.
pub(super) const XATTR: &[u8] = b"SCHILY.xattr.";
/// Keyword of an extended attribute in base64, as libarchive writes it beside the other; its name follows, URL-encoded.
const XATTR_BASE64: &[u8] = b"LIBARCHIVE.xattr.";
const GNU_SPARSE: &[u8] = b"GNU.sparse.";

/// What records say. A record with an empty value takes back what an earlier one (or a global one) has said.
#[derive(Clone, Debug, Default)]
pub(super) struct Records {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<i64>,
    pub gid: Option<i64>,
    pub user_name: Option<Vec<u8>>,
    pub group_name: Option<Vec<u8>>,
    pub mtime: Option<Timestamp>,
    pub device_major: Option<u32>,
    pub device_minor: Option<u32>,
    pub sparse: Sparse,
    xattrs: BTreeMap<Box<[u8]>, Xattr>,
    xattr_bytes: usize,
}

#[derive(Clone, Debug)]
struct Xattr {
    value: Box<[u8]>,
    /// `LIBARCHIVE.xattr.` is second choice: not all programs that write it know the name's bytes.
    second_choice: bool,
}

/// Records of GNU's sparse formats 0.0, 0.1 and 1.0.
#[derive(Clone, Debug, Default)]
pub(super) struct Sparse {
    pub major: Option<u64>,
    pub minor: Option<u64>,
    /// `GNU.sparse.name`, which is the entry's path in formats 0.1 and 1.0.
    pub name: Option<Vec<u8>>,
    /// `GNU.sparse.size` (formats 0.0, 0.1).
    pub size: Option<u64>,
    /// `GNU.sparse.realsize` (format 1.0).
    pub real_size: Option<u64>,
    /// From `GNU.sparse.map` (0.1), or `GNU.sparse.offset` and `GNU.sparse.numbytes` in turn (0.0).
    pub map: Option<Vec<Segment>>,
    /// A `GNU.sparse.offset` that waits for its `GNU.sparse.numbytes`.
    pub offset: Option<u64>,
}

/// Whom records are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Scope {
    Local,
    Global,
}

/// The parts of an error that the caller, who knows the place, completes.
type Problem = (&'static str, &'static str);

impl Records {
    /// Takes the records of one header; `offset` is that header's.
    pub fn apply(&mut self, records: &[u8], scope: Scope, offset: u64, limits: &Limits) -> Result<(), Error> {
        let mut rest = records;
        while !rest.is_empty() {
            let (keyword, value) =
                next(&mut rest).map_err(|problem| Error::Corrupt { offset, part: "PAX record", problem })?;
            let found = match scope {
                Scope::Local => self.set(keyword, value),
                Scope::Global => self.set_global(keyword, value),
            };
            found.map_err(|(part, problem)| Error::Corrupt { offset, part, problem })?;
            if self.xattr_bytes > limits.xattr_bytes {
                let limit = limits.xattr_bytes as u64;
                return Err(Error::Limit { offset, part: "total bytes of extended attributes", limit });
            }
        }
        if self.sparse.offset.is_some() {
            let (part, problem) = ("PAX record GNU.sparse.offset", "no GNU.sparse.numbytes follows");
            return Err(Error::Corrupt { offset, part, problem });
        }
        Ok(())
    }

    /// Returns the extended attributes, sorted by name.
    pub fn into_xattrs(self) -> Xattrs {
        self.xattrs.into_iter().map(|(name, xattr)| (name, xattr.value)).collect()
    }

    /// Global records are applied as POSIX has it, but for those that say which bytes are an entry's and where it
    /// goes. Go and the container runtimes built with it take no notice of global records; a layer in which that made
    /// a difference of this weight would be two layers.
    fn set_global(&mut self, keyword: &[u8], value: &[u8]) -> Result<(), Problem> {
        let steering = matches!(keyword, b"path" | b"linkpath" | b"size" | b"SCHILY.devmajor" | b"SCHILY.devminor")
            || [GNU_SPARSE, XATTR, XATTR_BASE64].iter().any(|prefix| keyword.starts_with(prefix));
        if steering {
            return Err((
                "global PAX record",
                "programs disagree about a path, link, size or attribute for all entries",
            ));
        }
        self.set(keyword, value)
    }

    fn set(&mut self, keyword: &[u8], value: &[u8]) -> Result<(), Problem> {
        match keyword {
            b"path" => self.path = name("PAX record path", value)?,
            b"linkpath" => self.link = name("PAX record linkpath", value)?,
            b"uname" => self.user_name = name("PAX record uname", value)?,
            b"gname" => self.group_name = name("PAX record gname", value)?,
            b"size" => self.size = unsigned("PAX record size", value)?,
            b"uid" => self.uid = signed("PAX record uid", value)?,
            b"gid" => self.gid = signed("PAX record gid", value)?,
            b"mtime" => self.mtime = time("PAX record mtime", value)?,
            b"SCHILY.devmajor" => self.device_major = device("PAX record SCHILY.devmajor", value)?,
            b"SCHILY.devminor" => self.device_minor = device("PAX record SCHILY.devminor", value)?,
            b"GNU.volume.offset" | b"GNU.volume.size" | b"GNU.volume.filename" => {
                return Err(("PAX record GNU.volume", "archives of several volumes are not supported"));
            }
            _ => {
                if let Some(keyword) = keyword.strip_prefix(GNU_SPARSE) {
                    self.sparse.set(keyword, value)?;
                } else if let Some(encoded) = keyword.strip_prefix(XATTR) {
                    self.set_xattr(decode_xattr_name(encoded), value.into(), false)?;
                } else if let Some(encoded) = keyword.strip_prefix(XATTR_BASE64) {
                    let part = "PAX record LIBARCHIVE.xattr";
                    let name = decode_url(encoded).ok_or((part, "name is not URL-encoded"))?;
                    let value = decode_base64(value).ok_or((part, "value is not base64"))?;
                    self.set_xattr(name, value.into_boxed_slice(), true)?;
                }
            }
        }
        Ok(())
    }

    /// An empty value is one: extended attributes may be empty, and GNU tar and containerd set them so.
    fn set_xattr(&mut self, name: Vec<u8>, value: Box<[u8]>, second_choice: bool) -> Result<(), Problem> {
        if name.is_empty() || name.contains(&0) {
            return Err(("PAX record of an extended attribute", "name is empty or holds a NUL byte"));
        }
        if second_choice && self.xattrs.get(name.as_slice()).is_some_and(|xattr| !xattr.second_choice) {
            return Ok(());
        }
        self.xattr_bytes = self.xattr_bytes.saturating_add(name.len()).saturating_add(value.len());
        let name_bytes = name.len();
        if let Some(earlier) = self.xattrs.insert(name.into(), Xattr { value, second_choice }) {
            self.xattr_bytes = self.xattr_bytes.saturating_sub(name_bytes + earlier.value.len());
        }
        Ok(())
    }
}

/// Returns the extended attributes that some records say.
pub(crate) fn attributes<'a>(records: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Result<Xattrs, &'static str> {
    let mut found = Records::default();
    for (keyword, value) in records {
        if [XATTR, XATTR_BASE64].iter().any(|prefix| keyword.starts_with(prefix)) {
            found.set(keyword, value).map_err(|(_, problem)| problem)?;
        }
    }
    Ok(found.into_xattrs())
}

impl Sparse {
    fn set(&mut self, keyword: &[u8], value: &[u8]) -> Result<(), Problem> {
        match keyword {
            b"major" => self.major = unsigned("PAX record GNU.sparse.major", value)?,
            b"minor" => self.minor = unsigned("PAX record GNU.sparse.minor", value)?,
            b"name" => self.name = name("PAX record GNU.sparse.name", value)?,
            b"size" => self.size = unsigned("PAX record GNU.sparse.size", value)?,
            b"realsize" => self.real_size = unsigned("PAX record GNU.sparse.realsize", value)?,
            b"map" => self.map = map("PAX record GNU.sparse.map", value)?,
            b"offset" => {
                let part = "PAX record GNU.sparse.offset";
                if self.offset.is_some() {
                    return Err((part, "no GNU.sparse.numbytes follows"));
                }
                self.offset = Some(unsigned(part, value)?.ok_or((part, "empty"))?);
            }
            b"numbytes" => {
                let part = "PAX record GNU.sparse.numbytes";
                let length = unsigned(part, value)?.ok_or((part, "empty"))?;
                let offset = self.offset.take().ok_or((part, "no GNU.sparse.offset precedes"))?;
                self.map.get_or_insert_default().push(Segment { offset, length });
            }
            // `numblocks` repeats what the map says.
            _ => {}
        }
        Ok(())
    }
}

/// Takes the next record off `rest`.
pub(super) fn next<'a>(rest: &mut &'a [u8]) -> Result<(&'a [u8], &'a [u8]), &'static str> {
    /// Digits of the longest length: more are no length that fits into an archive.
    const LENGTH_DIGITS: usize = 19;
    let space = rest.iter().take(LENGTH_DIGITS + 1).position(|&byte| byte == b' ').ok_or("no length")?;
    let length =
        decimal(&rest[..space]).and_then(|length| usize::try_from(length).ok()).ok_or("length is no number")?;
    let record = rest.get(space + 1..length).ok_or("length does not fit")?;
    let record = record.strip_suffix(b"\n").ok_or("no newline at its end")?;
    let equals = record.iter().position(|&byte| byte == b'=').ok_or("no equals sign")?;
    let (keyword, value) = (&record[..equals], &record[equals + 1..]);
    if keyword.is_empty() || keyword.contains(&0) {
        return Err("keyword is empty or holds a NUL byte");
    }
    *rest = &rest[length..];
    Ok((keyword, value))
}

fn name(part: &'static str, value: &[u8]) -> Result<Option<Vec<u8>>, Problem> {
    if value.contains(&0) {
        return Err((part, "holds a NUL byte"));
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

fn unsigned(part: &'static str, value: &[u8]) -> Result<Option<u64>, Problem> {
    if value.is_empty() {
        return Ok(None);
    }
    // What does not fit into an offset of the operating system (63 bits) is no size.
    let number = decimal(value).filter(|&number| i64::try_from(number).is_ok());
    number.map(Some).ok_or((part, "not a decimal number in range"))
}

fn signed(part: &'static str, value: &[u8]) -> Result<Option<i64>, Problem> {
    if value.is_empty() {
        return Ok(None);
    }
    let number = match value.strip_prefix(b"-") {
        Some(digits) => decimal(digits).and_then(|number| 0_i64.checked_sub_unsigned(number)),
        None => decimal(value).and_then(|number| i64::try_from(number).ok()),
    };
    number.map(Some).ok_or((part, "not a decimal number in range"))
}

fn device(part: &'static str, value: &[u8]) -> Result<Option<u32>, Problem> {
    let number = unsigned(part, value)?;
    number.map(|number| u32::try_from(number).map_err(|_| (part, "beyond 32 bits"))).transpose()
}

/// Reads `[-]seconds[.fraction]`. Digits behind the ninth of a fraction are dropped.
pub(super) fn time(part: &'static str, value: &[u8]) -> Result<Option<Timestamp>, Problem> {
    if value.is_empty() {
        return Ok(None);
    }
    let problem = (part, "not a decimal number of seconds");
    let (whole, fraction) = match value.iter().position(|&byte| byte == b'.') {
        Some(point) => (&value[..point], &value[point + 1..]),
        None => (value, &b""[..]),
    };
    let seconds = signed(part, whole)?.ok_or(problem)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(problem);
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0_u32, |value, digit| value * 10 + u32::from(digit - b'0'));
    if nanoseconds == 0 || !whole.starts_with(b"-") {
        return Ok(Some(Timestamp { seconds, nanoseconds }));
    }
    // The fraction of a negative time leads further away from zero; a Timestamp's nanoseconds lead upwards.
    let seconds = seconds.checked_sub(1).ok_or(problem)?;
    Ok(Some(Timestamp { seconds, nanoseconds: 1_000_000_000 - nanoseconds }))
}

/// Reads `offset,length,offset,length...`.
fn map(part: &'static str, value: &[u8]) -> Result<Option<Vec<Segment>>, Problem> {
    if value.is_empty() {
        return Ok(None);
    }
    let mut segments = Vec::new();
    let mut numbers = value.split(|&byte| byte == b',');
    while let Some(offset) = numbers.next() {
        let length = numbers.next().ok_or((part, "an offset without a length"))?;
        let number = |digits| unsigned(part, digits)?.ok_or((part, "an empty number"));
        segments.push(Segment { offset: number(offset)?, length: number(length)? });
    }
    Ok(Some(segments))
}

pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, &digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// A keyword ends at the first `=`, but the name of an attribute may hold one. GNU tar writes `%3D` for it and `%25`
/// for the percent sign; we do so too, though only where it is needed: Go takes names as they are.
fn decode_xattr_name(encoded: &[u8]) -> Vec<u8> {
    let mut name = Vec::with_capacity(encoded.len());
    let mut rest = encoded;
    while let Some((&byte, behind)) = rest.split_first() {
        let (byte, behind) = match rest.get(..3) {
            Some(b"%3D") => (b'=', &rest[3..]),
            Some(b"%25") => (b'%', &rest[3..]),
            _ => (byte, behind),
        };
        name.push(byte);
        rest = behind;
    }
    name
}

/// The reverse of [`decode_xattr_name`].
pub(super) fn encode_xattr_name(name: &[u8]) -> Vec<u8> {
    let mut encoded = Vec::with_capacity(name.len());
    for (place, &byte) in name.iter().enumerate() {
        match byte {
            b'=' => encoded.extend_from_slice(b"%3D"),
            b'%' if name[place..].starts_with(b"%25") || name[place..].starts_with(b"%3D") => {
                encoded.extend_from_slice(b"%25");
            }
            _ => encoded.push(byte),
        }
    }
    encoded
}

fn decode_url(encoded: &[u8]) -> Option<Vec<u8>> {
    let mut name = Vec::with_capacity(encoded.len());
    let mut bytes = encoded.iter();
    while let Some(&byte) = bytes.next() {
        name.push(match byte {
            b'%' => {
                let mut nibble = || char::from(*bytes.next()?).to_digit(16);
                u8::try_from(nibble()? << 4 | nibble()?).ok()?
            }
            _ => byte,
        });
    }
    Some(name)
}

fn decode_base64(value: &[u8]) -> Option<Vec<u8>> {
    // libarchive leaves out the padding.
    let end = value.iter().rposition(|&byte| byte != b'=').map_or(0, |last| last + 1);
    base64::engine::general_purpose::STANDARD_NO_PAD.decode(&value[..end]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(keyword: &[u8], value: &[u8]) -> Vec<u8> {
        super::super::writer::pax_record(keyword, value)
    }

    fn apply(records: &[u8], scope: Scope) -> Result<Records, Error> {
        let mut found = Records::default();
        found.apply(records, scope, 0, &Limits { xattr_bytes: 100, ..Limits::default() }).map(|()| found)
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            "12",
            " a=b\n",
            "5 a=b\n",
            "7 a=b\n",
            "6 a=b",
            "6 a=bx",
            "-6 a=b\n",
            "+6 a=b\n",
            "0 a=b\n",
            "2 \n",
            "1 ",
            "5 ab\n",
            "5 =b\n",
            "6 \0=b\n",
            "99999999999999999999 a=b\n",
            "6 a=b\n\0\0",
            "6 a=b\n6 a=b",
            "x a=b\n",
        ] {
            let found = apply(bad.as_bytes(), Scope::Local);
            assert!(matches!(found, Err(Error::Corrupt { part: "PAX record", .. })), "{bad:?}: {found:?}");
        }
        assert!(apply(b"6 a=b\n06 a=b\n", Scope::Local).is_err());
        assert!(apply(b"6 a=b\n07 a=b\n", Scope::Local).is_ok());
    }

    #[test]
    fn bad_values_are_refused() {
        let cases: &[(&str, &[&[u8]])] = &[
            ("path", &[b"a\0b"]),
            ("linkpath", &[b"\0"]),
            ("uname", &[b"r\0t"]),
            ("gname", &[b"\0"]),
            ("size", &[b"-1", b"+1", b"1.5", b"0x1", b" 1", b"9223372036854775808"]),
            ("uid", &[b"x", b"--1", b"-", b"-9223372036854775809", b"9223372036854775808"]),
            ("gid", &[b"1 "]),
            ("mtime", &[b".5", b"1.5.5", b"1,5", b"1e5", b"-9223372036854775808.5", b"9223372036854775808"]),
            ("SCHILY.devmajor", &[b"4294967296", b"-1"]),
            ("SCHILY.xattr.", &[b"x"]),
            ("LIBARCHIVE.xattr.user.%0", &[b"eA"]),
            ("LIBARCHIVE.xattr.user.%00", &[b"eA"]),
            ("LIBARCHIVE.xattr.user.x", &[b"!"]),
            ("GNU.sparse.major", &[b"x"]),
            ("GNU.sparse.map", &[b"1", b"1,2,3", b",", b"1,-2", b"1,2,"]),
            ("GNU.sparse.offset", &[b"1", b""]),
            ("GNU.sparse.numbytes", &[b"1"]),
            ("GNU.volume.offset", &[b"512"]),
        ];
        for (keyword, values) in cases {
            for value in *values {
                let found = apply(&record(keyword.as_bytes(), value), Scope::Local);
                assert!(matches!(found, Err(Error::Corrupt { .. })), "{keyword}={}", value.escape_ascii());
            }
        }
        for keyword in ["path", "linkpath", "size", "GNU.sparse.map", "SCHILY.xattr.user.a", "LIBARCHIVE.xattr.user.a"]
        {
            assert!(apply(&record(keyword.as_bytes(), b"1"), Scope::Global).is_err(), "{keyword}");
        }
    }

    #[test]
    fn times_have_signs_and_fractions() {
        let cases: &[(&str, i64, u32)] = &[
            ("0", 0, 0),
            ("1350244992", 1_350_244_992, 0),
            ("1350244992.023960108", 1_350_244_992, 23_960_108),
            ("1350244992.0239601089999", 1_350_244_992, 23_960_108),
            ("1.", 1, 0),
            ("1.5", 1, 500_000_000),
            ("-1", -1, 0),
            ("-1.5", -2, 500_000_000),
            ("-0.25", -1, 750_000_000),
            ("-0.0", 0, 0),
            ("-1.0000000001", -1, 0),
            ("9223372036854775807.999999999", i64::MAX, 999_999_999),
            ("-9223372036854775808", i64::MIN, 0),
        ];
        for &(text, seconds, nanoseconds) in cases {
            let found = apply(&record(b"mtime", text.as_bytes()), Scope::Local).unwrap();
            assert_eq!(found.mtime, Some(Timestamp { seconds, nanoseconds }), "{text}");
        }
    }

    #[test]
    fn an_empty_value_takes_an_earlier_one_back() {
        let mut records = record(b"path", b"a");
        records.extend(record(b"uid", b"7"));
        records.extend(record(b"path", b""));
        records.extend(record(b"SCHILY.xattr.user.e", b""));
        let found = apply(&records, Scope::Local).unwrap();
        assert_eq!((found.path.clone(), found.uid), (None, Some(7)));
        assert_eq!(found.into_xattrs(), [(b"user.e"[..].into(), b""[..].into())]);
    }

    #[test]
    fn attributes_come_in_two_spellings_and_are_bounded() {
        let mut records = record(b"LIBARCHIVE.xattr.user.b%3Dc", b"Yg==");
        records.extend(record(b"LIBARCHIVE.xattr.user.a", b"c2Vjb25k"));
        records.extend(record(b"SCHILY.xattr.user.a", b"first=\n\0"));
        records.extend(record(b"LIBARCHIVE.xattr.user.a", b"c2Vjb25k"));
        let expected: Xattrs =
            vec![(b"user.a"[..].into(), b"first=\n\0"[..].into()), (b"user.b=c"[..].into(), b"b"[..].into())];
        assert_eq!(apply(&records, Scope::Local).unwrap().into_xattrs(), expected);

        let name = b"SCHILY.xattr.user.a";
        assert!(apply(&record(name, &[0; 94]), Scope::Local).is_ok());
        assert!(matches!(apply(&record(name, &[0; 95]), Scope::Local), Err(Error::Limit { limit: 100, .. })));
        // A name said twice counts once.
        assert!(apply(&[record(name, &[0; 94]), record(name, &[1; 94])].concat(), Scope::Local).is_ok());
    }

    #[test]
    fn attribute_names_keep_their_bytes() {
        for name in ["user.a", "user.a=b", "user.%", "user.%%25", "user.%3D=%2", "user.%41", "==%25%3D", "user.\u{e4}"]
        {
            let encoded = encode_xattr_name(name.as_bytes());
            assert!(!encoded.contains(&b'='));
            assert_eq!(decode_xattr_name(&encoded), name.as_bytes(), "{name}");
        }
        assert_eq!(encode_xattr_name(b"user.100%"), b"user.100%");
    }
}
