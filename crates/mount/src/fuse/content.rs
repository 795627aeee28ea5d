//! What a mount serves: the tree, and the content of its files out of lazy layers.
//!
//! Nothing here knows the FUSE protocol; errors are errno values for the program that reads.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use loris_format::{
    index::NodeId,
    position::{DataRange, FileOffset},
    tree::{InodeId, InodeKind, Tree},
};
use loris_lazy::{LazyLayer, ReadError};
use rustix::io::Errno;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
};

use super::MAX_FETCHES;
use crate::MountError;

/// Most files whose failures are logged.
const MAX_COMPLAINTS: usize = 1000;
/// The unit in which statfs(2) counts, in bytes.
pub(super) const BLOCK: u32 = 4096;

/// What statfs(2) and the choice of protocol features need to know about a tree.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Totals {
    /// Inodes.
    pub inodes: u64,
    /// Blocks of [`BLOCK`] bytes that all content takes.
    pub blocks: u64,
    /// Whether any inode has extended attributes.
    pub xattrs: bool,
    /// Whether any has POSIX access control lists.
    pub acls: bool,
}

/// A tree and where its content comes from.
pub(super) struct Served {
    pub tree: Arc<Tree>,
    pub totals: Totals,
    pub runtime: Handle,
    layers: Vec<Arc<LazyLayer>>,
    fetches: Semaphore,
    stop: watch::Receiver<bool>,
    /// Files whose failure was logged.
    complained: Mutex<HashSet<InodeId>>,
}

/// A part of one file's content: not empty, inside the file.
pub(super) struct Piece {
    layer: Arc<LazyLayer>,
    inode: InodeId,
    node: NodeId,
    /// Where it begins in the file, in bytes.
    offset: u64,
    range: DataRange,
    length: usize,
}

impl Served {
    pub(super) fn new(
        tree: Arc<Tree>,
        layers: Vec<Arc<LazyLayer>>,
        runtime: Handle,
        stop: watch::Receiver<bool>,
    ) -> Result<Self, MountError> {
        let mut totals = Totals::default();
        for (_, inode) in tree.inodes() {
            totals.inodes += 1;
            totals.xattrs |= !inode.xattrs.is_empty();
            totals.acls |= inode.xattrs.iter().any(|(name, _)| name.starts_with(b"system.posix_acl_"));
            if let InodeKind::Regular { layer, size, .. } = inode.kind {
                if layers.len() <= layer.0 as usize {
                    return Err(MountError::LayerMissing { layer: layer.0, layers: layers.len() });
                }
                totals.blocks = totals.blocks.saturating_add(size.div_ceil(u64::from(BLOCK)));
            }
        }
        Ok(Self {
            tree,
            totals,
            runtime,
            layers,
            fetches: Semaphore::new(MAX_FETCHES),
            stop,
            complained: Mutex::default(),
        })
    }

    /// Returns what a read of `size` bytes from `offset` covers; `None` behind the end of the file.
    pub(super) fn piece(&self, inode: InodeId, offset: u64, size: u32) -> Result<Option<Piece>, Errno> {
        let (number, node, file_size, data) = match self.tree.inode(inode).map(|inode| &inode.kind) {
            Some(InodeKind::Regular { layer, node, size, data }) => (*layer, *node, *size, *data),
            Some(InodeKind::Directory) => return Err(Errno::ISDIR),
            Some(_) => return Err(Errno::INVAL),
            None => return Err(Errno::NOENT),
        };
        let length = u64::from(size).min(file_size.saturating_sub(offset));
        if length == 0 {
            return Ok(None);
        }
        let layer = self.layers.get(number.0 as usize).ok_or(Errno::IO)?;
        let start = data.checked_add(offset).ok_or(Errno::IO)?;
        let end = start.checked_add(length).ok_or(Errno::IO)?;
        let length = usize::try_from(length).map_err(|_| Errno::INVAL)?;
        Ok(Some(Piece { layer: Arc::clone(layer), inode, node, offset, range: start..end, length }))
    }

    /// Fills a piece and reads it: waits for the network, and fails when the mount is being taken down.
    pub(super) async fn fetch(&self, piece: &Piece) -> Result<Vec<u8>, Errno> {
        let mut stop = self.stop.clone();
        let read = async {
            // Never closed: an error would only let one more fetch begin.
            let _permit = self.fetches.acquire().await;
            piece.layer.ensure(piece.range.clone()).await?;
            // Not before here, so that there are few of these at any time.
            let mut buffer = Vec::new();
            if piece.read_if_filled(&mut buffer).is_some() {
                return Ok(buffer);
            }
            // A stranger cut the data file. The layer repairs it, or says why not.
            buffer.resize(piece.length, 0);
            let length = piece.layer.read(piece.node, FileOffset(piece.offset), &mut buffer).await?;
            buffer.truncate(length);
            Ok(buffer)
        };
        let failed = |error: ReadError| {
            self.complain(piece, &error);
            errno(&error)
        };
        let buffer = tokio::select! {
            buffer = read => buffer.map_err(failed)?,
            _ = stop.wait_for(|stop| *stop) => return Err(Errno::IO),
        };
        // Fewer bytes would end the file for the kernel, which shows zeros behind its end.
        if buffer.len() == piece.length { Ok(buffer) } else { Err(Errno::IO) }
    }

    /// Logs why a file cannot be read: once a file, since programs try again and again.
    fn complain(&self, piece: &Piece, error: &ReadError) {
        let mut complained = self.complained.lock().unwrap_or_else(PoisonError::into_inner);
        if complained.len() >= MAX_COMPLAINTS || !complained.insert(piece.inode) {
            return;
        }
        drop(complained);
        let path = self.path(piece.inode);
        tracing::error!(path = %path.escape_ascii(), offset = piece.offset, %error, "a read failed");
    }

    /// Returns a path of an inode. Looks through the whole tree: for messages only.
    fn path(&self, inode: InodeId) -> Vec<u8> {
        let tree = &self.tree;
        let holder = tree
            .inodes()
            .filter(|(_, candidate)| matches!(candidate.kind, InodeKind::Directory))
            .find_map(|(directory, _)| name_in(tree, directory, inode).map(|name| (directory, name)));
        let mut names = Vec::new();
        let mut next = holder;
        while let Some((directory, name)) = next {
            names.push(name);
            let parent = tree.parent(directory);
            // The root is its own parent, and has no name in it.
            next = name_in(tree, parent, directory).map(|name| (parent, name));
        }
        names.iter().rev().flat_map(|name| [&b"/"[..], name]).flatten().copied().collect()
    }
}

impl Piece {
    /// Reads it where all of it is in the data file. Blocks for the disk alone.
    pub(super) fn read_if_filled<'a>(&self, buffer: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        if !self.layer.is_filled(&self.range) {
            return None;
        }
        if buffer.len() < self.length {
            buffer.resize(self.length, 0);
        }
        let bytes = &mut buffer[..self.length];
        // An error of the disk is met again, and told, where it is waited for.
        let length = self.layer.read_filled(self.range.start, bytes).ok()?;
        (length == self.length).then_some(bytes)
    }
}

fn name_in(tree: &Tree, directory: InodeId, inode: InodeId) -> Option<&[u8]> {
    tree.children(directory).iter().find(|(_, child)| *child == inode).map(|(name, _)| name.as_ref())
}

/// What a program is told. A full disk is named, since its owner can do something about it; everything else, above all
/// bytes that are not what the manifest vouches for, is an input/output error.
pub(super) fn errno(error: &ReadError) -> Errno {
    match error {
        ReadError::Ensure(error) if error.is_no_space() => Errno::NOSPC,
        _ => Errno::IO,
    }
}
