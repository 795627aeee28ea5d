//! One layer as a lower directory of overlayfs.

use super::{
    Inode, InodeKind, LayerNumber, OpaqueStyle, Tree,
    marker::Contents,
    plant::{Seedling, plant},
};
use crate::index::{LayerIndex, NodeId, NodeKind, Timestamp};

const TRUSTED_OPAQUE: &[u8] = b"trusted.overlay.opaque";
const USER_OPAQUE: &[u8] = b"user.overlay.opaque";
const OPAQUE_VALUE: &[u8] = b"y";

pub(super) fn of_layer(index: &LayerIndex, layer: LayerNumber, style: OpaqueStyle) -> Tree {
    // A node's place is its number; whiteouts stand behind.
    let ids = || (NodeId::ROOT.0..).map(NodeId).zip(index.nodes());
    let mut seedlings: Vec<Seedling> = ids().map(|(id, _)| Seedling::of(index, layer, id)).collect();
    for (id, node) in ids() {
        if !matches!(node.kind, NodeKind::Directory { .. }) {
            continue;
        }
        let mut contents = Contents::of(index, id);
        contents.shown.retain(|(_, child)| index.node(*child).kind != NodeKind::CharDevice { major: 0, minor: 0 });
        if contents.opaque {
            make_opaque(&mut seedlings[id.0 as usize], style);
        }
        let mut children = Vec::with_capacity(contents.shown.len() + contents.whiteouts.len());
        for &(name, child) in &contents.shown {
            let place = child.0 as usize;
            if seedlings[place].is_directory() && contents.is_whited_out(name) {
                make_opaque(&mut seedlings[place], style);
            }
            children.push((name.into(), place));
        }
        for &name in &contents.whiteouts {
            if contents.shown.binary_search_by_key(&name, |(shown, _)| shown).is_err() {
                children.push((name.into(), seedlings.len()));
                seedlings.push(whiteout());
            }
        }
        children.sort();
        seedlings[id.0 as usize].children = children;
    }
    plant(seedlings)
}

fn make_opaque(directory: &mut Seedling, style: OpaqueStyle) {
    let names: &[&[u8]] = match style {
        OpaqueStyle::Trusted => &[TRUSTED_OPAQUE],
        OpaqueStyle::User => &[USER_OPAQUE],
        OpaqueStyle::Both => &[TRUSTED_OPAQUE, USER_OPAQUE],
    };
    let xattrs = &mut directory.inode.xattrs;
    xattrs.extend(names.iter().map(|name| ((*name).into(), OPAQUE_VALUE.into())));
    // A directory can be marked twice, from inside and from beside it.
    xattrs.sort();
    xattrs.dedup();
}

/// What overlayfs takes for a removed name. All of them look the same whenever they are made.
fn whiteout() -> Seedling {
    let inode = Inode {
        kind: InodeKind::CharDevice { major: 0, minor: 0 },
        permissions: 0,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: Vec::new(),
        link_count: 0,
    };
    Seedling { inode, children: Vec::new() }
}
