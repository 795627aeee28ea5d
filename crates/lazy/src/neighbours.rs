//! What stands beside a file that somebody waited for, and may be wanted next.
//!
//! Programs read files that belong together: the modules of a package, the libraries of a directory, the same `package.json`
//! in one directory after another. Whoever waits for the second of them waits for a round trip, and the link stands idle
//! meanwhile; it may as well carry what is likely to follow. How much that is grows with the number of waits and never
//! beyond what the link would have carried during them, so that a guess that is wrong costs no more than the waiting did.
//!
//! Pure: nodes in, nodes out.

use std::collections::HashMap;

use loris_format::index::{LayerIndex, NodeId, NodeKind};

/// Waits below a directory from which on its files are guessed at, and then those below the directory that holds it, and so
/// on: the wider the guess, the surer it should be.
const WAITS: [u32; 4] = [2, 3, 5, 8];
/// Nodes that are looked at for one guess.
const MOST_NODES: usize = 8192;
/// What a file costs at least.
const REQUEST_BYTES: u64 = 4 << 10;
/// Larger files are left alone: they are read in parts, or not at all.
const LARGE_BYTES: u64 = 4 << 20;

/// The waits in one layer.
#[derive(Debug)]
pub(crate) struct Neighbours {
    /// By node: a directory that holds it, and its place among the children there.
    places: Vec<(NodeId, u32)>,
    /// By directory: what happened below it.
    below: HashMap<NodeId, Below>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Below {
    waits: u32,
    /// Bytes that were guessed at.
    guessed: u64,
}

/// What the layer looks like to those who guess.
pub(crate) trait Guessable {
    /// What it would take to fetch a file; `None` where nothing of it is missing.
    fn missing_bytes(&self, node: NodeId) -> Option<u64>;
}

impl Neighbours {
    pub(crate) fn of(index: &LayerIndex) -> Self {
        let mut places = vec![(NodeId::ROOT, 0); index.nodes().len()];
        for (number, node) in (0..).map(NodeId).zip(index.nodes()) {
            if let NodeKind::Directory { children } = &node.kind {
                for (place, (_, child)) in (0..).zip(children) {
                    places[child.0 as usize] = (number, place);
                }
            }
        }
        Self { places, below: HashMap::new() }
    }

    /// Somebody waited for a file. Returns files that may be wanted next, the likeliest first; `trip_bytes` is what the link
    /// carries in a round trip.
    pub(crate) fn waited(
        &mut self,
        index: &LayerIndex,
        node: NodeId,
        trip_bytes: u64,
        layer: &impl Guessable,
    ) -> Vec<NodeId> {
        let mut guess = Guess { index, layer, budget: 0, taken: 0, looked_at: 0, nodes: Vec::new() };
        let mut at = node;
        let name = self.name(index, node);
        for needed in WAITS {
            let below = at;
            let place = self.places[below.0 as usize].1 as usize;
            at = self.places[below.0 as usize].0;
            // Everything stands below the root.
            if at == NodeId::ROOT {
                break;
            }
            let known = self.below.get(&at).copied().unwrap_or_default();
            let waits = known.waits.saturating_add(1);
            guess.budget = trip_bytes.saturating_mul(u64::from(waits)).saturating_sub(known.guessed + guess.taken);
            if waits < needed || name.is_empty() {
            } else if below == node {
                guess.files_of(at, place, &|other| suffix(other) == suffix(name));
            } else {
                guess.below(at, place, &|other| other == name);
                guess.below(at, place, &|other| suffix(other) == suffix(name));
            }
            self.below.insert(at, Below { waits, guessed: known.guessed + guess.taken });
        }
        guess.nodes
    }

    /// Returns the path of a file, without a slash at its beginning.
    pub(crate) fn path(&self, index: &LayerIndex, node: NodeId) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = node;
        // An index is a tree, so that this ends.
        while at != NodeId::ROOT && names.len() < self.places.len() {
            names.push(self.name(index, at));
            at = self.places[at.0 as usize].0;
        }
        names.reverse();
        names.join(&b'/')
    }

    fn name<'a>(&self, index: &'a LayerIndex, node: NodeId) -> &'a [u8] {
        let (directory, place) = self.places[node.0 as usize];
        index.children(directory).get(place as usize).map_or(&[], |(name, _)| name)
    }
}

/// Returns what is behind the first dot of a name; all of a name without one counts as a suffix of its own kind.
fn suffix(name: &[u8]) -> &[u8] {
    name.iter().position(|&byte| byte == b'.').map_or(&[], |dot| &name[dot..])
}

struct Guess<'a, L> {
    index: &'a LayerIndex,
    layer: &'a L,
    budget: u64,
    taken: u64,
    looked_at: usize,
    nodes: Vec<NodeId>,
}

impl<L: Guessable> Guess<'_, L> {
    fn is_over(&self) -> bool {
        self.budget == 0 || self.looked_at >= MOST_NODES
    }

    /// The files of a directory, those behind the place `from` first.
    fn files_of(&mut self, directory: NodeId, from: usize, is_alike: &dyn Fn(&[u8]) -> bool) {
        let (before, behind) = around(self.index.children(directory), from);
        for (name, node) in behind.iter().chain(before) {
            if self.is_over() {
                return;
            }
            self.looked_at += 1;
            if is_alike(name) {
                self.take(*node);
            }
        }
    }

    /// The files below a directory, those behind the place `from` first.
    fn below(&mut self, directory: NodeId, from: usize, is_alike: &dyn Fn(&[u8]) -> bool) {
        let index = self.index;
        let (before, behind) = around(index.children(directory), from);
        // What is still to be looked at, the next one last.
        let mut waiting = vec![before.iter(), behind.iter()];
        while let Some(children) = waiting.last_mut() {
            if self.is_over() {
                return;
            }
            let Some((name, node)) = children.next() else {
                waiting.pop();
                continue;
            };
            self.looked_at += 1;
            match &index.node(*node).kind {
                NodeKind::Directory { children } => waiting.push(children.iter()),
                NodeKind::Regular(_) if is_alike(name) => self.take(*node),
                _ => {}
            }
        }
    }

    fn take(&mut self, node: NodeId) {
        let NodeKind::Regular(content) = &self.index.node(node).kind else { return };
        if content.size == 0 || content.size > LARGE_BYTES || self.nodes.contains(&node) {
            return;
        }
        let Some(bytes) = self.layer.missing_bytes(node) else { return };
        if bytes > self.budget {
            return;
        }
        // A request costs something too.
        let cost = bytes.max(REQUEST_BYTES).min(self.budget);
        self.budget -= cost;
        self.taken += cost;
        self.nodes.push(node);
    }
}

type Child = (Box<[u8]>, NodeId);

/// Children before the one at the place `from`, and those behind it.
fn around(children: &[Child], from: usize) -> (&[Child], &[Child]) {
    let (before, behind) = children.split_at(from.min(children.len()));
    (before, behind.get(1..).unwrap_or_default())
}
