//! The members of a tar, by name, and where their bytes stand in it.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufReader, Read},
    os::unix::fs::FileExt as _,
    sync::Arc,
};

use loris_format::{
    limits::Limits,
    tar::{self, EntryKind, Reader, path::clean},
};

use crate::{
    blob::{Part, file_error},
    place::Error,
};

/// Most members of an archive. Each layer makes three at most, so that this is more than [`Limits::layers`] needs.
const MOST_MEMBERS: usize = 65_536;
/// Longest name and link that is kept, in bytes: names of members are digests with a little around them. With
/// [`MOST_MEMBERS`], it bounds what is held in memory to 70 MB.
const NAME_BYTES: usize = 512;
/// Most links that lead from one to the next.
const MOST_LINKS: usize = 8;
/// Content of this size is jumped over; less is read through, which is faster than to begin anew behind it.
const JUMP_BYTES: u64 = 256 << 10;
/// Headers are read in pieces of this many bytes.
const BUFFER_BYTES: usize = 32 << 10;

/// The members of an archive.
#[derive(Debug)]
pub(crate) struct Members {
    file: Arc<File>,
    place: Arc<str>,
    by_name: HashMap<Box<[u8]>, Member>,
}

#[derive(Debug)]
enum Member {
    File {
        start: u64,
        length: u64,
    },
    Link {
        target: Box<[u8]>,
    },
    /// It is there, but what it holds can't be said, and why.
    Unusable(&'static str),
}

impl Members {
    /// Goes through a tar from header to header. Blocks.
    pub(super) fn scan(file: File, place: &str, limits: &Limits) -> Result<Self, Error> {
        let corrupt =
            |detail: String| Error::Corrupt { what: "the archive".to_owned(), place: place.to_owned(), detail };
        let file_length = file.metadata().map_err(|source| file_error(place, source))?.len();
        let mut members = Self { file: Arc::new(file), place: place.into(), by_name: HashMap::new() };
        let mut base = 0;
        let mut reader = members.reader(base, limits);
        while let Some(entry) = reader.next_entry().map_err(|error| corrupt(at(base, &error)))? {
            let length = entry.size;
            let start = entry.content_offset.and_then(|offset| base.checked_add(offset));
            if let Some(start) = start {
                let end = start.checked_add(length).filter(|end| *end <= file_length);
                let Some(end) = end else {
                    let path = String::from_utf8_lossy(&entry.path[..entry.path.len().min(NAME_BYTES)]).into_owned();
                    return Err(corrupt(format!("it is cut off in the content of {path:?}")));
                };
                if length >= JUMP_BYTES {
                    base = end + tar::padding(length).len() as u64;
                    reader = members.reader(base, limits);
                }
            }
            members.add(&entry, start, limits);
            if members.by_name.len() > MOST_MEMBERS {
                return Err(corrupt(format!("it has more than {MOST_MEMBERS} members")));
            }
        }
        if members.by_name.is_empty() {
            return Err(corrupt("there is no file in it".to_owned()));
        }
        Ok(members)
    }

    fn reader(&self, position: u64, limits: &Limits) -> Reader<BufReader<At>> {
        let at = At { file: self.file.clone(), position };
        Reader::new(BufReader::with_capacity(BUFFER_BYTES, at), limits)
    }

    fn add(&mut self, entry: &tar::Entry, start: Option<u64>, limits: &Limits) {
        // What is named otherwise is no part of an image, and nobody asks for it.
        let Some(name) = usable(&entry.path, limits) else { return };
        let member = match entry.kind {
            EntryKind::Regular => match start {
                Some(start) => Member::File { start, length: entry.size },
                None => Member::Unusable("it has holes"),
            },
            EntryKind::HardLink => link(&entry.link, limits),
            EntryKind::Symlink if entry.link.starts_with(b"/") => Member::Unusable("it is a link out of the archive"),
            EntryKind::Symlink => {
                let parent = entry.path.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
                link(&[&entry.path[..parent], &entry.link].concat(), limits)
            }
            EntryKind::Directory => return,
            _ => Member::Unusable("it is not a regular file"),
        };
        self.by_name
            .entry(name.into())
            // Some programs would take the first one, others the last one.
            .and_modify(|known| *known = Member::Unusable("the archive has two of this name"))
            .or_insert(member);
    }

    /// Says whether there is a member of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.by_name.contains_key(name.as_bytes())
    }

    /// Returns the bytes of a member, through links; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Invalid`] where it is not a file.
    pub(crate) fn find(&self, name: &str) -> Result<Option<Part>, Error> {
        let invalid = |detail: String| Error::Invalid { what: format!("{name:?} in {}", self.place), detail };
        let mut current = name.as_bytes();
        for _ in 0..=MOST_LINKS {
            match self.by_name.get(current) {
                Some(Member::File { start, length }) => {
                    return Ok(Some(Part {
                        file: self.file.clone(),
                        start: *start,
                        length: *length,
                        place: self.place.clone(),
                    }));
                }
                Some(Member::Link { target }) => current = target,
                Some(Member::Unusable(why)) => return Err(invalid((*why).to_owned())),
                None if current == name.as_bytes() => return Ok(None),
                None => {
                    return Err(invalid(format!(
                        "it leads to {:?}, which is not there",
                        String::from_utf8_lossy(current)
                    )));
                }
            }
        }
        Err(invalid(format!("more than {MOST_LINKS} links lead from one to the next")))
    }

    /// Returns the archive's name, for messages.
    pub(super) fn place(&self) -> &Arc<str> {
        &self.place
    }
}

fn link(target: &[u8], limits: &Limits) -> Member {
    match usable(target, limits) {
        Some(target) => Member::Link { target: target.into() },
        None => Member::Unusable("it is a link to nowhere"),
    }
}

fn usable(path: &[u8], limits: &Limits) -> Option<Vec<u8>> {
    clean(path, limits).ok().filter(|name| !name.is_empty() && name.len() <= NAME_BYTES)
}

/// Says where in the archive an error is: the reader counts from where it began.
fn at(base: u64, error: &tar::Error) -> String {
    match error {
        tar::Error::Corrupt { offset: 0, .. } if base == 0 => {
            format!("it is not a tar, nor one that is compressed with gzip or zstd ({error})")
        }
        _ if base == 0 => error.to_string(),
        _ => format!("{error} (offsets count from {base})"),
    }
}

/// A file, read from a place on, whoever else reads it.
struct At {
    file: Arc<File>,
    position: u64,
}

impl Read for At {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = self.file.read_at(buffer, self.position)?;
        self.position = self.position.saturating_add(length as u64);
        Ok(length)
    }
}
