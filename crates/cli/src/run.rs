//! `run`: a container over a lazily mounted image.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use loris_container::{
    embedded,
    runtime::{NOT_STARTED, Runner, Runtime, Streams, forwarded_signals},
    spec::{Container, Network, Volume, Wishes},
};
use loris_lazy::{Command, FetchPolicy, LazyLayer, Recorder, Store};
use loris_mount::rootfs::{self, RootFs, RootFsOptions};
use loris_oci::document::ProcessConfig;

use crate::{
    Global,
    access::OnePlatform,
    activity,
    engine::EngineArgument,
    failure::{self, Outcome, Usage},
    opened::{FetchAhead, Looked, OpenLazily, Opened},
    progress::Bars,
    signals::{self, Ignored},
};

mod full;

/// The hidden verb under which the embedded runtime is this program again.
pub(crate) const RUNTIME_VERB: &str = "oci-runtime";

/// Run a container over a lazily mounted image.
///
/// The exit status is the container's; 125 where it could not be started, 126 and 127 where its program could not.
#[derive(Args)]
pub(crate) struct RunArguments {
    /// The image
    image: String,
    /// The program and its arguments, instead of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
    /// Remove the container when it ends: what is done anyway
    #[arg(long)]
    rm: bool,
    /// Pass standard input on
    #[arg(long, short)]
    interactive: bool,
    /// Give it a terminal
    #[arg(long, short)]
    tty: bool,
    /// Set an environment variable; a name alone takes the value from here
    #[arg(long, short, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Show a directory or file of this machine in the container
    #[arg(long, short, value_name = "SOURCE:TARGET[:ro|:rw]", value_parser = volume)]
    volume: Vec<Volume>,
    /// The working directory
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<String>,
    /// The user, and perhaps the group
    #[arg(long, short, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// The network
    #[arg(long, visible_alias = "network", value_enum, default_value_t = Net::Host)]
    net: Net,
    /// The program, instead of the image's entry point
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Let the root file system not be written to
    #[arg(long)]
    read_only: bool,
    /// The container's name for itself
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// An installed OCI runtime instead of the embedded one: `crun`, `runc`, or a path
    #[arg(long, value_name = "RUNTIME")]
    runtime: Option<PathBuf>,
    /// Pull and unpack the whole image before the start
    #[arg(long)]
    no_lazy: bool,
    #[command(flatten)]
    engine: EngineArgument,
    #[command(flatten)]
    platform: OnePlatform,
    #[command(flatten)]
    open: OpenLazily,
    #[command(flatten)]
    ahead: FetchAhead,
    /// Write down what is read, as `--prefetch-list` takes it, and how many reads waited
    #[arg(long, hide = true, value_name = "FILE")]
    record: Option<PathBuf>,
}

/// What network a container has.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Net {
    /// This machine's
    Host,
    /// None but its own loopback
    None,
}

/// The embedded OCI runtime's own arguments.
#[derive(Args)]
pub(crate) struct RuntimeArguments {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// What a container's root file system is made of; taken down when it is dropped.
enum Root {
    Lazy(RootFs, Opened, Option<Recording>),
    Full(full::Unpacked),
}

/// What is read, and where it is to be written down.
struct Recording {
    file: PathBuf,
    recorder: Arc<Recorder>,
}

impl RunArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        // Before anything is mounted, so that no signal finds it without its handler.
        let ignored = Ignored::now();
        let signals = forwarded_signals().context("taking signals")?;
        match self.start(global, signals, ignored).await {
            Ok(outcome) => Ok(outcome),
            Err(error) if error.is::<Usage>() || error.is::<failure::Refused>() => Err(error),
            Err(error) => {
                failure::print(&error);
                Ok(Outcome::Container(NOT_STARTED))
            }
        }
    }

    async fn start(
        self,
        global: &Global,
        mut signals: tokio::sync::mpsc::Receiver<rustix::process::Signal>,
        ignored: Ignored,
    ) -> failure::Result {
        let runtime = self.find_runtime()?;
        let store = self.open.store()?;
        // There is no container yet that a signal could be meant for: it ends us, and what is half made is taken down.
        let (process, root) = tokio::select! {
            biased;
            status = signals::ending(&mut signals, ignored) => return Ok(Outcome::Interrupted(status)),
            prepared = self.prepare(global, &store) => prepared?,
        };
        let streams = Streams::inherited().context("taking standard streams")?;
        let container = Container::new(&process, &self.wishes(), root.path(), &|name| std::env::var(name).ok())?;
        let status = Runner::new(runtime).run(container, streams, signals).await?;
        root.take_down().await?;
        Ok(Outcome::Container(status))
    }

    /// Opens the image and makes a root file system of it.
    async fn prepare(&self, global: &Global, store: &Store) -> anyhow::Result<(ProcessConfig, Root)> {
        let looked = Looked::open(global, &self.image, &self.platform, &self.open, store, FetchPolicy::MOUNT).await?;
        let process = looked.image.config.config.clone();
        let root = self.root(global, looked, store).await?;
        Ok((process, root))
    }

    async fn root(&self, global: &Global, looked: Looked, store: &Store) -> anyhow::Result<Root> {
        let whole = if self.no_lazy {
            true
        } else if let Some(why) = looked.why_not_lazy() {
            if !global.quiet {
                eprintln!("loris: pulling the whole image: {why}");
            }
            true
        } else {
            false
        };
        if whole {
            let bars = Arc::new(Bars::new(global));
            let image = &looked.image;
            let unpacked =
                full::Unpacked::pull(&looked.source, &image.manifest.layers, &image.config.diff_ids, &bars).await?;
            bars.finish();
            return Ok(Root::Full(unpacked));
        }
        let opened = Opened::from_looked(looked.image, &self.image)?;
        if self.engine.engine == Some(loris_mount::engine::Engine::Fuse) {
            opened.fill_unasked().await;
        }
        let options = RootFsOptions {
            access: rootfs::Access::Discard,
            engine: self.engine.engine,
            pager: self.engine.paging(),
            // Only the container can reach it.
            special: loris_mount::Special::ALL,
            ..RootFsOptions::read_only(store)
        };
        let handle = tokio::runtime::Handle::current();
        let root =
            RootFs::assemble(opened.layers(), &options, &handle).with_context(|| format!("mounting {}", self.image))?;
        let recording = self.record.clone().map(|file| Recording { file, recorder: Recorder::begin(opened.layers()) });
        self.ahead.begin(opened.layers(), Some(self.command_of(&opened.config().config)));
        activity::tell(store, "run", &self.image, None, opened.layers());
        Ok(Root::Lazy(root, opened, recording))
    }

    fn find_runtime(&self) -> anyhow::Result<Runtime> {
        let Some(name) = &self.runtime else { return Ok(Runtime::Embedded) };
        if name.components().count() > 1 {
            return Ok(Runtime::External(name.clone()));
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
        let found = folders.map(|folder| folder.join(name)).find(|program| program.is_file());
        found.map(Runtime::External).ok_or_else(|| {
            Usage(format!(
                "the runtime {} is not installed; without --runtime, the embedded one is used",
                name.display()
            ))
            .into()
        })
    }

    /// Returns what will be run, for those who fetch it ahead.
    fn command_of(&self, image: &ProcessConfig) -> Command {
        let mut process = image.clone();
        let Wishes { args, entrypoint, .. } = self.wishes();
        if let Some(entrypoint) = entrypoint {
            (process.entrypoint, process.cmd) = (entrypoint, Vec::new());
        }
        if !args.is_empty() {
            process.cmd = args;
        }
        Command::from(&process)
    }

    fn wishes(&self) -> Wishes {
        Wishes {
            args: self.command.clone(),
            entrypoint: self.entrypoint.as_ref().map(|program| {
                // An empty one removes the image's, as in docker run.
                if program.is_empty() { Vec::new() } else { vec![program.clone()] }
            }),
            env: self.env.clone(),
            volumes: self.volume.clone(),
            working_dir: self.workdir.clone(),
            user: self.user.clone(),
            network: match self.net {
                Net::Host => Network::Host,
                Net::None => Network::None,
            },
            read_only: self.read_only,
            hostname: self.hostname.clone(),
            tty: self.tty,
            interactive: self.interactive,
        }
    }
}

impl Root {
    fn path(&self) -> &Path {
        match self {
            Self::Lazy(root, ..) => root.path(),
            Self::Full(unpacked) => unpacked.path(),
        }
    }

    async fn take_down(self) -> anyhow::Result<()> {
        match self {
            Self::Lazy(root, opened, recording) => {
                root.unmount().context("unmounting the root file system")?;
                if let Some(recording) = recording {
                    recording.write(opened.layers())?;
                }
                for layer in opened.layers() {
                    layer.sync().await.context("keeping what was fetched")?;
                }
                Ok(())
            }
            Self::Full(unpacked) => unpacked.take_down(),
        }
    }
}

impl Recording {
    fn write(&self, layers: &[Arc<LazyLayer>]) -> anyhow::Result<()> {
        let waits: u64 = layers.iter().map(|layer| layer.statistics().waits).sum();
        let mut text = format!("# {waits} reads waited\n").into_bytes();
        text.extend(self.recorder.list(layers));
        std::fs::write(&self.file, text).with_context(|| format!("writing {}", self.file.display()))
    }
}

/// Reads `SOURCE:TARGET[:ro|:rw]`.
fn volume(text: &str) -> Result<Volume, String> {
    text.parse().map_err(|error: <Volume as std::str::FromStr>::Err| error.to_string())
}

/// Is the embedded runtime. The process has one thread.
pub(crate) fn runtime_main(arguments: &RuntimeArguments) -> ExitCode {
    ExitCode::from(embedded::main(&arguments.arguments))
}
