//! Names and attributes that steer: whiteouts, opaque markers, landmarks, overlayfs' own attributes.

use crate::{
    estargz::toc::{NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME},
    index::{LayerIndex, NodeId},
};

const PREFIX: &[u8] = b".wh.";
const META_PREFIX: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A directory of a layer, taken apart.
pub(super) struct Contents<'a> {
    /// Names that are shown, sorted.
    pub(super) shown: Vec<(&'a [u8], NodeId)>,
    /// Names that are removed from lower layers, sorted.
    pub(super) whiteouts: Vec<&'a [u8]>,
    /// Whether everything of lower layers is removed.
    pub(super) opaque: bool,
}

/// Says whether a name is a whiteout, an opaque marker, or aufs' own: none of them is shown.
pub(crate) fn is_marker(name: &[u8]) -> bool {
    name.starts_with(PREFIX)
}

impl<'a> Contents<'a> {
    pub(super) fn of(index: &'a LayerIndex, directory: NodeId) -> Self {
        let children = index.children(directory);
        let mut contents = Self { shown: Vec::with_capacity(children.len()), whiteouts: Vec::new(), opaque: false };
        for (name, node) in children {
            match name.strip_prefix(PREFIX) {
                _ if **name == *OPAQUE => contents.opaque = true,
                // `.` and `..` are no names; the rest is aufs' own.
                Some(b"" | b"." | b"..") => {}
                _ if name.starts_with(META_PREFIX) => {}
                Some(removed) => contents.whiteouts.push(removed),
                None if directory == NodeId::ROOT && is_hidden_at_root(name) => {}
                None => contents.shown.push((name, *node)),
            }
        }
        contents
    }

    pub(super) fn is_whited_out(&self, name: &[u8]) -> bool {
        self.whiteouts.binary_search(&name).is_ok()
    }
}

fn is_hidden_at_root(name: &[u8]) -> bool {
    [PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK, TOC_NAME].iter().any(|hidden| name == hidden.as_bytes())
}

/// Says whether an attribute of an image would steer overlayfs.
pub(super) fn steers_overlayfs(xattr: &[u8]) -> bool {
    xattr.starts_with(b"trusted.overlay.") || xattr.starts_with(b"user.overlay.")
}
