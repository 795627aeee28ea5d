//! What a workload reads of an image, in the order in which it first does.
//!
//! Only what asks us is seen: of a layer that is complete, nothing.

use std::{
    collections::HashSet,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use loris_format::index::{LayerIndex, NodeId, NodeKind};

use crate::layer::LazyLayer;

/// Takes note of what is read of some layers.
#[derive(Debug, Default)]
pub struct Recorder(Mutex<Touched>);

/// Extents, by the numbers of layer and extent.
#[derive(Debug, Default)]
struct Touched {
    seen: HashSet<(usize, usize)>,
    order: Vec<(usize, usize)>,
}

impl Recorder {
    /// Begins to take note. Of two recorders of a layer, the first one counts.
    #[must_use]
    pub fn begin(layers: &[Arc<LazyLayer>]) -> Arc<Self> {
        let recorder = Arc::new(Self::default());
        for (number, layer) in layers.iter().enumerate() {
            let _ = layer.recorder.set((number, Arc::clone(&recorder)));
        }
        recorder
    }

    pub(crate) fn note(&self, layer: usize, extents: Range<usize>) {
        // Each change is whole but for an extent that would be listed twice.
        let mut touched = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for extent in extents {
            if touched.seen.insert((layer, extent)) {
                touched.order.push((layer, extent));
            }
        }
    }

    /// Returns a list for [`crate::prefetch_in_order`]: lines of a path, a tab, and `START-END`, which bytes of it were
    /// read. Names with line feeds or tabs have no place in it. `layers` are those that it was begun with.
    #[must_use]
    pub fn list(&self, layers: &[Arc<LazyLayer>]) -> Vec<u8> {
        let order = self.0.lock().unwrap_or_else(PoisonError::into_inner).order.clone();
        let paths: Vec<_> = layers.iter().map(|layer| Paths::of(layer.index())).collect();
        let mut parts: Vec<(usize, NodeId, Range<u64>)> = Vec::new();
        for (number, extent) in order {
            let Some(layer) = layers.get(number) else { continue };
            let extent = layer.extent(extent);
            let (start, end) = (extent.file_offset.0, extent.file_offset.0 + extent.length);
            match parts.last_mut() {
                Some((last, node, bytes)) if (*last, *node, bytes.end) == (number, extent.node, start) => {
                    bytes.end = end;
                }
                _ => parts.push((number, extent.node, start..end)),
            }
        }
        let mut list = Vec::new();
        for (number, node, bytes) in parts {
            let path = paths[number].path(node);
            if !path.contains(&b'\n') && !path.contains(&b'\t') {
                list.extend_from_slice(&path);
                list.extend_from_slice(format!("\t{}-{}\n", bytes.start, bytes.end).as_bytes());
            }
        }
        list
    }
}

/// Where each node of an index stands.
struct Paths<'a>(Vec<Option<(NodeId, &'a [u8])>>);

impl<'a> Paths<'a> {
    fn of(index: &'a LayerIndex) -> Self {
        let mut parents = vec![None; index.nodes().len()];
        for (number, directory) in (0..).zip(index.nodes()) {
            if let NodeKind::Directory { children } = &directory.kind {
                for (name, child) in children {
                    parents[child.0 as usize].get_or_insert((NodeId(number), &**name));
                }
            }
        }
        Self(parents)
    }

    fn path(&self, node: NodeId) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = node;
        // An index is a tree, so that this ends.
        while let Some((parent, name)) = self.0[at.0 as usize].filter(|_| names.len() < self.0.len()) {
            names.push(name);
            at = parent;
        }
        names.iter().rev().flat_map(|name| [b"/", *name].concat()).collect()
    }
}
