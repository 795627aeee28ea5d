//! `copy`, and its aliases `pull`, `push`, `save` and `load`, which differ in what a name without a transport means.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::Context as _;
use clap::Args;
use loris_convert::copy::{CopyOptions, copy_image};
use loris_oci::{
    document::REF_NAME,
    layout::CONTAINERD_NAME,
    name::{ImageName, Selector},
    reference::Reference,
};
use loris_snapshotter::containerd::whole;

use crate::{
    Global,
    access::{self, Selection},
    failure::{self, Outcome},
    progress::Bars,
};

/// Copy an image between registries, layouts, archives and containerd's store. From an image of containerd's to itself, it
/// fetches what a lazy pull has left out there.
#[derive(Args)]
pub(crate) struct CopyArguments {
    /// The image: a registry's `name:tag`, `oci:DIR[:TAG]`, `oci-archive:FILE`, `docker-archive:FILE`,
    /// `containerd:[NAMESPACE/]NAME`, or `-`
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
        copy_as(global, &self.source, &destination, &self.choice, names(&self.source)).await
    }
}

/// Returns what an archive says of the name that an image had: as Podman writes it, and as containerd and Docker do.
fn names(source: &str) -> BTreeMap<String, String> {
    let name = match source.parse() {
        Ok(ImageName::Registry(reference) | ImageName::Containerd { reference, .. }) if reference.tag().is_some() => {
            reference.without_digest().canonical()
        }
        Ok(ImageName::DockerArchive { selector: Selector { name: Some(name), .. }, .. }) => name,
        // In a layout a tag may stand alone; then it is no name for the world outside.
        Ok(
            ImageName::Layout { selector: Selector { name: Some(name), .. }, .. }
            | ImageName::OciArchive { selector: Selector { name: Some(name), .. }, .. },
        ) => {
            let whole = name.parse::<Reference>().is_ok_and(|reference| reference.canonical() == name);
            if !whole {
                return [(REF_NAME.to_owned(), name)].into();
            }
            name
        }
        _ => return BTreeMap::new(),
    };
    [(REF_NAME.to_owned(), name.clone()), (CONTAINERD_NAME.to_owned(), name)].into()
}

impl LoadArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        copy(global, &as_file(&self.input), &self.destination, &self.choice).await
    }
}

async fn copy(global: &Global, source: &str, destination: &str, choice: &Choice) -> failure::Result {
    copy_as(global, source, destination, choice, BTreeMap::new()).await
}

async fn copy_as(
    global: &Global,
    source: &str,
    destination: &str,
    choice: &Choice,
    annotations: BTreeMap<String, String>,
) -> failure::Result {
    if let Some((namespace, reference)) = same_in_containerd(source, destination) {
        return complete(global, source, namespace.as_deref(), &reference).await;
    }
    let access = &global.access;
    let from = access.source(source).await?;
    let to = access.sink(destination).await?;
    let options = CopyOptions {
        platforms: choice.selection.platforms(),
        referrers: !choice.no_referrers,
        annotations,
        ..CopyOptions::default()
    };
    let bars = Bars::new(global);
    let copied = copy_image(&*from, &*to, &options, &bars).await;
    let mut report = copied.with_context(|| access::doing("copying", source))?;
    bars.finish();
    if let Ok(ImageName::DockerArchive { path, selector }) = destination.parse() {
        if report.lazy {
            let lost = "a Docker archive holds uncompressed layers: the image in it is not lazily pullable; \
                        an OCI archive's is (`oci-archive:FILE`, `--format oci-archive`)";
            if !global.quiet {
                eprintln!("loris: {lost}");
            }
            report.warnings.push(lost.to_owned());
            report.lazy = false;
        }
        // There are no manifests in it: what is read from it has one of its own. A pipe can't be read again.
        if path.is_file() {
            let written = ImageName::DockerArchive { path, selector: Selector { digest: None, ..selector } };
            report.digest = access.source(&written.to_string()).await?.root().await?.digest;
        }
    }
    access::print_written(global, destination, &report.digest, &report)?;
    Ok(Outcome::Done)
}

/// Returns the image of containerd's that both names are.
fn same_in_containerd(source: &str, destination: &str) -> Option<(Option<String>, Reference)> {
    let (Ok(ImageName::Containerd { namespace, reference }), Ok(to)) = (source.parse(), destination.parse()) else {
        return None;
    };
    let is_same = matches!(&to, ImageName::Containerd { namespace: other, reference: to }
        if *other == namespace && to.without_digest() == reference.without_digest());
    is_same.then_some((namespace, reference))
}

/// Fetches what containerd's store has not got of an image.
async fn complete(global: &Global, name: &str, namespace: Option<&str>, reference: &Reference) -> failure::Result {
    let doing = || access::doing("completing", name);
    let source = global.access.containerd_source(namespace, reference).await.with_context(doing)?;
    let sink = access::containerd_sink(namespace, reference).await.with_context(doing)?;
    let bars = Bars::new(global);
    let completed = whole::complete(&source, &sink, &bars).await.with_context(doing)?;
    bars.finish();
    access::print_written(global, name, &completed.digest, &completed)?;
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
