//! What is measured from inside: how long a mount takes, what a mount costs in memory, what an event costs.
//!
//! Each is measured in a process of its own, which knows nothing but the image's name and an empty folder.

use std::{
    fs::{self, File},
    num::NonZeroU64,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use loris_format::limits::Limits;
use loris_lazy::{FetchPolicy, LazyLayer, OpenOptions, Store, Trust, open::open_all_layers};
use loris_mount::{
    engine::{self, Engine},
    erofs::{ErofsMount, ErofsOptions, Form, cached_bootstrap},
    keeper,
    pager::{OnDeath, Pager, PagerOptions},
    rootfs::{Access, Paging, RootFs, RootFsOptions},
};
use loris_oci::platform;
use rustix::{
    fs::{Advice, fadvise},
    time::{ClockId, clock_gettime},
};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::work::{Chance, Files, PAGE, drop_caches};
use crate::{
    Global,
    engine::EngineArgument,
    failure::{self, Outcome},
    measure::median,
};

/// Mounts of one layer each, whose memory is looked at.
const MOUNTS: usize = 100;
/// Reads whose events are measured.
const READS: usize = 1_000;

/// One measurement of `bench mount`, in its process.
#[derive(Args)]
pub(in crate::bench) struct WithinArguments {
    what: What,
    image: String,
    /// An empty folder
    folder: PathBuf,
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum What {
    Times,
    Memory,
    Event,
}

impl What {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Times => "times",
            Self::Memory => "memory",
            Self::Event => "event",
        }
    }
}

/// Medians of one engine, in seconds.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Times {
    pub engine: String,
    /// The first mount of layers that are open: the bootstrap is written. The pager is there.
    pub first: f64,
    /// The same, as processor time of this process.
    pub first_cpu: f64,
    /// A mount of an image whose bootstrap is there. The pager is there.
    pub known: f64,
    /// The same, as processor time of this process.
    pub known_cpu: f64,
    /// The same with overlayfs over it, and a pager and a keeper of its own.
    pub known_whole: f64,
    /// EROFS alone: made and attached.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub erofs: Option<f64>,
}

/// Proportional set sizes, in bytes.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Memory {
    /// Layers that were mounted, one by one.
    pub layers: usize,
    /// Names in all of them.
    pub names: usize,
    /// A process that serves nothing, and its keeper.
    pub daemon_before: u64,
    pub keeper_before: u64,
    /// When all layers are open: the indexes are in memory.
    pub daemon_opened: u64,
    /// When each is mounted once.
    pub daemon: u64,
    pub keeper: u64,
    /// When each is mounted twice.
    pub daemon_twice: u64,
    pub keeper_twice: u64,
}

/// Medians over reads of 4 KiB, in seconds.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Event {
    /// From the disk: of a layer that is complete, and of one that is filled here but marked.
    pub disk_unmarked: f64,
    pub disk_marked: f64,
    /// The same where the data file is in the page cache, and EROFS has forgotten its pages.
    pub cached_unmarked: f64,
    pub cached_marked: f64,
}

impl WithinArguments {
    pub(in crate::bench) async fn run(self, global: &Global) -> failure::Result {
        let text = match self.what {
            What::Times => serde_json::to_string(&self.times(global).await?)?,
            What::Memory => serde_json::to_string(&self.memory(global).await?)?,
            What::Event => serde_json::to_string(&self.event(global).await?)?,
        };
        println!("{text}");
        Ok(Outcome::Done)
    }

    async fn open(&self, global: &Global, cache: &str) -> Result<(Store, Vec<Arc<LazyLayer>>)> {
        let store = Store::open(&self.folder.join(cache))?;
        let source = global.access.source(&self.image).await?;
        let options = OpenOptions { trust: Trust::Anything, policy: FetchPolicy::EXACT, ..OpenOptions::default() };
        let (_, manifest) = platform::resolve_manifest(&*source, None, &Limits::default()).await?;
        let layers = open_all_layers(source, &manifest, &store, &options, &[]).await?;
        Ok((store, layers))
    }

    fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    fn pager_options(&self) -> PagerOptions {
        let engine = EngineArgument { engine: None, read_timeout: 60 };
        let register = self.folder.join("register");
        PagerOptions { register, ..engine.pager_options(OnDeath::Clean(vec!["true".into()]), None) }
    }

    async fn times(&self, global: &Global) -> Result<Vec<Times>> {
        let mountpoint = self.directory("mountpoint")?;
        let probing = self.directory("probing")?;
        let engines = engine::probe(&probing).usable();
        let runtime = Handle::current();
        let pager = match engines.contains(&Engine::Fanotify) {
            true => Paging::Shared(Arc::new(Pager::start(&self.pager_options(), &runtime)?)),
            false => Paging::None,
        };
        let mut rows: Vec<(Engine, [Vec<f64>; 6])> =
            engines.iter().map(|&engine| (engine, Default::default())).collect();
        for round in 0..self.rounds {
            for (engine, [first, first_cpu, known, known_cpu, whole, erofs]) in &mut rows {
                let (store, layers) = self.open(global, &format!("times.{engine}.{round}")).await?;
                // What is found out about a store once, is not what is measured.
                let _ = engine::probe(store.root());
                let read_only = RootFsOptions {
                    mountpoint: Some(mountpoint.clone()),
                    engine: Some(*engine),
                    pager: pager.clone(),
                    scratch: self.folder.clone(),
                    ..RootFsOptions::read_only(&store)
                };
                let own = match engine {
                    Engine::Fanotify => Paging::Own(self.pager_options()),
                    _ => Paging::None,
                };
                let read_write = RootFsOptions { access: Access::Discard, pager: own, ..read_only.clone() };
                let mount = |options: &RootFsOptions| -> Result<(f64, f64)> {
                    tokio::task::block_in_place(|| {
                        let (start, cpu) = (Instant::now(), processor_seconds());
                        let root = RootFs::assemble(&layers, options, &runtime)?;
                        let took = (start.elapsed().as_secs_f64(), processor_seconds() - cpu);
                        root.unmount()?;
                        Ok(took)
                    })
                };
                let took = mount(&read_only)?;
                first.push(took.0);
                first_cpu.push(took.1);
                for _ in 0..3 {
                    let took = mount(&read_only)?;
                    known.push(took.0);
                    known_cpu.push(took.1);
                    whole.push(mount(&read_write)?.0);
                    if *engine != Engine::Fuse {
                        erofs.push(bare(&store, &layers, &mountpoint)?);
                    }
                }
            }
        }
        let row = |(engine, [first, first_cpu, known, known_cpu, whole, erofs]): (Engine, [Vec<f64>; 6])| Times {
            engine: engine.to_string(),
            first: median(first),
            first_cpu: median(first_cpu),
            known: median(known),
            known_cpu: median(known_cpu),
            known_whole: median(whole),
            erofs: (!erofs.is_empty()).then(|| median(erofs)),
        };
        Ok(rows.into_iter().map(row).collect())
    }

    async fn memory(&self, global: &Global) -> Result<Memory> {
        let runtime = Handle::current();
        let pager = Arc::new(Pager::start(&self.pager_options(), &runtime)?);
        let keeper = keeper_of_this_process()?;
        let (daemon_before, keeper_before) = (resident("self")?, resident(&keeper)?);
        let (store, mut layers) = self.open(global, "memory").await?;
        layers.truncate(MOUNTS);
        let daemon_opened = resident("self")?;
        let mut roots = Vec::new();
        let mut mount_all = |turn: usize| -> Result<(u64, u64)> {
            for (number, layer) in layers.iter().enumerate() {
                let options = RootFsOptions {
                    mountpoint: Some(self.directory(&format!("mount.{turn}.{number}"))?),
                    engine: Some(Engine::Fanotify),
                    pager: Paging::Shared(Arc::clone(&pager)),
                    ..RootFsOptions::read_only(&store)
                };
                let mount = || RootFs::assemble(std::slice::from_ref(layer), &options, &runtime);
                roots.push(tokio::task::block_in_place(mount)?);
            }
            Ok((resident("self")?, resident(&keeper)?))
        };
        let (daemon, keeper_once) = mount_all(0)?;
        let (daemon_twice, keeper_twice) = mount_all(1)?;
        drop(roots);
        Ok(Memory {
            layers: layers.len(),
            names: layers.iter().map(|layer| layer.index().nodes().len()).sum(),
            daemon_before,
            keeper_before,
            daemon_opened,
            daemon,
            keeper: keeper_once,
            daemon_twice,
            keeper_twice,
        })
    }

    async fn event(&self, global: &Global) -> Result<Event> {
        let runtime = Handle::current();
        let pager = Paging::Shared(Arc::new(Pager::start(&self.pager_options(), &runtime)?));
        let mut scenes = Vec::new();
        for name in ["unmarked", "marked"] {
            let (store, layers) = self.open(global, name).await?;
            let options = RootFsOptions {
                mountpoint: Some(self.directory(&format!("{name}.root"))?),
                engine: Some(Engine::Fanotify),
                pager: pager.clone(),
                ..RootFsOptions::read_only(&store)
            };
            if name == "unmarked" {
                for layer in &layers {
                    loris_lazy::complete(layer).await?;
                }
            }
            let root = tokio::task::block_in_place(|| RootFs::assemble(&layers, &options, &runtime))?;
            scenes.push((root, layers));
        }
        tokio::task::block_in_place(|| {
            let files = Files::of(scenes[0].0.path())?;
            let (path, size) = files.largest()?;
            // Nothing else of the layer is filled, so that it stays marked.
            for (root, _) in &scenes {
                fs::read(root.path().join(path))?;
            }
            ensure!(scenes[0].1.iter().all(|layer| layer.is_complete()), "a layer is not complete");
            ensure!(!scenes[1].1.iter().any(|layer| layer.is_complete()), "a layer is complete with its largest file");
            let open = |number: usize| File::open(scenes[number].0.path().join(path));
            let (unmarked, marked) = (open(0)?, open(1)?);
            for file in [&unmarked, &marked] {
                fadvise(file, 0, None, Advice::Random)?;
            }
            drop_caches()?;
            let (disk_unmarked, disk_marked) = page_reads(&unmarked, &marked, size)?;
            for file in [&unmarked, &marked] {
                // Through EROFS, so that only filled content of the data file is read.
                let mut whole = vec![0; 1 << 20];
                let mut at = 0;
                while let read @ 1.. = file.read_at(&mut whole, at)? {
                    at += read as u64;
                }
                fadvise(file, 0, NonZeroU64::new(size), Advice::DontNeed)?;
            }
            let (cached_unmarked, cached_marked) = page_reads(&unmarked, &marked, size)?;
            Ok(Event { disk_unmarked, disk_marked, cached_unmarked, cached_marked })
        })
    }
}

/// Mounts EROFS and nothing else: no pager knows of it, and nobody reads it.
fn bare(store: &Store, layers: &[Arc<LazyLayer>], mountpoint: &Path) -> Result<f64> {
    let bootstrap = cached_bootstrap(store, layers, Form::Merged)?;
    let device = |layer: &Arc<LazyLayer>| PathBuf::from(format!("/proc/self/fd/{}", layer.data_file().as_raw_fd()));
    let devices: Vec<PathBuf> = layers.iter().map(device).collect();
    let start = Instant::now();
    let mount = ErofsMount::mount(&bootstrap, &devices, mountpoint, &ErofsOptions::default())?;
    let took = start.elapsed().as_secs_f64();
    mount.unmount()?;
    Ok(took)
}

/// Reads each of some pages once from two files of one size, in turn; returns the medians.
fn page_reads(one: &File, other: &File, size: u64) -> Result<(f64, f64)> {
    let pages = size / PAGE as u64;
    let mut chance = Chance::new();
    // Apart from each other, so that no read finds what an earlier one has brought.
    let stride = (pages / READS as u64).max(1);
    let mut order: Vec<u64> = (0..pages / stride).collect();
    for last in (1..order.len()).rev() {
        order.swap(last, usize::try_from(chance.below(last as u64 + 1)).unwrap_or_default());
    }
    let mut took = [Vec::new(), Vec::new()];
    let mut buffer = [0; PAGE];
    for (turn, page) in order.into_iter().enumerate() {
        let both = [(0, one), (1, other)];
        for (number, file) in if turn % 2 == 0 { both } else { [both[1], both[0]] } {
            let start = Instant::now();
            file.read_exact_at(&mut buffer, page * stride * PAGE as u64)?;
            took[number].push(start.elapsed().as_secs_f64());
        }
    }
    let [one, other] = took;
    Ok((median(one), median(other)))
}

fn processor_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Returns the proportional set size of a process, in bytes.
pub(super) fn resident(process: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    let line = text.lines().find(|line| line.starts_with("Pss:")).context("no Pss in smaps_rollup")?;
    let kibibytes: u64 = line.split_whitespace().nth(1).context("no figure in smaps_rollup")?.parse()?;
    Ok(kibibytes << 10)
}

/// Finds the keeper among the children of this process.
fn keeper_of_this_process() -> Result<String> {
    let ourselves = std::process::id().to_string();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        // Processes end while they are looked at.
        let Ok(stat) = fs::read_to_string(format!("/proc/{name}/stat")) else { continue };
        let Ok(words) = fs::read_to_string(format!("/proc/{name}/cmdline")) else { continue };
        // proc_pid_stat(5): behind the name in brackets, the state and the parent.
        let parent = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_whitespace().nth(1));
        if parent == Some(&ourselves) && words.split('\0').any(|word| word == keeper::VERB) {
            return Ok(name);
        }
    }
    anyhow::bail!("the keeper is not among the children of this process")
}
