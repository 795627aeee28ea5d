//! `cache`: what is kept of images, and what of it goes.

mod listing;
mod pins;
mod prune;
mod verify;

use anyhow::bail;
use clap::{Args, Subcommand};
use loris_lazy::{Store, StoredLayer};

use crate::{Global, access, failure, opened::StorePlace};

/// Show, check and clean what was kept of images.
#[derive(Subcommand)]
pub(crate) enum CacheCommand {
    /// List layers
    Ls(listing::LsArguments),
    /// Show how much of the disk is used
    Du(listing::DuArguments),
    /// Remove layers that nobody uses, and what is left behind of others
    Prune(prune::PruneArguments),
    /// Hash what is there again; what is wrong will be fetched anew
    Verify(verify::VerifyArguments),
    /// Keep layers from being removed
    Pin(pins::PinArguments),
    /// Let layers be removed again
    Unpin(pins::PinArguments),
}

impl CacheCommand {
    pub(crate) fn run(self, global: &Global) -> failure::Result {
        match self {
            Self::Ls(arguments) => arguments.run(global),
            Self::Du(arguments) => arguments.run(global),
            Self::Prune(arguments) => arguments.run(global),
            Self::Verify(arguments) => arguments.run(global),
            Self::Pin(arguments) => arguments.run(global, true),
            Self::Unpin(arguments) => arguments.run(global, false),
        }
    }
}

/// The cache that a verb is about.
#[derive(Args)]
struct Place {
    #[command(flatten)]
    place: StorePlace,
}

impl Place {
    fn open(&self) -> anyhow::Result<Store> {
        self.place.open()
    }
}

/// Picks layers by what a user calls them: an image that they were opened for, or a layer's digest or the beginning of it.
fn pick<'a>(layers: &'a [StoredLayer], name: &str) -> anyhow::Result<Vec<&'a StoredLayer>> {
    const SHORTEST: usize = 6;
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    let is_digest = |layer: &StoredLayer| {
        layer.blob == name
            || (hex.len() >= SHORTEST && layer.blob.strip_prefix("sha256:").is_some_and(|blob| blob.starts_with(hex)))
    };
    let image = access::parse(name).ok();
    let is_image = |layer: &StoredLayer| {
        layer.origins.iter().any(|origin| {
            origin == name
                || image.as_ref().is_some_and(|image| access::parse(origin).is_ok_and(|origin| origin == *image))
        })
    };
    let picked: Vec<_> = layers.iter().filter(|layer| is_digest(layer) || is_image(layer)).collect();
    if picked.is_empty() {
        bail!("{name} is no image or layer in the cache (`loris cache ls`)");
    }
    Ok(picked)
}
