//! Makes a tree out of inodes in any order, of which some may have been replaced.

use super::{Inode, InodeId, InodeKind, LayerNumber, Tree, marker};
use crate::index::{LayerIndex, NodeId, NodeKind};

/// An inode that is not numbered yet, and its children: sorted names and places of other seedlings.
pub(super) struct Seedling {
    pub(super) inode: Inode,
    pub(super) children: Vec<(Box<[u8]>, usize)>,
}

impl Seedling {
    pub(super) fn of(index: &LayerIndex, layer: LayerNumber, node: NodeId) -> Self {
        Self { inode: inode(index, layer, node), children: Vec::new() }
    }

    pub(super) fn is_directory(&self) -> bool {
        self.inode.kind == InodeKind::Directory
    }
}

/// Returns the inode that a node becomes. Links are counted in the end, when the names are known.
pub(super) fn inode(index: &LayerIndex, layer: LayerNumber, id: NodeId) -> Inode {
    let node = index.node(id);
    let kind = match &node.kind {
        NodeKind::Directory { .. } => InodeKind::Directory,
        NodeKind::Regular(content) => InodeKind::Regular { layer, node: id, size: content.size, data: content.data },
        NodeKind::Symlink { target } => InodeKind::Symlink { target: target.clone() },
        NodeKind::CharDevice { major, minor } => InodeKind::CharDevice { major: *major, minor: *minor },
        NodeKind::BlockDevice { major, minor } => InodeKind::BlockDevice { major: *major, minor: *minor },
        NodeKind::Fifo => InodeKind::Fifo,
    };
    Inode {
        kind,
        permissions: node.permissions,
        uid: node.uid,
        gid: node.gid,
        mtime: node.mtime,
        xattrs: node.xattrs.iter().filter(|(name, _)| !marker::steers_overlayfs(name)).cloned().collect(),
        link_count: 0,
    }
}

/// Numbers what can be reached from the first seedling, directory by directory, and counts links. Directories must form
/// a tree.
pub(super) fn plant(mut seedlings: Vec<Seedling>) -> Tree {
    const UNSEEN: InodeId = InodeId(0);
    let mut numbers = vec![UNSEEN; seedlings.len()];
    // A seedling's place, by number.
    let mut order = vec![0_usize];
    let mut parents = vec![InodeId::ROOT];
    numbers[0] = InodeId::ROOT;
    seedlings[0].inode.link_count = 2;
    let mut children = Vec::with_capacity(seedlings.len());
    let mut next = 0;
    while let Some(&place) = order.get(next) {
        let directory = numbers[place];
        let mut named = Vec::with_capacity(seedlings[place].children.len());
        for (name, child) in std::mem::take(&mut seedlings[place].children) {
            if numbers[child] == UNSEEN {
                order.push(child);
                parents.push(directory);
                // A usize has at most 64 bits.
                numbers[child] = InodeId(order.len() as u64);
            }
            named.push((name, numbers[child]));
            if seedlings[child].is_directory() {
                seedlings[child].inode.link_count = 2;
                seedlings[place].inode.link_count += 1;
            } else {
                seedlings[child].inode.link_count += 1;
            }
        }
        children.push(named);
        next += 1;
    }
    let mut inodes: Vec<Option<Inode>> = seedlings.into_iter().map(|seedling| Some(seedling.inode)).collect();
    // No place is in the order twice.
    let inodes = order.into_iter().filter_map(|place| inodes[place].take()).collect();
    Tree { inodes, children, parents }
}
