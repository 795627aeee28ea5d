//! `warm`: fetching all of an image ahead of time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Args;
use loris_lazy::{Completion, FetchPolicy, LayerStatistics, LazyLayer, Verdict};
use serde::Serialize;

use crate::{
    Global,
    access::OnePlatform,
    activity,
    failure::{self, Outcome},
    opened::{Looked, OpenLazily, Opened},
    progress::Bars,
    table::bytes,
};

/// Fetch all of an image ahead of time: it is mounted without its registry then.
#[derive(Args)]
pub(crate) struct WarmArguments {
    /// The image
    image: String,
    /// How long to go on trying while the registry is away, in seconds
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    patience: u64,
    #[command(flatten)]
    platform: OnePlatform,
    #[command(flatten)]
    open: OpenLazily,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    name: &'a str,
    digest: String,
    seconds: f64,
    layers: Vec<Layer>,
}

#[derive(Serialize)]
struct Layer {
    digest: String,
    /// Compressed bytes of the blob.
    size: u64,
    /// Compressed bytes that came over the network.
    fetched: u64,
    requests: u64,
    /// `sound` with the DiffID, or why that is not known.
    verdict: Option<String>,
}

impl WarmArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        let began = Instant::now();
        let store = self.open.store()?;
        let looked = Looked::open(global, &self.image, &self.platform, &self.open, &store, FetchPolicy::EXACT).await?;
        let digest = looked.document.digest;
        let opened = Opened::from_looked(looked.image, &self.image)?;
        opened.fill_unasked().await;
        let layers = opened.layers();
        let how = Completion { patience: Duration::from_secs(self.patience), ..Completion::default() };
        let bar = Bars::new(global).whole(layers.iter().map(|layer| layer.descriptor().size).sum());
        activity::tell(&store, "warm", &self.image, None, layers);
        let completing = loris_lazy::complete_all(layers, &how);
        tokio::pin!(completing);
        loop {
            tokio::select! {
                done = &mut completing => {
                    done.with_context(|| format!("fetching {}", self.image))?;
                    break;
                }
                () = tokio::time::sleep(Duration::from_millis(200)) => bar.set_position(total(layers).fetched_bytes),
            }
        }
        bar.finish_and_clear();
        if global.json {
            let layers = layers.iter().map(Layer::from).collect();
            let seconds = began.elapsed().as_secs_f64();
            let report = Report { name: &self.image, digest: digest.to_string(), seconds, layers };
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            println!("{}@{digest}", self.image.split('@').next().unwrap_or(&self.image));
            if !global.quiet {
                let total = total(layers);
                let fetched = bytes(total.fetched_bytes);
                eprintln!("all of it is here: {fetched} in {} requests, {:.1?}", total.requests, began.elapsed());
            }
        }
        Ok(Outcome::Done)
    }
}

impl From<&Arc<LazyLayer>> for Layer {
    fn from(layer: &Arc<LazyLayer>) -> Self {
        let LayerStatistics { fetched_bytes, requests, .. } = layer.statistics();
        Self {
            digest: layer.digest().to_string(),
            size: layer.descriptor().size,
            fetched: fetched_bytes,
            requests,
            verdict: layer.verdict().as_ref().map(Verdict::to_string),
        }
    }
}

fn total(layers: &[Arc<LazyLayer>]) -> LayerStatistics {
    layers.iter().map(|layer| layer.statistics()).fold(LayerStatistics::default(), |sum, layer| LayerStatistics {
        fetched_bytes: sum.fetched_bytes + layer.fetched_bytes,
        requests: sum.requests + layer.requests,
        ..sum
    })
}
