//! Writes headers: plain USTAR where everything fits, PAX records before it where something does not.
//!
//! The bytes depend on the entry alone, so that the same tree is always the same archive.

use std::borrow::Cow;

use super::{
    BLOCK_BYTES, Entry, EntryKind,
    header::{self, Block},
    pax,
};
use crate::index::Timestamp;

/// What ends an archive: two blocks of zeros.
pub const END_OF_ARCHIVE: [u8; 2 * BLOCK_BYTES] = [0; 2 * BLOCK_BYTES];

/// An entry that no header can express.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tar entry {path:?} cannot be written: {problem}")]
pub struct InvalidEntry {
    /// The entry's path, cut to a length that can be shown.
    pub path: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

/// Returns the zeros that must follow `size` bytes of content.
#[must_use]
pub fn padding(size: u64) -> &'static [u8] {
    static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    // Below 512, so it fits.
    let used = usize::try_from(size % BLOCK_BYTES as u64).unwrap_or_default();
    if used == 0 { &[] } else { &ZEROS[used..] }
}

/// Returns what must precede an entry's content: one header, or a PAX header, its records and a header.
///
/// `sparse` and the offsets of the entry are not looked at: content is written with its holes, and stands where the
/// caller puts it. All programs since POSIX.1-2001 read the result; older ones lose what does not fit into a header.
///
/// # Errors
/// Where a name holds a NUL byte, a regular file's path ends in a slash (and would be read as a directory), another
/// kind of entry has a size, or the time has too many nanoseconds.
pub fn encode_header(entry: &Entry) -> Result<Vec<u8>, InvalidEntry> {
    check(entry).map_err(|problem| {
        const SHOWN_BYTES: usize = 200;
        let path = &entry.path[..entry.path.len().min(SHOWN_BYTES)];
        InvalidEntry { path: String::from_utf8_lossy(path).into_owned(), problem }
    })?;

    let mut records = Vec::new();
    let mut block = [0; BLOCK_BYTES];
    let mut pax = |keyword: &'static [u8], value: Cow<'_, [u8]>| records.push((keyword.to_vec(), value.into_owned()));

    if !put_path(&mut block, &entry.path) {
        put_text(&mut block[header::NAME], &ascii(&entry.path));
        pax(b"path", (&entry.path).into());
    }
    let is_link = matches!(entry.kind, EntryKind::HardLink | EntryKind::Symlink);
    if is_link && !fits(&entry.link, header::LINK.len()) {
        put_text(&mut block[header::LINK], &ascii(&entry.link));
        pax(b"linkpath", (&entry.link).into());
    } else if is_link {
        put_text(&mut block[header::LINK], &entry.link);
    }
    // One byte less than the field: POSIX wants a NUL at the end of these.
    for (field, keyword, name) in
        [(header::USER_NAME, &b"uname"[..], &entry.user_name), (header::GROUP_NAME, b"gname", &entry.group_name)]
    {
        if fits(name, field.len() - 1) {
            put_text(&mut block[field], name);
        } else {
            pax(keyword, name.into());
        }
    }
    put_number(&mut block[header::MODE], u64::from(entry.permissions));
    let (major, minor) = entry.device;
    for (field, keyword, number) in [
        (header::UID, &b"uid"[..], entry.uid),
        (header::GID, b"gid", entry.gid),
        (header::DEVICE_MAJOR, b"SCHILY.devmajor", major),
        (header::DEVICE_MINOR, b"SCHILY.devminor", minor),
    ] {
        if !put_number(&mut block[field], u64::from(number)) {
            pax(keyword, number.to_string().into_bytes().into());
        }
    }
    if !put_number(&mut block[header::SIZE], entry.size) {
        // In the header too, in base-256: a program that takes the size from there (some did, and could be made to see
        // entries inside of content) then finds the same one.
        put_base_256(&mut block[header::SIZE], entry.size);
        pax(b"size", entry.size.to_string().into_bytes().into());
    }
    let Timestamp { seconds, nanoseconds } = entry.mtime;
    let whole = u64::try_from(seconds).is_ok_and(|seconds| put_number(&mut block[header::MTIME], seconds));
    if !whole {
        put_number(&mut block[header::MTIME], 0);
    }
    if !whole || nanoseconds > 0 {
        pax(b"mtime", decimal_time(entry.mtime).into_bytes().into());
    }
    for (name, value) in &entry.xattrs {
        records.push(([pax::XATTR, &pax::encode_xattr_name(name)].concat(), value.to_vec()));
    }
    block[header::TYPE_FLAG] = type_flag(entry.kind);
    finish(&mut block);

    let mut bytes = Vec::new();
    if !records.is_empty() {
        put_records(&mut bytes, records, &entry.path);
    }
    bytes.extend_from_slice(&block);
    Ok(bytes)
}

fn check(entry: &Entry) -> Result<(), &'static str> {
    if [&entry.path, &entry.link, &entry.user_name, &entry.group_name].iter().any(|name| name.contains(&0)) {
        return Err("a name holds a NUL byte");
    }
    if entry.xattrs.iter().any(|(name, _)| name.is_empty() || name.contains(&0)) {
        return Err("the name of an extended attribute is empty or holds a NUL byte");
    }
    if !entry.xattrs.is_sorted_by(|(one, _), (next, _)| one < next) {
        return Err("extended attributes are not sorted by name, each once");
    }
    if entry.kind == EntryKind::Regular && entry.path.ends_with(b"/") {
        return Err("the path of a regular file ends in a slash");
    }
    if entry.kind != EntryKind::Regular && entry.size > 0 {
        return Err("only regular files have a size");
    }
    if i64::try_from(entry.size).is_err() {
        return Err("size is beyond 63 bits");
    }
    if entry.permissions > 0o7777 {
        return Err("permissions are beyond twelve bits");
    }
    if entry.mtime.nanoseconds >= 1_000_000_000 {
        return Err("time has more than 10^9 nanoseconds");
    }
    Ok(())
}

fn put_records(bytes: &mut Vec<u8>, mut records: Vec<(Vec<u8>, Vec<u8>)>, path: &[u8]) {
    const NAMES: [&[u8]; 4] = [b"path", b"linkpath", b"uname", b"gname"];
    let is_text =
        |(keyword, value): &(Vec<u8>, Vec<u8>)| !NAMES.contains(&keyword.as_slice()) || str::from_utf8(value).is_ok();
    if !records.iter().all(is_text) {
        // Names are UTF-8 by POSIX, unless this is said.
        records.push((b"hdrcharset".to_vec(), b"BINARY".to_vec()));
    }
    records.sort();
    let data: Vec<u8> = records.iter().flat_map(|(keyword, value)| pax_record(keyword, value)).collect();

    let mut block = [0; BLOCK_BYTES];
    let name = ascii(path);
    let name = name.trim_ascii_end();
    let name = name.rsplit(|&byte| byte == b'/').find(|name| !name.is_empty()).unwrap_or(b"root");
    // Only seen where PAX is not understood, as a file beside the real ones.
    put_text(&mut block[header::NAME], &[b"PaxHeaders.0/", &name[..name.len().min(80)]].concat());
    put_number(&mut block[header::MODE], 0o644);
    let size = data.len() as u64;
    for (field, number) in [
        (header::UID, 0),
        (header::GID, 0),
        (header::SIZE, size),
        (header::MTIME, 0),
        (header::DEVICE_MAJOR, 0),
        (header::DEVICE_MINOR, 0),
    ] {
        // A `Vec` of 8 GiB of records is beyond any machine's image; base-256 keeps even that right.
        if !put_number(&mut block[field.clone()], number) {
            put_base_256(&mut block[field], number);
        }
    }
    block[header::TYPE_FLAG] = b'x';
    finish(&mut block);
    bytes.extend_from_slice(&block);
    bytes.extend_from_slice(&data);
    bytes.extend_from_slice(padding(size));
}

/// Returns a PAX record. Its length counts its own digits.
pub(super) fn pax_record(keyword: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = keyword.len() + value.len() + " =\n".len();
    let mut length = rest + decimal_digits(rest);
    if decimal_digits(length) > decimal_digits(rest) {
        length += 1;
    }
    [format!("{length} ").as_bytes(), keyword, b"=", value, b"\n"].concat()
}

fn decimal_digits(number: usize) -> usize {
    number.checked_ilog10().unwrap_or(0) as usize + 1
}

/// Returns `[-]seconds.fraction` without zeros at its end.
fn decimal_time(time: Timestamp) -> String {
    let Timestamp { seconds, nanoseconds } = time;
    if nanoseconds == 0 {
        return seconds.to_string();
    }
    let (sign, whole, fraction) = if seconds < 0 {
        // Nanoseconds lead upwards, the digits of a negative fraction away from zero.
        ("-", (seconds + 1).unsigned_abs(), 1_000_000_000 - nanoseconds)
    } else {
        ("", seconds.unsigned_abs(), nanoseconds)
    };
    format!("{sign}{whole}.{fraction:09}").trim_end_matches('0').to_owned()
}

/// Puts a path into name and prefix; `false` where it does not fit.
fn put_path(block: &mut Block, path: &[u8]) -> bool {
    if fits(path, header::NAME.len()) {
        put_text(&mut block[header::NAME], path);
        return true;
    }
    if !path.is_ascii() {
        return false;
    }
    // The slash between the two is in neither. Both must hold something, else it would not be put back.
    let first = path.len().saturating_sub(header::NAME.len() + 1).max(1);
    let last = header::PREFIX.len().min(path.len().saturating_sub(2));
    let Some(slash) = (first..=last).find(|&place| path[place] == b'/') else { return false };
    put_text(&mut block[header::PREFIX], &path[..slash]);
    put_text(&mut block[header::NAME], &path[slash + 1..]);
    true
}

fn fits(text: &[u8], bytes: usize) -> bool {
    text.len() <= bytes && text.is_ascii()
}

fn put_text(field: &mut [u8], text: &[u8]) {
    let length = text.len().min(field.len());
    field[..length].copy_from_slice(&text[..length]);
}

/// Returns what a program without PAX may show: the ASCII of a name, and, where it is cut, no slash at its end, which
/// would make a directory of a file.
fn ascii(name: &[u8]) -> Vec<u8> {
    let mut text: Vec<u8> = name.iter().copied().filter(u8::is_ascii).take(header::NAME.len()).collect();
    if !name.ends_with(b"/") {
        while text.ends_with(b"/") {
            text.pop();
        }
    }
    text
}

/// Writes octal digits and a NUL; `false` (and zero) where the number does not fit.
fn put_number(field: &mut [u8], number: u64) -> bool {
    let digits = field.len() - 1;
    let fits = number >> (3 * digits) == 0;
    let mut rest = if fits { number } else { 0 };
    for digit in field[..digits].iter_mut().rev() {
        *digit = b'0' + (rest & 7) as u8;
        rest >>= 3;
    }
    field[digits] = 0;
    fits
}

fn put_base_256(field: &mut [u8], number: u64) {
    let (head, tail) = field.split_at_mut(field.len() - 8);
    head.fill(0);
    tail.copy_from_slice(&number.to_be_bytes());
    // Sizes are below 2^63, so in a field of 8 bytes the bit is free too.
    field[0] |= 0x80;
}

fn finish(block: &mut Block) {
    block[header::MAGIC].copy_from_slice(b"ustar\x0000");
    let (sum, _) = header::checksums(block);
    block[header::CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn type_flag(kind: EntryKind) -> u8 {
    match kind {
        EntryKind::Regular => b'0',
        EntryKind::HardLink => b'1',
        EntryKind::Symlink => b'2',
        EntryKind::CharDevice => b'3',
        EntryKind::BlockDevice => b'4',
        EntryKind::Directory => b'5',
        EntryKind::Fifo => b'6',
    }
}

#[cfg(test)]
pub(super) mod tests;
