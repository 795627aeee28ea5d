//! `explain`: whether an image or a container is lazy under containerd, what is not and why, and what was waited for.

use std::{collections::BTreeSet, path::PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;
use loris_snapshotter::report::{LayerReport, Report, SnapshotReport};
use serde::Serialize;

use crate::{
    Global,
    failure::{self, Outcome},
    table::{bytes, printable, short_digest, table},
};

/// Show whether an image or a container is lazy under containerd, which layers are not and why.
#[derive(Args)]
pub(crate) struct ExplainArguments {
    /// An image as containerd names it, or a container's identifier
    name: String,
    /// The snapshotter's directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/loris-snapshotter")]
    root: PathBuf,
}

#[derive(Serialize)]
struct Explanation<'a> {
    name: &'a str,
    is_lazy: bool,
    layers: Vec<&'a SnapshotReport>,
}

impl ExplainArguments {
    pub(crate) fn run(self, global: &Global) -> failure::Result {
        let report = Report::ask(&self.root)
            .with_context(|| format!("asking the snapshotter in {} (is it running?)", self.root.display()))?;
        let layers = find(&report, &self.name);
        if layers.is_empty() {
            let known: BTreeSet<&str> =
                report.snapshots.iter().filter_map(|snapshot| snapshot.image.as_deref()).collect();
            bail!("the snapshotter knows no image or container {}; images: {}", self.name, listed(&known));
        }
        let is_lazy = layers.iter().all(|layer| layer.is_lazy);
        let explanation = Explanation { name: &self.name, is_lazy, layers };
        if global.json {
            println!("{}", serde_json::to_string_pretty(&explanation)?);
        } else {
            print!("{}", explanation.show());
        }
        Ok(Outcome::Done)
    }
}

fn listed(names: &BTreeSet<&str>) -> String {
    match names.iter().map(|name| printable(name.as_bytes())).collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => "none".to_owned(),
        names => names,
    }
}

/// Returns the layers of a container's chain, or of an image, the lowest first.
fn find<'a>(report: &'a Report, name: &str) -> Vec<&'a SnapshotReport> {
    // containerd's names are NAMESPACE/NUMBER/NAME; identifiers may be cut, as people do.
    let is_container = |snapshot: &&SnapshotReport| {
        let own = snapshot.name.splitn(3, '/').last().unwrap_or_default();
        snapshot.is_in_use && !name.is_empty() && own.starts_with(name)
    };
    if let Some(container) = report.snapshots.iter().find(is_container) {
        let mut chain = report.chain(container);
        chain.retain(|snapshot| !snapshot.is_in_use);
        return chain;
    }
    let of_image = |snapshot: &&SnapshotReport| !snapshot.is_in_use && snapshot.image.as_deref() == Some(name);
    // Layers that it shares with others may be known by another's name.
    let top = report.snapshots.iter().filter(of_image).max_by_key(|snapshot| report.chain(snapshot).len());
    top.map(|top| report.chain(top)).unwrap_or_default()
}

impl Explanation<'_> {
    fn show(&self) -> String {
        let lazy = self.layers.iter().filter(|layer| layer.is_lazy).count();
        let mut shown = match (lazy, self.layers.len()) {
            (lazy, all) if lazy == all => format!("{}: lazy, all {all} layers\n\n", printable(self.name.as_bytes())),
            (0, all) => format!("{}: not lazy, none of {all} layers\n\n", printable(self.name.as_bytes())),
            (lazy, all) => format!("{}: lazy in part, {lazy} of {all} layers\n\n", printable(self.name.as_bytes())),
        };
        let head = ["layer", "lazy", ">opened after", ">here", ">waits", ">waited", ">on demand", ">ahead", ">rest"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        rows.extend(self.layers.iter().map(|layer| row(layer)));
        shown.push_str(&table(&rows));
        for layer in &self.layers {
            if let Some(reason) = &layer.fallback {
                let name = layer.layer.as_deref().map_or_else(|| "a layer".to_owned(), short_digest);
                shown.push_str(&format!("\n{name} was pulled: {}", printable(reason.as_bytes())));
            }
        }
        if self.layers.iter().any(|layer| layer.fallback.is_some()) {
            shown.push('\n');
        }
        shown.push_str(&self.waterfall());
        shown
    }

    /// What the client waited for when it pulled, and the workload since, one under the other on one scale.
    fn waterfall(&self) -> String {
        const WIDTH: u64 = 40;
        let end = self.layers.iter().filter_map(|layer| Some(layer.opening_ms?.1)).max().unwrap_or(0).max(1);
        let place = |at: u64| usize::try_from(at * WIDTH / end).unwrap_or(0);
        let mut shown = String::new();
        for layer in &self.layers {
            let (Some((manifest, opened)), Some(digest)) = (layer.opening_ms, &layer.layer) else { continue };
            let bar =
                format!("{}{}", "m".repeat(place(manifest)), "=".repeat(place(opened.saturating_sub(manifest)).max(1)));
            shown.push_str(&format!("{}  {bar:<41} {opened} ms\n", short_digest(digest)));
        }
        if shown.is_empty() {
            return shown;
        }
        format!("\nuntil layers were open (m: finding the manifest, =: reading the table of contents)\n{shown}")
    }
}

fn row(layer: &SnapshotReport) -> Vec<String> {
    let digest = layer.layer.as_deref().map_or_else(|| "-".to_owned(), short_digest);
    let opened = layer.opening_ms.map_or_else(|| "-".to_owned(), |(_, opened)| format!("{opened} ms"));
    let mut row = vec![digest, if layer.is_lazy { "yes" } else { "no" }.to_owned(), opened];
    let Some(LayerReport {
        extents,
        waits,
        waited_ms,
        demand_bytes,
        prefetch_bytes,
        read_ahead_bytes,
        completion_bytes,
        ..
    }) = &layer.activity
    else {
        row.extend(std::iter::repeat_n("-".to_owned(), 6));
        return row;
    };
    let here = u128::from(extents.0) * 100 / u128::from(extents.1.max(1));
    row.extend([
        format!("{here} %"),
        waits.to_string(),
        format!("{waited_ms} ms"),
        bytes(*demand_bytes),
        bytes(prefetch_bytes + read_ahead_bytes),
        bytes(*completion_bytes),
    ]);
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(name: &str, parent: Option<&str>, image: Option<&str>, lazy: bool) -> SnapshotReport {
        SnapshotReport {
            name: name.to_owned(),
            parent: parent.map(str::to_owned),
            is_in_use: name.contains('/'),
            image: image.map(str::to_owned),
            layer: Some(format!("sha256:{}", name.repeat(64).get(..64).unwrap_or_default())),
            is_lazy: lazy,
            fallback: (!lazy).then(|| "it is empty".to_owned()),
            opening_ms: lazy.then_some((20, 40)),
            activity: None,
        }
    }

    #[test]
    fn images_and_containers_are_found() {
        let snapshots = vec![
            snapshot("a", None, Some("base"), true),
            snapshot("b", Some("a"), Some("image"), false),
            snapshot("default/7/web-1", Some("b"), None, false),
            snapshot("default/8/other", Some("a"), None, false),
        ];
        let report = Report { snapshots };
        for (name, expected) in [
            ("image", vec!["a", "b"]),
            ("base", vec!["a"]),
            ("web-1", vec!["a", "b"]),
            ("web", vec!["a", "b"]),
            ("other", vec!["a"]),
            ("missing", vec![]),
            ("", vec![]),
        ] {
            let found: Vec<&str> = find(&report, name).iter().map(|layer| layer.name.as_str()).collect();
            assert_eq!(found, expected, "{name:?}");
        }
        let shown = Explanation { name: "image", is_lazy: false, layers: find(&report, "image") }.show();
        for part in ["lazy in part, 1 of 2 layers", "was pulled: it is empty", "mmmm", "40 ms"] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
    }
}
