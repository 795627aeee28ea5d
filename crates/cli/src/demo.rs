//! `loris demo`: the main job on this machine, with nothing but this program.
//!
//! A registry of our own on loopback, a real image made of what the machine has, a link slowed to an everyday one, and one
//! program started from that image twice: after a full pull, and lazily.

use std::fs;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use loris_convert::image::convert_image;
use loris_format::limits::Limits;
use loris_mount::probe::{Wish, probe};
use serde::Serialize;

use crate::{
    Global,
    convert::defaults,
    engine::EngineArgument,
    failure::{self, Outcome},
    progress::Bars,
    stage::{Crossed, LinkArguments, Stage, ourselves},
    table::{bytes, table},
};

mod image;
mod machine;

/// Show the main job on this machine: one image, pulled whole and lazily.
#[derive(Args)]
pub(crate) struct DemoArguments {
    #[command(flatten)]
    link: LinkArguments,
    /// Content of the image, in MB (10^6 bytes) before compression
    #[arg(long, default_value_t = 500, value_name = "MB", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    size: u64,
    #[command(flatten)]
    engine: EngineArgument,
}

/// The image's name in the demo's registry.
const REPOSITORY: &str = "demo/machine:latest";

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    /// All of the image's blobs and its manifest, compressed, as a registry holds them.
    image_bytes: u64,
    pull: Crossed,
    lazy: Crossed,
}

impl DemoArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        let missing: Vec<String> = probe().missing_for(Wish::ReadWrite).iter().map(ToString::to_string).collect();
        if !missing.is_empty() {
            bail!("the demo mounts an image and runs a container; this machine lacks:\n  {}", missing.join("\n  "));
        }
        let say = |text: &str| {
            if !global.quiet {
                eprintln!("{text}");
            }
        };
        let stage = Stage::set(self.link.options())?;
        let wanted = self.size * 1_000_000;
        say(&format!("making an image of {} out of this machine's files", bytes(wanted)));
        let plan = machine::plan(wanted)?;
        let image_bytes = prepare(global, &plan, &stage, REPOSITORY, say).await?;
        let program = plan.command.first().map_or("", String::as_str);
        say(&format!("starting {program} from it over a link of {}: a full pull, then lazily", self.link));
        let pull = start(&stage, "pull", &["--no-lazy".to_owned()]).context("the full pull")?;
        let lazy = start(&stage, "lazy", &self.engine.arguments()).context("the lazy start")?;
        stage.clear().await?;

        let report = Report { image_bytes, pull, lazy };
        if global.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            print!("{}", report.to_table());
        }
        Ok(Outcome::Done)
    }
}

/// Makes an image like the demo's for a benchmark, spread over some layers where that is asked for, and returns its name
/// in the stage's registry.
pub(crate) async fn stand_in(
    global: &Global,
    stage: &Stage,
    repository: &str,
    wanted: u64,
    layers: Option<usize>,
) -> Result<String> {
    let mut plan = machine::plan(wanted)?;
    if let Some(layers) = layers {
        plan.spread(layers);
    }
    prepare(global, &plan, stage, repository, |_| ()).await?;
    Ok(stage.direct(repository))
}

/// Makes the image, converts it and pushes it; returns its size in the registry.
async fn prepare(
    global: &Global,
    plan: &machine::Plan,
    stage: &Stage,
    repository: &str,
    say: impl Fn(&str),
) -> Result<u64> {
    let folder = stage.folder().join("plain");
    let layout = format!("oci:{}:demo", folder.display());
    let sink = global.access.sink(&layout).await?;
    image::write(plan, stage.folder(), &*sink).await?;
    say("converting it to eStargz and pushing it to a registry on loopback");
    let source = global.access.source(&layout).await?;
    let reference = stage.direct(repository);
    let sink = global.access.sink(&reference).await?;
    let bars = Bars::new(global);
    convert_image(&*source, &*sink, &defaults(), &bars).await?;
    bars.finish();
    fs::remove_dir_all(&folder)?;

    let source = global.access.source(&reference).await?;
    let (document, manifest) = loris_oci::platform::resolve_manifest(&*source, None, &Limits::default()).await?;
    let layers: u64 = manifest.layers.iter().map(|layer| layer.size).sum();
    Ok(layers + manifest.config.size + document.bytes.len() as u64)
}

/// Runs the image's program in a process of its own, as a user would.
fn start(stage: &Stage, cache: &str, flags: &[String]) -> Result<Crossed> {
    let mut command = ourselves()?;
    command
        .args(["run", "--rm", "--net", "none", "--complete", "never", "--plain-http", "--cache-dir"])
        .arg(stage.folder().join(cache));
    command.args(flags).arg(stage.linked(REPOSITORY));
    stage.run(&mut command)
}

impl Report {
    fn to_table(&self) -> String {
        let row = |name: &str, start: &Crossed| {
            vec![
                name.to_owned(),
                format!("{:.2} s", start.seconds),
                bytes(start.bytes),
                start.requests.to_string(),
                format!("{:.1} %", 100.0 * start.bytes as f64 / self.image_bytes as f64),
            ]
        };
        let head = ["", ">first output", ">fetched", ">requests", ">of the image"].map(str::to_owned).to_vec();
        let mut text = table(&[head, row("full pull", &self.pull), row("lazy", &self.lazy)]);
        text.push_str(&format!(
            "image of {}; the lazy start took 1/{:.1} of the time\n",
            bytes(self.image_bytes),
            self.pull.seconds / self.lazy.seconds
        ));
        text
    }
}
