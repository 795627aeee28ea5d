//! Layer indexes as one file-system tree: what a mount shows.
//!
//! Two forms. [`Tree::of_layer`] shows one layer as a lower directory of overlayfs: OCI whiteouts (`.wh.name`) become
//! character devices 0:0, opaque directories (`.wh..wh..opq`) get overlayfs' attribute. [`Tree::merged`] applies
//! whiteouts and opaque directories itself and shows the whole image, which needs no overlayfs and no root.
//!
//! Landmarks and the table of contents at the root of an eStargz layer are not shown, nor are `trusted.overlay.*` and
//! `user.overlay.*` attributes of an image, which would steer overlayfs.
//!
//! Where the sources leave room (OCI image specification, `layer.md`, section "Whiteouts"; the kernel's
//! `Documentation/filesystems/overlayfs.rst`), this holds:
//! - A whiteout and an opaque marker act on lower layers only, wherever in their layer they stand.
//! - A whiteout beside a file of that name: the file is shown. Beside a directory: the directory is shown, and nothing of
//!   a lower one in it.
//! - A whiteout or an opaque marker below something of its layer that is no directory hides nothing, whichever comes
//!   first (umoci writes such): `a` and `a/.wh.x` are the file `a`. The layer index leaves it out, so that it is not seen
//!   here. Any other entry below a file is an error there.
//! - Every other name that begins with `.wh.` is aufs' own (`.wh..wh.plnk`, `.wh..wh.aufs`, a bare `.wh.`): not shown.
//! - A directory that a layer does not describe but only has entries in does not change a lower layer's attributes, when
//!   layers are merged. In the form of one layer the lower ones aren't known: the directory shows made-up attributes.
//! - A character device 0:0 of an image is no whiteout, but overlayfs would take it for one: in the form of one layer it
//!   is left out, and a lower layer's file of that name shows. Merged, it is a device like others.

use std::fmt;

use crate::{
    index::{LayerIndex, NodeId, Timestamp, Xattrs},
    position::DataOffset,
};

mod layer;
pub(crate) mod marker;
mod merge;
mod plant;

#[cfg(test)]
mod tests;

/// Most symbolic links that [`Tree::resolve`] follows, as Linux has it.
const FOLLOWED_LINKS: u32 = 40;
/// Most names that it walks through, those in links included: more than any path that Linux takes has.
const WALKED_NAMES: u32 = 16 << 10;

/// An inode's number in its tree, counted from the root's 1 as FUSE wants it, without gaps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct InodeId(pub u64);

impl InodeId {
    /// The root directory.
    pub const ROOT: Self = Self(1);
}

impl fmt::Display for InodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A layer's number in its image, 0 at the bottom.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct LayerNumber(pub u32);

/// Which attribute marks an opaque directory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum OpaqueStyle {
    /// `trusted.overlay.opaque`, which overlayfs reads by default.
    Trusted,
    /// `user.overlay.opaque`, which it reads where it is mounted with `userxattr`.
    User,
    /// Both.
    Both,
}

/// A tree of inodes.
///
/// Numbers and order depend on the layers only. 100 to 200 bytes an inode, and 24 and the name for each name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tree {
    /// An inode's place is its number less 1.
    inodes: Vec<Inode>,
    children: Vec<Vec<(Box<[u8]>, InodeId)>>,
    /// For directories; the root is its own.
    parents: Vec<InodeId>,
}

/// A file of the tree.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Inode {
    /// What it is.
    pub kind: InodeKind,
    /// The low twelve bits of `st_mode`.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// Extended attributes that are shown, sorted by name.
    pub xattrs: Xattrs,
    /// Names that lead here in this tree; for a directory 2 and one for each subdirectory.
    pub link_count: u32,
}

/// What an inode is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum InodeKind {
    /// A directory, see [`Tree::children`].
    Directory,
    /// A regular file.
    Regular {
        /// The layer that has its content.
        layer: LayerNumber,
        /// Its node in that layer's index.
        node: NodeId,
        /// Bytes.
        size: u64,
        /// Where its content stands in the layer's data file.
        data: DataOffset,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points.
        target: Box<[u8]>,
    },
    /// A character device; 0:0 is a whiteout in the form of one layer.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// Why a path leads nowhere.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    /// A name that is not there: `ENOENT`.
    #[error("\"{name}\" does not exist")]
    NotFound {
        /// The name that is not there, escaped.
        name: String,
    },
    /// A file in the place of a directory: `ENOTDIR`.
    #[error("\"{name}\" is not a directory")]
    NotADirectory {
        /// The name of the file, escaped.
        name: String,
    },
    /// Symbolic links that lead to ever more of them: `ELOOP`.
    #[error("too many symbolic links, at \"{name}\"")]
    TooManyLinks {
        /// The name of the last link, escaped.
        name: String,
    },
}

impl Tree {
    /// Shows one layer as a lower directory of overlayfs.
    #[must_use]
    pub fn of_layer(index: &LayerIndex, layer: LayerNumber, style: OpaqueStyle) -> Self {
        layer::of_layer(index, layer, style)
    }

    /// Shows the layers of an image, the lowest first, as one tree. Without a layer, the tree is an empty root.
    #[must_use]
    pub fn merged(layers: &[&LayerIndex]) -> Self {
        merge::merged(layers)
    }

    /// Returns an inode; `None` for a number that is not of this tree.
    #[must_use]
    pub fn inode(&self, id: InodeId) -> Option<&Inode> {
        self.inodes.get(place(id)?)
    }

    /// Returns a directory's child by name.
    #[must_use]
    pub fn child(&self, directory: InodeId, name: &[u8]) -> Option<InodeId> {
        let children = self.children(directory);
        children.binary_search_by(|(child, _)| child.as_ref().cmp(name)).ok().map(|place| children[place].1)
    }

    /// Returns the children of a directory, sorted by name; nothing for other inodes.
    #[must_use]
    pub fn children(&self, directory: InodeId) -> &[(Box<[u8]>, InodeId)] {
        place(directory).and_then(|place| self.children.get(place)).map_or(&[], Vec::as_slice)
    }

    /// Returns the directory that holds a directory; the root for the root and for what is no directory.
    #[must_use]
    pub fn parent(&self, directory: InodeId) -> InodeId {
        place(directory).and_then(|place| self.parents.get(place)).copied().unwrap_or(InodeId::ROOT)
    }

    /// Returns the inode at a path, without following symbolic links. Empty components and `.` are passed over.
    #[must_use]
    pub fn lookup(&self, path: &[u8]) -> Option<InodeId> {
        let mut names = path.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".");
        names.try_fold(InodeId::ROOT, |directory, name| self.child(directory, name))
    }

    /// Returns the inode that a path leads to: symbolic links are followed, also at its end, and neither they nor `..`
    /// leave the tree. A relative path begins at the root.
    ///
    /// # Errors
    /// [`ResolveError`] where the path leads nowhere.
    pub fn resolve(&self, path: &[u8]) -> Result<InodeId, ResolveError> {
        let shown = |name: &[u8]| format!("{}", name[..name.len().min(200)].escape_ascii());
        // Components that are still to be walked, the next one last.
        let mut waiting: Vec<&[u8]> = path.split(|&byte| byte == b'/').rev().collect();
        let mut at = InodeId::ROOT;
        // Directories are walked into; whatever else `at` is, was reached by this name.
        let mut reached: &[u8] = b"/";
        let mut followed = 0;
        let mut walked = 0;
        while let Some(name) = waiting.pop() {
            walked += 1;
            if walked > WALKED_NAMES {
                return Err(ResolveError::TooManyLinks { name: shown(name) });
            }
            let is_directory = self.inode(at).is_some_and(|inode| inode.kind == InodeKind::Directory);
            if !is_directory {
                return Err(ResolveError::NotADirectory { name: shown(reached) });
            }
            match name {
                b"" | b"." => continue,
                b".." => {
                    at = self.parent(at);
                    continue;
                }
                _ => {}
            }
            let child = self.child(at, name).ok_or_else(|| ResolveError::NotFound { name: shown(name) })?;
            match self.inode(child).map(|inode| &inode.kind) {
                Some(InodeKind::Symlink { target }) => {
                    followed += 1;
                    if followed > FOLLOWED_LINKS {
                        return Err(ResolveError::TooManyLinks { name: shown(name) });
                    }
                    if target.starts_with(b"/") {
                        at = InodeId::ROOT;
                    }
                    waiting.extend(target.split(|&byte| byte == b'/').rev());
                }
                _ => (at, reached) = (child, name),
            }
        }
        Ok(at)
    }

    /// Returns all inodes with their numbers, the root first.
    pub fn inodes(&self) -> impl Iterator<Item = (InodeId, &Inode)> {
        (InodeId::ROOT.0..).map(InodeId).zip(&self.inodes)
    }
}

fn place(id: InodeId) -> Option<usize> {
    usize::try_from(id.0.checked_sub(1)?).ok()
}
