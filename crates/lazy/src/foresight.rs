//! What a workload will read that nobody has recorded: guessed from what its files say.
//!
//! A command names a program, that an interpreter and libraries, those more libraries: long before the dynamic loader comes
//! to them one after the other, they can be on their way, and while the container is still being made, the link is idle.
//! The same goes for a library that a program loads later, and for files beside those that were waited for
//! (see [`neighbours`](crate::neighbours)). A guess decides what is early and nothing else: reads on demand overtake it, and
//! what is guessed in vain is bounded.
//!
//! Images whose writers marked what a start needs are left alone: they know better.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use loris_format::{
    index::{LayerIndex, NodeId, NodeKind, Prefetch},
    position::{DataOffset, DataRange},
    program::{self, DYNAMIC_BYTES, Elf, NAME_BYTES, Program, START_BYTES},
    tree::{InodeId, InodeKind, Tree},
};
use loris_oci::document::ProcessConfig;
use tokio::sync::mpsc;

use crate::{
    layer::LazyLayer,
    neighbours::{Guessable, Neighbours},
    plan::{fetched_range, trip_bytes},
};

/// Most compressed bytes that are fetched for one command, and of one of its files.
const MOST_BYTES: u64 = 64 << 20;
const MOST_FILE_BYTES: u64 = 32 << 20;
/// Files that are looked into for one image.
const MOST_FILES: usize = 512;
/// Libraries that hold data and no code to speak of are read here and there only: less than 1 / so much of it.
const DATA_PART: u64 = 64;
/// A start is over when nobody has waited for anything for so long; then nothing is guessed any more.
const OVER: Duration = Duration::from_secs(30);
/// Waits that have not been looked at yet; more of them are not, for it is too late to guess at what is near them.
const BACKLOG: usize = 64;
/// Words of a script that are taken for programs.
const MOST_WORDS: usize = 32;
/// Where programs are looked for that are named without a directory, unless the image says.
const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What is read before and at the start of nearly every program: by runtimes that look for the user, and by libc.
const ALWAYS: [&[u8]; 4] = [b"/etc/passwd", b"/etc/group", b"/etc/ld.so.cache", b"/etc/nsswitch.conf"];

/// What will be run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Command {
    /// The program and its arguments.
    pub words: Vec<Vec<u8>>,
    /// Directories to look for it in, with `:` between them; empty for what is usual.
    pub path: Vec<u8>,
    /// A relative program begins there; empty for `/`.
    pub directory: Vec<u8>,
}

impl From<&ProcessConfig> for Command {
    /// What a container of the image runs, unless it is told otherwise.
    fn from(config: &ProcessConfig) -> Self {
        let words = config.entrypoint.iter().chain(&config.cmd).map(|word| word.clone().into_bytes()).collect();
        let path = config.env.iter().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or_default();
        Self { words, path: path.into(), directory: config.working_dir.clone().into_bytes() }
    }
}

/// A place that somebody waited for: the number of the layer and the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wait {
    layer: usize,
    node: NodeId,
}

/// Tells those who guess of waits in one layer.
#[derive(Clone, Debug)]
pub(crate) struct Watcher {
    layer: usize,
    to: mpsc::Sender<Wait>,
}

impl Watcher {
    /// Somebody waits for a file. Says whether there still is anyone to tell.
    pub(crate) fn tell(&self, node: NodeId) -> bool {
        let wait = Wait { layer: self.layer, node };
        !matches!(self.to.try_send(wait), Err(mpsc::error::TrySendError::Closed(_)))
    }
}

/// Guesses what a start will read, and fetches it: what `command` needs, and what stands near what is waited for. `layers`
/// are all of an image's, the lowest first. Ends when the start seems to be over, or the layers are gone. Spawn it.
pub async fn foresee(layers: Vec<Arc<LazyLayer>>, command: Command) {
    let is_marked = |layer: &Arc<LazyLayer>| matches!(layer.index().prefetch(), Prefetch::Until(_));
    if layers.iter().any(is_marked) || layers.iter().all(|layer| layer.is_whole()) {
        return;
    }
    let (to, mut waits) = mpsc::channel(BACKLOG);
    for (number, layer) in layers.iter().enumerate() {
        layer.watch(Watcher { layer: number, to: to.clone() });
    }
    drop(to);
    let tree = Tree::merged(&layers.iter().map(|layer| layer.index()).collect::<Vec<_>>());
    let neighbours = layers.iter().map(|layer| Neighbours::of(layer.index())).collect();
    let layers = layers.iter().map(Arc::downgrade).collect();
    let path = if command.path.is_empty() { PATH.to_vec() } else { command.path.clone() };
    let mut foresight = Foresight {
        tree: Arc::new(tree),
        layers,
        neighbours,
        path,
        seen: HashSet::new(),
        looking: FuturesUnordered::new(),
        rest: VecDeque::new(),
        fetching: FuturesUnordered::new(),
        fetched_bytes: 0,
    };
    foresight.start_of(&command);
    foresight.run(&mut waits).await;
}

/// What looking into a file led to.
struct Looked {
    /// Where it was found, for what is named relative to it.
    names: Vec<Vec<u8>>,
    /// What else of the file is worth having.
    rest: Option<Part>,
}

/// Parts of a layer that are fetched together.
type Part = (Weak<LazyLayer>, Vec<DataRange>);

struct Foresight {
    tree: Arc<Tree>,
    layers: Vec<Weak<LazyLayer>>,
    neighbours: Vec<Neighbours>,
    seen: HashSet<InodeId>,
    path: Vec<u8>,
    looking: FuturesUnordered<BoxFuture<'static, Looked>>,
    /// What is to be fetched next, in this order.
    rest: VecDeque<Part>,
    fetching: FuturesUnordered<BoxFuture<'static, ()>>,
    fetched_bytes: u64,
}

/// Ranges that are fetched at once: the next one's round trip passes while one comes.
const SIDE_BY_SIDE: usize = 2;

impl Foresight {
    fn start_of(&mut self, command: &Command) {
        for path in ALWAYS {
            self.whole(path);
        }
        let directory = [b"/", &command.directory[..], b"/"].concat();
        if let Some((program, arguments)) = command.words.split_first() {
            if program.contains(&b'/') {
                self.look_at(&[&directory_of(program, &directory)[..], program].concat());
            } else {
                self.look_for(program);
            }
            // `sh -c "exec server"`, `python app.py`.
            for argument in arguments {
                for word in words(argument).take(MOST_WORDS) {
                    self.argument(word, &directory);
                }
            }
        }
    }

    /// Something that may be a program's name, or a file's.
    fn argument(&mut self, word: &[u8], directory: &[u8]) {
        if word.contains(&b'/') || word.contains(&b'.') {
            self.look_at(&[&directory_of(word, directory)[..], word].concat());
        } else {
            self.look_for(word);
        }
    }

    /// A program that is named without a directory.
    fn look_for(&mut self, name: &[u8]) {
        let path = self.path.clone();
        let place = path.split(|&byte| byte == b':').map(|directory| [directory, b"/", name].concat());
        if let Some(path) = place.into_iter().find(|path| self.tree.resolve(path).is_ok()) {
            self.look_at(&path);
        }
    }

    fn look_at(&mut self, path: &[u8]) {
        if let Ok(inode) = self.tree.resolve(path) {
            self.look_into(inode, path);
        }
    }

    /// Looks into a file that will be run, and for what it names.
    fn look_into(&mut self, inode: InodeId, path: &[u8]) {
        if self.seen.len() >= MOST_FILES || !self.seen.insert(inode) {
            return;
        }
        let Some(InodeKind::Regular { layer, size, data, .. }) = self.tree.inode(inode).map(|inode| inode.kind.clone())
        else {
            return;
        };
        let Some(layer) = self.layers.get(layer.0 as usize).and_then(Weak::upgrade) else { return };
        let file = Looking { layer, data, size, path: path.to_vec(), tree: Arc::clone(&self.tree) };
        self.looking.push(Box::pin(file.look(self.path.clone())));
    }

    /// Fetches all of a file.
    fn whole(&mut self, path: &[u8]) {
        if let Ok(inode) = self.tree.resolve(path)
            && let Some(InodeKind::Regular { layer, size, data, .. }) = self.tree.inode(inode).map(|inode| &inode.kind)
            && let Some(layer) = self.layers.get(layer.0 as usize)
        {
            self.rest.push_back((layer.clone(), vec![*data..DataOffset(data.0.saturating_add(*size))]));
        }
    }

    async fn run(&mut self, waits: &mut mpsc::Receiver<Wait>) {
        loop {
            self.fetch_next();
            let over = tokio::time::sleep(OVER);
            tokio::select! {
                Some(looked) = self.looking.next() => {
                    for path in looked.names {
                        self.look_at(&path);
                    }
                    self.rest.extend(looked.rest);
                }
                Some(()) = self.fetching.next() => {}
                wait = waits.recv() => match wait {
                    Some(wait) => self.waited(wait),
                    // The layers are gone.
                    None => return,
                },
                () = over => return,
            }
        }
    }

    fn fetch_next(&mut self) {
        while self.fetching.len() < SIDE_BY_SIDE {
            let Some((layer, ranges)) = self.rest.pop_front() else { return };
            let Some(layer) = layer.upgrade() else { continue };
            let bytes = ranges.iter().map(|range| missing_bytes(&layer, range)).fold(0, u64::saturating_add);
            if bytes == 0 || bytes > MOST_FILE_BYTES || self.fetched_bytes.saturating_add(bytes) > MOST_BYTES {
                continue;
            }
            self.fetched_bytes += bytes;
            self.fetching.push(Box::pin(async move {
                if let Err(error) = layer.prefetched(&ranges).await {
                    tracing::debug!(%error, "what was guessed could not be had");
                }
            }));
        }
    }

    /// Somebody waits for a file.
    fn waited(&mut self, wait: Wait) {
        let Some(layer) = self.layers.get(wait.layer).and_then(Weak::upgrade) else { return };
        let index = layer.index();
        let link = layer.link().map_or(64 << 10, trip_bytes).clamp(32 << 10, 1 << 20);
        let Some(neighbours) = self.neighbours.get_mut(wait.layer) else { return };
        let weak = Arc::downgrade(&layer);
        let guessed = neighbours.waited(index, wait.node, link, &*layer).into_iter();
        let ranges: Vec<DataRange> = guessed.filter_map(|node| data_of(index, node)).collect();
        if !ranges.is_empty() {
            // What is near what somebody waits for right now goes before what was guessed earlier.
            self.rest.push_front((weak, ranges));
        }
        let path = neighbours.path(index, wait.node);
        if is_library(&path)
            && let Some(inode) = self.tree.lookup(&path)
        {
            self.look_into(inode, &path);
        }
    }
}

/// What a program loads while it runs has a name like this.
fn is_library(path: &[u8]) -> bool {
    path.windows(3).any(|part| part == b".so")
}

fn data_of(index: &LayerIndex, node: NodeId) -> Option<DataRange> {
    match &index.node(node).kind {
        NodeKind::Regular(content) if content.size > 0 => {
            Some(content.data..DataOffset(content.data.0.saturating_add(content.size)))
        }
        _ => None,
    }
}

fn missing_bytes(layer: &LazyLayer, range: &DataRange) -> u64 {
    let frames = layer.missing_frames(layer.index().extents_in(range)).into_iter();
    frames.map(|frame| fetched_range(&layer.index().frames()[frame.0 as usize]).length).fold(0, u64::saturating_add)
}

impl Guessable for LazyLayer {
    fn missing_bytes(&self, node: NodeId) -> Option<u64> {
        let range = data_of(self.index(), node)?;
        Some(missing_bytes(self, &range)).filter(|&bytes| bytes > 0)
    }
}

/// Returns the directory that a path begins in: none where it is absolute.
fn directory_of(path: &[u8], directory: &[u8]) -> Vec<u8> {
    if path.starts_with(b"/") { Vec::new() } else { directory.to_vec() }
}

/// Words of a line of shell, roughly.
fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let is_between = |byte: &u8| byte.is_ascii_whitespace() || b";|&()<>'\"`$={}".contains(byte);
    text.split(is_between).filter(|word| !word.is_empty() && !word.starts_with(b"-") && word.len() < 256)
}

/// A file that is looked into.
struct Looking {
    layer: Arc<LazyLayer>,
    data: DataOffset,
    size: u64,
    path: Vec<u8>,
    tree: Arc<Tree>,
}

impl Looking {
    async fn look(self, path: Vec<u8>) -> Looked {
        let mut looked = Looked { names: Vec::new(), rest: None };
        let Some(start) = self.read(0, START_BYTES as u64).await else { return looked };
        match program::recognise(&start) {
            Some(Program::Script { interpreter, argument }) => {
                looked.names.push(interpreter);
                let named = argument.as_deref().map(words).into_iter().flatten();
                let body = words(start.splitn(2, |&byte| byte == b'\n').nth(1).unwrap_or_default());
                for word in named.chain(body).take(10 * MOST_WORDS) {
                    looked.names.extend(self.found(word, &path));
                }
                looked.names.truncate(MOST_WORDS);
            }
            Some(Program::Elf(elf)) => {
                looked.names = self.named(&elf).await;
                if elf.code_bytes > self.size / DATA_PART {
                    looked.rest = Some(self.part());
                }
            }
            // Text that an interpreter reads, or data.
            None if self.size <= MOST_FILE_BYTES => looked.rest = Some(self.part()),
            None => {}
        }
        looked
    }

    /// A word of a script that is a program's name, or a path.
    fn found(&self, word: &[u8], path: &[u8]) -> Option<Vec<u8>> {
        if word.contains(&b'/') {
            return word.starts_with(b"/").then(|| word.to_vec());
        }
        let place = path.split(|&byte| byte == b':').map(|directory| [directory, b"/", word].concat());
        place.into_iter().find(|path| self.tree.resolve(path).is_ok())
    }

    async fn named(&self, elf: &Elf) -> Vec<Vec<u8>> {
        let mut names = Vec::new();
        if let Some(range) = &elf.interpreter
            && let Some(bytes) = self.read(range.start, range.end - range.start).await
        {
            names.extend(program::name(&bytes).map(<[u8]>::to_vec));
        }
        let Some(dynamic) = &elf.dynamic else { return names };
        let length = (dynamic.end - dynamic.start).min(DYNAMIC_BYTES);
        let Some(dynamic) = self.read(dynamic.start, length).await else { return names };
        let named = elf.named(&dynamic);
        let own = self.directory().to_vec();
        let mut directories: Vec<Vec<u8>> = Vec::new();
        if let Some(at) = named.search
            && let Some(search) = self.name(at).await
        {
            directories.extend(search.split(|&byte| byte == b':').map(|directory| with_origin(directory, &own)));
        }
        for root in [&b"/lib/"[..], b"/usr/lib/", b"/usr/local/lib/"] {
            directories.extend(elf.triplet().map(|triplet| [root, triplet.as_bytes()].concat()));
        }
        directories
            .extend([&b"/lib64"[..], b"/usr/lib64", b"/lib", b"/usr/lib", b"/usr/local/lib"].map(<[u8]>::to_vec));
        for at in named.libraries {
            let Some(library) = self.name(at).await else { continue };
            let mut places = directories.iter().map(|directory| [&directory[..], b"/", &library].concat());
            names.extend(places.find(|path| self.tree.resolve(path).is_ok()));
        }
        names
    }

    fn directory(&self) -> &[u8] {
        &self.path[..self.path.iter().rposition(|&byte| byte == b'/').unwrap_or(0)]
    }

    async fn name(&self, at: u64) -> Option<Vec<u8>> {
        program::name(&self.read(at, NAME_BYTES).await?).map(<[u8]>::to_vec)
    }

    fn part(&self) -> Part {
        (Arc::downgrade(&self.layer), vec![self.range(0, self.size)])
    }

    fn range(&self, at: u64, length: u64) -> DataRange {
        let (start, end) = (at.min(self.size), at.saturating_add(length).min(self.size));
        let place = |offset: u64| DataOffset(self.data.0.saturating_add(offset));
        place(start)..place(end)
    }

    /// Reads a piece of the file, as much of it as there is; `None` where it can't be had, or is empty.
    async fn read(&self, at: u64, length: u64) -> Option<Vec<u8>> {
        let range = self.range(at, length);
        let mut bytes = vec![0; usize::try_from(range.end.0 - range.start.0).ok()?];
        if bytes.is_empty() {
            return None;
        }
        self.layer.prefetched(std::slice::from_ref(&range)).await.ok()?;
        if !self.layer.is_filled(&range) {
            return None;
        }
        let count = self.layer.read_filled(range.start, &mut bytes).ok()?;
        bytes.truncate(count);
        Some(bytes)
    }
}

/// Puts the directory of the file that names it in the place of `$ORIGIN`.
fn with_origin(directory: &[u8], own: &[u8]) -> Vec<u8> {
    for origin in [&b"$ORIGIN"[..], b"${ORIGIN}"] {
        if let Some(rest) = directory.strip_prefix(origin) {
            return [own, rest].concat();
        }
    }
    directory.to_vec()
}
