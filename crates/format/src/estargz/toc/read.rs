//! Reads a table of contents, entry by entry: neither the entries nor the names that need no decoding are copied.

use std::borrow::Cow;

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::{
    Entry, EntryType, EntryXattrs,
    json::{Json, JsonError},
    time, to_utf8,
};
use crate::{
    digest::{Digest, InvalidDigest},
    index::{Timestamp, builder},
    limits::Limits,
};

/// The version of the document that everyone writes.
const VERSION: u64 = 1;

/// A document that is no table of contents, or one that we do not take.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TocError {
    /// Not JSON, or not of the right form.
    #[error("table of contents, entry {entry}{}: {detail}", in_brackets(name.as_deref()))]
    Malformed {
        /// How many entries were read before it.
        entry: u64,
        /// The name of the entry, escaped, cut to a length that can be shown; `None` where it cannot be read, or where
        /// what is wrong is not in an entry.
        name: Option<String>,
        /// What is wrong, and at which line and column.
        detail: String,
    },
    /// More entries than [`Limits::entries`].
    #[error("table of contents has more than {limit} entries")]
    TooManyEntries {
        /// The bound.
        limit: usize,
    },
    /// A version that is not known.
    #[error("table of contents has version {version}, only version 1 is known")]
    Version {
        /// The version.
        version: u64,
    },
}

/// Reads a document and hands its entries, in order, with their numbers from 0, to `each`.
///
/// # Errors
/// [`TocError`] where the document is not valid, else the first error of `each`. Entries before the error were handed
/// out.
pub fn read<'a, E: From<TocError>>(
    json: &'a [u8],
    limits: &Limits,
    mut each: impl FnMut(u64, Entry<'a>) -> Result<(), E>,
) -> Result<(), E> {
    let mut number = 0;
    let mut seen = false;
    let read = Json::new(json).object(|json, name| match name {
        b"version" => match json.nullable(Json::unsigned)? {
            Some(version) if version > VERSION => Err(Stop::Refused(TocError::Version { version }.into())),
            _ => Ok(()),
        },
        b"entries" if seen => Err(json.error("\"entries\" stands there twice").into()),
        b"entries" => {
            seen = true;
            // Go writes a list without elements as `null`.
            if json.nullable(|_| Ok(()))?.is_none() {
                return Ok(());
            }
            json.list(|json| {
                if usize::try_from(number).map_or(true, |number| number >= limits.entries) {
                    return Err(Stop::Refused(TocError::TooManyEntries { limit: limits.entries }.into()));
                }
                let start = json.place();
                let mut entry = Entry::default();
                fill(&mut entry, json, limits).map_err(|error| Stop::Malformed { error, entry_start: Some(start) })?;
                each(number, entry).map_err(Stop::Refused)?;
                number += 1;
                Ok(())
            })
        }
        _ => Ok(json.skip()?),
    });
    read.map_err(|stop| match stop {
        Stop::Refused(error) => error,
        Stop::Malformed { error, entry_start } => {
            let name = entry_start.and_then(|start| name_at(json, start));
            TocError::Malformed { entry: number, name, detail: error.describe(json) }.into()
        }
    })
}

/// Returns the name of the entry that begins at `start`, as far as it can be read. Whoever looks for what is wrong knows
/// files, and not the numbers of entries.
fn name_at(json: &[u8], start: usize) -> Option<String> {
    let mut found = None;
    // It is known to be malformed. The name may stand before what is wrong with it, or behind.
    let _ = Json::starting_at(json, start).object(|json, name| match name {
        b"name" => set(json, &mut found, |json| text(json).map(Some)),
        _ => json.skip(),
    });
    found.map(|name| builder::shown(&name))
}

fn in_brackets(name: Option<&str>) -> String {
    name.map(|name| format!(" (\"{name}\")")).unwrap_or_default()
}

/// Why reading stopped.
enum Stop<E> {
    Malformed {
        error: JsonError,
        /// Where the entry begins that it is in.
        entry_start: Option<usize>,
    },
    Refused(E),
}

impl<E> From<JsonError> for Stop<E> {
    fn from(error: JsonError) -> Self {
        Self::Malformed { error, entry_start: None }
    }
}

/// Reads an entry in its place: it has half a kilobyte, which is not to be moved for each.
fn fill<'a>(entry: &mut Entry<'a>, json: &mut Json<'a>, limits: &Limits) -> Result<(), JsonError> {
    let mut entry_type = None;
    // The digest of a file that is one chunk stands there twice.
    let mut last_digest = (Cow::Borrowed(&b""[..]), None);
    let (mut name_bytes, mut link_name_bytes) = (None, None);
    json.object(|json, name| match name {
        b"name" => set(json, &mut entry.name, text),
        b"type" => set(json, &mut entry_type, |json| kind(json).map(Some)),
        b"size" => set(json, &mut entry.size, Json::unsigned),
        b"modtime" => set(json, &mut entry.modtime, modtime),
        b"linkName" => set(json, &mut entry.link_name, text),
        b"mode" => set(json, &mut entry.mode, Json::signed),
        b"uid" => set(json, &mut entry.uid, Json::signed),
        b"gid" => set(json, &mut entry.gid, Json::signed),
        b"userName" => set(json, &mut entry.user_name, text),
        b"groupName" => set(json, &mut entry.group_name, text),
        b"offset" => set(json, &mut entry.offset, Json::unsigned),
        b"innerOffset" => set(json, &mut entry.inner_offset, Json::unsigned),
        b"devMajor" => set(json, &mut entry.dev_major, Json::signed),
        b"devMinor" => set(json, &mut entry.dev_minor, Json::signed),
        b"xattrs" => set(json, &mut entry.xattrs, |json| xattrs(json, limits)),
        b"digest" => set(json, &mut entry.digest, |json| digest(json, &mut last_digest)),
        b"chunkOffset" => set(json, &mut entry.chunk_offset, Json::unsigned),
        b"chunkSize" => set(json, &mut entry.chunk_size, Json::unsigned),
        b"chunkDigest" => set(json, &mut entry.chunk_digest, |json| digest(json, &mut last_digest)),
        b"chunkType" => set(json, &mut entry.hole, |json| Ok(json.string()?.as_ref() == b"zeros")),
        b"endOffset" => set(json, &mut entry.end_offset, Json::unsigned),
        b"accesstime" => set(json, &mut entry.accessed, |json| modtime(json).map(Some)),
        b"changetime" => set(json, &mut entry.changed, |json| modtime(json).map(Some)),
        b"nameBytes" => set(json, &mut name_bytes, |json| base64(json).map(Some)),
        b"linkNameBytes" => set(json, &mut link_name_bytes, |json| base64(json).map(Some)),
        _ => json.skip(),
    })?;
    entry.entry_type = entry_type.ok_or_else(|| json.error("entry has no type"))?;
    // Another reader sees only what is UTF-8, so the two must be one name.
    for (name, bytes) in [(&mut entry.name, name_bytes), (&mut entry.link_name, link_name_bytes)] {
        let Some(bytes) = bytes else { continue };
        if to_utf8(&bytes).as_bytes() != name.as_ref() {
            return Err(json.error("bytes of a name are another name than the one that they stand beside"));
        }
        *name = Cow::Owned(bytes);
    }
    Ok(())
}

/// Reads a field; `null` leaves it as it is, as in Go.
fn set<'a, T>(
    json: &mut Json<'a>,
    field: &mut T,
    read: impl FnOnce(&mut Json<'a>) -> Result<T, JsonError>,
) -> Result<(), JsonError> {
    if let Some(value) = json.nullable(read)? {
        *field = value;
    }
    Ok(())
}

fn text<'a>(json: &mut Json<'a>) -> Result<Cow<'a, [u8]>, JsonError> {
    json.string().map(lossy)
}

fn lossy(bytes: Cow<'_, [u8]>) -> Cow<'_, [u8]> {
    // Most names are, and this is cheaper to see.
    if bytes.is_ascii() {
        return bytes;
    }
    match to_utf8(&bytes) {
        Cow::Borrowed(_) => bytes,
        Cow::Owned(text) => Cow::Owned(text.into_bytes()),
    }
}

fn kind(json: &mut Json<'_>) -> Result<EntryType, JsonError> {
    let text = json.string()?;
    EntryType::from_bytes(&text).ok_or_else(|| json.error(format!("type \"{}\" is not known", shown(&text))))
}

fn modtime(json: &mut Json<'_>) -> Result<Timestamp, JsonError> {
    let text = json.string()?;
    if text.is_empty() {
        return Ok(Timestamp::default());
    }
    time::parse(&text).ok_or_else(|| json.error(format!("modtime \"{}\" is not a time of RFC 3339", shown(&text))))
}

fn digest<'a>(json: &mut Json<'a>, last: &mut (Cow<'a, [u8]>, Option<Digest>)) -> Result<Option<Digest>, JsonError> {
    let text = json.string()?;
    if text.is_empty() {
        return Ok(None);
    }
    if text != last.0 {
        let digest = Digest::from_text(&text).map_err(|error: InvalidDigest| json.error(error.to_string()))?;
        *last = (text, Some(digest));
    }
    Ok(last.1)
}

fn base64(json: &mut Json<'_>) -> Result<Vec<u8>, JsonError> {
    let text = json.string()?;
    STANDARD.decode(&text).map_err(|error| json.error(format!("base64: {error}")))
}

fn xattrs<'a>(json: &mut Json<'a>, limits: &Limits) -> Result<EntryXattrs<'a>, JsonError> {
    let mut xattrs = Vec::new();
    let mut bytes = 0;
    json.object(|json, name| {
        // Names of attributes are few and short.
        let name = lossy(Cow::Owned(name.to_vec()));
        let value = json.nullable(base64)?.unwrap_or_default();
        bytes += name.len() + value.len();
        if bytes > limits.xattr_bytes {
            return Err(json.error(format!("extended attributes of more than {} bytes", limits.xattr_bytes)));
        }
        xattrs.push((name, Cow::Owned(value)));
        Ok(())
    })?;
    Ok(xattrs)
}

/// Cuts hostile text to a length that can be shown.
fn shown(text: &[u8]) -> impl std::fmt::Display {
    text[..text.len().min(64)].escape_ascii()
}
