//! Names in requests: repositories, tags, references.
//!
//! Grammar: OCI distribution specification 1.1, "Pulling manifests". Names become paths below the registry's directory,
//! so what is accepted here decides what can be written where: no name holds `..`, and no component of a repository
//! begins with `_`, which is where the registry keeps its own files.

use std::{fmt, str::FromStr};

use loris_format::digest::Digest;

/// Longest name of a repository, in bytes: what the specification says that clients may count on.
const NAME_BYTES: usize = 255;
/// Longest tag, in bytes.
const TAG_BYTES: usize = 128;

/// The name of a repository: components of lower-case letters and digits, joined by `.`, `_`, `__` or dashes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository(String);

/// A tag.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(String);

/// What a manifest is asked for by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// By what it is called.
    Tag(Tag),
    /// By what it is.
    Digest(Digest),
}

/// A text that is not what the specification calls a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a name by the distribution specification's grammar")]
pub struct InvalidName;

impl Repository {
    /// Returns the name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Tag {
    /// Returns the tag.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Repository {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        if text.len() > NAME_BYTES || !text.split('/').all(is_component) {
            return Err(InvalidName);
        }
        Ok(Self(text.to_owned()))
    }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(component: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    if !alphanumeric(*first) || !alphanumeric(*last) {
        return false;
    }
    bytes
        .split(|byte| alphanumeric(*byte))
        .all(|separator| matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|byte| *byte == b'-'))
}

impl FromStr for Tag {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        match text.as_bytes() {
            [first, rest @ ..]
                if text.len() <= TAG_BYTES
                    && word(*first)
                    && rest.iter().all(|byte| word(*byte) || matches!(byte, b'.' | b'-')) =>
            {
                Ok(Self(text.to_owned()))
            }
            _ => Err(InvalidName),
        }
    }
}

impl FromStr for Reference {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        if text.contains(':') {
            text.parse().map(Self::Digest).map_err(|_| InvalidName)
        } else {
            text.parse().map(Self::Tag)
        }
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(&tag.0),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories() {
        for good in ["a", "library/alpine", "a.b/c_d/e__f/g---h", "0/1", &"x".repeat(255)] {
            assert_eq!(good.parse::<Repository>().map(|name| name.0), Ok(good.to_owned()));
        }
        for bad in [
            "",
            "/",
            "a/",
            "/a",
            "a//b",
            "..",
            "a/../b",
            ".",
            "_a",
            "a_",
            "-a",
            "a-",
            "A",
            "a..b",
            "a___b",
            "a._b",
            "a b",
            "a\0b",
            "a%2fb",
            "\u{e4}",
            &"x".repeat(256),
        ] {
            assert_eq!(bad.parse::<Repository>(), Err(InvalidName), "{bad:?}");
        }
    }

    #[test]
    fn references() {
        for good in ["latest", "_", "1.0-rc.1", "A", &"x".repeat(128)] {
            assert_eq!(good.parse::<Reference>(), Ok(Reference::Tag(Tag(good.to_owned()))));
        }
        for bad in ["", ".", "..", "-a", "a/b", "a b", "a\n", &"x".repeat(129), "sha256:abc", "md5:00", ":"] {
            assert_eq!(bad.parse::<Reference>(), Err(InvalidName), "{bad:?}");
        }
        let digest = Digest::sha256_of(b"");
        assert_eq!(digest.to_string().parse::<Reference>(), Ok(Reference::Digest(digest)));
    }
}
