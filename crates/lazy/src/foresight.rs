//! What a workload will read that nobody has recorded: guessed from what its files say.
//!
//! A command names a program, that an interpreter and libraries, those more libraries: long before the dynamic loader comes
//! to them one after the other, they can be on their way, and while the container is still being made, the link is idle.
//! The same goes for a library that a program loads later, and for files beside those that were waited for
//! (module `neighbours`). A guess decides what is early and nothing else: reads on demand overtake it, and
//! what is guessed in vain is bounded.
//!
//! Images whose writers marked what a start needs are left alone: they know better.

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
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
use tokio::{
    sync::{Semaphore, mpsc},
    time::Instant,
};

use crate::{
    layer::LazyLayer,
    neighbours::{Guessable, Neighbours},
    plan::{fetched_range, trip_bytes},
    schedule::Urgency,
};

/// Most compressed bytes that are fetched for one command, and of one of its files.
const MOST_BYTES: u64 = 64 << 20;
const MOST_FILE_BYTES: u64 = 32 << 20;
/// Files that are looked into for one image, and of them at the same time.
const MOST_FILES: usize = 512;
const LOOKED_INTO_AT_ONCE: usize = 32;
/// Paths that are looked up for one image.
const MOST_LOOKUPS: u32 = 4096;
/// Larger trees are left alone: putting one together for a guess would cost more than the guess is worth.
const MOST_NODES: usize = 300_000;
/// Images whose trees are put together at the same time.
static TREES: Semaphore = Semaphore::const_new(2);
/// Libraries that hold data and no code to speak of are read here and there only: less than 1 / so much of it.
const DATA_PART: u64 = 64;
/// A start is over when nobody has waited for anything for so long; then nothing is guessed any more.
const OVER: Duration = Duration::from_secs(30);
/// And after so long in any case.
const LONGEST: Duration = Duration::from_secs(120);
/// Waits that have not been looked at yet; more of them are not, for it is too late to guess at what is near them.
const BACKLOG: usize = 64;
/// Words of a command or a script that are taken for programs.
const MOST_WORDS: usize = 64;
/// Of a list of directories, as much is looked at.
const PATH_BYTES: usize = 4096;
const PATH_DIRECTORIES: usize = 32;
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
    let weak: Vec<_> = layers.iter().map(Arc::downgrade).collect();
    let Ok(place) = TREES.acquire().await else { return };
    // For those who can be many, or long, not here.
    let begun = tokio::task::spawn_blocking(move || Foresight::begin(&layers, weak, &command)).await;
    drop(place);
    if let Ok(Some(mut foresight)) = begun {
        // Whoever is gone is not to be kept by a guess, nor a guess by who is not.
        let _ = tokio::time::timeout(LONGEST, foresight.run(&mut waits)).await;
    }
}

/// What looking into a file led to.
struct Looked {
    /// Where it was found, for what is named relative to it.
    names: Vec<Vec<u8>>,
    /// What else of the file is worth having.
    rest: Option<Part>,
}

/// Parts of a layer that are fetched together: what the command names as if it were marked, all else behind what is known to
/// be wanted.
struct Part {
    layer: Weak<LazyLayer>,
    ranges: Vec<DataRange>,
    urgency: Urgency,
}

struct Foresight {
    tree: Arc<Tree>,
    layers: Vec<Weak<LazyLayer>>,
    neighbours: Vec<Neighbours>,
    seen: HashSet<InodeId>,
    search: Search,
    /// What is to be looked into next.
    to_look_into: VecDeque<Looking>,
    looking: FuturesUnordered<BoxFuture<'static, Looked>>,
    /// What is to be fetched next, in this order.
    rest: VecDeque<Part>,
    fetching: FuturesUnordered<BoxFuture<'static, ()>>,
    last_wait: Option<Instant>,
}

/// Where programs are looked for, and how much may still be spent on that and on what is found.
#[derive(Clone)]
struct Search {
    tree: Arc<Tree>,
    path: Arc<[u8]>,
    lookups: Arc<AtomicU32>,
    bytes: Arc<AtomicU64>,
}

impl Search {
    /// Returns what a path leads to, for as long as there may be lookups.
    fn resolve(&self, path: &[u8]) -> Option<InodeId> {
        let take = |left: u32| left.checked_sub(1);
        self.lookups.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?;
        self.tree.resolve(path).ok()
    }

    /// Returns the path of a program that is named without a directory.
    fn find(&self, name: &[u8]) -> Option<Vec<u8>> {
        directories(&self.path)
            .map(|directory| [directory, b"/", name].concat())
            .find(|path| self.resolve(path).is_some())
    }

    /// Takes bytes from what may be fetched; says whether there were so many.
    fn take(&self, bytes: u64) -> bool {
        let take = |left: u64| left.checked_sub(bytes);
        self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

/// Takes a list of directories with `:` between them apart.
fn directories(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path[..path.len().min(PATH_BYTES)].split(|&byte| byte == b':').take(PATH_DIRECTORIES)
}

/// What a round trip carries where nothing is known of the link, and at most.
const UNKNOWN_TRIP_BYTES: u64 = 64 << 10;
const MOST_TRIP_BYTES: u64 = 1 << 20;
/// Ranges that are fetched at once: the next one's round trip passes while one comes.
const SIDE_BY_SIDE: usize = 2;

impl Foresight {
    /// Looks at what the command names. `None` for what is too large to guess at.
    fn begin(layers: &[Arc<LazyLayer>], weak: Vec<Weak<LazyLayer>>, command: &Command) -> Option<Self> {
        let nodes = layers.iter().map(|layer| layer.index().nodes().len()).fold(0, usize::saturating_add);
        if nodes > MOST_NODES {
            return None;
        }
        let tree = Arc::new(Tree::merged(&layers.iter().map(|layer| layer.index()).collect::<Vec<_>>()));
        let path = if command.path.is_empty() { PATH } else { &command.path };
        let search = Search {
            tree: Arc::clone(&tree),
            path: path[..path.len().min(PATH_BYTES)].into(),
            lookups: Arc::new(AtomicU32::new(MOST_LOOKUPS)),
            bytes: Arc::new(AtomicU64::new(MOST_BYTES)),
        };
        let mut foresight = Self {
            tree,
            layers: weak,
            neighbours: layers.iter().map(|layer| Neighbours::of(layer.index())).collect(),
            seen: HashSet::new(),
            search,
            to_look_into: VecDeque::new(),
            looking: FuturesUnordered::new(),
            rest: VecDeque::new(),
            fetching: FuturesUnordered::new(),
            last_wait: None,
        };
        foresight.start_of(command);
        Some(foresight)
    }

    fn start_of(&mut self, command: &Command) {
        for path in ALWAYS {
            self.whole(path);
        }
        let directory = [b"/", &command.directory[..command.directory.len().min(PATH_BYTES)], b"/"].concat();
        let Some((program, arguments)) = command.words.split_first() else { return };
        if program.contains(&b'/') {
            self.look_at(&[&directory_of(program, &directory)[..], program].concat());
        } else if let Some(path) = self.search.find(program) {
            self.look_at(&path);
        }
        // `sh -c "exec server"`, `python app.py`.
        let in_arguments = arguments.iter().take(MOST_WORDS).flat_map(|argument| words(argument));
        for word in in_arguments.take(MOST_WORDS) {
            self.argument(word, &directory);
        }
    }

    /// Something that may be a program's name, or a file's.
    fn argument(&mut self, word: &[u8], directory: &[u8]) {
        if word.contains(&b'/') || word.contains(&b'.') {
            self.look_at(&[&directory_of(word, directory)[..], word].concat());
        } else if let Some(path) = self.search.find(word) {
            self.look_at(&path);
        }
    }

    fn look_at(&mut self, path: &[u8]) {
        if let Some(inode) = self.search.resolve(path) {
            self.look_into(inode, path);
        }
    }

    /// Looks into a file that will be run, and for what it names.
    fn look_into(&mut self, inode: InodeId, path: &[u8]) {
        if self.seen.len() >= MOST_FILES || !self.seen.insert(inode) {
            return;
        }
        if let Some(InodeKind::Regular { layer, size, data, .. }) = self.tree.inode(inode).map(|inode| &inode.kind)
            && let Some(layer) = self.layers.get(layer.0 as usize)
        {
            let (layer, search) = (layer.clone(), self.search.clone());
            self.to_look_into.push_back(Looking { layer, data: *data, size: *size, path: path.to_vec(), search });
        }
    }

    /// Fetches all of a file.
    fn whole(&mut self, path: &[u8]) {
        if let Some(inode) = self.search.resolve(path)
            && let Some(InodeKind::Regular { layer, size, data, .. }) = self.tree.inode(inode).map(|inode| &inode.kind)
            && let Some(layer) = self.layers.get(layer.0 as usize)
        {
            let ranges = vec![*data..DataOffset(data.0.saturating_add(*size))];
            self.rest.push_back(Part { layer: layer.clone(), ranges, urgency: Urgency::Prefetch });
        }
    }

    async fn run(&mut self, waits: &mut mpsc::Receiver<Wait>) {
        while self.layers.iter().all(|layer| layer.strong_count() > 0) {
            self.look_next();
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

    fn look_next(&mut self) {
        while self.looking.len() < LOOKED_INTO_AT_ONCE {
            let Some(next) = self.to_look_into.pop_front() else { return };
            self.looking.push(Box::pin(next.look()));
        }
    }

    fn fetch_next(&mut self) {
        while self.fetching.len() < SIDE_BY_SIDE {
            let Some(Part { layer, ranges, urgency }) = self.rest.pop_front() else { return };
            let Some(layer) = layer.upgrade() else { continue };
            let bytes = ranges.iter().map(|range| missing_bytes(&layer, range)).fold(0, u64::saturating_add);
            if bytes == 0 || bytes > MOST_FILE_BYTES || !self.search.take(bytes) {
                continue;
            }
            self.fetching.push(Box::pin(async move {
                if let Err(error) = layer.prefetched(&ranges, urgency).await {
                    tracing::debug!(%error, "what was guessed could not be had");
                }
            }));
        }
    }

    /// Somebody waits for a file.
    fn waited(&mut self, wait: Wait) {
        let Some(layer) = self.layers.get(wait.layer).and_then(Weak::upgrade) else { return };
        let index = layer.index();
        let link = layer.link();
        let trip = link.map_or(UNKNOWN_TRIP_BYTES, trip_bytes).min(MOST_TRIP_BYTES);
        // Those who wait side by side wait for one round trip.
        let since = self.last_wait.replace(Instant::now()).map(|last| last.elapsed());
        if since.zip(link).is_some_and(|(since, link)| since < link.round_trip / 2) {
            return;
        }
        let Some(neighbours) = self.neighbours.get_mut(wait.layer) else { return };
        let weak = Arc::downgrade(&layer);
        let guessed = neighbours.waited(index, wait.node, trip, &*layer).into_iter();
        let ranges: Vec<DataRange> = guessed.filter_map(|node| data_of(index, node)).collect();
        if !ranges.is_empty() {
            // What is near what somebody waits for right now goes before what was guessed earlier.
            self.rest.push_front(Part { layer: weak, ranges, urgency: Urgency::Guess });
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
    layer: Weak<LazyLayer>,
    data: DataOffset,
    size: u64,
    path: Vec<u8>,
    search: Search,
}

impl Looking {
    async fn look(self) -> Looked {
        let mut looked = Looked { names: Vec::new(), rest: None };
        let Some(start) = self.read(0, START_BYTES as u64).await else { return looked };
        match program::recognise(&start) {
            Some(Program::Script { interpreter, argument }) => {
                looked.names.push(interpreter);
                let named = argument.as_deref().map(words).into_iter().flatten();
                let body = words(start.splitn(2, |&byte| byte == b'\n').nth(1).unwrap_or_default());
                for word in named.chain(body).take(MOST_WORDS) {
                    looked.names.extend(self.found(word));
                }
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
    fn found(&self, word: &[u8]) -> Option<Vec<u8>> {
        match word.contains(&b'/') {
            true => word.starts_with(b"/").then(|| word.to_vec()),
            false => self.search.find(word),
        }
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
            directories.extend(self::directories(&search).map(|directory| with_origin(directory, &own)));
        }
        for root in [&b"/lib/"[..], b"/usr/lib/", b"/usr/local/lib/"] {
            directories.extend(elf.triplet().map(|triplet| [root, triplet.as_bytes()].concat()));
        }
        directories
            .extend([&b"/lib64"[..], b"/usr/lib64", b"/lib", b"/usr/lib", b"/usr/local/lib"].map(<[u8]>::to_vec));
        for at in named.libraries {
            let Some(library) = self.name(at).await else { continue };
            let mut places = directories.iter().map(|directory| [&directory[..], b"/", &library].concat());
            names.extend(places.find(|path| self.search.resolve(path).is_some()));
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
        Part { layer: self.layer.clone(), ranges: vec![self.range(0, self.size)], urgency: Urgency::Prefetch }
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
        let layer = self.layer.upgrade()?;
        if !self.search.take(missing_bytes(&layer, &range)) {
            return None;
        }
        layer.prefetched(std::slice::from_ref(&range), Urgency::Prefetch).await.ok()?;
        if !layer.is_filled(&range) {
            return None;
        }
        let count = layer.read_filled(range.start, &mut bytes).ok()?;
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
