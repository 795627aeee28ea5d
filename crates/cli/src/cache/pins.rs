//! `cache pin` and `cache unpin`.

use clap::Args;
use serde::Serialize;

use super::{Place, pick};
use crate::{
    Global,
    failure::{self, Outcome},
    table::short_digest,
};

/// Which layers.
#[derive(Args)]
pub(crate) struct PinArguments {
    /// Images or layers
    #[arg(required = true, value_name = "REF|DIGEST")]
    names: Vec<String>,
    #[command(flatten)]
    place: Place,
}

#[derive(Serialize)]
struct Report {
    pinned: bool,
    layers: Vec<String>,
}

impl PinArguments {
    pub(super) fn run(self, global: &Global, pinned: bool) -> failure::Result {
        let store = self.place.open()?;
        let census = store.census()?;
        let mut layers = Vec::new();
        for name in &self.names {
            for layer in pick(&census, name)? {
                if store.set_pinned(layer, pinned)? && !layers.contains(&layer.blob) {
                    layers.push(layer.blob.clone());
                }
            }
        }
        if global.json {
            println!("{}", serde_json::to_string_pretty(&Report { pinned, layers })?);
        } else {
            layers.iter().for_each(|layer| println!("{}", short_digest(layer)));
        }
        Ok(Outcome::Done)
    }
}
