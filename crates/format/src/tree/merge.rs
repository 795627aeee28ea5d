//! The layers of an image as one tree.
//!
//! Each layer is laid over what the layers below it have become. Only the directories that it has are touched.

use std::iter::Peekable;

use super::{
    Inode, InodeKind, LayerNumber, Tree,
    marker::Contents,
    plant::{Seedling, inode, plant},
};
use crate::index::{LayerIndex, NodeId, NodeKind, Timestamp};

pub(super) fn merged(layers: &[&LayerIndex]) -> Tree {
    let root = Inode {
        kind: InodeKind::Directory,
        permissions: 0o755,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: Vec::new(),
        link_count: 0,
    };
    let mut merge = Merge { seedlings: vec![Seedling { inode: root, children: Vec::new() }] };
    for (number, index) in (0..).map(LayerNumber).zip(layers) {
        merge.lay(index, number);
    }
    plant(merge.seedlings)
}

struct Merge {
    /// The root first. What was removed stays, without a name.
    seedlings: Vec<Seedling>,
}

impl Merge {
    fn lay(&mut self, index: &LayerIndex, layer: LayerNumber) {
        // Where a node with several names was put when the first of them came.
        let mut places = vec![None; index.nodes().len()];
        let mut directories = vec![(NodeId::ROOT, 0)];
        while let Some((directory, place)) = directories.pop() {
            if !index.is_implied(directory) {
                self.seedlings[place].inode = inode(index, layer, directory);
            }
            let contents = Contents::of(index, directory);
            let mut lower = std::mem::take(&mut self.seedlings[place].children);
            if contents.opaque {
                lower.clear();
            }
            let mut lower = lower.into_iter().peekable();
            let mut children = Vec::with_capacity(lower.len() + contents.shown.len());
            for &(name, node) in &contents.shown {
                keep_before(name, &mut lower, &mut children, &contents);
                let standing = lower.next_if(|(lower, _)| **lower == *name).map(|(_, place)| place);
                let place = if matches!(index.node(node).kind, NodeKind::Directory { .. }) {
                    let place = standing
                        .filter(|place| self.seedlings[*place].is_directory() && !contents.is_whited_out(name))
                        .unwrap_or_else(|| self.add(index, layer, node));
                    directories.push((node, place));
                    place
                } else {
                    *places[node.0 as usize].get_or_insert_with(|| self.add(index, layer, node))
                };
                children.push((name.into(), place));
            }
            children.extend(lower.filter(|(name, _)| !contents.is_whited_out(name)));
            self.seedlings[place].children = children;
        }
    }

    fn add(&mut self, index: &LayerIndex, layer: LayerNumber, node: NodeId) -> usize {
        self.seedlings.push(Seedling::of(index, layer, node));
        self.seedlings.len() - 1
    }
}

type Name = (Box<[u8]>, usize);

/// Moves the names before `name` that the layer does not remove.
fn keep_before(
    name: &[u8],
    lower: &mut Peekable<impl Iterator<Item = Name>>,
    children: &mut Vec<Name>,
    contents: &Contents<'_>,
) {
    while let Some(kept) = lower.next_if(|(lower, _)| **lower < *name) {
        if !contents.is_whited_out(&kept.0) {
            children.push(kept);
        }
    }
}
