//! `loris daemon`: processes that serve lazy images to others.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use loris_lazy::{FetchPolicy, OpenOptions, Trust};
use loris_mount::keeper::Keeper;
use loris_snapshotter::{
    Daemon, ahead,
    daemon::{Settings, Started},
    keychain::{self, Keychains},
    listener, remote, watching,
};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    Global, activity,
    engine::{self, EngineArgument},
    failure::{self, Outcome},
    opened::{Completing, StorePlace},
};

/// The processes.
#[derive(Subcommand)]
pub(crate) enum DaemonCommand {
    /// Serve snapshots to containerd: a proxy plugin of the type `snapshot`
    Snapshotter(SnapshotterArguments),
}

/// Serve snapshots to containerd.
#[derive(Args)]
pub(crate) struct SnapshotterArguments {
    /// The socket that containerd is told of
    #[arg(long, value_name = "SOCKET", default_value = "/run/loris/snapshotter.sock")]
    address: PathBuf,
    /// Where snapshots are kept; on a file system that overlayfs takes as upper directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/loris-snapshotter")]
    root: PathBuf,
    /// How long containerd waits for a layer to be opened, before it pulls it itself
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    open_timeout: u64,
    /// Serve layers whose content no digest in the manifest vouches for
    #[arg(long)]
    allow_unverified: bool,
    /// Another option of overlayfs for containers, such as `volatile`
    #[arg(long, value_name = "OPTION")]
    mount_option: Vec<String>,
    /// Do not fetch first what the writers of images marked as needed for a start
    #[arg(long)]
    no_prefetch: bool,
    /// Serve metrics for Prometheus at `/metrics`, and `/healthz` and `/readyz`, on this address, as 127.0.0.1:9091
    #[arg(long, value_name = "HOST:PORT")]
    metrics_address: Option<String>,
    /// The number of a descriptor that listens there already, as the keeper of mounts passes it on
    #[arg(long, hide = true)]
    listener_fd: Option<i32>,
    #[command(flatten)]
    place: StorePlace,
    #[command(flatten)]
    engine: EngineArgument,
    #[command(flatten)]
    completing: Completing,
}

impl DaemonCommand {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        match self {
            Self::Snapshotter(arguments) => arguments.run(global).await,
        }
    }
}

impl SnapshotterArguments {
    async fn run(self, global: &Global) -> failure::Result {
        // Before anything is mounted, so that no signal finds it without its handler.
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let keeper = Keeper::inherited_socket().context("taking over from a process that was killed")?;
        engine::sweep_dead();
        let started = Daemon::start(self.settings(global)?, keeper).await.context("starting the snapshotter")?;
        let daemon = match started {
            Started::Serving(daemon) => daemon,
            Started::PassedOn => return Ok(Outcome::Done),
        };
        let snapshots = daemon.snapshots();
        tokio::spawn(watching::count(Arc::clone(snapshots.metrics())));
        if let Some(address) = self.metrics_address.as_deref().filter(|_| !daemon.rests()) {
            // Where that fails, images are served all the same.
            if let Err(error) = watching::watch(address, snapshots.clone()).await {
                tracing::error!(address, %error, "metrics can't be served");
            }
        }
        let known = snapshots.clone();
        activity::tell_of(self.place.open()?, "daemon snapshotter", move || known.layers());
        tokio::select! {
            served = daemon.serve() => served.context("serving snapshots")?,
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {
                tokio::task::spawn_blocking(|| daemon.take_down()).await.context("taking mounts down")?;
                return Ok(Outcome::Done);
            }
        }
        daemon.leave();
        // What is mounted stays. Dropped, it would be taken down.
        std::process::exit(0);
    }

    fn settings(&self, global: &Global) -> anyhow::Result<Settings> {
        let trust = if self.allow_unverified { Trust::Anything } else { Trust::Vouched };
        // Which ones there are is a matter of the configuration.
        let keychains = Keychains::new(&keychain::Settings::default(), &self.root)?;
        let images = remote::Settings {
            client: global.access.client_with(keychains.list())?,
            store: self.place.open()?,
            open: OpenOptions { trust, policy: FetchPolicy::MOUNT, ..OpenOptions::default() },
            patience: Duration::from_secs(self.open_timeout),
        };
        Ok(Settings {
            root: self.root.clone(),
            address: self.address.clone(),
            listener: self.listener_fd.map(listener::inherited).transpose().context("taking over the socket")?,
            images,
            image_service: keychains.image_service(),
            ahead: ahead::Settings { prefetch: !self.no_prefetch, complete: self.completing.completion() },
            mount_options: self.mount_option.clone(),
            engine: self.engine.engine,
            pager: self.engine.pager_options(engine::restart(), None),
            is_managed: std::env::var_os("INVOCATION_ID").is_some(),
        })
    }
}
