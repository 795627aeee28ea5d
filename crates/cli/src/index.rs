//! `index`: makes the layers of an image lazily readable that stay as they are: by an index beside them.

use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;
use loris_convert::soci::{self, SociImage, SociLayer, SociOptions, SociReport, Version};
use loris_format::{amounts, opening::Voucher, soci::SPAN_BYTES};
use loris_lazy::beside::NodeIndexes;
use loris_oci::{Descriptor, ImageSink, platform};

use crate::{
    Global,
    access::{self, OnePlatform},
    failure::{self, Outcome},
    opened::StorePlace,
    progress::Bars,
    table::{bytes, short_digest, table},
};

/// Make an index of an image's layers, which stay as they are, so that they can be read lazily.
///
/// Each layer that is plain gzip or tar is read once. The indexes stay on this machine, where `mount`, `run`, `fs` and the
/// snapshotter find them; with `--push` or `--index-repo` other machines do, too (SOCI, version 1).
#[derive(Args)]
pub(crate) struct IndexArguments {
    /// The image
    image: String,
    #[command(flatten)]
    platform: OnePlatform,
    /// Push the index into the image's repository, as a referrer of its manifest
    #[arg(long)]
    push: bool,
    /// Push the index into this repository instead: `registry/name`. Others find it with `--index-repo` too
    #[arg(long, value_name = "REPOSITORY")]
    index_repo: Option<String>,
    /// Uncompressed bytes between two places where reading can begin
    #[arg(long, value_name = "SIZE", value_parser = amounts::size, default_value_t = SPAN_BYTES)]
    soci_span_size: u64,
    /// Make no index of smaller layers
    #[arg(long, value_name = "SIZE", value_parser = amounts::size, default_value_t = 0)]
    soci_min_layer_size: u64,
    #[command(flatten)]
    place: StorePlace,
}

impl IndexArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        let source = global.access.source(&self.image).await?;
        let options = SociOptions {
            version: Version::One,
            span_bytes: self.soci_span_size,
            min_layer_bytes: self.soci_min_layer_size,
            ..SociOptions::default()
        };
        let (document, manifest) = platform::resolve_manifest(&*source, self.platform.wanted(), &options.limits)
            .await
            .with_context(|| access::doing("opening", &self.image))?;
        let plain: Vec<Descriptor> = manifest.layers.iter().filter(|layer| soci::is_plain(layer)).cloned().collect();
        let bars = Bars::new(global);
        let layers = soci::index_layers(&*source, &plain, &options, &bars)
            .await
            .with_context(|| access::doing("indexing", &self.image))?;
        bars.finish();
        let store = self.place.open()?;
        let node = NodeIndexes::of(&store);
        for indexed in &layers {
            if let Ok(built) = &indexed.outcome {
                node.keep(&indexed.layer.digest, &built.ztoc, Voucher::Node)?;
            }
        }
        let index = soci::index_manifest(&layers, &document.descriptor(), &options)?;
        for place in self.places() {
            let Some(index) = &index else { break };
            let sink: Arc<dyn ImageSink> = global.access.sink(&place).await?;
            soci::publish(&*sink, index, &layers)
                .await
                .with_context(|| access::doing("pushing the index to", &place))?;
        }
        let image = SociImage {
            platform: self
                .platform
                .wanted()
                .map_or_else(|| loris_oci::Platform::host().to_string(), ToString::to_string),
            digest: document.digest,
            index: index.as_ref().map(|index| index.digest),
            layers: layers.iter().map(SociLayer::of).collect(),
        };
        if global.json {
            let (digest, media_type) = (document.digest, document.media_type);
            let report = SociReport { digest, media_type, images: vec![image] };
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print!("{}", text(&image));
        }
        Ok(Outcome::Done)
    }

    /// Where the index goes beside this machine.
    fn places(&self) -> Vec<String> {
        let own = self.push.then(|| self.image.clone());
        own.into_iter().chain(self.index_repo.clone()).collect()
    }
}

fn text(image: &SociImage) -> String {
    let head = ["layer", ">size", ">index", ">spans", ""].map(str::to_owned).to_vec();
    let row = |layer: &SociLayer| {
        let index = layer.ztoc.map_or_else(String::new, |_| bytes(layer.ztoc_bytes));
        let spans = layer.ztoc.map_or_else(String::new, |_| layer.spans.to_string());
        let reason = layer.skipped.clone().unwrap_or_default();
        vec![short_digest(&layer.digest.to_string()), bytes(layer.bytes), index, spans, reason]
    };
    table(&std::iter::once(head).chain(image.layers.iter().map(row)).collect::<Vec<_>>())
}
