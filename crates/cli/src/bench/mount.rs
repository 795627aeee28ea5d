//! `bench mount`: the engines beside a plain directory, each under overlayfs, and what a mount costs.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use loris_mount::{engine::Engine, engine::probe};
use loris_serve::link::LinkOptions;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{REPOSITORY, put};
use crate::{
    Global, demo,
    failure::{self, Outcome},
    measure::median,
    stage::{Stage, ourselves},
    table::{bytes, table},
};

mod roots;
mod within;
mod work;

pub(super) use within::WithinArguments;

use roots::Root;
use within::{Event, Memory, Times, What};
use work::{Files, Work, drop_caches};

/// Name of the hidden verb below `bench`.
pub(super) const WITHIN: &str = "mount-within";

/// The engines.
#[derive(Args)]
pub(super) struct MountBench {
    /// The image, lazily pullable; without, one is made of this machine's files, as `loris demo` does
    image: Option<String>,
    /// Content of the image that is made, in MB (10^6 bytes)
    #[arg(long, default_value_t = 500, value_name = "MB", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    size: u64,
    /// Rounds; each measures everything once, in turn
    #[arg(long, default_value_t = 5, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Measure another root file system beside ours: the same image, mounted by something else
    #[arg(long, value_name = "NAME=DIR")]
    beside: Vec<String>,
    /// Write the image for others to mount, print its name, and wait for a line on standard input
    #[arg(long)]
    wait: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    content_bytes: u64,
    names: usize,
    rounds: u32,
    works: Vec<WorkReport>,
    mounts: Vec<Times>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<Memory>,
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<Event>,
    /// What could not be measured, and why.
    not_measured: Vec<String>,
}

#[derive(Serialize)]
struct WorkReport {
    work: &'static str,
    root: String,
    warm: Figure,
    cold: Figure,
}

/// Medians over the rounds.
#[derive(Serialize, Deserialize)]
struct Figure {
    seconds: f64,
    /// Speed against the plain directory, both in one round.
    ratio: f64,
}

impl MountBench {
    pub(super) async fn run(self, global: &Global) -> failure::Result {
        ensure!(rustix::process::geteuid().is_root(), "mounting overlayfs and dropping the page cache take root");
        let stage = Stage::set(LinkOptions::symmetric(100_000_000_000, Duration::ZERO))?;
        let say = |text: &str| {
            if !global.quiet {
                eprintln!("{text}");
            }
        };
        let reference = match &self.image {
            Some(image) => {
                put(global, image, &stage.direct(REPOSITORY)).await?;
                stage.direct(REPOSITORY)
            }
            None => {
                say("making an image out of this machine's files");
                demo::stand_in(global, &stage, "bench/machine:latest", self.size * 1_000_000, None).await?
            }
        };
        let mut not_measured = Vec::new();
        if self.wait {
            println!("{reference}");
            std::io::stdin().read_line(&mut String::new())?;
        }
        let folder = stage.folder().join("mounts");
        fs::create_dir(&folder)?;
        let measured = tokio::task::block_in_place(|| self.compare(&reference, &folder, &mut not_measured, say));
        let (works, files) = measured?;

        say("measuring mounts, memory and events");
        let memory_image = "bench/layers:latest";
        let layered = demo::stand_in(global, &stage, memory_image, LAYERED_BYTES, Some(LAYERS)).await;
        let mut inside = |what: What, image: Result<&str>| -> Option<serde_json::Value> {
            let measured = image.and_then(|image| self.within(what, image, stage.folder()));
            measured.map_err(|error| not_measured.push(format!("{}: {error:#}", what.name()))).ok()
        };
        let mounts = inside(What::Times, Ok(&reference));
        let memory = inside(What::Memory, layered.as_deref().map_err(|error| anyhow::anyhow!("{error:#}")));
        let event = inside(What::Event, Ok(&reference));
        let report = Report {
            content_bytes: files.bytes,
            names: files.names,
            rounds: self.rounds,
            works,
            mounts: parsed(mounts)?.unwrap_or_default(),
            memory: parsed(memory)?,
            event: parsed(event)?,
            not_measured,
        };
        stage.clear().await?;
        if global.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            report.print();
        }
        Ok(Outcome::Done)
    }

    /// Measures what programs do, with all roots in turn.
    fn compare(
        &self,
        reference: &str,
        folder: &Path,
        not_measured: &mut Vec<String>,
        say: impl Fn(&str),
    ) -> Result<(Vec<WorkReport>, Files)> {
        let report = probe(folder);
        let mut roots = Vec::new();
        for engine in Engine::ALL {
            if report.ability(engine).is_present() {
                roots.push(Root::lazy(engine, reference, folder)?);
            } else {
                not_measured.push(format!("{engine}: {}", report.ability(engine)));
            }
        }
        say("reading it once, through each engine");
        let first = roots.first().context("no engine works here")?.path.clone();
        roots.insert(0, Root::unpacked(&first, folder)?);
        for beside in &self.beside {
            roots.push(Root::foreign(beside).with_context(|| format!("--beside {beside}"))?);
        }
        let files = Files::of(&first)?;
        let works: Vec<Work> = Work::ALL.into_iter().filter(|work| work.is_possible(&files)).collect();
        // Everything is fetched now, and everything cached.
        for root in &roots {
            Work::Tar.run(&root.path, &files, true).with_context(|| root.name.clone())?;
        }
        let mut reports = Vec::new();
        for work in works {
            say(&format!("measuring {}", work.name()));
            let warm = self.in_turn(&roots, |root| work.run(root, &files, true), || Ok(()))?;
            let cold = self.in_turn(&roots, |root| work.run(root, &files, false), drop_caches)?;
            // What a cold measurement leaves is less than everything.
            for root in &roots {
                Work::Tar.run(&root.path, &files, true)?;
            }
            for (number, root) in roots.iter().enumerate() {
                let (warm, cold) = (Figure::of(&warm, number), Figure::of(&cold, number));
                reports.push(WorkReport { work: work.name(), root: root.name.clone(), warm, cold });
            }
        }
        Ok((reports, files))
    }

    /// Measures all roots in each round, and returns the seconds by round and root. Each round begins with another one, so
    /// that none is always behind the same.
    fn in_turn(
        &self,
        roots: &[Root],
        measure: impl Fn(&Path) -> Result<f64>,
        before: impl Fn() -> Result<()>,
    ) -> Result<Vec<Vec<f64>>> {
        // Once for nothing: what the work itself needs is read then.
        for root in roots {
            measure(&root.path).with_context(|| root.name.clone())?;
        }
        let mut rounds = Vec::new();
        for round in 0..self.rounds as usize {
            let mut seconds = vec![0.0; roots.len()];
            for number in (0..roots.len()).map(|number| (number + round) % roots.len()) {
                before()?;
                seconds[number] = measure(&roots[number].path).with_context(|| roots[number].name.clone())?;
            }
            rounds.push(seconds);
        }
        Ok(rounds)
    }

    /// Runs one measurement in a process of its own.
    fn within(&self, what: What, image: &str, folder: &Path) -> Result<serde_json::Value> {
        let folder: PathBuf = folder.join(what.name());
        fs::create_dir(&folder)?;
        let mut command = ourselves()?;
        command.args(["bench", WITHIN, "--plain-http", "--rounds", &self.rounds.to_string(), what.name(), image]);
        let output = command.arg(&folder).stderr(std::process::Stdio::piped()).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}", said.trim());
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

/// The image of many layers: how many, and how many bytes of content.
const LAYERS: usize = 100;
const LAYERED_BYTES: u64 = 150_000_000;

fn parsed<T: DeserializeOwned>(value: Option<serde_json::Value>) -> Result<Option<T>> {
    Ok(value.map(serde_json::from_value).transpose()?)
}

impl Figure {
    fn of(rounds: &[Vec<f64>], root: usize) -> Self {
        Self {
            seconds: median(rounds.iter().map(|round| round[root])),
            ratio: median(rounds.iter().map(|round| round[0] / round[root])),
        }
    }
}

impl Report {
    fn print(&self) {
        let head = ["", "", ">warm", ">ratio", ">cold", ">ratio"].map(str::to_owned).to_vec();
        let rows = self.works.iter().map(|row| {
            let figures =
                [&row.warm, &row.cold].map(|figure| [seconds(figure.seconds), format!("{:.2}", figure.ratio)]);
            let name = if row.root == "unpacked" { row.work } else { "" };
            [name.to_owned(), row.root.clone()].into_iter().chain(figures.into_iter().flatten()).collect()
        });
        print!("{}", table(&std::iter::once(head).chain(rows).collect::<Vec<_>>()));
        println!("image of {} names and {}; {} rounds\n", self.names, bytes(self.content_bytes), self.rounds);
        let head = ["mount", ">first", ">its CPU", ">known", ">its CPU", ">with overlay and pager", ">EROFS alone"];
        let rows = self.mounts.iter().map(|times| {
            let figures = [times.first, times.first_cpu, times.known, times.known_cpu, times.known_whole].map(seconds);
            let erofs = times.erofs.map_or_else(String::new, seconds);
            std::iter::once(times.engine.clone()).chain(figures).chain([erofs]).collect()
        });
        println!("{}", table(&std::iter::once(head.map(str::to_owned).to_vec()).chain(rows).collect::<Vec<_>>()));
        if let Some(memory) = &self.memory {
            memory.print();
        }
        if let Some(event) = &self.event {
            event.print();
        }
        for missing in &self.not_measured {
            println!("not measured: {missing}");
        }
    }
}

impl Memory {
    fn print(&self) {
        let row = |name: &str, daemon: u64, keeper: u64| vec![name.to_owned(), bytes(daemon), bytes(keeper)];
        let rows = [
            ["memory (PSS)", ">daemon", ">keeper"].map(str::to_owned).to_vec(),
            row("nothing is open", self.daemon_before, self.keeper_before),
            row(&format!("{} layers are open", self.layers), self.daemon_opened, self.keeper_before),
            row("each is mounted", self.daemon, self.keeper),
            row("each is mounted twice", self.daemon_twice, self.keeper_twice),
        ];
        print!("{}", table(&rows));
        let more = (self.daemon_twice + self.keeper_twice).saturating_sub(self.daemon + self.keeper);
        println!("{} names; a further mount costs {}\n", self.names, bytes(more / self.layers.max(1) as u64));
    }
}

impl Event {
    fn print(&self) {
        let row = |name: &str, unmarked: f64, marked: f64| {
            vec![name.to_owned(), seconds(unmarked), seconds(marked), seconds(marked - unmarked)]
        };
        let rows = [
            ["read of 4 KiB", ">unmarked", ">marked", ">event"].map(str::to_owned).to_vec(),
            row("from the disk", self.disk_unmarked, self.disk_marked),
            row("data file cached", self.cached_unmarked, self.cached_marked),
        ];
        println!("{}", table(&rows));
    }
}

fn seconds(figure: f64) -> String {
    match figure.abs() {
        1.0.. => format!("{figure:.2} s"),
        0.001.. => format!("{:.1} ms", figure * 1e3),
        _ => format!("{:.1} us", figure * 1e6),
    }
}
