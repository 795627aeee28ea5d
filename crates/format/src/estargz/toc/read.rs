//! Reads a table of contents, entry by entry: neither the entries nor the names that need no decoding are copied.

use std::{borrow::Cow, cell::RefCell, fmt};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{Entry, EntryType, EntryXattrs, time, to_utf8};
use crate::{
    digest::{Digest, InvalidDigest},
    index::Timestamp,
    limits::Limits,
};

/// The version of the document that everyone writes.
const VERSION: u64 = 1;

/// A document that is no table of contents, or one that we do not take.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TocError {
    /// Not JSON, or not of the right form.
    #[error("table of contents, entry {entry}: {detail}")]
    Malformed {
        /// How many entries were read before it.
        entry: u64,
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
pub fn read<'de, E: From<TocError>>(
    json: &'de [u8],
    limits: &Limits,
    each: impl FnMut(u64, Entry<'de>) -> Result<(), E>,
) -> Result<(), E> {
    let progress = RefCell::new(Progress { entry: 0, failure: None });
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let document = Document { progress: &progress, each, limits };
    match deserializer.deserialize_map(document) {
        Ok(()) => Ok(()),
        Err(error) => {
            let Progress { entry, failure } = progress.into_inner();
            Err(failure.unwrap_or_else(|| TocError::Malformed { entry, detail: error.to_string() }.into()))
        }
    }
}

/// What survives an error of serde's, which holds only text.
struct Progress<E> {
    entry: u64,
    failure: Option<E>,
}

impl<E> Progress<E> {
    fn fail<D: de::Error>(&mut self, failure: impl Into<E>) -> D {
        self.failure = Some(failure.into());
        D::custom("")
    }
}

struct Document<'a, E, F> {
    progress: &'a RefCell<Progress<E>>,
    each: F,
    limits: &'a Limits,
}

impl<'de, E: From<TocError>, F: FnMut(u64, Entry<'de>) -> Result<(), E>> Visitor<'de> for Document<'_, E, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with \"version\" and \"entries\"")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        let mut seen = false;
        while let Some(key) = map.next_key_seed(Raw)? {
            match key.as_ref() {
                b"version" => {
                    let version: Option<u64> = map.next_value()?;
                    if version.is_some_and(|version| version > VERSION) {
                        let version = version.unwrap_or_default();
                        return Err(self.progress.borrow_mut().fail(TocError::Version { version }));
                    }
                }
                b"entries" if seen => return Err(de::Error::custom("\"entries\" stands there twice")),
                b"entries" => {
                    seen = true;
                    map.next_value_seed(Entries(&mut self))?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}

struct Entries<'b, 'a, E, F>(&'b mut Document<'a, E, F>);

impl<'de, E: From<TocError>, F: FnMut(u64, Entry<'de>) -> Result<(), E>> DeserializeSeed<'de>
    for Entries<'_, '_, E, F>
{
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de, E: From<TocError>, F: FnMut(u64, Entry<'de>) -> Result<(), E>> Visitor<'de> for Entries<'_, '_, E, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entries")
    }

    fn visit_none<D: de::Error>(self) -> Result<(), D> {
        Ok(())
    }

    fn visit_unit<D: de::Error>(self) -> Result<(), D> {
        Ok(())
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(EntrySeed(&mut *self.0))?.is_some() {
            self.0.progress.borrow_mut().entry += 1;
        }
        Ok(())
    }
}

/// Reads an entry and hands it out: it is large, and would be copied on the way through serde.
struct EntrySeed<'b, 'a, E, F>(&'b mut Document<'a, E, F>);

impl<'de, E: From<TocError>, F: FnMut(u64, Entry<'de>) -> Result<(), E>> DeserializeSeed<'de>
    for EntrySeed<'_, '_, E, F>
{
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, E: From<TocError>, F: FnMut(u64, Entry<'de>) -> Result<(), E>> Visitor<'de> for EntrySeed<'_, '_, E, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an entry")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Document { progress, each, limits } = self.0;
        let number = progress.borrow().entry;
        if usize::try_from(number).map_or(true, |number| number >= limits.entries) {
            return Err(progress.borrow_mut().fail(TocError::TooManyEntries { limit: limits.entries }));
        }
        let mut entry = Entry::default();
        let mut entry_type = None;
        let (mut name_bytes, mut link_name_bytes) = (None, None);
        while let Some(key) = map.next_key_seed(Raw)? {
            match key.as_ref() {
                b"name" => set(&mut entry.name, map.next_value_seed(TextSeed)?),
                b"type" => set(&mut entry_type, map.next_value_seed(TypeSeed)?.map(Some)),
                b"size" => set(&mut entry.size, map.next_value()?),
                b"modtime" => set(&mut entry.modtime, map.next_value_seed(TimeSeed)?),
                b"linkName" => set(&mut entry.link_name, map.next_value_seed(TextSeed)?),
                b"mode" => set(&mut entry.mode, map.next_value()?),
                b"uid" => set(&mut entry.uid, map.next_value()?),
                b"gid" => set(&mut entry.gid, map.next_value()?),
                b"userName" => set(&mut entry.user_name, map.next_value_seed(TextSeed)?),
                b"groupName" => set(&mut entry.group_name, map.next_value_seed(TextSeed)?),
                b"offset" => set(&mut entry.offset, map.next_value()?),
                b"innerOffset" => set(&mut entry.inner_offset, map.next_value()?),
                b"devMajor" => set(&mut entry.dev_major, map.next_value()?),
                b"devMinor" => set(&mut entry.dev_minor, map.next_value()?),
                b"xattrs" => set(&mut entry.xattrs, map.next_value_seed(Xattrs(limits))?),
                b"digest" => set(&mut entry.digest, map.next_value_seed(DigestSeed)?),
                b"chunkOffset" => set(&mut entry.chunk_offset, map.next_value()?),
                b"chunkSize" => set(&mut entry.chunk_size, map.next_value()?),
                b"chunkDigest" => set(&mut entry.chunk_digest, map.next_value_seed(DigestSeed)?),
                b"nameBytes" => set(&mut name_bytes, map.next_value_seed(TextSeed)?.map(Some)),
                b"linkNameBytes" => set(&mut link_name_bytes, map.next_value_seed(TextSeed)?.map(Some)),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        entry.entry_type = entry_type.ok_or_else(|| de::Error::missing_field("type"))?;
        entry.name = exact(entry.name, name_bytes, "nameBytes")?;
        entry.link_name = exact(entry.link_name, link_name_bytes, "linkNameBytes")?;
        each(number, entry).map_err(|failure| progress.borrow_mut().fail(failure))
    }
}

/// `null` leaves a field as it is, as in Go.
fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

/// Returns the name that is not UTF-8 where there is one. Another reader sees `text` only, so the two must be one name.
fn exact<'de, E: de::Error>(
    text: Cow<'de, [u8]>,
    base64: Option<Cow<'de, [u8]>>,
    key: &'static str,
) -> Result<Cow<'de, [u8]>, E> {
    let Some(base64) = base64 else { return Ok(text) };
    let bytes = STANDARD.decode(&base64).map_err(|error| E::custom(format_args!("{key}: {error}")))?;
    if to_utf8(&bytes).as_bytes() != text.as_ref() {
        return Err(E::custom(format_args!("{key} is another name than the one that it stands beside")));
    }
    Ok(Cow::Owned(bytes))
}

/// The bytes of a string, whatever they are.
struct Raw;

impl<'de> DeserializeSeed<'de> for Raw {
    type Value = Cow<'de, [u8]>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_bytes(self)
    }
}

impl<'de> Visitor<'de> for Raw {
    type Value = Cow<'de, [u8]>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_borrowed_bytes<E: de::Error>(self, bytes: &'de [u8]) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(bytes))
    }

    fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(text.as_bytes()))
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
        Ok(Cow::Owned(bytes.to_vec()))
    }
}

/// Makes a seed for a value that may be `null` out of a function that converts the bytes of a string.
macro_rules! optional {
    ($seed:ident, $value:ty, $expecting:literal, $convert:expr) => {
        struct $seed;

        impl<'de> DeserializeSeed<'de> for $seed {
            type Value = Option<$value>;

            fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
                deserializer.deserialize_option(self)
            }
        }

        impl<'de> Visitor<'de> for $seed {
            type Value = Option<$value>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($expecting)
            }

            fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
                Ok(None)
            }

            fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
                Ok(None)
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
                let bytes = Raw.deserialize(deserializer)?;
                let convert: fn(Cow<'de, [u8]>) -> Result<$value, String> = $convert;
                convert(bytes).map(Some).map_err(de::Error::custom)
            }
        }
    };
}

// What is not UTF-8 becomes U+FFFD.
optional!(TextSeed, Cow<'de, [u8]>, "a string", |bytes| Ok(lossy(bytes)));

optional!(TypeSeed, EntryType, "a type of entry", |text| {
    EntryType::from_bytes(&text).ok_or_else(|| format!("type {:?} is not known", shown(&text)))
});

optional!(TimeSeed, Timestamp, "a time", |text| {
    if text.is_empty() {
        return Ok(Timestamp::default());
    }
    time::parse(&text).ok_or_else(|| format!("modtime {:?} is not a time of RFC 3339", shown(&text)))
});

optional!(DigestSeed, Option<Digest>, "a digest", |text| {
    if text.is_empty() {
        return Ok(None);
    }
    // What is not UTF-8 is no digest either.
    to_utf8(&text).parse().map(Some).map_err(|error: InvalidDigest| error.to_string())
});

fn lossy(bytes: Cow<'_, [u8]>) -> Cow<'_, [u8]> {
    match to_utf8(&bytes) {
        Cow::Borrowed(_) => bytes,
        Cow::Owned(text) => Cow::Owned(text.into_bytes()),
    }
}

/// Cuts hostile text to a length that can be shown.
fn shown(text: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(&text[..text.len().min(64)])
}

struct Xattrs<'a>(&'a Limits);

impl<'de> DeserializeSeed<'de> for Xattrs<'_> {
    type Value = Option<EntryXattrs<'de>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for Xattrs<'_> {
    type Value = Option<EntryXattrs<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of extended attributes")
    }

    fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut xattrs = Vec::new();
        let mut bytes = 0;
        while let Some(name) = map.next_key_seed(Raw)? {
            let name = lossy(name);
            let value = match map.next_value_seed(TextSeed)? {
                Some(base64) => STANDARD.decode(&base64).map_err(|error| {
                    de::Error::custom(format_args!("extended attribute {:?}: {error}", shown(&name)))
                })?,
                None => Vec::new(),
            };
            bytes += name.len() + value.len();
            if bytes > self.0.xattr_bytes {
                let limit = self.0.xattr_bytes;
                return Err(de::Error::custom(format_args!("extended attributes of more than {limit} bytes")));
            }
            xattrs.push((name, Cow::Owned(value)));
        }
        Ok(Some(xattrs))
    }
}
