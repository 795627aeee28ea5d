//! `status`: what of images is here, and what is being fetched and why.

use std::collections::{BTreeMap, HashMap};

use anyhow::Context as _;
use clap::Args;
use loris_lazy::StoredLayer;
use serde::Serialize;

use crate::{
    Global,
    activity::{self, Activity, LayerActivity},
    failure::{self, Outcome},
    opened::StorePlace,
    table::{bytes, printable, short_digest, table},
};

/// Show what of images is here, who uses it, and what is being fetched and why.
#[derive(Args)]
pub(crate) struct StatusArguments {
    /// Only this image
    image: Option<String>,
    /// Show each layer
    #[arg(long)]
    layers: bool,
    #[command(flatten)]
    place: StorePlace,
}

#[derive(Serialize)]
struct Report {
    images: Vec<Image>,
    /// Processes that use images at the moment.
    processes: Vec<Activity>,
}

#[derive(Serialize)]
struct Image {
    name: String,
    layers: Vec<Layer>,
}

#[derive(Serialize)]
struct Layer {
    digest: String,
    extents_filled: u64,
    extents_total: u64,
    allocated_bytes: u64,
    in_use: bool,
    verdict: Option<String>,
}

impl StatusArguments {
    pub(crate) fn run(self, global: &Global) -> failure::Result {
        let store = self.place.open()?;
        let wanted = |name: &str| self.image.as_deref().is_none_or(|image| image == name);
        let mut processes = activity::all(&store).context("finding out who uses the store")?;
        processes.retain(|activity| wanted(&activity.image));
        let mut images: BTreeMap<String, Vec<Layer>> = BTreeMap::new();
        for layer in store.census()? {
            for name in layer.origins.iter().filter(|name| wanted(name)) {
                images.entry(name.clone()).or_default().push(Layer::from(&layer));
            }
        }
        let images = images.into_iter().map(|(name, layers)| Image { name, layers }).collect();
        let report = Report { images, processes };
        if global.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print!("{}", report.show(self.layers));
        }
        Ok(Outcome::Done)
    }
}

impl From<&StoredLayer> for Layer {
    fn from(layer: &StoredLayer) -> Self {
        Self {
            digest: layer.blob.clone(),
            extents_filled: layer.extents_filled,
            extents_total: layer.extents_total,
            allocated_bytes: layer.allocated_bytes,
            in_use: layer.in_use,
            verdict: layer.verdict.clone(),
        }
    }
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "100 %".to_owned() } else { format!("{} %", u128::from(part) * 100 / u128::from(whole)) }
}

impl Report {
    fn show(&self, layers: bool) -> String {
        let head = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let mut rows = vec![head(&["image", ">layers", ">here", ">on disk", "state"])];
        for image in &self.images {
            let (filled, total, disk) = image.layers.iter().fold((0, 0, 0), |(filled, total, disk), layer| {
                (filled + layer.extents_filled, total + layer.extents_total, disk + layer.allocated_bytes)
            });
            let count = image.layers.len().to_string();
            rows.push(vec![
                printable(image.name.as_bytes()),
                count,
                percent(filled, total),
                bytes(disk),
                image.state(),
            ]);
            for layer in image.layers.iter().filter(|_| layers) {
                rows.push(vec![
                    format!("  {}", short_digest(&layer.digest)),
                    String::new(),
                    percent(layer.extents_filled, layer.extents_total),
                    bytes(layer.allocated_bytes),
                    layer.verdict.as_ref().map_or_else(String::new, |verdict| printable(verdict.as_bytes())),
                ]);
            }
        }
        let mut shown = table(&rows);
        if !self.processes.is_empty() {
            let mut rows = vec![head(&[
                "process",
                "image",
                "at",
                ">here",
                ">on demand",
                ">ahead",
                ">completing",
                ">now",
                ">waits",
                ">waited",
                ">errors",
            ])];
            for process in &self.processes {
                rows.push(process_row(process));
            }
            shown.push('\n');
            shown.push_str(&table(&rows));
        }
        shown
    }
}

impl Image {
    fn state(&self) -> String {
        let mut words: HashMap<&str, usize> = HashMap::new();
        for layer in &self.layers {
            let word = match &layer.verdict {
                Some(verdict) if verdict.starts_with("condemned") => "condemned",
                _ if layer.extents_filled < layer.extents_total => "partly here",
                Some(_) => "proven",
                None => "here",
            };
            *words.entry(word).or_default() += 1;
        }
        let order = ["condemned", "partly here", "here", "proven"];
        let said = order.iter().filter_map(|word| words.get(word).map(|count| (word, count)));
        match said.collect::<Vec<_>>()[..] {
            [(word, _)] => (*word).to_owned(),
            ref several => several.iter().map(|(word, count)| format!("{count} {word}")).collect::<Vec<_>>().join(", "),
        }
    }
}

fn process_row(process: &Activity) -> Vec<String> {
    let sum = |part: fn(&LayerActivity) -> u64| process.layers.iter().map(part).fold(0, u64::saturating_add);
    let waited: f64 = process.layers.iter().map(|layer| layer.waited_seconds).sum();
    let directory = process.directory.as_ref().map(|directory| directory.as_os_str().as_encoded_bytes());
    vec![
        format!("{} {}", process.verb, process.process),
        printable(process.image.as_bytes()),
        directory.map_or_else(|| "-".to_owned(), printable),
        percent(sum(|layer| layer.extents_filled), sum(|layer| layer.extents_total)),
        bytes(sum(|layer| layer.demand_bytes)),
        bytes(sum(|layer| layer.prefetch_bytes.saturating_add(layer.read_ahead_bytes))),
        bytes(sum(|layer| layer.completion_bytes)),
        format!("{}/s", bytes(sum(|layer| layer.bytes_per_second))),
        sum(|layer| layer.waits).to_string(),
        format!("{waited:.1} s"),
        sum(|layer| layer.errors).to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_images_state_names_its_worst_layer_first() {
        let layer = |filled, verdict: Option<&str>| Layer {
            digest: "sha256:0123456789abcdef".to_owned(),
            extents_filled: filled,
            extents_total: 10,
            allocated_bytes: 4096,
            in_use: false,
            verdict: verdict.map(str::to_owned),
        };
        let image = |layers| Image { name: "registry.example/a:1".to_owned(), layers };
        let sound = Some("sound sha256:00");
        assert_eq!(image(vec![layer(10, sound), layer(10, sound)]).state(), "proven");
        assert_eq!(
            image(vec![layer(10, sound), layer(3, None), layer(10, Some("condemned it is bad"))]).state(),
            "1 condemned, 1 partly here, 1 proven"
        );
        let report = Report { images: vec![image(vec![layer(10, sound), layer(3, None)])], processes: vec![] };
        insta::assert_snapshot!(report.show(true), @r"
        image                 layers   here  on disk  state
        registry.example/a:1       2   65 %  8.0 KiB  1 partly here, 1 proven
          0123456789ab                100 %  4.0 KiB  sound sha256:00
          0123456789ab                 30 %  4.0 KiB
        ");
    }
}
