//! The layers of an image as one tree.
//!
//! One pass over what is shown, a directory at a time, parents first. Of each directory is known which layers say
//! something of it; their names are brought together and told through from the lowest layer to the highest. So an inode is
//! made once, where it belongs, and what a higher layer hides is looked at by its name only.

use std::ops::Range;

use super::{Inode, InodeId, InodeKind, LayerNumber, Tree, marker::Contents, plant::inode};
use crate::index::{LayerIndex, NodeId, NodeKind, Timestamp};

pub(super) fn merged(layers: &[&LayerIndex]) -> Tree {
    let most = layers.iter().map(|index| index.nodes().len()).sum::<usize>() + 1;
    let mut merge = Merge {
        layers,
        // Memory that is 0 costs nothing until it is written, and few files have several names.
        numbers: layers.iter().map(|index| vec![0; index.nodes().len()]).collect(),
        sources: Vec::new(),
        waiting: Vec::new(),
        tree: Tree {
            inodes: Vec::with_capacity(most),
            children: Vec::with_capacity(most),
            parents: Vec::with_capacity(most),
        },
    };
    merge.sources.extend((0..).map(LayerNumber).zip(layers).map(|(number, _)| Node(number, NodeId::ROOT)));
    let described = merge.sources.iter().rfind(|root| !layers[root.layer()].is_implied(NodeId::ROOT)).copied();
    let root = described.map_or_else(undescribed_root, |Node(layer, id)| inode(layers[layer.0 as usize], layer, id));
    merge.add(root, InodeId::ROOT);
    merge.waiting.push(Waiting { place: 0, sources: 0..merge.sources.len() });
    let mut next = 0;
    while let Some(waiting) = merge.waiting.get(next) {
        let Waiting { place, sources } = waiting.clone();
        merge.fill(place, sources);
        next += 1;
    }
    merge.tree
}

/// The root of an image none of whose layers describes one.
fn undescribed_root() -> Inode {
    Inode {
        kind: InodeKind::Directory,
        permissions: 0o755,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: Vec::new(),
        link_count: 0,
    }
}

struct Merge<'a> {
    layers: &'a [&'a LayerIndex],
    /// By layer and node: the number of the inode that a file with several names has become, 0 before.
    numbers: Vec<Vec<u64>>,
    /// What directories are made of, each a range in here.
    sources: Vec<Node>,
    /// Directories in the order of their numbers; those that are filled stay.
    waiting: Vec<Waiting>,
    tree: Tree,
}

/// A node of a layer.
#[derive(Clone, Copy)]
struct Node(LayerNumber, NodeId);

impl Node {
    fn layer(self) -> usize {
        self.0.0 as usize
    }
}

/// A directory that has its number, but no children yet.
#[derive(Clone)]
struct Waiting {
    /// Its place in the tree.
    place: usize,
    /// Its nodes, the lowest layer's first.
    sources: Range<usize>,
}

/// What a layer says of a name.
struct Saying<'a> {
    name: &'a [u8],
    layer: LayerNumber,
    /// What it is; `None` for a whiteout.
    node: Option<NodeId>,
}

/// What a name is, as far as it has been told.
enum Told {
    Nothing,
    File(Node),
    /// A directory: the node that describes it; all of its nodes are at the end of the sources.
    Directory(Node),
}

impl<'a> Merge<'a> {
    fn fill(&mut self, place: usize, sources: Range<usize>) {
        let sayings = match self.sources[sources] {
            [source] => {
                let contents = Contents::of(self.layers[source.layer()], source.1);
                // Whiteouts of a directory that no other layer has hide nothing.
                return self.fill_alone(place, source.0, &contents);
            }
            ref sources => self.sayings(sources),
        };
        let mut named = Vec::with_capacity(sayings.len());
        for sayings in sayings.chunk_by(|one, other| one.name == other.name) {
            let start = self.sources.len();
            match self.tell(sayings) {
                Told::Nothing => {}
                Told::File(node) => named.push((sayings[0].name.into(), self.file(node, place))),
                Told::Directory(node) => named.push((sayings[0].name.into(), self.directory(node, place, start))),
            }
        }
        self.tree.children[place] = named;
    }

    fn fill_alone(&mut self, place: usize, layer: LayerNumber, contents: &Contents<'_>) {
        let index = self.layers[layer.0 as usize];
        let mut named: Vec<(Box<[u8]>, InodeId)> = Vec::with_capacity(contents.shown.len());
        for &(name, id) in &contents.shown {
            let node = Node(layer, id);
            let number = if matches!(index.node(id).kind, NodeKind::Directory { .. }) {
                let start = self.sources.len();
                self.sources.push(node);
                self.directory(node, place, start)
            } else {
                self.file(node, place)
            };
            named.push((name.into(), number));
        }
        self.tree.children[place] = named;
    }

    /// Returns what layers say of the names in a directory, sorted by name, the lowest layer first, and a whiteout before
    /// what its own layer has under that name.
    fn sayings(&self, sources: &[Node]) -> Vec<Saying<'a>> {
        let mut sayings = Vec::new();
        for source in sources {
            let contents = Contents::of(self.layers[source.layer()], source.1);
            if contents.opaque {
                sayings.clear();
            }
            let layer = source.0;
            sayings.reserve(contents.whiteouts.len() + contents.shown.len());
            sayings.extend(contents.whiteouts.iter().map(|&name| Saying { name, layer, node: None }));
            sayings.extend(contents.shown.iter().map(|&(name, node)| Saying { name, layer, node: Some(node) }));
        }
        // Stable: the order of layers stays. And made for what is sorted in parts, as this is.
        sayings.sort_by_key(|saying| saying.name);
        sayings
    }

    /// Follows a name through the layers. The nodes of a directory are put at the end of the sources.
    fn tell(&mut self, sayings: &[Saying<'_>]) -> Told {
        let start = self.sources.len();
        let mut told = Told::Nothing;
        for &Saying { layer, node, .. } in sayings {
            let Some(id) = node else {
                told = Told::Nothing;
                continue;
            };
            let node = Node(layer, id);
            let index = self.layers[node.layer()];
            if !matches!(index.node(id).kind, NodeKind::Directory { .. }) {
                told = Told::File(node);
                continue;
            }
            match told {
                Told::Directory(_) if index.is_implied(id) => {}
                Told::Directory(_) => told = Told::Directory(node),
                Told::Nothing | Told::File(_) => {
                    self.sources.truncate(start);
                    told = Told::Directory(node);
                }
            }
            self.sources.push(node);
        }
        if !matches!(told, Told::Directory(_)) {
            self.sources.truncate(start);
        }
        told
    }

    /// Returns the number of a file to which one more name in a directory leads.
    fn file(&mut self, Node(layer, id): Node, directory: usize) -> InodeId {
        let index = self.layers[layer.0 as usize];
        let has_names = index.node(id).link_count > 1;
        if has_names && let known @ 1.. = self.numbers[layer.0 as usize][id.0 as usize] {
            let known = InodeId(known);
            if let Some(inode) = super::place(known).and_then(|place| self.tree.inodes.get_mut(place)) {
                inode.link_count += 1;
            }
            return known;
        }
        let number = self.add(Inode { link_count: 1, ..inode(index, layer, id) }, number(directory));
        if has_names {
            self.numbers[layer.0 as usize][id.0 as usize] = number.0;
        }
        number
    }

    /// Adds a directory that `node` describes, and whose nodes are the sources from `start` on.
    fn directory(&mut self, node: Node, parent: usize, start: usize) -> InodeId {
        self.tree.inodes[parent].link_count += 1;
        let place = self.tree.inodes.len();
        let inode = inode(self.layers[node.layer()], node.0, node.1);
        self.waiting.push(Waiting { place, sources: start..self.sources.len() });
        self.add(inode, number(parent))
    }

    fn add(&mut self, mut inode: Inode, parent: InodeId) -> InodeId {
        if inode.kind == InodeKind::Directory {
            inode.link_count = 2;
        }
        self.tree.inodes.push(inode);
        self.tree.children.push(Vec::new());
        self.tree.parents.push(parent);
        number(self.tree.inodes.len() - 1)
    }
}

/// Returns the number of the inode at a place. A usize has at most 64 bits.
fn number(place: usize) -> InodeId {
    InodeId(place as u64 + 1)
}
