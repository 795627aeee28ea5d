//! `cache ls` and `cache du`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use loris_lazy::{StoredLayer, Totals};
use serde::Serialize;

use super::Place;
use crate::{
    Global,
    failure::{self, Outcome},
    table::{bytes, printable, short_digest, table},
};

/// List layers.
#[derive(Args)]
pub(crate) struct LsArguments {
    #[command(flatten)]
    place: Place,
}

/// Show how much of the disk is used.
#[derive(Args)]
pub(crate) struct DuArguments {
    #[command(flatten)]
    place: Place,
}

/// A layer as `--json` shows it.
#[derive(Serialize)]
pub(super) struct JsonLayer<'a> {
    digest: &'a str,
    toc: &'a str,
    directory: String,
    images: &'a [String],
    vouched: bool,
    extents_filled: u64,
    extents_total: u64,
    allocated_bytes: u64,
    /// Seconds since 1970.
    last_used: u64,
    in_use: bool,
    pinned: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    verdict: Option<&'a str>,
}

impl<'a> From<&'a StoredLayer> for JsonLayer<'a> {
    fn from(layer: &'a StoredLayer) -> Self {
        Self {
            digest: &layer.blob,
            toc: &layer.toc,
            directory: layer.directory.display().to_string(),
            images: &layer.origins,
            vouched: layer.vouched,
            extents_filled: layer.extents_filled,
            extents_total: layer.extents_total,
            allocated_bytes: layer.allocated_bytes,
            last_used: layer.last_used.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            in_use: layer.in_use,
            pinned: layer.pinned,
            verdict: layer.verdict.as_deref(),
        }
    }
}

#[derive(Serialize)]
struct JsonTotals {
    layers: u64,
    layers_in_use: u64,
    layers_pinned: u64,
    layer_bytes: u64,
    reclaimable_bytes: u64,
    bootstraps: u64,
    bootstrap_bytes: u64,
    total_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    quota_bytes: Option<u64>,
}

impl LsArguments {
    pub(super) fn run(self, global: &Global) -> failure::Result {
        let layers = self.place.open()?.census()?;
        if global.json {
            let layers: Vec<JsonLayer<'_>> = layers.iter().map(JsonLayer::from).collect();
            println!("{}", serde_json::to_string_pretty(&layers)?);
        } else {
            print!("{}", list(&layers, SystemTime::now()));
        }
        Ok(Outcome::Done)
    }
}

impl DuArguments {
    pub(super) fn run(self, global: &Global) -> failure::Result {
        let store = self.place.open()?;
        let (totals, quota_bytes) = (store.totals()?, store.quota_bytes());
        if global.json {
            let Totals { layers, layers_in_use, layers_pinned, layer_bytes, .. } = totals;
            let Totals { reclaimable_bytes, bootstraps, bootstrap_bytes, total_bytes, .. } = totals;
            let totals = JsonTotals {
                layers,
                layers_in_use,
                layers_pinned,
                layer_bytes,
                reclaimable_bytes,
                bootstraps,
                bootstrap_bytes,
                total_bytes,
                quota_bytes,
            };
            println!("{}", serde_json::to_string_pretty(&totals)?);
        } else {
            print!("{}", add_up(&totals, quota_bytes));
        }
        Ok(Outcome::Done)
    }
}

/// Lays out layers for people.
pub(super) fn list(layers: &[StoredLayer], now: SystemTime) -> String {
    let mut rows = vec![["layer", "image", ">here", ">size", ">used", "state"].map(str::to_owned).to_vec()];
    rows.extend(layers.iter().map(|layer| {
        vec![
            short_digest(&layer.blob),
            layer.origins.first().map_or_else(|| "-".to_owned(), |origin| printable(origin.as_bytes())),
            part(layer.extents_filled, layer.extents_total),
            bytes(layer.allocated_bytes),
            ago(now.duration_since(layer.last_used).unwrap_or_default()),
            state(layer),
        ]
    }));
    table(&rows)
}

fn state(layer: &StoredLayer) -> String {
    let states = [(layer.in_use, "in use"), (layer.pinned, "pinned"), (!layer.vouched, "unverified")];
    let mut states: Vec<_> =
        states.into_iter().filter(|(is_so, _)| *is_so).map(|(_, state)| state.to_owned()).collect();
    states.extend(layer.verdict.as_ref().map(|verdict| printable(verdict.as_bytes())));
    states.join(", ")
}

/// How much of a layer is here: `all`, or percent, which are 100 only where it is all; `-` where there is nothing to have.
fn part(filled: u64, total: u64) -> String {
    match filled.saturating_mul(100).checked_div(total) {
        None => "-".to_owned(),
        Some(_) if filled == total => "all".to_owned(),
        Some(percent) => format!("{percent} %"),
    }
}

/// Shows how long ago something was: `now`, `5 min`, `3 h`, `12 d`.
fn ago(age: Duration) -> String {
    match age.as_secs() {
        0..60 => "now".to_owned(),
        seconds @ 60..3600 => format!("{} min", seconds / 60),
        seconds @ 3600..86_400 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

fn add_up(totals: &Totals, quota: Option<u64>) -> String {
    let other = totals.total_bytes.saturating_sub(totals.layer_bytes).saturating_sub(totals.bootstrap_bytes);
    let percent = (totals.reclaimable_bytes.saturating_mul(100)).checked_div(totals.layer_bytes).unwrap_or(0);
    let row = |cells: [&str; 6]| cells.map(str::to_owned).to_vec();
    let number = |count: u64| count.to_string();
    let mut rows = vec![
        row(["type", ">total", ">in use", ">pinned", ">size", ">reclaimable"]),
        row([
            "layers",
            &number(totals.layers),
            &number(totals.layers_in_use),
            &number(totals.layers_pinned),
            &bytes(totals.layer_bytes),
            &format!("{} ({percent} %)", bytes(totals.reclaimable_bytes)),
        ]),
        row(["bootstraps", &number(totals.bootstraps), "", "", &bytes(totals.bootstrap_bytes), ""]),
        row(["other", "", "", "", &bytes(other), ""]),
        row(["all", "", "", "", &bytes(totals.total_bytes), ""]),
    ];
    rows.extend(quota.map(|quota| row(["quota", "", "", "", &bytes(quota), ""])));
    table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(number: u64) -> StoredLayer {
        StoredLayer {
            directory: "/store/layers/b/t".into(),
            blob: format!("sha256:{number:012x}{:052x}", 0),
            toc: format!("sha256:{:064x}", number + 1),
            vouched: true,
            origins: vec!["registry.example/app:1".to_owned()],
            extents_filled: 0,
            extents_total: 1000,
            allocated_bytes: 300 << 20,
            last_used: UNIX_EPOCH,
            in_use: false,
            pinned: false,
            verdict: None,
        }
    }

    #[test]
    fn layers_are_listed() {
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(1_000_000 - seconds);
        let layers = [
            StoredLayer { extents_filled: 1000, in_use: true, pinned: true, last_used: at(5), ..layer(0xabc) },
            StoredLayer { extents_filled: 999, vouched: false, last_used: at(7300), ..layer(0xdef) },
            StoredLayer { origins: vec![], verdict: Some("proven".to_owned()), last_used: at(900_000), ..layer(3) },
            StoredLayer {
                origins: vec!["bad\x1b[31m".to_owned()],
                last_used: at(0) + Duration::from_secs(9),
                ..layer(4)
            },
        ];
        insta::assert_snapshot!(list(&layers, at(0)), @r"
        layer         image                   here     size  used  state
        000000000abc  registry.example/app:1   all  300 MiB   now  in use, pinned
        000000000def  registry.example/app:1  99 %  300 MiB   2 h  unverified
        000000000003  -                        0 %  300 MiB  10 d  proven
        000000000004  bad\x1b[31m              0 %  300 MiB   now
        ");
        let json = serde_json::to_string_pretty(&JsonLayer::from(&layers[0])).unwrap_or_default();
        insta::assert_snapshot!(json, @r#"
        {
          "digest": "sha256:000000000abc0000000000000000000000000000000000000000000000000000",
          "toc": "sha256:0000000000000000000000000000000000000000000000000000000000000abd",
          "directory": "/store/layers/b/t",
          "images": [
            "registry.example/app:1"
          ],
          "vouched": true,
          "extents_filled": 1000,
          "extents_total": 1000,
          "allocated_bytes": 314572800,
          "last_used": 999995,
          "in_use": true,
          "pinned": true
        }
        "#);
    }

    #[test]
    fn totals_are_added_up() {
        let totals = Totals {
            layers: 12,
            layers_in_use: 3,
            layers_pinned: 1,
            layer_bytes: 4 << 30,
            reclaimable_bytes: 3 << 30,
            bootstraps: 4,
            bootstrap_bytes: 5 << 20,
            total_bytes: (4 << 30) + (6 << 20),
        };
        insta::assert_snapshot!(add_up(&totals, Some(10 << 30)), @r"
        type        total  in use  pinned      size     reclaimable
        layers         12       3       1   4.0 GiB  3.0 GiB (75 %)
        bootstraps      4                   5.0 MiB
        other                               1.0 MiB
        all                                 4.0 GiB
        quota                              10.0 GiB
        ");
        insta::assert_snapshot!(add_up(&Totals::default(), None), @r"
        type        total  in use  pinned  size  reclaimable
        layers          0       0       0   0 B    0 B (0 %)
        bootstraps      0                   0 B
        other                               0 B
        all                                 0 B
        ");
    }
}
