//! `loris daemon`: processes that serve lazy images to others, and how they get onto a machine.

use std::{io::Write as _, path::PathBuf, sync::Arc};

use anyhow::Context as _;
use clap::{ArgMatches, Args, Subcommand};
use loris_mount::{keeper::Keeper, pager::OnDeath};
use loris_snapshotter::{
    Daemon, config,
    daemon::{Settings, Started},
    keychain::Keychains,
    listener, remote,
    systemd::{self, State},
    watching,
};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    Global, activity,
    engine::{self, EngineArgument},
    failure::{self, Outcome},
    logging,
    opened::{Completing, StorePlace},
};

mod configured;
mod install;

use configured::Configured;

/// The processes.
#[derive(Subcommand)]
pub(crate) enum DaemonCommand {
    /// Serve snapshots to containerd: a proxy plugin of the type `snapshot`
    Snapshotter(SnapshotterArguments),
    /// Print what is in force for `daemon snapshotter` with the same flags, and where each value came from
    Config(SnapshotterArguments),
    /// Install the snapshotter on this machine: units of systemd, containerd's and Docker's configuration
    Install(install::InstallArguments),
    /// Take back what `daemon install` has changed
    Uninstall(install::UninstallArguments),
}

/// What the snapshotter is told by flags, which count more than what its file says.
///
/// All of them are read by their names (see [`configured`]), so that it is known which were given.
#[derive(Args)]
pub(crate) struct SnapshotterArguments {
    /// The configuration; /etc/loris/snapshotter.toml where none is named and that is there
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The socket that containerd is told of; /run/loris/snapshotter.sock where nothing is said
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// Where snapshots are kept, on a file system that overlayfs takes as upper directory; /var/lib/loris-snapshotter where
    /// nothing is said
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// How long containerd waits for a layer to be opened, before it pulls it itself; 10 where nothing is said
    #[arg(long, value_name = "SECONDS")]
    open_timeout: Option<u64>,
    /// Serve layers whose content no digest in the manifest vouches for
    #[arg(long)]
    allow_unverified: bool,
    /// Whose word counts for an index beside layers that are no lazy format themselves (SOCI): that of the image's `manifest`,
    /// also that of whoever may write to its `repository`, or `any`; manifest where nothing is said
    #[arg(long, value_name = "WHO", env = "LORIS_INDEX_TRUST", value_parser = ["manifest", "repository", "any"])]
    index_trust: Option<String>,
    /// Another option of overlayfs for containers, such as `volatile`
    #[arg(long, value_name = "OPTION")]
    mount_option: Vec<String>,
    /// Do not fetch first what the writers of images marked as needed for a start
    #[arg(long)]
    no_prefetch: bool,
    /// Serve metrics for Prometheus at `/metrics`, and `/healthz` and `/readyz`, on this address, as 127.0.0.1:9091
    #[arg(long, value_name = "HOST:PORT")]
    metrics_address: Option<String>,
    /// What to log, as --log has it, and in stargz-snapshotter's words; info where nothing is said
    #[arg(long, value_name = "LEVEL", value_parser = |text: &str| logging::filter(configured::level(text)))]
    log_level: Option<String>,
    /// Log lines of text, or JSON objects
    #[arg(long, value_name = "FORMAT", value_parser = ["text", "json"])]
    log_format: Option<String>,
    /// The number of a descriptor that listens there already, as the keeper of mounts passes it on
    #[arg(long, hide = true)]
    listener_fd: Option<i32>,
    /// What the configuration said when the process before this one read it
    #[arg(long, hide = true)]
    last_good: Option<PathBuf>,
    #[command(flatten)]
    place: StorePlace,
    #[command(flatten)]
    engine: EngineArgument,
    #[command(flatten)]
    completing: Completing,
}

impl DaemonCommand {
    /// `matches` is the whole command line.
    pub(crate) async fn run(self, global: &Global, matches: &ArgMatches) -> failure::Result {
        let inner =
            matches.subcommand().and_then(|(_, daemon)| daemon.subcommand()).map_or(matches, |(_, inner)| inner);
        match self {
            Self::Snapshotter(arguments) => serve(global, inner, arguments.listener_fd, arguments.last_good).await,
            Self::Config(_) => print(inner),
            Self::Install(arguments) => arguments.run(),
            Self::Uninstall(arguments) => arguments.run(),
        }
    }
}

fn print(matches: &ArgMatches) -> failure::Result {
    let configured = Configured::read(matches, None)?;
    for warning in configured.settled.warned() {
        eprintln!("loris: {warning}");
    }
    std::io::stdout().write_all(configured.settled.to_toml().as_bytes())?;
    Ok(Outcome::Done)
}

/// How a process ends.
enum End {
    /// Mounts stay, for a successor.
    Leave,
    /// They are taken down.
    TakeDown,
}

async fn serve(
    global: &Global,
    matches: &ArgMatches,
    listener: Option<i32>,
    last_good: Option<PathBuf>,
) -> failure::Result {
    // Before anything is mounted, so that no signal finds it without its handler.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let keeper = Keeper::inherited_socket().context("taking over from a process that was killed")?;
    let mut configured = Configured::read(matches, last_good.as_deref().filter(|_| keeper.is_some()))?;
    configured.log();
    configured.warn();
    engine::sweep_dead();
    let keychains = Keychains::new(&configured.keychains(), &configured.settings().root)?;
    let settings = settings(&configured, global, &keychains, listener)?;
    let (root, store) = (settings.root.clone(), settings.images.store.clone());
    let daemon = match Daemon::start(settings, keeper).await.context("starting the snapshotter")? {
        Started::Serving(daemon) => daemon,
        Started::PassedOn => return Ok(Outcome::Done),
    };
    let last_good = root.join(LAST_GOOD);
    keep(&configured, &last_good);
    let snapshots = daemon.snapshots();
    tokio::spawn(watching::count(Arc::clone(snapshots.metrics())));
    if let Some(address) = configured.settings().metrics_address.as_deref().filter(|_| !daemon.rests()) {
        // Where that fails, images are served all the same.
        if let Err(error) = watching::watch(address, snapshots.clone()).await {
            tracing::error!(address, %error, "metrics can't be served");
        }
    }
    let known = snapshots.clone();
    activity::tell_of(store, "daemon snapshotter", move || known.layers());
    if !daemon.rests() {
        systemd::tell(State::Ready);
    }
    let mut serving = Box::pin(daemon.serve());
    let mut status = 0;
    let end = loop {
        tokio::select! {
            served = &mut serving => {
                if let Err(error) = served {
                    // Not returned: what is mounted must not be dropped.
                    tracing::error!("serving snapshots: {error:#}");
                    status = 1;
                }
                break End::Leave;
            }
            _ = terminate.recv() => break End::Leave,
            _ = interrupt.recv() => break End::TakeDown,
            _ = hangup.recv() => reload(&mut configured, global, &keychains, &daemon, &last_good),
        }
    };
    drop(serving);
    if !daemon.rests() {
        systemd::tell(State::Stopping);
    }
    if matches!(end, End::TakeDown) {
        tokio::task::spawn_blocking(|| daemon.take_down()).await.context("taking mounts down")?;
        return Ok(Outcome::Done);
    }
    daemon.leave();
    // What is mounted stays. Dropped, it would be taken down.
    std::process::exit(status);
}

/// What the configuration said, in the root directory: a successor must start where somebody is just writing it.
const LAST_GOOD: &str = "configuration.toml";

fn settings(
    configured: &Configured,
    global: &Global,
    keychains: &Keychains,
    listener: Option<i32>,
) -> anyhow::Result<Settings> {
    let config::Settings { root, address, engine, read_timeout, mount_options, .. } = configured.settings().clone();
    let engine = EngineArgument { engine, read_timeout: read_timeout.as_secs() };
    let mut on_death = engine::restart();
    if let OnDeath::Restart(command) = &mut on_death {
        let last_good = format!("--last-good={}", root.join(LAST_GOOD).display());
        if !command.iter().any(|argument| *argument == *last_good) {
            command.push(last_good.into());
        }
    }
    let given = systemd::socket().context("taking the service manager's socket")?;
    let keeps_address = given.is_some();
    let inherited = listener.map(listener::inherited).transpose().context("taking over the socket")?;
    let images = remote::Settings {
        client: configured.client(global, keychains.list())?,
        store: configured.store()?,
        open: configured.open(),
        patience: configured.patience(),
        foresee: configured.ahead().prefetch,
    };
    Ok(Settings {
        root,
        address,
        listener: given.or(inherited),
        keeps_address,
        images,
        image_service: keychains.image_service(),
        ahead: configured.ahead(),
        content: configured.settings().containerd.clone(),
        mount_options,
        engine: engine.engine,
        pager: engine.pager_options(on_death, None),
        is_managed: systemd::is_manager(),
    })
}

/// Keeps what the configuration says for a successor.
fn keep(configured: &Configured, path: &std::path::Path) {
    let text = configured.settled.file.as_ref().map_or("", |(_, text)| text);
    let write = || {
        let mut file = tempfile::Builder::new().prefix(".unfinished-").tempfile_in(path.parent()?).ok()?;
        file.write_all(text.as_bytes()).ok()?;
        file.persist(path).ok()
    };
    if write().is_none() {
        tracing::warn!(path = %path.display(), "a successor can't be told the configuration");
    }
}

/// Reads the configuration again, and lets it count as far as it can.
fn reload(
    configured: &mut Configured,
    global: &Global,
    keychains: &Keychains,
    daemon: &Daemon,
    last_good: &std::path::Path,
) {
    systemd::tell(State::Reloading);
    if let Err(error) = reloaded(configured, global, keychains, daemon, last_good) {
        tracing::error!("the configuration stays as it was: {error:#}");
    }
    systemd::tell(State::Ready);
}

fn reloaded(
    configured: &mut Configured,
    global: &Global,
    keychains: &Keychains,
    daemon: &Daemon,
    last_good: &std::path::Path,
) -> anyhow::Result<()> {
    let new = configured.again()?;
    // It asks registries anew, and reads files of certificates and hosts.
    let client = new.client(global, keychains.list())?;
    let changed = config::changed(configured.settings(), new.settings());
    new.log();
    new.warn();
    let is_ahead = |key: &str| ["prefetch", "complete", "complete_rate"].contains(&key);
    let ahead = changed.iter().any(|(key, _)| is_ahead(key)).then(|| new.ahead());
    daemon.change(client, new.open(), new.patience(), ahead);
    for (key, counts) in &changed {
        let place = new.settled.place(key);
        if *counts {
            tracing::info!(key, place, "it counts from now on; images that are open stay as they are");
        } else {
            tracing::warn!(key, place, "it changes when the snapshotter is started anew, and not before");
        }
    }
    tracing::info!(changed = changed.len(), "the configuration was read again");
    keep(&new, last_good);
    *configured = new;
    Ok(())
}
