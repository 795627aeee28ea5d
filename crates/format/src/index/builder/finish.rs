//! The end of building: hard links that waited are resolved, what was replaced is left out, the rest is numbered.

use super::{
    Attributes, DraftKind, IndexBuilder, IndexError, Problem, ROOT, Waiting, error,
    layout::{Laid, Layout},
    names::ByDirectory,
};
use crate::{
    index::{Content, LayerIndex, Node, NodeId, NodeKind, Prefetch},
    position::DataOffset,
};

/// The number of a node that is not in the index.
const NOWHERE: u32 = u32::MAX;

pub(super) fn finish(mut builder: IndexBuilder) -> Result<LayerIndex, IndexError> {
    let by_directory = builder.names.by_directory(builder.nodes.len());
    let links = reach(&mut builder, &by_directory)?;
    let live: Vec<u32> = (ROOT..).zip(&links).filter(|(_, links)| **links > 0).map(|(draft, _)| draft).collect();
    let mut numbers = vec![NOWHERE; builder.nodes.len()];
    for (number, draft) in (0..).zip(&live) {
        numbers[*draft as usize] = number;
    }
    let laid = lay_out(&builder, &live)?;
    let mut data = vec![DataOffset::default(); live.len()];
    for (node, place) in &laid.places {
        data[node.0 as usize] = *place;
    }
    let mut implied = Vec::new();
    let mut nodes = Vec::with_capacity(live.len());
    for (number, draft) in (0..).zip(&live) {
        if matches!(builder.nodes[*draft as usize].kind, DraftKind::Directory { implied: true, .. }) {
            implied.push(NodeId(number));
        }
        let kind = match &mut builder.nodes[*draft as usize].kind {
            DraftKind::Directory { .. } => {
                let places = by_directory.of(*draft).iter();
                let children = places.map(|place| {
                    let node = builder.names.node(*place);
                    (builder.names.take(*place), NodeId(numbers[node as usize]))
                });
                NodeKind::Directory { children: children.collect() }
            }
            DraftKind::Regular { size, digest, .. } => {
                NodeKind::Regular(Content { size: *size, data: data[number as usize], digest: *digest })
            }
            DraftKind::Symlink { target } => NodeKind::Symlink { target: std::mem::take(target) },
            DraftKind::CharDevice { major, minor } => NodeKind::CharDevice { major: *major, minor: *minor },
            DraftKind::BlockDevice { major, minor } => NodeKind::BlockDevice { major: *major, minor: *minor },
            DraftKind::Fifo => NodeKind::Fifo,
            // All that were reached have been resolved, and no link was counted for them.
            DraftKind::Pending { .. } => continue,
        };
        let attributes = std::mem::take(&mut builder.nodes[*draft as usize].attributes);
        let Attributes { permissions, uid, gid, mtime, xattrs } = attributes;
        let link_count = links[*draft as usize];
        nodes.push(Node { kind, permissions, uid, gid, mtime, xattrs, link_count });
    }
    let Laid { extents, frames, by_frame, frame_extents, data_length, .. } = laid;
    let prefetch = Prefetch::Unspecified;
    let spans = builder.spans.iter().map(|new| new.span).collect();
    Ok(LayerIndex { nodes, implied, extents, frames, by_frame, frame_extents, spans, data_length, prefetch })
}

/// Goes through the tree from its root, resolves the names that wait for a link's target, and returns how many links
/// lead to each node: 0 to those that are not in the tree any more.
fn reach(builder: &mut IndexBuilder, by_directory: &ByDirectory) -> Result<Vec<u32>, IndexError> {
    let mut links = vec![0_u32; builder.nodes.len()];
    // `.` of the root, and `..`, which leads to itself.
    links[ROOT as usize] = 2;
    let mut directories = vec![ROOT];
    while let Some(directory) = directories.pop() {
        for place in by_directory.of(directory) {
            let mut node = builder.names.node(*place);
            if matches!(builder.nodes[node as usize].kind, DraftKind::Pending { .. }) {
                node = resolve(builder, node)?;
                builder.names.set_node(*place, node);
            }
            if matches!(builder.nodes[node as usize].kind, DraftKind::Directory { .. }) {
                links[node as usize] += 2;
                links[directory as usize] += 1;
                directories.push(node);
            } else {
                links[node as usize] += 1;
            }
        }
    }
    Ok(links)
}

/// Returns the node that a hard link, which came before its target, leads to over any number of further such links. No
/// chain is walked twice.
fn resolve(builder: &mut IndexBuilder, link: u32) -> Result<u32, IndexError> {
    let mut chain = Vec::new();
    let mut at = link;
    let mut shown = String::new();
    let found = loop {
        // The error is about the link that leads on to `at`.
        let fail = |builder: &IndexBuilder, chain: &[u32], problem| {
            Err(error_at(builder, chain.last().copied().unwrap_or(link), problem))
        };
        let target = match &mut builder.nodes[at as usize].kind {
            DraftKind::Directory { .. } => return fail(builder, &chain, Problem::LinkToDirectory { target: shown }),
            DraftKind::Pending { waiting, target } => match waiting {
                Waiting::Resolved(node) => break *node,
                Waiting::UnderWay => return fail(builder, &chain, Problem::LinkCycle { target: shown }),
                Waiting::Untried => {
                    *waiting = Waiting::UnderWay;
                    std::mem::take(target)
                }
            },
            _ => break at,
        };
        chain.push(at);
        shown = error::shown(&target);
        match builder.node_at(&target) {
            Ok(Some(node)) => at = node,
            Ok(None) => return fail(builder, &chain, Problem::LinkToNothing { target: shown }),
            Err(problem) => return fail(builder, &chain, problem),
        }
    };
    for link in chain {
        if let DraftKind::Pending { waiting, .. } = &mut builder.nodes[link as usize].kind {
            *waiting = Waiting::Resolved(found);
        }
    }
    Ok(found)
}

fn lay_out(builder: &IndexBuilder, live: &[u32]) -> Result<Laid, IndexError> {
    let mut layout = Layout::new(builder.payload_end, builder.codec, &builder.chunks, &builder.spans);
    for (number, draft) in (0..).zip(live) {
        if let DraftKind::Regular { chunks, .. } = &builder.nodes[*draft as usize].kind
            && !chunks.is_empty()
        {
            layout.add(NodeId(number), chunks.clone());
        }
    }
    layout.finish().map_err(|(node, problem)| error_at(builder, live[node.0 as usize], problem))
}

fn error_at(builder: &IndexBuilder, draft: u32, problem: Problem) -> IndexError {
    let names = builder.names.of_nodes(builder.nodes.len());
    let mut components = Vec::new();
    let mut node = draft;
    // A node that was replaced has no name any more; the root has none at all.
    while let Some((directory, name)) = names[node as usize].map(|place| builder.names.standing(place)) {
        components.push(name);
        node = directory;
    }
    components.reverse();
    IndexError::new(builder.nodes[draft as usize].entry, &components.join(&b'/'), problem)
}
