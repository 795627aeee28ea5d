//! Whether a layer's index says the same as its tar.
//!
//! A lazy reader shows the index, everyone else the tar: where the two differ, the image is two images, and whoever looked
//! at one of them has not seen the other. Here the tar's entries are compared with the nodes of the index: what they are,
//! their attributes, and that each piece of content has the digest that the index knows it by.
//!
//! An entry that a later one replaces does not count; where an entry stands twice, the last one does. But an entry below
//! what is no directory at that place is never forgiven: whoever unpacks follows a link there. One difference is
//! forgiven, because every converter of today makes it: JSON has no text that is not UTF-8, and Go writes U+FFFD for each
//! byte of a name that is none.

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt as _,
};

use loris_format::{
    digest::Hasher,
    estargz::toc::{TOC_NAME, is_same_time},
    index::{LayerIndex, Node, NodeId, NodeKind},
    limits::Limits,
    position::DataOffset,
    tar::{self, EntryKind, path},
};

use crate::error::path_of;

/// Differences that are remembered.
const MOST_DIFFERENCES: usize = 1000;

/// Compares, and returns what differs: a sentence each, by path. Reads the archive to its end and nothing behind it.
/// Extents without digest are compared with a data file, where there is one, and those that differ are noted beside it.
pub(crate) fn compare(
    archive: impl Read,
    index: &LayerIndex,
    limits: &Limits,
    data: Option<(&File, &mut Vec<usize>)>,
) -> io::Result<Vec<String>> {
    let mut archive = tar::Reader::new(archive, limits);
    let mut comparison = Comparison {
        index,
        seen: vec![Seen::No; index.nodes().len()],
        replaced: HashSet::new(),
        differences: BTreeMap::new(),
        lasting: None,
        more: 0,
        data,
    };
    while let Some(entry) = archive.next_entry().map_err(io::Error::other)? {
        let name = path::clean(&entry.path, limits).map_err(io::Error::other)?;
        // The format's own; the index has no node for it.
        if name == TOC_NAME.as_bytes() {
            continue;
        }
        let difference = comparison.entry(&entry, &name, &mut archive)?;
        comparison.note(name, difference);
    }
    Ok(comparison.finish())
}

/// What the tar had last in the place of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    No,
    Directory,
    /// Nothing can stand below it. Whoever unpacks follows a link there, and writes elsewhere.
    Other,
}

struct Comparison<'a> {
    index: &'a LayerIndex,
    /// What the tar has of the index's nodes.
    seen: Vec<Seen>,
    /// What is no directory in the tar, below a directory that a later entry has replaced.
    replaced: HashSet<Vec<u8>>,
    differences: BTreeMap<Vec<u8>, String>,
    /// A difference that no later entry makes good.
    lasting: Option<String>,
    more: usize,
    data: Option<(&'a File, &'a mut Vec<usize>)>,
}

impl Comparison<'_> {
    fn note(&mut self, name: Vec<u8>, difference: Option<String>) {
        match difference {
            None => drop(self.differences.remove(&name)),
            Some(difference) if self.differences.len() < MOST_DIFFERENCES => {
                self.differences.insert(name, difference);
            }
            Some(_) => self.more += 1,
        }
    }

    fn finish(self) -> Vec<String> {
        let mut differences: Vec<String> = self.lasting.into_iter().collect();
        differences.extend(self.differences.into_iter().map(|(name, said)| format!("{}: {said}", shown(&name))));
        let unseen = (0..)
            .map(NodeId)
            .zip(&self.seen)
            .find(|(id, seen)| **seen == Seen::No && *id != NodeId::ROOT && !self.index.is_implied(*id));
        if let Some((id, _)) = unseen {
            differences.push(format!("{}: the index has it, the tar has not", path_of(self.index, id)));
        }
        if self.more > 0 {
            differences.push(format!("{} more entries differ", self.more));
        }
        differences
    }

    fn entry<R: Read>(
        &mut self,
        entry: &tar::Entry,
        name: &[u8],
        archive: &mut tar::Reader<R>,
    ) -> io::Result<Option<String>> {
        if let Some(above) = self.no_directory_above(name)
            && self.lasting.is_none()
        {
            let (name, above) = (shown(name), shown(above));
            self.lasting = Some(format!("{name}: {above}, which it stands below, is no directory in the tar"));
        }
        let seen = if entry.kind == EntryKind::Directory { Seen::Directory } else { Seen::Other };
        let Some(id) = self.lookup(name) else {
            let is_hidden = self.is_hidden(name) && self.note_replaced(name, seen);
            return Ok((!is_hidden).then(|| "the tar has it, the index has not".to_owned()));
        };
        self.seen[id.0 as usize] = seen;
        let node = self.index.node(id);
        if entry.kind == EntryKind::HardLink {
            let target = path::clean(&entry.link, &Limits::default()).ok().and_then(|link| self.lookup(&link));
            return Ok((target != Some(id)).then(|| "it is a hard link to another file in the tar".to_owned()));
        }
        if let Some(difference) = differs(entry, node) {
            return Ok(Some(difference));
        }
        match &node.kind {
            NodeKind::Regular(content) if content.size > 0 => {
                self.content(content.data, content.size, entry.content_offset, archive)
            }
            _ => Ok(None),
        }
    }

    fn lookup(&self, name: &[u8]) -> Option<NodeId> {
        self.index.lookup(name).or_else(|| self.index.lookup(as_json(name)?.as_bytes()))
    }

    /// Returns what is above an entry and no directory at this place in the tar.
    fn no_directory_above<'n>(&self, name: &'n [u8]) -> Option<&'n [u8]> {
        let parents = std::iter::successors(parent(name), |at| parent(at));
        parents.into_iter().find(|parent| match self.lookup(parent) {
            Some(id) => self.seen[id.0 as usize] == Seen::Other,
            None => self.replaced.contains(*parent),
        })
    }

    /// Remembers what a hidden entry was; says whether that could be done.
    fn note_replaced(&mut self, name: &[u8], seen: Seen) -> bool {
        if seen == Seen::Directory {
            self.replaced.remove(name);
        } else if self.replaced.len() < MOST_DIFFERENCES {
            self.replaced.insert(name.to_owned());
        } else {
            return false;
        }
        true
    }

    /// Says whether a later entry has put a file in the place of a directory above this one.
    fn is_hidden(&self, name: &[u8]) -> bool {
        let mut parents = std::iter::successors(parent(name), |at| parent(at));
        let known = parents.find_map(|parent| self.lookup(parent));
        known.is_some_and(|id| !matches!(self.index.node(id).kind, NodeKind::Directory { .. }))
    }

    fn content<R: Read>(
        &mut self,
        data: DataOffset,
        size: u64,
        in_tar: Option<u64>,
        archive: &mut tar::Reader<R>,
    ) -> io::Result<Option<String>> {
        // The builder of the index has checked that all content ends far below 2^64.
        let extents = self.index.extents_in(&(data..DataOffset(data.0 + size)));
        let mut buffer = vec![0; 64 << 10];
        for number in extents {
            let extent = &self.index.extents()[number];
            if let Some(span) = self.index.span(extent.frame)
                && in_tar
                    != span.start.checked_add(extent.frame_offset).and_then(|at| at.checked_sub(extent.file_offset.0))
            {
                return Ok(Some("its content stands elsewhere in the tar than the index says".to_owned()));
            }
            let mut is_damaged = false;
            let mut at = extent.data.0;
            let mut hasher = extent.digest.as_ref().map_or_else(Hasher::sha256, |digest| digest.hasher());
            let mut content = archive.content().take(extent.length);
            loop {
                let read = content.read(&mut buffer)?;
                if read == 0 {
                    break;
                }
                if extent.digest.is_some() {
                    hasher.update(&buffer[..read]);
                } else if let Some((file, _)) = &self.data {
                    let mut found = vec![0; read];
                    file.read_exact_at(&mut found, at)?;
                    is_damaged |= found != buffer[..read];
                }
                at += read as u64;
            }
            if let (true, Some((_, damaged))) = (is_damaged, &mut self.data) {
                damaged.push(number);
            }
            if extent.digest.is_some_and(|expected| hasher.finish() != expected) {
                let at = extent.file_offset;
                return Ok(Some(format!("its content at {at} is not in the tar what the index says")));
            }
        }
        Ok(None)
    }
}

fn parent(name: &[u8]) -> Option<&[u8]> {
    path::split_last(name).map(|(parent, _)| parent).filter(|parent| !parent.is_empty())
}

fn shown(name: &[u8]) -> String {
    format!("/{}", name.escape_ascii().take(400).map(char::from).collect::<String>())
}

/// Returns what Go's JSON makes of bytes that are not UTF-8.
fn as_json(bytes: &[u8]) -> Option<String> {
    if std::str::from_utf8(bytes).is_ok() {
        return None;
    }
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    Some(text)
}

fn differs(entry: &tar::Entry, node: &Node) -> Option<String> {
    let said = |what: &str, tar: &dyn std::fmt::Display, index: &dyn std::fmt::Display| {
        Some(format!("its {what} is {tar} in the tar and {index} in the index"))
    };
    let kind = match (&node.kind, entry.kind) {
        (NodeKind::Directory { .. }, EntryKind::Directory) | (NodeKind::Fifo, EntryKind::Fifo) => None,
        (NodeKind::Regular(content), EntryKind::Regular) if content.size != entry.size => {
            return said("size", &entry.size, &content.size);
        }
        (NodeKind::Regular(content), EntryKind::Regular) => {
            if content.size > 0 && entry.content_offset.is_none() {
                return Some("it is a sparse file in the tar".to_owned());
            }
            None
        }
        (NodeKind::Symlink { target }, EntryKind::Symlink) => {
            if **target != *entry.link && as_json(&entry.link).is_none_or(|link| **target != *link.as_bytes()) {
                return said("target", &entry.link.escape_ascii(), &target.escape_ascii());
            }
            None
        }
        (NodeKind::CharDevice { major, minor }, EntryKind::CharDevice)
        | (NodeKind::BlockDevice { major, minor }, EntryKind::BlockDevice) => {
            let ((tar_major, tar_minor), differ) = (entry.device, entry.device != (*major, *minor));
            differ.then(|| format!("its device is {tar_major}:{tar_minor} in the tar and {major}:{minor} in the index"))
        }
        (_, kind) => Some(format!("it is of another kind in the tar ({kind:?})")),
    };
    if kind.is_some() {
        return kind;
    }
    let octal = |mode: u16| format!("{mode:04o}");
    if entry.permissions != node.permissions {
        return said("mode", &octal(entry.permissions), &octal(node.permissions));
    }
    if (entry.uid, entry.gid) != (node.uid, node.gid) {
        return said("owner", &format!("{}:{}", entry.uid, entry.gid), &format!("{}:{}", node.uid, node.gid));
    }
    if !is_same_time(entry.mtime, node.mtime) {
        return said("time", &entry.mtime.seconds, &node.mtime.seconds);
    }
    (entry.xattrs != node.xattrs).then(|| "its extended attributes differ".to_owned())
}
