//! A stage for measuring: a registry of our own on loopback, and a link of given rate, delay and faults in front of it.

use std::{
    fs,
    num::NonZeroU64,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use loris_format::amounts;
use loris_serve::{
    link::{Cut, Link, LinkOptions},
    registry::Registry,
    server::{ServerHandle, ServerOptions},
};
use serde::Serialize;

use crate::{
    measure::{Measured, measure},
    table,
};

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
    /// How much later bytes may arrive by chance, in milliseconds
    #[arg(long, default_value_t = 0, value_name = "MS", value_parser = clap::value_parser!(u64).range(0..=10_000))]
    jitter: u64,
    /// Most that one connection carries, in Mbit/s, as object stores limit it
    #[arg(long, value_name = "MBIT", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    connection_rate: Option<u64>,
    /// Reset each connection after it has carried so many bytes, such as `8M`
    #[arg(long, value_name = "SIZE", value_parser = amounts::size)]
    cut: Option<u64>,
    /// Reset it at a random place instead, after `--cut` bytes on the average
    #[arg(long, requires = "cut")]
    cut_at_random: bool,
    /// What chance begins with: the same number gives the same jitter and cuts
    #[arg(long, default_value_t = 0, value_name = "NUMBER")]
    seed: u64,
}

impl LinkArguments {
    /// Returns how long so many bytes take, with so many round trips before them.
    pub(crate) fn seconds(self, bytes: u64, round_trips: u64) -> f64 {
        bytes as f64 * 8e-6 / self.rate as f64 + (self.round_trip * round_trips) as f64 * 1e-3
    }

    pub(crate) fn options(self) -> LinkOptions {
        LinkOptions {
            jitter: Duration::from_millis(self.jitter),
            connection_bits_per_second: self.connection_rate.and_then(|rate| NonZeroU64::new(rate * 1_000_000)),
            cut: self.cut.map(|bytes| if self.cut_at_random { Cut::About(bytes) } else { Cut::After(bytes) }),
            seed: self.seed,
            ..LinkOptions::symmetric(self.rate * 1_000_000, Duration::from_millis(self.round_trip) / 2)
        }
    }
}

impl std::fmt::Display for LinkArguments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} Mbit/s and {} ms", self.rate, self.round_trip)?;
        if self.jitter > 0 {
            write!(f, ", up to {} ms late", self.jitter)?;
        }
        if let Some(rate) = self.connection_rate {
            write!(f, ", {rate} Mbit/s a connection")?;
        }
        if let Some(bytes) = self.cut {
            write!(f, ", cut after {}{}", if self.cut_at_random { "about " } else { "" }, table::bytes(bytes))?;
        }
        Ok(())
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
        self.run_beside(command, &self.folder.path().join("registry"))
    }

    /// Does what [`Stage::run`] does, with a folder in memory whose disk is not to be measured.
    pub(crate) fn run_beside(&self, command: &mut Command, folder: &Path) -> Result<Crossed> {
        drop_caches(folder);
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

/// What the page cache holds would make a second start faster than the first. The registry's blobs, as a rule, are read
/// once afterwards: the link is to be measured, not the registry's disk.
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
