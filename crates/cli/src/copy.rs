//! `copy`, and its aliases `pull`, `push`, `save` and `load`, which differ in what a name without a transport means.

use std::path::PathBuf;

use clap::Args;
use loris_convert::copy::{CopyOptions, copy_image};

use crate::{
    Global,
    access::{self, Selection},
    failure::{self, Outcome},
    progress::Bars,
};

/// Copy an image between registries, layouts and archives.
#[derive(Args)]
pub(crate) struct CopyArguments {
    /// The image: a registry's `name:tag`, `oci:DIR[:TAG]`, `oci-archive:FILE`, `docker-archive:FILE`, or `-`
    source: String,
    /// Where it goes, named in the same way
    destination: String,
    #[command(flatten)]
    choice: Choice,
}

/// Copy an image from a registry to a file or directory.
#[derive(Args)]
pub(crate) struct PullArguments {
    /// The image
    source: String,
    /// Where it goes: a directory (OCI layout), a file ending in `.tar` (OCI archive), or a name with a transport
    destination: String,
    #[command(flatten)]
    choice: Choice,
}

/// Copy an image from a file or directory to a registry.
#[derive(Args)]
pub(crate) struct PushArguments {
    /// A directory (OCI layout), an archive, or a name with a transport
    source: String,
    /// The image's name in the registry
    destination: String,
    #[command(flatten)]
    choice: Choice,
}

/// Write an image to an archive.
#[derive(Args)]
pub(crate) struct SaveArguments {
    /// The image
    source: String,
    /// The archive; standard output where it is not given
    #[arg(long, short, default_value = "-")]
    output: String,
    /// The archive's format
    #[arg(long, default_value = "oci-archive", value_parser = ["oci-archive", "docker-archive"])]
    format: String,
    #[command(flatten)]
    choice: Choice,
}

/// Read an image from an archive.
#[derive(Args)]
pub(crate) struct LoadArguments {
    /// Where it goes
    destination: String,
    /// The archive; standard input where it is not given
    #[arg(long, short, default_value = "-")]
    input: String,
    #[command(flatten)]
    choice: Choice,
}

#[derive(Args)]
struct Choice {
    #[command(flatten)]
    selection: Selection,
    /// Leave out what refers to the image (signatures, attestations, indexes)
    #[arg(long)]
    no_referrers: bool,
}

impl CopyArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        copy(global, &self.source, &self.destination, &self.choice).await
    }
}

impl PullArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        copy(global, &self.source, &as_file(&self.destination), &self.choice).await
    }
}

impl PushArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        copy(global, &as_file(&self.source), &self.destination, &self.choice).await
    }
}

impl SaveArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        let destination = match (self.output.as_str(), self.format.as_str()) {
            ("-", "oci-archive") => "-".to_owned(),
            ("-", _) => {
                return Err(failure::Usage("a Docker archive needs a file: --output FILE".into()).into());
            }
            (file, format) if !access::has_transport(file) => format!("{format}:{file}"),
            (name, _) => name.to_owned(),
        };
        copy(global, &self.source, &destination, &self.choice).await
    }
}

impl LoadArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        copy(global, &as_file(&self.input), &self.destination, &self.choice).await
    }
}

async fn copy(global: &Global, source: &str, destination: &str, choice: &Choice) -> failure::Result {
    let access = &global.access;
    let from = access.source(source).await?;
    let to = access.sink(destination).await?;
    let options = CopyOptions {
        platforms: choice.selection.platforms(),
        referrers: !choice.no_referrers,
        ..CopyOptions::default()
    };
    let bars = Bars::new(global);
    let report = copy_image(&*from, &*to, &options, &bars).await?;
    bars.finish();
    access::print_written(global, destination, &report.digest, &report)?;
    Ok(Outcome::Done)
}

/// Reads a name without a transport as a file or directory, as `crane` and `podman load` do.
fn as_file(name: &str) -> String {
    if name == "-" || access::has_transport(name) {
        return name.to_owned();
    }
    let path = PathBuf::from(name);
    let archive = if path.exists() { path.is_file() } else { has_archive_ending(name) };
    if !archive {
        return format!("oci:{name}");
    }
    let transport = if access::is_docker_archive(&path) { "docker-archive" } else { "oci-archive" };
    format!("{transport}:{name}")
}

fn has_archive_ending(name: &str) -> bool {
    [".tar", ".tar.gz", ".tgz"].iter().any(|ending| name.ends_with(ending))
}
