//! `bench`: figures, each as a ratio against a peer or a limit in the same run.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Subcommand};
use loris_convert::copy::{CopyOptions, copy_image};
use loris_format::limits::Limits;
use loris_oci::{ImageSource, platform};
use serde::Serialize;

use crate::{
    Global,
    engine::EngineArgument,
    failure::{self, Outcome},
    measure::{Measured, measure, median},
    opened::FetchAhead,
    progress::Bars,
    stage::{Crossed, LinkArguments, Stage, ourselves},
    table::{bytes, table},
};

mod ideal;
mod mount;

use ideal::{Ideal, Needed};
use mount::{MountBench, WithinArguments};

/// Measure: lazy against full pull, and conversion against the tools of today.
#[derive(Args)]
pub(crate) struct BenchArguments {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Subcommand)]
enum Subject {
    /// Conversion to eStargz: this program and `ctr-remote image convert --estargz`, in turn
    Convert(ConvertBench),
    /// A program started lazily and after a full pull, in turn
    Run(RunBench),
    /// What `inspect`, `fs ls` and `fs cat` ask of a registry that is far away
    Look(LookBench),
    /// Programs over a mounted image by each engine, and over a plain directory, in turn; what a mount costs
    Mount(MountBench),
    /// One measurement of `mount`, in a process of its own
    #[command(hide = true, name = mount::WITHIN)]
    MountWithin(WithinArguments),
}

/// Conversion.
#[derive(Args)]
struct ConvertBench {
    /// The image, not yet converted: an OCI layout or archive
    image: String,
    /// Runs of each
    #[arg(long, default_value_t = 3, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
}

/// Starting a program.
#[derive(Args)]
struct RunBench {
    /// The image, lazily pullable
    image: String,
    /// The program and its arguments; the image's own where none are given
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    /// Runs of each
    #[arg(long, default_value_t = 3, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Start it also with a list to prefetch: what a run before, which is not measured, has read
    #[arg(long, conflicts_with = "prefetch_list")]
    prefetch_recorded: bool,
    /// Leave out the full pull, which takes long over a slow link
    #[arg(long)]
    no_full_pull: bool,
    #[command(flatten)]
    engine: EngineArgument,
    #[command(flatten)]
    ahead: FetchAhead,
    #[command(flatten)]
    link: LinkArguments,
}

/// Looking into an image.
#[derive(Args)]
struct LookBench {
    /// The image, lazily pullable
    image: String,
    /// A small file in it, for `fs cat`
    file: String,
    #[command(flatten)]
    link: LinkArguments,
}

impl BenchArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        match self.subject {
            Subject::Convert(bench) => bench.run(global).await,
            Subject::Run(bench) => bench.run(global).await,
            Subject::Look(bench) => bench.run(global).await,
            Subject::Mount(bench) => bench.run(global).await,
            Subject::MountWithin(measurement) => measurement.run(global).await,
        }
    }
}

/// The image's name in the stage's registry.
const REPOSITORY: &str = "bench/image:latest";

impl RunBench {
    async fn run(self, global: &Global) -> failure::Result {
        let stage = Stage::set(self.link.options())?;
        let image_bytes = put(global, &self.image, &stage.direct(REPOSITORY)).await?;
        let list = stage.folder().join("list");
        let recording =
            [self.engine.arguments(), vec!["--complete=never".into(), format!("--record={}", list.display())]];
        self.start(&stage, "recorded", &recording.concat()).context("finding out what is read")?;
        let needed = Needed::of(global, &stage.direct(REPOSITORY), &list, &stage.folder().join("needed")).await?;
        let (mut full, mut lazy, mut listed, mut warm) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let lazily = [self.engine.arguments(), self.ahead.arguments()].concat();
        let by_list = [lazily.clone(), vec![format!("--prefetch-list={}", list.display())]].concat();
        for turn in 0..self.runs {
            // Each has an empty cache of its own; in turn, so that a machine that slows down slows all.
            if !self.no_full_pull {
                full.push(self.start(&stage, &format!("full{turn}"), &["--no-lazy".to_owned()]).context("full pull")?);
            }
            lazy.push(self.start(&stage, &format!("lazy{turn}"), &lazily).context("lazy start")?);
            if self.prefetch_recorded {
                listed.push(self.start(&stage, &format!("listed{turn}"), &by_list).context("start with a list")?);
            }
            warm.push(self.start_warm(&stage, "recorded").context("start with everything here")?);
        }
        stage.clear().await?;
        let report = RunReport {
            image_bytes,
            link: self.link.to_string(),
            full_pull: (!full.is_empty()).then(|| Medians::of(&full)),
            lazy: Medians::of(&lazy),
            listed: (!listed.is_empty()).then(|| Medians::of(&listed)),
            warm: Medians::of(&warm),
            ideal: Ideal::of(needed, self.link, &warm, &lazy, &listed),
        };
        report.print(global)?;
        Ok(Outcome::Done)
    }

    fn start(&self, stage: &Stage, cache: &str, flags: &[String]) -> Result<Crossed> {
        stage.run(&mut self.command(&stage.folder().join(cache), flags, &stage.linked(REPOSITORY))?)
    }

    /// Starts the program with what an earlier run has left in the cache, without the link.
    fn start_warm(&self, stage: &Stage, cache: &str) -> Result<Crossed> {
        let cache = stage.folder().join(cache);
        let flags = [self.engine.arguments(), vec!["--complete=never".to_owned()]].concat();
        stage.run_beside(&mut self.command(&cache, &flags, &stage.direct(REPOSITORY))?, &cache)
    }

    fn command(&self, cache: &Path, flags: &[String], image: &str) -> Result<Command> {
        let mut command = ourselves()?;
        command.args(["run", "--rm", "--net", "none", "--plain-http", "--cache-dir"]).arg(cache);
        command.args(flags).arg(image).args(&self.command);
        Ok(command)
    }
}

#[derive(Serialize)]
struct RunReport {
    image_bytes: u64,
    link: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_pull: Option<Medians>,
    lazy: Medians,
    #[serde(skip_serializing_if = "Option::is_none")]
    listed: Option<Medians>,
    /// Everything is here, and the registry is asked without the link.
    warm: Medians,
    ideal: Ideal,
}

/// Medians over the runs.
#[derive(Serialize)]
struct Medians {
    first_output_seconds: f64,
    seconds: f64,
    bytes: f64,
    requests: f64,
    peak_memory_bytes: f64,
}

impl Medians {
    fn of(runs: &[Crossed]) -> Self {
        let over = |figure: fn(&Crossed) -> f64| median(runs.iter().map(figure));
        Self {
            first_output_seconds: over(|run| run.seconds),
            seconds: over(|run| run.measured.seconds),
            bytes: over(|run| run.bytes as f64),
            requests: over(|run| run.requests as f64),
            peak_memory_bytes: over(|run| run.measured.peak_bytes as f64),
        }
    }

    fn row(&self, name: &str) -> Vec<String> {
        vec![
            name.to_owned(),
            format!("{:.2} s", self.first_output_seconds),
            format!("{:.2} s", self.seconds),
            whole_bytes(self.bytes),
            format!("{:.0}", self.requests),
            whole_bytes(self.peak_memory_bytes),
        ]
    }
}

/// Medians of whole numbers are whole or halves; no figure of a benchmark reaches 2^53.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn whole_bytes(figure: f64) -> String {
    bytes(figure as u64)
}

impl RunReport {
    fn print(&self, global: &Global) -> Result<()> {
        if global.json {
            println!("{}", serde_json::to_string_pretty(self)?);
            return Ok(());
        }
        let head = ["", ">first output", ">end", ">fetched", ">requests", ">memory"].map(str::to_owned).to_vec();
        let rows = [
            Some(head),
            self.full_pull.as_ref().map(|full| full.row("full pull")),
            Some(self.lazy.row("lazy")),
            self.listed.as_ref().map(|listed| listed.row("lazy with a list")),
            Some(self.warm.row("everything here")),
        ];
        print!("{}", table(&rows.into_iter().flatten().collect::<Vec<_>>()));
        println!("image of {} over {}", bytes(self.image_bytes), self.link);
        if let Some(full) = &self.full_pull {
            println!(
                "lazily {:.2} of the time and {:.3} of the bytes of a full pull",
                self.lazy.first_output_seconds / full.first_output_seconds,
                self.lazy.bytes / full.bytes
            );
        }
        self.ideal.print();
        Ok(())
    }
}

impl LookBench {
    async fn run(self, global: &Global) -> failure::Result {
        let stage = Stage::set(self.link.options())?;
        let image_bytes = put(global, &self.image, &stage.direct(REPOSITORY)).await?;
        let reference = stage.linked(REPOSITORY);
        let mut rows = Vec::new();
        // `cat` finds the tables of contents that `ls` has fetched; what it fetches is the manifest and its chunk.
        for (name, cache, words) in [
            ("inspect", "inspect", vec!["inspect", &reference]),
            ("fs ls", "fs", vec!["fs", "ls", &reference]),
            ("fs cat", "fs", vec!["fs", "cat", &reference, &self.file]),
            ("fs cat again", "fs", vec!["fs", "cat", &reference, &self.file]),
        ] {
            let mut command = ourselves()?;
            command.args(words).args(["--plain-http", "--cache-dir"]).arg(stage.folder().join(cache));
            rows.push((name, stage.run(&mut command).context(name)?));
        }
        stage.clear().await?;
        if global.json {
            let report: std::collections::BTreeMap<_, _> = rows.into_iter().collect();
            println!("{}", serde_json::to_string_pretty(&report)?);
            return Ok(Outcome::Done);
        }
        let head = ["", ">time", ">fetched", ">requests"].map(str::to_owned).to_vec();
        let lines = rows.iter().map(|(name, crossed)| {
            let time = format!("{:.3} s", crossed.measured.seconds);
            vec![(*name).to_owned(), time, bytes(crossed.bytes), crossed.requests.to_string()]
        });
        print!("{}", table(&std::iter::once(head).chain(lines).collect::<Vec<_>>()));
        println!("image of {} over {}", bytes(image_bytes), self.link);
        Ok(Outcome::Done)
    }
}

impl ConvertBench {
    async fn run(self, global: &Global) -> failure::Result {
        let folder = tempfile::Builder::new().prefix("loris-bench.").tempdir().context("making a temporary folder")?;
        let archive = format!("oci-archive:{}:bench/image:plain", folder.path().join("plain.tar").display());
        let plain_bytes = put(global, &self.image, &archive).await?;
        let peer = Peer::start(folder.path(), &folder.path().join("plain.tar"));
        if let Err(error) = &peer {
            eprintln!("the peer takes no part: {error:#}");
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let mut our_bytes = 0;
        for _ in 0..self.runs {
            let target = format!("oci-archive:{}:bench/image:ours", folder.path().join("ours.tar").display());
            let mut command = ourselves()?;
            command.args(["convert", "--estargz", "--oci", &archive, &target]);
            ours.push(tokio::task::block_in_place(|| measure(&mut command))?);
            our_bytes = layer_bytes(&*global.access.source(&target).await?).await?;
            if let Ok(peer) = &peer {
                theirs.push(tokio::task::block_in_place(|| measure(&mut peer.convert()))?);
            }
        }
        let their_bytes = match &peer {
            Ok(peer) => {
                let exported = peer.export(folder.path())?;
                layer_bytes(&*global.access.source(&exported).await?).await?
            }
            Err(_) => 0,
        };
        let report = ConvertReport::new(plain_bytes, (our_bytes, &ours), (their_bytes, &theirs));
        report.print(global)?;
        Ok(Outcome::Done)
    }
}

#[derive(Serialize)]
struct ConvertReport {
    source_bytes: u64,
    loris: Conversion,
    #[serde(skip_serializing_if = "Option::is_none")]
    ctr_remote: Option<Conversion>,
}

#[derive(Serialize)]
struct Conversion {
    seconds: f64,
    peak_memory_bytes: f64,
    layer_bytes: u64,
}

impl ConvertReport {
    fn new(source_bytes: u64, ours: (u64, &[Measured]), theirs: (u64, &[Measured])) -> Self {
        let conversion = |(layer_bytes, runs): (u64, &[Measured])| Conversion {
            seconds: median(runs.iter().map(|run| run.seconds)),
            peak_memory_bytes: median(runs.iter().map(|run| run.peak_bytes as f64)),
            layer_bytes,
        };
        let ctr_remote = (!theirs.1.is_empty()).then(|| conversion(theirs));
        Self { source_bytes, loris: conversion(ours), ctr_remote }
    }

    fn print(&self, global: &Global) -> Result<()> {
        if global.json {
            println!("{}", serde_json::to_string_pretty(self)?);
            return Ok(());
        }
        let row = |name: &str, conversion: &Conversion| {
            vec![
                name.to_owned(),
                format!("{:.2} s", conversion.seconds),
                bytes(conversion.layer_bytes),
                whole_bytes(conversion.peak_memory_bytes),
            ]
        };
        let mut rows = vec![["", ">time", ">layers", ">memory"].map(str::to_owned).to_vec(), row("loris", &self.loris)];
        rows.extend(self.ctr_remote.iter().map(|theirs| row("ctr-remote", theirs)));
        print!("{}", table(&rows));
        if let Some(theirs) = &self.ctr_remote {
            println!(
                "{:.2} times the speed of ctr-remote, output {:+.2} %",
                theirs.seconds / self.loris.seconds,
                100.0 * (self.loris.layer_bytes as f64 / theirs.layer_bytes as f64 - 1.0)
            );
        }
        Ok(())
    }
}

/// A containerd of our own, which `ctr-remote` needs. It ends with this value.
struct Peer {
    daemon: Child,
    socket: PathBuf,
}

/// The image's name in containerd.
const PLAIN: &str = "docker.io/bench/image:plain";
const THEIRS: &str = "docker.io/bench/image:theirs";

impl Peer {
    fn start(folder: &Path, archive: &Path) -> Result<Self> {
        for program in ["containerd", "ctr", "ctr-remote"] {
            let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
            ensure!(found.is_ok_and(|status| status.success()), "{program} is not installed (cargo xtask peers)");
        }
        let folder = folder.join("containerd");
        std::fs::create_dir(&folder)?;
        let socket = folder.join("socket");
        let config = folder.join("config.toml");
        let text = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
            folder.join("root"),
            folder.join("state"),
            socket
        );
        std::fs::write(&config, text)?;
        let daemon = Command::new("containerd")
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting containerd")?;
        let peer = Self { daemon, socket };
        let deadline = Instant::now() + Duration::from_secs(30);
        while !peer.ctr("ctr", &["version"]).output().is_ok_and(|output| output.status.success()) {
            ensure!(Instant::now() < deadline, "containerd does not answer");
            std::thread::sleep(Duration::from_millis(100));
        }
        let path = archive.display().to_string();
        let output = peer.ctr("ctr", &["images", "import", "--no-unpack", "--index-name", PLAIN, &path]).output()?;
        if !output.status.success() {
            bail!("importing the image: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(peer)
    }

    fn ctr(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.arg("--address").arg(&self.socket).args(arguments);
        command
    }

    /// It converts anew each time, and finds only when it has that the content is there.
    fn convert(&self) -> Command {
        self.ctr("ctr-remote", &["image", "convert", "--estargz", "--oci", PLAIN, THEIRS])
    }

    fn export(&self, folder: &Path) -> Result<String> {
        let path = folder.join("theirs.tar").display().to_string();
        let output = self.ctr("ctr", &["images", "export", &path, THEIRS]).output()?;
        if !output.status.success() {
            bail!("exporting the peer's image: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(format!("oci-archive:{path}"))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // SIGTERM, so that it takes its mounts down; by its id.
        if let Ok(id) = i32::try_from(self.daemon.id())
            && let Some(id) = rustix::process::Pid::from_raw(id)
        {
            let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
        }
        let _ = self.daemon.wait();
    }
}

/// Copies an image and returns the size of its layers.
async fn put(global: &Global, from: &str, to: &str) -> Result<u64> {
    let source = global.access.source(from).await?;
    let sink = global.access.sink(to).await?;
    let bars = Bars::new(global);
    copy_image(&*source, &*sink, &CopyOptions::default(), &bars).await?;
    bars.finish();
    layer_bytes(&*source).await
}

async fn layer_bytes(source: &dyn ImageSource) -> Result<u64> {
    let (_, manifest) = platform::resolve_manifest(source, None, &Limits::default()).await?;
    Ok(manifest.layers.iter().map(|layer| layer.size).sum())
}
