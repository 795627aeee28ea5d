//! Paths of an archive made into paths inside an image.
//!
//! An archive names the same file `a/b`, `./a/b`, `/a/b` and `x/../a/b`; a hostile one says `../../etc/passwd`.
//! Container runtimes resolve such names as text, at the root of the image; so does this module, as Go's
//! `path.Clean("/" + name)` does.

use std::borrow::Cow;

use crate::limits::Limits;

/// Why a path cannot be one inside an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidPath {
    /// No system call can name it.
    #[error("path holds a NUL byte: {path:?}")]
    Nul {
        /// The path, cut to a length that can be shown.
        path: String,
    },
    /// Beyond [`Limits::path_bytes`].
    #[error("path is longer than {limit} bytes: {path:?}")]
    TooLong {
        /// The path, cut to a length that can be shown.
        path: String,
        /// The most that is allowed.
        limit: usize,
    },
    /// Beyond [`Limits::name_bytes`].
    #[error("path has a component longer than {limit} bytes: {path:?}")]
    NameTooLong {
        /// The path, cut to a length that can be shown.
        path: String,
        /// The most that is allowed.
        limit: usize,
    },
    /// Beyond [`Limits::depth`].
    #[error("path is deeper than {limit} components: {path:?}")]
    TooDeep {
        /// The path, cut to a length that can be shown.
        path: String,
        /// The most that is allowed.
        limit: usize,
    },
}

/// Returns the path's components joined by `/`, without a slash at either end: no empty ones, no `.`, and each `..`
/// has removed the one before it or, at the root, nothing. The root itself is empty.
///
/// # Errors
/// Where the path holds a NUL or exceeds one of the `limits`.
///
/// ```
/// use loris_format::{limits::Limits, tar::path};
///
/// for (given, clean) in [("./a//b/", "a/b"), ("/a/../../b", "b"), ("..", ""), ("/", "")] {
///     assert_eq!(path::clean(given.as_bytes(), &Limits::default())?, clean.as_bytes());
/// }
/// # Ok::<(), path::InvalidPath>(())
/// ```
pub fn clean(path: &[u8], limits: &Limits) -> Result<Vec<u8>, InvalidPath> {
    cleaned(path, limits).map(Cow::into_owned)
}

/// Does what [`clean`] does, and copies nothing where the path is clean but for slashes at its end, as most are.
pub(crate) fn cleaned<'a>(path: &'a [u8], limits: &Limits) -> Result<Cow<'a, [u8]>, InvalidPath> {
    if path.len() > limits.path_bytes {
        return Err(InvalidPath::TooLong { path: shown(path), limit: limits.path_bytes });
    }
    if path.contains(&0) {
        return Err(InvalidPath::Nul { path: shown(path) });
    }
    let end = path.iter().rposition(|&byte| byte != b'/').map_or(0, |last| last + 1);
    let plain = &path[..end];
    let mut depth = 0;
    let is_clean = plain.split(|&byte| byte == b'/').all(|name| {
        depth += 1;
        !matches!(name, b"" | b"." | b"..") && name.len() <= limits.name_bytes
    });
    if is_clean && depth <= limits.depth {
        return Ok(Cow::Borrowed(plain));
    }
    let mut clean = Vec::with_capacity(path.len());
    let mut depth = 0_usize;
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => {
                let end = clean.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
                clean.truncate(end);
                depth = depth.saturating_sub(1);
            }
            _ => {
                depth += 1;
                if name.len() > limits.name_bytes {
                    return Err(InvalidPath::NameTooLong { path: shown(path), limit: limits.name_bytes });
                }
                if depth > limits.depth {
                    return Err(InvalidPath::TooDeep { path: shown(path), limit: limits.depth });
                }
                if !clean.is_empty() {
                    clean.push(b'/');
                }
                clean.extend_from_slice(name);
            }
        }
    }
    Ok(Cow::Owned(clean))
}

/// Returns the components of a clean path, from the root down; none for the root.
pub fn components(clean: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    clean.split(|&byte| byte == b'/').filter(|name| !name.is_empty())
}

/// Returns the directory that holds a clean path, and its name there; `None` for the root.
#[must_use]
pub fn split_last(clean: &[u8]) -> Option<(&[u8], &[u8])> {
    match clean.iter().rposition(|&byte| byte == b'/') {
        Some(slash) => Some((&clean[..slash], &clean[slash + 1..])),
        None if clean.is_empty() => None,
        None => Some((&[], clean)),
    }
}

fn shown(path: &[u8]) -> String {
    const SHOWN_BYTES: usize = 200;
    String::from_utf8_lossy(&path[..path.len().min(SHOWN_BYTES)]).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_resolve_at_the_root() {
        let cases: &[(&str, &str)] = &[
            ("", ""),
            (".", ""),
            ("./", ""),
            ("/", ""),
            ("//", ""),
            ("a", "a"),
            ("a/", "a"),
            ("/a", "a"),
            ("./a", "a"),
            ("a//b", "a/b"),
            ("a/./b/.", "a/b"),
            ("a/..", ""),
            ("a/../b", "b"),
            ("a/b/../c", "a/c"),
            ("a/b/../../c", "c"),
            ("../../etc/passwd", "etc/passwd"),
            ("/../a", "a"),
            ("a/../../../b/..", ""),
            ("...", "..."),
            ("..a/.b", "..a/.b"),
            ("a\nb/c d", "a\nb/c d"),
        ];
        for (given, expected) in cases {
            let found = clean(given.as_bytes(), &Limits::default()).unwrap();
            assert_eq!(found.escape_ascii().to_string(), expected.as_bytes().escape_ascii().to_string(), "{given}");
        }
        assert_eq!(clean(b"\xff/\xfe", &Limits::default()).unwrap(), b"\xff/\xfe");
    }

    #[test]
    fn limits_hold() {
        let limits = Limits { path_bytes: 20, name_bytes: 5, depth: 3, ..Limits::default() };
        assert!(matches!(clean(b"a\0b", &limits), Err(InvalidPath::Nul { .. })));
        assert!(matches!(clean(&[b'/'; 21], &limits), Err(InvalidPath::TooLong { limit: 20, .. })));
        assert!(matches!(clean(b"a/bcdefg", &limits), Err(InvalidPath::NameTooLong { limit: 5, .. })));
        assert!(matches!(clean(b"a/b/c/d", &limits), Err(InvalidPath::TooDeep { limit: 3, .. })));
        assert_eq!(clean(b"a/b/c/../d", &limits).unwrap(), b"a/b/d");
        assert_eq!(clean(b"12345/12345", &limits).unwrap(), b"12345/12345");
    }

    #[test]
    fn last_component_splits_off() {
        assert_eq!(split_last(b""), None);
        assert_eq!(split_last(b"a"), Some((&b""[..], &b"a"[..])));
        assert_eq!(split_last(b"a/b/c"), Some((&b"a/b"[..], &b"c"[..])));
        assert_eq!(components(b"").count(), 0);
        assert_eq!(components(b"a/b").collect::<Vec<_>>(), [b"a", b"b"]);
    }

    proptest! {
        #[test]
        fn clean_paths_stay_as_they_are(path in "[a./]{0,40}") {
            let once = clean(path.as_bytes(), &Limits::default()).unwrap();
            prop_assert_eq!(&clean(&once, &Limits::default()).unwrap(), &once);
            prop_assert!(components(&once).all(|name| name != b"." && name != b".."));
            prop_assert!(!once.starts_with(b"/") && !once.ends_with(b"/"));
        }
    }
}
