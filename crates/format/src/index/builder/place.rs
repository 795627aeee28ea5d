//! Puts an entry in its place: finds or makes the directories on the way, follows links, replaces what was there.

use std::borrow::Cow;

use super::{Attributes, Draft, DraftKind, IndexBuilder, NewKind, OpenFile, Problem, ROOT, Waiting, error};
use crate::{limits::Limits, tar::path, tree::marker};

/// Most symbolic links on the way to one entry, as Linux has it.
const FOLLOWED_LINKS: u32 = 40;

/// Most bytes of paths that are walked behind symbolic links, over all entries: a short entry must not cost a long walk
/// each time. Real layers stay far below, since entries of one directory follow each other.
const FOLLOWED_BYTES: u64 = 256 << 20;

/// Longest name of an extended attribute on Linux.
const XATTR_NAME_BYTES: usize = 255;

/// Device numbers that Linux can hold: 12 and 20 bits.
const MAJOR_LIMIT: u32 = 1 << 12;
const MINOR_LIMIT: u32 = 1 << 20;

/// Node numbers have 32 bits, and one of them means none.
const NODE_LIMIT: usize = u32::MAX as usize - 1;

impl IndexBuilder {
    pub(super) fn place(
        &mut self,
        entry: u64,
        path: &[u8],
        mut attributes: Attributes,
        kind: NewKind<'_>,
    ) -> Result<(), Problem> {
        check_attributes(&mut attributes, &self.limits)?;
        let path = path::cleaned(path, &self.limits)?;
        let Some((directory, name)) = path::split_last(&path) else {
            return self.place_root(entry, attributes, kind);
        };
        let (directory, in_tree) = match self.make_directory(directory, entry) {
            Ok(directory) => (directory, true),
            // It hides nothing. Checked like others, and with the chunks that may follow it, it gets a node that no name
            // leads to.
            Err(Problem::ParentNotDirectory { .. }) if marker::is_marker(name) => (ROOT, false),
            Err(problem) => return Err(problem),
        };
        let depth = self.depth(directory) + 1;
        if depth > self.limits.depth {
            return Err(Problem::TooDeep { limit: self.limits.depth });
        }
        let standing = in_tree.then(|| self.names.find(directory, name)).flatten();
        if let (NewKind::Directory, Some(standing)) = (kind, standing) {
            let node = &mut self.nodes[self.names.node(standing) as usize];
            if let DraftKind::Directory { implied, .. } = &mut node.kind {
                *implied = false;
                (node.attributes, node.entry) = (attributes, entry);
                return Ok(());
            }
        }
        let kind = match kind {
            NewKind::Directory => DraftKind::Directory { parent: directory, depth, implied: false },
            NewKind::Regular { size, digest } => {
                if size > self.limits.file_bytes {
                    return Err(Problem::FileTooLarge { size, limit: self.limits.file_bytes });
                }
                DraftKind::Regular { size, digest, chunks: 0..0 }
            }
            NewKind::Symlink { target } => DraftKind::Symlink { target: checked_target(target, &self.limits)?.into() },
            NewKind::HardLink { target } => {
                checked_target(target, &self.limits)?;
                if !in_tree {
                    return Ok(());
                }
                let target = path::cleaned(target, &self.limits)?;
                if let Some(node) = self.link_target(&target, (directory, name))? {
                    self.set_name(directory, name, standing, node)?;
                    return Ok(());
                }
                DraftKind::Pending { target: (*target).into(), waiting: Waiting::Untried }
            }
            NewKind::CharDevice { major, minor } | NewKind::BlockDevice { major, minor }
                if major >= MAJOR_LIMIT || minor >= MINOR_LIMIT =>
            {
                return Err(Problem::Device { major, minor });
            }
            NewKind::CharDevice { major, minor } => DraftKind::CharDevice { major, minor },
            NewKind::BlockDevice { major, minor } => DraftKind::BlockDevice { major, minor },
            NewKind::Fifo => DraftKind::Fifo,
        };
        if let DraftKind::Regular { size, digest, .. } = kind {
            let (node, first_chunk) = (self.next_node()?, self.chunks.len());
            self.open = Some(OpenFile { node, size, digest, covered: 0, first_chunk });
        }
        let node = self.add(Draft { kind, attributes, entry })?;
        if in_tree { self.set_name(directory, name, standing, node) } else { Ok(()) }
    }

    fn place_root(&mut self, entry: u64, attributes: Attributes, kind: NewKind<'_>) -> Result<(), Problem> {
        let root = &mut self.nodes[ROOT as usize];
        let DraftKind::Directory { implied, .. } = &mut root.kind else { return Err(Problem::RootNotDirectory) };
        if kind != NewKind::Directory {
            return Err(Problem::RootNotDirectory);
        }
        *implied = false;
        (root.attributes, root.entry) = (attributes, entry);
        Ok(())
    }

    /// Returns the node that a hard link at `link` (directory and name) leads to, `None` where it is not there yet.
    fn link_target(&mut self, target: &[u8], link: (u32, &[u8])) -> Result<Option<u32>, Problem> {
        let shown = || error::shown(target);
        let Some((directory, name)) = path::split_last(target) else {
            return Err(Problem::LinkToDirectory { target: shown() });
        };
        let Some(directory) = self.walk(directory, None)? else { return Ok(None) };
        if (directory, name) == link {
            return Err(Problem::LinkCycle { target: shown() });
        }
        let Some(found) = self.names.find(directory, name) else { return Ok(None) };
        let node = self.names.node(found);
        match self.nodes[node as usize].kind {
            DraftKind::Directory { .. } => Err(Problem::LinkToDirectory { target: shown() }),
            _ => Ok(Some(node)),
        }
    }

    fn make_directory(&mut self, path: &[u8], entry: u64) -> Result<u32, Problem> {
        if path.is_empty() {
            return Ok(ROOT);
        }
        if let Some((last, node)) = &self.last_directory
            && last == path
        {
            return Ok(*node);
        }
        // It is there or made.
        let node = self.walk(path, Some(entry))?.unwrap_or(ROOT);
        self.last_directory = Some((path.into(), node));
        Ok(node)
    }

    /// Returns what stands at a clean path, following symbolic links on the way.
    pub(super) fn node_at(&mut self, path: &[u8]) -> Result<Option<u32>, Problem> {
        let Some((directory, name)) = path::split_last(path) else { return Ok(Some(ROOT)) };
        let Some(directory) = self.walk(directory, None)? else { return Ok(None) };
        Ok(self.names.find(directory, name).map(|place| self.names.node(place)))
    }

    /// Returns the directory at a clean path, following symbolic links. Where it is not there, it is made for entry
    /// `make`, or else the answer is `None`.
    fn walk(&mut self, path: &[u8], make: Option<u64>) -> Result<Option<u32>, Problem> {
        let mut rest = Cow::Borrowed(path);
        let mut at = 0;
        let mut directory = ROOT;
        let mut followed = 0;
        while at < rest.len() {
            let end = rest[at..].iter().position(|&byte| byte == b'/').map_or(rest.len(), |length| at + length);
            let name = &rest[at..end];
            at = end + 1;
            match name {
                b"" | b"." => continue,
                b".." => {
                    directory = self.parent(directory);
                    continue;
                }
                _ => {}
            }
            let Some(found) = self.names.find(directory, name) else {
                let Some(entry) = make else { return Ok(None) };
                directory = self.imply(directory, name, entry)?;
                continue;
            };
            let node = self.names.node(found);
            match &self.nodes[node as usize].kind {
                DraftKind::Directory { .. } => directory = node,
                DraftKind::Symlink { target } => {
                    let left = rest.get(at..).unwrap_or_default();
                    let walked = target.len() + left.len() + 1;
                    followed += 1;
                    self.followed_bytes += u64::try_from(walked).unwrap_or(u64::MAX);
                    if followed > FOLLOWED_LINKS || self.followed_bytes > FOLLOWED_BYTES {
                        return Err(Problem::TooManySymlinks { at: error::shown(name) });
                    }
                    if target.starts_with(b"/") {
                        directory = ROOT;
                    }
                    rest = Cow::Owned([target, left].join(&b'/'));
                    at = 0;
                }
                _ if make.is_none() => return Ok(None),
                _ => return Err(Problem::ParentNotDirectory { at: error::shown(name) }),
            }
        }
        Ok(Some(directory))
    }

    fn imply(&mut self, parent: u32, name: &[u8], entry: u64) -> Result<u32, Problem> {
        // A clean path was checked; what a symbolic link brings in was not.
        if name.len() > self.limits.name_bytes {
            return Err(Problem::NameTooLong { limit: self.limits.name_bytes });
        }
        let depth = self.depth(parent) + 1;
        if depth > self.limits.depth {
            return Err(Problem::TooDeep { limit: self.limits.depth });
        }
        let node = self.add(Draft::implied(parent, depth, entry))?;
        self.set_name(parent, name, None, node)?;
        Ok(node)
    }

    fn set_name(&mut self, directory: u32, name: &[u8], standing: Option<u32>, node: u32) -> Result<(), Problem> {
        let Some(standing) = standing else {
            return self.names.insert(directory, name, node).ok_or(Problem::TooManyEntries { limit: NODE_LIMIT });
        };
        // The last directory may have been reached through what is replaced.
        self.last_directory = None;
        self.names.set_node(standing, node);
        Ok(())
    }

    fn next_node(&self) -> Result<u32, Problem> {
        let limit = self.limits.entries.min(NODE_LIMIT);
        u32::try_from(self.nodes.len())
            .ok()
            .filter(|_| self.nodes.len() <= limit)
            .ok_or(Problem::TooManyEntries { limit })
    }

    fn add(&mut self, draft: Draft) -> Result<u32, Problem> {
        let node = self.next_node()?;
        self.nodes.push(draft);
        Ok(node)
    }

    fn parent(&self, directory: u32) -> u32 {
        match self.nodes[directory as usize].kind {
            DraftKind::Directory { parent, .. } => parent,
            _ => ROOT,
        }
    }

    fn depth(&self, directory: u32) -> usize {
        match self.nodes[directory as usize].kind {
            DraftKind::Directory { depth, .. } => depth,
            _ => 0,
        }
    }
}

fn check_attributes(attributes: &mut Attributes, limits: &Limits) -> Result<(), Problem> {
    attributes.permissions &= 0o7777;
    if attributes.mtime.nanoseconds >= 1_000_000_000 {
        return Err(Problem::Nanoseconds { nanoseconds: attributes.mtime.nanoseconds });
    }
    let xattrs = &mut attributes.xattrs;
    if xattrs.is_empty() {
        return Ok(());
    }
    // Both are as long as a vector may be, so that their sum is no overflow.
    let bytes = xattrs.iter().fold(0_usize, |sum, (name, value)| sum.saturating_add(name.len() + value.len()));
    if bytes > limits.xattr_bytes {
        return Err(Problem::XattrsTooLarge { limit: limits.xattr_bytes });
    }
    if let Some((name, _)) =
        xattrs.iter().find(|(name, _)| name.is_empty() || name.len() > XATTR_NAME_BYTES || name.contains(&0))
    {
        return Err(Problem::XattrName { name: error::shown(name) });
    }
    // Stable, and the last of equal names stays.
    xattrs.sort_by(|one, other| one.0.cmp(&other.0));
    xattrs.reverse();
    xattrs.dedup_by(|one, other| one.0 == other.0);
    xattrs.reverse();
    Ok(())
}

fn checked_target<'a>(target: &'a [u8], limits: &Limits) -> Result<&'a [u8], Problem> {
    if target.is_empty() || target.contains(&0) {
        return Err(Problem::Target { target: error::shown(target) });
    }
    if target.len() > limits.path_bytes {
        return Err(Problem::TargetTooLong { limit: limits.path_bytes });
    }
    Ok(target)
}
