//! What a start would take that wastes nothing: the bytes that are needed, at the link's rate; the round trips that
//! depend on each other; and what the same start takes with everything here, measured in the same run.

use std::{collections::BTreeSet, path::Path};

use anyhow::{Context as _, Result};
use loris_lazy::{FetchPolicy, Store, plan::fetched_range};
use serde::Serialize;

use crate::{
    Global,
    access::OnePlatform,
    measure::median,
    opened::{Looked, OpenLazily, Opened, listed},
    stage::{Crossed, LinkArguments},
    table::bytes,
};

/// A connection, the manifest, the tables of contents beside the configuration, content: none can be asked for before
/// the one before it is here.
const ROUND_TRIPS: u64 = 4;

/// What a workload needs of an image.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Needed {
    /// Documents, tables of contents, and the frames that hold what was read.
    bytes: u64,
    /// Round trips that depend on each other, whoever fetches.
    round_trips: u64,
    /// Reads that waited when nothing was fetched but on demand and ahead of it. Where nothing tells beforehand what a
    /// program reads next, each of them depends on the one before it.
    waits: u64,
}

/// How starts compare with the ideal.
#[derive(Debug, Serialize)]
pub(super) struct Ideal {
    #[serde(flatten)]
    needed: Needed,
    seconds: f64,
    /// With a round trip for each read that waited.
    seconds_with_waits: f64,
    /// Medians of the ratios in each round.
    lazy: f64,
    lazy_with_waits: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    listed: Option<f64>,
}

impl Needed {
    /// Looks into an image for what a run has recorded.
    pub(super) async fn of(global: &Global, image: &str, recorded: &Path, folder: &Path) -> Result<Self> {
        let store = Store::open(folder)?;
        let (platform, open) = (OnePlatform::default(), OpenLazily::default());
        let looked = Looked::open(global, image, &platform, &open, &store, FetchPolicy::EXACT).await?;
        let root = looked.source.root().await?;
        let mut needed = Self { bytes: 0, round_trips: ROUND_TRIPS, waits: waits(recorded)? };
        needed.bytes += looked.document.bytes.len() as u64 + looked.image.manifest.config.size;
        if root.digest != looked.document.digest {
            needed.bytes += root.bytes.len() as u64;
            needed.round_trips += 1;
        }
        let opened = Opened::from_looked(looked.image, image)?;
        needed.bytes += opened.layers().iter().map(|layer| layer.statistics().fetched_bytes).sum::<u64>();
        let mut frames = BTreeSet::new();
        for (layer, range) in listed(recorded, opened.layers())? {
            for extent in layer.index().extents_in(&range) {
                let frame = layer.index().extents()[extent].frame;
                if frames.insert((layer.digest().to_string(), frame)) {
                    needed.bytes += fetched_range(&layer.index().frames()[frame.0 as usize]).length;
                }
            }
        }
        Ok(needed)
    }
}

/// Reads how many reads waited, which stands before what was read.
fn waits(recorded: &Path) -> Result<u64> {
    let text = std::fs::read(recorded)?;
    let line = text.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let number = String::from_utf8_lossy(line).split(' ').nth(1).and_then(|number| number.parse().ok());
    number.context("the record does not begin with how many reads waited")
}

impl Ideal {
    pub(super) fn of(
        needed: Needed,
        link: LinkArguments,
        warm: &[Crossed],
        lazy: &[Crossed],
        listed: &[Crossed],
    ) -> Self {
        let ideal = |waits: u64| {
            let crossing = link.seconds(needed.bytes, needed.round_trips + waits);
            move |warm: &Crossed| crossing + warm.seconds
        };
        let (plain, waiting) = (ideal(0), ideal(needed.waits));
        let ratio = |runs: &[Crossed], ideal: &dyn Fn(&Crossed) -> f64| {
            median(runs.iter().zip(warm).map(|(run, warm)| run.seconds / ideal(warm)))
        };
        Self {
            needed,
            seconds: median(warm.iter().map(&plain)),
            seconds_with_waits: median(warm.iter().map(&waiting)),
            lazy: ratio(lazy, &plain),
            lazy_with_waits: ratio(lazy, &waiting),
            listed: (!listed.is_empty()).then(|| ratio(listed, &plain)),
        }
    }

    pub(super) fn print(&self) {
        let Needed { bytes: needed, round_trips, waits } = self.needed;
        print!(
            "ideal {:.2} s ({} and {round_trips} round trips): lazily {:.2} times",
            self.seconds,
            bytes(needed),
            self.lazy
        );
        if let Some(listed) = self.listed {
            print!(", with a list {listed:.2} times");
        }
        println!();
        println!(
            "{waits} reads waited; with a round trip for each, {:.2} s: lazily {:.2} times",
            self.seconds_with_waits, self.lazy_with_waits
        );
    }
}
