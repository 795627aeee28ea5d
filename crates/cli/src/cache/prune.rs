//! `cache prune`.

use std::time::{Duration, SystemTime};

use clap::Args;
use loris_format::amounts;
use loris_lazy::{PruneOptions, Pruned};
use serde::Serialize;

use super::{
    Place,
    listing::{JsonLayer, list},
};
use crate::{
    Global,
    failure::{self, Outcome},
    table::bytes,
};

/// Remove layers that nobody uses, and what is left behind of others.
///
/// What is in use or pinned stays. Without an option, only what is left behind goes: of processes that were killed, and
/// of layers that are gone.
#[derive(Args)]
pub(crate) struct PruneArguments {
    /// Remove all layers that nobody uses
    #[arg(long, short, conflicts_with_all = ["older_than", "keep_bytes"])]
    all: bool,
    /// Remove layers that were not used for so long, such as `7d`
    #[arg(long, value_name = "TIME", value_parser = amounts::duration)]
    older_than: Option<Duration>,
    /// Remove layers until no more than so much is left, such as `10G`; the longest unused first
    #[arg(long, value_name = "SIZE", value_parser = amounts::size)]
    keep_bytes: Option<u64>,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    place: Place,
}

#[derive(Serialize)]
struct Report<'a> {
    dry_run: bool,
    layers: Vec<JsonLayer<'a>>,
    other_files: u64,
    freed_bytes: u64,
}

impl PruneArguments {
    pub(super) fn run(self, global: &Global) -> failure::Result {
        let Self { all, older_than, keep_bytes, dry_run, place } = self;
        let pruned = place.open()?.prune(&PruneOptions { all, older_than, keep_bytes, dry_run })?;
        if global.json {
            let layers = pruned.layers.iter().map(JsonLayer::from).collect();
            let Pruned { other_files, freed_bytes, .. } = pruned;
            println!("{}", serde_json::to_string_pretty(&Report { dry_run, layers, other_files, freed_bytes })?);
        } else {
            print!("{}", to_text(&pruned, dry_run, SystemTime::now()));
        }
        Ok(Outcome::Done)
    }
}

fn to_text(pruned: &Pruned, dry_run: bool, now: SystemTime) -> String {
    let layers = if pruned.layers.is_empty() { String::new() } else { list(&pruned.layers, now) + "\n" };
    let would = if dry_run { "would free" } else { "freed" };
    let count = |count: u64, one: &str| if count == 1 { format!("1 {one}") } else { format!("{count} {one}s") };
    let layer_count = count(pruned.layers.len() as u64, "layer");
    let file_count = count(pruned.other_files, "other file");
    format!("{layers}{would} {} ({layer_count}, {file_count})\n", bytes(pruned.freed_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_freed_is_said() {
        let pruned = Pruned { layers: vec![], other_files: 1, freed_bytes: 5 << 20 };
        assert_eq!(to_text(&pruned, false, SystemTime::UNIX_EPOCH), "freed 5.0 MiB (0 layers, 1 other file)\n");
        assert_eq!(
            to_text(&Pruned::default(), true, SystemTime::UNIX_EPOCH),
            "would free 0 B (0 layers, 0 other files)\n"
        );
    }
}
