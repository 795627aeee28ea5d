//! A stage for measuring: a registry of our own on loopback, and a link of given rate and delay in front of it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use loris_serve::{
    link::{Link, LinkOptions},
    registry::Registry,
    server::{ServerHandle, ServerOptions},
};
use serde::Serialize;

use crate::measure::{Measured, measure};

/// Everything lives below one temporary folder, which goes with the stage whatever happens.
pub(crate) struct Stage {
    folder: tempfile::TempDir,
    registry: Registry,
    server: ServerHandle,
    link: Link,
}

/// An everyday link, as options of the command line.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(crate) struct LinkArguments {
    /// The link's rate, in Mbit/s
    #[arg(long, default_value_t = 100, value_name = "MBIT", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    rate: u64,
    /// The link's round trip, in milliseconds
    #[arg(long, default_value_t = 20, value_name = "MS", value_parser = clap::value_parser!(u64).range(0..=10_000))]
    round_trip: u64,
}

impl LinkArguments {
    pub(crate) fn options(self) -> LinkOptions {
        LinkOptions::symmetric(self.rate * 1_000_000, Duration::from_millis(self.round_trip) / 2)
    }
}

impl std::fmt::Display for LinkArguments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} Mbit/s and {} ms", self.rate, self.round_trip)
    }
}

/// What one run of a command took, and what crossed the link meanwhile.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Crossed {
    /// Of the process.
    #[serde(skip)]
    pub measured: Measured,
    /// From the command to its first output, in seconds.
    pub seconds: f64,
    /// That crossed the link towards us.
    pub bytes: u64,
    /// That the registry was asked.
    pub requests: u64,
}

impl Stage {
    /// Sets the stage. Needs a runtime.
    pub(crate) fn set(link: LinkOptions) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("loris-stage.").tempdir().context("making a temporary folder")?;
        let registry = Registry::open(folder.path().join("registry"))?;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").context("listening on loopback")?;
        let server = registry.serve(listener, ServerOptions::default())?;
        let link = Link::start(link, server.address())?;
        Ok(Self { folder, registry, server, link })
    }

    /// Returns the folder for whatever else is needed.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Returns a repository's name as it is reached without the link.
    pub(crate) fn direct(&self, repository: &str) -> String {
        format!("{}/{repository}", self.server.address())
    }

    /// Returns a repository's name as it is reached over the link.
    pub(crate) fn linked(&self, repository: &str) -> String {
        format!("{}/{repository}", self.link.address())
    }

    /// Runs a command with cold caches, and counts what it lets cross the link.
    pub(crate) fn run(&self, command: &mut Command) -> Result<Crossed> {
        drop_caches(&self.folder.path().join("registry"));
        self.link.reset();
        let before = self.registry.statistics().requests;
        let measured = tokio::task::block_in_place(|| measure(command))?;
        Ok(Crossed {
            measured,
            seconds: measured.first_output_seconds,
            bytes: self.link.statistics().bytes_down,
            requests: self.registry.statistics().requests - before,
        })
    }

    /// Takes the stage down and removes its folder.
    pub(crate) async fn clear(self) -> Result<()> {
        self.link.stop();
        self.server.stop().await;
        self.folder.close().context("removing the temporary folder")
    }
}

/// Returns this program, to be run as a user would run it.
pub(crate) fn ourselves() -> Result<Command> {
    let program: PathBuf = std::env::current_exe().context("finding this program")?;
    let mut command = Command::new(program);
    command.arg("--quiet");
    Ok(command)
}

/// What the page cache holds would make a second start faster than the first. The registry's blobs are read once
/// afterwards: the link is to be measured, not the registry's disk.
fn drop_caches(registry: &Path) {
    rustix::fs::sync();
    // Only root may, and not in every container; without it a second start finds warm what the first has read.
    if let Err(error) = fs::write("/proc/sys/vm/drop_caches", "3") {
        tracing::info!(%error, "caches are not dropped");
    }
    let mut open = vec![registry.to_owned()];
    while let Some(path) = open.pop() {
        if let Ok(entries) = fs::read_dir(&path) {
            open.extend(entries.flatten().map(|entry| entry.path()));
        } else if let Ok(mut file) = fs::File::open(&path) {
            // A file that can't be read is not missed here.
            let _ = std::io::copy(&mut file, &mut std::io::sink());
        }
    }
}
